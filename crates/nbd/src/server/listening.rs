//! A server that listens, with a thread for each client.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use socket2::SockRef;
use vmferry_link::Channel;
use vmferry_link::channel::Cutter;

use crate::limits;
use crate::server::Server;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    /// On a Unix socket.
    Unix(PathBuf),
    /// On an abstract Unix socket (unix(7)), which whoever is in this network namespace reaches, whatever its user may
    /// open; for this process alone.
    Abstract {
        /// What it is called.
        name: String,
        /// Who may connect.
        pid: u32,
    },
    /// On TCP.
    Tcp(std::net::SocketAddr),
}

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Abstract { name, .. } => write!(f, "unix:@{name}"),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// A server at work. Dropping it ends it and all its connections, and waits for what their requests do to the disks.
pub struct Listening {
    at: Where,
    descriptor: OwnedFd,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    server: Server,
    stopped: AtomicBool,
    clients: Mutex<Vec<Client>>,
}

struct Client {
    cutter: Cutter,
    thread: JoinHandle<()>,
}

enum Listener {
    /// With the process that may connect, if not everybody may.
    Unix(UnixListener, Option<u32>),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(listener, only) => {
                let stream = listener.accept()?.0;
                let pid = socket_peercred(&stream)?.pid.as_raw_pid();
                if only.is_some_and(|only| pid.cast_unsigned() != only) {
                    let message = format!("process {pid} is none that may connect");
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
                }
                tune(&SockRef::from(&stream))?;
                Ok(stream.into())
            }
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                SockRef::from(&stream).set_keepalive(true)?;
                tune(&SockRef::from(&stream))?;
                Ok(stream.into())
            }
        }
    }
}

/// What is sent has to be taken in time: the kernel waits so long once after it has written something, and once again
/// before it says that it cannot. And room for a whole reply saves turns.
fn tune(socket: &SockRef<'_>) -> io::Result<()> {
    let _ = socket.set_send_buffer_size(2 << 20);
    socket.set_write_timeout(Some(limits::STALL / 2))
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &PathBuf) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|it| it.kind() == io::ErrorKind::ConnectionRefused) {
        let _ = std::fs::remove_file(path);
    }
}

impl Listening {
    /// Begins to listen.
    pub fn begin(server: Server, at: &Where) -> io::Result<Self> {
        let (listener, at) = match at {
            Where::Unix(path) => {
                remove_stale(path);
                (Listener::Unix(UnixListener::bind(path)?, None), at.clone())
            }
            Where::Abstract { name, pid } => {
                let address = SocketAddr::from_abstract_name(name)?;
                (Listener::Unix(UnixListener::bind_addr(&address)?, Some(*pid)), at.clone())
            }
            Where::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                let at = Where::Tcp(listener.local_addr()?);
                (Listener::Tcp(listener), at)
            }
        };
        let descriptor = match &listener {
            Listener::Unix(listener, _) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
        .try_clone_to_owned()?;
        let shared = Arc::new(Shared { server, stopped: AtomicBool::new(false), clients: Mutex::new(Vec::new()) });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("nbd-listen".into()).spawn(move || shared.accept_all(&listener))?
        };
        Ok(Self { at, descriptor, shared, thread: Some(thread) })
    }

    /// Where; with the port that the system has chosen, if it was to choose.
    pub fn at(&self) -> &Where {
        &self.at
    }

    /// How many clients there are.
    pub fn clients(&self) -> usize {
        self.shared.clients().iter().filter(|client| !client.thread.is_finished()).count()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Relaxed);
        // Whoever waits for a client then waits no longer.
        let _ = rustix::net::shutdown(&self.descriptor, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let clients = std::mem::take(&mut *self.shared.clients());
        for client in &clients {
            client.cutter.cut();
        }
        // What is served, and its lock, is let go when this is over.
        for client in clients {
            let _ = client.thread.join();
        }
        if let Where::Unix(path) = &self.at {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Vec<Client>> {
        self.clients.lock().expect("nobody panics with this lock")
    }

    fn accept_all(self: &Arc<Self>, listener: &Listener) {
        loop {
            match listener.accept() {
                _ if self.stopped.load(Relaxed) => return,
                Ok(descriptor) => self.take(descriptor),
                Err(error) => {
                    tracing::debug!(%error, "nbd: a client could not be taken");
                    // There may be no descriptors left, which others give back.
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn take(self: &Arc<Self>, descriptor: OwnedFd) {
        let mut clients = self.clients();
        clients.retain(|client| !client.thread.is_finished());
        if clients.len() == limits::CONNECTIONS {
            tracing::warn!("nbd: a client was sent away: there are {} already", limits::CONNECTIONS);
            return;
        }
        let (shared, channel) = (Arc::clone(self), Channel::over(descriptor));
        let cutter = channel.cutter();
        let end = cutter.clone();
        let run = move || {
            if let Err(error) = shared.server.serve(channel) {
                tracing::info!(error = &error as &dyn std::error::Error, "nbd: a client was sent away");
            }
            // The descriptor stays open until somebody sees that this thread has ended.
            end.cut();
        };
        match std::thread::Builder::new().name("nbd-client".into()).spawn(run) {
            Ok(thread) => clients.push(Client { cutter, thread }),
            Err(error) => tracing::warn!(%error, "nbd: no thread for a client"),
        }
    }
}
