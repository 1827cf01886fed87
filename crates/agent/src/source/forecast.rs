//! What a migration would do, by the model, and what is made of that by what earlier ones have taught.
//!
//! The model is the simulator's: see `vmferry_sim::forecast`. What is around the copy (planning, the destination's QEMU,
//! retiring ours) is no part of it and is known from earlier migrations alone.

use std::collections::BTreeMap;

use vmferry_api::{EngineName, Expected, Foretold, Made, in_one_line};
use vmferry_link::Fingerprint;
use vmferry_policy::baselines::Baseline;
use vmferry_policy::{Action, AfterRounds, BytesPerSec, Lesson, Limits, Percent, Policy, Range};
use vmferry_qemu::qmp::commands;
use vmferry_sim::{Engine, Forecast, Given, Method, Observed, forecast};

use super::decider;
use super::plan::Plan;
use crate::host::{Host, Vm};
use crate::journal::Taught;

/// What planning, and preparing the destination, takes while nothing was learnt, in seconds.
const BEFORE: Range = Range { low: 0.15, mid: 0.4, high: 2.0 };
/// What is left to be done when all RAM is there.
const AFTER: Range = Range { low: 0.02, mid: 0.1, high: 0.6 };

/// The figures that are learnt, each for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Figure {
    /// Planning and preparing.
    Before,
    /// Copying the RAM, and switching over. The rate of the link is known otherwise before a migration than in it.
    Copy(Made),
    /// Retiring.
    After,
    /// Nobody runs the guest.
    Downtime,
    /// Sent.
    Sent(Made),
}

impl Figure {
    /// Its name in the journal.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::Copy(Made::Before) => "copy, watched",
            Self::Copy(Made::AtStart) => "copy",
            Self::After => "after",
            Self::Downtime => "downtime",
            Self::Sent(Made::Before) => "sent, watched",
            Self::Sent(Made::AtStart) => "sent",
        }
    }
}

/// What migrations to one host have taught.
pub(super) struct Lessons(BTreeMap<String, Lesson>);

impl Lessons {
    /// Of migrations to this one with the engine of this name. What cannot be read was not learnt.
    pub(super) async fn of(host: &Host, peer: Fingerprint, engine: &str) -> Self {
        let learnt = host.journal.lessons(peer, engine).await;
        Self(learnt.unwrap_or_else(|error| {
            tracing::warn!(error = in_one_line(&error), "cannot read how far predictions were off");
            BTreeMap::new()
        }))
    }

    pub(super) fn correct(&self, figure: Figure, predicted: Range) -> Range {
        self.0.get(figure.name()).copied().unwrap_or_default().correct(predicted)
    }

    /// How many migrations have taught something.
    pub(super) fn count(&self) -> u32 {
        self.0.values().map(|lesson| lesson.count).max().unwrap_or(0)
    }
}

/// What is known of a migration before it is, whatever its guest does.
#[derive(Clone)]
pub(super) struct Base {
    pub(super) engine: Engine,
    pub(super) limits: Limits,
    pub(super) processors: f64,
    pub(super) ram: f64,
    /// The host has given so much to the guest.
    pub(super) resident: f64,
    /// It is paused before the first byte, and its memory follows.
    pub(super) pauses_first: bool,
    /// Of its own disks, which go first.
    pub(super) disks: f64,
    /// The guest runs.
    pub(super) running: bool,
    /// Who decides, if not vmferry's own policy.
    pub(super) baseline: Option<&'static Baseline>,
}

