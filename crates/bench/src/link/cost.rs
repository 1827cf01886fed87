//! What moving bytes costs: processor time of threads and processes, and how idle the host is meanwhile.

use std::collections::HashMap;
use std::time::Duration;

use vmferry_link::thread_cpu;

use vmferry_qemu::proc_stat::Stat;

/// Runs this and adds what it cost its thread.
pub(super) fn with_cpu<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let before = thread_cpu();
    let done = work();
    (done, thread_cpu().saturating_sub(before))
}

/// The processor time of a process and all its descendants that live, until now.
pub(super) fn tree_cpu(root: u32) -> Duration {
    let processes = processes();
    let mut total = Duration::ZERO;
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        if let Some(process) = processes.get(&pid) {
            total += process.cpu;
        }
        open.extend(processes.iter().filter(|(_, process)| process.parent == pid).map(|(pid, _)| *pid));
    }
    total
}

struct Process {
    parent: u32,
    /// Of itself and of its children that ended.
    cpu: Duration,
}

fn processes() -> HashMap<u32, Process> {
    let Ok(dir) = std::fs::read_dir("/proc") else { return HashMap::new() };
    let pids = dir.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, process(&Stat::read(&format!("/proc/{pid}/stat"))?)))).collect()
}

fn process(stat: &Stat) -> Process {
    Process { parent: stat.parent, cpu: Duration::from_secs_f64(stat.with_children_s) }
}

/// How much of the host's processors is idle, from its making on.
pub(super) struct Idle {
    idle: u64,
    all: u64,
}

impl Idle {
    /// From now on.
    pub(super) fn begin() -> Self {
        let (idle, all) = times(&std::fs::read_to_string("/proc/stat").unwrap_or_default());
        Self { idle, all }
    }

    /// Until now, 0 to 1.
    pub(super) fn share(&self) -> f64 {
        let (idle, all) = times(&std::fs::read_to_string("/proc/stat").unwrap_or_default());
        idle.saturating_sub(self.idle) as f64 / all.saturating_sub(self.all).max(1) as f64
    }
}

/// Idle ticks and all ticks, of the first line of `/proc/stat`; waiting for disks is idle too.
fn times(stat: &str) -> (u64, u64) {
    let ticks: Vec<u64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|it| it.parse().ok()).collect();
    // The guests' ticks, from the ninth on, are in the first two already.
    (ticks.iter().skip(3).take(2).sum(), ticks.iter().take(8).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_does_costs_processor_time() {
        let ((), cpu) = with_cpu(|| {
            let begun = std::time::Instant::now();
            while begun.elapsed() < Duration::from_millis(50) {
                std::hint::spin_loop();
            }
        });
        assert!(cpu > Duration::from_millis(5), "{cpu:?}");
        let ((), cpu) = with_cpu(|| std::thread::sleep(Duration::from_millis(50)));
        assert!(cpu < Duration::from_millis(20), "{cpu:?}");
    }

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "7 (a) S 9 (b) R 1 7 7 0 -1 4194560 1 2 3 4 100 50 25 25 20 0 1 0 5";
        let read = process(&Stat::parse(stat).unwrap());
        assert_eq!(read.parent, 1);
        assert_eq!(read.cpu, Duration::from_secs_f64(200.0 / rustix::param::clock_ticks_per_second() as f64));
        assert!(Stat::parse("nonsense").is_none());
        assert!(tree_cpu(std::process::id()) > Duration::ZERO || tree_cpu(u32::MAX).is_zero());
    }

    #[test]
    fn idle_is_what_is_not_used() {
        assert_eq!(times("cpu  10 0 10 70 10 0 0 0 5 0\ncpu0 1 2 3"), (80, 100));
    }
}
