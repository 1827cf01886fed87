//! How far predictions of migrations were off, by destination, engine and figure.

use std::collections::BTreeMap;

use rusqlite::{Connection, params};
use vmferry_link::Fingerprint;
use vmferry_policy::Lesson;

use super::{Journal, Result, now};

/// What became of one figure of a prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Taught {
    /// Its name in the table.
    pub figure: &'static str,
    /// What was predicted, before any correction.
    pub predicted: f64,
    /// What it was.
    pub outcome: f64,
}

impl Journal {
    /// What was learnt of each figure in migrations to this host with this engine.
    pub async fn lessons(&self, peer: Fingerprint, engine: &str) -> Result<BTreeMap<String, Lesson>> {
        let (peer, engine) = (peer.to_string(), engine.to_owned());
        self.call(move |db| read(db, &peer, &engine)).await
    }

    /// A migration to this host with this engine came out so.
    pub async fn teach(&self, peer: Fingerprint, engine: &str, outcomes: Vec<Taught>) -> Result<()> {
        let (peer, engine) = (peer.to_string(), engine.to_owned());
        self.call(move |db| {
            let step = db.transaction()?;
            let mut known = read(&step, &peer, &engine)?;
            for Taught { figure, predicted, outcome } in outcomes {
                let lesson = known.entry(figure.into()).or_default();
                lesson.learn(predicted, outcome);
                step.execute(
                    "INSERT OR REPLACE INTO lessons (peer_key, engine, figure, count, mean, variance, since)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                    params![peer, engine, figure, lesson.count, lesson.mean, lesson.variance, now()],
                )?;
            }
            step.commit()
        })
        .await
    }
}

fn read(db: &Connection, peer: &str, engine: &str) -> Result<BTreeMap<String, Lesson>> {
    let mut select =
        db.prepare("SELECT figure, count, mean, variance FROM lessons WHERE peer_key = ?1 AND engine = ?2")?;
    let rows = select.query_map(params![peer, engine], |row| {
        Ok((row.get(0)?, Lesson { count: row.get(1)?, mean: row.get(2)?, variance: row.get(3)? }))
    })?;
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_learnt_of_one_host_and_engine_is_kept_and_is_not_taken_for_anothers() {
        let dir = tempfile::tempdir().unwrap();
        let (beta, gamma) = (Fingerprint::of(b"beta"), Fingerprint::of(b"gamma"));
        {
            let journal = Journal::open(dir.path()).unwrap().journal;
            for _ in 0..20 {
                let taught = Taught { figure: "copy", predicted: 10.0, outcome: 15.0 };
                journal.teach(beta, "external", vec![taught]).await.unwrap();
            }
        }
        let journal = Journal::open(dir.path()).unwrap().journal;
        let learnt = journal.lessons(beta, "external").await.unwrap();
        assert_eq!(learnt["copy"].count, 20);
        assert!((learnt["copy"].mean.exp() - 1.5).abs() < 0.03, "{learnt:?}");
        for (peer, engine) in [(gamma, "external"), (beta, "qemu")] {
            assert!(journal.lessons(peer, engine).await.unwrap().is_empty());
        }
    }
}