impl Base {
    /// The name of the policy that decides, if it is not vmferry's own.
    pub(super) fn policy(&self) -> Option<&'static str> {
        self.baseline.map(|it| it.name)
    }

    pub(super) async fn of(
        vm: &Vm,
        plan: &Plan,
        limits: Limits,
        bandwidth: Option<u64>,
        baseline: Option<&'static Baseline>,
    ) -> Self {
        let by_agents = plan.mover.name() == EngineName::External;
        // What the last switchovers took is in what was learnt of downtimes, and would count twice here.
        let engine = if by_agents { Engine::external() } else { Engine::qemu() };
        let mut limits = Limits { bandwidth: bandwidth.map(BytesPerSec), ..limits };
        if by_agents && !plan.mover.paces() {
            limits.slow = Percent(0);
        }
        if !by_agents && !plan.mover.means().iter().any(|it| it == "postcopy-ram") {
            limits = limits.without_post_copy();
        }
        // How many matters little, and a QEMU that does not tell is not refused for that.
        let processors = vm.qmp.execute(commands::QueryCpusFast {}).await.map_or(1, |cpus| cpus.len());
        let disks = plan.offer.own_disks.iter().filter_map(|disk| plan.offer.image(disk));
        Self {
            engine,
            limits,
            processors: processors as f64,
            ram: plan.view.ram_bytes as f64,
            resident: plan.view.ram_used_bytes as f64,
            pauses_first: plan.mover.pauses_first(),
            disks: disks.map(|image| image.allocated as f64).sum(),
            running: plan.offer.running,
            baseline,
        }
    }

    /// Plays it with what was seen of the guest. Takes some milliseconds of a processor.
    pub(super) fn foresee(&self, observed: Observed, rate: Range, round_trip: f64) -> Raw {
        let given = Given { observed, rate, round_trip, engine: self.engine, limits: self.limits };
        let policy = || -> Box<dyn Policy> {
            match self.pauses_first {
                true => Box::new(AfterRounds::new(0, Action::PostCopy)),
                false => decider::policy(self.baseline, None),
            }
        };
        let over = |bytes: f64, rate: f64| bytes / rate.max(1.0);
        let disks = match self.disks {
            // The guest reads and writes meanwhile, and either disk may be slower than the link.
            bytes if bytes > 0.0 => Range {
                low: over(bytes, rate.high) * 0.5,
                mid: over(bytes, rate.mid),
                high: over(bytes, rate.low) * 3.0,
            },
            _ => Range::default(),
        };
        Raw { forecast: forecast(&given, policy), disks, pauses_first: self.pauses_first }
    }
}

/// What the model says, before it is corrected.
#[derive(Clone)]
pub(super) struct Raw {
    pub(super) forecast: Forecast,
    /// How long its disks take, in seconds.
    disks: Range,
    pauses_first: bool,
}

impl Raw {
    /// As it is to be expected after what was learnt; `past` is how long it has taken by now, when its copy has begun.
    pub(super) fn foretold(&self, lessons: &Lessons, made: Made, past: Option<f64>) -> Foretold {
        let before = match past {
            Some(past) => Range::exactly(past),
            None => sum(&[lessons.correct(Figure::Before, BEFORE), self.disks]),
        };
        let copy = lessons.correct(Figure::Copy(made), self.forecast.total);
        let total = sum(&[before, copy, lessons.correct(Figure::After, AFTER)]);
        let downtime = lessons.correct(Figure::Downtime, self.forecast.downtime);
        let sent = lessons.correct(Figure::Sent(made), self.forecast.bytes);
        Foretold {
            made,
            method: self.method(),
            total_ms: expected(total, 1e3),
            downtime_ms: expected(downtime, 1e3),
            sent: expected(sent, 1.0),
            migrations: lessons.count(),
        }
    }

    pub(super) fn method(&self) -> String {
        match (self.pauses_first, self.forecast.method) {
            (true, Method::PostCopy) => "post-copy from the first byte".into(),
            (_, method) => method.to_string(),
        }
    }

    /// What came of each figure, for what was learnt of it: how long planning and preparing took, the copy, and what came
    /// after it, in seconds.
    pub(super) fn taught(&self, made: Made, [before, copy, after]: [f64; 3], downtime: f64, sent: f64) -> Vec<Taught> {
        let taught = |figure: Figure, predicted: f64, outcome| Taught { figure: figure.name(), predicted, outcome };
        vec![
            taught(Figure::Before, BEFORE.mid, before),
            taught(Figure::Copy(made), self.forecast.total.mid, copy),
            taught(Figure::After, AFTER.mid, after),
            taught(Figure::Downtime, self.forecast.downtime.mid, downtime),
            taught(Figure::Sent(made), self.forecast.bytes.mid, sent),
        ]
    }
}

