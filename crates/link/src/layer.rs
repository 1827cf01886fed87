//! What wraps the bytes of a channel: TLS, WebSocket. A layer has no socket. It turns bytes into others, so that the
//! same one serves blocking threads and async tasks, and can lie over anything that carries bytes.

use std::io::{self, BufRead, IoSlice, Read};

/// Bytes in one form to bytes in another, both ways.
pub(crate) trait Layer: Send {
    /// Wraps these bytes and appends what is to be sent.
    fn wrap(&mut self, plain: &[IoSlice<'_>], out: &mut Vec<u8>) -> io::Result<()>;

    /// Unwraps into `plain` as much as it takes, feeding on `arrived` as far as necessary.
    fn unwrap(&mut self, arrived: &mut &[u8], plain: &mut [u8]) -> io::Result<Unwrapped>;

    /// Appends what says that nothing follows.
    fn end(&mut self, out: &mut Vec<u8>) -> io::Result<()>;

    /// The connection, if the layer is TLS.
    fn into_tls(self: Box<Self>) -> Option<rustls::Connection> {
        None
    }
}

/// What came out of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unwrapped {
    /// So many bytes; none means that more must arrive first.
    Bytes(usize),
    /// The other side said that nothing follows.
    End,
}

/// TLS, whose handshake is over. rustls decides everything; this only moves bytes.
pub(crate) struct Tls(pub(crate) rustls::Connection);

impl Tls {
    pub(crate) fn new(connection: impl Into<rustls::Connection>) -> Self {
        let mut connection = connection.into();
        // What is wrapped is taken out at once, so that nothing piles up in there.
        connection.set_buffer_limit(None);
        Self(connection)
    }

    fn take_out(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        while self.0.wants_write() {
            self.0.write_tls(out)?;
        }
        Ok(())
    }
}

impl Layer for Tls {
    fn wrap(&mut self, plain: &[IoSlice<'_>], out: &mut Vec<u8>) -> io::Result<()> {
        let length: usize = plain.iter().map(|slice| slice.len()).sum();
        let written = io::Write::write_vectored(&mut self.0.writer(), plain)?;
        if written != length {
            return Err(io::Error::other("TLS did not take all bytes"));
        }
        self.take_out(out)
    }

    fn unwrap(&mut self, arrived: &mut &[u8], plain: &mut [u8]) -> io::Result<Unwrapped> {
        let mut filled = 0;
        loop {
            let mut reader = self.0.reader();
            while filled < plain.len() {
                match reader.fill_buf() {
                    // Closed in order; what came before must be given out first.
                    Ok([]) if filled == 0 => return Ok(Unwrapped::End),
                    Ok([]) => return Ok(Unwrapped::Bytes(filled)),
                    Ok(chunk) => {
                        let length = chunk.len().min(plain.len() - filled);
                        plain[filled..filled + length].copy_from_slice(&chunk[..length]);
                        reader.consume(length);
                        filled += length;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            if filled == plain.len() || arrived.is_empty() {
                return Ok(Unwrapped::Bytes(filled));
            }
            self.0.read_tls(arrived as &mut dyn Read)?;
            self.0.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        self.0.send_close_notify();
        self.take_out(out)
    }

    fn into_tls(self: Box<Self>) -> Option<rustls::Connection> {
        Some(self.0)
    }
}
