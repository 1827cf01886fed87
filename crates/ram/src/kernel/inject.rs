//! One system call inside another process, which does not notice.
//!
//! A userfaultfd is for the memory of the process that makes it, so QEMU has to make it. With `ptrace(2)`, one thread of
//! QEMU is stopped wherever it is and its registers are noted. Then they are set as if it were about to make our system
//! call: the instruction for that is found in code that the process has anyway, so none of its memory is changed. It is
//! let go until the call is over, gets its own registers back, and goes on where it was. All other threads run on.
//!
//! What makes it exact:
//!
//! - A thread stopped *in* a system call (QEMU's main thread is in `ppoll` most of the time) holds in its registers the
//!   order to begin that call again. The kernel follows it on the way out of a stop like the first one, but says nothing
//!   of the stop at the end of a system call; so the thread is brought to another stop like the first before it goes.
//! - A signal may arrive before our call begins. Its handler must find the thread's own registers: these are put back,
//!   the signal is passed on, and we begin anew at the handler's first instruction.
//! - A thread that has our registers is waited for as long as it takes, on a host however busy: let go there, it would go
//!   on behind our system call instead of where it was. Only before that is it given up when it does not stop.
//! - A seccomp filter may end a process for a call that it does not know (`-sandbox on`, a container's). It is suspended
//!   for the thread as long as that is traced, which the kernel grants to who has `CAP_SYS_ADMIN`.
//! - `ptrace` belongs to an operating system's thread, and what it holds is let go when that thread ends. One is started
//!   for each call, so nothing that goes wrong here leaves QEMU stopped.
//! - A tracer that is killed in the middle leaves the thread astray, so it is a process of its own where there can be one
//!   ([`tracer`]).
//!
//! A stop is found by asking whether there is one rather than with `waitpid`: a child's stop is told to any thread of
//! ours that waits for it, and whoever waits for QEMU's end may be first.

pub(super) mod tracer;

use std::fs::{self, File};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::{self, user_regs_struct as Registers};
use nix::sys::ptrace;
use nix::unistd::Pid;
use rustix::fs::OFlags;

use super::machine;
use crate::process::{Process, ThreadStatus, process_of};

/// How long a thread that has its own registers may take to stop. One that waits for a disk does not stop before the disk
/// has answered.
const PATIENCE: Duration = Duration::from_millis(250);
/// How many threads are tried.
const THREADS: usize = 8;
/// A thread that has not stopped after this may have ended.
const SOON: Duration = Duration::from_millis(1);
/// How often it is looked whether a thread has stopped.
const GLANCE: Duration = Duration::from_micros(10);
/// The same, of one that takes longer than [`PATIENCE`].
const SELDOM: Duration = Duration::from_millis(1);
/// How many stops that are not ours may come before ours; each is one signal, or one end of a job's pause.
const STRANGE_STOPS: usize = 1000;
/// The most of a mapping that is searched for an instruction.
const CODE: u64 = 4 << 20;
/// `USERFAULTFD_IOC_NEW` of the device.
const NEW: u64 = 0xaa00;
/// `UFFD_USER_MODE_ONLY`
const USER_MODE_ONLY: u64 = 1;
/// `PTRACE_EVENT_STOP`, in the second byte of a stop's code.
const EVENT_STOP: i32 = 128;
/// `PTRACE_O_SUSPEND_SECCOMP`
const SUSPEND_SECCOMP: ptrace::Options = ptrace::Options::from_bits_retain(1 << 21);
/// The code of a stop at the beginning or the end of a system call.
const CALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// Why no system call could be made inside QEMU.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process has ended.
    #[error("QEMU has ended")]
    Gone,
    /// A debugger holds it.
    #[error("QEMU is traced by process {tracer}, a debugger perhaps, and only one may")]
    AlreadyTraced {
        /// The debugger's pid.
        tracer: u32,
    },
    /// A filter says which system calls it may make, and could kill it for ours.
    #[error(
        "QEMU runs in a seccomp sandbox (`-sandbox on`, or a container's), and this agent may not suspend that for a moment: it takes CAP_SYS_ADMIN, no sandbox around the agent, and a kernel with CONFIG_CHECKPOINT_RESTORE"
    )]
    Sandboxed,
    /// We may not touch it.
    #[error(
        "this agent may not trace QEMU: run it as root or as QEMU's user, and see the sysctl kernel.yama.ptrace_scope"
    )]
    NotAllowed {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its threads are in system calls that cannot be interrupted.
    #[error("QEMU did not stop for {} ms, as a process does that waits for a disk that hangs", after.as_millis())]
    DoesNotStop {
        /// How long it was waited for.
        after: Duration,
    },
    /// It is not a 64-bit program or has no code that makes a system call.
    #[error("QEMU is a program for another processor than this agent's")]
    Foreign,
    /// QEMU's user may not have the kernel wait for missing pages.
    #[error(
        "QEMU's user may not make a userfaultfd: the agent needs /dev/userfaultfd to lend it, or set the sysctl vm.unprivileged_userfaultfd=1"
    )]
    QemuNotAllowed,
    /// Our system call failed.
    #[error("{call} failed inside QEMU")]
    Refused {
        /// Which one.
        call: &'static str,
        /// What it gave back.
        #[source]
        source: io::Error,
    },
    /// The descriptor is not one that was made here.
    #[error("descriptor {number} of QEMU is not a userfaultfd")]
    NotOurs {
        /// Which one.
        number: RawFd,
    },
    /// Another error.
    #[error("cannot {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Who must not end what a userfaultfd does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// It is closed inside the process before that goes on: when we end, however that may be, all that was registered
    /// ends with us.
    Ours,
    /// It stays open in the process: we may end and take it again.
    There,
}

