//! A client of libvirt's own RPC, over the Unix socket of the libvirt on this host.
//!
//! libvirt's library would do the same, but a program that links it does not start where it is missing, and it blocks a
//! thread for each call. What an agent needs of the protocol is small: a frame has a length and a header of six numbers
//! ([`frame`]), what is in it is XDR ([`xdr`]), and some twenty procedures are called ([`call`]). libvirt has kept their
//! numbers and arguments since they were made, as libraries and daemons of different versions talk to each other.
//!
//! [`xdr`], [`frame`], [`call`], [`event`], [`Conversation`] and [`Gate`] do no I/O. [`Connection`] drives a conversation
//! over a socket, [`Libvirt`] is what its user calls. [`Gate`] is for an agent that lends its libvirt's socket to another
//! host's libvirt for one migration.
//!
//! Whatever the other side says is bounded, and an error if it makes no sense.

pub mod call;
mod client;
mod connection;
mod conversation;
mod domain;
pub mod event;
pub mod frame;
mod gate;
mod param;
pub mod xdr;
mod xml;

pub use client::{Libvirt, Migration};
pub use connection::{Connection, ConnectionError};
pub use conversation::{Conversation, Heard, RemoteError};
pub use domain::{DirtyRate, Domain, Info, Job, JobKind, PausedWhy, RunState, State};
pub use event::Event;
pub use gate::{Announced, Gate, Verdict};
pub use param::{Param, Params, Value};
pub use xml::{Description, Disk, DiskKind, InvalidXml, Manager, qemu_user};
