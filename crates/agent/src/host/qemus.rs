//! The QEMU binaries of this host, and what they turned out to be able to do.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use vmferry_api::in_one_line;
use vmferry_qemu::{Accel, CommandLine, Features, PROBE, QemuInfo, SetByMachine};

use super::vm::Vm;
use crate::error::AgentError;

/// A trial of KVM can fail because the host was busy.
const TRY_KVM_AGAIN: Duration = Duration::from_secs(300);

/// See the module's text.
pub(crate) struct Qemus {
    /// What the host calls itself.
    host: String,
    /// Searched before `PATH`.
    dirs: Vec<PathBuf>,
    /// Where probes have their folders.
    probes: PathBuf,
    probed: tokio::sync::Mutex<Probed>,
}

/// What QEMU binaries turned out to be able to do; asked once a binary and version of it.
#[derive(Default)]
struct Probed {
    accelerators: HashMap<PathBuf, (Accel, Instant)>,
    infos: HashMap<(PathBuf, Option<SystemTime>, bool), QemuInfo>,
    drains: HashSet<(PathBuf, Option<SystemTime>)>,
}

impl Qemus {
    /// Of the host of this name; nothing is asked yet.
    pub(super) fn new(host: &str, dirs: &[PathBuf], probes: &Path) -> Self {
        // Those of an agent that was killed.
        let left = std::fs::read_dir(probes).into_iter().flatten().flatten();
        for left in left.filter(|it| it.file_name().to_string_lossy().starts_with(PROBE)) {
            let _ = std::fs::remove_dir_all(left.path());
        }
        Self { host: host.into(), dirs: dirs.to_vec(), probes: probes.into(), probed: tokio::sync::Mutex::default() }
    }

    pub(crate) fn find_qemu(&self, command: &CommandLine) -> Result<PathBuf, AgentError> {
        self.find_binary(command.binary())
    }

    pub(crate) fn find_binary(&self, binary: &str) -> Result<PathBuf, AgentError> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"));
        vmferry_qemu::find_binary(binary, &self.dirs, &path)
            .ok_or_else(|| AgentError::NoQemu { binary: binary.into(), host: self.host.clone() })
    }

    /// Asks this architecture's QEMU before it is needed, or the first migration would wait for it.
    pub(crate) async fn learn_qemu(&self) {
        let binary = format!("qemu-system-{}", std::env::consts::ARCH);
        let learned = async {
            let binary = self.find_binary(&binary)?;
            self.qemu_info(&binary, &self.accelerator(&binary).await).await
        };
        if let Err(error) = learned.await {
            tracing::warn!(error = in_one_line(&error), "cannot tell what QEMU can do here");
        }
    }

    /// What a VM's QEMU can do, and whether it can encrypt its streams. It is asked itself only when its binary was
    /// replaced since: the answer is so long that QEMU leaves its guest waiting for some tenths of a second.
    pub(crate) async fn features_of(&self, vm: &Vm) -> Result<(Features, bool), AgentError> {
        match self.info_of(vm).await {
            Some(info) => Ok((info.features, info.tls)),
            // Whether it can encrypt is seen when it is told to.
            None => Ok((Features::probe(&vm.qmp).await?, true)),
        }
    }

    /// What the machine types of a VM's QEMU set; none where that is not known.
    pub(super) async fn set_by_machines(&self, vm: &Vm) -> Option<Arc<BTreeMap<String, SetByMachine>>> {
        Some(self.info_of(vm).await?.set_by_machines)
    }

    /// A VM's QEMU drains its disks' I/O without pausing its guest; false where its binary was replaced, too.
    pub(crate) async fn drains(&self, vm: &Vm) -> bool {
        let Some(info) = self.info_of(vm).await else { return false };
        let key = (info.binary.clone(), changed(&info.binary));
        let mut probed = self.probed.lock().await;
        if probed.drains.contains(&key) {
            return true;
        }
        let tried = vmferry_qemu::transaction_drains(&info.binary, &self.probes).await.unwrap_or_else(|error| {
            tracing::warn!(binary = %info.binary.display(), error = in_one_line(&error), "cannot try whether it drains");
            false
        });
        // What did not work may have been the host's fault, and is tried again.
        if tried {
            probed.drains.insert(key);
        }
        tried
    }

    /// Whether a QEMU like a VM's can open what these options name, tried without its guest; its size in bytes, where told.
    pub(crate) async fn try_node(&self, vm: &Vm, options: &serde_json::Value) -> Result<Option<u64>, AgentError> {
        let binary = self.find_qemu(&CommandLine::parse(&vm.spec.argv)?)?;
        Ok(vmferry_qemu::try_node(&binary, &self.probes, options).await?)
    }

    /// Of the binary that a VM's QEMU was started from, unless it was replaced since.
    async fn info_of(&self, vm: &Vm) -> Option<QemuInfo> {
        let binary = self.find_qemu(&CommandLine::parse(&vm.spec.argv).ok()?).ok()?;
        let info = self.qemu_info(&binary, &self.accelerator(&binary).await).await.ok()?;
        (info.build == vm.facts.qemu_build).then_some(info)
    }

    /// Whether KVM works with this QEMU; where it did not, that is tried again after a while.
    pub(crate) async fn accelerator(&self, binary: &Path) -> Accel {
        let mut probed = self.probed.lock().await;
        if let Some((known, tried)) = probed.accelerators.get(binary)
            && (known.is_kvm() || tried.elapsed() < TRY_KVM_AGAIN)
        {
            return known.clone();
        }
        let found = vmferry_qemu::try_kvm(binary).await;
        tracing::info!(binary = %binary.display(), accelerator = %found, "tried KVM");
        probed.accelerators.insert(binary.into(), (found.clone(), Instant::now()));
        found
    }

    /// What this QEMU can do, asked once a version.
    pub(crate) async fn qemu_info(&self, binary: &Path, accel: &Accel) -> Result<QemuInfo, AgentError> {
        let key = (binary.to_owned(), changed(binary), accel.is_kvm());
        let mut probed = self.probed.lock().await;
        if let Some(known) = probed.infos.get(&key) {
            return Ok(known.clone());
        }
        let info = vmferry_qemu::probe_qemu(binary, accel, &self.probes).await?;
        probed.infos.insert(key, info.clone());
        Ok(info)
    }
}

/// When this binary became another one the last time.
fn changed(binary: &Path) -> Option<SystemTime> {
    std::fs::metadata(binary).and_then(|it| it.modified()).ok()
}
