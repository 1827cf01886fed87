//! Migrations to this host. What stands here decides who owns the guest; see `vmferry_custody`.

use rusqlite::{OptionalExtension, params};
use uuid::Uuid;
use vmferry_custody::InStep;
use vmferry_link::Fingerprint;

use super::{Journal, Result, now, parse_key, unreadable};

/// How long the source of a migration may have something to say of it, in seconds.
const RECENT: i64 = 7 * 24 * 3600;

/// Whoever hands a guest over.
#[derive(Clone, Debug)]
pub struct Source {
    /// What it calls itself.
    pub name: String,
    /// Its agent's fingerprint.
    pub key: Fingerprint,
}

/// An incoming migration as recorded.
#[derive(Clone, Debug)]
pub struct InRow {
    /// Where it stands.
    pub step: InStep,
    /// Why, if it was abandoned.
    pub why: Option<String>,
    /// Who hands the guest over.
    pub source: Source,
    /// The VM's name; empty for one that was abandoned before it was heard of.
    pub vm: String,
    /// Its source has nothing more to say of it.
    pub settled: bool,
}

impl Journal {
    /// Writes where an incoming migration stands; the first time begins it. False when what is there already does not
    /// permit it: what was abandoned is never committed, and what was committed is abandoned only by one who says that it
    /// was. The first reason for abandoning is kept.
    pub async fn write_in(
        &self,
        id: Uuid,
        vm: &str,
        source: &Source,
        step: InStep,
        why: &str,
        was_committed: bool,
    ) -> Result<bool> {
        let (vm, source, why) = (vm.to_owned(), source.clone(), why.to_owned());
        self.call(move |db| {
            let key = source.key.to_string();
            let (word, must_run, outcome, from) = match step {
                InStep::Prepared => ("prepared", false, None, "''"),
                InStep::Committed { must_run } => ("committed", must_run, None, ""),
                InStep::Abandoned if was_committed => {
                    ("abandoned", false, Some(why.as_str()), "'prepared', 'committed'")
                }
                InStep::Abandoned => ("abandoned", false, Some(why.as_str()), "'prepared'"),
            };
            if matches!(step, InStep::Committed { .. }) {
                let written = db.execute(
                    "UPDATE migrations SET step = ?2, must_run = ?3, outcome = ?2
                     WHERE id = ?1 AND direction = 'in' AND step IN ('prepared', 'committed')",
                    params![id.to_string(), word, must_run],
                )?;
                return Ok(written == 1);
            }
            let written = db.execute(
                &format!(
                    "INSERT INTO migrations
                     (id, direction, vm, peer, peer_key, running, started, step, must_run, outcome)
                     VALUES (?1, 'in', ?2, ?3, ?4, 0, ?5, ?6, ?7, ?8)
                     ON CONFLICT (id) DO UPDATE SET step = ?6, must_run = ?7, outcome = ?8
                     WHERE direction = 'in' AND step IN ({from})"
                ),
                params![id.to_string(), vm, source.name, key, now(), word, must_run, outcome],
            )?;
            Ok(written == 1)
        })
        .await
    }

    /// An incoming migration; none when this host never heard of it.
    pub async fn row_in(&self, id: Uuid) -> Result<Option<InRow>> {
        self.call(move |db| {
            let found = db
                .query_row(
                    "SELECT step, must_run, outcome, peer, peer_key, vm, settled FROM migrations
                     WHERE id = ?1 AND direction = 'in' AND peer_key != ''",
                    [id.to_string()],
                    |row| {
                        let step = match row.get::<_, String>(0)?.as_str() {
                            "prepared" => InStep::Prepared,
                            "committed" => InStep::Committed { must_run: row.get(1)? },
                            "abandoned" => InStep::Abandoned,
                            other => return Err(unreadable(other)),
                        };
                        let source = Source { name: row.get(3)?, key: parse_key(&row.get::<_, String>(4)?)? };
                        Ok(InRow { step, why: row.get(2)?, source, vm: row.get(5)?, settled: row.get(6)? })
                    },
                )
                .optional()?;
            Ok(found.map(|it| InRow { why: it.why.filter(|_| it.step == InStep::Abandoned), ..it }))
        })
        .await
    }

    /// How many migrations of this host were only ever heard of as abandoned.
    pub async fn unheard_of(&self, key: Fingerprint) -> Result<u32> {
        self.call(move |db| {
            db.query_row(
                "SELECT count(*) FROM migrations WHERE direction = 'in' AND peer_key = ?1 AND vm = ''",
                [key.to_string()],
                |row| row.get(0),
            )
        })
        .await
    }

    /// The source of this migration has nothing more to say of it.
    pub async fn settle_in(&self, id: Uuid) -> Result<()> {
        self.call(move |db| {
            db.execute("UPDATE migrations SET settled = 1 WHERE id = ?1 AND direction = 'in'", [id.to_string()])
                .map(drop)
        })
        .await
    }

    /// Whoever has this key brought a guest here, or is about to, in the last days.
    pub async fn is_recent_source(&self, key: Fingerprint) -> Result<bool> {
        self.call(move |db| {
            db.query_row(
                "SELECT EXISTS (SELECT 1 FROM migrations
                 WHERE direction = 'in' AND peer_key = ?1 AND step != 'abandoned' AND started > ?2)",
                params![key.to_string(), now() - RECENT],
                |row| row.get(0),
            )
        })
        .await
    }
}
