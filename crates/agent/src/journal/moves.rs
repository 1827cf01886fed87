//! VMs that do not run and move to another host, or come from one. A VM is never on record as one that can be started on
//! both: here it goes from one table to the other in one transaction.

use std::path::{Path, PathBuf};

use rusqlite::{OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmferry_api::VmSpec;
use vmferry_link::Fingerprint;

use super::vms::{instance, put};
use super::{Instance, Journal, Result, Source, VmRecord, now, parse_id, parse_key, unreadable};

/// A VM that was given to another host.
#[derive(Clone, Debug)]
pub struct MoveOut {
    /// Of the move.
    pub id: Uuid,
    /// The VM's name.
    pub vm: String,
    /// Which VM.
    pub instance: Instance,
    /// The other host as it calls itself.
    pub peer: String,
    /// Its agent's fingerprint.
    pub peer_key: Fingerprint,
    /// Where its agent is, HOST:PORT.
    pub address: String,
    /// The disks that it leaves here.
    pub disks: Vec<PathBuf>,
    /// The other host has it.
    pub done: bool,
}

/// One that comes from another host.
#[derive(Clone, Debug)]
pub struct MoveIn {
    /// Of the move.
    pub id: Uuid,
    /// From where.
    pub source: Source,
    /// What comes.
    pub coming: Coming,
    /// It is this host's.
    pub taken: bool,
}

impl MoveIn {
    /// As it is on record once it is this host's, where it has this folder.
    pub fn record(&self, dir: &Path) -> VmRecord {
        VmRecord {
            spec: self.coming.spec.clone(),
            instance: Instance::now(0, 0),
            qmp: dir.join("qmp.sock").to_string_lossy().into_owned(),
            accelerator: self.coming.accelerator.clone(),
            incoming: None,
            autostart: self.coming.autostart,
            ended: Some(format!("it was moved here from {}, and not started since", self.source.name)),
            changed: None,
        }
    }
}

/// What is known of a VM that comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coming {
    /// How it is started.
    pub spec: VmSpec,
    /// It is started when the host is.
    pub autostart: bool,
    /// What it ran with last: `kvm` or `tcg`.
    pub accelerator: String,
    /// The disks that are copied for it.
    pub disks: Vec<ComingDisk>,
}

/// One of its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComingDisk {
    /// Where it is to be.
    pub path: PathBuf,
    /// What it is a copy of, as that was when the copy began.
    pub of: Written,
    /// The files that were made for it: the last one is what is copied to, or was.
    pub made: Vec<FileId>,
}

/// When an image was last written, as far as that can be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Written {
    /// In bytes.
    pub size: u64,
    /// In seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanoseconds: i64,
}

/// Tells a file from every other that has its name at another time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// When it was made, in nanoseconds since 1970, where the file system tells: numbers are given again.
    pub born: Option<u64>,
}

const OUT: &str = "id, vm, boot, pid, start_time, peer, peer_key, address, disks, done";
const IN: &str = "id, peer, peer_key, coming, taken";

impl Journal {
    /// A VM is given to another host: from now on it is not this host's to start.
    pub async fn give_vm(&self, it: &MoveOut) -> Result<()> {
        let it = it.clone();
        self.call(move |db| {
            let disks = serde_json::to_string(&it.disks).expect("paths are plain data");
            db.execute(
                &format!("INSERT INTO moves_out ({OUT}, since) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 0, ?10)"),
                params![
                    it.id.to_string(),
                    it.vm,
                    it.instance.boot,
                    it.instance.pid,
                    it.instance.start_time as i64,
                    it.peer,
                    it.peer_key.to_string(),
                    it.address,
                    disks,
                    now(),
                ],
            )
            .map(drop)
        })
        .await
    }

    /// The other host has it: it is forgotten here.
    pub async fn vm_is_there(&self, it: &MoveOut) -> Result<()> {
        let it = it.clone();
        self.call(move |db| {
            let both = db.transaction()?;
            both.execute("UPDATE moves_out SET done = 1 WHERE id = ?1", [it.id.to_string()])?;
            both.execute(
                "DELETE FROM vms WHERE name = ?1 AND pid = ?2 AND start_time = ?3",
                params![it.vm, it.instance.pid, it.instance.start_time as i64],
            )?;
            both.commit()
        })
        .await
    }

    /// The other host never had it: it is this host's again.
    pub async fn vm_is_back(&self, id: Uuid) -> Result<()> {
        self.call(move |db| db.execute("DELETE FROM moves_out WHERE id = ?1", [id.to_string()]).map(drop)).await
    }

