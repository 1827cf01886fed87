//! The journal: which VMs this host has, and every step of every migration, written before the step is done.
//!
//! `SQLite` in WAL mode with `synchronous=FULL`: what was written is there also after the host lost power. It must be:
//! the other host may have acted on it. A step costs an fsync, two of them within the downtime.

use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmferry_api::{MigrationView, VmSpec};
use vmferry_link::Fingerprint;

/// What makes the tables of each version from those of the version before; `PRAGMA user_version` tells which one a file
/// has.
const SCHEMA: [&str; 2] = [
    "
CREATE TABLE vms (
    name       TEXT PRIMARY KEY,
    spec       TEXT NOT NULL,      -- VmSpec as JSON
    pid        INTEGER NOT NULL,
    start_time INTEGER NOT NULL,   -- of the process, in clock ticks since boot: tells a reused pid
    qmp        TEXT NOT NULL,      -- path of the QMP socket
    accelerator TEXT NOT NULL,
    incoming   TEXT,               -- the migration it waits for; NULL once this host owns the guest
    must_run   INTEGER NOT NULL,   -- this host owns the guest and has not set it running yet
    stranded   INTEGER NOT NULL    -- the guest is elsewhere, but what is left here may still be wanted
);
CREATE TABLE migrations (
    id         TEXT PRIMARY KEY,
    direction  TEXT NOT NULL,      -- 'out' or 'in'
    vm         TEXT NOT NULL,
    peer       TEXT NOT NULL,      -- the other host
    running    INTEGER NOT NULL,   -- the guest ran when the migration began
    started    INTEGER NOT NULL,   -- seconds since 1970
    step       TEXT NOT NULL,
    outcome    TEXT                -- how it ended; NULL while it has not
);
",
    "
ALTER TABLE migrations ADD COLUMN address TEXT NOT NULL DEFAULT '';   -- where the destination is
ALTER TABLE migrations ADD COLUMN peer_key TEXT NOT NULL DEFAULT '';  -- fingerprint of the other host
CREATE TABLE peers (
    fingerprint TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,  -- what it calls itself
    address     TEXT NOT NULL,         -- HOST:PORT; empty when it listens nowhere
    paired      INTEGER NOT NULL       -- seconds since 1970
);
CREATE TABLE tokens (
    hash    TEXT PRIMARY KEY,          -- of the secret
    expires INTEGER NOT NULL           -- seconds since 1970
);
",
];
/// How long the source of a migration may have something to say of it, in seconds.
const RECENT: i64 = 7 * 24 * 3600;

/// A step as the source's journal names it, written before it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutStep {
    /// The destination is being asked to get ready. Undo: abandon there.
    Prepare,
    /// RAM is copied. Undo: cancel here, abandon there.
    CopyRam,
    /// The destination is being told that it owns the guest. Whether it does is known only there.
    Commit,
    /// The destination owns the guest; its RAM follows. No way back.
    PostCopy,
    /// The destination owns the guest and has all of it. What is left here goes.
    Retire,
    /// Over: the guest is there.
    Done,
    /// Over: the guest is here.
    Abandoned,
}

/// Where an incoming migration stands, for the source that asks. This is what decides who owns the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InStep {
    /// QEMU waits or receives; the source owns the guest.
    Prepared,
    /// This host owns the guest.
    Committed,
    /// This host never will: whatever it had is gone.
    Abandoned,
}

/// The word that stands for a step in the tables, as in JSON.
fn word<T: Serialize>(step: T) -> String {
    match serde_json::to_value(step) {
        Ok(serde_json::Value::String(word)) => word,
        other => unreachable!("a step is a word, not {other:?}"),
    }
}

fn step_from<T: serde::de::DeserializeOwned>(word: String) -> Result<T> {
    serde_json::from_value(serde_json::Value::String(word)).map_err(|error| unreadable(&error.to_string()))
}

fn unreadable(what: &str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, format!("cannot read {what:?}").into())
}

