//! The threads of a stream. One makes or awaits connections and writes; for each connection there is one that reads.

use std::io::{self, IoSlice, Read};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};

use super::LinkDown;
use super::state::{LAST_WORDS, Shared, State, URGENT};
use crate::channel::{Cutter, ReadHalf, WriteHalf};
use crate::chooser::{Chooser, SAMPLE};
use crate::compress::{Compression, Method, Packer, Unpacker};
use crate::dial::Dialer;
use crate::frame::{Encoding, FrameError, HEADER, Header, Type};
use crate::join::{self, JoinError};
use crate::sequence::{Body, SequenceError};
use crate::tuning::SILENCE;

/// How often each side asks whether the other one is there.
const PING: Duration = Duration::from_secs(1);
/// How often the urgent stream asks while bulk is on its way, to see how long it waits behind that.
const PING_IN_BULK: Duration = Duration::from_millis(8);
/// How long one attempt to connect may take.
const DIAL: Duration = Duration::from_secs(3);
/// The same when there is little patience left.
const LEAST_DIAL: Duration = Duration::from_millis(50);
/// Pauses between attempts: the first, doubled up to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Small frames are written together up to so many bytes, and no frame that is larger joins them.
const TOGETHER: usize = 256 << 10;
/// How many of them at most: the kernel takes 1024 pieces at once.
const MOST_TOGETHER: usize = 256;
/// Payloads below this are not worth packing.
const LEAST_PACKED: usize = 256;

/// A connection that has joined its stream: frames may flow.
pub(crate) struct Connection {
    pub(crate) reader: ReadHalf,
    pub(crate) writer: WriteHalf,
    pub(crate) cutter: Cutter,
    /// TLS lies over it.
    pub(crate) protected: bool,
}

