//! Work that is to take nothing from anybody.

use std::io;

use nix::libc;

/// Has the kernel run the calling thread only when nothing else wants the processor. Such a thread's I/O is of the idle class,
/// too, for those disks' schedulers that have one: what has no class of its own gets it from this (Linux,
/// `task_nice_ioclass` in `include/linux/ioprio.h`).
pub fn run_only_when_idle() -> io::Result<()> {
    // SAFETY: a struct of numbers, for which zeroes are valid, whatever else a C library has in it.
    #[expect(unsafe_code)]
    let none: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel only reads what it is given, and 0 is the calling thread.
    #[expect(unsafe_code)]
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const none) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_can_be_one_that_runs_only_when_nobody_else_does() {
        let policy = || {
            run_only_when_idle().unwrap();
            // Policy is the 41st field of its line; the second is in brackets and may have blanks.
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            stat.rsplit(')').next().unwrap().split_whitespace().nth(38).unwrap().to_owned()
        };
        assert_eq!(std::thread::spawn(policy).join().unwrap(), libc::SCHED_IDLE.to_string());
    }
}
