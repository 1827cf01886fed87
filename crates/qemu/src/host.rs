//! What QEMU can do on this host: which binary, with which accelerator, which machines and CPU models.

mod drain_trial;
mod image_server;
mod kvm_trial;
mod node_trial;

pub use drain_trial::transaction_drains;
pub use image_server::{EXPORT, ImageServer, NewImage};
pub use kvm_trial::try_kvm;
pub use node_trial::try_node;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Access;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::launch::{in_words, last_lines, or_nothing};
use crate::process::end_with_us;
use crate::qmp::commands::{MachineInfo, QueryCpuDefinitions, QueryMachines, QueryVersion, Quit};
use crate::qmp::{Features, Qmp, QmpError};
use crate::stream_tls::{Endpoint, StreamKey, protect_streams};

/// How long a QEMU may take to tell about itself: of some thousand one did not answer at all and the next one did at once,
/// so that the first gets less time.
const PROBE_TIMEOUTS: [Duration; 2] = [Duration::from_secs(4), Duration::from_secs(10)];

/// What runs the guest's code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "name")]
pub enum Accel {
    /// The processor itself.
    Kvm(Kvm),
    /// QEMU, in software.
    Tcg {
        /// Why it is not KVM, in words that fit into a sentence.
        why: String,
    },
}

/// How KVM works on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kvm {
    /// What `-cpu host` ends with here, as it does not start otherwise, such as `,-arch-capabilities`; empty as a rule.
    pub host_cpu: String,
    /// A guest's kernel is emulated, and only its programs run on the processor itself: an ordinary guest gets nowhere.
    pub emulates_kernels: bool,
}

impl Accel {
    /// KVM as it should be.
    pub fn kvm() -> Self {
        Self::Kvm(Kvm::default())
    }

    /// What an ordinary guest gets, which has a kernel.
    #[must_use]
    pub fn for_ordinary_guests(self) -> Self {
        match self {
            Self::Kvm(kvm) if kvm.emulates_kernels => Self::Tcg { why: EMULATES.into() },
            other => other,
        }
    }

    /// It is KVM, for whatever guests.
    pub fn is_kvm(&self) -> bool {
        matches!(self, Self::Kvm(_))
    }

    /// QEMU's word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kvm(_) => "kvm",
            Self::Tcg { .. } => "tcg",
        }
    }

    /// What whoever wanted KVM and does not get it should know, in a sentence.
    pub fn in_place_of_kvm(&self) -> String {
        let why = match self {
            Self::Kvm(_) => format!("KVM does not work for ordinary guests here ({EMULATES})"),
            Self::Tcg { why } => format!("KVM does not work here ({why})"),
        };
        format!("{why}: running under TCG, software emulation, much slower.")
    }
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kvm(kvm) if kvm.emulates_kernels => {
                write!(f, "KVM for guests that ask for it, else TCG ({EMULATES})")
            }
            Self::Kvm(_) => f.write_str("KVM"),
            Self::Tcg { why } => write!(f, "TCG, software emulation ({why})"),
        }
    }
}

/// See [`Kvm::emulates_kernels`].
const EMULATES: &str = "it emulates their kernels, instruction by instruction";

/// One machine type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name, such as `pc-q35-7.2`.
    pub name: String,
    /// Another name that means it in this QEMU, such as `q35`.
    pub alias: Option<String>,
    /// What a command line without a machine type gets.
    pub is_default: bool,
    /// A future QEMU will lack it.
    pub deprecated: bool,
    /// How many CPUs it may have.
    pub cpu_max: u32,
}

/// One CPU model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    /// Its name.
    pub name: String,
    /// The features of it that this host lacks with this accelerator; empty when it can run here.
    pub unavailable: Vec<String>,
}

/// What one QEMU binary can do on this host with one accelerator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuInfo {
    /// The binary.
    pub binary: PathBuf,
    /// Its version, such as `10.0.2`.
    pub version: String,
    /// The version and what its distribution adds to it: tells one build from another.
    pub build: String,
    /// Its machine types.
    pub machines: Vec<Machine>,
    /// Its CPU models.
    pub cpus: Vec<CpuModel>,
    /// Its commands and migration capabilities.
    pub features: Features,
    /// It can encrypt its migration streams.
    pub tls: bool,
    /// What its machine types set that is not as it is in the newest; empty where it does not tell.
    pub set_by_machines: Arc<BTreeMap<String, SetByMachine>>,
}

