//! What a stream remembers so that a broken connection loses nothing and repeats nothing.
//!
//! Each stream counts its frames from 0 in each direction. The sender keeps a frame until the user at the other end has
//! *taken* it (a cumulative ack); what it keeps is bounded by the window. So one number bounds the retransmission
//! buffer here, what is on the wire, and what waits over there to be taken: a user that stops reading stops the sender,
//! and acks and pings still get through because nobody ever has to stop reading a socket.
//!
//! When a connection is made again, each side says what it *received* last, and the other goes on after that. No
//! sockets and no clock here.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::frame::Encoding;

/// What a frame costs of a window besides its payload: small ones take memory too.
const OVERHEAD: usize = 128;

/// What a payload of so many bytes costs of a window.
pub(crate) fn cost(raw_length: usize) -> usize {
    raw_length + OVERHEAD
}

/// What a frame carries.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    /// A user's payload, packed or not.
    Data { kind: u16, raw_length: u32, encoding: Encoding, payload: Bytes },
    /// The end.
    End,
}

impl Body {
    fn cost(&self) -> usize {
        match self {
            Self::Data { raw_length, .. } => cost(*raw_length as usize),
            Self::End => 0,
        }
    }
}

/// Why what the other side says of sequence numbers cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SequenceError {
    /// A frame is missing or came twice.
    #[error("frame {found} came where {expected} was due")]
    OutOfOrder {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// It has what it cannot have.
    #[error("the other side says that it has {said} frames; it can have {from} to {to}")]
    Impossible {
        /// What it says.
        said: u64,
        /// The least it must have.
        from: u64,
        /// The most it can have.
        to: u64,
    },
    /// It sends more than it was allowed to.
    #[error("the other side sends more than its window of {window} bytes")]
    WindowExceeded {
        /// The window.
        window: usize,
    },
}

/// The sending direction of a stream.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// Frames that were not yet taken over there, the oldest first: sent ones, then those that wait to be sent.
    held: VecDeque<Body>,
    /// The number of the first of them.
    first: u64,
    /// How many of them were sent on this connection or received on an earlier one.
    sent: usize,
    bytes: usize,
    window: usize,
}

impl Outgoing {
    pub(crate) fn new(window: usize) -> Self {
        Self { held: VecDeque::new(), first: 0, sent: 0, bytes: 0, window }
    }

    /// What is held, in bytes of the window.
    pub(crate) fn load(&self) -> usize {
        self.bytes
    }

    pub(crate) fn has_room(&self, raw_length: usize) -> bool {
        self.bytes == 0 || self.bytes + cost(raw_length) <= self.window
    }

    /// The other side takes no more than this.
    pub(crate) fn limit_window(&mut self, window: usize) {
        self.window = self.window.min(window);
    }

    /// Queues a frame. The caller has asked whether there is room.
    pub(crate) fn push(&mut self, body: Body) {
        self.bytes += body.cost();
        self.held.push_back(body);
    }

    /// The number of the frame to send next, and the frame.
    pub(crate) fn next(&mut self) -> Option<(u64, &mut Body)> {
        let sequence = self.first + self.sent as u64;
        self.held.get_mut(self.sent).map(|body| (sequence, body))
    }

    /// A frame that was queued, if it is still held.
    pub(crate) fn held(&mut self, sequence: u64) -> Option<&mut Body> {
        let index = sequence.checked_sub(self.first)?;
        self.held.get_mut(usize::try_from(index).ok()?)
    }

    /// The frame that [`next`](Self::next) gave is on its way.
    pub(crate) fn advance(&mut self) {
        assert!(self.sent < self.held.len(), "only what is held can be sent");
        self.sent += 1;
    }

    /// Whether everything was taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// How many frames were ever queued.
    pub(crate) fn queued(&self) -> u64 {
        self.first + self.held.len() as u64
    }

    /// How many frames were taken over there.
    pub(crate) fn taken(&self) -> u64 {
        self.first
    }

    /// Everything before this number was taken by the user over there.
    pub(crate) fn on_ack(&mut self, taken: u64) -> Result<(), SequenceError> {
        let (from, to) = (self.first, self.first + self.sent as u64);
        if !(from..=to).contains(&taken) {
            return Err(SequenceError::Impossible { said: taken, from, to });
        }
        for body in self.held.drain(..(taken - from) as usize) {
            self.bytes -= body.cost();
        }
        self.sent -= (taken - from) as usize;
        self.first = taken;
        Ok(())
    }

    /// A connection was made again, and over there everything before this number was received: goes on after it.
    pub(crate) fn resume(&mut self, received: u64) -> Result<(), SequenceError> {
        let (from, to) = (self.first, self.first + self.sent as u64);
        if !(from..=to).contains(&received) {
            return Err(SequenceError::Impossible { said: received, from, to });
        }
        self.sent = (received - from) as usize;
        Ok(())
    }
}

/// The receiving direction of a stream.
#[derive(Debug)]
pub(crate) struct Incoming {
    received: u64,
    taken: u64,
    waiting: usize,
    window: usize,
}

impl Incoming {
    pub(crate) fn new(window: usize) -> Self {
        Self { received: 0, taken: 0, waiting: 0, window }
    }

    /// Everything before this number was received.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Everything before this number was taken.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether a frame may come now; asked before its payload is read.
    pub(crate) fn expects(&self, sequence: u64, raw_length: usize) -> Result<(), SequenceError> {
        if sequence != self.received {
            return Err(SequenceError::OutOfOrder { expected: self.received, found: sequence });
        }
        if self.waiting > 0 && self.waiting + cost(raw_length) > self.window {
            return Err(SequenceError::WindowExceeded { window: self.window });
        }
        Ok(())
    }

