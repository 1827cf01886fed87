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

/// How much is sealed and written at once; a TLS record has 16 KiB, so the lock is held for a few microseconds each.
const WRITE: usize = 256 << 10;
/// How much is read at once under a layer.
const READ: usize = 256 << 10;
/// How much is read ahead where there is no layer: enough for small frames, and little to copy of large ones.
const READ_AHEAD: usize = 32 << 10;

type Layers = Arc<[Mutex<Box<dyn Layer>>]>;

/// See the module's text.
pub struct Channel {
    descriptor: Arc<OwnedFd>,
    layers: Vec<Mutex<Box<dyn Layer>>>,
    protected: bool,
}

impl Channel {
    /// Over a descriptor that is connected and in blocking mode.
    pub fn over(descriptor: impl Into<OwnedFd>) -> Self {
        Self { descriptor: Arc::new(descriptor.into()), layers: Vec::new(), protected: false }
    }

    /// With TLS over it, whose handshake is over and in which both sides have proved who they are.
    #[must_use]
    pub fn with_tls(mut self, connection: impl Into<rustls::Connection>) -> Self {
        self.layers.push(Mutex::new(Box::new(Tls::new(connection))));
        self.protected = true;
        self
    }

    /// Whether bytes are authenticated on their way.
    pub fn is_protected(&self) -> bool {
        self.protected
    }

    /// Both directions, each for a thread of its own.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        let layers: Layers = self.layers.into();
        let (descriptor, buffer) = (self.descriptor, if layers.is_empty() { READ_AHEAD } else { READ });
        let reader = ReadHalf {
            descriptor: Arc::clone(&descriptor),
            arrived: vec![Buffer::new(buffer); layers.len().max(1)],
            layers: Arc::clone(&layers),
            wait: Wait::Forever,
        };
        (reader, WriteHalf { descriptor, layers, staged: Vec::new(), scratch: Vec::new() })
    }

    /// What ends it from any thread.
    pub fn cutter(&self) -> Cutter {
        Cutter(Arc::clone(&self.descriptor))
    }
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
}

/// The reading half of a channel.
pub struct ReadHalf {
    descriptor: Arc<OwnedFd>,
    layers: Layers,
    /// What arrived for the layer above, the lowest first.
    arrived: Vec<Buffer>,
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
    layers: Layers,
    staged: Vec<u8>,
    scratch: Vec<u8>,
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
        for number in (0..self.layers.len()).rev() {
            self.staged.clear();
            lock(&self.layers[number]).end(&mut self.staged)?;
            self.send_staged_through(number)?;
        }
        let _ = rustix::net::shutdown(&self.descriptor, rustix::net::Shutdown::Write);
        Ok(())
    }

    /// Sends what is staged through the lowest layers, so many of them.
    fn send_staged_through(&mut self, layers: usize) -> io::Result<()> {
        for layer in self.layers[..layers].iter().rev() {
            self.scratch.clear();
            lock(layer).wrap(&[IoSlice::new(&self.staged)], &mut self.scratch)?;
            std::mem::swap(&mut self.staged, &mut self.scratch);
        }
        let mut rest = &self.staged[..];
        while !rest.is_empty() {
            let written = write_descriptor(&self.descriptor, &[IoSlice::new(rest)])?;
            rest = &rest[written..];
        }
        Ok(())
    }
}

impl Write for WriteHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(top) = self.layers.last() else { return write_descriptor(&self.descriptor, slices) };
        // As much as is written at once, be it the part of a slice.
        let (mut part, mut length) = (Vec::with_capacity(slices.len()), 0);
        for slice in slices {
            let taken = slice.len().min(WRITE - length);
            part.push(IoSlice::new(&slice[..taken]));
            length += taken;
        }
        self.staged.clear();
        lock(top).wrap(&part, &mut self.staged)?;
        self.send_staged_through(self.layers.len() - 1)?;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