/// What the folders of probes begin with, which whoever is killed in the middle of one leaves.
pub const PROBE: &str = "probe-";

/// Properties of devices that a machine type sets, each with what it is.
pub type SetByMachine = BTreeSet<(String, String)>;

/// Why a QEMU could not be asked what it can do.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It could not be started.
    #[error("cannot start {binary}")]
    Start {
        /// The binary.
        binary: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended before it answered.
    #[error("{binary} cannot be asked what it can do: it ended ({}): {}", in_words(*status), or_nothing(words))]
    Exited {
        /// The binary.
        binary: PathBuf,
        /// How.
        status: ExitStatus,
        /// What it said.
        words: String,
    },
    /// It did not answer.
    #[error("{binary} cannot be asked what it can do")]
    Qmp {
        /// The binary.
        binary: PathBuf,
        /// Why.
        #[source]
        source: QmpError,
    },
    /// It did not answer in time.
    #[error("{binary} did not tell what it can do within {after:?}")]
    Timeout {
        /// The binary.
        binary: PathBuf,
        /// How long was waited.
        after: Duration,
    },
}

/// Asks a QEMU what it can do. Starts it without a guest; takes some tenths of a second, at most fourteen. Meanwhile there is a
/// folder in that folder, whose name begins with [`PROBE`].
pub async fn probe_qemu(binary: &Path, accel: &Accel, within: &Path) -> Result<QemuInfo, ProbeError> {
    with_probe(binary, accel, within, async |qmp, dir| ask(binary, &qmp, dir).await).await
}

/// Starts a QEMU without a guest, and does this with it and a folder; with another one if it does not answer.
async fn with_probe<T>(
    binary: &Path,
    accel: &Accel,
    within: &Path,
    ask: impl AsyncFnOnce(Qmp, &Path) -> Result<T, QmpError> + Clone,
) -> Result<T, ProbeError> {
    let [first, second] = PROBE_TIMEOUTS;
    match probe_once(binary, accel, within, ask.clone(), first).await {
        Err(ProbeError::Timeout { .. }) => {
            tracing::warn!(binary = %binary.display(), "a QEMU did not tell what it can do: another one is asked");
            probe_once(binary, accel, within, ask, second).await
        }
        told => told,
    }
}

async fn probe_once<T>(
    binary: &Path,
    accel: &Accel,
    within: &Path,
    ask: impl AsyncFnOnce(Qmp, &Path) -> Result<T, QmpError>,
    patience: Duration,
) -> Result<T, ProbeError> {
    let start_error = |source| ProbeError::Start { binary: binary.into(), source };
    let dir = tempfile::Builder::new().prefix(PROBE).tempdir_in(within).map_err(start_error)?;
    let socket = dir.path().join("qmp.sock");
    let mut command = Command::new(binary);
    end_with_us(&mut command);
    let mut child = command
        .args(["-machine", &format!("none,accel={}", accel.name())])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-S"])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start_error)?;
    let stderr = child.stderr.take().expect("it was asked for");
    let asking = async {
        let qmp = Qmp::connect(&socket, PROBE_TIMEOUTS[1]).await?;
        Ok((ask(qmp.clone(), dir.path()).await?, qmp))
    };
    let asked = async {
        let answer = tokio::select! {
            answer = asking => answer.map(Some),
            _ = child.wait() => Ok(None),
        };
        let source = match answer {
            Ok(Some((told, qmp))) => {
                // It may be gone before its answer is read.
                let _ = qmp.execute(Quit {}).await;
                return Ok(told);
            }
            Ok(None) => QmpError::Closed,
            Err(source) => source,
        };
        match tokio::time::timeout(Duration::from_millis(500), child.wait()).await {
            Ok(Ok(status)) => {
                Err(ProbeError::Exited { binary: binary.into(), status, words: read_words(stderr).await })
            }
            _ => Err(ProbeError::Qmp { binary: binary.into(), source }),
        }
    };
    tokio::time::timeout(patience, asked)
        .await
        .unwrap_or_else(|_| Err(ProbeError::Timeout { binary: binary.into(), after: patience }))
}

