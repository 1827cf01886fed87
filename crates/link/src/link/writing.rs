//! The thread that writes a connection: what is due and what users send, packed and paced.

use std::io::{self, IoSlice};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::LinkDown;
use super::state::{Shared, State, URGENT};
use super::stream::StreamError;
use crate::channel::WriteHalf;
use crate::chooser::{Chooser, SAMPLE};
use crate::compress::{Compression, Method, Packer};
use crate::frame::{Encoding, Header, Type};
use crate::sequence::Body;
use crate::thread_cpu;

/// How often each side asks whether the other one is there.
const PING: Duration = Duration::from_secs(1);
/// How often the urgent stream asks while bulk is on its way, to see how long it waits behind that.
const PING_IN_BULK: Duration = Duration::from_millis(8);
/// Small frames are written together up to so many bytes, and no frame that is larger joins them.
const TOGETHER: usize = 256 << 10;
/// How many of them at most: the kernel takes 1024 pieces at once.
const MOST_TOGETHER: usize = 256;
/// Payloads below this are not worth packing.
const LEAST_PACKED: usize = 256;

/// A frame that is about to be written.
struct Leaving {
    sequence: u64,
    body: Body,
}

/// The writing side of a connection.
pub(super) struct Writing<'a> {
    shared: &'a Shared,
    index: usize,
    protected: bool,
    packer: Packer,
    chooser: Chooser,
    last_ping: Option<Instant>,
    ping_number: u64,
    cpu: Duration,
}

/// What to do next.
enum Next {
    Write,
    /// The link ended in order.
    Finish,
    /// This side gave the link up.
    Abort,
    /// The reading thread has ended.
    Fault,
}

impl<'a> Writing<'a> {
    pub(super) fn new(shared: &'a Shared, index: usize, protected: bool) -> Self {
        Self {
            shared,
            index,
            protected,
            packer: Packer::new(),
            chooser: Chooser::new(),
            last_ping: None,
            ping_number: 0,
            cpu: thread_cpu(),
        }
    }

