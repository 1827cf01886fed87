//! A migration, as others see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::MigrationEvent;

use super::changes::{Change, changes};
use super::told::Told;
use crate::peers::Peer;

/// A migration under way, or just over, as others see it.
pub(crate) struct Migration {
    /// Its id.
    pub(crate) id: Uuid,
    /// The VM's name.
    pub(crate) vm: String,
    /// The destination.
    pub(crate) peer: Peer,
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
    pub(super) fn new(id: Uuid, vm: &str, peer: Peer, may_post_copy: bool) -> (Arc<Self>, mpsc::Receiver<Change>) {
        let (changes, wanted) = changes();
        let migration = Self {
            id,
            vm: vm.into(),
            peer,
            cancel: CancellationToken::new(),
            may_post_copy: AtomicBool::new(may_post_copy),
            wants_post_copy: AtomicBool::new(false),
            changes,
            told: Told::nothing(),
        };
        (Arc::new(migration), wanted)
    }

    pub(super) fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!(vm = self.vm, migration = %self.id, "{text}");
        self.told.tell(MigrationEvent::Note { text });
    }

    /// Asks it to stop; has no effect once the destination was told to take over.
    pub(super) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// It was asked to.
    pub(super) fn was_cancelled(&self) -> bool {
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
