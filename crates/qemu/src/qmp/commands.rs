//! The commands that we use, each with its arguments and what we read of its answer; migration is in a file of its own.
//!
//! What a QEMU may leave out is an `Option`; what we do not read is not named. QEMU describes all of it in qapi/*.json.

mod jobs;
mod migration;

pub use jobs::*;
pub use migration::*;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Command, RunState};

/// Declares commands: `Type { arguments } = "name" -> Reply;`, or `... -> Reply, out_of_band = true;`.
macro_rules! commands {
    ($($(#[$about:meta])* $name:ident {
        $($(#[$doc:meta])* $field:ident: $type:ty,)*
    } = $word:literal -> $reply:ty $(, out_of_band = $out_of_band:literal)?;)*) => {$(
        $(#[$about])*
        #[derive(Clone, Debug, serde::Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name {
            $(
                $(#[$doc])*
                pub $field: $type,
            )*
        }

        impl $crate::qmp::Command for $name {
            const NAME: &'static str = $word;
            $(const OUT_OF_BAND: bool = $out_of_band;)?
            type Reply = $reply;
        }
    )*};
}
use commands;

commands! {
    /// Ends the greeting; [`Qmp::connect`](super::Qmp::connect) does it.
    QmpCapabilities {
        /// Those to switch on, of what the greeting offers.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        enable: Vec<String>,
    } = "qmp_capabilities" -> Nothing;
    /// What QEMU does with the guest.
    QueryStatus {} = "query-status" -> Status;
    /// QEMU's version.
    QueryVersion {} = "query-version" -> Version;
    /// Whether KVM is there and used.
    QueryKvm {} = "query-kvm" -> Kvm;
    /// The guest's processors.
    QueryCpusFast {} = "query-cpus-fast" -> Vec<Cpu>;
    /// Pauses the guest.
    Stop {} = "stop" -> Nothing;
    /// Sets the guest running.
    Cont {} = "cont" -> Nothing;
    /// Ends QEMU.
    Quit {} = "quit" -> Nothing;
    /// Presses the power button.
    SystemPowerdown {} = "system_powerdown" -> Nothing;
    /// The machine types that this QEMU has.
    QueryMachines {
        /// With what each sets that is not as it is in the newest; not known before 9.1.
        #[serde(skip_serializing_if = "Option::is_none")]
        compat_props: Option<bool>,
    } = "query-machines" -> Vec<MachineInfo>;
    /// The CPU models that this QEMU has.
    QueryCpuDefinitions {} = "query-cpu-definitions" -> Vec<CpuDefinition>;
    /// How much memory the guest has.
    QueryMemorySizeSummary {} = "query-memory-size-summary" -> MemorySizeSummary;
    /// The memory backends; a machine that was only given `-m` has one of its own making.
    QueryMemdev {} = "query-memdev" -> Vec<Memdev>;
    /// The places for processors, and which of them have one.
    QueryHotpluggableCpus {} = "query-hotpluggable-cpus" -> Vec<CpuPlace>;
    /// DIMMs and what else is memory that is plugged in.
    QueryMemoryDevices {} = "query-memory-devices" -> Vec<MemoryDevice>;
    /// The disks and drives that the guest has.
    QueryBlock {} = "query-block" -> Vec<Drive>;
    /// Limits what the guest may do with a disk; see QEMU's `BlockIOThrottle`.
    BlockSetIoThrottle {
        /// What the drive is called, where it has a name.
        #[serde(skip_serializing_if = "Option::is_none")]
        device: Option<String>,
        /// The device that has it, where the drive has no name.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        /// Those of one group share their limits.
        #[serde(skip_serializing_if = "Option::is_none")]
        group: Option<String>,
        /// The limits.
        #[serde(flatten)]
        numbers: BTreeMap<String, u64>,
    } = "block_set_io_throttle" -> Nothing;
    /// Does several things to disks at once; with nothing to do, it drains their I/O (see
    /// [`transaction_drains`](crate::transaction_drains)).
    Transaction {
        /// What.
        actions: Vec<Value>,
    } = "transaction" -> Nothing;
    /// What is being done to disks in the background: mirrors, backups, commits.
    QueryBlockJobs {} = "query-block-jobs" -> Vec<BlockJob>;
    /// How block nodes hang together, for debugging.
    XDebugQueryBlockGraph {} = "x-debug-query-block-graph" -> BlockGraph;
    /// The VNC display.
    QueryVnc {} = "query-vnc" -> Vnc;
    /// The SPICE display.
    QuerySpice {} = "query-spice" -> Value;
    /// The character devices.
    QueryChardev {} = "query-chardev" -> Vec<ChardevInfo>;
    /// Everything that this QEMU's QMP has.
    QueryQmpSchema {} = "query-qmp-schema" -> Vec<SchemaEntry>;
    /// The block nodes: what disks are made of.
    QueryNamedBlockNodes {
        /// Without what is behind each, which is in the list anyway.
        flat: bool,
    } = "query-named-block-nodes" -> Vec<BlockNode>;
    /// What the monitor for humans says to this line, in words that may change with the version.
    HumanMonitorCommand {
        /// The line.
        command_line: String,
    } = "human-monitor-command" -> String;
    /// The properties of one of QEMU's objects, and the objects below it.
    QomList {
        /// Where the object is, such as `/machine/peripheral`.
        path: String,
    } = "qom-list" -> Vec<QomProperty>;
    /// A property of one of QEMU's objects.
    QomGet {
        /// Where the object is, such as `/machine`.
        path: String,
        /// The property.
        property: String,
    } = "qom-get" -> Value;
    /// The properties that a device of this type may be given.
    DeviceListProperties {
        /// Such as `virtio-blk-pci`.
        typename: String,
    } = "device-list-properties" -> Vec<DeviceProperty>;
    /// Makes an object; the properties are those of TLS credentials.
    ObjectAdd {
        /// Of which type.
        qom_type: String,
        /// What it will be called.
        id: String,
        /// `server` or `client`.
        endpoint: &'static str,
        /// Where its files are.
        dir: String,
        /// Whose key; the client's end only.
        #[serde(skip_serializing_if = "Option::is_none")]
        username: Option<String>,
        /// Which ciphers, in `GnuTLS`'s words.
        priority: String,
    } = "object-add" -> Nothing;
    /// Removes an object.
    ObjectDel {
        /// What it is called.
        id: String,
    } = "object-del" -> Nothing;
    /// Keeps the descriptor that is sent along, under this name. To be sent by
    /// [`execute_with_fds`](super::Qmp::execute_with_fds).
    Getfd {
        /// What it will be called.
        fdname: String,
    } = "getfd" -> Nothing;
    /// Closes a descriptor that `getfd` kept.
    Closefd {
        /// What it is called.
        fdname: String,
    } = "closefd" -> Nothing;
    /// Puts the descriptor that is sent along into a set, which opens as `/dev/fdset/N`. To be sent by
    /// [`execute_with_fds`](super::Qmp::execute_with_fds).
    AddFd {
        /// The set; a new one when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        fdset_id: Option<u64>,
        /// A word for whoever lists the sets.
        #[serde(skip_serializing_if = "Option::is_none")]
        opaque: Option<String>,
    } = "add-fd" -> AddedFd;
    /// Takes a descriptor, or all, out of a set.
    RemoveFd {
        /// The set.
        fdset_id: u64,
        /// The descriptor, by QEMU's number; all when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        fd: Option<u64>,
    } = "remove-fd" -> Nothing;
}

/// An answer that says no more than that it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Nothing {}

/// Answer to [`QueryStatus`].
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Whether the guest's CPUs run.
    pub running: bool,
    /// What QEMU does with the guest.
    pub status: RunState,
}

/// Answer to [`QueryVersion`]; displays as `10.0.2`.
#[derive(Clone, Debug, Deserialize)]
pub struct Version {
    /// The three numbers.
    pub qemu: VersionTriple,
    /// The packager's word, or empty.
    #[serde(default)]
    pub package: String,
}

impl Version {
    /// The version and the packager's word: what tells one build from another.
    pub fn build(&self) -> String {
        format!("{self} {}", self.package).trim_end().to_owned()
    }
}

/// A version's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct VersionTriple {
    /// The first.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.qemu.major, self.qemu.minor, self.qemu.micro)
    }
}

