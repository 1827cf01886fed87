//! Policies beside each other, over many cases.

use serde::Serialize;
use vmferry_policy::baselines::ALL;
use vmferry_policy::{BytesPerSec, LeastHarm, Policy};

use crate::oracle::score;
use crate::{Case, End, Engine, Outcome, best_in_hindsight, run};

/// Somebody who decides.
#[derive(Clone, Copy)]
pub struct Contestant {
    /// What it is called.
    pub name: &'static str,
    bandwidth: Option<BytesPerSec>,
    make: fn() -> Box<dyn Policy>,
    /// It is played with QEMU, whatever the engine is.
    qemu: bool,
}

/// Ours, and all baselines.
pub fn contestants() -> Vec<Contestant> {
    let ours = Contestant { name: "vmferry", bandwidth: None, make: || Box::<LeastHarm>::default(), qemu: false };
    let qemus = Contestant { name: "vmferry-qemu", qemu: true, ..ours };
    let theirs = ALL.iter().map(|it| Contestant { name: it.name, bandwidth: it.bandwidth, make: it.make, qemu: true });
    [ours, qemus].into_iter().chain(theirs).collect()
}

/// One case, decided by this one.
pub fn play(case: &Case, by: &Contestant) -> Outcome {
    let engine = if by.qemu { Engine::qemu() } else { Engine::external() };
    run(&case.guest, &case.link, engine, case.limits, case.seed, by.bandwidth, &mut *(by.make)())
}

/// What somebody's decisions came to; seconds and bytes, medians and 95th percentiles of those that were completed.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Who decided.
    pub policy: String,
    /// Cases.
    pub cases: usize,
    /// Of them completed, from 0 to 1.
    pub completed: f64,
    /// From the beginning of the copy to its end.
    pub total: (f64, f64),
    /// Nobody ran the guest.
    pub downtime: (f64, f64),
    /// The longest wait of the running guest.
    pub stall: (f64, f64),
    /// Work that it lost while it ran.
    pub lost: (f64, f64),
    /// Sent.
    pub bytes: (f64, f64),
    /// In post-copy.
    pub at_risk: (f64, f64),
    /// Of those that were completed, how many kept to the downtime that was allowed.
    pub within: f64,
    /// Harm beside the best in hindsight with the same engine, where that was looked for; infinite where it is not done.
    pub regret: Option<(f64, f64)>,
    /// The worst cases by that, or by harm: name and how many times the best, or harm.
    pub worst: Vec<(String, f64)>,
}

impl Row {
    /// How many times the harm of the best in hindsight, in words.
    pub(crate) fn beside_the_best(&self) -> String {
        match self.regret {
            None => "-".into(),
            Some((median, most)) if most < 1e4 => format!("{median:.2} / {most:.2}"),
            Some((median, _)) if median < 1e4 => format!("{median:.2} / not done"),
            Some(_) => "not done".into(),
        }
    }
}

/// All rows.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// One for each contestant.
    pub rows: Vec<Row>,
}

/// How many of the worst are named.
const WORST: usize = 3;

fn percentiles(mut of: Vec<f64>) -> (f64, f64) {
    of.sort_by(f64::total_cmp);
    let at = |share: f64| of.get(((of.len() as f64 * share) as usize).min(of.len().saturating_sub(1)));
    (at(0.5).copied().unwrap_or(0.0), at(0.95).copied().unwrap_or(0.0))
}

impl Table {
    /// Has each of them decide about each case; compares with the best in hindsight if that is wanted, which takes some
    /// fifty times as long.
    pub fn of(cases: &[Case], by: &[Contestant], hindsight: bool) -> Self {
        let best: Vec<Option<[Outcome; 2]>> = cases
            .iter()
            .map(|case| {
                hindsight.then(|| [Engine::external(), Engine::qemu()].map(|engine| best_in_hindsight(case, engine)))
            })
            .collect();
        Self { rows: by.iter().map(|by| row(cases, &best, by)).collect() }
    }
}

fn row(cases: &[Case], best: &[Option<[Outcome; 2]>], by: &Contestant) -> Row {
    let outcomes: Vec<Outcome> = cases.iter().map(|case| play(case, by)).collect();
    let done: Vec<&Outcome> = outcomes.iter().filter(|it| it.end == End::Completed).collect();
    let of = |what: fn(&Outcome) -> f64| percentiles(done.iter().map(|it| what(it)).collect());
    let mut regrets: Vec<(String, f64)> = Vec::new();
    for ((case, outcome), best) in cases.iter().zip(&outcomes).zip(best) {
        let harm = score(outcome, &case.limits);
        let beside = match best {
            Some(best) => harm / score(&best[usize::from(by.qemu)], &case.limits).max(1e-9),
            None => harm,
        };
        regrets.push((case.name.clone(), beside));
    }
    let regret =
        best.first().is_some_and(Option::is_some).then(|| percentiles(regrets.iter().map(|it| it.1).collect()));
    regrets.sort_by(|a, b| b.1.total_cmp(&a.1));
    regrets.truncate(WORST);
    let limits = cases.iter().zip(&outcomes).filter(|(_, it)| it.end == End::Completed);
    let within = limits.filter(|(case, it)| it.felt.downtime <= case.limits.downtime.as_secs_f64()).count();
    Row {
        policy: by.name.into(),
        cases: cases.len(),
        completed: done.len() as f64 / cases.len().max(1) as f64,
        total: of(|it| it.felt.total),
        downtime: of(|it| it.felt.downtime),
        stall: of(|it| it.felt.stall),
        lost: of(|it| it.felt.lost),
        bytes: of(|it| it.bytes),
        at_risk: of(|it| it.felt.at_risk),
        within: within as f64 / done.len().max(1) as f64,
        regret,
        worst: regrets,
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:<26}{:>6} {:>7} {:>15} {:>13} {:>13} {:>15} {:>13} {:>13} {:>13}",
            "policy",
            "done",
            "within",
            "total s",
            "downtime ms",
            "stall ms",
            "lost work s",
            "GiB",
            "at risk s",
            "x the best"
        )?;
        for row in &self.rows {
            let pair = |(a, b): (f64, f64), scale: f64, digits: usize| {
                format!("{:.digits$} / {:.digits$}", a * scale, b * scale)
            };
            writeln!(
                f,
                "{:<26}{:>5.1}% {:>6.1}% {:>15} {:>13} {:>13} {:>15} {:>13} {:>13} {:>13}",
                row.policy,
                row.completed * 100.0,
                row.within * 100.0,
                pair(row.total, 1.0, 1),
                pair(row.downtime, 1e3, 0),
                pair(row.stall, 1e3, 0),
                pair(row.lost, 1.0, 2),
                pair(row.bytes, 1.0 / crate::guest::GIB, 1),
                pair(row.at_risk, 1.0, 1),
                row.beside_the_best(),
            )?;
        }
        Ok(())
    }
}