pub(super) fn expected(range: Range, scale: f64) -> Expected {
    Expected { low: range.low * scale, likely: range.mid * scale, high: range.high * scale }
}

fn sum(of: &[Range]) -> Range {
    let add = |part: fn(&Range) -> f64| of.iter().map(part).sum();
    Range { low: add(|it| it.low), mid: add(|it| it.mid), high: add(|it| it.high) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_sim::{Since, Written};

    const MIB: f64 = 1_048_576.0;

    fn base() -> Base {
        Base {
            engine: Engine::external(),
            limits: Limits::default(),
            processors: 1.0,
            ram: 1024.0 * MIB,
            resident: 512.0 * MIB,
            pauses_first: false,
            disks: 0.0,
            running: true,
            baseline: None,
        }
    }

    fn foreseen(base: &Base) -> Raw {
        let written = vec![Written { after: 1.0, bytes: MIB, since: Since::Beginning }];
        let observed = Observed { ram: base.ram, used: base.resident, written, processors: 1.0 };
        base.foresee(observed, Range { low: 90.0 * MIB, mid: 100.0 * MIB, high: 105.0 * MIB }, 0.001)
    }

    fn taught(figure: Figure, times: f64) -> Lessons {
        let mut lesson = Lesson::default();
        (0..30).for_each(|_| lesson.learn(1.0, times));
        Lessons([(figure.name().to_owned(), lesson)].into())
    }

    #[test]
    fn what_was_learnt_moves_the_figure_that_it_was_learnt_of_and_is_counted() {
        let raw = foreseen(&base());
        let [fresh, slow, packed, other] = [
            Lessons(BTreeMap::new()),
            taught(Figure::Copy(Made::Before), 2.0),
            taught(Figure::Sent(Made::Before), 0.5),
            taught(Figure::Sent(Made::AtStart), 0.5),
        ]
        .map(|lessons| raw.foretold(&lessons, Made::Before, None));
        assert!((5000.0..7500.0).contains(&fresh.total_ms.likely), "512 MiB at 100 MiB/s: {fresh:?}");
        assert_eq!((fresh.migrations, slow.migrations), (0, 30));
        assert!(slow.total_ms.likely > fresh.total_ms.likely * 1.7, "{fresh:?} {slow:?}");
        assert!((packed.sent.likely / fresh.sent.likely - 0.5).abs() < 0.02, "{packed:?}");
        assert_eq!(other.sent, fresh.sent, "the one is predicted from another rate than the other");
    }

    #[test]
    fn what_is_past_is_known_and_a_disk_takes_its_time_before() {
        let none = Lessons(BTreeMap::new());
        let raw = foreseen(&base());
        let (before, now) = (raw.foretold(&none, Made::Before, None), raw.foretold(&none, Made::AtStart, Some(30.0)));
        assert!(now.total_ms.low > 30_000.0 && before.total_ms.high < 30_000.0, "{before:?} {now:?}");
        let disk = foreseen(&Base { disks: 2048.0 * MIB, ..base() }).foretold(&none, Made::Before, None);
        let more = disk.total_ms.likely - before.total_ms.likely;
        assert!((more - 20_480.0).abs() < 1.0, "2 GiB at 100 MiB/s: {more}");
        assert_eq!(disk.sent, before.sent, "of its memory");
    }

    #[test]
    fn a_guest_that_is_paused_first_goes_by_post_copy_from_the_first_byte() {
        let raw = foreseen(&Base { pauses_first: true, engine: Engine::qemu(), ..base() });
        assert_eq!(raw.method(), "post-copy from the first byte");
        assert!(raw.forecast.at_risk.mid > 4.0, "{:?}", raw.forecast);
    }
}
