//! Making and taking channels at an [`Address`], and passing descriptors to a process on this host.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::channel::{Channel, wait_for};
use crate::{Address, tuning};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// Descriptors that are passed at once.
pub const MOST_DESCRIPTORS: usize = 8;

impl Channel {
    /// Connects within this time (looking up a name is not included). A descriptor is taken over as a duplicate: the
    /// number itself stays open.
    pub fn connect(address: &Address, within: Duration) -> io::Result<Self> {
        let descriptor = match address {
            Address::Tcp(address) => {
                let tcp = connect_tcp(address, within)?;
                tuning::tune(&tcp)?;
                tcp.into()
            }
            Address::Unix(path) => {
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                // Connecting waits while too many others do, for as long as a write would.
                socket.set_write_timeout(Some(within))?;
                socket.connect(&SockAddr::unix(path)?).map_err(|error| match error.kind() {
                    io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
                    _ => error,
                })?;
                socket.set_write_timeout(None)?;
                socket.into()
            }
            Address::Vsock { cid, port } => {
                let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
                socket.connect_timeout(&SockAddr::vsock(*cid, *port), within)?;
                socket.into()
            }
            Address::Descriptor(number) => inherited(*number)?,
        };
        Ok(Self::over(descriptor))
    }

    /// Passes descriptors with these bytes, which must not be none, over a Unix socket.
    pub fn send_descriptors(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
        }
        let sent = sendmsg(self.descriptor(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Takes bytes that were sent with descriptors, and those. Nothing may have been read ahead: the two sides must
    /// have agreed that this comes next.
    pub fn receive_descriptors(&self, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(self.descriptor(), &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                descriptors.extend(some);
            }
        }
        Ok((received.bytes, descriptors))
    }
}

pub(crate) fn connect_tcp(address: &str, within: Duration) -> io::Result<TcpStream> {
    let deadline = Instant::now() + within;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(tcp) => return Ok(tcp),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A duplicate of a descriptor that this process was given open. By way of the kernel, which checks that it is one.
fn inherited(number: u32) -> io::Result<OwnedFd> {
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, number as i32, PidfdGetfdFlags::empty())?)
}

/// Takes channels.
pub struct Listener {
    socket: Socket,
    tcp: bool,
}

