//! A channel is one pipe of bytes. It does not matter to its users whether that is TCP, a Unix socket, vsock, or a
//! descriptor that was inherited, nor what lies over it (TLS, WebSocket).
//!
//! This is the face for threads: it [splits](Channel::split) into a half that reads and a half that writes, and a
//! [`Cutter`] that ends both. The halves share what the layers know behind a lock that is held while bytes are sealed
//! or opened and never while the kernel is asked, so that a write that has to wait stops no read.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::layer::{Layer, Tls, Unwrapped};
use crate::records::{Opened, Opener, Sealer, records};

/// How much is sealed and written at once; a TLS record has 16 KiB, so the lock is held for a few microseconds each.
const WRITE: usize = 256 << 10;
/// How much is read at once under a layer.
const READ: usize = 256 << 10;
/// How much is read ahead where there is no layer: enough for small frames, and little to copy of large ones.
const READ_AHEAD: usize = 32 << 10;

type Shared = Arc<Mutex<Box<dyn Layer>>>;

/// See the module's text.
pub struct Channel {
    reader: ReadHalf,
    writer: WriteHalf,
    protected: bool,
}

impl Channel {
    /// Over a descriptor that is connected and in blocking mode.
    pub fn over(descriptor: impl Into<OwnedFd>) -> Self {
        let descriptor = Arc::new(descriptor.into());
        let reader = ReadHalf {
            descriptor: Arc::clone(&descriptor),
            layers: Vec::new(),
            arrived: vec![Buffer::new(READ_AHEAD)],
            opener: None,
            wait: Wait::Forever,
        };
        let writer = WriteHalf {
            descriptor,
            layers: Vec::new(),
            staged: Vec::new(),
            written: 0,
            scratch: Vec::new(),
            sealer: None,
            ended: false,
        };
        Self { reader, writer, protected: false }
    }

    /// With TLS over it, whose handshake is over and in which both sides have proved who they are.
    #[must_use]
    pub fn with_tls(mut self, connection: impl Into<rustls::Connection>) -> Self {
        self.push(Box::new(Tls::new(connection)));
        self.protected = true;
        self
    }

    pub(crate) fn push(&mut self, layer: Box<dyn Layer>) {
        let layer = Arc::new(Mutex::new(layer));
        // What was read ahead is the new layer's now.
        match self.reader.layers.len() {
            0 => self.reader.arrived[0].grow(READ),
            _ => self.reader.arrived.push(Buffer::new(READ)),
        }
        self.reader.layers.push(Arc::clone(&layer));
        self.writer.layers.push(layer);
    }

    /// Whether bytes are authenticated on their way.
    pub fn is_protected(&self) -> bool {
        self.protected
    }

    /// Reads fail with `TimedOut` from this moment on.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.reader.set_deadline(deadline);
    }

    /// Both directions, each for a thread of its own.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        (self.reader, self.writer)
    }

    /// What ends it from any thread.
    pub fn cutter(&self) -> Cutter {
        Cutter(Arc::clone(&self.reader.descriptor))
    }

    pub(crate) fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.reader.descriptor
    }
}

impl Read for Channel {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.reader.read(into)
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.writer.write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// From here on both halves of a channel that has TLS and nothing else over it make and open the records themselves,
/// which is faster and needs no lock. Whoever calls this has heard all that the other side says until it is answered.
pub(crate) fn take_records(reader: &mut ReadHalf, writer: &mut WriteHalf) -> io::Result<()> {
    if reader.layers.len() != 1 {
        return Ok(());
    }
    writer.layers.clear();
    let layer = reader.layers.pop().and_then(Arc::into_inner).and_then(|layer| layer.into_inner().ok());
    let mut tls = layer.and_then(Layer::into_tls).ok_or_else(|| io::Error::other("TLS is in use"))?;
    let unread = tls.process_new_packets().map_or(0, |state| state.plaintext_bytes_to_read());
    if unread > 0 || !reader.arrived[0].is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more was said than was asked for"));
    }
    let (sealer, opener) = records(tls.dangerous_extract_secrets().map_err(io::Error::other)?)?;
    (reader.opener, writer.sealer) = (Some(opener), Some(sealer));
    Ok(())
}