/// Whose accesses to missing pages wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The process's own; system calls that meet such a page fail. Any process may have this.
    User,
    /// Also the kernel's, for the process. It takes `CAP_SYS_PTRACE`, `vm.unprivileged_userfaultfd=1`, or a descriptor of
    /// `/dev/userfaultfd` that the process was lent.
    Kernel,
}

/// A userfaultfd that was made inside another process.
#[derive(Debug)]
pub(crate) struct Inside {
    pub(crate) descriptor: OwnedFd,
    /// What it is, or was, in the process.
    pub(crate) number: RawFd,
    /// How long the thread stood still for it.
    pub(crate) stood_still: Duration,
}

/// Makes a userfaultfd inside a process and takes it.
pub(crate) fn make_in(process: &Process, reach: Reach, keep: Keep) -> Result<Inside, InjectError> {
    tracer::make_there(process, reach, keep).unwrap_or_else(|| make_here(process, reach, keep))
}

/// The same, by this process.
fn make_here(process: &Process, reach: Reach, keep: Keep) -> Result<Inside, InjectError> {
    let flags = u64::from((OFlags::CLOEXEC | OFlags::NONBLOCK).bits());
    let flags = if reach == Reach::User { flags | USER_MODE_ONLY } else { flags };
    let ((descriptor, number), stood_still) = with_a_thread(process, |thread| {
        let number = thread.make_userfaultfd(process, flags)? as RawFd;
        let descriptor = process.take(number);
        if keep == Keep::Ours || descriptor.is_err() {
            thread.call("close", machine::CLOSE, [number as u64, 0, 0])?;
        }
        Ok((descriptor.map_err(|source| InjectError::Io { doing: "take a descriptor from QEMU", source })?, number))
    })?;
    Ok(Inside { descriptor, number, stood_still })
}

/// Closes a userfaultfd inside a process.
pub(crate) fn close_in(process: &Process, number: RawFd) -> Result<(), InjectError> {
    tracer::close_there(process, number).unwrap_or_else(|| close_here(process, number))
}

/// The same, by this process.
fn close_here(process: &Process, number: RawFd) -> Result<(), InjectError> {
    if !process.has_userfaultfd(number) {
        return Err(InjectError::NotOurs { number });
    }
    with_a_thread(process, |thread| thread.call("close", machine::CLOSE, [number as u64, 0, 0]))?;
    Ok(())
}

/// Does `work` with the first thread that stops, and tells how long that thread stood still.
fn with_a_thread<T: Send>(
    process: &Process,
    work: impl FnOnce(&mut Stopped) -> Result<T, InjectError> + Send,
) -> Result<(T, Duration), InjectError> {
    let threads = process.threads().map_err(|_| InjectError::Gone)?;
    with_one_of(process, &threads, work)
}

fn with_one_of<T: Send>(
    process: &Process,
    threads: &[u32],
    work: impl FnOnce(&mut Stopped) -> Result<T, InjectError> + Send,
) -> Result<(T, Duration), InjectError> {
    let tracing = || {
        let instruction = find_instruction(process)?;
        let mut error = InjectError::Gone;
        for thread in threads.iter().take(THREADS) {
            match Stopped::stop(process, *thread, instruction) {
                Ok(mut stopped) => {
                    let begun = stopped.begun;
                    let done = work(&mut stopped)?;
                    drop(stopped);
                    return Ok((done, begun.elapsed()));
                }
                Err(other @ (InjectError::DoesNotStop { .. } | InjectError::Gone)) => error = other,
                Err(other) => return Err(other),
            }
        }
        Err(error)
    };
    thread::scope(|scope| scope.spawn(tracing).join().unwrap_or_else(|panic| resume_unwind(panic)))
}

