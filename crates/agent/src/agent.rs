//! One host's agent: its host, and the guests that leave it and come to it.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use vmferry_link::Sessions;

use crate::config::Config;
use crate::copying::Copies;
use crate::destination::Incoming;
use crate::destination::carried::Carried;
use crate::disk_moves::DiskMoves;
use crate::host::{Follower, Host, Trusts, Vm};
use crate::journal::Journal;
use crate::measuring::witness;
use crate::queue::Queue;
use crate::source::Outgoing;
use crate::vm_moves::VmMoves;

/// See the module's text.
pub(crate) struct Agent {
    /// Its host.
    pub(crate) host: Arc<Host>,
    /// What leaves it.
    pub(crate) outgoing: Arc<Outgoing>,
    /// Migrations away from it that are asked for, those that have to wait among them.
    pub(crate) queue: Arc<Queue>,
    /// What comes to it.
    pub(crate) incoming: Arc<Incoming>,
    /// libvirt's domains that come to it.
    pub(crate) carried: Arc<Carried>,
    /// Images that are copied.
    pub(crate) copies: Arc<Copies>,
    /// Which of its disks move.
    pub(crate) disk_moves: Arc<DiskMoves>,
    /// Which of its VMs move while they do not run.
    pub(crate) vm_moves: Arc<VmMoves>,
}

impl Agent {
    /// One that has nothing under way.
    pub(crate) fn new(
        config: Config,
        journal: Journal,
        trusts: Trusts,
        listens: Option<SocketAddr>,
        sessions: Sessions,
    ) -> Arc<Self> {
        let host = Host::new(config, journal, trusts, listens, sessions);
        let (outgoing, incoming) = (Outgoing::new(Arc::clone(&host)), Incoming::new(Arc::clone(&host)));
        let (leaving, coming) = (Arc::downgrade(&outgoing), Arc::downgrade(&incoming));
        let copies = Copies::new(Arc::clone(&host));
        let disk_moves = DiskMoves::new(Arc::clone(&host));
        let vm_moves = VmMoves::new(Arc::clone(&host), Arc::clone(&copies));
        let disks = Arc::downgrade(&disk_moves);
        host.tell(Box::new(Followers { leaving, coming, disks }));
        let queue = Queue::new(Arc::clone(&outgoing));
        Arc::new(Self { host, outgoing, queue, incoming, carried: Arc::default(), copies, disk_moves, vm_moves })
    }
}

/// What a host's VMs are to the migrations, and to moves of their disks.
struct Followers {
    leaving: Weak<Outgoing>,
    coming: Weak<Incoming>,
    disks: Weak<DiskMoves>,
}

impl Follower for Followers {
    fn taken(&self, host: &Arc<Host>, vm: &Arc<Vm>) {
        if let Some(disks) = self.disks.upgrade() {
            disks.taken(vm);
        }
        if vm.spec.measuring {
            let leaving = Weak::clone(&self.leaving);
            let cancel = move |name: &str| {
                // What is too late to be cancelled ends at its destination.
                if let Some(outgoing) = leaving.upgrade() {
                    let _ = outgoing.cancel(name);
                }
            };
            tokio::spawn(witness::guard(Arc::clone(host), Arc::clone(vm), cancel));
        }
    }

    fn forgotten(&self, vm: &Vm) {
        if let Some(incoming) = self.coming.upgrade() {
            incoming.forget(vm);
        }
    }
}
