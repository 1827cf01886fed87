//! What the threads of a link share: who may send, what has arrived, who waits for what.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::buffers::Pool;
use super::stream::Connection;
use super::{Frame, LinkDown, LinkOptions, LinkStats, StreamStats};
use crate::channel::Cutter;
use crate::compress::{Compression, Method};
use crate::frame::{Encoding, MAX_PAYLOAD};
use crate::pacing::Bucket;
use crate::sequence::{Body, Incoming, Outgoing};
use crate::spread::Spread;
use crate::steering::Steering;

/// The number of the urgent stream; bulk streams count from 1.
pub(crate) const URGENT: usize = 0;
/// Taken frames are acknowledged together, after so much time.
const ACK_DELAY: Duration = Duration::from_millis(1);

/// Bulk that was written so lately may still be on its way.
const BULK_IS_RECENT: Duration = Duration::from_millis(100);
/// How long threads may take to say their last words when a link is closed.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(500);

/// A link, as its threads see it.
pub(crate) struct Shared {
    pub(crate) options: LinkOptions,
    pub(crate) begun: Instant,
    pub(crate) pool: Arc<Pool>,
    state: Mutex<State>,
    /// There is room to send, or everything was taken, or a stream was connected or broke.
    pub(crate) progress: Condvar,
    /// Bulk frames arrived.
    bulk_arrived: Condvar,
    /// Urgent frames arrived.
    urgent_arrived: Condvar,
    /// One for each stream: there is something to write.
    pub(crate) work: Vec<Condvar>,
}

/// See [`Shared`].
pub(crate) struct State {
    pub(crate) streams: Vec<StreamState>,
    bulk: Arrived,
    urgent: Arrived,
    pub(crate) bucket: Bucket,
    steering: Steering,
    spread: Spread,
    /// When a user last had more to send than went through.
    pressed: Option<Instant>,
    /// The user's cap.
    pub(crate) cap: Option<f64>,
    /// When bulk was written last.
    pub(crate) bulk_written: Option<Instant>,
    pub(crate) compression: Compression,
    /// Why the link is over.
    pub(crate) down: Option<LinkDown>,
    pub(crate) closing: bool,
}

/// One stream.
pub(crate) struct StreamState {
    pub(crate) outgoing: Outgoing,
    pub(crate) incoming: Incoming,
    /// What ends the connection that is in use.
    pub(crate) connection: Option<Cutter>,
    /// A connection that was accepted and waits for the stream's thread.
    pub(crate) offered: Option<Connection>,
    /// Somebody is about to offer one.
    pub(crate) joining: bool,
    /// The other side's end has arrived.
    pub(crate) ended: bool,
    /// What the reading thread found wrong.
    pub(crate) fault: Option<Arc<dyn std::error::Error + Send + Sync>>,
    /// When to tell what was taken.
    pub(crate) ack_due: Option<Instant>,
    /// What was told last.
    pub(crate) acked: u64,
    /// A ping to answer.
    pub(crate) pong: Option<u64>,
    /// The ping that is not answered yet, and when it was sent.
    pub(crate) ping: Option<(u64, Instant)>,
    pub(crate) round_trip: Option<Duration>,
    pub(crate) method: Method,
    pub(crate) protected: Option<bool>,
    pub(crate) counters: Counters,
}

/// What is counted for the statistics.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counters {
    pub(crate) raw_sent: u64,
    pub(crate) wire_sent: u64,
    pub(crate) raw_received: u64,
    pub(crate) wire_received: u64,
    pub(crate) connects: u32,
    pub(crate) cpu: Duration,
}

/// Frames that wait to be taken.
#[derive(Default)]
struct Arrived {
    items: VecDeque<Item>,
    /// How many streams have ended; their frames were taken before.
    ended: usize,
}

enum Item {
    Frame(Frame),
    End { stream: usize },
}

