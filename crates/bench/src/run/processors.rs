//! What processors do while a migration is measured: the host, each QEMU by its kinds of threads, each agent.
//!
//! QEMU names its threads when it is told to (`-name ...,debug-threads=on`); what they are called tells what they are
//! for. Threads that end, as those of multifd do, take what they used since the last look with them: the process's own
//! count has it, so what its living threads do not account for is put down to migrating.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::proc_stat::Stat;
use crate::report::{CpuSample, Origin, QemuCpu, RunReport};

/// How often it is looked.
const PERIOD: Duration = Duration::from_millis(500);
/// A host on which others use more than this share of all processors is no place to measure.
const BUSY: f64 = 0.10;
/// The beginnings of the names of QEMU's threads that migrate, in old versions and new.
const MIGRATING: [&str; 10] = [
    "mig/",
    "live_migration",
    "migration",
    "multifd",
    "postcopy",
    "return path",
    "compress",
    "decompress",
    "do_data_",
    "bg_snapshot",
];

/// Whom to look at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Watched {
    /// The QEMUs of the source and the destination.
    pub(crate) qemus: [Option<u32>; 2],
    /// Their agents.
    pub(crate) agents: [Option<u32>; 2],
}

/// Looks until it is dropped or finished.
pub(crate) struct Sampler {
    watched: Arc<Mutex<Watched>>,
    seen: Arc<Mutex<Vec<(Instant, CpuSample)>>>,
    looking: tokio::task::JoinHandle<()>,
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

impl Sampler {
    pub(crate) fn start() -> Self {
        let watched: Arc<Mutex<Watched>> = Arc::default();
        let seen: Arc<Mutex<Vec<(Instant, CpuSample)>>> = Arc::default();
        let (whom, into) = (Arc::clone(&watched), Arc::clone(&seen));
        let looking = tokio::spawn(async move {
            let mut before = Look::take(&Watched::default());
            loop {
                tokio::time::sleep(PERIOD).await;
                let now = Look::take(&whom.lock().expect("no holder of this lock panics"));
                let sample = now.since(&before);
                into.lock().expect("no holder of this lock panics").push((now.at, sample));
                before = now;
            }
        });
        Self { watched, seen, looking }
    }

    pub(crate) fn watch(&self, change: impl FnOnce(&mut Watched)) {
        change(&mut self.watched.lock().expect("no holder of this lock panics"));
    }

    /// The destination's QEMU, when it is watched already.
    pub(crate) fn knows_destination(&self) -> bool {
        self.watched.lock().expect("no holder of this lock panics").qemus[1].is_some()
    }

    /// Puts what was seen into the report, with moments as this tells them, and what it comes to between these two.
    pub(crate) fn finish(self, report: &mut RunReport, ms_at: impl Fn(Instant) -> f64, from_ms: f64, to_ms: f64) {
        let seen = std::mem::take(&mut *self.seen.lock().expect("no holder of this lock panics"));
        let samples = seen.into_iter().map(|(at, sample)| CpuSample { at_ms: ms_at(at), ..sample });
        report.samples.cpu = samples.collect();
        let during: Vec<CpuSample> =
            report.samples.cpu.iter().filter(|it| it.at_ms > from_ms && it.at_ms - it.ms < to_ms).copied().collect();
        let seconds = |part: &dyn Fn(&CpuSample) -> Option<f64>| {
            let used: Vec<f64> = during.iter().filter_map(|it| Some(part(it)? / 100.0 * it.ms / 1e3)).collect();
            (!used.is_empty()).then(|| used.iter().sum())
        };
        let s = &mut report.summary;
        s.source_qemu_cpu_s = seconds(&|it| it.source_qemu.map(|it| it.beside_the_guest()));
        s.destination_qemu_cpu_s = seconds(&|it| it.destination_qemu.map(|it| it.beside_the_guest()));
        s.source_agent_cpu_s = seconds(&|it| it.source_agent);
        s.destination_agent_cpu_s = seconds(&|it| it.destination_agent);
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let others: Vec<f64> = during.iter().filter_map(|it| it.others).collect();
        let mean = others.iter().sum::<f64>() / others.len().max(1) as f64;
        s.host_was_busy = report.origin == Origin::Bench && mean > BUSY * processors * 100.0;
        if s.host_was_busy {
            report.notes.push(format!("Other programs used {mean:.0} % of a processor meanwhile: measure again."));
        }
    }
}

/// What everybody has used, at one moment, in seconds.
struct Look {
    at: Instant,
    /// All processors but for interrupts, which the link between two namespaces causes.
    host: f64,
    ourselves: f64,
    qemus: [Option<Process>; 2],
    agents: [Option<(u32, f64)>; 2],
}

struct Process {
    pid: u32,
    all: f64,
    /// By thread.
    threads: HashMap<u32, (Kind, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Vcpu,
    Migration,
    Other,
}

impl Look {
    fn take(watched: &Watched) -> Self {
        Self {
            at: Instant::now(),
            host: host_seconds(&std::fs::read_to_string("/proc/stat").unwrap_or_default()),
            ourselves: Stat::read("/proc/self/stat").map_or(0.0, |stat| stat.own_s),
            qemus: watched.qemus.map(|pid| Process::look(pid?)),
            agents: watched.agents.map(|pid| Some((pid?, Stat::read(&format!("/proc/{}/stat", pid?))?.own_s))),
        }
    }

