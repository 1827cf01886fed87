//! What a migration's user is told of its way through the protocol, and what is noted down for the report.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmferry_api::{DiskMoved, Faults, Foretold, MigrationEvent, Progress, Report, Step, StepTime, Tuned};
use vmferry_custody::source::Phase;

use super::migration::Migration;
use crate::engine::{Seen, Totals};
use crate::host::Host;

/// So many decisions are in a report, at most.
const KEPT_DECISIONS: usize = 200;

/// Hears how a migration goes on.
pub(super) trait Audience: Send + Sync {
    /// Something worth telling.
    fn note(&self, text: String);

    /// What the engine sees.
    fn progress(&self, seen: &Seen);

    /// How far it is.
    fn phase(&self, phase: Phase);
}

/// Of a migration that nobody looks at: the log.
pub(super) struct Log(pub(super) String);

impl Audience for Log {
    fn note(&self, text: String) {
        tracing::warn!(vm = self.0, "{text}");
    }

    fn progress(&self, _: &Seen) {}

    fn phase(&self, _: Phase) {}
}

/// Of a migration that somebody began.
pub(super) struct Teller {
    host: Arc<Host>,
    migration: Arc<Migration>,
    book: Mutex<Book>,
}

/// What the report is made of.
#[derive(Clone)]
pub(super) struct Book {
    /// When it was asked for.
    pub(super) request: Instant,
    begun: Vec<(Step, Instant)>,
    /// The most the guest was slowed down, in percent.
    pub(super) throttle: u8,
    /// What was seen when the destination had what it needs.
    switched: Option<Seen>,
    /// It is done as a script says: what it takes tells nothing of the next one.
    scripted: bool,
    /// Nobody ran the guest for so long.
    pub(super) downtime: Duration,
    /// How long that was expected to be.
    pub(super) predicted: Option<Duration>,
    /// Each decision in words, as far as there are not too many.
    pub(super) decisions: Vec<String>,
    /// How its limits were changed, as far as there are not too many.
    pub(super) tuned: Vec<Tuned>,
}

impl Book {
    /// The guest ran there before all of its RAM was.
    pub(super) fn post_copy(&self) -> bool {
        self.begun.iter().any(|(step, _)| *step == Step::PostCopy)
    }

    /// How long it had taken when the copy of the RAM began, in seconds; none when it did not.
    pub(super) fn before_copy(&self) -> Option<f64> {
        let begun = self.begun.iter().find(|(step, _)| *step == Step::CopyRam)?;
        Some(begun.1.duration_since(self.request).as_secs_f64())
    }

    /// How long each step took.
    pub(super) fn times(&self) -> Vec<StepTime> {
        let ends = self.begun.iter().skip(1).map(|(_, at)| *at).chain([Instant::now()]);
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        self.begun.iter().zip(ends).map(|((step, from), to)| StepTime { step: *step, ms: ms(*from, to) }).collect()
    }
}

/// What of a report is known to whom it is of, besides what is in its book.
pub(super) struct Reported<'a> {
    pub(super) from: &'a str,
    pub(super) to: &'a str,
    pub(super) engine: String,
    pub(super) policy: &'a str,
    pub(super) paused_first: bool,
    pub(super) foretold: Option<Foretold>,
    pub(super) totals: Totals,
    pub(super) disks: Vec<DiskMoved>,
}

impl Teller {
    pub(super) fn new(host: &Arc<Host>, migration: &Arc<Migration>, request: Instant, scripted: bool) -> Self {
        let book = Book {
            request,
            begun: vec![(Step::Plan, request)],
            throttle: 0,
            switched: None,
            scripted,
            downtime: Duration::ZERO,
            predicted: None,
            decisions: Vec::new(),
            tuned: Vec::new(),
        };
        Self { host: Arc::clone(host), migration: Arc::clone(migration), book: Mutex::new(book) }
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no holder of this lock panics")
    }

    /// What was noted down so far.
    pub(super) fn book(&self) -> Book {
        self.lock().clone()
    }

