//! A VM: one QEMU process of this host, its monitor and its console.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use uuid::Uuid;
use vmferry_api::{EngineName, VmSpec, VmView};
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{Drift, Inventory, Qmp, QmpError, RunState};

use super::attendance::Attendance;
use super::console::Console;
use crate::journal::{Instance, VmRecord};

/// How long a QEMU that was told to quit, or to end, may take before it is killed.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// How much of QEMU's log tells why it ended, in bytes.
const LAST_WORDS: u64 = 600;
/// How long QMP may take to answer when a VM is only looked at.
pub(crate) const GLANCE: Duration = Duration::from_secs(1);

/// What a VM was made of when its agent began to know it.
const INVENTORY: &str = "inventory.json";

/// What the agent is doing with a VM, beyond running it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// This host owns the guest and nothing is under way.
    Owned,
    /// It receives a guest that the source still owns.
    Incoming(Uuid),
    /// A migration is planned, which touches nothing.
    Planning,
    /// One of its disks is being moved on this host.
    MovingDisk,
    /// It is being shut down.
    Stopping,
    /// It is being migrated away.
    Migrating(Uuid),
    /// It was handed over, but the destination could not be asked whether it took it; the guest is paused.
    InDoubt(Uuid),
    /// The guest runs on the destination; what is left here serves post-copy or is about to go.
    Left(Uuid),
    /// The guest was handed over, but its post-copy could not be finished: the destination may lack memory that only
    /// this QEMU has.
    Stranded(Uuid),
    /// It was found running, and no journal says whose it is: the user is to decide.
    Unclear,
}

impl Stage {
    /// A migration has the say over it.
    pub(crate) fn is_migration(&self) -> bool {
        matches!(
            self,
            Self::Incoming(_)
                | Self::Planning
                | Self::Migrating(_)
                | Self::InDoubt(_)
                | Self::Left(_)
                | Self::Stranded(_)
        )
    }
}

/// What does not change while a VM lives.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// QEMU's version.
    pub(crate) qemu_version: String,
    /// The same with what its distribution adds: tells one build from another.
    pub(crate) qemu_build: String,
    /// The exact machine type, such as `pc-q35-7.2`.
    pub(crate) machine: String,
}

/// See the module's text.
pub(crate) struct Vm {
    /// How it is started.
    pub(crate) spec: VmSpec,
    /// The migration that brought it.
    pub(crate) incoming: Option<Uuid>,
    /// It is started when the host is.
    pub(crate) autostart: AtomicBool,
    /// Its QEMU process.
    pub(crate) pid: u32,
    /// When that process started, in clock ticks since boot.
    pub(crate) start_time: u64,
    /// Its monitor.
    pub(crate) qmp: Qmp,
    qmp_path: String,
    /// Where its sockets, pidfile and log are.
    pub(crate) dir: PathBuf,
    /// `kvm` or `tcg`.
    pub(crate) accelerator: String,
    /// What does not change.
    pub(crate) facts: Facts,
    ram_bytes: AtomicU64,
    /// Of a measuring guest.
    pub(crate) attendance: Attendance,
    console: Option<Console>,
    stage: Mutex<Stage>,
    drift: Mutex<Option<Drift>>,
}