impl Listener {
    /// Listens at this address; a socket file that nobody listens on any more is replaced.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let socket = match address {
            Address::Tcp(address) => return Ok(Self { socket: TcpListener::bind(address)?.into(), tcp: true }),
            Address::Unix(path) => {
                let address = SockAddr::unix(path)?;
                let nobody = Socket::new(Domain::UNIX, Type::STREAM, None)?.connect(&address);
                if nobody.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                    fs::remove_file(path)?;
                }
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                socket.bind(&address)?;
                socket
            }
            Address::Vsock { cid, port } => {
                let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
                socket.bind(&SockAddr::vsock(*cid, *port))?;
                socket
            }
            Address::Descriptor(number) => return Ok(Self { socket: inherited(*number)?.into(), tcp: false }),
        };
        socket.listen(BACKLOG)?;
        Ok(Self { socket, tcp: false })
    }

    /// The next channel, within this time.
    pub fn accept(&self, within: Duration) -> io::Result<Channel> {
        wait_for(self.socket.as_fd(), PollFlags::IN, within)?;
        let (socket, _) = self.socket.accept()?;
        if self.tcp {
            tuning::tune(&socket)?;
        }
        Ok(Channel::over(socket))
    }

    /// The TCP port that it listens on, where there is one: for port 0, the kernel's choice.
    pub fn port(&self) -> Option<u16> {
        Some(self.socket.local_addr().ok()?.as_socket()?.port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{Acceptor, connect_stream};
    use crate::{Fingerprint, Identity};
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const SOON: Duration = Duration::from_secs(5);
    const LENGTH: usize = 3 << 20;

    /// What lies over a channel.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Over {
        Nothing,
        Tls,
        WebSocket,
        WebSocketInTls,
        TlsInWebSocket,
    }

    const ALL: [Over; 5] = [Over::Nothing, Over::Tls, Over::WebSocket, Over::WebSocketInTls, Over::TlsInWebSocket];

    struct Peers {
        asking: Identity,
        asked: Identity,
        dir: tempfile::TempDir,
    }

    fn peers() -> Peers {
        let dir = tempfile::tempdir().unwrap();
        let make = |name| Identity::load_or_make(&dir.path().join(name), name).unwrap();
        Peers { asking: make("alpha"), asked: make("beta"), dir }
    }

    fn ask_tls(mut channel: Channel, identity: &Identity, expected: Fingerprint) -> Channel {
        let connection = connect_stream(&mut channel, "beta", identity, expected, None).unwrap();
        channel.with_tls(connection)
    }

    fn accept_tls(mut channel: Channel, identity: &Identity) -> Channel {
        let mut tls = rustls::ServerConnection::new(Acceptor::new(identity, None).config()).unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut channel).unwrap();
        }
        channel.with_tls(tls)
    }

    impl Over {
        fn ask(self, channel: Channel, peers: &Peers) -> Channel {
            let tls = |channel| ask_tls(channel, &peers.asking, peers.asked.fingerprint());
            let websocket = |channel: Channel| channel.with_websocket("beta", "/link", SOON).unwrap();
            match self {
                Self::Nothing => channel,
                Self::Tls => tls(channel),
                Self::WebSocket => websocket(channel),
                Self::WebSocketInTls => websocket(tls(channel)),
                Self::TlsInWebSocket => tls(websocket(channel)),
            }
        }

        fn accept(self, channel: Channel, identity: &Identity) -> Channel {
            let websocket = |channel: Channel| channel.accept_websocket(SOON).unwrap();
            match self {
                Self::Nothing => channel,
                Self::Tls => accept_tls(channel, identity),
                Self::WebSocket => websocket(channel),
                Self::WebSocketInTls => websocket(accept_tls(channel, identity)),
                Self::TlsInWebSocket => accept_tls(websocket(channel), identity),
            }
        }
    }

    /// Both ends, connected at this address.
    fn pair(address: &Address, over: Over, peers: &Peers) -> (Channel, Channel) {
        let listener = Listener::bind(address).unwrap();
        let there = match (address, listener.port()) {
            (Address::Tcp(_), Some(port)) => Address::Tcp(format!("127.0.0.1:{port}")),
            _ => address.clone(),
        };
        let identity = peers.asked.clone();
        let accepting = std::thread::spawn(move || over.accept(listener.accept(SOON).unwrap(), &identity));
        let asking = over.ask(Channel::connect(&there, SOON).unwrap(), peers);
        (asking, accepting.join().unwrap())
    }

    fn addresses(peers: &Peers) -> Vec<Address> {
        let mut addresses =
            vec![Address::Tcp("127.0.0.1:0".into()), Address::Unix(peers.dir.path().join("channel.sock"))];
        // Within one host, vsock needs a kernel with vsock_loopback.
        let vsock = Address::Vsock { cid: 1, port: 7420 };
        if Listener::bind(&vsock).is_ok_and(|_listener| Channel::connect(&vsock, SOON).is_ok()) {
            addresses.push(vsock);
        }
        addresses
    }

    fn bytes() -> Vec<u8> {
        (0..LENGTH).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    /// Sends everything in uneven parts while everything is received, and then the end.
    fn exchange(channel: Channel) {
        let (mut reader, mut writer) = channel.split();
        let writing = std::thread::spawn(move || {
            let sent = bytes();
            let (one, rest) = sent.split_at(1);
            let (two, three) = rest.split_at(700_000);
            let mut slices = [IoSlice::new(one), IoSlice::new(&[]), IoSlice::new(two), IoSlice::new(three)];
            writer.write_all_vectored(&mut slices).unwrap();
            writer.end().unwrap();
        });
        let mut received = vec![0; LENGTH];
        // Small and large reads, as headers and payloads.
        let (head, rest) = received.split_at_mut(28);
        reader.read_exact(head).unwrap();
        reader.read_exact(rest).unwrap();
        assert!(received == bytes());
        assert_eq!(reader.read(&mut [0; 10]).unwrap(), 0, "the end is seen as one");
        writing.join().unwrap();
    }

    #[test]
    fn bytes_pass_whole_in_both_directions_whatever_carries_them_and_whatever_lies_over_it() {
        let peers = peers();
        for address in addresses(&peers) {
            for over in ALL {
                let (asking, accepting) = pair(&address, over, &peers);
                assert_eq!(
                    asking.is_protected(),
                    matches!(over, Over::Tls | Over::WebSocketInTls | Over::TlsInWebSocket)
                );
                let there = std::thread::spawn(move || exchange(accepting));
                exchange(asking);
                there.join().unwrap();
            }
        }
    }

    #[test]
    fn tasks_see_the_same_bytes_as_threads() {
        let peers = peers();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for over in ALL {
            let (asking, accepting) = pair(&addresses(&peers)[0], over, &peers);
            let there = std::thread::spawn(move || exchange(accepting));
            runtime.block_on(async {
                let (mut reader, mut writer) = tokio::io::split(asking.into_async().unwrap());
                let writing = async {
                    writer.write_all(&bytes()).await.unwrap();
                    writer.flush().await.unwrap();
                    writer.shutdown().await.unwrap();
                };
                let mut received = Vec::new();
                let (read, ()) = tokio::join!(reader.read_to_end(&mut received), writing);
                read.unwrap();
                assert!(received == bytes(), "{over:?}");
            });
            there.join().unwrap();
        }
    }

    #[test]
    fn an_inherited_descriptor_is_a_channel_and_a_closed_one_is_not() {
        let (one, other) = UnixStream::pair().unwrap();
        let address: Address = format!("fd:{}", one.as_raw_fd()).parse().unwrap();
        let mut channel = Channel::connect(&address, SOON).unwrap();
        channel.write_all(b"hello").unwrap();
        let mut said = [0; 5];
        (&other).read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello");
        assert!(Channel::connect(&Address::Descriptor(1 << 20), SOON).is_err());
    }

    #[test]
    fn a_descriptor_passes_over_a_unix_socket() {
        let (one, other) = UnixStream::pair().unwrap();
        let (one, other) = (Channel::over(one), Channel::over(other));
        let (mut kept, passed) = UnixStream::pair().unwrap();
        one.send_descriptors(b"take this", &[passed.as_fd()]).unwrap();
        drop(passed);
        let mut said = [0; 100];
        let (length, mut descriptors) = other.receive_descriptors(&mut said).unwrap();
        assert_eq!((&said[..length], descriptors.len()), (&b"take this"[..], 1));
        let mut received = Channel::over(descriptors.remove(0));
        received.write_all(b"it works").unwrap();
        drop(received);
        let mut said = String::new();
        kept.read_to_string(&mut said).unwrap();
        assert_eq!(said, "it works");
    }

    #[test]
    fn waiting_has_an_end() {
        let peers = peers();
        let moment = Duration::from_millis(50);
        for address in addresses(&peers) {
            let listener = Listener::bind(&address).unwrap();
            let error = listener.accept(moment).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
        let (mut one, _other) = pair(&addresses(&peers)[0], Over::Tls, &peers);
        one.set_deadline(Some(Instant::now() + moment));
        assert_eq!(one.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (one, _other) = UnixStream::pair().unwrap();
        let error = Channel::over(one).with_websocket("beta", "/", moment).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn an_end_without_a_word_from_tls_is_a_break() {
        let peers = peers();
        let (mut one, other) = pair(&addresses(&peers)[0], Over::Tls, &peers);
        other.cutter().cut();
        let error = one.read(&mut [0; 1]).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset), "{error}");
    }

    #[test]
    fn a_write_that_waits_stops_no_read() {
        let peers = peers();
        let (one, other) = pair(&addresses(&peers)[0], Over::Tls, &peers);
        let cutter = one.cutter();
        let (mut reader, mut writer) = one.split();
        // Nobody reads this, so that it waits for ever.
        let stuck = std::thread::spawn(move || while writer.write_all(&vec![7; 1 << 20]).is_ok() {});
        std::thread::sleep(Duration::from_millis(300));
        let (_unread, mut there) = other.split();
        there.write_all(b"still there").unwrap();
        let mut said = [0; 11];
        reader.set_deadline(Some(Instant::now() + SOON));
        reader.read_exact(&mut said).unwrap();
        assert!(!stuck.is_finished());
        cutter.cut();
        stuck.join().unwrap();
    }
}
