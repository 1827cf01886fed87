//! RAM that the source's agent sends: where it lands, and over which link.
//!
//! What belongs to a VM's arrival is in a folder of it, so that a new agent can tell: in post-copy the record of what is
//! missing. QEMU gets the device state by a descriptor, whoever its user is. In post-copy the guest may run and QEMU need
//! not answer before its pages come, so that nothing here asks QEMU for anything once it began.

use std::collections::{BTreeSet, HashMap};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_link::{Fingerprint, Link, Protection, SessionOptions};
use vmferry_qemu::Qmp;
use vmferry_qemu::migration::{IGNORE_SHARED, set_capabilities};
use vmferry_qemu::qmp::commands;
use vmferry_ram::{GuestRam, Landing, serve};

use crate::engine::NewSession;
use crate::engine::external::link_options;
use crate::engine::journey::{is_plain, make_folder};
use crate::engine::lending::{give_state_socket, with_userfaultfd_device};
use crate::engine::movable::backends_of;
use crate::error::AgentError;
use crate::host::{Host, Vm};

/// What is missing in post-copy.
const RECORD: &str = "post-copy";

/// One VM's RAM, and what brings it.
pub(crate) struct Arrival {
    landing: Arc<Landing>,
    link: Arc<Link>,
    /// Nobody takes anything from the link any more.
    over: CancellationToken,
}

/// The RAM that other agents send.
#[derive(Default)]
pub(crate) struct Arrivals {
    under_way: Mutex<HashMap<Uuid, Arrival>>,
    /// What brings their disks.
    disks: Mutex<HashMap<Uuid, Arc<Link>>>,
    /// Held while an arrival goes on over another link.
    resuming: tokio::sync::Mutex<()>,
}

impl Arrivals {
    /// What was under way for this migration is not any more.
    pub(super) fn take(&self, id: Uuid) -> Option<Arrival> {
        self.lock().remove(&id)
    }

    /// This link brings the disks of this migration.
    pub(super) fn brings_disks(&self, id: Uuid, link: Arc<Link>) {
        self.lock_disks().insert(id, link);
    }

    /// Nothing brings its disks any more.
    pub(super) fn has_disks(&self, id: Uuid) {
        if let Some(link) = self.lock_disks().remove(&id) {
            link.give_up();
        }
    }

