//! A migration, as others see it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::{MigrationEvent, Problem};
use vmferry_link::Fingerprint;

use super::changes::{Change, changes};
use super::told::Told;
use crate::error::AgentError;
use crate::peers::Peer;

/// A migration under way, or just over, as others see it.
pub(crate) struct Migration {
    /// Its id.
    pub(crate) id: Uuid,
    /// The VM's name.
    pub(crate) vm: String,
    /// The destination, once it has begun.
    there: OnceLock<(Peer, Fingerprint)>,
    /// How many share one limit of bandwidth, this one among them.
    siblings: AtomicU32,
    pub(super) cancel: CancellationToken,
    /// The user allows post-copy.
    may_post_copy: AtomicBool,
    /// The user wants it now.
    pub(super) wants_post_copy: AtomicBool,
    /// How its user changes its limits.
    pub(super) changes: mpsc::Sender<Change>,
    /// What it tells.
    pub(crate) told: Told,
}

impl Migration {
    fn new(id: Uuid, vm: &str) -> (Arc<Self>, mpsc::Receiver<Change>) {
        let (changes, wanted) = changes();
        let migration = Self {
            id,
            vm: vm.into(),
            there: OnceLock::new(),
            siblings: AtomicU32::new(1),
            cancel: CancellationToken::new(),
            may_post_copy: AtomicBool::new(false),
            wants_post_copy: AtomicBool::new(false),
            changes,
            told: Told::nothing(),
        };
        (Arc::new(migration), wanted)
    }

    /// It has been planned, and begins.
    pub(super) fn begins(&self, peer: Peer, key: Fingerprint, may_post_copy: bool) {
        self.allow_post_copy(may_post_copy);
        // It begins only once.
        let _ = self.there.set((peer, key));
    }

    /// The destination; none while it waits for its turn.
    pub(crate) fn peer(&self) -> Option<&Peer> {
        self.there.get().map(|(peer, _)| peer)
    }

    /// The destination's key, once it has begun.
    pub(crate) fn key(&self) -> Option<Fingerprint> {
        self.there.get().map(|(_, key)| *key)
    }

    /// It has this place among those that wait to go there.
    pub(crate) fn is_queued(&self, place: u32, text: String) {
        tracing::info!(vm = self.vm, migration = %self.id, place, "queued: {text}");
        self.told.tell(MigrationEvent::Queued { place, text });
    }

    /// It waited, and does not begin.
    pub(crate) fn does_not_begin(&self, why: &AgentError) {
        self.told.tell(MigrationEvent::Failed(Problem::from(why)));
    }

    /// So many share one limit of bandwidth, this one among them.
    pub(crate) fn shares_with(&self, siblings: u32) {
        self.siblings.store(siblings, Ordering::Relaxed);
    }

    pub(crate) fn siblings(&self) -> u32 {
        self.siblings.load(Ordering::Relaxed)
    }

    pub(super) fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!(vm = self.vm, migration = %self.id, "{text}");
        self.told.tell(MigrationEvent::Note { text });
    }

    /// Asks it to stop; has no effect once the destination was told to take over.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// It was asked to.
    pub(crate) fn was_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    pub(super) fn allow_post_copy(&self, allowed: bool) {
        self.may_post_copy.store(allowed, Ordering::Relaxed);
    }

    /// Asks it to switch to post-copy as soon as it can, if it has not. False when the user has forbidden that.
    #[must_use]
    pub(crate) fn post_copy(&self) -> bool {
        let may = self.may_post_copy.load(Ordering::Relaxed);
        self.wants_post_copy.store(may, Ordering::Relaxed);
        may
    }
}

/// A migration that has not begun, and what it takes to begin it.
pub(crate) struct Seat {
    /// What others see of it.
    pub(crate) migration: Arc<Migration>,
    pub(super) changes: Option<mpsc::Receiver<Change>>,
}

impl Seat {
    /// Of this VM.
    pub(crate) fn new(vm: &str) -> Self {
        Self::again(Uuid::new_v4(), vm)
    }

    /// One that had this id when its agent ended.
    pub(crate) fn again(id: Uuid, vm: &str) -> Self {
        let (migration, changes) = Migration::new(id, vm);
        Self { migration, changes: Some(changes) }
    }
}
