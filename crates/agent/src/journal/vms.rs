//! The VMs of this host.

use rusqlite::{Connection, Row, ToSql, params};
use uuid::Uuid;
use vmferry_api::VmSpec;
use vmferry_qemu::Drift;

use super::{Instance, Journal, Result, parse_id, unreadable};

/// A VM as recorded.
#[derive(Clone, Debug)]
pub struct VmRecord {
    /// How to start it.
    pub spec: VmSpec,
    /// Its QEMU.
    pub instance: Instance,
    /// Its QMP socket.
    pub qmp: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The migration that brought it, or is to.
    pub incoming: Option<Uuid>,
    /// It is started when the host is.
    pub autostart: bool,
    /// Why its QEMU is gone; none while it is not, as far as is known.
    pub ended: Option<String>,
    /// How it was changed since its start, as far as was seen.
    pub changed: Option<Drift>,
}

impl VmRecord {
    /// The command line that it is started with next.
    pub fn next_argv(&self) -> &[String] {
        self.changed.as_ref().map_or(&self.spec.argv, |drift| &drift.argv)
    }
}

const COLUMNS: &str = "spec, boot, pid, start_time, qmp, accelerator, incoming, autostart, ended, changed";

/// A VM that has this name and this instance; agents of old did not record the boot.
const IS_THIS_ONE: &str = "name = ?1 AND pid = ?2 AND start_time = ?3 AND boot IN (?4, '')";

impl Journal {
    /// Records a VM, in place of what was recorded under its name.
    pub async fn put_vm(&self, vm: &VmRecord) -> Result<()> {
        let vm = vm.clone();
        self.call(move |db| put(db, &vm)).await
    }

    /// Records why a VM's QEMU is gone, if its QEMU is still this one.
    pub async fn vm_ended(&self, name: &str, instance: &Instance, why: &str) -> Result<()> {
        self.set("ended", Some(why.to_owned()), name, instance).await
    }

    /// Records how a VM was changed since its start, if its QEMU is still this one.
    pub async fn vm_changed(&self, name: &str, instance: &Instance, drift: Option<&Drift>) -> Result<()> {
        self.set("changed", drift.map(as_json), name, instance).await
    }

    /// Records whether a VM is started when the host is, if its QEMU is still this one.
    pub async fn vm_autostarts(&self, name: &str, instance: &Instance, autostart: bool) -> Result<()> {
        self.set("autostart", Some(autostart), name, instance).await
    }

    async fn set(
        &self,
        column: &'static str,
        to: Option<impl ToSql + Send + 'static>,
        name: &str,
        instance: &Instance,
    ) -> Result<()> {
        let (name, it) = (name.to_owned(), instance.clone());
        self.call(move |db| {
            db.execute(
                &format!("UPDATE vms SET {column} = ?5 WHERE {IS_THIS_ONE}"),
                params![name, it.pid, it.start_time as i64, it.boot, to],
            )?;
            Ok(())
        })
        .await
    }

    /// Forgets a VM, if its QEMU is still this one.
    pub async fn remove_vm(&self, name: &str, instance: &Instance) -> Result<()> {
        let (name, it) = (name.to_owned(), instance.clone());
        self.call(move |db| {
            db.execute(
                &format!("DELETE FROM vms WHERE {IS_THIS_ONE}"),
                params![name, it.pid, it.start_time as i64, it.boot],
            )?;
            Ok(())
        })
        .await
    }

    /// The names of all that are on record, readable or not.
    pub async fn vm_names(&self) -> Result<Vec<String>> {
        self.call(|db| {
            let mut select = db.prepare("SELECT name FROM vms")?;
            select.query_map([], |row| row.get(0))?.collect()
        })
        .await
    }

    /// Every VM on record. One whose record cannot be read is told of and left out.
    pub async fn vms(&self) -> Result<Vec<VmRecord>> {
        self.call(|db| {
            let mut select = db.prepare(&format!("SELECT name, {COLUMNS} FROM vms ORDER BY name"))?;
            let rows = select.query_map([], |row| Ok((row.get::<_, String>(0)?, record(row))))?;
            let mut vms = Vec::new();
            for row in rows {
                match row? {
                    (_, Ok(record)) => vms.push(record),
                    (name, Err(error)) => tracing::error!(vm = name, %error, "its record cannot be read: left alone"),
                }
            }
            Ok(vms)
        })
        .await
    }
}

pub(super) fn put(db: &Connection, vm: &VmRecord) -> Result<()> {
    db.execute(
        "INSERT OR REPLACE INTO vms
         (name, spec, boot, pid, start_time, qmp, accelerator, incoming, autostart, ended, changed, must_run, stranded)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, 0, 0)",
        params![
            vm.spec.name,
            serde_json::to_string(&vm.spec).expect("a spec is plain data"),
            vm.instance.boot,
            vm.instance.pid,
            vm.instance.start_time as i64,
            vm.qmp,
            vm.accelerator,
            vm.incoming.map(|id| id.to_string()),
            vm.autostart,
            vm.ended,
            vm.changed.as_ref().map(as_json),
        ],
    )
    .map(drop)
}

fn record(row: &Row<'_>) -> Result<VmRecord> {
    Ok(VmRecord {
        spec: serde_json::from_str(&row.get::<_, String>("spec")?).map_err(|e| unreadable(&e.to_string()))?,
        instance: instance(row)?,
        qmp: row.get("qmp")?,
        accelerator: row.get("accelerator")?,
        incoming: row.get::<_, Option<String>>("incoming")?.as_deref().map(parse_id).transpose()?,
        autostart: row.get("autostart")?,
        ended: row.get("ended")?,
        changed: match row.get::<_, Option<String>>("changed")? {
            Some(text) => serde_json::from_str(&text).map_err(|e| unreadable(&e.to_string()))?,
            None => None,
        },
    })
}

fn as_json(drift: &Drift) -> String {
    serde_json::to_string(drift).expect("drift is plain data")
}

pub(super) fn instance(row: &Row<'_>) -> Result<Instance> {
    Ok(Instance { boot: row.get("boot")?, pid: row.get("pid")?, start_time: row.get::<_, i64>("start_time")? as u64 })
}
