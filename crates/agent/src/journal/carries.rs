//! Migrations of libvirt's domains that this host's agent has begun. libvirt decides who owns the guest: what is written
//! here is that one was begun, so that an agent that is started again finds out from both libvirts what came of it.

use rusqlite::{Row as SqlRow, params};
use uuid::Uuid;
use vmferry_link::Fingerprint;

use super::{Journal, Result, now, parse_id, parse_key};

/// One that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CarryRecord {
    /// The migration.
    pub id: Uuid,
    /// The domain's name.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// The destination as it calls itself.
    pub peer: String,
    /// Where its agent is, HOST:PORT.
    pub address: String,
    /// Its agent's fingerprint.
    pub peer_key: Fingerprint,
}

/// How one ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CarryEnd {
    /// The domain is at its destination.
    Done,
    /// It is here.
    Abandoned,
}

impl CarryEnd {
    /// As in the table and on the screen.
    fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Abandoned => "abandoned",
        }
    }
}

impl Journal {
    /// One begins.
    pub async fn begin_carry(&self, record: &CarryRecord) -> Result<()> {
        let it = record.clone();
        self.call(move |db| {
            db.execute(
                "INSERT INTO carries (id, vm, uuid, peer, address, peer_key, started, step)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'copy-ram')",
                params![
                    it.id.to_string(),
                    it.vm,
                    it.uuid.to_string(),
                    it.peer,
                    it.address,
                    it.peer_key.to_string(),
                    now()
                ],
            )
            .map(drop)
        })
        .await
    }

    /// It is in post-copy.
    pub async fn carry_is_in_post_copy(&self, id: Uuid) -> Result<()> {
        self.call(move |db| {
            let change = "UPDATE carries SET step = 'post-copy' WHERE id = ?1 AND outcome IS NULL";
            db.execute(change, [id.to_string()]).map(drop)
        })
        .await
    }

    /// It has ended so, in words, too.
    pub async fn end_carry(&self, id: Uuid, end: CarryEnd, outcome: &str) -> Result<()> {
        let outcome = outcome.to_owned();
        self.call(move |db| {
            let change = "UPDATE carries SET step = ?2, outcome = ?3 WHERE id = ?1";
            db.execute(change, params![id.to_string(), end.word(), outcome]).map(drop)
        })
        .await
    }

    /// It did not begin, and may be tried again.
    pub async fn forget_carry(&self, id: Uuid) -> Result<()> {
        self.call(move |db| db.execute("DELETE FROM carries WHERE id = ?1", [id.to_string()]).map(drop)).await
    }

    /// Those that have not ended.
    pub async fn open_carries(&self) -> Result<Vec<CarryRecord>> {
        self.call(|db| {
            let mut select =
                db.prepare("SELECT id, vm, uuid, peer, address, peer_key FROM carries WHERE outcome IS NULL")?;
            let rows = select.query_map([], open)?;
            rows.collect()
        })
        .await
    }
}

fn open(row: &SqlRow<'_>) -> Result<CarryRecord> {
    Ok(CarryRecord {
        id: parse_id(&row.get::<_, String>(0)?)?,
        vm: row.get(1)?,
        uuid: parse_id(&row.get::<_, String>(2)?)?,
        peer: row.get(3)?,
        address: row.get(4)?,
        peer_key: parse_key(&row.get::<_, String>(5)?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_begun_is_open_until_its_end_is_known_and_listed_beside_others() {
        let dir = tempfile::tempdir().unwrap();
        let record = CarryRecord {
            id: Uuid::new_v4(),
            vm: "web1".into(),
            uuid: Uuid::new_v4(),
            peer: "beta".into(),
            address: "192.0.2.2:7420".into(),
            peer_key: Fingerprint::of(b"beta"),
        };
        Journal::open(dir.path()).unwrap().journal.begin_carry(&record).await.unwrap();
        let journal = Journal::open(dir.path()).unwrap().journal;
        assert_eq!(journal.open_carries().await.unwrap(), std::slice::from_ref(&record));
        journal.carry_is_in_post_copy(record.id).await.unwrap();
        let listed = journal.last_out(5).await.unwrap();
        assert_eq!((listed[0].step.as_str(), listed[0].vm.as_str(), &listed[0].outcome), ("post-copy", "web1", &None));
        journal.end_carry(record.id, CarryEnd::Done, "runs there").await.unwrap();
        assert!(journal.open_carries().await.unwrap().is_empty());
        let listed = journal.last_out(5).await.unwrap();
        assert_eq!((listed[0].step.as_str(), listed[0].outcome.as_deref()), ("done", Some("runs there")));
        let again = CarryRecord { id: Uuid::new_v4(), ..record };
        for _ in 0..2 {
            journal.begin_carry(&again).await.unwrap();
            journal.forget_carry(again.id).await.unwrap();
        }
        assert!(journal.open_carries().await.unwrap().is_empty());
    }
}
