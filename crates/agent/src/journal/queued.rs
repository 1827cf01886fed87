//! Migrations that wait for their turn. One of them begins, or ends as one that did not; never is it forgotten.

use rusqlite::{Connection, Row as SqlRow, params};
use uuid::Uuid;
use vmferry_api::MigrateRequest;

use super::vms::instance;
use super::{Instance, Journal, Result, parse_id, unreadable};

/// One that waits.
#[derive(Clone, Debug)]
pub struct QueuedRecord {
    /// Its id, and the migration's.
    pub id: Uuid,
    /// The VM's name.
    pub vm: String,
    /// Which VM.
    pub instance: Instance,
    /// What was asked for.
    pub request: MigrateRequest,
    /// Those that were asked for together.
    pub batch: Option<Uuid>,
    /// When, in seconds since 1970.
    pub since: u64,
}

impl Journal {
    /// They wait from now on, behind those that do: all of them, or none.
    pub async fn put_queued(&self, records: Vec<QueuedRecord>) -> Result<()> {
        self.call(move |db| {
            let step = db.transaction()?;
            records.iter().try_for_each(|record| put(&step, record))?;
            step.commit()
        })
        .await
    }

    /// It waits no more: it has begun, or did not, with this outcome, and is listed as one that was abandoned.
    pub async fn end_queued(&self, id: Uuid, outcome: Option<String>) -> Result<()> {
        self.call(move |db| {
            let step = db.transaction()?;
            let id = id.to_string();
            if let Some(outcome) = outcome {
                step.execute(
                    "INSERT OR IGNORE INTO migrations
                     (id, direction, vm, boot, pid, start_time, peer, address, peer_key, running, started, step, outcome)
                     SELECT id, 'out', vm, boot, pid, start_time, json_extract(request, '$.to'), '', '', 1, since,
                     'abandoned', ?2 FROM queue WHERE id = ?1",
                    params![id, outcome],
                )?;
            }
            step.execute("DELETE FROM queue WHERE id = ?1", [&id])?;
            step.commit()
        })
        .await
    }

    /// Those that wait, in their order. One that has begun when the agent ended does not.
    pub async fn queued(&self) -> Result<Vec<QueuedRecord>> {
        self.call(|db| {
            db.execute("DELETE FROM queue WHERE id IN (SELECT id FROM migrations UNION SELECT id FROM carries)", [])?;
            let mut select =
                db.prepare("SELECT id, vm, boot, pid, start_time, request, batch, since FROM queue ORDER BY place")?;
            let rows = select.query_map([], |row| Ok((row.get::<_, String>("vm")?, read(row))))?;
            let mut found = Vec::new();
            for row in rows {
                match row? {
                    (_, Ok(record)) => found.push(record),
                    (vm, Err(error)) => tracing::error!(vm, %error, "what it waited for cannot be read: not begun"),
                }
            }
            Ok(found)
        })
        .await
    }
}

fn put(db: &Connection, it: &QueuedRecord) -> Result<()> {
    let request = serde_json::to_string(&it.request).map_err(|error| unreadable(&error.to_string()))?;
    let insert = "INSERT INTO queue (id, vm, boot, pid, start_time, request, batch, since)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    db.execute(
        insert,
        params![
            it.id.to_string(),
            it.vm,
            it.instance.boot,
            it.instance.pid,
            it.instance.start_time as i64,
            request,
            it.batch.map(|batch| batch.to_string()),
            it.since as i64,
        ],
    )
    .map(drop)
}

fn read(row: &SqlRow<'_>) -> Result<QueuedRecord> {
    let request: String = row.get("request")?;
    let batch: Option<String> = row.get("batch")?;
    Ok(QueuedRecord {
        id: parse_id(&row.get::<_, String>("id")?)?,
        vm: row.get("vm")?,
        instance: instance(row)?,
        request: serde_json::from_str(&request).map_err(|error| unreadable(&error.to_string()))?,
        batch: batch.as_deref().map(parse_id).transpose()?,
        since: row.get::<_, i64>("since")? as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(vm: &str) -> QueuedRecord {
        let request = serde_json::json!({
            "to": "beta", "downtime_ms": 300, "max_time_ms": null, "bandwidth": 5_000_000, "post_copy": true
        });
        QueuedRecord {
            id: Uuid::new_v4(),
            vm: vm.into(),
            instance: Instance::now(7, 8),
            request: serde_json::from_value(request).unwrap(),
            batch: (vm != "a").then(Uuid::new_v4),
            since: 5,
        }
    }

    #[tokio::test]
    async fn what_waits_is_there_for_the_next_agent_in_its_order_and_what_did_not_begin_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let records = ["c", "a", "b"].map(record);
        {
            let journal = Journal::open(dir.path()).unwrap().journal;
            journal.put_queued(records.to_vec()).await.unwrap();
            // One of these is there already: none of them comes.
            journal.put_queued(vec![record("d"), records[1].clone()]).await.unwrap_err();
            journal.end_queued(records[2].id, None).await.unwrap();
        }
        let journal = Journal::open(dir.path()).unwrap().journal;
        let found = journal.queued().await.unwrap();
        assert_eq!(found.iter().map(|it| it.vm.as_str()).collect::<Vec<_>>(), ["c", "a"]);
        assert_eq!(
            (found[0].id, found[0].batch, &found[0].instance),
            (records[0].id, records[0].batch, &records[0].instance)
        );
        assert_eq!((found[1].request.bandwidth, found[1].since, found[1].batch), (Some(5_000_000), 5, None));
        journal.end_queued(records[0].id, Some("not begun: cancelled".into())).await.unwrap();
        assert_eq!(journal.queued().await.unwrap().len(), 1);
        let listed = journal.last_out(10).await.unwrap();
        assert_eq!((listed.len(), listed[0].vm.as_str(), listed[0].to.as_str()), (1, "c", "beta"));
        assert_eq!(
            (listed[0].step.as_str(), listed[0].outcome.as_deref()),
            ("abandoned", Some("not begun: cancelled"))
        );
        assert!(journal.open_out().await.unwrap().is_empty());
    }
}