    /// The report of a migration that has come to its end.
    pub(super) fn report(&self, of: Reported<'_>) -> Report {
        let (book, totals) = (self.book(), of.totals);
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Report {
            id: self.migration.id,
            vm: self.migration.vm.clone(),
            from: of.from.into(),
            to: of.to.into(),
            engine: of.engine,
            policy: of.policy.into(),
            post_copy: book.post_copy(),
            paused_first: of.paused_first,
            total_ms: ms(book.request.elapsed()),
            downtime_ms: ms(book.downtime),
            predicted_downtime_ms: book.predicted.map(ms),
            foretold: of.foretold,
            qemu_downtime_ms: totals.downtime_ms,
            sent: totals.sent,
            deltas: totals.deltas,
            saved_by_deltas: totals.saved_by_deltas,
            drains: totals.drains,
            longest_drain_ms: ms(totals.longest_drain),
            faults: totals.fault_times.map(|times| Faults {
                count: times.count,
                median_ms: ms(times.median),
                p99_ms: ms(times.p99),
            }),
            rounds: totals.rounds,
            dirty_rate: totals.dirty_rate,
            throttle: book.throttle,
            steps: book.times(),
            decisions: book.decisions,
            tuned: book.tuned,
            disks: of.disks,
        }
    }

    /// The next step begins.
    pub(super) fn step(&self, step: Step) {
        tracing::debug!(vm = self.migration.vm, migration = %self.migration.id, ?step, "next step");
        self.lock().begun.push((step, Instant::now()));
        self.migration.told.tell(MigrationEvent::Step { step });
    }

    /// What the policy has decided, in its words.
    pub(super) fn decided(&self, text: String) {
        tracing::debug!(vm = self.migration.vm, migration = %self.migration.id, "{text}");
        let mut book = self.lock();
        if book.decisions.len() < KEPT_DECISIONS {
            book.decisions.push(text.clone());
        }
        drop(book);
        self.migration.told.tell(MigrationEvent::Decision { text });
    }

    /// Its user has changed its limits.
    pub(super) fn tuned(&self, how: Tuned) {
        tracing::info!(vm = self.migration.vm, migration = %self.migration.id, "limits: {}", how.text);
        let mut book = self.lock();
        if book.tuned.len() < KEPT_DECISIONS {
            book.tuned.push(how.clone());
        }
        drop(book);
        self.migration.told.tell(MigrationEvent::Tuned(how));
    }

    /// The destination has what it needs, and the guest stands.
    pub(super) fn switched(&self, seen: Seen) {
        let mut book = self.lock();
        let paused_at = seen.paused_at.unwrap_or_else(Instant::now);
        book.begun.extend([(Step::SwitchOver, paused_at), (Step::Commit, Instant::now())]);
        book.switched = Some(Seen { paused_at: Some(paused_at), ..seen });
    }

    /// The destination took it over.
    fn handed_over(&self) {
        let mut book = self.lock();
        let Some(switched) = book.switched.take() else { return };
        let post_copy = !switched.complete;
        book.downtime = switched.paused_at.map_or(Duration::ZERO, |at| at.elapsed());
        if let Some(pages) = switched.last_pages {
            let name = &self.migration.vm;
            book.predicted = Some(pages + self.host.switchover_time(name, post_copy));
            // A guest that a script pauses stands still for longer than a switchover takes.
            if !book.scripted {
                self.host.note_switchover(name, post_copy, book.downtime.saturating_sub(pages));
            }
        }
        drop(book);
        self.migration.told.tell(MigrationEvent::Step { step: Step::Commit });
    }
}

impl Audience for Teller {
    fn note(&self, text: String) {
        self.migration.note(text);
    }

    fn progress(&self, seen: &Seen) {
        let it = &seen.observation;
        let step = {
            let mut book = self.lock();
            book.throttle = book.throttle.max(it.throttle.0);
            match it.phase {
                vmferry_policy::Phase::SwitchOver => Step::SwitchOver,
                _ => book.begun.last().map_or(Step::Plan, |(step, _)| *step),
            }
        };
        self.migration.told.tell(MigrationEvent::Progress(Progress {
            step,
            elapsed_ms: it.elapsed.as_millis() as u64,
            round: it.round,
            total: it.total.0,
            remaining: it.remaining.0,
            sent: it.sent.0,
            dirty_rate: it.dirty_rate.0,
            link_rate: it.link_rate.0,
            throttle: it.throttle.0,
        }));
    }

    fn phase(&self, phase: Phase) {
        let Phase::Away { complete, .. } = phase else { return };
        self.handed_over();
        let now = self.lock().begun.last().map(|(step, _)| *step);
        let next = if complete { Step::Retire } else { Step::PostCopy };
        if now != Some(next) {
            self.step(next);
        }
    }
}
