//! The four ways that Daniel Berrange compared on libvirt's mailing list in 2009, when migration was to be encrypted:
//! QEMU's own TCP, plain; a TLS connection of its own between the two daemons ("side channel"); and through the
//! daemons' existing RPC connection, with an answer to each message or without ("fire and forget").
//!
//! The source and the destination stand for QEMU and speak through a Unix socket with their daemon, as QEMU did.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use vmferry_link::Acceptor;

use super::cost::{Idle, with_cpu};
use super::{LinkBenchError, Loopback, Measured, today};

/// The most that fitted into a message of libvirt's RPC, in bytes.
const MESSAGE: usize = 256 << 10;
const CONNECT: Duration = Duration::from_secs(5);

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Plain,
    SideChannel,
    Acknowledged,
    FireAndForget,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [Self::Plain, Self::SideChannel, Self::Acknowledged, Self::FireAndForget];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "2009: plain",
            Self::SideChannel => "2009: TLS side channel",
            Self::Acknowledged => "2009: daemon, each message answered",
            Self::FireAndForget => "2009: daemon, fire and forget",
        }
    }
}

pub(super) fn measure(bench: &Loopback, way: Way, time: Duration) -> Result<Measured, LinkBenchError> {
    if way == Way::Plain {
        return today::plain_tcp(&bench.random, 1, time);
    }
    let (mut source, from_source) = UnixStream::pair()?;
    let (to_destination, mut destination) = UnixStream::pair()?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let idle = Idle::begin();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || with_cpu(move || today::pour(&bench.random, &mut source, begun + time)));
        let source_daemon = scope.spawn(move || {
            with_cpu(|| {
                one_thread()?.block_on(async {
                    let from = tokio_socket(from_source)?;
                    let there = [bench.destination.fingerprint()];
                    let to = vmferry_link::connect(&address, &bench.source, &there, None, CONNECT).await?;
                    Ok(pass_on(way, from, to.io).await?)
                })
            })
        });
        let destination_daemon = scope.spawn(move || {
            with_cpu(|| {
                one_thread()?.block_on(async {
                    listener.set_nonblocking(true)?;
                    let listener = tokio::net::TcpListener::from_std(listener)?;
                    let (tcp, _) = listener.accept().await?;
                    let from = Acceptor::new(&bench.destination, None).accept(tcp, CONNECT).await?;
                    Ok(take_in(way, from.io, tokio_socket(to_destination)?).await?)
                })
            })
        });
        let taking = scope.spawn(move || with_cpu(move || today::drain(&mut destination)));
        let joined = "it does not panic";
        let (sent, source_cpu) = sending.join().expect(joined);
        let (passed, source_daemon_cpu): (Result<(), LinkBenchError>, _) = source_daemon.join().expect(joined);
        let (taken, destination_daemon_cpu): (Result<(), LinkBenchError>, _) = destination_daemon.join().expect(joined);
        let (drained, destination_cpu) = taking.join().expect(joined);
        passed?;
        taken?;
        drained?;
        Ok(Measured {
            bytes: sent?,
            took: begun.elapsed(),
            source_cpu: Some(source_cpu + source_daemon_cpu),
            destination_cpu: Some(destination_cpu + destination_daemon_cpu),
            idle: idle.share(),
            ..Measured::default()
        })
    })
}

/// A daemon has one thread for all that it reads and writes, as libvirt's had.
fn one_thread() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn tokio_socket(socket: UnixStream) -> std::io::Result<tokio::net::UnixStream> {
    socket.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(socket)
}

/// The source's daemon.
async fn pass_on(
    way: Way,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncRead + AsyncWrite + Unpin,
) -> std::io::Result<()> {
    let mut message = vec![0; 4 + MESSAGE];
    loop {
        let count = from.read(&mut message[4..]).await?;
        if count == 0 {
            break;
        }
        message[..4].copy_from_slice(&(count as u32).to_be_bytes());
        let head = if way == Way::SideChannel { 4 } else { 0 };
        to.write_all(&message[head..4 + count]).await?;
        to.flush().await?;
        if way == Way::Acknowledged {
            to.read_u32().await?;
        }
    }
    to.shutdown().await
}

/// The destination's daemon.
async fn take_in(
    way: Way,
    mut from: impl AsyncRead + AsyncWrite + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> std::io::Result<()> {
    let mut message = vec![0; MESSAGE];
    loop {
        let count = match way {
            Way::SideChannel => from.read(&mut message).await?,
            _ => match from.read_u32().await {
                Ok(count) => {
                    let count = (count as usize).min(MESSAGE);
                    from.read_exact(&mut message[..count]).await?
                }
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => 0,
                Err(error) => return Err(error),
            },
        };
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&message[..count]).await?;
        if way == Way::Acknowledged {
            from.write_u32(count as u32).await?;
            from.flush().await?;
        }
    }
}