    /// The frame that was expected is here and waits for its user.
    pub(crate) fn on_data(&mut self, raw_length: usize) {
        self.received += 1;
        self.waiting += cost(raw_length);
    }

    /// The end is here.
    pub(crate) fn on_end(&mut self) {
        self.received += 1;
    }

    /// The user took the oldest data frame.
    pub(crate) fn on_taken(&mut self, raw_length: usize) {
        self.taken += 1;
        self.waiting -= cost(raw_length);
    }

    /// The end's turn has come.
    pub(crate) fn on_end_taken(&mut self) {
        self.taken += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(number: u64, length: u32) -> Body {
        Body::Data {
            kind: 0,
            raw_length: length,
            encoding: Encoding::Raw,
            payload: Bytes::copy_from_slice(&number.to_be_bytes()),
        }
    }

    fn number(body: &Body) -> u64 {
        let Body::Data { payload, .. } = body else { panic!("it is data") };
        u64::from_be_bytes(payload[..].try_into().unwrap())
    }

    /// What can happen to a stream.
    #[derive(Clone, Debug)]
    enum Event {
        Queue(u32),
        Send,
        Arrive,
        Take,
        Ack,
        AckArrives,
        Cut,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0..3000_u32).prop_map(Event::Queue),
            4 => Just(Event::Send),
            4 => Just(Event::Arrive),
            3 => Just(Event::Take),
            2 => Just(Event::Ack),
            2 => Just(Event::AckArrives),
            1 => Just(Event::Cut),
        ]
    }

    proptest! {
        #[test]
        fn however_a_connection_is_cut_no_frame_is_lost_or_repeated_and_memory_is_bounded(
            events in proptest::collection::vec(event(), 1..400),
        ) {
            const WINDOW: usize = 10_000;
            let (mut outgoing, mut incoming) = (Outgoing::new(WINDOW), Incoming::new(WINDOW));
            let (mut wire, mut acks) = (VecDeque::<(u64, Body)>::new(), VecDeque::new());
            let (mut waiting, mut taken, mut queued) = (VecDeque::new(), Vec::new(), 0);
            // Whatever happened before, in the end everything arrives.
            let rest = std::iter::once(Event::Cut).chain(
                std::iter::repeat_n([Event::Send, Event::Arrive, Event::Take, Event::Ack, Event::AckArrives], 500)
                    .flatten());
            for event in events.into_iter().chain(rest) {
                match event {
                    Event::Queue(length) => if outgoing.has_room(length as usize) {
                        outgoing.push(frame(queued, length));
                        queued += 1;
                    }
                    Event::Send => if let Some((sequence, body)) = outgoing.next() {
                        wire.push_back((sequence, body.clone()));
                        outgoing.advance();
                    }
                    Event::Arrive => if let Some((sequence, body)) = wire.pop_front() {
                        let Body::Data { raw_length, .. } = body else { unreachable!() };
                        incoming.expects(sequence, raw_length as usize).unwrap();
                        incoming.on_data(raw_length as usize);
                        waiting.push_back(body);
                    }
                    Event::Take => if let Some(body) = waiting.pop_front() {
                        let Body::Data { raw_length, .. } = body else { unreachable!() };
                        incoming.on_taken(raw_length as usize);
                        taken.push(number(&body));
                    }
                    Event::Ack => acks.push_back(incoming.taken()),
                    Event::AckArrives => if let Some(ack) = acks.pop_front() {
                        outgoing.on_ack(ack).unwrap();
                    }
                    Event::Cut => {
                        wire.clear();
                        acks.clear();
                        outgoing.resume(incoming.received()).unwrap();
                    }
                }
                prop_assert!(outgoing.load() <= WINDOW);
                prop_assert!(incoming.waiting <= WINDOW);
            }
            prop_assert_eq!(taken, (0..queued).collect::<Vec<_>>());
            prop_assert!(outgoing.is_empty());
        }
    }

    #[test]
    fn frames_that_come_twice_or_leave_a_gap_are_refused() {
        let mut incoming = Incoming::new(10_000);
        incoming.on_data(10);
        assert!(incoming.expects(1, 10).is_ok());
        for found in [0, 2] {
            assert_eq!(incoming.expects(found, 10), Err(SequenceError::OutOfOrder { expected: 1, found }));
        }
    }

    #[test]
    fn a_sender_that_ignores_the_window_is_refused() {
        let mut incoming = Incoming::new(1000);
        incoming.on_data(600);
        assert_eq!(incoming.expects(1, 600), Err(SequenceError::WindowExceeded { window: 1000 }));
        incoming.on_taken(600);
        assert!(incoming.expects(1, 600).is_ok());
    }

    #[test]
    fn acks_of_what_was_never_sent_are_refused() {
        let mut outgoing = Outgoing::new(10_000);
        outgoing.push(frame(0, 10));
        outgoing.push(frame(1, 10));
        outgoing.advance();
        assert_eq!(outgoing.on_ack(2), Err(SequenceError::Impossible { said: 2, from: 0, to: 1 }));
        assert_eq!(outgoing.resume(2), Err(SequenceError::Impossible { said: 2, from: 0, to: 1 }));
        outgoing.on_ack(1).unwrap();
        assert_eq!(outgoing.resume(0), Err(SequenceError::Impossible { said: 0, from: 1, to: 1 }));
    }
}
