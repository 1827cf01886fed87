//! The migrations away from this host.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::migration::Migration;
use crate::host::{Host, Stage};

/// How many ended migrations can still be looked at in full.
const KEPT_MIGRATIONS: usize = 32;
/// How long migrations may take to be undone when the agent ends.
const FAREWELL: Duration = Duration::from_secs(20);

/// See the module's text.
pub(crate) struct Outgoing {
    /// From where.
    pub(crate) host: Arc<Host>,
    migrations: Mutex<Vec<Arc<Migration>>>,
}

impl Outgoing {
    /// Of this host: none yet.
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, migrations: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Migration>>> {
        self.migrations.lock().expect("no holder of this lock panics")
    }

    pub(super) fn add(&self, migration: Arc<Migration>) {
        let mut migrations = self.lock();
        migrations.push(migration);
        let surplus = migrations.len().saturating_sub(KEPT_MIGRATIONS);
        let ended: Vec<Uuid> =
            migrations.iter().filter(|migration| migration.told.is_over()).take(surplus).map(|it| it.id).collect();
        migrations.retain(|migration| !ended.contains(&migration.id));
    }

    pub(crate) fn migration(&self, id: Uuid) -> Option<Arc<Migration>> {
        self.lock().iter().find(|migration| migration.id == id).cloned()
    }

    pub(crate) fn migration_of(&self, vm: &str) -> Option<Arc<Migration>> {
        self.lock().iter().find(|migration| migration.vm == vm && !migration.told.is_over()).cloned()
    }

    /// Before the agent ends: what is not committed is undone, or QEMU would go on alone and nobody would commit.
    pub(crate) async fn cancel_all(&self) {
        let under_way: Vec<Arc<Migration>> =
            self.lock().iter().filter(|migration| !migration.told.is_over()).cloned().collect();
        for migration in &under_way {
            migration.cancel();
        }
        let is_settled = |it: &Arc<Migration>| {
            it.told.is_over()
                || self.host.vm(&it.vm).is_ok_and(|vm| matches!(vm.stage(), Stage::Left(_) | Stage::InDoubt(_)))
        };
        let deadline = Instant::now() + FAREWELL;
        while !under_way.iter().all(is_settled) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
