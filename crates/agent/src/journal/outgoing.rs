//! Migrations away from this host; see `vmferry_custody` for what their steps mean.

use rusqlite::{Row as SqlRow, params};
use uuid::Uuid;
use vmferry_api::MigrationView;
use vmferry_custody::source::{OutEnd, OutStep, Row};
use vmferry_link::Fingerprint;

use super::vms::instance;
use super::{Instance, Journal, Result, now, parse_id, parse_key, unreadable};

/// An outgoing migration that is open.
#[derive(Clone, Debug)]
pub struct OutRecord {
    /// Its id.
    pub id: Uuid,
    /// The VM's name.
    pub vm: String,
    /// The VM.
    pub instance: Instance,
    /// The destination as it calls itself.
    pub peer: String,
    /// Where its agent is, HOST:PORT.
    pub address: String,
    /// Its agent's fingerprint.
    pub peer_key: Fingerprint,
    /// The guest is to run.
    pub running: bool,
    /// The last step begun.
    pub step: OutStep,
}

/// A guest that was kept here, whose destination has not let go yet.
#[derive(Clone, Debug)]
pub struct Fence {
    /// The migration.
    pub id: Uuid,
    /// The VM's name.
    pub vm: String,
    /// The destination as it calls itself.
    pub peer: String,
    /// Its agent's fingerprint.
    pub peer_key: Fingerprint,
    /// Where its agent was, HOST:PORT.
    pub address: String,
}

/// As in the tables and on the screen.
fn in_a_word(row: Row) -> &'static str {
    match row {
        Row::Open(OutStep::CopyRam) => "copy-ram",
        Row::Open(OutStep::Commit) => "commit",
        Row::Open(OutStep::KeptHere) => "kept-here",
        Row::Open(OutStep::PostCopy) => "post-copy",
        Row::Open(OutStep::Retire) => "retire",
        Row::Open(OutStep::Stranded) => "stranded",
        Row::Ended(OutEnd::Done) => "done",
        Row::Ended(OutEnd::Abandoned) => "abandoned",
    }
}

fn open_step(word: &str) -> Result<OutStep> {
    Ok(match word {
        // The first is an earlier version's.
        "prepare" | "copy-ram" => OutStep::CopyRam,
        "commit" => OutStep::Commit,
        "kept-here" => OutStep::KeptHere,
        "post-copy" => OutStep::PostCopy,
        "retire" => OutStep::Retire,
        "stranded" => OutStep::Stranded,
        other => return Err(unreadable(other)),
    })
}

