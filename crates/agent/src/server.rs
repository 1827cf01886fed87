//! Serving: the agent from its start to its end.

use std::io::{Error, ErrorKind};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use vmferry_api::Listen;
use vmferry_link::{Acceptor, Authority, AuthorityError, Identity, IdentityError, Incoming, Sessions};

use crate::agent::Agent;
use crate::config::Config;
use crate::error::AgentError;
use crate::host::{self, Trusts, bind_anew};
use crate::journal::{Journal, Opened};
use crate::peers::callers::Callers;
use crate::peers::trust::Caller;
use crate::{api, destination, known, recovery, source};

/// How long requests under way may take when the agent is told to end.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why an agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A folder cannot be made or used.
    #[error("cannot use the folder {path}")]
    Dir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another agent has these folders.
    #[error("another agent is running with the state folder {path}")]
    AlreadyRunning {
        /// Which.
        path: PathBuf,
    },
    /// The journal cannot be used.
    #[error("cannot use the journal in {path}")]
    Journal {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// A path, or address and port.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It cannot prove who it is.
    #[error("cannot tell other agents who this one is")]
    Identity(#[from] IdentityError),
    /// The authority cannot be used.
    #[error("cannot tell for which agents the authority vouches")]
    Authority(#[from] AuthorityError),
    /// There is no thread that indexes images.
    #[error("cannot index images")]
    Index(#[source] AgentError),
    /// What a predecessor left cannot be read.
    #[error("cannot go on where the last agent ended")]
    Recover(#[source] AgentError),
}

/// Serves until `end`. VMs run on afterwards.
pub async fn serve(config: Config, end: CancellationToken) -> Result<(), ServeError> {
    make_dir(&config.run_dir)?;
    make_dir(&config.state_dir)?;
    let _lock = lock(&config.state_dir)?;
    let Opened { journal, set_aside, is_new: journal_is_new } = Journal::open(&config.state_dir)
        .map_err(|source| ServeError::Journal { path: config.state_dir.clone(), source })?;
    let socket = config.socket();
    let local = listen_local(&socket)?;
    let (identity, authority) = match &config.authority {
        Some(files) => (Identity::load(&files.certificate, &files.key)?, Some(Authority::load(&files.roots)?)),
        None => (Identity::load_or_make(&config.state_dir.join("identity.pem"), &config.name)?, None),
    };
    let sessions = Sessions::new();
    let acceptor = Acceptor::new(&identity, authority.as_ref());
    let peers = listen_peers(config.listen, acceptor, &sessions).await?;
    let trusts = Trusts { identity: Arc::new(identity), authority };
    if let Some((aside, why)) = set_aside {
        tracing::error!(
            kept = %aside.display(),
            why,
            "THE JOURNAL COULD NOT BE READ: a new one is begun, peers must be paired again, and VMs that run are found by \
             their processes; `vmferry resolve` says whose they are"
        );
    }
    let agent = Agent::new(config, journal, trusts, peers.as_ref().map(Incoming::local_addr), sessions);
    recovery::recover(&agent, journal_is_new).await.map_err(ServeError::Recover)?;

    let served = tokio::spawn(
        axum::serve(local, api::local_router(&agent))
            .with_graceful_shutdown(end.clone().cancelled_owned())
            .into_future(),
    );
    if let Some(incoming) = peers {
        let service = api::peer_router(&agent).into_make_service_with_connect_info::<Caller>();
        let end = end.clone().cancelled_owned();
        tokio::spawn(
            axum::serve(Callers::new(incoming, &agent.host), service).with_graceful_shutdown(end).into_future(),
        );
    }
    let listens = agent.host.listens.map_or_else(|| "none".into(), |listen| listen.to_string());
    tracing::info!(listens, fingerprint = %agent.host.trusts.identity.fingerprint(), "known to other agents");
    tracing::info!(name = agent.host.config.name, socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "ready");
    tell_systemd(&[sd_notify::NotifyState::Ready]);
    tokio::spawn(Arc::clone(&agent.host.domains).follow(agent.host.signature.clone()));
    tokio::spawn(recovery::see_to_the_ended(Arc::clone(&agent)));
    tokio::spawn(Arc::clone(&agent.queue).drive());
    tokio::spawn(source::keep_fences(Arc::clone(&agent.host)));
    tokio::spawn(host::bound_logs(Arc::clone(&agent.host)));
    tokio::spawn(destination::remove_old_parts(Arc::clone(&agent.host)));
    known::keep_indexes(&agent.host).map_err(ServeError::Index)?;
    let learning = Arc::clone(&agent.host);
    tokio::spawn(async move { learning.qemus.learn_qemu().await });
    end.cancelled().await;
    tell_systemd(&[sd_notify::NotifyState::Stopping]);
    agent.queue.close();
    tokio::join!(agent.outgoing.cancel_all(), agent.carried.drain(&agent.host));
    // Consoles and event streams never end by themselves; they are cut.
    let _ = tokio::time::timeout(FAREWELL, served).await;
    let left = agent.host.vms().len();
    tracing::info!(vms = left, "the agent ends; VMs run on");
    if let Err(error) = std::fs::remove_file(&socket) {
        tracing::debug!(%error, "the socket was gone already");
    }
    Ok(())
}

fn tell_systemd(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd could not be told");
    }
}

fn make_dir(path: &Path) -> Result<(), ServeError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ServeError::Dir { path, source }
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))?;
    // Somebody may have made it before, or the one it is in: below /tmp, anybody can.
    let us = rustix::process::geteuid().as_raw();
    let owner = |path: &Path| std::fs::metadata(path).map(|it| it.uid()).map_err(failed(path));
    let foreign = match path.parent() {
        _ if owner(path)? != us => Some(path),
        Some(parent) if ![us, 0].contains(&owner(parent)?) => Some(parent),
        _ => None,
    };
    match foreign {
        Some(path) => Err(failed(path)(Error::new(ErrorKind::PermissionDenied, "it belongs to somebody else"))),
        None => Ok(()),
    }
}

/// Held for as long as the agent lives; the kernel lets go of it even when the agent is killed.
fn lock(state_dir: &Path) -> Result<std::fs::File, ServeError> {
    let file = std::fs::File::create(state_dir.join("agent.lock"))
        .map_err(|source| ServeError::Dir { path: state_dir.into(), source })?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| ServeError::AlreadyRunning { path: state_dir.into() })?;
    Ok(file)
}

fn listen_local(socket: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Listen { address: socket.display().to_string(), source };
    let listener = bind_anew(socket).map_err(failed)?;
    // The folder is private already; this says it again for one that was not made by us.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

async fn listen_peers(listen: Listen, acceptor: Acceptor, sessions: &Sessions) -> Result<Option<Incoming>, ServeError> {
    let Listen::At(address) = listen else { return Ok(None) };
    let failed = |source| ServeError::Listen { address: address.to_string(), source };
    let listener = match TcpListener::bind(address).await {
        // A host without IPv6.
        Err(error) if listen == Listen::default() && error.kind() != ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    Incoming::new(listener.map_err(failed)?, acceptor, sessions.clone()).map(Some).map_err(failed)
}
