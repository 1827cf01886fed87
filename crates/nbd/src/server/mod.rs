//! Serves disks to clients.
//!
//! A connection has a thread, and more while its requests wait for a disk. It comes over a [`Channel`]: a Unix socket, TCP,
//! a pair of sockets that somebody else pumps.

mod budget;
mod connection;
mod listening;
mod workers;

pub use listening::{Listening, Where};

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmferry_link::Channel;

use crate::backend::Backend;
use crate::handshake::{BadClient, Offer, Offering, Outcome};
use crate::limits;
use crate::server::budget::Budget;
use crate::server::connection::Connection;
use crate::session::{Abilities, Export};
use crate::tls::{ServerTls, TlsError};
use crate::transmission::BadRequest;

/// A disk and what it is called.
pub struct Served {
    /// What clients ask for.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// What is behind it.
    pub backend: Arc<dyn Backend>,
}

/// Why a connection ended, if it was not its client's doing.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its handshake went wrong.
    #[error(transparent)]
    Handshake(#[from] BadClient),
    /// TLS went wrong.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// It sent something after STARTTLS that TLS did not protect.
    #[error("the client said something between STARTTLS and TLS: somebody may be in between")]
    EarlyWords,
    /// What it sent was no request.
    #[error(transparent)]
    Request(#[from] BadRequest),
    /// It is broken, or too slow.
    #[error("the connection broke")]
    Broken(#[from] io::Error),
}

/// See the module's text.
pub struct Server {
    offer: Arc<Offer>,
    backends: Vec<Arc<dyn Backend>>,
    tls: Option<ServerTls>,
    budget: Budget,
}

impl Server {
    /// Of these disks; with TLS, nothing without it.
    pub fn new(served: Vec<Served>, tls: Option<ServerTls>) -> Self {
        let export = |it: &Served| Export {
            name: it.name.clone(),
            description: it.description.clone(),
            size: it.backend.size(),
            abilities: Abilities::of_ours(it.backend.read_only()),
            blocks: it.backend.blocks(),
        };
        let exports = served.iter().map(export).collect();
        Self {
            offer: Arc::new(Offer { exports, tls: tls.is_some() }),
            backends: served.into_iter().map(|it| it.backend).collect(),
            tls,
            budget: Budget::new(limits::BYTES_OF_ALL),
        }
    }

    /// Serves one client, on this thread, until it leaves or is sent away.
    pub fn serve(&self, channel: Channel) -> Result<(), ServeError> {
        let cutter = channel.cutter();
        let Some((channel, early, export, session)) = self.shake_hands(channel)? else {
            return Ok(());
        };
        let (mut reader, writer) = channel.split();
        reader.set_deadline(None);
        let connection = Connection {
            session,
            backend: &*self.backends[export],
            of_all: &self.budget,
            writer: Mutex::new(writer),
            cutter,
        };
        connection.run(reader, &early)?;
        let _ = connection.writer.into_inner().expect("nobody panics with this lock").end();
        Ok(())
    }

    #[expect(clippy::type_complexity, reason = "it is taken apart where it is made")]
    fn shake_hands(
        &self,
        mut channel: Channel,
    ) -> Result<Option<(Channel, Vec<u8>, usize, crate::Session)>, ServeError> {
        channel.set_deadline(Some(Instant::now() + limits::HANDSHAKE));
        let (mut out, mut heard) = (Vec::new(), Vec::new());
        let mut offering = Offering::begin(Arc::clone(&self.offer), &mut out);
        let mut bytes = [0; 4096];
        loop {
            let mut input = &heard[..];
            let outcome = offering.receive(&mut input, &mut out);
            heard = input.to_vec();
            // Also what was said before something went wrong.
            channel.write_all(&out)?;
            out.clear();
            match outcome? {
                Outcome::Incomplete => {
                    let count = channel.read(&mut bytes)?;
                    if count == 0 {
                        return Ok(None);
                    }
                    heard.extend(&bytes[..count]);
                }
                Outcome::StartTls if !heard.is_empty() => return Err(ServeError::EarlyWords),
                Outcome::StartTls => {
                    let tls = self.tls.as_ref().expect("TLS was offered");
                    channel = tls.accept(channel)?;
                    offering.tls_begins();
                }
                Outcome::Go { export, session } => return Ok(Some((channel, heard, export, session))),
                Outcome::End => {
                    let _ = channel.split().1.end();
                    return Ok(None);
                }
            }
        }
    }
}