/// A VM as recorded.
#[derive(Clone, Debug)]
pub struct VmRecord {
    /// How to start it.
    pub spec: VmSpec,
    /// Its QEMU.
    pub pid: u32,
    /// When that process started, in clock ticks since boot.
    pub start_time: u64,
    /// Its QMP socket.
    pub qmp: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The migration it waits for; `None` once this host owns the guest.
    pub incoming: Option<Uuid>,
    /// This host owns the guest and has not set it running yet.
    pub must_run: bool,
    /// The guest is elsewhere, but its post-copy could not be finished.
    pub stranded: bool,
}

/// An outgoing migration as recorded.
#[derive(Clone, Debug)]
pub struct OutRecord {
    /// Its id.
    pub id: Uuid,
    /// The VM.
    pub vm: String,
    /// The destination as it calls itself.
    pub peer: String,
    /// Where its agent is, HOST:PORT.
    pub address: String,
    /// Its agent's fingerprint.
    pub peer_key: Fingerprint,
    /// The guest ran when the migration began.
    pub running: bool,
    /// The last step begun.
    pub step: OutStep,
}

/// Whoever hands a guest over.
#[derive(Clone, Debug)]
pub struct Source {
    /// What it calls itself.
    pub name: String,
    /// Its agent's fingerprint.
    pub key: Fingerprint,
}

/// See the module's text.
pub struct Store {
    connection: Mutex<Connection>,
}

pub(super) type Result<T> = rusqlite::Result<T>;