async fn ask(binary: &Path, qmp: &Qmp, dir: &Path) -> Result<QemuInfo, QmpError> {
    let version = qmp.execute(QueryVersion {}).await?;
    let features = Features::probe(qmp).await?;
    let machines = match qmp.execute(QueryMachines { compat_props: Some(true) }).await {
        Err(QmpError::Command { .. }) => qmp.execute(QueryMachines { compat_props: None }).await?,
        answer => answer?,
    };
    let set_by = |it: &MachineInfo| {
        let plain = |value: &str| match value {
            "true" => "on".to_owned(),
            "false" => "off".to_owned(),
            other => other.to_owned(),
        };
        let set = it.compat_props.iter().map(|it| (it.property.clone(), plain(&it.value)));
        (it.name.clone(), set.collect())
    };
    let set_by_machines = Arc::new(machines.iter().map(set_by).collect());
    let cpus = qmp.execute(QueryCpuDefinitions {}).await?;
    // Its types and schema are the same without TLS; only a trial tells.
    let tls = protect_streams(qmp, &dir.join("tls"), &StreamKey::new(&[0; 32]), Endpoint::Server, "NORMAL").await;
    Ok(QemuInfo {
        binary: binary.into(),
        version: version.to_string(),
        build: version.build(),
        machines: machines
            .into_iter()
            .map(|machine| Machine {
                name: machine.name,
                alias: machine.alias,
                is_default: machine.is_default,
                deprecated: machine.deprecated,
                cpu_max: machine.cpu_max,
            })
            .collect(),
        cpus: cpus
            .into_iter()
            .map(|cpu| CpuModel { name: cpu.name, unavailable: cpu.unavailable_features.unwrap_or_default() })
            .collect(),
        features,
        tls: tls.is_ok(),
        set_by_machines,
    })
}

/// What a QEMU that has ended wrote to its standard error.
async fn read_words(stderr: tokio::process::ChildStderr) -> String {
    use tokio::io::AsyncReadExt;
    const MOST: u64 = 64 << 10;
    let mut bytes = Vec::new();
    // Whoever else holds the pipe must not keep us waiting.
    let _ = tokio::time::timeout(Duration::from_millis(200), stderr.take(MOST).read_to_end(&mut bytes)).await;
    last_lines(&String::from_utf8_lossy(&bytes))
}

/// Finds a binary as a shell would: a name with a slash is a path, any other is looked for in these folders, then in
/// `PATH`.
pub fn find_binary(argv0: &str, extra_dirs: &[PathBuf], path_env: &OsStr) -> Option<PathBuf> {
    if argv0.contains('/') {
        return Some(PathBuf::from(argv0)).filter(|path| is_executable(path));
    }
    let in_path = std::env::split_paths(path_env);
    let dirs = extra_dirs.iter().cloned().chain(in_path);
    (!argv0.is_empty()).then(|| dirs.map(|dir| dir.join(argv0)).find(|path| is_executable(path)))?
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_is_found_as_a_shell_would() {
        let path = OsStr::new("/nowhere:/usr/bin:/bin");
        let sh = find_binary("sh", &[], path).unwrap();
        assert!(sh.ends_with("sh") && sh.is_absolute());
        assert_eq!(find_binary("/bin/sh", &[], OsStr::new("")), Some("/bin/sh".into()));
        assert_eq!(find_binary("sh", &["/bin".into()], OsStr::new("")), Some("/bin/sh".into()));
        for nothing in ["no-such-program", "/bin/no-such-program", "", "/etc/passwd", "/bin"] {
            assert_eq!(find_binary(nothing, &[], path), None, "{nothing}");
        }
    }

    #[test]
    fn an_accelerator_survives_json() {
        for accel in [Accel::kvm(), Accel::Tcg { why: "there is no /dev/kvm".into() }] {
            let json = serde_json::to_string(&accel).unwrap();
            assert_eq!(serde_json::from_str::<Accel>(&json).unwrap(), accel, "{json}");
        }
    }
}
