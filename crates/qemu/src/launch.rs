//! Starting a QEMU that outlives us.
//!
//! It gets a session of its own, its output goes to a log file, and it is told nothing when we end. Until it answers on
//! QMP it is ours, and dropping the launch ends it.

mod guest_ram;
mod plan;

pub use guest_ram::guest_ram;
pub use plan::{Incoming, LaunchPlan, LaunchSettings, chosen_accelerator, plan_launch, wants_shared_ram, without_ours};

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};

use crate::proc_stat::Stat;
use crate::process::process_start_time;
use crate::qmp::{Qmp, QmpError, pid_of_socket_peer};

/// How much of QEMU's log is quoted when it ends early, in bytes and lines.
const LAST_WORDS: u64 = 4 << 10;
const LAST_LINES: usize = 8;
/// How often it is looked whether a QEMU that starts gets on.
const LOOK: Duration = Duration::from_millis(500);
/// Longer than anything takes.
const FOREVER: Duration = Duration::from_secs(24 * 3600);
/// How long a QEMU whose QMP failed may take to end by itself, so that its own words can be told.
const LAST_GASP: Duration = Duration::from_millis(500);

/// A QEMU that runs and answers.
#[derive(Clone, Debug)]
pub struct Launched {
    /// Its process.
    pub pid: u32,
    /// When that process started, in clock ticks since boot: with the pid it names the process for ever.
    pub start_time: u64,
    /// Its monitor.
    pub qmp: Qmp,
}

/// Why a QEMU could not be launched; none is left running.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file that the launch needs.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It could not even be started.
    #[error("cannot start {binary}")]
    Start {
        /// The binary.
        binary: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended before it answered.
    #[error("{} ended at once ({}): {}", binary.display(), in_words(*status), or_nothing(words))]
    Exited {
        /// Which.
        binary: PathBuf,
        /// How.
        status: ExitStatus,
        /// The last lines that it wrote.
        words: String,
    },
    /// It runs but does not answer, and was killed.
    #[error("QEMU starts but does not answer, and was killed; it said: {}", or_nothing(words))]
    NotAnswering {
        /// What happened instead.
        #[source]
        source: QmpError,
        /// The last lines that it wrote.
        words: String,
    },
}

/// Starts what was planned, in this folder, and waits until it answers on QMP, however long that takes, while it gets on:
/// one that has hundreds of GiB to allocate takes minutes. One that does nothing for as long as `patience` is given up. It
/// inherits `ram`, the file that was planned with. Dropping the future ends the QEMU.
pub async fn launch(
    binary: &Path,
    plan: &LaunchPlan,
    ram: Option<OwnedFd>,
    cwd: &Path,
    run_dir: &Path,
    patience: Duration,
) -> Result<Launched, LaunchError> {
    let socket = run_dir.join("qmp.sock");
    let log = run_dir.join("qemu.log");
    // What a QEMU of old left here would refuse us, or worse, answer.
    match std::fs::remove_file(&socket) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(LaunchError::File { path: socket, source });
        }
        _ => {}
    }
    let in_log = |source| LaunchError::File { path: log.clone(), source };
    // QEMU's descriptor must append, or the log could not be cut while it runs; see `log::cut`.
    let output = OpenOptions::new().create(true).append(true).open(&log).map_err(in_log)?;
    let log_start = output.metadata().map_err(in_log)?.len();
    let errors = output.try_clone().map_err(in_log)?;

    let mut command = Command::new(binary);
    command.args(plan.argv.iter().skip(1)).current_dir(cwd).stdin(Stdio::null()).stdout(output).stderr(errors);
    detach(&mut command, ram);
    let child = command.spawn().map_err(|source| LaunchError::Start { binary: binary.into(), source })?;
    let mut starting = Starting(Some(child));

    let words = || last_words(&log, log_start).unwrap_or_default();
    let leader = starting.child().id();
    let connected = tokio::select! {
        connected = Qmp::connect(&socket, FOREVER) => connected,
        () = stands_still(leader, patience) => Err(QmpError::NoGreeting { path: socket.clone(), after: patience }),
        status = starting.child().wait() => {
            let status = status.map_err(|source| LaunchError::Start { binary: binary.into(), source })?;
            return Err(LaunchError::Exited { binary: binary.into(), status, words: words() });
        }
    };
    let qmp = match connected {
        Ok(qmp) => qmp,
        Err(source) => {
            return Err(match tokio::time::timeout(LAST_GASP, starting.child().wait()).await {
                Ok(Ok(status)) => LaunchError::Exited { binary: binary.into(), status, words: words() },
                _ => LaunchError::NotAnswering { source, words: words() },
            });
        }
    };
    // The binary may be a script that starts QEMU; who made the socket is QEMU.
    let launched = pid_of_socket_peer(&qmp).and_then(|pid| Some((pid, process_start_time(pid)?)));
    let Some((pid, start_time)) = launched else {
        return Err(LaunchError::NotAnswering { source: QmpError::Closed, words: words() });
    };
    starting.let_go();
    Ok(Launched { pid, start_time, qmp })
}

