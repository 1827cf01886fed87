//! NBD, the Network Block Device protocol: a disk over a stream of bytes, as QEMU, nbdkit, libnbd and the Linux kernel
//! speak it.
//!
//! The protocol is in state machines without sockets and without a clock: [`handshake`], and [`transmission`] after it.
//! They are the same whatever carries the bytes, and tests can put any bytes before them.

pub mod backend;
mod blocks;
pub mod carry;
pub mod client;
pub mod copy;
pub mod handshake;
pub mod known;
pub mod limits;
pub mod server;
mod session;
mod sums;
pub mod tls;
pub mod transfer;
pub mod transmission;
pub mod uri;
mod wire;

pub use session::{Abilities, BlockSizes, Export, Headers, Session};
pub use wire::ErrorCode;