impl Shared {
    pub(crate) fn new(options: LinkOptions) -> Self {
        let count = usize::from(options.streams) + 1;
        let state = State {
            streams: (0..count).map(|_| StreamState::new(options.window)).collect(),
            bulk: Arrived::default(),
            urgent: Arrived::default(),
            bucket: Bucket::new(options.rate.map(|rate| rate as f64)),
            steering: Steering::new(),
            spread: Spread::new(options.streams.into()),
            pressed: None,
            cap: options.rate.map(|rate| rate as f64),
            bulk_written: None,
            compression: options.compression,
            down: None,
            closing: false,
        };
        Self {
            begun: Instant::now(),
            pool: Arc::default(),
            state: Mutex::new(state),
            progress: Condvar::new(),
            bulk_arrived: Condvar::new(),
            urgent_arrived: Condvar::new(),
            work: (0..count).map(|_| Condvar::new()).collect(),
            options,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// The time that the pure parts see.
    pub(crate) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        condition.wait(state).expect("no holder of this lock panics")
    }

    /// Waits, at most until then.
    pub(crate) fn wait_until<'a>(
        condition: &Condvar,
        state: MutexGuard<'a, State>,
        until: Instant,
    ) -> MutexGuard<'a, State> {
        let left = until.saturating_duration_since(Instant::now());
        condition.wait_timeout(state, left).expect("no holder of this lock panics").0
    }

    pub(crate) fn wait_until_connected(&self) -> Result<(), LinkDown> {
        let mut state = self.lock();
        loop {
            if let Some(down) = &state.down {
                return Err(down.clone());
            }
            if state.streams.iter().all(|stream| stream.counters.connects > 0) {
                return Ok(());
            }
            state = Self::wait(&self.progress, state);
        }
    }

    pub(crate) fn send(&self, kind: u16, payload: Bytes, urgent: bool) -> Result<(), LinkDown> {
        if payload.len() > MAX_PAYLOAD {
            return Err(LinkDown::TooLong(payload.len()));
        }
        let mut state = self.lock();
        let index = loop {
            state.may_send()?;
            if let Some(index) = state.stream_for(payload.len(), urgent) {
                break index;
            }
            if !urgent {
                state.pressed = Some(Instant::now());
            }
            state = Self::wait(&self.progress, state);
        };
        let stream = &mut state.streams[index];
        stream.counters.raw_sent += payload.len() as u64;
        let raw_length = payload.len() as u32;
        stream.outgoing.push(Body::Data { kind, raw_length, encoding: Encoding::Raw, payload });
        drop(state);
        self.work[index].notify_one();
        Ok(())
    }

    pub(crate) fn recv(&self, urgent: bool) -> Result<Option<Frame>, LinkDown> {
        let mut state = self.lock();
        let streams = if urgent { 1 } else { self.options.streams.into() };
        loop {
            let arrived = if urgent { &mut state.urgent } else { &mut state.bulk };
            if let Some(Item::Frame(frame)) = arrived.items.pop_front() {
                let index = usize::from(frame.stream);
                state.streams[index].incoming.on_taken(frame.payload.len());
                let tell = state.streams[index].taken();
                let ended = state.settle(urgent);
                drop(state);
                if ended {
                    self.work.iter().for_each(Condvar::notify_one);
                } else if tell {
                    self.work[index].notify_one();
                }
                return Ok(Some(frame));
            }
            if arrived.ended == streams {
                return Ok(None);
            }
            match &state.down {
                Some(LinkDown::Closed) => return Ok(None),
                Some(down) => return Err(down.clone()),
                None => {}
            }
            state = Self::wait(if urgent { &self.urgent_arrived } else { &self.bulk_arrived }, state);
        }
    }

    /// The reading thread of a stream has a frame.
    pub(crate) fn arrived(&self, index: usize, kind: u16, payload: Bytes, wire: u64) {
        let mut state = self.lock();
        let stream = &mut state.streams[index];
        stream.incoming.on_data(payload.len());
        stream.counters.raw_received += payload.len() as u64;
        stream.counters.wire_received += wire;
        state.arrived_on(index).items.push_back(Item::Frame(Frame { kind, payload, stream: index as u8 }));
        drop(state);
        self.arrival(index).notify_one();
    }

    /// The reading thread of a stream has the other side's end.
    pub(crate) fn end_arrived(&self, index: usize) {
        let mut state = self.lock();
        state.streams[index].incoming.on_end();
        state.streams[index].ended = true;
        state.arrived_on(index).items.push_back(Item::End { stream: index });
        state.settle(index == URGENT);
        drop(state);
        self.arrival(index).notify_all();
        self.progress.notify_all();
        self.work.iter().for_each(Condvar::notify_one);
    }

    fn arrival(&self, index: usize) -> &Condvar {
        if index == URGENT { &self.urgent_arrived } else { &self.bulk_arrived }
    }

    pub(crate) fn flush(&self) -> Result<(), LinkDown> {
        let mut state = self.lock();
        let due: Vec<u64> = state.streams.iter().map(|stream| stream.outgoing.queued()).collect();
        loop {
            if state.streams.iter().zip(&due).all(|(stream, due)| stream.outgoing.taken() >= *due) {
                return Ok(());
            }
            state.may_send()?;
            state = Self::wait(&self.progress, state);
        }
    }

    pub(crate) fn close(&self) -> Result<(), LinkDown> {
        let until = Instant::now() + self.options.patience;
        let mut state = self.lock();
        if !state.closing && state.down.is_none() {
            state.closing = true;
            state.streams.iter_mut().for_each(|stream| stream.outgoing.push(Body::End));
            self.work.iter().for_each(Condvar::notify_one);
        }
        let result = loop {
            match &state.down {
                Some(LinkDown::Closed) => break Ok(()),
                Some(down) => break Err(down.clone()),
                None => {}
            }
            if state.streams.iter().all(|stream| stream.outgoing.is_empty() && stream.owes_no_ack()) {
                break Ok(());
            }
            if state.peer_has_ended() && state.streams.iter_mut().all(StreamState::has_said_everything) {
                if state.everything_was_taken() {
                    break Ok(());
                }
                // Until it has left, its last acks may be on their way.
                if state.streams.iter().all(|stream| stream.connection.is_none()) {
                    break Err(LinkDown::PeerGaveUp);
                }
            }
            if Instant::now() >= until {
                let waited = self.options.patience;
                let source = Arc::new(std::io::Error::from(std::io::ErrorKind::TimedOut));
                break Err(LinkDown::Lost { stream: 0, patience: waited, source });
            }
            state = Self::wait_until(&self.progress, state, until);
        };
        drop(state);
        self.fail(LinkDown::Closed);
        // The process may end after this: what is being written must be out.
        let until = Instant::now() + 2 * LAST_WORDS;
        let mut state = self.lock();
        while state.streams.iter().any(|stream| stream.connection.is_some()) && Instant::now() < until {
            state = Self::wait_until(&self.progress, state, until);
        }
        result
    }

    /// The link is over, for this reason unless there is one already.
    pub(crate) fn fail(&self, down: LinkDown) {
        let mut state = self.lock();
        if state.down.is_some() {
            return;
        }
        // Threads that write say a last word and cut; one that is stuck in a write is cut here.
        let in_order = matches!(down, LinkDown::Closed | LinkDown::GivenUp);
        state.down = Some(down);
        if !in_order {
            state.streams.iter().filter_map(|stream| stream.connection.as_ref()).for_each(Cutter::cut);
        }
        drop(state);
        self.progress.notify_all();
        self.bulk_arrived.notify_all();
        self.urgent_arrived.notify_all();
        self.work.iter().for_each(Condvar::notify_all);
    }

    pub(crate) fn set_rate(&self, rate: Option<u64>) {
        let now = self.now();
        let mut state = self.lock();
        state.cap = rate.map(|rate| rate as f64);
        let cap = state.cap;
        state.bucket.set_rate(now, cap);
        drop(state);
        self.work.iter().for_each(Condvar::notify_one);
    }

    pub(crate) fn set_compression(&self, compression: Compression) {
        self.lock().compression = compression;
    }

    pub(crate) fn stats(&self) -> LinkStats {
        let state = self.lock();
        let mut all = LinkStats { round_trip: state.streams[URGENT].round_trip, ..LinkStats::default() };
        for stream in &state.streams {
            let counters = stream.counters;
            let reconnects = counters.connects.saturating_sub(1);
            all.raw_sent += counters.raw_sent;
            all.wire_sent += counters.wire_sent;
            all.raw_received += counters.raw_received;
            all.wire_received += counters.wire_received;
            all.reconnects += reconnects;
            all.cpu += counters.cpu;
            all.streams.push(StreamStats {
                connected: stream.connection.is_some(),
                protected: stream.protected,
                method: stream.method,
                held: stream.outgoing.load(),
                round_trip: stream.round_trip,
                reconnects,
            });
        }
        all
    }
}

