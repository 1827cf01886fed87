//! A network between two hosts that damages what it carries: a bit, now and then.
//!
//! Only of what is not encrypted. TLS notices by itself, and what the agents decide must get through.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// The first byte of a connection that is encrypted.
const TLS_HANDSHAKE: u8 = 0x16;

/// See the module's text. It ends with the runtime.
pub(crate) struct DamagingProxy {
    /// Where it listens.
    pub(crate) address: String,
    flips: Arc<Flips>,
}

#[derive(Default)]
struct Flips {
    spared: usize,
    due: AtomicUsize,
    done: AtomicUsize,
}

impl DamagingProxy {
    /// Leads to this server and flips a bit as often as this, in one direction or the other, but none of the first so many
    /// bytes that a connection carries either way.
    pub(crate) async fn to(server: std::net::SocketAddr, every: Duration, spared: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let flips = Arc::new(Flips { spared, ..Flips::default() });
        let carried = Arc::clone(&flips);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry_both_ways(client, server, Arc::clone(&carried)));
            }
        });
        let ticking = Arc::downgrade(&flips);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let Some(flips) = ticking.upgrade() else { return };
                flips.due.store(1, Ordering::Relaxed);
            }
        });
        Self { address, flips }
    }

    /// How many bits it has flipped.
    pub(crate) fn flipped(&self) -> usize {
        self.flips.done.load(Ordering::Relaxed)
    }
}

async fn carry_both_ways(client: TcpStream, server: std::net::SocketAddr, flips: Arc<Flips>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let mut first = [0];
    // A client that says nothing is one that has gone.
    let is_plain = matches!(client.peek(&mut first).await, Ok(1) if first[0] != TLS_HANDSHAKE);
    let flips = is_plain.then_some(flips);
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::spawn(carry(from_client, to_server, flips.clone()));
    tokio::spawn(carry(from_server, to_client, flips));
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, flips: Option<Arc<Flips>>) {
    let (mut bytes, mut carried) = (vec![0; 64 << 10], 0);
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        carried += length;
        if let Some(flips) = &flips
            && carried > flips.spared
            && flips.due.swap(0, Ordering::Relaxed) == 1
        {
            flips.done.fetch_add(1, Ordering::Relaxed);
            bytes[length - 1] ^= 4;
        }
        if to.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}
