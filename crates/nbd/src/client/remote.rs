//! A disk that is served elsewhere, over several connections, as a [`Backend`].

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::backend::{Backend, Zeroing};
use crate::client::{Client, ClientError};
use crate::session::{BlockSizes, Session};
use crate::tls::ClientTls;
use crate::transmission::{Answer, Command, Extent};
use crate::uri::Place;
use crate::wire::ErrorCode;

/// No command is longer without extended headers: it has to be a multiple of all block sizes.
const LONGEST: u64 = 1 << 30;

/// See the module's text.
pub struct Remote {
    clients: Vec<Client>,
    next: AtomicUsize,
}

impl Remote {
    /// Over so many connections, or over one where the server does not say that more are the same.
    pub fn connect(
        place: &Place,
        tls: Option<&ClientTls>,
        export: &str,
        connections: usize,
    ) -> Result<Self, ClientError> {
        let mut clients = vec![Client::connect(place, tls, export)?];
        if clients[0].session().export.abilities.multi_conn() {
            for _ in 1..connections {
                clients.push(Client::connect(place, tls, export)?);
            }
        }
        Ok(Self { clients, next: AtomicUsize::new(0) })
    }

    /// What was agreed upon.
    pub fn session(&self) -> &Session {
        self.clients[0].session()
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.clients.len()
    }

    fn client(&self) -> &Client {
        &self.clients[self.next.fetch_add(1, Relaxed) % self.clients.len()]
    }

    /// Has a long command done in parts.
    fn in_parts(&self, offset: u64, length: u64, command: impl Fn(u64, u64) -> Command) -> io::Result<()> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let part = (end - at).min(LONGEST);
            self.client().tell(command(at, part))?;
            at += part;
        }
        Ok(())
    }
}

impl From<ClientError> for io::Error {
    fn from(error: ClientError) -> Self {
        let kind = match &error {
            ClientError::Failed { source, .. } => match source.error {
                ErrorCode::NotPermitted => io::ErrorKind::PermissionDenied,
                ErrorCode::NoSpace => io::ErrorKind::StorageFull,
                ErrorCode::NotSupported => io::ErrorKind::Unsupported,
                ErrorCode::Invalid => io::ErrorKind::InvalidInput,
                _ => io::ErrorKind::Other,
            },
            _ => io::ErrorKind::NotConnected,
        };
        io::Error::new(kind, error)
    }
}

impl Backend for Remote {
    fn size(&self) -> u64 {
        self.session().export.size
    }

    fn read_only(&self) -> bool {
        self.session().export.abilities.read_only()
    }

    fn blocks(&self) -> BlockSizes {
        self.session().export.blocks
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let most = self.blocks().maximum as usize;
        let mut at = offset;
        for part in into.chunks_mut(most) {
            part.copy_from_slice(&self.client().read(at, vec![0; part.len()])?);
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for part in bytes.chunks(self.blocks().maximum as usize) {
            self.client().write(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        let abilities = self.session().export.abilities;
        let Zeroing { may_punch, fast } = how;
        if abilities.write_zeroes() && (abilities.fast_zero() || !fast) {
            let command = |offset, length| Command::WriteZeroes { offset, length, fua: false, may_punch, fast };
            return self.in_parts(offset, length, command);
        }
        if fast {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let zeroes = vec![0; length.min(u64::from(self.blocks().maximum).min(1 << 20)) as usize];
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let part = (end - at).min(zeroes.len() as u64);
            self.write(at, &zeroes[..part as usize])?;
            at += part;
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        if !self.session().export.abilities.trim() {
            return Ok(());
        }
        self.in_parts(offset, length, |offset, length| Command::Trim { offset, length, fua: false })
    }

    fn flush(&self) -> io::Result<()> {
        // What one has flushed is there for all, or there is only one.
        if self.session().export.abilities.flush() {
            self.clients[0].tell(Command::Flush)?;
        }
        Ok(())
    }

    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>> {
        if self.session().allocation.is_none() {
            return Ok(vec![Extent::data(length)]);
        }
        let length = length.min(LONGEST);
        let command = Command::BlockStatus { offset, length, one: most == 1 };
        let Answer::Status(mut extents) = self.client().tell(command)? else {
            unreachable!("a status is answered with one, or fails")
        };
        extents.truncate(most);
        Ok(extents)
    }
}
