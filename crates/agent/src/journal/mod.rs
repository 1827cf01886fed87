//! The journal: which VMs this host has, and every step of every migration, written before the step is done.
//!
//! `SQLite` in WAL mode with `synchronous=FULL`: what was written is there also after the host lost power. It must be:
//! the other host may have acted on it. A step costs an fsync, two of them within the downtime. All of it is done by one
//! thread of the journal's own, in the order in which it is asked for.
//!
//! A migration's row belongs to one *instance* of a VM, one process of one boot of the host, and never to a name: what
//! another QEMU of that name does later is none of its business. At most one row of an instance is open.
//!
//! A full disk must not keep a migration that has begun from being committed or undone, so that the space for its rows
//! is taken when it is prepared ([`Journal::reserve`]).

mod carries;
mod incoming;
mod instance;
mod lessons;
mod moves;
mod outgoing;
mod peers;
mod queued;
mod schema;
mod vms;

pub use carries::{CarryEnd, CarryRecord};
pub use incoming::{InRow, Source};
pub use instance::Instance;
pub use lessons::Taught;
pub use moves::{Coming, ComingDisk, FileId, MoveIn, MoveOut, Written};
pub use outgoing::{Fence, OutRecord};
pub use peers::{Joined, PeerRecord};
pub use queued::QueuedRecord;
pub use vms::VmRecord;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, ErrorCode};
use uuid::Uuid;
use vmferry_link::Fingerprint;

type Result<T> = rusqlite::Result<T>;

/// What a journal's rows for one migration may take, with some to spare, in bytes: each write is a few pages.
const RESERVE: u64 = 256 << 10;
/// `SQLite`'s page size, and what its log needs for each.
const PAGE: u64 = 4096;

/// Asks the journal's thread; cheap to clone.
#[derive(Clone)]
pub struct Journal {
    work: mpsc::Sender<Work>,
    dir: PathBuf,
}

type Work = Box<dyn FnOnce(&mut Connection) + Send>;

/// The database, in its folder.
const FILE: &str = "agent.db";

/// A journal that was opened.
pub struct Opened {
    /// It.
    pub journal: Journal,
    /// Where one is now that could not be read, and why.
    pub set_aside: Option<(PathBuf, String)>,
    /// It knows of nothing that was before.
    pub is_new: bool,
}

impl Journal {
    /// Opens the journal in this folder, or makes it. One that cannot be read is kept aside; one that a newer version has
    /// made is an error.
    pub fn open(dir: &Path) -> Result<Opened> {
        let was_there = dir.join(FILE).exists();
        let (connection, set_aside) = match schema::open(dir) {
            Ok(connection) => (connection, None),
            Err(error) if is_unreadable(&error) => {
                let aside = set_aside(dir).map_err(|_| error)?;
                let error = "it is no database, or a damaged one".to_owned();
                (schema::open(dir)?, Some((aside, error)))
            }
            Err(error) => return Err(error),
        };
        let (work, asked) = mpsc::channel::<Work>();
        let mut connection = connection;
        std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                while let Ok(work) = asked.recv() {
                    work(&mut connection);
                }
            })
            .map_err(|error| unreadable(&format!("a thread: {error}")))?;
        let is_new = !was_there || set_aside.is_some();
        Ok(Opened { journal: Self { work, dir: dir.into() }, set_aside, is_new })
    }

    /// Has the journal's thread do this, and waits for it.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = tokio::sync::oneshot::channel();
        let work = Box::new(move |connection: &mut Connection| {
            // Whoever asked may have gone; what was asked is done all the same.
            let _ = answer.send(work(connection));
        });
        // It ends with the last one who could ask.
        self.work.send(work).map_err(|_| unreadable("the journal's thread has ended"))?;
        answered.await.map_err(|_| unreadable("the journal's thread has ended"))?
    }

    /// Takes the space that a migration's rows need, so that they can be written when the disk is full: free pages in
    /// the file, and as much in its log, which is overwritten from its beginning. Fails when there is none.
    pub async fn reserve(&self) -> Result<()> {
        let log = self.dir.join("agent.db-wal");
        self.call(move |db| {
            schema::forget_what_is_old(db);
            let in_log = || std::fs::metadata(&log).map_or(0, |it| it.len());
            let free: u32 = db.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
            if u64::from(free) * PAGE < RESERVE || in_log() < RESERVE {
                db.execute_batch(&format!(
                    "BEGIN; CREATE TABLE reserve (space BLOB); INSERT INTO reserve VALUES (zeroblob({})); \
                     DROP TABLE reserve; COMMIT",
                    2 * RESERVE
                ))?;
            }
            // Two readers at once there are not: the log is written from its beginning again.
            db.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))
        })
        .await
    }
}

/// Neither a full disk nor a missing right is mended by beginning anew.
fn is_unreadable(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Keeps the files of a journal that cannot be read under another name.
fn set_aside(dir: &Path) -> std::io::Result<PathBuf> {
    let aside = dir.join(format!("agent.db.damaged-{}", now()));
    for end in ["", "-wal", "-shm"] {
        let from = dir.join(format!("agent.db{end}"));
        if from.exists() {
            std::fs::rename(from, format!("{}{end}", aside.display()))?;
        }
    }
    Ok(aside)
}

fn unreadable(what: &str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, format!("cannot read {what:?}").into())
}

fn parse_key(text: &str) -> Result<Fingerprint> {
    text.parse().map_err(|_| unreadable(text))
}

fn parse_id(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| unreadable(text))
}

/// In seconds since 1970.
pub(crate) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

#[cfg(test)]
mod tests;