/// Returns when this process has used neither its processors nor more memory for so long.
async fn stands_still(pid: Option<u32>, patience: Duration) {
    let used = || {
        let pid = pid?;
        let cpu_s = Stat::read(&format!("/proc/{pid}/stat"))?.with_children_s;
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        Some((cpu_s, statm.split(' ').nth(1)?.to_owned()))
    };
    let (mut since, mut last) = (Instant::now(), used());
    while since.elapsed() < patience {
        tokio::time::sleep(LOOK.min(patience / 4)).await;
        let now = used();
        if now != last {
            (since, last) = (Instant::now(), now);
        }
    }
}

/// Puts the child into a session of its own, so that no terminal's and no service's signals reach it, and keeps from it
/// the descriptors that we were given without the mark to close them. All of our own have that mark.
fn detach(command: &mut Command, ram: Option<OwnedFd>) {
    let inherited = descriptors_without_close_on_exec();
    let in_child = move || {
        rustix::process::setsid()?;
        if let Some(ram) = &ram {
            rustix::io::fcntl_setfd(ram, FdFlags::empty())?;
        }
        for fd in &inherited {
            // SAFETY: the descriptor is only marked, in a child that has one thread and does nothing but become QEMU;
            // one that was closed in the meantime is an error that is ignored.
            #[expect(unsafe_code)]
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            let _ = rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC);
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls may be made: setsid and fcntl are, and nothing here
    // allocates or locks.
    #[expect(unsafe_code)]
    unsafe {
        command.pre_exec(in_child);
    }
}

fn descriptors_without_close_on_exec() -> Vec<i32> {
    let Ok(all) = std::fs::read_dir("/proc/self/fdinfo") else { return Vec::new() };
    let numbers = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    numbers.filter(|fd| *fd > 2 && !closes_on_exec(*fd)).collect()
}

/// Linux gives `O_CLOEXEC` this value on every architecture that QEMU's KVM runs guests on, and tells it in octal.
fn closes_on_exec(fd: i32) -> bool {
    const O_CLOEXEC: u32 = 0o2_000_000;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    // Closed in the meantime: nothing to keep from anybody.
    flags.is_none_or(|flags| flags & O_CLOEXEC != 0)
}

/// A QEMU that has not answered yet: dropped, it ends.
struct Starting(Option<Child>);

impl Starting {
    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it is there until it is let go, which takes it")
    }

    /// It is on its own now. While we live we wait for its end, or the dead QEMU would stay in the process table.
    fn let_go(mut self) {
        let Some(mut child) = self.0.take() else { return };
        tokio::spawn(async move {
            let pid = child.id();
            match child.wait().await {
                Ok(status) => tracing::debug!(pid, status = in_words(status), "a QEMU ended"),
                Err(error) => tracing::warn!(pid, %error, "cannot wait for a QEMU"),
            }
        });
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let Some(child) = self.0.take() else { return };
        // It leads its session and hence its group; the runtime waits for it. An id is there while it was not waited for.
        let leader = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(leader) = leader {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// The last lines that were written to the log since it was this long.
fn last_words(log: &Path, start: u64) -> std::io::Result<String> {
    let mut file = File::open(log)?;
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(start.max(end.saturating_sub(LAST_WORDS))))?;
    let mut bytes = Vec::new();
    file.take(LAST_WORDS).read_to_end(&mut bytes)?;
    Ok(last_lines(&String::from_utf8_lossy(&bytes)))
}

pub(crate) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

pub(crate) fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

pub(crate) fn or_nothing(words: &str) -> &str {
    if words.is_empty() { "it said nothing" } else { words }
}
