//! What the kernel is told about the TCP connection of a stream.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::SockRef;

/// When so long nothing that was sent is acknowledged, the connection is broken. Also how long the other side may say
/// nothing at all: together with a ping each second, a dead peer is noticed within 5 s.
pub(crate) const SILENCE: Duration = Duration::from_secs(4);
/// Bytes that may wait in the kernel to be sent: enough to keep the wire busy between two writes, and little enough
/// that what is written next (a ping, an ack, a changed compression) does not wait long.
const NOT_SENT: u32 = 256 << 10;

/// Prepares a connection to be a stream.
pub(crate) fn tune(tcp: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(tcp);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(SILENCE))?;
    socket.set_tcp_notsent_lowat(NOT_SENT)?;
    // BBR keeps queues on the way short. Where the kernel lacks it, or does not allow it, its default stays.
    let _ = socket.set_tcp_congestion(b"bbr");
    Ok(())
}
