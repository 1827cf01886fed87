//! QEMU, as the rest of vmferry sees it: its monitor ([`qmp`]), its command line ([`command_line`]), starting it
//! ([`launch`](mod@launch)), what it writes ([`log`]), what we use of its migration ([`migration`]), the process that it is
//! ([`process`]) and what that uses ([`processors`]), what its guest's RAM ([`ram`]) and the whole machine ([`inventory`])
//! are made of, and what a binary can do on this host ([`host`]).

pub mod command_line;
pub mod disk_place;
pub mod drift;
pub mod host;
pub mod images;
pub mod inventory;
pub mod io_limits;
pub mod launch;
pub mod log;
pub mod migration;
pub mod proc_stat;
pub mod process;
pub mod processors;
pub mod qcow2;
pub mod qmp;
pub mod ram;
mod stream_tls;

pub use command_line::{CommandLine, CommandLineError, FileKind, FileUse, ImageWords, Network};
pub use disk_place::{BadPlace, DiskPlace, is_same_place, place_in_words};
pub use drift::Drift;
pub use host::{
    Accel, CpuModel, EXPORT, ImageServer, Kvm, Machine, NewImage, PROBE, ProbeError, QemuInfo, SetByMachine,
    find_binary, probe_qemu, transaction_drains, try_kvm, try_node,
};
pub use images::{DiskImage, WrittenImage, disk_images, written_images};
pub use inventory::{Inventory, Layer};
pub use io_limits::IoLimits;
pub use launch::{
    Incoming, LaunchError, LaunchPlan, LaunchSettings, Launched, chosen_accelerator, guest_ram, launch, plan_launch,
    wants_shared_ram, without_ours,
};
pub use process::{end_with_us, is_same_process, kill_process, process_command_line, process_cwd, process_start_time};
pub use qcow2::Qcow2;
pub use qmp::{Command, Event, EventStream, Features, MigrationStatus, Qmp, QmpError, RunState, pid_of_socket_peer};
pub use ram::{BackendKind, Obstacle, RamBackend, RamLayout, external_obstacles, ram_backends, uses_direct_io};
pub use stream_tls::{
    Endpoint, StreamKey, StreamTlsError, protect_streams, tls_carries, tls_priority, unprotect_streams,
};