/// Ends a channel from any thread: whoever reads or writes is woken.
#[derive(Clone, Debug)]
pub struct Cutter(Arc<OwnedFd>);

impl Cutter {
    /// Ends it. What was written before may be lost. A pipe cannot be cut; whoever reads it goes on.
    pub fn cut(&self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

#[derive(Clone, Copy)]
enum Wait {
    Forever,
    Until(Instant),
    Silence(Duration),
}

/// Bytes between a layer and the one below.
#[derive(Clone)]
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    fn new(size: usize) -> Self {
        Self { bytes: vec![0; size], start: 0, end: 0 }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn grow(&mut self, size: usize) {
        self.bytes.resize(size.max(self.bytes.len()), 0);
    }
}

/// The reading half of a channel.
pub struct ReadHalf {
    descriptor: Arc<OwnedFd>,
    layers: Vec<Shared>,
    /// What arrived for the layer above, the lowest first.
    arrived: Vec<Buffer>,
    /// In place of the layers.
    opener: Option<Opener>,
    wait: Wait,
}

impl ReadHalf {
    /// Reads fail with `TimedOut` from this moment on.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.wait = deadline.map_or(Wait::Forever, Wait::Until);
    }

    /// Reads fail with `TimedOut` when nothing at all comes for so long.
    pub fn set_longest_silence(&mut self, silence: Duration) {
        self.wait = Wait::Silence(silence);
    }

    fn read_descriptor(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let left = match self.wait {
            Wait::Forever => None,
            Wait::Until(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
            Wait::Silence(silence) => Some(silence),
        };
        if let Some(left) = left {
            wait_for(self.descriptor.as_fd(), PollFlags::IN, left)?;
        }
        loop {
            match rustix::io::readv(&self.descriptor, into) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn read_records(&mut self, opener: &mut Opener, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match opener.open(into)? {
                Opened::Bytes(length) => return Ok(length),
                Opened::End => return Ok(0),
                Opened::Nothing => {}
            }
            match self.read_descriptor(&mut [IoSliceMut::new(opener.room())])? {
                // The end without a word from TLS may be somebody else's doing.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => opener.arrived(length),
            }
        }
    }

    /// Reads through the lowest layers, so many of them.
    fn read_through(&mut self, layers: usize, into: &mut [u8]) -> io::Result<usize> {
        if layers == 0 {
            return self.read_descriptor(&mut [IoSliceMut::new(into)]);
        }
        loop {
            let buffer = &mut self.arrived[layers - 1];
            let mut arrived = &buffer.bytes[buffer.start..buffer.end];
            let unwrapped = lock(&self.layers[layers - 1]).unwrap(&mut arrived, into)?;
            buffer.start = buffer.end - arrived.len();
            match unwrapped {
                Unwrapped::Bytes(0) if into.is_empty() => return Ok(0),
                Unwrapped::Bytes(0) => {}
                Unwrapped::Bytes(length) => return Ok(length),
                Unwrapped::End => return Ok(0),
            }
            let mut bytes = std::mem::take(&mut self.arrived[layers - 1].bytes);
            let read = self.read_through(layers - 1, &mut bytes);
            self.arrived[layers - 1] = Buffer { bytes, start: 0, end: *read.as_ref().unwrap_or(&0) };
            // The end without a word from the layer may be somebody else's doing.
            if read? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl Read for ReadHalf {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if !self.layers.is_empty() {
            return self.read_through(self.layers.len(), into);
        }
        if let Some(mut opener) = self.opener.take() {
            let read = self.read_records(&mut opener, into);
            self.opener = Some(opener);
            return read;
        }
        if self.arrived[0].is_empty() {
            // What does not fit is read ahead by the same call.
            let mut bytes = std::mem::take(&mut self.arrived[0].bytes);
            let room = into.len();
            let read = self.read_descriptor(&mut [IoSliceMut::new(into), IoSliceMut::new(&mut bytes)]);
            let ahead = read.as_ref().map_or(0, |read| read.saturating_sub(room));
            self.arrived[0] = Buffer { bytes, start: 0, end: ahead };
            return Ok(read? - ahead);
        }
        let buffer = &mut self.arrived[0];
        let length = into.len().min(buffer.end - buffer.start);
        into[..length].copy_from_slice(&buffer.bytes[buffer.start..buffer.start + length]);
        buffer.start += length;
        Ok(length)
    }
}

/// The writing half of a channel.
pub struct WriteHalf {
    descriptor: Arc<OwnedFd>,
    layers: Vec<Shared>,
    /// What the layers made and how much of it is written: all, unless the descriptor does not block.
    staged: Vec<u8>,
    written: usize,
    scratch: Vec<u8>,
    /// In place of the layers.
    sealer: Option<Sealer>,
    /// The layers have said that nothing follows.
    ended: bool,
}

impl WriteHalf {
    /// Writes all of these.
    pub fn write_all_vectored(&mut self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let written = self.write_vectored(slices)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut slices, written);
        }
        Ok(())
    }

    /// Says that nothing follows.
    pub fn end(&mut self) -> io::Result<()> {
        self.flush()?;
        if let Some(sealer) = &mut self.sealer
            && !self.ended
        {
            sealer.end()?;
            self.ended = true;
        }
        if !self.ended {
            let mut last = Vec::new();
            for number in (0..self.layers.len()).rev() {
                self.staged.clear();
                lock(&self.layers[number]).end(&mut self.staged)?;
                self.wrap_through(number)?;
                last.append(&mut self.staged);
            }
            (self.staged, self.written, self.ended) = (last, 0, true);
        }
        self.flush()?;
        let _ = rustix::net::shutdown(&self.descriptor, rustix::net::Shutdown::Write);
        Ok(())
    }

    /// Wraps what is staged in the lowest layers, so many of them.
    fn wrap_through(&mut self, layers: usize) -> io::Result<()> {
        for layer in self.layers[..layers].iter().rev() {
            self.scratch.clear();
            lock(layer).wrap(&[IoSlice::new(&self.staged)], &mut self.scratch)?;
            std::mem::swap(&mut self.staged, &mut self.scratch);
        }
        Ok(())
    }
}

impl Write for WriteHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if let Some(sealer) = &mut self.sealer {
            flush(&self.descriptor, sealer)?;
            let length = sealer.seal(slices)?;
            return sealed(flush(&self.descriptor, sealer), length);
        }
        if self.layers.is_empty() {
            return write_descriptor(&self.descriptor, slices);
        }
        self.flush()?;
        // As much as is written at once, be it the part of a slice.
        let (mut part, mut length) = (Vec::with_capacity(slices.len()), 0);
        for slice in slices {
            let taken = slice.len().min(WRITE - length);
            part.push(IoSlice::new(&slice[..taken]));
            length += taken;
        }
        self.staged.clear();
        self.written = 0;
        let below = self.layers.len() - 1;
        lock(&self.layers[below]).wrap(&part, &mut self.staged)?;
        self.wrap_through(below)?;
        sealed(self.flush(), length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(sealer) = &mut self.sealer {
            return flush(&self.descriptor, sealer);
        }
        while self.written < self.staged.len() {
            self.written += write_descriptor(&self.descriptor, &[IoSlice::new(&self.staged[self.written..])])?;
        }
        Ok(())
    }
}

fn flush(descriptor: &OwnedFd, sealer: &mut Sealer) -> io::Result<()> {
    while !sealer.unsent().is_empty() {
        let length = write_descriptor(descriptor, &[IoSlice::new(sealer.unsent())])?;
        sealer.sent(length);
    }
    Ok(())
}

/// What was sealed counts as written, though it may go out only with what comes next.
fn sealed(flushed: io::Result<()>, length: usize) -> io::Result<usize> {
    match flushed {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(length),
        result => result.map(|()| length),
    }
}

fn write_descriptor(descriptor: &OwnedFd, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    loop {
        match rustix::io::writev(descriptor, slices) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Waits until a descriptor is ready, within this time.
pub(crate) fn wait_for(descriptor: BorrowedFd<'_>, what: PollFlags, within: Duration) -> io::Result<()> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::from_borrowed_fd(descriptor, what)], Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map(|_| ()).map_err(Into::into),
        }
    }
}

fn lock(layer: &Mutex<Box<dyn Layer>>) -> MutexGuard<'_, Box<dyn Layer>> {
    layer.lock().expect("layers do not panic")
}
