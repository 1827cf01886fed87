//! A VM: starting, taking over, looking at and stopping it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;
use vmferry_qemu::IoLimits;

/// A VM as its user defined it, and what was decided about it when it started: enough to start the same hardware
/// again on another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSpec {
    /// Its name, one a host.
    pub name: String,
    /// The QEMU command line as the user gave it.
    pub argv: Vec<String>,
    /// The folder that relative paths in it start from.
    #[schema(value_type = String)]
    pub cwd: PathBuf,
    /// Its RAM was put into a shared backend although the user gave only `-m`.
    pub shared_ram: bool,
    /// Somebody else started it.
    pub adopted: bool,
    /// The measuring guest: whoever witnesses it hears all that it says, and it ends with its witness. What it boots from
    /// goes along with it.
    #[serde(default)]
    pub measuring: bool,
    /// What the host lets the guest do with its disks, by disk, of which QEMU is told when it has started; none to leave
    /// that to the command line.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub io_limits: Option<BTreeMap<String, IoLimits>>,
}

/// Start a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RunRequest {
    /// Its name.
    pub name: String,
    /// The QEMU command line, the binary first.
    pub argv: Vec<String>,
    /// The folder that relative paths in it start from.
    #[schema(value_type = String)]
    pub cwd: PathBuf,
    /// See [`VmSpec::measuring`]. The files it boots from lie in `cwd`, each under the fingerprint of what is in it.
    #[serde(default)]
    pub measuring: bool,
    /// Start it whenever its host is started.
    #[serde(default)]
    pub autostart: bool,
}

/// Take over a QEMU that somebody else started.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AdoptRequest {
    /// The name to give it.
    pub name: String,
    /// Its QMP socket.
    #[schema(value_type = String)]
    pub qmp: PathBuf,
}

/// Stop a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StopRequest {
    /// Do not ask the guest: end its QEMU.
    pub force: bool,
    /// It stays on the list, to be started again.
    #[serde(default)]
    pub keep: bool,
    /// How long the guest may take to shut down, in ms.
    pub timeout_ms: u64,
}

/// Start a VM again.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct StartRequest {
    /// The host that it came from need not be asked whether it has kept the guest: its user knows that it has not.
    pub undisputed: bool,
}

/// What a started VM is told with.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// The VM.
    pub vm: VmView,
    /// What the agent changed or decided, one plain sentence each.
    pub notes: Vec<String>,
}

/// A VM as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// `running`, `paused`, `migrating`, `incoming`, `leaving`, `in-doubt`, `stranded`, `unclear`, `silent`, `ended`, `arriving`, or
    /// QEMU's own word.
    pub state: String,
    /// More about the state.
    pub detail: Option<String>,
    /// The QEMU process; 0 when there is none.
    pub pid: u32,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// The command line as the user gave it.
    pub argv: Vec<String>,
    /// QEMU's version.
    pub qemu_version: Option<String>,
    /// The exact machine type.
    pub machine: Option<String>,
    /// `kvm` or `tcg`.
    pub accelerator: Option<String>,
    /// Somebody else started it.
    pub adopted: bool,
    /// Who manages it, where that is not vmferry: `libvirt`.
    #[serde(default)]
    pub manager: Option<String>,
    /// It is started when its host is.
    #[serde(default)]
    pub autostart: bool,
    /// `vmferry console` works for it.
    pub console: bool,
    /// The RAM engine that a migration uses unless its user says otherwise.
    pub engine: String,
    /// Why the agents cannot move this VM's RAM themselves; none when they can, or when that was not looked at.
    #[serde(default)]
    pub external_obstacle: Option<String>,
    /// How its machine was changed since it was started, one sentence each; empty when it was not, or when that was not
    /// looked at.
    #[serde(default)]
    pub changes: Vec<String>,
    /// The migration under way.
    pub migration: Option<Uuid>,
}

/// Decide about a guest of which the agents do not know where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Resolve {
    /// It goes on here, whatever the other host thinks, which lets go as soon as it hears of that.
    KeepHere,
    /// It runs there: what is left of it here goes.
    ItRunsThere,
}

/// Whether a VM is started whenever its host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Autostart {
    /// It is.
    pub on: bool,
}
