//! One that waits, and one that has begun.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_api::{MigrateRequest, MigrationView, Step};
use vmferry_link::Fingerprint;
use vmferry_policy::BytesPerSec;
use vmferry_policy::queue::{UnderWay, Waiting, share};

use crate::journal::Instance;
use crate::source::{Migration, Seat};

/// Before this, what an engine measures of the link is not settled.
const SETTLED: Duration = Duration::from_secs(3);

/// What keeps it from beginning at its turn may pass within this time...
pub(super) const PATIENCE: Duration = Duration::from_secs(3600);
/// ...and is looked at again so often.
const AGAIN: Duration = Duration::from_secs(5);

/// One that waits.
pub(super) struct Entry {
    pub(super) seat: Seat,
    /// Which VM.
    pub(super) instance: Instance,
    pub(super) request: MigrateRequest,
    /// Those that were asked for together.
    pub(super) batch: Option<Uuid>,
    /// Its destination; none while that is not known (again).
    pub(super) there: Option<Fingerprint>,
    pub(super) guest: Waiting,
    /// When it was asked for, in seconds since 1970.
    pub(super) since: u64,
    /// It could not begin at its turn, for something that passes: since when, and when it is tried again.
    pub(super) tried: Option<(Instant, Instant)>,
    /// What was told last of its place.
    pub(super) told: Option<(u32, String)>,
}

impl Entry {
    pub(super) fn migration(&self) -> &Arc<Migration> {
        &self.seat.migration
    }

    /// Tells its place and why it waits, where that is something new.
    pub(super) fn tell(&mut self, now: (u32, String)) {
        if self.told.as_ref() != Some(&now) {
            self.migration().is_queued(now.0, now.1.clone());
            self.told = Some(now);
        }
    }

    /// It cannot begin now, as something is in its way that may pass. False when it has been in its way for too long.
    pub(super) fn waits_on(&mut self, now: Instant) -> bool {
        let since = self.tried.map_or(now, |(since, _)| since);
        self.tried = Some((since, now + AGAIN));
        now.duration_since(since) < PATIENCE
    }

    /// It is tried again later.
    pub(super) fn is_put_off(&self) -> bool {
        self.tried.is_some_and(|(_, again)| Instant::now() < again)
    }

    pub(super) fn view(&self) -> MigrationView {
        let words = match &self.told {
            Some((place, text)) => format!("place {place}: {text}"),
            None => "it is being looked at".into(),
        };
        MigrationView {
            id: self.migration().id,
            vm: self.migration().vm.clone(),
            to: self.request.to.clone(),
            started: self.since,
            step: "queued".into(),
            outcome: Some(words),
        }
    }
}

/// One that begins, or has.
pub(super) struct Begun {
    pub(super) migration: Arc<Migration>,
    pub(super) batch: Option<Uuid>,
    /// Where it goes; none until it has been planned.
    pub(super) there: Option<Fingerprint>,
    /// What its user lets it send; of a batch, what all of it may.
    pub(super) cap: Option<BytesPerSec>,
}

impl Begun {
    /// As it looks to another that would begin beside it, which is of this batch.
    pub(super) fn seen_by(&self, batch: Option<Uuid>) -> UnderWay {
        let Some(progress) = self.migration.told.progress() else { return UnderWay::default() };
        let settled = progress.link_rate > 0 && progress.elapsed_ms >= SETTLED.as_millis() as u64;
        // A budget that both share holds nobody back from the link.
        let shared = batch.is_some() && batch == self.batch;
        UnderWay {
            rate: settled.then_some(BytesPerSec(progress.link_rate)),
            cap: self.cap.filter(|_| !shared).map(|cap| share(cap, self.migration.siblings())),
            post_copy: progress.step == Step::PostCopy,
        }
    }
}
