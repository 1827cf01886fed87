//! A migration, as others see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::MigrationEvent;

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
    may_post_copy: bool,
    /// The user wants it now.
    pub(super) wants_post_copy: AtomicBool,
    /// What it tells.
    pub(crate) told: Told,
}

impl Migration {
    pub(super) fn new(id: Uuid, vm: &str, peer: Peer, may_post_copy: bool) -> Arc<Self> {
        Arc::new(Self {
            id,
            vm: vm.into(),
            peer,
            cancel: CancellationToken::new(),
            may_post_copy,
            wants_post_copy: AtomicBool::new(false),
            told: Told::nothing(),
        })
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

    /// Asks it to switch to post-copy as soon as it can, if it has not. False when the user has forbidden that.
    #[must_use]
    pub(crate) fn post_copy(&self) -> bool {
        self.wants_post_copy.store(self.may_post_copy, Ordering::Relaxed);
        self.may_post_copy
    }
}
