//! A process of its own that traces QEMU, so that nobody who kills the agent kills the tracer.
//!
//! A tracer that ends lets go of what it traces as that is. In the middle of a call that is a thread of QEMU with
//! registers of ours, which would go on behind our system call instead of where it was. The window is a fraction of a
//! millisecond, but an agent is large, and may be killed at any time: by its user, or for its memory. This process does
//! nothing else, and takes no signal that can be refused.
//!
//! It is told on its standard input what to do, answers with a line, and ends when that input does.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::SigSet;

use super::{InjectError, Inside, Keep, Reach, close_here, make_here};
use crate::error::in_one_line;
use crate::process::Process;

/// What an answer begins with: tests print other lines.
const ANSWER: &str = "traced: ";

static TRACER: OnceLock<fn() -> Command> = OnceLock::new();

/// From here on QEMUs are traced by a process that this starts: one that calls [`trace_qemu`], and nothing else.
pub fn trace_by(tracer: fn() -> Command) {
    // It is said once, by whoever has such a program.
    let _ = TRACER.set(tracer);
}

/// The tracing process: does what it is told, and comes back when it may end. Call it before there are other threads.
pub fn trace_qemu() {
    // A service manager tells all of a service's processes to end.
    let _ = SigSet::all().thread_block();
    let mut input = io::stdin().lock();
    let mut order = String::new();
    if !matches!(input.read_line(&mut order), Ok(1..)) {
        return;
    }
    let done = obey(&order);
    let (words, _ours_until_it_is_taken) = match done {
        Ok((words, descriptor)) => (words, descriptor),
        Err(error) => (in_words(&error), None),
    };
    // Who does not hear it any more has ended.
    let _ = writeln!(io::stdout(), "{ANSWER}{words}");
    let _ = input.read_line(&mut order);
}

fn obey(order: &str) -> Result<(String, Option<OwnedFd>), InjectError> {
    let words: Vec<&str> = order.split_whitespace().collect();
    let number = |index: usize| words.get(index).and_then(|word| word.parse().ok()).unwrap_or(0);
    let process = Process::open(number(1)).map_err(|_| InjectError::Gone)?;
    match words.first() {
        Some(&"make") => {
            let reach = if words.contains(&"kernel") { Reach::Kernel } else { Reach::User };
            let keep = if words.contains(&"there") { Keep::There } else { Keep::Ours };
            let Inside { descriptor, number, stood_still } = make_here(&process, reach, keep)?;
            let words = format!("made {} {number} {}", descriptor.as_raw_fd(), stood_still.as_nanos());
            Ok((words, Some(descriptor)))
        }
        _ => close_here(&process, number(2) as RawFd).map(|()| ("made 0 0 0".into(), None)),
    }
}

fn in_words(error: &InjectError) -> String {
    let errno = |error: &io::Error| error.raw_os_error().unwrap_or(0);
    match error {
        InjectError::Gone => "gone".into(),
        InjectError::AlreadyTraced { tracer } => format!("already-traced {tracer}"),
        InjectError::Sandboxed => "sandboxed".into(),
        InjectError::NotAllowed { source } => format!("not-allowed {}", errno(source)),
        InjectError::DoesNotStop { after } => format!("does-not-stop {}", after.as_millis()),
        InjectError::Foreign => "foreign".into(),
        InjectError::QemuNotAllowed => "qemu-not-allowed".into(),
        InjectError::NotOurs { number } => format!("not-ours {number}"),
        other => format!("other {}", in_one_line(other)),
    }
}

fn from_words(words: &str) -> InjectError {
    let (kind, rest) = words.split_once(' ').unwrap_or((words, ""));
    let number = rest.parse().unwrap_or(0);
    match kind {
        "gone" => InjectError::Gone,
        "already-traced" => InjectError::AlreadyTraced { tracer: number },
        "sandboxed" => InjectError::Sandboxed,
        "not-allowed" => InjectError::NotAllowed { source: io::Error::from_raw_os_error(number as i32) },
        "does-not-stop" => InjectError::DoesNotStop { after: Duration::from_millis(number.into()) },
        "foreign" => InjectError::Foreign,
        "qemu-not-allowed" => InjectError::QemuNotAllowed,
        "not-ours" => InjectError::NotOurs { number: number as RawFd },
        _ => failed(io::Error::other(rest.to_owned())),
    }
}

