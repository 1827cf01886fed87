//! Looks at what processors do while a migration is measured, and takes in what the hosts that are not this one tell.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmferry_qemu::processors::{Look, ProcessorUse, QemuUse, Watched};

use crate::report::{CpuSample, Origin, QemuCpu, RunReport};

/// How often it is looked.
const PERIOD: Duration = Duration::from_millis(500);
/// A host on which others use more than this share of all processors is no place to measure.
const BUSY: f64 = 0.10;

/// Collects until it is dropped or finished.
pub(crate) struct Sampler {
    watched: Arc<Mutex<Watched>>,
    seen: Seen,
    /// None when the hosts tell themselves.
    looking: Option<tokio::task::JoinHandle<()>>,
    /// Processors of the source's host and the destination's.
    processors: [usize; 2],
}

/// What was seen so far, each with the end of its stretch.
type Seen = Arc<Mutex<Vec<(Instant, CpuSample)>>>;

impl Drop for Sampler {
    fn drop(&mut self) {
        if let Some(looking) = &self.looking {
            looking.abort();
        }
    }
}

impl Sampler {
    /// Looks at this host, on which everything is.
    pub(crate) fn start() -> Self {
        let watched: Arc<Mutex<Watched>> = Arc::default();
        let seen = Seen::default();
        let (whom, into) = (Arc::clone(&watched), Arc::clone(&seen));
        let looking = tokio::spawn(async move {
            let mut before = Look::take(&Watched::default());
            loop {
                tokio::time::sleep(PERIOD).await;
                let now = Look::take(&whom.lock().expect("no holder of this lock panics"));
                let sample = CpuSample::of(&now.since(&before));
                into.lock().expect("no holder of this lock panics").push((now.at, sample));
                before = now;
            }
        });
        let here = std::thread::available_parallelism().map_or(1, usize::from);
        Self { watched, seen, looking: Some(looking), processors: [here, here] }
    }

    /// Puts together what two hosts told.
    pub(crate) fn of_two_hosts(told: &[(Instant, usize, ProcessorUse)], processors: [usize; 2]) -> Self {
        let sample = |host: usize, used: &ProcessorUse| match host {
            0 => CpuSample::of(used),
            _ => CpuSample {
                ms: used.ms,
                destination_host: Some(used.host),
                destination_others: used.others,
                destination_qemu: used.qemus[0].map(QemuCpu::from),
                destination_agent: used.agents[0],
                ..CpuSample::default()
            },
        };
        let seen = told.iter().map(|(at, host, used)| (*at, sample(*host, used))).collect();
        Self { watched: Arc::default(), seen: Arc::new(Mutex::new(seen)), looking: None, processors }
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
        if report.origin != Origin::Bench {
            return;
        }
        for (others, processors, whose) in [
            (during.iter().filter_map(|it| it.others).collect::<Vec<f64>>(), self.processors[0], ""),
            (during.iter().filter_map(|it| it.destination_others).collect(), self.processors[1], " of the destination"),
        ] {
            let mean = others.iter().sum::<f64>() / others.len().max(1) as f64;
            if mean > BUSY * processors as f64 * 100.0 {
                s.host_was_busy = true;
                let note = format!("Other programs used {mean:.0} % of a processor{whose} meanwhile: measure again.");
                report.notes.push(note);
            }
        }
    }
}

impl CpuSample {
    /// Of a host on which the source is, and perhaps the destination too.
    fn of(used: &ProcessorUse) -> Self {
        let [source_qemu, destination_qemu] = used.qemus.map(|it| it.map(QemuCpu::from));
        let [source_agent, destination_agent] = used.agents;
        Self {
            ms: used.ms,
            host: Some(used.host),
            others: used.others,
            source_qemu,
            destination_qemu,
            source_agent,
            destination_agent,
            ..Self::default()
        }
    }
}

impl From<QemuUse> for QemuCpu {
    fn from(QemuUse { vcpu, migration, other }: QemuUse) -> Self {
        Self { vcpu, migration, other }
    }
}
