//! Before it starts: what a migration would do, with the link tried and the guest watched. Nothing is touched on the
//! destination, and nothing remains here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use vmferry_api::trial::{Data, Trial};
use vmferry_api::{EngineName, Made, MigrateRequest, PredictionView, Security, WATCH_MS, WatchedView, Watcher};
use vmferry_link::{Fingerprint, usual_streams};
use vmferry_policy::{Limits, Range};
use vmferry_sim::{Observed, Since, Written};

use super::forecast::{Base, Lessons, Raw, expected};
use super::mover::Protect;
use super::plan::Plan;
use super::watch::watch;
use crate::error::AgentError;
use crate::host::{Claim, Host, Vm};
use crate::journal::Instance;
use crate::peers::link_trial;

/// How long the link is tried, in ms: long enough for TCP to find its pace over a long way.
const TRIAL_MS: u64 = 1000;
/// How far the link's rate in the copy may be from that in the trial, down and up: by the agents, and by QEMU.
const RATE: [(f64, f64); 2] = [(0.9, 1.06), (0.7, 1.1)];
/// For so long a prediction is remembered, and for so many migrations.
const KEPT: Duration = Duration::from_secs(600);
const MOST_KEPT: usize = 256;

/// Predictions that were made some minutes ago, for the migrations that follow them.
#[derive(Default)]
pub(super) struct Foreseen(Mutex<HashMap<(String, Fingerprint), Kept>>);

struct Kept {
    at: Instant,
    /// It holds for a migration of this QEMU within these alone, with this engine, decided by this policy.
    of: (Instance, Limits, EngineName, Option<&'static str>),
    raw: Raw,
}

impl Foreseen {
    fn keep(&self, vm: &str, peer: Fingerprint, kept: Kept) {
        let mut all = self.0.lock().expect("no holder of this lock panics");
        all.retain(|_, it| it.at.elapsed() < KEPT);
        if all.len() < MOST_KEPT {
            all.insert((vm.into(), peer), kept);
        }
    }

    /// What was predicted of this migration, once.
    pub(super) fn take(&self, vm: &Vm, peer: Fingerprint, base: &Base, engine: EngineName) -> Option<Raw> {
        let mut all = self.0.lock().expect("no holder of this lock panics");
        let kept = all.remove(&(vm.name().to_owned(), peer))?;
        (kept.at.elapsed() < KEPT && kept.of == what(vm, base, engine)).then_some(kept.raw)
    }
}

/// What a prediction is of.
fn what(vm: &Vm, base: &Base, engine: EngineName) -> (Instance, Limits, EngineName, Option<&'static str>) {
    (vm.instance(), base.limits, engine, base.policy())
}

/// How long a guest is to be watched; refuses what makes no sense.
pub(super) fn watch_time(request: &MigrateRequest) -> Result<Duration, AgentError> {
    match request.watch_ms {
        ms if WATCH_MS.contains(&ms) => Ok(Duration::from_millis(ms)),
        ms => Err(AgentError::BadLimit {
            message: format!("watching the guest for {} s makes no sense: give 0 to 60 s", ms / 1000),
        }),
    }
}

/// Adds to the plan what is to be expected of it. `unwanted` says that nobody waits for it any more. The VM is claimed until
/// it was watched: while it is played, which touches nothing, others can do with it what they want.
pub(super) async fn foresee(
    host: &Arc<Host>,
    foreseen: &Foreseen,
    (vm, claim): (&Vm, Claim<'_>),
    plan: &mut Plan,
    request: &MigrateRequest,
    mut base: Base,
    unwanted: &CancellationToken,
) -> Result<(), AgentError> {
    let (what, time) = (what(vm, &base, plan.mover.name()), watch_time(request)?);
    let bandwidth = base.limits.bandwidth.map(|rate| rate.0);
    let engine = plan.mover.name();
    let by_agents = engine == EngineName::External;
    let trial = Trial {
        security: if plan.protect == Protect::Not { Security::Plain } else { Security::Tls },
        streams: if by_agents { usual_streams() } else { 1 },
        packing: if by_agents { "adaptive" } else { "none" }.into(),
        // What the guest's memory holds is nobody's business, and may be as hard to pack.
        data: Data::Random,
        time_ms: TRIAL_MS,
        rate: bandwidth,
    };
    let tried = link_trial::run(host, &request.to, trial).await?;
    let rate = tried.rate().min(bandwidth.map_or(f64::MAX, |it| it as f64));
    // The fastest answer waited for nothing that was sent before it.
    let round_trip = tried.urgent_ms.first().copied().unwrap_or(0.0);
    let (watched, notes) = if base.running {
        let Some(seen) = watch(host, vm, time, unwanted).await? else {
            return Err(AgentError::Cancelled { name: vm.name().into() });
        };
        seen
    } else {
        (WatchedView::default(), Vec::new())
    };
    drop(claim);
    plan.view.notes.extend(notes);
    let lessons = Lessons::of(host, plan.peer_key, engine).await;
    let (down, up) = RATE[usize::from(!by_agents)];
    let range = Range { low: rate * down, mid: rate, high: rate * up };
    let observed = observed(&base, &watched);
    let (in_use, was_watched) = (observed.used, watched.by != Watcher::Nobody);
    if watched.by == Watcher::Agent {
        base.engine.scan = watched.longest_scan_ms / 1e3 / (base.ram / (1u64 << 30) as f64).max(0.1);
    }
    let played = tokio::task::spawn_blocking(move || base.foresee(observed, range, round_trip / 1e3));
    let raw = played.await.expect("a play does not panic");
    let foretold = raw.foretold(&lessons, Made::Before, None);
    let of = |range: Range| expected(range, 1e3);
    plan.view.link_rate = rate as u64;
    plan.view.first_round_ms = (in_use / rate.max(1.0) * 1e3) as u64;
    let forecast = &raw.forecast;
    plan.view.prediction = Some(PredictionView {
        method: foretold.method,
        or: forecast.or.iter().map(ToString::to_string).collect(),
        total_ms: foretold.total_ms,
        downtime_ms: foretold.downtime_ms,
        stall_ms: of(forecast.stall),
        lost_ms: of(forecast.lost),
        at_risk_ms: of(forecast.at_risk),
        sent: foretold.sent,
        rounds: forecast.rounds,
        decisions: forecast.words.clone(),
        link_rate: rate as u64,
        round_trip_ms: round_trip,
        watched,
        migrations: foretold.migrations,
    });
    // What nobody has seen is no measure of how well it is foreseen.
    if was_watched {
        foreseen.keep(vm.name(), plan.peer_key, Kept { at: Instant::now(), of: what, raw });
    }
    Ok(())
}

/// What the model is to make of what was seen.
fn observed(base: &Base, watched: &WatchedView) -> Observed {
    let used = match watched.by {
        Watcher::Agent => watched.in_use as f64,
        Watcher::Qemu | Watcher::Nobody => base.resident,
    };
    let point = |after, bytes| Written { after, bytes, since: Since::Beginning };
    let written = match base.running {
        true => watched.written.iter().map(|it| point(it.ms / 1e3, it.bytes as f64)).collect(),
        false => vec![point(1.0, 0.0)],
    };
    Observed { ram: base.ram, used, written, processors: base.processors }
}