    /// Those that were given away, of which the other host has not said that it has them.
    pub async fn moves_out(&self) -> Result<Vec<MoveOut>> {
        self.call(|db| {
            let mut select = db.prepare(&format!("SELECT {OUT} FROM moves_out WHERE done = 0"))?;
            select.query_map([], move_out)?.collect()
        })
        .await
    }

    /// The last move of a VM of this name that was done.
    pub async fn last_move_out(&self, vm: &str) -> Result<Option<MoveOut>> {
        let vm = vm.to_owned();
        self.call(move |db| {
            let last = format!("SELECT {OUT} FROM moves_out WHERE vm = ?1 AND done = 1 ORDER BY rowid DESC LIMIT 1");
            db.query_row(&last, [vm], move_out).optional()
        })
        .await
    }

    /// A VM is about to come, in place of what the same host had begun to bring under its name. False when the name is
    /// taken.
    pub async fn vm_arrives(&self, it: &MoveIn) -> Result<bool> {
        let it = it.clone();
        self.call(move |db| {
            let (name, key) = (it.coming.spec.name.clone(), it.source.key.to_string());
            let step = db.transaction()?;
            step.execute(
                "DELETE FROM moves_in WHERE vm = ?1 AND peer_key = ?2 AND taken = 0",
                params![name, key],
            )?;
            let is_taken: bool = step.query_row(
                "SELECT EXISTS (SELECT 1 FROM vms WHERE name = ?1)
                 OR EXISTS (SELECT 1 FROM moves_in WHERE (vm = ?1 AND taken = 0) OR id = ?2)",
                params![name, it.id.to_string()],
                |row| row.get(0),
            )?;
            if is_taken {
                // What was there is rolled back.
                return Ok(false);
            }
            step.execute(
                "INSERT INTO moves_in (id, vm, peer, peer_key, coming, since, taken) VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0)",
                params![it.id.to_string(), name, it.source.name, key, as_json(&it.coming), now()],
            )?;
            step.commit().map(|()| true)
        })
        .await
    }

    /// It is this host's from now on, with this record. False when it cannot be any more.
    pub async fn take_vm(&self, id: Uuid, vm: &VmRecord) -> Result<bool> {
        let vm = vm.clone();
        self.call(move |db| {
            let both = db.transaction()?;
            if both.execute("UPDATE moves_in SET taken = 1 WHERE id = ?1 AND taken = 0", [id.to_string()])? != 1 {
                return Ok(false);
            }
            put(&both, &vm)?;
            both.commit().map(|()| true)
        })
        .await
    }

    /// It is not to come any more. False when it is this host's already.
    pub async fn give_up_vm(&self, id: Uuid) -> Result<bool> {
        self.call(move |db| Ok(db.execute("DELETE FROM moves_in WHERE id = ?1 AND taken = 0", [id.to_string()])? == 1))
            .await
    }

    /// A move to here; none that this host never heard of.
    pub async fn move_in(&self, id: Uuid) -> Result<Option<MoveIn>> {
        self.call(move |db| {
            let one = format!("SELECT {IN} FROM moves_in WHERE id = ?1");
            db.query_row(&one, [id.to_string()], move_in).optional()
        })
        .await
    }

    /// Those that are not this host's yet.
    pub async fn moves_in(&self) -> Result<Vec<MoveIn>> {
        self.call(|db| {
            let mut select = db.prepare(&format!("SELECT {IN} FROM moves_in WHERE taken = 0"))?;
            select.query_map([], move_in)?.collect()
        })
        .await
    }
}

fn move_out(row: &Row<'_>) -> Result<MoveOut> {
    Ok(MoveOut {
        id: parse_id(&row.get::<_, String>("id")?)?,
        vm: row.get("vm")?,
        instance: instance(row)?,
        peer: row.get("peer")?,
        peer_key: parse_key(&row.get::<_, String>("peer_key")?)?,
        address: row.get("address")?,
        disks: serde_json::from_str(&row.get::<_, String>("disks")?).map_err(|e| unreadable(&e.to_string()))?,
        done: row.get("done")?,
    })
}

fn move_in(row: &Row<'_>) -> Result<MoveIn> {
    Ok(MoveIn {
        id: parse_id(&row.get::<_, String>("id")?)?,
        source: Source { name: row.get("peer")?, key: parse_key(&row.get::<_, String>("peer_key")?)? },
        coming: serde_json::from_str(&row.get::<_, String>("coming")?).map_err(|e| unreadable(&e.to_string()))?,
        taken: row.get("taken")?,
    })
}

fn as_json(coming: &Coming) -> String {
    serde_json::to_string(coming).expect("what comes is plain data")
}