impl Store {
    /// Opens the journal in this folder, or makes it.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let connection = Connection::open(state_dir.join("agent.db"))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        let version: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        let version = version as usize;
        if version > SCHEMA.len() {
            return Err(unreadable(&format!("a journal of version {version}, made by a newer vmferry")));
        }
        for (version, change) in SCHEMA.iter().enumerate().skip(version) {
            connection.execute_batch(&format!("BEGIN; {change} PRAGMA user_version = {}; COMMIT;", version + 1))?;
        }
        Ok(Self { connection: Mutex::new(connection) })
    }

    pub(super) fn db(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().expect("no holder of this lock panics")
    }

    /// Records a VM, in place of what was recorded under its name.
    pub fn put_vm(&self, vm: &VmRecord) -> Result<()> {
        self.db().execute(
            "INSERT OR REPLACE INTO vms VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            params![
                vm.spec.name,
                serde_json::to_string(&vm.spec).expect("a spec is plain data"),
                vm.pid,
                vm.start_time as i64,
                vm.qmp,
                vm.accelerator,
                vm.incoming.map(|id| id.to_string()),
                vm.must_run,
                vm.stranded,
            ],
        )?;
        Ok(())
    }

    /// Forgets a VM.
    pub fn remove_vm(&self, name: &str) -> Result<()> {
        self.db().execute("DELETE FROM vms WHERE name = ?1", [name])?;
        Ok(())
    }

    /// Every VM on record.
    pub fn vms(&self) -> Result<Vec<VmRecord>> {
        self.db()
            .prepare(
                "SELECT spec, pid, start_time, qmp, accelerator, incoming, must_run, stranded FROM vms ORDER BY name",
            )?
            .query_map([], |row| {
                Ok(VmRecord {
                    spec: serde_json::from_str(&row.get::<_, String>(0)?).map_err(|e| unreadable(&e.to_string()))?,
                    pid: row.get(1)?,
                    start_time: row.get::<_, i64>(2)? as u64,
                    qmp: row.get(3)?,
                    accelerator: row.get(4)?,
                    incoming: row.get::<_, Option<String>>(5)?.as_deref().map(parse_id).transpose()?,
                    must_run: row.get(6)?,
                    stranded: row.get(7)?,
                })
            })?
            .collect()
    }

    /// This host owns the guest of this VM and has yet to set it running.
    pub fn must_run(&self, name: &str) -> Result<bool> {
        let must = self.db().query_row("SELECT must_run FROM vms WHERE name = ?1", [name], |row| row.get(0)).optional();
        Ok(must?.unwrap_or(false))
    }

    /// The guest of this VM was set running.
    pub fn did_run(&self, name: &str) -> Result<()> {
        self.db().execute("UPDATE vms SET must_run = 0 WHERE name = ?1", [name])?;
        Ok(())
    }

    /// The guest of this VM is elsewhere, but its post-copy could not be finished.
    pub fn strand(&self, name: &str) -> Result<()> {
        self.db().execute("UPDATE vms SET stranded = 1 WHERE name = ?1", [name])?;
        Ok(())
    }

    /// Begins an outgoing migration.
    pub fn begin_out(&self, record: &OutRecord) -> Result<()> {
        self.db().execute(
            "INSERT INTO migrations (id, direction, vm, peer, address, peer_key, running, started, step)
             VALUES (?1, 'out', ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                record.id.to_string(),
                record.vm,
                record.peer,
                record.address,
                record.peer_key.to_string(),
                record.running,
                now(),
                word(record.step)
            ],
        )?;
        Ok(())
    }

    /// Writes that an outgoing migration is about to do this step.
    pub fn step_out(&self, id: Uuid, step: OutStep) -> Result<()> {
        self.db().execute("UPDATE migrations SET step = ?2 WHERE id = ?1", [id.to_string(), word(step)])?;
        Ok(())
    }

    /// Ends an outgoing migration.
    pub fn end_out(&self, id: Uuid, step: OutStep, outcome: &str) -> Result<()> {
        assert!(matches!(step, OutStep::Done | OutStep::Abandoned), "a migration ends done or abandoned");
        self.db().execute(
            "UPDATE migrations SET step = ?2, outcome = ?3 WHERE id = ?1",
            [&id.to_string(), &word(step), outcome],
        )?;
        Ok(())
    }

    /// Outgoing migrations that have not ended.
    pub fn unfinished_out(&self) -> Result<Vec<OutRecord>> {
        self.db()
            .prepare(
                "SELECT id, vm, peer, running, step, address, peer_key FROM migrations
                 WHERE direction = 'out' AND outcome IS NULL AND peer_key != ''",
            )?
            .query_map([], |row| {
                Ok(OutRecord {
                    id: parse_id(&row.get::<_, String>(0)?)?,
                    vm: row.get(1)?,
                    peer: row.get(2)?,
                    running: row.get(3)?,
                    step: step_from(row.get(4)?)?,
                    address: row.get(5)?,
                    peer_key: parse_key(&row.get::<_, String>(6)?)?,
                })
            })?
            .collect()
    }

    /// The last outgoing migrations, newest first.
    pub fn last_out(&self, most: u32) -> Result<Vec<MigrationView>> {
        self.db()
            .prepare(
                "SELECT id, vm, peer, started, step, outcome FROM migrations WHERE direction = 'out'
                 ORDER BY started DESC, rowid DESC LIMIT ?1",
            )?
            .query_map([most], migration_view)?
            .collect()
    }

    /// Begins an incoming migration; the source still owns the guest. False when it is known already.
    pub fn begin_in(&self, id: Uuid, vm: &str, source: &Source, running: bool) -> Result<bool> {
        let added = self.db().execute(
            "INSERT OR IGNORE INTO migrations (id, direction, vm, peer, peer_key, running, started, step)
             VALUES (?1, 'in', ?2, ?3, ?4, ?5, ?6, 'prepared')",
            params![id.to_string(), vm, source.name, source.key.to_string(), running, now()],
        )?;
        Ok(added == 1)
    }

    /// From here on this host owns the guest. False when the migration had been abandoned before: then it never will.
    pub fn commit_in(&self, id: Uuid) -> Result<bool> {
        let mut db = self.db();
        let step = db.transaction()?;
        let changed = step.execute(
            "UPDATE migrations SET step = 'committed', outcome = 'committed' WHERE id = ?1 AND step != 'abandoned'",
            [id.to_string()],
        )?;
        step.execute(
            "UPDATE vms SET incoming = NULL, must_run = (SELECT running FROM migrations WHERE id = ?1)
             WHERE incoming = ?1",
            [id.to_string()],
        )?;
        step.commit()?;
        Ok(changed == 1)
    }

    /// This host will never own the guest of this migration. The first reason is kept. False when it was committed
    /// before, or is not known: then nothing is abandoned.
    pub fn abandon_in(&self, id: Uuid, why: &str) -> Result<bool> {
        let changed = self.db().execute(
            "UPDATE migrations SET step = 'abandoned', outcome = coalesce(outcome, ?2)
             WHERE id = ?1 AND direction = 'in' AND step != 'committed'",
            params![id.to_string(), why],
        )?;
        Ok(changed == 1)
    }

    /// The same for a migration that this host may never have heard of, so that it cannot begin any more either.
    pub fn abandon_unheard(&self, id: Uuid, source: &Source, why: &str) -> Result<()> {
        self.db().execute(
            "INSERT OR IGNORE INTO migrations (id, direction, vm, peer, peer_key, running, started, step, outcome)
             VALUES (?1, 'in', '', ?2, ?3, 0, ?4, 'abandoned', ?5)",
            params![id.to_string(), source.name, source.key.to_string(), now(), why],
        )?;
        Ok(())
    }

    /// Where an incoming migration stands, and why.
    pub fn step_in(&self, id: Uuid) -> Result<Option<(InStep, Option<String>)>> {
        self.db()
            .query_row(
                "SELECT step, outcome FROM migrations WHERE id = ?1 AND direction = 'in'",
                [id.to_string()],
                |row| Ok((step_from(row.get(0)?)?, row.get(1)?)),
            )
            .optional()
    }

    /// The source of an incoming migration; `None` when this host never heard of it.
    pub fn source_of(&self, id: Uuid) -> Result<Option<Source>> {
        self.db()
            .query_row(
                "SELECT peer, peer_key FROM migrations WHERE id = ?1 AND direction = 'in' AND peer_key != ''",
                [id.to_string()],
                |row| Ok(Source { name: row.get(0)?, key: parse_key(&row.get::<_, String>(1)?)? }),
            )
            .optional()
    }

    /// The last migration that was to bring a VM of this name here.
    pub fn newest_in(&self, vm: &str) -> Result<Option<Uuid>> {
        self.db()
            .query_row(
                "SELECT id FROM migrations WHERE direction = 'in' AND vm = ?1 ORDER BY rowid DESC LIMIT 1",
                [vm],
                |row| parse_id(&row.get::<_, String>(0)?),
            )
            .optional()
    }

    /// Whoever has this key brought a guest here, or is about to, in the last days.
    pub fn is_recent_source(&self, key: Fingerprint) -> Result<bool> {
        self.db().query_row(
            "SELECT EXISTS (SELECT 1 FROM migrations
             WHERE direction = 'in' AND peer_key = ?1 AND step != 'abandoned' AND started > ?2)",
            params![key.to_string(), now() - RECENT],
            |row| row.get(0),
        )
    }

    /// The VM of this migration.
    pub fn vm_of(&self, id: Uuid) -> Result<String> {
        self.db().query_row("SELECT vm FROM migrations WHERE id = ?1", [id.to_string()], |row| row.get(0))
    }
}