    fn since(&self, before: &Self) -> CpuSample {
        let length = (self.at - before.at).as_secs_f64();
        let percent = |seconds: f64| (seconds / length * 100.0).max(0.0);
        let qemu = |index: usize| {
            let (now, then) = (self.qemus[index].as_ref()?, before.qemus[index].as_ref()?);
            (now.pid == then.pid).then(|| now.since(then)).map(|it| QemuCpu {
                vcpu: percent(it.vcpu),
                migration: percent(it.migration),
                other: percent(it.other),
            })
        };
        let agent = |index: usize| {
            let ((pid, now), (old_pid, then)) = (self.agents[index]?, before.agents[index]?);
            (pid == old_pid).then(|| percent(now - then))
        };
        let (source_qemu, destination_qemu) = (qemu(0), qemu(1));
        let (source_agent, destination_agent) = (agent(0), agent(1));
        let host = percent(self.host - before.host);
        let of_qemu = |it: Option<QemuCpu>| it.map_or(0.0, |it| it.vcpu + it.beside_the_guest());
        let ours = of_qemu(source_qemu)
            + of_qemu(destination_qemu)
            + source_agent.unwrap_or(0.0)
            + destination_agent.unwrap_or(0.0)
            + percent(self.ourselves - before.ourselves);
        // Somebody who has just appeared, or gone, would look like others.
        let complete = (0..2).all(|index| {
            self.qemus[index].is_some() == before.qemus[index].is_some()
                && self.agents[index].is_some() == before.agents[index].is_some()
        });
        CpuSample {
            at_ms: 0.0,
            ms: length * 1e3,
            host: Some(host),
            others: complete.then(|| (host - ours).max(0.0)),
            source_qemu,
            destination_qemu,
            source_agent,
            destination_agent,
        }
    }
}

impl Process {
    fn look(pid: u32) -> Option<Self> {
        let all = Stat::read(&format!("/proc/{pid}/stat"))?.own_s;
        let mut threads = HashMap::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
            let Some(thread) = entry.file_name().to_str().and_then(|it| it.parse().ok()) else { continue };
            // One that has just ended is in the process's own count.
            if let Some(stat) = Stat::read(&format!("/proc/{pid}/task/{thread}/stat")) {
                threads.insert(thread, (kind(&stat.name), stat.own_s));
            }
        }
        Some(Self { pid, all, threads })
    }

    /// Seconds by kind.
    fn since(&self, before: &Self) -> QemuCpu {
        let mut used = QemuCpu::default();
        for (thread, (kind, now)) in &self.threads {
            let then = before.threads.get(thread).map_or(0.0, |(_, then)| *then);
            *match kind {
                Kind::Vcpu => &mut used.vcpu,
                Kind::Migration => &mut used.migration,
                Kind::Other => &mut used.other,
            } += now - then;
        }
        let rest = self.all - before.all - used.vcpu - used.beside_the_guest();
        used.migration += rest.max(0.0);
        used
    }
}

fn kind(name: &str) -> Kind {
    if name.starts_with("CPU ") {
        Kind::Vcpu
    } else if MIGRATING.iter().any(|beginning| name.starts_with(beginning)) {
        Kind::Migration
    } else {
        Kind::Other
    }
}

/// What all processors did for programs: user, nice and system of the first line of `/proc/stat`.
fn host_seconds(stat: &str) -> f64 {
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(3);
    let ticks: f64 = fields.filter_map(|it| it.parse::<f64>().ok()).sum();
    ticks / rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_threads_are_told_apart_by_name_in_old_versions_and_new() {
        assert_eq!(kind("CPU 3/TCG"), Kind::Vcpu);
        for name in ["live_migration", "mig/src/main", "multifdsend_1", "mig/dst/recv_0", "return path"] {
            assert_eq!(kind(name), Kind::Migration, "{name}");
        }
        assert_eq!(kind("qemu-system-x86"), Kind::Other);
    }

    #[test]
    fn threads_that_have_ended_are_put_down_to_migrating() {
        let look = |all: f64, threads: &[(u32, Kind, f64)]| Process {
            pid: 1,
            all,
            threads: threads.iter().map(|(id, kind, used)| (*id, (*kind, *used))).collect(),
        };
        let before = look(10.0, &[(1, Kind::Other, 4.0), (2, Kind::Vcpu, 5.0), (3, Kind::Migration, 1.0)]);
        let after = look(13.0, &[(1, Kind::Other, 4.5), (2, Kind::Vcpu, 6.0)]);
        assert_eq!(after.since(&before), QemuCpu { vcpu: 1.0, migration: 1.5, other: 0.5 });
    }

    #[test]
    fn the_host_is_what_its_programs_use() {
        let used = host_seconds("cpu  100 10 90 1000 50 7 7 0 0 0\ncpu0 1 2 3");
        assert!((used - 200.0 / rustix::param::clock_ticks_per_second() as f64).abs() < 1e-9);
        let look = Look::take(&Watched { qemus: [Some(std::process::id()), None], agents: [None, Some(u32::MAX)] });
        assert!(look.qemus[0].as_ref().is_some_and(|it| !it.threads.is_empty()));
        assert!(look.agents[1].is_none());
    }
}