impl State {
    fn may_send(&self) -> Result<(), LinkDown> {
        match &self.down {
            Some(down) => Err(down.clone()),
            // The other side takes nothing more.
            None if self.closing || self.peer_has_ended() => Err(LinkDown::Closed),
            None => Ok(()),
        }
    }

    /// So much was written on a bulk stream; whether there was nothing for a while.
    pub(crate) fn on_written(&mut self, since_begun: Duration, bytes: usize) -> bool {
        self.steering.on_written(bytes);
        let now = Instant::now();
        let pressed = self.pressed.is_some_and(|pressed| now.saturating_duration_since(pressed) <= BULK_IS_RECENT);
        self.spread.on_written(since_begun, bytes, pressed);
        let last = self.bulk_written.replace(now);
        last.is_none_or(|last| now.saturating_duration_since(last) > BULK_IS_RECENT)
    }

    /// Whether urgent frames may meet bulk on their way.
    pub(crate) fn bulk_is_recent(&self) -> bool {
        self.bulk_written.is_some_and(|last| last.elapsed() <= BULK_IS_RECENT)
    }

    /// A ping came back on the urgent stream.
    pub(crate) fn steer(&mut self, now: Duration, round_trip: Duration) {
        let steered = self.steering.on_round_trip(now, round_trip);
        let rate = [self.cap, steered].into_iter().flatten().reduce(f64::min);
        self.bucket.set_rate(now, rate);
    }