/// Answer to [`QueryKvm`].
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Kvm {
    /// It is used.
    pub enabled: bool,
    /// This QEMU was built with it.
    pub present: bool,
}

/// One processor of the guest.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    /// The thread of QEMU that runs it.
    pub thread_id: u32,
    /// Where its object is.
    pub qom_path: String,
}

/// A place for a processor.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuPlace {
    /// What fits there.
    #[serde(rename = "type")]
    pub kind: String,
    /// Which place: socket, core, thread.
    pub props: Value,
    /// Where the object of the one that is there is.
    pub qom_path: Option<String>,
}

/// Memory that is plugged in.
#[derive(Clone, Debug, Deserialize)]
pub struct MemoryDevice {
    /// Such as `dimm`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Which of its kind: `id`, `size`, `addr`.
    pub data: Value,
}

/// A disk or drive of the guest.
#[derive(Clone, Debug, Deserialize)]
pub struct Drive {
    /// What it is called; may be empty.
    pub device: String,
    /// The device that the guest has it by.
    pub qdev: Option<String>,
    /// What is in it.
    pub inserted: Option<Inserted>,
}

/// See [`Drive`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inserted {
    /// The file that the guest reads and writes.
    pub image: BlockImage,
    /// The node that the guest reads and writes.
    #[serde(default)]
    pub node_name: String,
    /// The rest of what QEMU says of it.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