fn failed(source: io::Error) -> InjectError {
    InjectError::Io { doing: "have a system call made inside QEMU", source }
}

/// A tracing process, which ends with this.
struct Tracer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Tracer {
    /// None where nobody said which program that is.
    fn start() -> Option<io::Result<Self>> {
        let mut command = TRACER.get()?();
        // Also a terminal's signals are not for it.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        Some(command.spawn().map(|mut child| {
            let (input, output) = (child.stdin.take(), child.stdout.take().expect("it is piped"));
            Self { child, input, output: BufReader::new(output) }
        }))
    }

    /// Its descriptor, QEMU's, and how long a thread stood still.
    fn ask(&mut self, order: &str) -> Result<(RawFd, RawFd, Duration), InjectError> {
        let input = self.input.as_mut().expect("it is there until the end");
        writeln!(input, "{order}").map_err(failed)?;
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line).map_err(failed)? == 0 {
                return Err(failed(io::Error::other("the process that was to trace it ended")));
            }
            // A test's first line may begin with something else.
            let Some((_, answer)) = line.trim_end().split_once(ANSWER) else { continue };
            let Some(made) = answer.strip_prefix("made ") else { return Err(from_words(answer)) };
            let mut numbers = made.split(' ').map(|word| word.parse().unwrap_or(0));
            let mut next = || numbers.next().unwrap_or(0_u64);
            return Ok((next() as RawFd, next() as RawFd, Duration::from_nanos(next())));
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.input.take();
        // All that it does takes only so long.
        let _ = self.child.wait();
    }
}

/// As [`make_here`]. None where there is no tracing process.
pub(super) fn make_there(process: &Process, reach: Reach, keep: Keep) -> Option<Result<Inside, InjectError>> {
    let made = |mut tracer: Tracer| {
        let reach = if reach == Reach::Kernel { "kernel" } else { "user" };
        let keep = if keep == Keep::There { "there" } else { "ours" };
        let (descriptor, number, stood_still) = tracer.ask(&format!("make {} {reach} {keep}", process.pid))?;
        let descriptor = Process::open(tracer.child.id()).and_then(|tracer| tracer.take(descriptor)).map_err(failed)?;
        Ok(Inside { descriptor, number, stood_still })
    };
    Some(Tracer::start()?.map_err(failed).and_then(made))
}

/// As [`close_here`]. None where there is no tracing process.
pub(super) fn close_there(process: &Process, number: RawFd) -> Option<Result<(), InjectError>> {
    let closed = |mut tracer: Tracer| tracer.ask(&format!("close {} {number}", process.pid)).map(drop);
    Some(Tracer::start()?.map_err(failed).and_then(closed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_it_failed_is_told_from_one_process_to_another() {
        for error in [
            InjectError::Gone,
            InjectError::AlreadyTraced { tracer: 77 },
            InjectError::Sandboxed,
            InjectError::NotAllowed { source: io::Error::from_raw_os_error(1) },
            InjectError::DoesNotStop { after: Duration::from_millis(250) },
            InjectError::Foreign,
            InjectError::QemuNotAllowed,
            InjectError::NotOurs { number: 5 },
        ] {
            let told = from_words(&in_words(&error));
            assert_eq!(in_one_line(&told), in_one_line(&error));
        }
        let refused = InjectError::Refused { call: "close", source: io::Error::from_raw_os_error(9) };
        let told = from_words(&in_words(&refused));
        assert!(in_one_line(&told).ends_with(&in_one_line(&refused)), "{told:?}");
    }
}
