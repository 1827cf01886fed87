//! A proxy between two agents that does what networks and attackers do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// See the module's text.
pub(crate) struct Proxy {
    /// Where it listens.
    pub(crate) address: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    connections: Mutex<Vec<Connection>>,
    refuse: AtomicBool,
    swallow: AtomicBool,
    change: AtomicUsize,
    next: AtomicUsize,
}

struct Connection {
    client: TcpStream,
    server: TcpStream,
    /// The first bytes that the client said.
    recorded: Arc<Mutex<Vec<u8>>>,
}

impl Proxy {
    pub(crate) fn to(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared::default());
        let (server, taking) = (server.to_owned(), Arc::clone(&shared));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                if taking.refuse.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(&server) else { continue };
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let recorded = Arc::default();
                let connection =
                    Connection { client: client.try_clone().unwrap(), server: server.try_clone().unwrap(), recorded };
                let recorded = Arc::clone(&connection.recorded);
                taking.connections.lock().unwrap().push(connection);
                let (there, back) = (Arc::clone(&taking), Arc::clone(&taking));
                let (client_too, server_too) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || carry(client, server, &there, Some(&recorded)));
                std::thread::spawn(move || carry(server_too, client_too, &back, None));
            }
        });
        Self { address, shared }
    }

    /// Cuts one connection that is still there; another one each time.
    pub(crate) fn cut_one(&self) {
        let mut connections = self.shared.connections.lock().unwrap();
        if !connections.is_empty() {
            let which = self.shared.next.fetch_add(1, Ordering::SeqCst) % connections.len();
            connections.remove(which).cut();
        }
    }

    /// Cuts all connections.
    pub(crate) fn cut_all(&self) {
        self.shared.connections.lock().unwrap().drain(..).for_each(|connection| connection.cut());
    }

    /// Whether new connections end as soon as they begin.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.shared.refuse.store(refuse, Ordering::SeqCst);
    }

    /// Whether bytes vanish while connections stay, as when a host dies without a word.
    pub(crate) fn swallow(&self, swallow: bool) {
        self.shared.swallow.store(swallow, Ordering::SeqCst);
    }

    /// Changes a byte of what passes next from the client.
    pub(crate) fn change_a_byte(&self) {
        self.shared.change.fetch_add(1, Ordering::SeqCst);
    }

    /// Says something to the server on each connection.
    pub(crate) fn inject(&self, bytes: &[u8]) {
        for connection in &*self.shared.connections.lock().unwrap() {
            (&connection.server).write_all(bytes).unwrap();
        }
    }

    /// What clients said first, on each connection.
    pub(crate) fn recorded(&self) -> Vec<Vec<u8>> {
        let connections = self.shared.connections.lock().unwrap();
        connections.iter().map(|connection| connection.recorded.lock().unwrap().clone()).collect()
    }
}

impl Connection {
    fn cut(&self) {
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, shared: &Shared, recorded: Option<&Mutex<Vec<u8>>>) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(length) = from.read(&mut bytes)
        && length > 0
    {
        while shared.swallow.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(recorded) = recorded {
            let mut recorded = recorded.lock().unwrap();
            if recorded.len() < 200 {
                recorded.extend(&bytes[..length]);
            }
            let change = |waiting: usize| waiting.checked_sub(1);
            if shared.change.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).is_ok() {
                bytes[length / 2] ^= 1;
            }
        }
        if to.write_all(&bytes[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