    /// The other side has closed the link.
    pub(crate) fn peer_has_ended(&self) -> bool {
        self.streams.iter().all(|stream| stream.ended)
    }

    /// Everything but ends, which are no loss when nobody acknowledges them any more.
    pub(crate) fn everything_was_taken(&self) -> bool {
        self.streams.iter().all(|stream| stream.outgoing.load() == 0)
    }

    /// The stream with the least to do that has room; one that is not connected only when none is.
    fn stream_for(&self, length: usize, urgent: bool) -> Option<usize> {
        if urgent {
            return self.streams[URGENT].outgoing.has_room(length).then_some(URGENT);
        }
        let bulk = || self.streams.iter().enumerate().skip(1).take(self.spread.used());
        let any_connected = bulk().any(|(_, stream)| stream.connection.is_some());
        bulk()
            .filter(|(_, stream)| stream.connection.is_some() == any_connected && stream.outgoing.has_room(length))
            .min_by_key(|(_, stream)| stream.outgoing.load())
            .map(|(index, _)| index)
    }

    fn arrived_on(&mut self, index: usize) -> &mut Arrived {
        if index == URGENT { &mut self.urgent } else { &mut self.bulk }
    }

    /// An end whose turn has come needs nobody to take it; whether there was one.
    fn settle(&mut self, urgent: bool) -> bool {
        let arrived = if urgent { &mut self.urgent } else { &mut self.bulk };
        let ended = arrived.ended;
        while let Some(&Item::End { stream }) = arrived.items.front() {
            arrived.items.pop_front();
            arrived.ended += 1;
            let stream = &mut self.streams[stream];
            stream.incoming.on_end_taken();
            stream.ack_due = Some(Instant::now());
        }
        arrived.ended > ended
    }
}

impl StreamState {
    fn new(window: usize) -> Self {
        Self {
            outgoing: Outgoing::new(window),
            incoming: Incoming::new(window),
            connection: None,
            offered: None,
            joining: false,
            ended: false,
            fault: None,
            ack_due: None,
            acked: 0,
            pong: None,
            ping: None,
            round_trip: None,
            method: Method::None,
            protected: None,
            counters: Counters::default(),
        }
    }

    /// Changes whenever something got through.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.outgoing.taken(), self.incoming.received())
    }

    /// Nothing more is to be said on it, by either side.
    pub(crate) fn is_over(&self) -> bool {
        self.ended && self.acked == self.incoming.received()
    }

    /// After its end the other side has no use for the stream any more: whether it had taken everything by then.
    /// `None` when it had not ended.
    pub(crate) fn left_by_peer(&mut self) -> Option<bool> {
        self.ended.then(|| {
            self.acked = self.incoming.received();
            self.outgoing.load() == 0
        })
    }

    /// The other side, which has ended, knows all that this side can tell it.
    fn has_said_everything(&mut self) -> bool {
        match self.connection {
            Some(_) => self.outgoing.next().is_none() && self.acked == self.incoming.taken(),
            None => self.is_over(),
        }
    }

    /// The other side, as long as it can be told, was told of everything that was taken: it must not take what was
    /// taken for lost when this side leaves.
    fn owes_no_ack(&self) -> bool {
        self.connection.is_none() || self.ack_due.is_none()
    }

    /// A frame was taken; whether the writing thread must be told that there is an ack to send.
    fn taken(&mut self) -> bool {
        let tell = self.ack_due.is_none();
        if tell {
            self.ack_due = Some(Instant::now() + ACK_DELAY);
        }
        tell
    }
}