impl Journal {
    /// Writes a step of an outgoing migration: the first one begins it. An end has an outcome, in words. Fails when
    /// another migration of the same instance is open.
    pub async fn write_out(&self, record: &OutRecord, row: Row, outcome: &str) -> Result<()> {
        let (it, outcome) = (record.clone(), outcome.to_owned());
        self.call(move |db| {
            let step = db.transaction()?;
            let outcome = matches!(row, Row::Ended(_)).then_some(outcome);
            step.execute(
                "INSERT INTO migrations
                 (id, direction, vm, boot, pid, start_time, peer, address, peer_key, running, started, step, outcome)
                 VALUES (?1, 'out', ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
                 ON CONFLICT (id) DO UPDATE SET step = ?11, outcome = ?12, running = ?9",
                params![
                    it.id.to_string(),
                    it.vm,
                    it.instance.boot,
                    it.instance.pid,
                    it.instance.start_time as i64,
                    it.peer,
                    it.address,
                    it.peer_key.to_string(),
                    it.running,
                    now(),
                    in_a_word(row),
                    outcome,
                ],
            )?;
            if row == Row::Open(OutStep::KeptHere) {
                step.execute(
                    "INSERT OR REPLACE INTO fences VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    params![it.id.to_string(), it.vm, it.peer, it.peer_key.to_string(), it.address, now()],
                )?;
            }
            step.commit()
        })
        .await
    }

    /// The guest of an open migration is to run, or to stay paused, wherever it ends up here. Its step stays as it is.
    pub async fn set_running(&self, id: Uuid, running: bool) -> Result<()> {
        self.call(move |db| {
            db.execute(
                "UPDATE migrations SET running = ?2 WHERE id = ?1 AND direction = 'out' AND outcome IS NULL",
                params![id.to_string(), running],
            )
            .map(drop)
        })
        .await
    }

    /// Outgoing migrations that have not ended.
    pub async fn open_out(&self) -> Result<Vec<OutRecord>> {
        self.call(|db| {
            let mut select = db.prepare(
                "SELECT id, vm, boot, pid, start_time, peer, running, step, address, peer_key FROM migrations
                 WHERE direction = 'out' AND outcome IS NULL",
            )?;
            let rows = select.query_map([], |row| Ok((row.get::<_, String>("vm")?, open(row))))?;
            let mut found = Vec::new();
            for row in rows {
                match row? {
                    (_, Ok(record)) => found.push(record),
                    (vm, Err(error)) => tracing::error!(vm, %error, "its open migration cannot be read: left alone"),
                }
            }
            Ok(found)
        })
        .await
    }

    /// How an outgoing migration to this destination stands, in the table's word.
    pub async fn word_of_out(&self, id: Uuid, peer: Fingerprint) -> Result<Option<String>> {
        self.call(move |db| {
            let found = db.query_row(
                "SELECT step FROM migrations WHERE id = ?1 AND direction = 'out' AND peer_key = ?2",
                params![id.to_string(), peer.to_string()],
                |row| row.get(0),
            );
            rusqlite::OptionalExtension::optional(found)
        })
        .await
    }

    /// The last outgoing migrations, newest first.
    pub async fn last_out(&self, most: u32) -> Result<Vec<MigrationView>> {
        self.call(move |db| {
            let mut select = db.prepare(
                "SELECT id, vm, peer, started, step, outcome, rowid FROM migrations WHERE direction = 'out'
                 UNION ALL SELECT id, vm, peer, started, step, outcome, rowid FROM carries
                 ORDER BY started DESC, rowid DESC LIMIT ?1",
            )?;
            let rows = select.query_map([most], view)?;
            rows.collect()
        })
        .await
    }

    /// Guests that were kept here, whose destinations have not let go.
    pub async fn fences(&self) -> Result<Vec<Fence>> {
        self.call(|db| {
            let mut select = db.prepare("SELECT id, vm, peer, peer_key, address FROM fences")?;
            let rows = select.query_map([], |row| {
                Ok(Fence {
                    id: parse_id(&row.get::<_, String>(0)?)?,
                    vm: row.get(1)?,
                    peer: row.get(2)?,
                    peer_key: parse_key(&row.get::<_, String>(3)?)?,
                    address: row.get(4)?,
                })
            })?;
            rows.collect()
        })
        .await
    }

    /// The destination of this migration has let go.
    pub async fn drop_fence(&self, id: Uuid) -> Result<()> {
        self.call(move |db| db.execute("DELETE FROM fences WHERE id = ?1", [id.to_string()]).map(drop)).await
    }
}

fn open(row: &SqlRow<'_>) -> Result<OutRecord> {
    Ok(OutRecord {
        id: parse_id(&row.get::<_, String>("id")?)?,
        vm: row.get("vm")?,
        instance: instance(row)?,
        peer: row.get("peer")?,
        running: row.get("running")?,
        step: open_step(&row.get::<_, String>("step")?)?,
        address: row.get("address")?,
        peer_key: parse_key(&row.get::<_, String>("peer_key")?)?,
    })
}

fn view(row: &SqlRow<'_>) -> Result<MigrationView> {
    Ok(MigrationView {
        id: parse_id(&row.get::<_, String>(0)?)?,
        vm: row.get(1)?,
        to: row.get(2)?,
        started: row.get::<_, i64>(3)? as u64,
        step: row.get(4)?,
        outcome: row.get(5)?,
    })
}