    fn lock_disks(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Link>>> {
        self.disks.lock().expect("no holder of this lock panics")
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arrival>> {
        self.under_way.lock().expect("no holder of this lock panics")
    }
}

fn folder(vm_dir: &Path) -> PathBuf {
    vm_dir.join("ram-in")
}

/// Its RAM comes from the source's agent.
pub(crate) fn is_expected(vm_dir: &Path) -> bool {
    folder(vm_dir).exists()
}

/// The link that a source is about to make.
#[derive(Clone)]
pub(crate) struct Expected {
    pub(crate) session: NewSession,
    pub(crate) source: Fingerprint,
    /// Both hosts trust the network.
    pub(crate) plain: bool,
}

/// Has a QEMU wait for its device state, and takes its RAM as soon as it comes. Tells why the guest cannot run there
/// before all of it is there; nothing, when it can.
pub(crate) async fn begin(
    host: &Host,
    arrivals: &Arc<Arrivals>,
    vm: &Vm,
    id: Uuid,
    known: &BTreeSet<String>,
    expected: Expected,
) -> Result<Option<String>, AgentError> {
    let dir = folder(&vm.dir);
    make_folder(&dir, expected.plain)?;
    set_capabilities(&vm.qmp, known, &[IGNORE_SHARED]).await?;
    let (ours, theirs) = UnixStream::pair().map_err(AgentError::io("a socket"))?;
    let uri = give_state_socket(&vm.qmp, theirs).await?;
    vm.qmp.execute(commands::MigrateIncoming { uri }).await?;
    let (pid, backends, record) = (vm.pid, backends_of(vm).await?, dir.join(RECORD));
    let open = move || {
        let landing = Landing::new(GuestRam::open(pid, &backends)?, &record);
        let post_copy = landing.prepare_post_copy();
        Ok((landing, post_copy))
    };
    let opened = async { tokio::task::spawn_blocking(open).await };
    let opened = with_userfaultfd_device(host.config.lend_userfaultfd, &vm.qmp, vm.pid, opened).await;
    let (landing, post_copy) = opened.expect("opening RAM does not panic").map_err(AgentError::Ram)?;
    expect(host, arrivals, id, Arc::new(landing), expected, Some((ours, vm.qmp.clone())))?;
    Ok(post_copy.err().map(|why| in_one_line(&why)))
}

impl Arrival {
    /// Nothing more is taken.
    pub(crate) fn give_up(&self) {
        self.link.give_up();
    }
}

/// Takes what comes over the link, in a thread of its own, to its end.
fn expect(
    host: &Host,
    arrivals: &Arc<Arrivals>,
    id: Uuid,
    landing: Arc<Landing>,
    expected: Expected,
    qemu: Option<(UnixStream, Qmp)>,
) -> Result<(), AgentError> {
    let protection = match expected.plain {
        true => Protection::Plain,
        false => Protection::Tls(expected.source),
    };
    let options = SessionOptions { link: link_options(expected.session, None), protection };
    let link = Arc::new(host.sessions.expect(options).map_err(|down| AgentError::Ram(down.into()))?);
    let arrival = Arrival { landing: Arc::clone(&landing), link: Arc::clone(&link), over: CancellationToken::new() };
    let over = arrival.over.clone();
    arrivals.lock().insert(id, arrival);
    let there = Arc::clone(arrivals);
    let runtime = tokio::runtime::Handle::current();
    let take = move || {
        // Also when it panics.
        let _over = over.drop_guard();
        match serve(&link, &landing, qemu.as_ref().map(|(state, _)| state)) {
            Ok(ended) => {
                tracing::debug!(migration = %id, ?ended, "its RAM has arrived");
                there.take(id);
            }
            Err(error) => {
                tracing::warn!(migration = %id, error = in_one_line(&error), "its RAM does not arrive");
                // QEMU ends when it is told to, and not when it hears no more.
                if let Some((state, qmp)) = qemu {
                    runtime.spawn(async move {
                        qmp.closed().await;
                        drop(state);
                    });
                }
                if landing.missing().is_none() {
                    there.take(id);
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("ram-arrival".into()).spawn(take);
    if let Err(error) = thread {
        arrivals.take(id);
        return Err(AgentError::io("a thread")(error));
    }
    Ok(())
}

/// How the RAM of a guest that this host owns stands.
pub(crate) enum Standing {
    /// All of it is here.
    Complete,
    /// The rest comes over this session.
    Awaited(NewSession),
}

/// The source has lost its link, or is another agent than before, or this one is. Post-copy goes on over a new one.
pub(crate) async fn again(
    host: &Host,
    arrivals: &Arc<Arrivals>,
    id: Uuid,
    vm_dir: &Path,
    pid: u32,
    source: Fingerprint,
) -> Result<Standing, AgentError> {
    // Two at once would take each other's faults.
    let _turn = arrivals.resuming.lock().await;
    let dir = folder(vm_dir);
    let landing = if let Some(arrival) = arrivals.take(id) {
        arrival.link.give_up();
        arrival.over.cancelled().await;
        Some(arrival.landing)
    } else {
        let record = dir.join(RECORD);
        let found = tokio::task::spawn_blocking(move || Landing::again(pid, &record));
        found.await.expect("opening RAM does not panic").map_err(AgentError::Ram)?.map(Arc::new)
    };
    // Without a record it was complete before the guest ran.
    let Some(landing) = landing else { return Ok(Standing::Complete) };
    if landing.missing().is_none_or(|missing| missing == 0) {
        let finished = tokio::task::spawn_blocking(move || landing.finish()).await;
        finished.expect("leaving QEMU does not panic").map_err(AgentError::Ram)?;
        return Ok(Standing::Complete);
    }
    let (session, plain) = (NewSession::random(), is_plain(&dir));
    expect(host, arrivals, id, landing, Expected { session: session.clone(), source, plain }, None)?;
    Ok(Standing::Awaited(session))
}