fn migration_view(row: &Row<'_>) -> Result<MigrationView> {
    Ok(MigrationView {
        id: parse_id(&row.get::<_, String>(0)?)?,
        vm: row.get(1)?,
        to: row.get(2)?,
        started: row.get::<_, i64>(3)? as u64,
        step: row.get(4)?,
        outcome: row.get(5)?,
    })
}

pub(super) fn parse_key(text: &str) -> Result<Fingerprint> {
    text.parse().map_err(|_| unreadable(text))
}

fn parse_id(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| unreadable(text))
}

pub(super) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        Source { name: "alpha".into(), key: Fingerprint::of(b"alpha") }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    fn out(id: Uuid) -> OutRecord {
        OutRecord {
            id,
            vm: "web1".into(),
            peer: "beta".into(),
            address: "192.0.2.2:7420".into(),
            peer_key: Fingerprint::of(b"beta"),
            running: true,
            step: OutStep::Prepare,
        }
    }

    #[test]
    fn a_step_is_found_again_by_the_next_agent() {
        let (dir, store) = store();
        let id = Uuid::new_v4();
        store.begin_out(&out(id)).unwrap();
        store.step_out(id, OutStep::Commit).unwrap();
        drop(store);
        let found = Store::open(dir.path()).unwrap().unfinished_out().unwrap();
        assert_eq!((found.len(), found[0].step, found[0].running), (1, OutStep::Commit, true));
    }

    #[test]
    fn an_ended_migration_is_not_unfinished() {
        let (_dir, store) = store();
        let id = Uuid::new_v4();
        store.begin_out(&out(id)).unwrap();
        store.end_out(id, OutStep::Abandoned, "cancelled").unwrap();
        assert!(store.unfinished_out().unwrap().is_empty());
        assert_eq!(store.last_out(5).unwrap()[0].outcome.as_deref(), Some("cancelled"));
    }

    #[test]
    fn what_was_abandoned_is_never_committed() {
        let (_dir, store) = store();
        let id = Uuid::new_v4();
        store.begin_in(id, "web1", &source(), true).unwrap();
        assert!(store.abandon_in(id, "lease ran out").unwrap());
        assert!(!store.commit_in(id).unwrap());
        assert_eq!(store.step_in(id).unwrap().unwrap().0, InStep::Abandoned);
    }

    #[test]
    fn a_guest_that_ran_at_the_source_is_set_running_once_and_a_paused_one_never() {
        let (_dir, store) = store();
        for (running, name) in [(true, "web1"), (false, "web2")] {
            let id = Uuid::new_v4();
            let spec = VmSpec {
                name: name.into(),
                argv: vec![],
                cwd: "/".into(),
                shared_ram: false,
                adopted: false,
                measuring: false,
            };
            let record = VmRecord {
                spec,
                pid: 1,
                start_time: 1,
                qmp: String::new(),
                accelerator: "tcg".into(),
                incoming: Some(id),
                must_run: false,
                stranded: false,
            };
            store.put_vm(&record).unwrap();
            store.begin_in(id, name, &source(), running).unwrap();
            assert!(!store.must_run(name).unwrap());
            assert!(store.commit_in(id).unwrap());
            assert_eq!(store.must_run(name).unwrap(), running);
            store.did_run(name).unwrap();
            assert!(!store.must_run(name).unwrap());
        }
    }

    #[test]
    fn what_was_committed_is_never_abandoned() {
        let (_dir, store) = store();
        let id = Uuid::new_v4();
        store.begin_in(id, "web1", &source(), true).unwrap();
        assert!(store.commit_in(id).unwrap());
        assert!(!store.abandon_in(id, "late").unwrap());
        assert_eq!(store.step_in(id).unwrap().unwrap().0, InStep::Committed);
    }

    #[test]
    fn a_commit_that_arrives_after_an_unknown_migration_was_abandoned_is_refused() {
        let (_dir, store) = store();
        let id = Uuid::new_v4();
        store.abandon_unheard(id, &source(), "never heard of it").unwrap();
        assert!(!store.begin_in(id, "web1", &source(), true).unwrap());
        assert!(!store.commit_in(id).unwrap());
    }

    #[test]
    fn the_source_of_an_earlier_migration_is_told_from_that_of_the_last_one() {
        let (_dir, store) = store();
        let (first, last) = (Uuid::new_v4(), Uuid::new_v4());
        store.begin_in(first, "web1", &source(), true).unwrap();
        store.commit_in(first).unwrap();
        assert_eq!(store.newest_in("web1").unwrap(), Some(first));
        store.begin_in(last, "web1", &source(), true).unwrap();
        assert_eq!(store.newest_in("web1").unwrap(), Some(last));
        assert!(store.is_recent_source(source().key).unwrap());
        assert!(!store.is_recent_source(Fingerprint::of(b"somebody")).unwrap());
    }

    #[test]
    fn a_journal_of_a_newer_version_is_refused() {
        let (dir, store) = store();
        store.db().pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        let Err(error) = Store::open(dir.path()) else { panic!("opened") };
        assert!(error.to_string().contains("newer vmferry"), "{error}");
    }
}
