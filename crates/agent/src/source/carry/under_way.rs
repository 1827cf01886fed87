//! The domains of libvirt that are being migrated away.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_link::Fingerprint;

use crate::error::AgentError;
use crate::source::migration::Migration;

/// How long they may take to end when the agent does.
const FAREWELL: Duration = Duration::from_secs(20);

/// One of them.
pub(crate) struct Carry {
    /// The domain.
    pub(super) uuid: Uuid,
    /// As others see it.
    pub(crate) migration: Arc<Migration>,
    in_post_copy: AtomicBool,
}

impl Carry {
    pub(super) fn is_in_post_copy(&self) -> bool {
        self.in_post_copy.load(Ordering::Relaxed)
    }

    pub(super) fn turns_to_post_copy(&self) {
        self.in_post_copy.store(true, Ordering::Relaxed);
    }

    /// Its user wants it to end.
    pub(crate) fn cancel(&self) -> Result<(), AgentError> {
        if self.is_in_post_copy() {
            return Err(AgentError::TooLate { name: self.migration.vm.clone(), is_there: true });
        }
        self.migration.cancel();
        Ok(())
    }
}

/// See the module's text.
#[derive(Default)]
pub(crate) struct Carries(Mutex<Vec<Arc<Carry>>>);

impl Carries {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Carry>>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    /// The one that takes this domain away.
    pub(crate) fn of(&self, uuid: Uuid) -> Option<Arc<Carry>> {
        self.lock().iter().find(|it| it.uuid == uuid).cloned()
    }

    /// The guests that wait for pages at their destinations, with where that is.
    pub(crate) fn in_post_copy(&self) -> Vec<(Fingerprint, String)> {
        let waits = |it: &&Arc<Carry>| it.is_in_post_copy();
        let there = |it: &Arc<Carry>| Some((it.migration.key()?, it.migration.vm.clone()));
        self.lock().iter().filter(waits).filter_map(there).collect()
    }

    /// One begins for this domain, unless there is one.
    pub(super) fn begin(&self, uuid: Uuid, migration: &Arc<Migration>) -> Result<Arc<Carry>, AgentError> {
        let mut all = self.lock();
        if all.iter().any(|it| it.uuid == uuid) {
            return Err(AgentError::MigrationRuns { name: migration.vm.clone() });
        }
        let in_post_copy = AtomicBool::new(false);
        let carry = Arc::new(Carry { uuid, migration: Arc::clone(migration), in_post_copy });
        all.push(Arc::clone(&carry));
        Ok(carry)
    }

    /// It is over.
    pub(super) fn end(&self, uuid: Uuid) {
        self.lock().retain(|it| it.uuid != uuid);
    }

    /// Before the agent ends, which takes their connections along: what is not in post-copy is cancelled, and what is may
    /// end within a while.
    pub(crate) async fn cancel_all(&self) {
        for carry in self.lock().iter() {
            // What is in post-copy goes on.
            let _ = carry.cancel();
        }
        let deadline = Instant::now() + FAREWELL;
        while !self.lock().is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
