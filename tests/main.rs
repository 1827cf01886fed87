//! Whole-system tests: real QEMU, a real Linux guest that writes to its memory, two agents, the real command line.
//!
//! They run on the loopback address with a capped bandwidth where that is enough, so that they need no root; those that
//! need a real link between two hosts make network namespaces and say so in their name.

mod api;
mod bed;
mod bench;
mod ceph;
mod copy;
mod crashes;
mod decisions;
mod demo;
mod direct_io;
mod disk_figures;
mod disk_move;
mod disks;
mod docs;
mod external;
mod external_faults;
mod filesystems;
mod generator;
mod kvm;
mod libvirt;
mod libvirt_bed;
mod machines;
mod many_vms;
mod migrate;
mod moving;
mod places;
mod policies;
mod predict;
mod proxy;
mod queue;
mod refusals;
mod states;
mod storages;
mod torture;
mod trust;
mod tune;
mod vms;