/// A file of a disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockImage {
    /// A path, a URL, or a description in JSON.
    pub filename: String,
    /// Such as `qcow2`.
    pub format: String,
    /// In bytes, as the guest sees it.
    #[serde(default)]
    pub virtual_size: u64,
    /// How much of it is allocated, in bytes, where that is known.
    pub actual_size: Option<u64>,
    /// The file that has what this one does not.
    pub backing_image: Option<Box<BlockImage>>,
}

/// One machine type.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// Its name, such as `pc-q35-7.2`.
    pub name: String,
    /// Another name that means it in this version of QEMU, such as `q35`.
    pub alias: Option<String>,
    /// It is what a command line without a machine type gets.
    #[serde(default)]
    pub is_default: bool,
    /// A future QEMU will lack it.
    #[serde(default)]
    pub deprecated: bool,
    /// How many CPUs it may have.
    pub cpu_max: u32,
    /// What its RAM is called in a migration when `-m` alone was given.
    pub default_ram_id: Option<String>,
    /// What it sets that is not as it is in the newest.
    #[serde(default)]
    pub compat_props: Vec<CompatProperty>,
}

/// A property that a machine type sets, of devices of some type.
#[derive(Clone, Debug, Deserialize)]
pub struct CompatProperty {
    /// Its name.
    pub property: String,
    /// What it is.
    pub value: String,
}

/// One CPU model.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuDefinition {
    /// Its name.
    pub name: String,
    /// What keeps it from running with this accelerator on this host; absent when QEMU cannot tell.
    pub unavailable_features: Option<Vec<String>>,
    /// It means the same in every version of QEMU of this machine type, on every host.
    pub migration_safe: Option<bool>,
    /// Another name that means it.
    pub alias_of: Option<String>,
}

/// Answer to [`QueryMemorySizeSummary`], in bytes.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySizeSummary {
    /// What the guest started with.
    pub base_memory: u64,
    /// What was plugged in; absent when this machine cannot.
    pub plugged_memory: Option<u64>,
}

/// One memory backend.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Memdev {
    /// Its id; absent for one without.
    pub id: Option<String>,
    /// In bytes.
    pub size: u64,
    /// Other processes see what the guest writes; absent in older QEMUs.
    pub share: Option<bool>,
}