impl Vm {
    /// Takes hold of a QEMU that runs: asks it for its facts and connects to its console.
    pub(crate) async fn attach(record: &VmRecord, qmp: Qmp, dir: PathBuf, stage: Stage) -> Result<Self, QmpError> {
        let facts = Facts::ask(&qmp).await?;
        let ram_bytes = AtomicU64::new(ask_ram_bytes(&qmp).await?);
        let socket = dir.join("console.sock");
        let console = match socket.exists() {
            true => Console::open(&socket)
                .await
                .inspect_err(|error| tracing::warn!(vm = record.spec.name, %error, "no console"))
                .ok(),
            false => None,
        };
        Ok(Self {
            spec: record.spec.clone(),
            incoming: record.incoming,
            autostart: AtomicBool::new(record.autostart),
            pid: record.instance.pid,
            start_time: record.instance.start_time,
            accelerator: record.accelerator.clone(),
            qmp,
            qmp_path: record.qmp.clone(),
            dir,
            facts,
            ram_bytes,
            attendance: Attendance::default(),
            console,
            stage: Mutex::new(stage),
            drift: Mutex::new(record.changed.clone()),
        })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its console, if the agent has it.
    pub(crate) fn console(&self) -> Option<&Console> {
        self.console.as_ref()
    }

    /// What is being done with it.
    pub(crate) fn stage(&self) -> Stage {
        self.lock_stage().clone()
    }

    /// Says what is being done with it.
    pub(crate) fn set_stage(&self, stage: Stage) {
        *self.lock_stage() = stage;
    }

    fn lock_stage(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().expect("no holder of this lock panics")
    }

    /// Which QEMU it is.
    pub(crate) fn instance(&self) -> Instance {
        Instance::now(self.pid, self.start_time)
    }

    /// As it is in the journal.
    pub(crate) fn record(&self) -> VmRecord {
        VmRecord {
            spec: self.spec.clone(),
            instance: self.instance(),
            qmp: self.qmp_path.clone(),
            accelerator: self.accelerator.clone(),
            incoming: self.incoming,
            autostart: self.autostart.load(Ordering::Relaxed),
            ended: None,
            changed: self.drift(),
        }
    }

    /// Guest RAM now, in bytes, with what was plugged in.
    pub(crate) async fn ram_bytes(&self) -> Result<u64, QmpError> {
        let bytes = ask_ram_bytes(&self.qmp).await?;
        self.ram_bytes.store(bytes, Ordering::Relaxed);
        Ok(bytes)
    }

    /// What it is made of, as far as its QEMU tells.
    pub(crate) async fn inventory(&self) -> Result<Inventory, QmpError> {
        Inventory::of(&self.qmp).await
    }

    /// Keeps what it is made of as long as its QEMU lives: from now on it is known how it was changed.
    pub(crate) fn remember(&self, inventory: &Inventory) {
        let text = serde_json::to_vec(inventory).expect("an inventory is plain data");
        // One that somebody else has started has no folder yet.
        let folder = if self.spec.adopted { std::fs::create_dir_all(&self.dir) } else { Ok(()) };
        if let Err(error) = folder.and_then(|()| std::fs::write(self.dir.join(INVENTORY), text)) {
            tracing::warn!(vm = self.name(), %error, "cannot keep what it is made of");
        }
    }

    /// What it was made of when it was started, came here, or was adopted. None when that is not known.
    pub(crate) fn first_inventory(&self) -> Option<Inventory> {
        serde_json::from_slice(&std::fs::read(self.dir.join(INVENTORY)).ok()?).ok()
    }

    /// How it was changed since its start, when that was seen last; none when it was not.
    pub(crate) fn drift(&self) -> Option<Drift> {
        self.drift.lock().expect("no holder of this lock panics").clone()
    }

    /// The command line that would start it as it is now, as far as that was seen.
    pub(crate) fn next_argv(&self) -> Vec<String> {
        self.drift().map_or_else(|| self.spec.argv.clone(), |drift| drift.argv)
    }

    /// Says how it was changed.
    pub(super) fn set_drift(&self, drift: Option<Drift>) {
        *self.drift.lock().expect("no holder of this lock panics") = drift;
    }

    /// In what its description is another than at its start, one sentence each.
    pub(crate) fn changes(&self, now: &Inventory) -> Vec<String> {
        let before = self.first_inventory();
        before.map(|before| before.differences(now, None, "at its start", "now")).unwrap_or_default()
    }

    /// The process is still the one that was started.
    pub(crate) fn is_alive(&self) -> bool {
        vmferry_qemu::is_same_process(self.pid, self.start_time)
    }

    /// The end of what QEMU wrote to its log, in one line.
    pub(crate) fn last_words(&self) -> Option<String> {
        vmferry_qemu::log::tail(&self.dir.join("qemu.log"), LAST_WORDS)
    }

    /// Tells QEMU to quit, and ends it when it does not.
    pub(crate) async fn quit(&self) {
        if let Err(error) = self.qmp.execute(commands::Quit {}).await {
            tracing::debug!(vm = self.name(), %error, "quit was not answered");
        }
        if tokio::time::timeout(GRACE, self.qmp.closed()).await.is_err() {
            tracing::warn!(vm = self.name(), pid = self.pid, "its QEMU does not quit and is killed");
        }
        vmferry_qemu::kill_process(self.pid, self.start_time, GRACE).await;
    }

    /// The VM as a user sees it now.
    pub(crate) async fn view(&self, engine: EngineName) -> VmView {
        let (state, detail, migration) = match self.stage() {
            Stage::Owned | Stage::Planning | Stage::Stopping | Stage::MovingDisk => {
                let (state, detail) = self.run_state_in_words().await;
                (state, detail, None)
            }
            Stage::Incoming(id) => ("incoming".into(), Some("the source owns the guest".into()), Some(id)),
            Stage::Migrating(id) => ("migrating".into(), Some("the guest runs here".into()), Some(id)),
            Stage::Left(id) => ("leaving".into(), Some("the guest runs on the destination".into()), Some(id)),
            Stage::InDoubt(id) => (
                "in-doubt".into(),
                Some("handed over, but the destination does not answer whether it took it; paused here".into()),
                Some(id),
            ),
            Stage::Stranded(id) => (
                "stranded".into(),
                Some("the guest was handed over, but not all of its memory could follow".into()),
                Some(id),
            ),
            Stage::Unclear => (
                "unclear".into(),
                Some("found running after the agent's journal was lost: is the guest this host's?".into()),
                None,
            ),
        };
        VmView {
            name: self.name().into(),
            state,
            detail,
            pid: self.pid,
            ram_bytes: self.ram_bytes.load(Ordering::Relaxed),
            argv: self.spec.argv.clone(),
            qemu_version: Some(self.facts.qemu_version.clone()),
            machine: Some(self.facts.machine.clone()),
            accelerator: Some(self.accelerator.clone()),
            adopted: self.spec.adopted,
            manager: None,
            autostart: self.autostart.load(Ordering::Relaxed),
            console: self.console.is_some(),
            engine: engine.to_string(),
            external_obstacle: None,
            changes: Vec::new(),
            migration,
        }
    }

    async fn run_state_in_words(&self) -> (String, Option<String>) {
        match self.qmp.execute_within(commands::QueryStatus {}, GLANCE).await {
            Ok(status) => (status.status.to_string(), None),
            Err(error) => ("unknown".into(), Some(error.to_string())),
        }
    }

    /// Whether the guest runs, or would run if the host let it; and the state in QEMU's word.
    pub(crate) async fn run_state(&self) -> Result<RunState, QmpError> {
        Ok(self.qmp.execute(commands::QueryStatus {}).await?.status)
    }
}

impl Facts {
    async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let version = qmp.execute(commands::QueryVersion {}).await?;
        let machine = qmp
            .execute(commands::QomGet { path: "/machine".into(), property: "type".into() })
            .await?
            .as_str()
            .unwrap_or_default()
            .trim_end_matches("-machine")
            .to_owned();
        Ok(Self { qemu_version: version.to_string(), qemu_build: version.build(), machine })
    }
}

