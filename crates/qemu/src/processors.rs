//! What processors do: the host, a QEMU by its kinds of threads, agents.
//!
//! QEMU names its threads when it is told to (`-name ...,debug-threads=on`); what they are called tells what they are
//! for. Threads that end, as those of multifd do, take what they used since the last look with them: the process's own
//! count has it, so what its living threads do not account for is put down to migrating.

use std::collections::HashMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::proc_stat::Stat;

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
pub struct Watched {
    /// The QEMUs of the source and the destination, as far as they are on this host.
    pub qemus: [Option<u32>; 2],
    /// Their agents.
    pub agents: [Option<u32>; 2],
}

/// What processors did between two looks, in percent of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessorUse {
    /// How long that was, in ms.
    pub ms: f64,
    /// All processors but for interrupts, which the link between two namespaces causes.
    pub host: f64,
    /// Programs that are none of those that are watched, and not this one; unknown when one of them came or went.
    pub others: Option<f64>,
    /// The QEMUs of the source and the destination.
    pub qemus: [Option<QemuUse>; 2],
    /// Their agents.
    pub agents: [Option<f64>; 2],
}

/// What the threads of a QEMU did, in percent of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QemuUse {
    /// Those that run the guest's processors.
    pub vcpu: f64,
    /// Those that migrate.
    pub migration: f64,
    /// All others.
    pub other: f64,
}

impl QemuUse {
    fn all(self) -> f64 {
        self.vcpu + self.migration + self.other
    }
}

/// What everybody has used, at one moment, in seconds.
pub struct Look {
    /// When.
    pub at: Instant,
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
    /// Looks now.
    pub fn take(watched: &Watched) -> Self {
        // An agent that looks at itself is no second one.
        let ourselves = match watched.agents.contains(&Some(std::process::id())) {
            true => None,
            false => Stat::read("/proc/self/stat"),
        };
        Self {
            at: Instant::now(),
            host: host_seconds(&std::fs::read_to_string("/proc/stat").unwrap_or_default()),
            ourselves: ourselves.map_or(0.0, |stat| stat.own_s),
            qemus: watched.qemus.map(|pid| Process::look(pid?)),
            agents: watched.agents.map(|pid| Some((pid?, Stat::read(&format!("/proc/{}/stat", pid?))?.own_s))),
        }
    }

    /// What was done since an earlier look.
    pub fn since(&self, before: &Self) -> ProcessorUse {
        let length = (self.at - before.at).as_secs_f64();
        let percent = |seconds: f64| (seconds / length * 100.0).max(0.0);
        let qemus = [0, 1].map(|index| {
            let (now, then) = (self.qemus[index].as_ref()?, before.qemus[index].as_ref()?);
            let used = (now.pid == then.pid).then(|| now.since(then))?;
            let QemuUse { vcpu, migration, other } = used;
            Some(QemuUse { vcpu: percent(vcpu), migration: percent(migration), other: percent(other) })
        });
        let agents = [0, 1].map(|index| {
            let ((pid, now), (old_pid, then)) = (self.agents[index]?, before.agents[index]?);
            (pid == old_pid).then(|| percent(now - then))
        });
        let host = percent(self.host - before.host);
        let ours = qemus.iter().flatten().map(|it| it.all()).sum::<f64>()
            + agents.iter().flatten().sum::<f64>()
            + percent(self.ourselves - before.ourselves);
        // Somebody who has just appeared, or gone, would look like others.
        let complete = (0..2).all(|index| {
            self.qemus[index].is_some() == before.qemus[index].is_some()
                && self.agents[index].is_some() == before.agents[index].is_some()
        });
        ProcessorUse { ms: length * 1e3, host, others: complete.then(|| (host - ours).max(0.0)), qemus, agents }
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
    fn since(&self, before: &Self) -> QemuUse {
        let mut used = QemuUse::default();
        for (thread, (kind, now)) in &self.threads {
            let then = before.threads.get(thread).map_or(0.0, |(_, then)| *then);
            *match kind {
                Kind::Vcpu => &mut used.vcpu,
                Kind::Migration => &mut used.migration,
                Kind::Other => &mut used.other,
            } += now - then;
        }
        let rest = self.all - before.all - used.all();
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
        assert_eq!(after.since(&before), QemuUse { vcpu: 1.0, migration: 1.5, other: 0.5 });
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
