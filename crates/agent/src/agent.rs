//! One host's agent: its host, and the guests that leave it and come to it.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use vmferry_link::Sessions;

use crate::config::Config;
use crate::destination::Incoming;
use crate::host::{Follower, Host, Trusts, Vm};
use crate::journal::Journal;
use crate::measuring::witness;
use crate::source::Outgoing;

/// See the module's text.
pub(crate) struct Agent {
    /// Its host.
    pub(crate) host: Arc<Host>,
    /// What leaves it.
    pub(crate) outgoing: Arc<Outgoing>,
    /// What comes to it.
    pub(crate) incoming: Arc<Incoming>,
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
        host.tell(Box::new(Migrations { leaving, coming }));
        Arc::new(Self { host, outgoing, incoming })
    }
}

/// What a host's VMs are to the migrations.
struct Migrations {
    leaving: Weak<Outgoing>,
    coming: Weak<Incoming>,
}

impl Follower for Migrations {
    fn taken(&self, host: &Arc<Host>, vm: &Arc<Vm>) {
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
