//! This host: its VMs, from the start of their QEMU to its end, and what everything else needs to know of it.

mod admission;
mod attendance;
mod console;
mod contents;
mod device_id;
mod disk_notes;
mod disks;
mod domains;
mod drift;
mod folders;
#[expect(clippy::module_inception, reason = "the host itself")]
mod host;
mod idle;
mod images;
mod launch;
mod lifecycle;
mod logs;
mod networks;
mod places;
mod qemus;
mod rest;
mod vm;

pub(crate) use admission::{Need, Promise, Short, resident_memory};
pub(crate) use attendance::Present;
pub(crate) use console::{Console, Viewer};
pub use contents::Content;
pub(crate) use contents::Contents;
pub(crate) use device_id::device_id;
pub(crate) use disk_notes::DiskNotes;
pub(crate) use disks::{Markers, marker_beside, sweep};
pub(crate) use domains::{Domains, SeenDomain};
pub(crate) use drift::{drift_of, keep_from_starting, record_drift};
pub(crate) use folders::{bind_anew, make_private_dir, remove_dir, write_durably};
pub(crate) use host::{Follower, Host, MOST_TRIALS, Trusts};
pub(crate) use idle::{Idle, IdleVm};
pub(crate) use images::{Images, beside};
pub(crate) use launch::describe;
pub(crate) use lifecycle::{adopt, check_name, pause, resume, run, set_autostart, start, stop};
pub(crate) use logs::bound_logs;
pub use networks::Plug;
pub(crate) use networks::{obstacle, plugs};
pub(crate) use places::{Placed, Places, no_such_disk};
pub(crate) use vm::{Claim, GLANCE, GRACE, PID_FILE, Stage, Vm, pid_from_file};