/// Why a connection of a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("the connection broke")]
    Broken(#[from] io::Error),
    #[error("what arrived is no frame")]
    Frame(#[from] FrameError),
    #[error("what arrived does not follow what came before")]
    Sequence(#[from] SequenceError),
    #[error("a frame came after the end")]
    AfterEnd,
}

/// Starts the threads of a link; those of the connecting side have a dialer.
pub(crate) fn start(link: &Arc<Shared>, dialer: Option<&Arc<dyn Dialer>>) -> Result<(), LinkDown> {
    for index in 0..link.work.len() {
        let (shared, dialer) = (Arc::clone(link), dialer.cloned());
        let run = move || keep_connected(&shared, index, dialer.as_deref());
        if let Err(error) = std::thread::Builder::new().name(format!("link-{index}")).spawn(run) {
            let down = LinkDown::Thread(Arc::new(error));
            link.fail(down.clone());
            return Err(down);
        }
    }
    Ok(())
}

/// Connects a stream, and again when it broke, until the link is over.
fn keep_connected(shared: &Arc<Shared>, index: usize, dialer: Option<&dyn Dialer>) {
    let mut lost_since = Instant::now();
    let mut last_error: Arc<dyn std::error::Error + Send + Sync> =
        Arc::new(io::Error::new(io::ErrorKind::NotConnected, "nobody has connected yet"));
    loop {
        let until = lost_since + shared.options.patience;
        let connection = match dialer {
            Some(dialer) => dial(shared, index, dialer, until, &mut last_error),
            None => await_connection(shared, index, until),
        };
        let Some(connection) = connection else {
            let patience = shared.options.patience;
            if !is_over(&shared.lock(), index) {
                shared.fail(LinkDown::Lost { stream: index as u8, patience, source: last_error });
            }
            shared.progress.notify_all();
            return;
        };
        let ended = drive(shared, index, connection);
        lost_since = Instant::now();
        let mut state = shared.lock();
        let stream = &mut state.streams[index];
        stream.connection = None;
        if let Some(fault) = stream.fault.take() {
            last_error = fault;
        } else if let Err(error) = ended {
            last_error = Arc::new(error);
        }
        shared.progress.notify_all();
        if is_over(&state, index) {
            return;
        }
        drop(state);
        tracing::debug!(session = %shared.options.session, stream = index, error = %last_error, "stream broke");
    }
}

/// The stream needs no connection any more.
fn is_over(state: &State, index: usize) -> bool {
    state.down.is_some() || state.streams[index].is_over()
}

/// Dials until a connection has joined the stream; `None` when the link is over or time is up.
fn dial(
    shared: &Shared,
    index: usize,
    dialer: &dyn Dialer,
    until: Instant,
    last_error: &mut Arc<dyn std::error::Error + Send + Sync>,
) -> Option<Connection> {
    let mut pause = PAUSES.0;
    loop {
        if is_over(&shared.lock(), index) {
            return None;
        }
        let attempt = Instant::now() + DIAL.min(until.saturating_duration_since(Instant::now()).max(LEAST_DIAL));
        let failed: JoinError = match dialer.dial(attempt.saturating_duration_since(Instant::now())) {
            Ok(channel) => match join::ask(channel, shared, index, attempt) {
                Ok(connection) => return Some(connection),
                Err(error) => error,
            },
            Err(error) => error.into(),
        };
        // A stream that never was connected has nothing to lose by failing at once, and its user waits for an answer.
        let first = shared.lock().streams[index].counters.connects == 0;
        match failed {
            JoinError::Refused(refusal) if !refusal.may_pass() => {
                // What has been closed over there is not known there any more.
                let refused = LinkDown::Refused { stream: index as u8, refusal };
                let left = shared.lock().streams[index].left_by_peer();
                match left {
                    Some(true) => {}
                    Some(false) => shared.fail(LinkDown::PeerGaveUp),
                    None => shared.fail(refused),
                }
                return None;
            }
            other => *last_error = Arc::new(other),
        }
        if first || Instant::now() + pause >= until {
            return None;
        }
        rest(shared, index, Instant::now() + pause);
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Waits until then, or until the link is over.
fn rest(shared: &Shared, index: usize, until: Instant) {
    let mut state = shared.lock();
    while Instant::now() < until && !is_over(&state, index) {
        state = Shared::wait_until(&shared.work[index], state, until);
    }
}

/// Waits until somebody attaches a connection.
fn await_connection(shared: &Shared, index: usize, until: Instant) -> Option<Connection> {
    let mut state = shared.lock();
    loop {
        if let Some(connection) = state.streams[index].offered.take() {
            return Some(connection);
        }
        if is_over(&state, index) || Instant::now() >= until {
            return None;
        }
        state = Shared::wait_until(&shared.work[index], state, until);
    }
}

/// Lets frames flow over a connection until it ends.
fn drive(shared: &Arc<Shared>, index: usize, connection: Connection) -> Result<(), StreamError> {
    let Connection { reader, mut writer, cutter, protected } = connection;
    {
        let mut state = shared.lock();
        let stream = &mut state.streams[index];
        stream.connection = Some(cutter.clone());
        stream.protected = Some(protected);
        stream.counters.connects += 1;
        stream.fault = None;
        (stream.pong, stream.ping) = (None, None);
        // An ack may have been lost with the last connection.
        stream.ack_due = Some(Instant::now());
        shared.progress.notify_all();
    }
    let reading = {
        let (shared, cutter) = (Arc::clone(shared), cutter.clone());
        let read = move || {
            let result = Reading::new(&shared, index, reader, protected).run();
            cutter.cut();
            let mut state = shared.lock();
            let error = result.err().unwrap_or_else(|| StreamError::Broken(io::ErrorKind::UnexpectedEof.into()));
            state.streams[index].fault = Some(Arc::new(error));
            drop(state);
            shared.work[index].notify_all();
        };
        std::thread::Builder::new().name(format!("link-{index}-in")).spawn(read)
    };
    let reading = match reading {
        Ok(reading) => reading,
        Err(error) => {
            cutter.cut();
            return Err(error.into());
        }
    };
    let result = Writing::new(shared, index, protected).run(&mut writer);
    if result.is_ok() {
        let _ = writer.end();
        // A connection that is closed with something unread makes the other side lose what it has not read either.
        let until = Instant::now() + LAST_WORDS;
        let mut state = shared.lock();
        while state.streams[index].fault.is_none() && Instant::now() < until {
            state = Shared::wait_until(&shared.work[index], state, until);
        }
    }
    cutter.cut();
    let _ = reading.join();
    result
}

/// The processor time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// The reading side of a connection.
struct Reading<'a> {
    shared: &'a Shared,
    index: usize,
    reader: ReadHalf,
    protected: bool,
    unpacker: Unpacker,
    cpu: Duration,
}

impl<'a> Reading<'a> {
    fn new(shared: &'a Shared, index: usize, mut reader: ReadHalf, protected: bool) -> Self {
        reader.set_longest_silence(SILENCE);
        Self { shared, index, reader, protected, unpacker: Unpacker::new(), cpu: cpu() }
    }

    fn run(&mut self) -> Result<(), StreamError> {
        loop {
            let header = Header::read(&mut self.reader)?;
            match header.frame {
                Type::Data => self.data(&header)?,
                Type::End => {
                    self.expect(&header)?;
                    self.shared.end_arrived(self.index);
                }
                Type::Abort => self.shared.fail(LinkDown::PeerGaveUp),
                Type::Ack | Type::Ping | Type::Pong => self.control(&header)?,
            }
        }
    }

    fn expect(&self, header: &Header) -> Result<(), StreamError> {
        let state = self.shared.lock();
        let stream = &state.streams[self.index];
        if stream.ended {
            return Err(StreamError::AfterEnd);
        }
        Ok(stream.incoming.expects(header.sequence, header.raw_length as usize)?)
    }

    fn data(&mut self, header: &Header) -> Result<(), StreamError> {
        self.expect(header)?;
        let pool = &self.shared.pool;
        let mut payload = pool.take(header.length as usize);
        self.reader.read_exact(payload.as_mut())?;
        if !self.protected {
            header.check_payload(payload.as_ref())?;
        }
        if header.encoding != Encoding::Raw {
            let mut raw = pool.take(header.raw_length as usize);
            self.unpacker.unpack(header.encoding, payload.as_ref(), raw.as_mut())?;
            payload = raw;
        }
        self.count_cpu();
        let wire = u64::from(header.length) + HEADER as u64;
        self.shared.arrived(self.index, header.kind, payload.freeze(), wire);
        Ok(())
    }

    fn control(&mut self, header: &Header) -> Result<(), StreamError> {
        let mut state = self.shared.lock();
        let stream = &mut state.streams[self.index];
        match header.frame {
            Type::Ack => {
                stream.outgoing.on_ack(header.sequence)?;
                self.shared.progress.notify_all();
            }
            Type::Ping => {
                stream.pong = Some(header.sequence);
                self.shared.work[self.index].notify_one();
            }
            _ => {
                if let Some((number, sent)) = stream.ping
                    && number == header.sequence
                {
                    let took = sent.elapsed();
                    (stream.ping, stream.round_trip) = (None, Some(took));
                    if self.index == URGENT {
                        state.steer(self.shared.now(), took);
                    }
                }
            }
        }
        Ok(())
    }

    fn count_cpu(&mut self) {
        let now = cpu();
        self.shared.lock().streams[self.index].counters.cpu += now.saturating_sub(self.cpu);
        self.cpu = now;
    }
}

/// A frame that is about to be written.
struct Leaving {
    sequence: u64,
    body: Body,
}

/// The writing side of a connection.
struct Writing<'a> {
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
    fn new(shared: &'a Shared, index: usize, protected: bool) -> Self {
        Self {
            shared,
            index,
            protected,
            packer: Packer::new(),
            chooser: Chooser::new(),
            last_ping: None,
            ping_number: 0,
            cpu: cpu(),
        }
    }

    fn run(&mut self, writer: &mut WriteHalf) -> Result<(), StreamError> {
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
            let closing = stream.ended;
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
        let (begun, cpu_before) = (Instant::now(), cpu());
        self.write_paced(writer, &mut slices, bytes)?;
        let (took, used) = (begun.elapsed(), cpu().saturating_sub(cpu_before));
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
        let first = state.on_written(length);
        drop(state);
        if first {
            // Time to look how long urgent frames wait.
            self.shared.work[URGENT].notify_one();
        }
        length
    }

    /// Remembers what was written.
    fn account(&mut self, leaving: &mut [Leaving], packed: bool, bytes: usize) {
        let now = cpu();
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