/// The address of an instruction that makes a system call. The page that the kernel gives every process has one, and so
/// has its C library.
fn find_instruction(process: &Process) -> Result<u64, InjectError> {
    let unreadable = |source: io::Error| match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => InjectError::NotAllowed { source },
        Some(libc::ESRCH | libc::ENOENT) => InjectError::Gone,
        _ => InjectError::Io { doing: "read QEMU's memory", source },
    };
    let mut mappings = process.mappings().map_err(unreadable)?;
    mappings.retain(|mapping| mapping.permissions.starts_with("r-x") && mapping.path != "[vsyscall]");
    mappings.sort_by_key(|mapping| mapping.path != "[vdso]");
    let memory = File::open(format!("/proc/{}/mem", process.pid)).map_err(unreadable)?;
    for mapping in mappings {
        let mut code = vec![0; (mapping.range.end - mapping.range.start).min(CODE) as usize];
        if memory.read_exact_at(&mut code, mapping.range.start).is_ok()
            && let Some(offset) = machine::find_instruction(&code)
        {
            return Ok(mapping.range.start + offset as u64);
        }
    }
    Err(InjectError::Foreign)
}

/// What a thread has stopped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// We asked for it, or a job's pause began or ended.
    Trap,
    /// A system call begins or ends.
    Call,
    /// A signal is about to be delivered.
    Signal(i32),
}

/// A thread of another process that stands still and goes on when this is dropped.
struct Stopped {
    thread: Pid,
    instruction: u64,
    /// Its own.
    registers: Registers,
    /// It does not have its own at the moment.
    changed: bool,
    begun: Instant,
}

impl Stopped {
    fn stop(process: &Process, thread: u32, instruction: u64) -> Result<Self, InjectError> {
        let mut options = ptrace::Options::PTRACE_O_TRACESYSGOOD;
        let sandboxed = match process.thread_status(thread) {
            None | Some(ThreadStatus { ended: true, .. }) => return Err(InjectError::Gone),
            Some(ThreadStatus { tracer: Some(tracer), .. }) => {
                return Err(InjectError::AlreadyTraced { tracer: process_of(tracer) });
            }
            Some(status) => status.sandboxed,
        };
        if sandboxed {
            options |= SUSPEND_SECCOMP;
        }
        let thread = Pid::from_raw(thread as i32);
        ptrace::seize(thread, options).map_err(|errno| match errno {
            Errno::ESRCH => InjectError::Gone,
            Errno::EPERM | Errno::EINVAL if sandboxed && !has_ended(thread) => InjectError::Sandboxed,
            // It is also what the kernel says of a thread that has ended since we looked.
            Errno::EPERM if has_ended(thread) => InjectError::Gone,
            Errno::EPERM => InjectError::NotAllowed { source: errno.into() },
            errno => failed("trace QEMU", errno),
        })?;
        let begun = Instant::now();
        ptrace::interrupt(thread).map_err(|errno| failed("stop QEMU", errno))?;
        wait_for_trap(thread, Some(PATIENCE))?;
        let registers = ptrace::getregs(thread).map_err(|errno| failed("read QEMU's registers", errno))?;
        let stopped = Self { thread, instruction, registers, changed: false, begun };
        if !machine::is_like_us(&stopped.registers) {
            return Err(InjectError::Foreign);
        }
        Ok(stopped)
    }

    /// What a process may not make by the system call, it may by the device, if it was lent that.
    fn make_userfaultfd(&mut self, process: &Process, flags: u64) -> Result<i64, InjectError> {
        match self.call("userfaultfd", machine::USERFAULTFD, [flags, 0, 0]) {
            Err(InjectError::QemuNotAllowed) => {
                let device = process.userfaultfd_device().ok_or(InjectError::QemuNotAllowed)?;
                self.call("ioctl", machine::IOCTL, [device as u64, NEW, flags])
            }
            made => made,
        }
    }

    /// Makes a system call and gives back what that did.
    fn call(&mut self, name: &'static str, call: u64, arguments: [u64; 3]) -> Result<i64, InjectError> {
        self.begin_call(call, arguments)?;
        // A thread in a system call takes no signals.
        resume(libc::PTRACE_SYSCALL, self.thread, 0)?;
        if wait(self.thread, None)? != Stop::Call {
            return Err(failed("follow a system call inside QEMU", Errno::EPROTO));
        }
        let registers = ptrace::getregs(self.thread).map_err(|errno| failed("read QEMU's registers", errno))?;
        match machine::result(&registers) {
            result @ 0.. => Ok(result),
            negative if negative == -i64::from(libc::EPERM) => Err(InjectError::QemuNotAllowed),
            negative => {
                Err(InjectError::Refused { call: name, source: io::Error::from_raw_os_error(-negative as i32) })
            }
        }
    }

