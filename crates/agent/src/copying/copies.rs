//! The copies that leave this host and those that arrive.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use tokio::sync::watch;
use uuid::Uuid;
use vmferry_api::{CopyEvent, CopyProgress};
use vmferry_link::{Fingerprint, Link};

use crate::error::AgentError;
use crate::host::Host;

/// How many ended copies can still be asked how they ended.
const KEPT: usize = 32;
/// How many may arrive at once.
const MOST_ARRIVING: usize = 32;

/// See the module's text.
pub(crate) struct Copies {
    pub(super) host: Arc<Host>,
    leaving: Mutex<Vec<Arc<Leaving>>>,
    arriving: Mutex<Vec<Arrival>>,
}

/// One that leaves.
pub(crate) struct Leaving {
    pub(super) id: Uuid,
    told: watch::Sender<CopyEvent>,
    cancelled: AtomicBool,
    link: OnceLock<Arc<Link>>,
}

/// One that arrives.
pub(super) struct Arrival {
    pub(super) id: Uuid,
    pub(super) from: Fingerprint,
    /// What it is written to, by device and inode.
    pub(super) part: (u64, u64),
    pub(super) link: Arc<Link>,
}

impl Copies {
    /// None yet.
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, leaving: Mutex::default(), arriving: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Leaving>>> {
        self.leaving.lock().expect("no holder of this lock panics")
    }

    /// One that leaves, or has left not long ago.
    pub(crate) fn leaving(&self, id: Uuid) -> Result<Arc<Leaving>, AgentError> {
        let none = || AgentError::Conflict { message: format!("this agent knows no copy {id}"), hint: None };
        self.lock().iter().find(|it| it.id == id).cloned().ok_or_else(none)
    }

    /// One more; and those that were under way before.
    pub(super) fn add(&self, leaving: &Arc<Leaving>) -> Vec<Uuid> {
        let mut all = self.lock();
        let under_way = all.iter().filter(|it| !it.is_over()).map(|it| it.id).collect();
        all.push(Arc::clone(leaving));
        let surplus = all.len().saturating_sub(KEPT);
        let ended: Vec<Uuid> = all.iter().filter(|it| it.is_over()).take(surplus).map(|it| it.id).collect();
        all.retain(|it| !ended.contains(&it.id));
        under_way
    }

    pub(super) fn arriving(&self) -> MutexGuard<'_, Vec<Arrival>> {
        self.arriving.lock().expect("no holder of this lock panics")
    }

    /// There is room for one more that arrives.
    pub(super) fn may_arrive(&self) -> Result<(), AgentError> {
        match self.arriving().len() < MOST_ARRIVING {
            true => Ok(()),
            false => {
                Err(AgentError::Busy { what: format!("one of the {MOST_ARRIVING} copies that arrive here already") })
            }
        }
    }
}

impl Leaving {
    pub(super) fn new() -> Arc<Self> {
        let told = watch::Sender::new(CopyEvent::Progress(CopyProgress::default()));
        Arc::new(Self { id: Uuid::new_v4(), told, cancelled: AtomicBool::new(false), link: OnceLock::new() })
    }

    /// What it tells, from what it told last on.
    pub(crate) fn watch(&self) -> watch::Receiver<CopyEvent> {
        let mut told = self.told.subscribe();
        told.mark_changed();
        told
    }

    pub(super) fn tell(&self, event: CopyEvent) {
        self.told.send_replace(event);
    }

    fn is_over(&self) -> bool {
        self.told.borrow().is_last()
    }

    /// It ends as soon as may be.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if let Some(link) = self.link.get() {
            link.give_up();
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// It goes over this link.
    pub(super) fn goes_over(&self, link: &Arc<Link>) {
        let _ = self.link.set(Arc::clone(link));
        if self.is_cancelled() {
            link.give_up();
        }
    }

    /// What it goes over, once it does.
    pub(super) fn link(&self) -> Option<&Arc<Link>> {
        self.link.get()
    }
}