/// One block node.
#[derive(Clone, Debug, Deserialize)]
pub struct BlockNode {
    /// Its driver, such as `qcow2`.
    pub drv: String,
    /// What the host's cache is used for.
    pub cache: BlockCache,
    /// Its name; one that nobody named begins with `#`.
    #[serde(default, rename = "node-name")]
    pub node_name: String,
    /// Its file: a path, a URL, or a description in JSON.
    #[serde(default)]
    pub file: String,
    /// It is not written.
    #[serde(default)]
    pub ro: bool,
    /// What becomes of zeroes that the guest writes: `off`, `on` or `unmap`.
    #[serde(default)]
    pub detect_zeroes: String,
    /// It needs a key.
    #[serde(default)]
    pub encrypted: bool,
    /// What is in it; the versions that we know all tell.
    pub image: Option<BlockImage>,
}

impl BlockNode {
    /// A file or a device of this host, by its driver.
    pub fn is_of_this_host(&self) -> bool {
        ["file", "host_device", "host_cdrom"].contains(&self.drv.as_str())
    }
}

/// See [`BlockNode`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockCache {
    /// Nothing: the file is opened with `O_DIRECT`.
    pub direct: bool,
    /// Also for what the guest asks to be on the disk.
    #[serde(default)]
    pub no_flush: bool,
}

/// Answer to [`QueryVnc`].
#[derive(Clone, Debug, Deserialize)]
pub struct Vnc {
    /// Its port.
    pub service: Option<String>,
}

/// What is being done to a disk in the background.
#[derive(Clone, Debug, Deserialize)]
pub struct BlockJob {
    /// What it is called.
    pub device: String,
    /// Such as `mirror`.
    #[serde(rename = "type")]
    pub kind: String,
}

/// Answer to [`XDebugQueryBlockGraph`].
#[derive(Clone, Debug, Deserialize)]
pub struct BlockGraph {
    /// Nodes, and what uses them.
    pub nodes: Vec<GraphNode>,
    /// Who uses whom.
    pub edges: Vec<GraphEdge>,
}

/// See [`BlockGraph`].
#[derive(Clone, Debug, Deserialize)]
pub struct GraphNode {
    /// Its number in this answer.
    pub id: u64,
    /// A node's name.
    pub name: String,
}

/// See [`BlockGraph`].
#[derive(Clone, Debug, Deserialize)]
pub struct GraphEdge {
    /// The number of the one that uses.
    pub parent: u64,
    /// The number of the one that is used.
    pub child: u64,
    /// As what: `file`, `backing`, ...
    pub name: String,
}

/// What a device may be given.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceProperty {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is when it is not given, as far as that is known.
    pub default_value: Option<Value>,
}

/// One property of an object.
#[derive(Clone, Debug, Deserialize)]
pub struct QomProperty {
    /// Its name.
    pub name: String,
    /// Its type; `child<...>` for an object below.
    #[serde(rename = "type")]
    pub kind: String,
}

impl QomProperty {
    /// The type of the object that it is.
    pub fn child_type(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

/// One character device.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChardevInfo {
    /// Its id.
    pub label: String,
    /// What it is, such as `unix:/run/x.sock,server=on`.
    pub filename: String,
    /// Something in the guest holds it open.
    pub frontend_open: bool,
}

/// Answer to [`AddFd`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddedFd {
    /// The set that it is in.
    pub fdset_id: u64,
    /// Its number in QEMU.
    pub fd: u64,
}

/// A command, event or type of QMP. Types have numbers for names.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SchemaEntry {
    /// Its name.
    pub name: String,
    /// `command`, `event`, `object`, `enum`, ...
    pub meta_type: String,
    /// A command's arguments: the name of an object.
    pub arg_type: Option<String>,
    /// What an object has, or an enum's values.
    #[serde(default)]
    pub members: Vec<SchemaMember>,
    /// What an object has for some values of one of its members.
    #[serde(default)]
    pub variants: Vec<SchemaVariant>,
}

/// See [`SchemaEntry`].
#[derive(Clone, Debug, Deserialize)]
pub struct SchemaMember {
    /// Its name; those of an alternate have none.
    pub name: Option<String>,
}

/// See [`SchemaEntry`].
#[derive(Clone, Debug, Deserialize)]
pub struct SchemaVariant {
    /// The name of an object.
    #[serde(rename = "type")]
    pub kind: String,
}
