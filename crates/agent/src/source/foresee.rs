//! Before it starts: what a migration would do, with the link tried and the guest watched. Nothing is touched on the
//! destination, and nothing remains here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmferry_api::trial::{Data, Trial};
use vmferry_api::{Made, MigrateRequest, PlanView, PredictionView, Security, WATCH_MS, WatchedView, Watcher};
use vmferry_link::Fingerprint;
use vmferry_policy::{Limits, Range};
use vmferry_sim::{EngineKind, Observed, Since, Written};

use super::forecast::{Base, Lessons, Raw, expected};
use crate::error::AgentError;
use crate::host::Host;
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
    of: Subject,
    raw: Raw,
}

/// A migration that might be, as a prediction is made of it and remembered.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Subject {
    pub(super) vm: String,
    /// Its QEMU.
    pub(super) instance: Instance,
    pub(super) peer: Fingerprint,
    /// The name of the engine.
    pub(super) engine: String,
    /// It holds within these alone.
    pub(super) limits: Limits,
    /// Who decides, if not vmferry's own policy.
    pub(super) policy: Option<&'static str>,
}

impl Foreseen {
    fn keep(&self, of: Subject, raw: Raw) {
        let mut all = self.0.lock().expect("no holder of this lock panics");
        all.retain(|_, it| it.at.elapsed() < KEPT);
        if all.len() < MOST_KEPT {
            all.insert((of.vm.clone(), of.peer), Kept { at: Instant::now(), of, raw });
        }
    }

    /// What was predicted of this migration, once.
    pub(super) fn take(&self, of: &Subject) -> Option<Raw> {
        let mut all = self.0.lock().expect("no holder of this lock panics");
        let kept = all.remove(&(of.vm.clone(), of.peer))?;
        (kept.at.elapsed() < KEPT && kept.of == *of).then_some(kept.raw)
    }
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

/// The link is tried like this for a migration whose streams are these.
pub(super) fn trial(security: Security, streams: u8, packing: &str, bandwidth: Option<u64>) -> Trial {
    Trial {
        security,
        streams,
        packing: packing.into(),
        // What the guest's memory holds is nobody's business, and may be as hard to pack.
        data: Data::Random,
        time_ms: TRIAL_MS,
        rate: bandwidth,
    }
}

/// What was seen of a guest, and what is to be said of that; none when nobody wants it any more.
pub(super) type Seen = Option<(WatchedView, Vec<String>)>;

/// Adds to a plan what is to be expected of it: the link is tried, then the guest is watched, then it is played.
pub(super) async fn foresee(
    host: &Arc<Host>,
    foreseen: &Foreseen,
    (of, mut base): (Subject, Base),
    (to, trial): (&str, Trial),
    watching: impl Future<Output = Result<Seen, AgentError>>,
    view: &mut PlanView,
) -> Result<(), AgentError> {
    let by_agents = base.engine.kind == EngineKind::External;
    let limit = trial.rate.map_or(f64::MAX, |it| it as f64);
    let tried = link_trial::run(host, to, trial).await?;
    let rate = tried.rate().min(limit);
    // The fastest answer waited for nothing that was sent before it.
    let round_trip = tried.urgent_ms.first().copied().unwrap_or(0.0);
    let Some((watched, notes)) = watching.await? else {
        return Err(AgentError::Cancelled { name: of.vm });
    };
    view.notes.extend(notes);
    let lessons = Lessons::of(host, of.peer, &of.engine).await;
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
    let ms = |range: Range| expected(range, 1e3);
    view.link_rate = rate as u64;
    view.first_round_ms = (in_use / rate.max(1.0) * 1e3) as u64;
    let forecast = &raw.forecast;
    view.prediction = Some(PredictionView {
        method: foretold.method,
        or: forecast.or.iter().map(ToString::to_string).collect(),
        total_ms: foretold.total_ms,
        downtime_ms: foretold.downtime_ms,
        stall_ms: ms(forecast.stall),
        lost_ms: ms(forecast.lost),
        at_risk_ms: ms(forecast.at_risk),
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
        foreseen.keep(of, raw);
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
