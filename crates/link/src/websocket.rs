//! WebSocket as a layer: for networks that let nothing but HTTP pass. Bytes go in binary messages whose limits mean
//! nothing, but that an empty one ends a direction: WebSocket's own closing ends both. `tungstenite` does the protocol; it works on buffers here, so that it can lie over anything.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tungstenite::handshake::client::{ClientHandshake, Request};
use tungstenite::handshake::server::{NoCallback, ServerHandshake};
use tungstenite::handshake::{HandshakeError, HandshakeRole, MidHandshake};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Error, Message, WebSocket};

use crate::channel::Channel;
use crate::layer::{Layer, Unwrapped};

/// The largest message that is taken; what is sent has at most a quarter of this.
const LARGEST: usize = 1 << 20;
/// Bytes that are read at once in the handshake.
const HANDSHAKE: usize = 4096;

impl Channel {
    /// With WebSocket over it, as the side that asks, for this path at this host.
    pub fn with_websocket(self, host: &str, path: &str, within: Duration) -> io::Result<Self> {
        let request = Request::builder()
            .uri(format!("ws://{host}{path}"))
            .header("Host", host)
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", tungstenite::handshake::client::generate_key())
            .body(())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let begun = ClientHandshake::start(Pipe::default(), request, Some(config())).map_err(failed)?;
        shake(self, begun, within, |(socket, _)| socket)
    }

    /// With WebSocket over it, as the side that is asked.
    pub fn accept_websocket(self, within: Duration) -> io::Result<Self> {
        let begun = ServerHandshake::start(Pipe::default(), NoCallback, Some(config()));
        shake(self, begun, within, |socket| socket)
    }
}

/// Carries bytes between the channel and the handshake until that is over.
fn shake<R: HandshakeRole<InternalStream = Pipe>>(
    mut channel: Channel,
    mut handshake: MidHandshake<R>,
    within: Duration,
    socket: impl FnOnce(R::FinalResult) -> WebSocket<Pipe>,
) -> io::Result<Channel> {
    channel.set_deadline(Some(Instant::now() + within));
    let mut socket = loop {
        match handshake.handshake() {
            Ok(result) => break socket(result),
            Err(HandshakeError::Interrupted(middle)) => handshake = middle,
            Err(HandshakeError::Failure(error)) => return Err(failed(error)),
        }
        let pipe = handshake.get_mut().get_mut();
        channel.write_all(&std::mem::take(&mut pipe.leaving))?;
        let mut bytes = [0; HANDSHAKE];
        let length = channel.read(&mut bytes)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        pipe.arrived.extend(&bytes[..length]);
    };
    channel.write_all(&std::mem::take(&mut socket.get_mut().leaving))?;
    channel.set_deadline(None);
    channel.push(Box::new(BinaryMessages { socket, message: Bytes::new() }));
    Ok(channel)
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(LARGEST)).max_frame_size(Some(LARGEST))
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

/// What tungstenite takes for a socket: two buffers.
#[derive(Default)]
struct Pipe {
    arrived: Vec<u8>,
    leaving: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.arrived.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let length = into.len().min(self.arrived.len());
        into[..length].copy_from_slice(&self.arrived[..length]);
        self.arrived.drain(..length);
        Ok(length)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.leaving.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct BinaryMessages {
    socket: WebSocket<Pipe>,
    /// What is left of the message that is being read.
    message: Bytes,
}

impl BinaryMessages {
    fn send(&mut self, message: Vec<u8>, out: &mut Vec<u8>) -> io::Result<()> {
        self.socket.send(Message::Binary(message.into())).map_err(failed)?;
        out.append(&mut self.socket.get_mut().leaving);
        Ok(())
    }
}

impl Layer for BinaryMessages {
    fn wrap(&mut self, plain: &[IoSlice<'_>], out: &mut Vec<u8>) -> io::Result<()> {
        let mut message = Vec::with_capacity(plain.iter().map(|slice| slice.len()).sum());
        for slice in plain {
            message.extend_from_slice(slice);
        }
        if message.is_empty() {
            return Ok(());
        }
        self.send(message, out)
    }

    fn unwrap(&mut self, arrived: &mut &[u8], plain: &mut [u8]) -> io::Result<Unwrapped> {
        loop {
            if !self.message.is_empty() {
                let length = plain.len().min(self.message.len());
                plain[..length].copy_from_slice(&self.message.split_to(length));
                return Ok(Unwrapped::Bytes(length));
            }
            match self.socket.read() {
                Ok(Message::Binary(message)) if !message.is_empty() => self.message = message,
                Ok(Message::Binary(_) | Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => {
                    return Ok(Unwrapped::End);
                }
                Ok(Message::Text(_)) => return Err(io::ErrorKind::InvalidData.into()),
                // A pong goes out with what is written next.
                Ok(_) => {}
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    if arrived.is_empty() {
                        return Ok(Unwrapped::Bytes(0));
                    }
                    self.socket.get_mut().arrived.extend_from_slice(arrived);
                    *arrived = &[];
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        self.send(Vec::new(), out)
    }
}
