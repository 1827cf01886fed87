//! What a migration would do, by the model, and what is made of that by what earlier ones have taught.
//!
//! The model is the simulator's: see `vmferry_sim::forecast`. What is around the copy (planning, the destination's QEMU,
//! retiring ours) is no part of it and is known from earlier migrations alone.

use std::collections::BTreeMap;

use vmferry_api::{EngineName, Expected, Foretold, Made, in_one_line};
use vmferry_link::Fingerprint;
use vmferry_policy::{Action, AfterRounds, BytesPerSec, LeastHarm, Lesson, Limits, Percent, Policy, Range};
use vmferry_qemu::qmp::commands;
use vmferry_sim::{Engine, Forecast, Given, Method, Observed, forecast};

use super::plan::Plan;
use crate::host::{Host, Vm};
use crate::journal::Taught;

/// What planning, and preparing the destination, takes while nothing was learnt, in seconds.
const BEFORE: Range = Range { low: 0.4, mid: 0.8, high: 2.5 };
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
    /// Of migrations to this one with this engine. What cannot be read was not learnt.
    pub(super) async fn of(host: &Host, peer: Fingerprint, engine: EngineName) -> Self {
        let learnt = host.journal.lessons(peer, &engine.to_string()).await;
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
}

impl Base {
    pub(super) async fn of(host: &Host, vm: &Vm, plan: &Plan, limits: Limits, bandwidth: Option<u64>) -> Self {
        let by_agents = plan.mover.name() == EngineName::External;
        let usual = if by_agents { Engine::external() } else { Engine::qemu() };
        let seen = |post_copy, usual| host.seen_switchover(vm.name(), post_copy).map_or(usual, |it| it.as_secs_f64());
        let engine =
            Engine { switchover: seen(false, usual.switchover), post_copy: seen(true, usual.post_copy), ..usual };
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
        }
    }

    /// Plays it with what was seen of the guest. Takes some milliseconds of a processor.
    pub(super) fn foresee(&self, observed: Observed, rate: Range, round_trip: f64) -> Raw {
        let given = Given { observed, rate, round_trip, engine: self.engine, limits: self.limits };
        let policy = || -> Box<dyn Policy> {
            match self.pauses_first {
                true => Box::new(AfterRounds::new(0, Action::PostCopy)),
                false => Box::<LeastHarm>::default(),
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
        Raw { forecast: forecast(&given, policy), disks, disk_bytes: self.disks, pauses_first: self.pauses_first }
    }
}

/// What the model says, before it is corrected.
#[derive(Clone)]
pub(super) struct Raw {
    pub(super) forecast: Forecast,
    /// How long its disks take, in seconds.
    disks: Range,
    disk_bytes: f64,
    pauses_first: bool,
}

impl Raw {
    /// As it is to be expected after what was learnt; `past` is how long it has taken by now, when its copy has begun.
    pub(super) fn foretold(&self, lessons: &Lessons, made: Made, past: Option<f64>) -> Foretold {
        let before = match past {
            Some(past) => Range::exactly(past),
            None => sum([lessons.correct(Figure::Before, BEFORE), self.disks, Range::default()]),
        };
        let copy = lessons.correct(Figure::Copy(made), self.forecast.total);
        let total = sum([before, copy, lessons.correct(Figure::After, AFTER)]);
        let downtime = lessons.correct(Figure::Downtime, self.forecast.downtime);
        let ram = lessons.correct(Figure::Sent(made), self.forecast.bytes);
        Foretold {
            made,
            method: self.method(),
            total_ms: expected(total, 1e3),
            downtime_ms: expected(downtime, 1e3),
            sent: expected(sum([ram, Range::exactly(self.disk_bytes), Range::default()]), 1.0),
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
            taught(Figure::Sent(made), self.forecast.bytes.mid, sent - self.disk_bytes),
        ]
    }
}

pub(super) fn expected(range: Range, scale: f64) -> Expected {
    Expected { low: range.low * scale, likely: range.mid * scale, high: range.high * scale }
}

fn sum(of: [Range; 3]) -> Range {
    let add = |part: fn(&Range) -> f64| of.iter().map(part).sum();
    Range { low: add(|it| it.low), mid: add(|it| it.mid), high: add(|it| it.high) }
}