    /// Brings the thread to the beginning of a system call.
    fn begin_call(&mut self, call: u64, arguments: [u64; 3]) -> Result<(), InjectError> {
        let mut ready = false;
        for _ in 0..STRANGE_STOPS {
            if !ready {
                self.changed = true;
                self.set(machine::calling(&self.registers, self.instruction, call, arguments))?;
                ready = true;
            }
            resume(libc::PTRACE_SYSCALL, self.thread, 0)?;
            match wait(self.thread, None)? {
                Stop::Call => return Ok(()),
                Stop::Trap => {}
                Stop::Signal(signal) => {
                    self.pass_on(signal)?;
                    ready = false;
                }
            }
        }
        Err(InjectError::DoesNotStop { after: self.begun.elapsed() })
    }

    /// The signal is delivered to the thread with its own registers; it stops again at what it does then.
    fn pass_on(&mut self, signal: i32) -> Result<(), InjectError> {
        self.set(self.registers)?;
        self.changed = false;
        ptrace::interrupt(self.thread).map_err(|errno| failed("stop QEMU", errno))?;
        resume(libc::PTRACE_CONT, self.thread, signal)?;
        wait_for_trap(self.thread, Some(PATIENCE))?;
        self.registers = ptrace::getregs(self.thread).map_err(|errno| failed("read QEMU's registers", errno))?;
        Ok(())
    }

    fn set(&self, registers: Registers) -> Result<(), InjectError> {
        ptrace::setregs(self.thread, registers).map_err(|errno| failed("set QEMU's registers", errno))
    }

    /// Puts everything back and comes to a stop out of which the kernel begins an interrupted system call again.
    fn restore(&self) -> Result<(), InjectError> {
        self.set(self.registers)?;
        ptrace::interrupt(self.thread).map_err(|errno| failed("stop QEMU", errno))?;
        resume(libc::PTRACE_CONT, self.thread, 0)?;
        wait_for_trap(self.thread, None)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.changed {
            // It fails only when the process was killed.
            let _ = self.restore();
        }
        let _ = ptrace::detach(self.thread, None);
    }
}

/// Waits for the stop that we asked for, and passes on the signals that come before it.
fn wait_for_trap(thread: Pid, patience: Option<Duration>) -> Result<(), InjectError> {
    for _ in 0..STRANGE_STOPS {
        match wait(thread, patience)? {
            Stop::Trap => return Ok(()),
            Stop::Call => resume(libc::PTRACE_CONT, thread, 0)?,
            Stop::Signal(signal) => resume(libc::PTRACE_CONT, thread, signal)?,
        }
    }
    Err(InjectError::DoesNotStop { after: PATIENCE })
}

/// Waits until the thread has stopped; so long, or as long as it takes.
fn wait(thread: Pid, patience: Option<Duration>) -> Result<Stop, InjectError> {
    let begun = Instant::now();
    loop {
        match ptrace::getsiginfo(thread) {
            Ok(stop) if stop.si_code >> 8 == EVENT_STOP => return Ok(Stop::Trap),
            Ok(stop) if stop.si_code == CALL_STOP => return Ok(Stop::Call),
            Ok(stop) => return Ok(Stop::Signal(stop.si_signo)),
            // It has not stopped, or it has ended.
            Err(Errno::ESRCH) if begun.elapsed() > SOON && has_ended(thread) => return Err(InjectError::Gone),
            Err(Errno::ESRCH) if begun.elapsed() < PATIENCE => thread::sleep(GLANCE),
            Err(Errno::ESRCH) => match patience {
                Some(after) => return Err(InjectError::DoesNotStop { after }),
                None => thread::sleep(SELDOM),
            },
            Err(errno) => return Err(failed("see where QEMU stopped", errno)),
        }
    }
}

fn has_ended(thread: Pid) -> bool {
    // Any thread's folder is there under its own number, though it is not listed.
    let text = fs::read_to_string(format!("/proc/{thread}/stat")).unwrap_or_default();
    let state = text.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_none_or(|state| matches!(state, 'Z' | 'X'))
}

/// Lets a thread go until its next stop. Numbers of signals are plain, as not all of them have names.
fn resume(request: libc::c_uint, thread: Pid, signal: i32) -> Result<(), InjectError> {
    let signal = ptr::without_provenance_mut::<libc::c_void>(signal as usize);
    // SAFETY: these requests take numbers only, and the kernel refuses threads that we do not trace.
    #[expect(unsafe_code)]
    let result = unsafe { libc::ptrace(request, thread.as_raw(), ptr::null_mut::<libc::c_void>(), signal) };
    Errno::result(result).map(drop).map_err(|errno| failed("continue QEMU", errno))
}

fn failed(doing: &'static str, errno: Errno) -> InjectError {
    match errno {
        // We hold the thread, so it can only have been killed.
        Errno::ESRCH => InjectError::Gone,
        errno => InjectError::Io { doing, source: errno.into() },
    }
}

#[cfg(test)]
mod tests;