    pub(super) fn run(&mut self, writer: &mut WriteHalf) -> Result<(), StreamError> {
        let (mut control, mut leaving) = (Vec::new(), Vec::new());
        loop {
            control.clear();
            leaving.clear();
            match self.next(&mut control, &mut leaving) {
                Next::Write => self.write(writer, &control, &mut leaving)?,
                Next::Finish => return Ok(()),
                Next::Abort => {
                    let last = Header::bare(Type::Abort, 0).encode();
                    writer.write_all_vectored(&mut [IoSlice::new(&last)])?;
                    return Ok(());
                }
                Next::Fault => return Err(StreamError::Broken(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }

    /// Waits until there is something to write, and takes it.
    fn next(&mut self, control: &mut Vec<u8>, leaving: &mut Vec<Leaving>) -> Next {
        let mut state = self.shared.lock();
        loop {
            match state.down {
                Some(LinkDown::GivenUp) => return Next::Abort,
                Some(_) => return Next::Finish,
                None if state.streams[self.index].fault.is_some() => return Next::Fault,
                None => {}
            }
            let until = self.take_control(&mut state, control);
            self.take_frames(&mut state, leaving);
            if !control.is_empty() || !leaving.is_empty() {
                return Next::Write;
            }
            state = Shared::wait_until(&self.shared.work[self.index], state, until);
        }
    }

    /// Takes what is due besides users' frames; gives back when something will be.
    fn take_control(&mut self, state: &mut MutexGuard<'_, State>, control: &mut Vec<u8>) -> Instant {
        let now = Instant::now();
        let every = if self.index == URGENT && state.bulk_is_recent() { PING_IN_BULK } else { PING };
        // The first one at once: the way is still empty then, so that the steering learns how short it is.
        let mut due = self.last_ping.map_or(now, |last| last + every);
        let closing = state.closing;
        let stream = &mut state.streams[self.index];
        if let Some(number) = stream.pong.take() {
            control.extend(Header::bare(Type::Pong, number).encode());
        }
        if now >= due {
            (self.last_ping, due) = (Some(now), now + every);
            if stream.ping.is_none() {
                self.ping_number += 1;
                stream.ping = Some((self.ping_number, now));
            }
            control.extend(Header::bare(Type::Ping, self.ping_number).encode());
        }
        if stream.ack_due.is_some_and(|due| now >= due) {
            stream.ack_due = None;
            stream.acked = stream.incoming.taken();
            let closing = closing || stream.ended;
            control.extend(Header::bare(Type::Ack, stream.acked).encode());
            if closing {
                self.shared.progress.notify_all();
            }
        }
        stream.ack_due.map_or(due, |ack| ack.min(due))
    }

    /// Takes the next frame, and more as long as they are small.
    fn take_frames(&mut self, state: &mut MutexGuard<'_, State>, leaving: &mut Vec<Leaving>) {
        let mut bytes = 0;
        let stream = &mut state.streams[self.index];
        while leaving.len() < MOST_TOGETHER
            && let Some((sequence, body)) = stream.outgoing.next()
        {
            let length = match body {
                Body::Data { payload, .. } => payload.len(),
                Body::End => 0,
            };
            if !leaving.is_empty() && bytes + length > TOGETHER {
                break;
            }
            bytes += length;
            leaving.push(Leaving { sequence, body: body.clone() });
            stream.outgoing.advance();
        }
    }

    fn write(&mut self, writer: &mut WriteHalf, control: &[u8], leaving: &mut [Leaving]) -> Result<(), StreamError> {
        let packed = self.pack(leaving)?;
        let mut headers = Vec::with_capacity(leaving.len());
        for Leaving { sequence, body } in leaving.iter() {
            let mut header = Header::bare(Type::End, *sequence);
            if let Body::Data { kind, raw_length, encoding, payload } = body {
                header.frame = Type::Data;
                (header.kind, header.encoding) = (*kind, *encoding);
                (header.length, header.raw_length) = (payload.len() as u32, *raw_length);
                if !self.protected {
                    header = header.with_check_of(payload);
                }
            }
            headers.push(header.encode());
        }
        let mut slices = Vec::with_capacity(1 + 2 * leaving.len());
        slices.push(IoSlice::new(control));
        for (header, Leaving { body, .. }) in headers.iter().zip(leaving.iter()) {
            slices.push(IoSlice::new(header));
            if let Body::Data { payload, .. } = body {
                slices.push(IoSlice::new(payload));
            }
        }
        let bytes = slices.iter().map(|slice| slice.len()).sum();
        let (begun, cpu_before) = (Instant::now(), thread_cpu());
        self.write_paced(writer, &mut slices, bytes)?;
        let (took, used) = (begun.elapsed(), thread_cpu().saturating_sub(cpu_before));
        if !leaving.is_empty() {
            self.chooser.on_written(bytes, used, took.saturating_sub(used));
        }
        self.account(leaving, packed, bytes);
        Ok(())
    }

    /// Packs what is worth it; whether anything was.
    fn pack(&mut self, leaving: &mut [Leaving]) -> Result<bool, StreamError> {
        let compression = self.shared.lock().compression;
        let mut any = false;
        for Leaving { body, .. } in leaving {
            let Body::Data { encoding, payload, .. } = body else { continue };
            // One that is sent again was packed before.
            if *encoding != Encoding::Raw || payload.len() < LEAST_PACKED {
                continue;
            }
            let method = match compression {
                Compression::Fixed(method) => method,
                Compression::Adaptive => {
                    self.sample(payload)?;
                    self.chooser.method()
                }
            };
            if method == Method::None {
                continue;
            }
            let begun = Instant::now();
            let raw = payload.len();
            let packed = self.packer.pack(method, payload)?;
            let length = packed.map_or(raw, |(_, packed)| packed.len());
            if let Some((how, packed)) = packed {
                (*encoding, *payload) = (how, Bytes::copy_from_slice(packed));
                any = true;
            }
            self.chooser.on_packed(raw, length, begun.elapsed());
        }
        Ok(any)
    }

    /// Finds out what a method that is not in use would bring, when it is time to.
    fn sample(&mut self, payload: &Bytes) -> Result<(), StreamError> {
        if payload.len() < SAMPLE {
            return Ok(());
        }
        let Some(method) = self.chooser.wants_sample(self.shared.now()) else { return Ok(()) };
        let middle = (payload.len() - SAMPLE) / 2;
        let begun = Instant::now();
        let packed = self.packer.pack(method, &payload[middle..middle + SAMPLE])?;
        let length = packed.map_or(SAMPLE, |(_, packed)| packed.len());
        self.chooser.on_sample(self.shared.now(), SAMPLE, length, begun.elapsed());
        Ok(())
    }

    /// Writes in pieces where there is a rate to keep.
    fn write_paced(&self, writer: &mut WriteHalf, mut slices: &mut [IoSlice<'_>], bytes: usize) -> io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            let length = self.pace(left);
            if length == left {
                return writer.write_all_vectored(slices);
            }
            let (mut piece, mut rest) = (Vec::new(), length);
            for slice in slices.iter() {
                let taken = slice.len().min(rest);
                piece.push(IoSlice::new(&slice[..taken]));
                rest -= taken;
                if rest == 0 {
                    break;
                }
            }
            writer.write_all_vectored(&mut piece)?;
            drop(piece);
            IoSlice::advance_slices(&mut slices, length);
            left -= length;
        }
        Ok(())
    }

    /// Waits until something may be written; gives back how much, at most `left`.
    fn pace(&self, left: usize) -> usize {
        if self.index == URGENT {
            return left;
        }
        let mut state = self.shared.lock();
        let (length, cap) = (left.min(state.bucket.quantum()), state.cap);
        let until = Instant::now() + state.bucket.take(self.shared.now(), length);
        // A turn that was given at another rate is worth nothing any more.
        while state.down.is_none() && state.cap == cap && Instant::now() < until {
            state = Shared::wait_until(&self.shared.work[self.index], state, until);
        }
        let first = state.on_written(self.shared.now(), length);
        drop(state);
        if first {
            // Time to look how long urgent frames wait.
            self.shared.work[URGENT].notify_one();
        }
        length
    }

    /// Remembers what was written.
    fn account(&mut self, leaving: &mut [Leaving], packed: bool, bytes: usize) {
        let now = thread_cpu();
        let mut state = self.shared.lock();
        let fixed = match state.compression {
            Compression::Fixed(method) => Some(method),
            Compression::Adaptive => None,
        };
        let stream = &mut state.streams[self.index];
        stream.method = fixed.unwrap_or(self.chooser.method());
        stream.counters.wire_sent += bytes as u64;
        stream.counters.cpu += now.saturating_sub(self.cpu);
        self.cpu = now;
        if packed {
            // So that a frame that must be sent again is not packed again, and takes less memory until then.
            for Leaving { sequence, body } in leaving {
                if let Some(held) = stream.outgoing.held(*sequence) {
                    held.clone_from(body);
                }
            }
        }
    }
}
