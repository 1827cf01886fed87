//! How much of everything there may be. A peer can make us hold no more than this, however it behaves.

use std::time::Duration;

/// The longest name or other text, as the protocol has it.
pub const NAME: usize = 4096;
/// The longest option or answer to one. The longest sensible one has two names and a few numbers.
pub const OPTION: usize = 64 << 10;
/// How many options a client may send before it has chosen.
pub const OPTIONS: u32 = 64;
/// How many exports or contexts a server may list.
pub const LISTED: usize = 10_000;
/// The most bytes that one request may bring or fetch: what the protocol calls portable.
pub const PAYLOAD: u32 = 32 << 20;
/// How many descriptors a block status tells at once.
pub const DESCRIPTORS: usize = 8192;
/// How many are taken from a server at once: as many as the protocol lets it send.
pub const DESCRIPTORS_TAKEN: usize = 1 << 20;
/// How many requests of a connection are worked on at once, besides the one that is being read.
pub const REQUESTS: usize = 16;
/// How many bytes the requests of one connection may hold.
pub const BYTES: u64 = 64 << 20;
/// And those of all connections of a server.
pub const BYTES_OF_ALL: u64 = 256 << 20;
/// How many connections a server has at once.
pub const CONNECTIONS: usize = 128;
/// How long a handshake may take, TLS and all.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// What has begun to arrive, or waits to be taken by the other side, has this long ...
pub const STALL: Duration = Duration::from_secs(30);
/// ... and a second for each so many bytes, so that a slow link is no reason to give up, and trickling is.
pub const SLOWEST: u64 = 64 << 10;