async fn ask_ram_bytes(qmp: &Qmp) -> Result<u64, QmpError> {
    let memory = qmp.execute(commands::QueryMemorySizeSummary {}).await?;
    Ok(memory.base_memory + memory.plugged_memory.unwrap_or(0))
}

/// A VM that is claimed for something that may not come off: given back when this goes, unless it is kept.
pub(crate) struct Claim<'a> {
    vm: &'a Vm,
    then: Stage,
}

impl<'a> Claim<'a> {
    /// Claims an idle VM to do this with it; otherwise tells what is being done already.
    pub(crate) fn take(vm: &'a Vm, what: Stage) -> Result<Self, Stage> {
        let mut stage = vm.lock_stage();
        if *stage != Stage::Owned {
            return Err(stage.clone());
        }
        *stage = what;
        Ok(Self { vm, then: Stage::Owned })
    }

    /// It came off: this is what is done with it from now on.
    pub(crate) fn keep(mut self, stage: Stage) {
        self.then = stage;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.vm.set_stage(self.then.clone());
    }
}

/// Whether this can name a VM: it becomes a folder's name and stands in commands.
pub(crate) fn is_valid_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.len() <= 64 && name.chars().all(allowed) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// In which its QEMU says which process it is.
pub(crate) const PID_FILE: &str = "qemu.pid";

/// The pid that QEMU wrote to its pidfile.
pub(crate) fn pid_from_file(dir: &Path) -> Option<u32> {
    std::fs::read_to_string(dir.join(PID_FILE)).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::is_valid_name;

    #[test]
    fn names_that_leave_the_folder_or_start_an_option_are_refused() {
        for bad in ["", ".", "..", "../web1", "a/b", "-web1", ".web1", "web 1", "wéb", &"x".repeat(65)] {
            assert!(!is_valid_name(bad), "{bad}");
        }
        for good in ["web1", "db-2.example.org", "A_b"] {
            assert!(is_valid_name(good), "{good}");
        }
    }
}
