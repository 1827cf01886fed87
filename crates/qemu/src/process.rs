//! QEMU as a process: is it still the same one, what was it started with, and ending it.
//!
//! A pid alone names nobody, as the kernel gives it to somebody else later; a pid and the time at which its process
//! started do.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long the kernel may take to end a process that was killed: it may have much memory to give back.
const DEATH: Duration = Duration::from_secs(10);

/// When this process started, in clock ticks since boot.
pub fn process_start_time(pid: u32) -> Option<u64> {
    Stat::read(pid).map(|stat| stat.start_time)
}

/// The process that had this pid and started then still runs. One that ended and that nobody has waited for does not.
pub fn is_same_process(pid: u32, start_time: u64) -> bool {
    Stat::read(pid).is_some_and(|stat| stat.start_time == start_time && !matches!(stat.state, 'Z' | 'X'))
}

/// The words that the process was started with; none when it is gone.
pub fn process_command_line(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// The folder that the process is in; none when it is gone or we may not know.
pub fn process_cwd(pid: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/cwd")).ok()
}

/// Has the kernel kill what is started when we are, or, to be exact, the thread that starts it: for a QEMU that answers
/// questions, or is measured.
pub fn end_with_us(command: &mut tokio::process::Command) {
    let us = rustix::process::getpid();
    let in_child = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have ended just before that.
        match rustix::process::getppid() {
            Some(parent) if parent == us => Ok(()),
            _ => Err(std::io::ErrorKind::Interrupted.into()),
        }
    };
    // SAFETY: between fork and exec only async-signal-safe calls may be made; these are two system calls, and an error
    // kind allocates nothing.
    #[expect(unsafe_code)]
    unsafe {
        command.pre_exec(in_child);
    }
}

/// Ends a process: asks it to, and after this long makes it. Returns when it has ended, which, for a child of ours, is
/// before it is waited for. Another process that has its pid by now is left alone.
pub async fn kill_process(pid: u32, start_time: u64, grace: Duration) {
    let Some(process) = pidfd_of(pid, start_time) else { return };
    for (signal, patience) in [(Signal::TERM, grace), (Signal::KILL, DEATH)] {
        // It fails only when the process has ended.
        if pidfd_send_signal(process.get_ref(), signal).is_err() || ended_within(&process, patience).await {
            return;
        }
    }
    tracing::error!(pid, "a killed process does not end");
}

/// Holds on to a process; none when it has ended.
fn pidfd_of(pid: u32, start_time: u64) -> Option<AsyncFd<OwnedFd>> {
    let process = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::NONBLOCK).ok()?;
    // SAFETY: the descriptor is owned by what it is registered with, and nothing here takes it out or exchanges it.
    #[expect(unsafe_code)]
    let registered = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
    let process = registered.inspect_err(|error| tracing::warn!(pid, %error, "cannot watch a process")).ok()?;
    // Looked at after opening: if it is the right one now, the descriptor is of the right one.
    is_same_process(pid, start_time).then_some(process)
}

/// A process's descriptor becomes readable when the process ends.
async fn ended_within(process: &AsyncFd<OwnedFd>, patience: Duration) -> bool {
    tokio::time::timeout(patience, process.readable()).await.is_ok()
}

/// What we read of `/proc/PID/stat`; `proc_pid_stat(5)`.
struct Stat {
    state: char,
    start_time: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field is the program's name in parentheses, and may hold blanks and parentheses itself.
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        // The state was field 3; wanted is field 22.
        Some(Self { state, start_time: fields.nth(18)?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_programs_name_cannot_confuse_the_start_time() {
        let text = "7 (a) R 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 1000 200";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.state, stat.start_time), ('S', 777));
        assert!(Stat::parse("").is_none() && Stat::parse("7 (a) S 1").is_none());
    }

    #[test]
    fn we_are_who_we_are() {
        let me = std::process::id();
        let started = process_start_time(me).unwrap();
        assert!(is_same_process(me, started));
        assert!(!is_same_process(me, started + 1));
        assert!(process_start_time(u32::MAX).is_none());
        assert!(!process_command_line(me).is_empty());
        assert_eq!(process_cwd(me).unwrap(), std::env::current_dir().unwrap());
    }

    #[tokio::test]
    async fn a_process_that_ignores_the_request_is_killed() {
        let mut child = tokio::process::Command::new("sh")
            .args(["-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        let stdout = child.stdout.as_mut().unwrap();
        tokio::io::AsyncReadExt::read_exact(stdout, &mut ready).await.unwrap();
        let pid = child.id().unwrap();
        let started = process_start_time(pid).unwrap();
        kill_process(pid, started + 1, Duration::ZERO).await;
        assert!(is_same_process(pid, started), "another process of that pid is left alone");
        kill_process(pid, started, Duration::from_millis(50)).await;
        assert!(!is_same_process(pid, started));
        assert_eq!(child.wait().await.unwrap().signal(), Some(9));
    }
}
