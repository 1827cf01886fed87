//! The migrations away from this host.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_custody::source::{Event, Phase, Refused};
use vmferry_link::Fingerprint;

use super::carry::Carries;
use super::custody::Custody;
use super::foresee::Foreseen;
use super::migration::Migration;
use crate::error::AgentError;
use crate::host::{Host, Stage};
use crate::journal::Instance;
use crate::peers::{Abandon, Peer};

/// How many ended migrations can still be looked at in full.
const KEPT_MIGRATIONS: usize = 32;
/// For how long a destination is asked to abandon, every half a second.
const ABANDON_TRIES: u32 = 20;
/// How long migrations may take to be undone when the agent ends.
const FAREWELL: Duration = Duration::from_secs(20);

/// See the module's text.
pub(crate) struct Outgoing {
    /// From where.
    pub(crate) host: Arc<Host>,
    /// Of those that may be in post-copy.
    pub(super) post_copies: Arc<Semaphore>,
    migrations: Mutex<Vec<Arc<Migration>>>,
    /// Those that are driven.
    open: Mutex<Vec<Arc<Custody>>>,
    /// The domains of libvirt that leave.
    pub(crate) carries: Carries,
    /// What was predicted lately.
    pub(super) foreseen: Foreseen,
}

impl Outgoing {
    /// Of this host: none yet.
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        let post_copies = Arc::new(Semaphore::new(host.config.post_copies.get().into()));
        let (migrations, open, foreseen) = (Mutex::default(), Mutex::default(), Foreseen::default());
        Arc::new(Self { host, post_copies, migrations, open, carries: Carries::default(), foreseen })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Migration>>> {
        self.migrations.lock().expect("no holder of this lock panics")
    }

    pub(crate) fn add(&self, migration: Arc<Migration>) {
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

    /// This one is open, and driven.
    pub(super) fn is_open(&self, custody: &Arc<Custody>) {
        self.open().push(Arc::clone(custody));
    }

    /// This one is over: whatever is left of it goes.
    pub(super) async fn is_over(&self, custody: &Arc<Custody>) {
        self.see_to_the_rest(custody).await;
        self.open().retain(|it| !Arc::ptr_eq(it, custody));
    }

    /// It is driven, or what is left of it has not gone yet.
    pub(super) fn is_driven(&self, custody: &Arc<Custody>) -> bool {
        self.open().iter().any(|it| Arc::ptr_eq(it, custody))
    }

    async fn see_to_the_rest(&self, custody: &Arc<Custody>) {
        let (id, peer, asked) = (custody.record.id, custody.peer.apart(), custody.abandonment());
        let Phase::Over { .. } = custody.phase() else {
            // It may not have heard that it is to let go. Its lease runs out; but nobody should wait for that.
            if !custody.let_go() && !custody.was_kept() {
                tokio::spawn(async move { abandon_there(&peer, id, asked).await });
            }
            return;
        };
        let forgotten = match custody.vm() {
            Some(vm) => self.host.forget_vm(&vm).await,
            None => match self.host.idle(&custody.record.vm) {
                Some(idle) if idle.record.instance == custody.record.instance => self.host.forget_idle(&idle).await,
                _ => Ok(()),
            },
        };
        if let Err(error) = forgotten {
            tracing::error!(vm = custody.record.vm, error = in_one_line(&error), "cannot forget it");
        }
        tokio::spawn(async move {
            if let Err(error) = peer.settled(id).await {
                tracing::debug!(migration = %id, error = in_one_line(&error), "the destination does not hear that it is over");
            }
        });
    }

    /// The open migration of this VM.
    pub(crate) fn custody_of(&self, vm: &str) -> Option<Arc<Custody>> {
        self.open().iter().find(|it| it.record.vm == vm && !it.machine().is_at_rest()).cloned()
    }

    /// The guests that are at their destinations and wait for pages, with where that is: also those whose migrations an
    /// earlier agent began.
    pub(crate) fn in_post_copy(&self) -> Vec<(Fingerprint, String)> {
        let open = self.open();
        let waits = open.iter().filter(|it| matches!(it.phase(), Phase::Away { complete: false, .. }));
        let own = waits.map(|it| (it.record.peer_key, it.record.vm.clone()));
        own.chain(self.carries.in_post_copy()).collect()
    }

    /// How a VM stands that this agent has just found, when a migration of it is open.
    pub(crate) fn stage_of(&self, instance: &Instance) -> Option<Stage> {
        self.open().iter().find(|it| it.record.instance == *instance).map(|it| it.stage())
    }

    fn open(&self) -> MutexGuard<'_, Vec<Arc<Custody>>> {
        self.open.lock().expect("no holder of this lock panics")
    }

    /// Stops the migration of this VM, as its user wants. It is undone, unless it is too late for that.
    pub(crate) fn cancel(&self, vm: &str) -> Result<(), AgentError> {
        let custody = self.custody_of(vm).ok_or_else(|| not_migrated(vm))?;
        custody.is_unwanted();
        self.end(&custody, "its user cancelled it")
    }

    fn end(&self, custody: &Custody, why: &str) -> Result<(), AgentError> {
        let vm = &custody.record.vm;
        match custody.apply(Event::Cancel) {
            Ok(()) => {
                custody.because(why);
                if let Some(migration) = self.migration(custody.record.id) {
                    migration.cancel();
                }
                Ok(())
            }
            Err(Refused::NotMoving) => Err(not_migrated(vm)),
            Err(_) => Err(AgentError::TooLate { name: vm.clone(), is_there: custody.is_there() }),
        }
    }

    /// Before the agent ends: what is not committed is undone, or QEMU would go on alone and nobody would commit.
    pub(crate) async fn cancel_all(&self) {
        self.carries.cancel_all().await;
        let under_way: Vec<Arc<Custody>> = self.open().clone();
        for custody in &under_way {
            // What is too late to be undone goes on with the next agent.
            let _ = self.end(custody, "its agent ended");
        }
        let is_settled = |it: &Arc<Custody>| match it.phase() {
            Phase::Moving | Phase::Sealed { .. } | Phase::Undoing { .. } => false,
            _ => self.migration(it.record.id).is_none_or(|it| it.told.is_over()) || !it.machine().is_at_rest(),
        };
        let deadline = Instant::now() + FAREWELL;
        while !under_way.iter().all(is_settled) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn not_migrated(vm: &str) -> AgentError {
    AgentError::Conflict { message: format!("{vm} is not being migrated"), hint: None }
}

/// For a while; then its own lease must do it.
async fn abandon_there(peer: &Peer, id: Uuid, asked: Abandon) {
    for _ in 0..ABANDON_TRIES {
        if peer.abandon(id, asked).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
