//! What the sender is told of the other end: which blocks it has, what it lacks of those that were offered, and how it ended.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Condvar, Mutex, MutexGuard};

use vmferry_link::{Buffer, Link, LinkDown};

use super::send::{Progress, SendError};
use super::words::{BLOCK_HEAD, KnownTo, Lacking, Offer, kind};
use crate::blocks::{Grains, Sum, Sums, count, gathered, has, which};
use crate::carry::{Refused, decode_done};
use crate::known::Pays;

/// See the module's text.
#[derive(Default)]
pub(super) struct There {
    state: Mutex<State>,
    changed: Condvar,
    pub(super) pays: Pays,
}

#[derive(Default)]
struct State {
    /// What is there before this block is known.
    end: u64,
    sums: Sums,
    /// Blocks that were offered, with what is in them; until they are answered.
    offered: BTreeMap<u64, (Grains, Held)>,
    /// What is to be sent of those that were.
    rests: VecDeque<Rest>,
    done: Option<Result<(), SendError>>,
}

/// Of a block the other end lacks these grains.
pub(super) struct Rest {
    pub(super) block: u64,
    pub(super) grains: Grains,
    /// All of it.
    pub(super) held: Held,
}

/// A block as it was read, behind room for the words before it.
pub(super) struct Held(pub(super) Buffer);

impl Held {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0.as_ref()[BLOCK_HEAD..]
    }
}

impl There {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with this lock")
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).expect("nobody panics with this lock")
    }

    /// Waits until it is known what is there before this block; `None` when it is over.
    fn known_to(&self, end: u64) -> Option<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while state.end < end && state.done.is_none() {
            state = self.wait(state);
        }
        state.done.is_none().then_some(state)
    }

    /// Waits until it is known what is there before this block; `None` when it is over.
    pub(super) fn until(&self, end: u64) -> Option<()> {
        self.known_to(end).map(drop)
    }

    /// The blocks of these that are not zero there, once that is known; `None` when it is over.
    pub(super) fn among(&self, blocks: Range<u64>) -> Option<Vec<(u64, Sum)>> {
        let state = self.known_to(blocks.end)?;
        Some(state.sums.range(blocks).map(|(block, sum)| (*block, *sum)).collect())
    }

    /// This will be offered.
    pub(super) fn is_offered(&self, offer: &Offer, held: Held) {
        self.lock().offered.insert(offer.block, (offer.offered.full, held));
    }

    /// What is to be sent of what was offered; `None` when no more than so many offers are open, or it is over. Waits
    /// until one of that is so.
    pub(super) fn rest(&self, open: usize) -> Option<Rest> {
        let mut state = self.lock();
        loop {
            if state.done.is_some() {
                return None;
            }
            if let Some(rest) = state.rests.pop_front() {
                return Some(rest);
            }
            if state.offered.len() <= open {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// What was offered is there, but for this. Tells how many bytes are; `None` when that cannot be.
    fn lacks(&self, Lacking { block, grains }: Lacking) -> Option<u64> {
        let mut state = self.lock();
        let (full, held) = state.offered.remove(&block)?;
        if which(&grains).any(|number| !has(&full, number)) {
            return None;
        }
        let (all, lacking) = (count(&full), count(&grains));
        self.pays.came_of_it(all as u64, (all - lacking) as u64);
        let length = held.bytes().len();
        let known = gathered(&full, length) - gathered(&grains, length);
        if lacking > 0 {
            state.rests.push_back(Rest { block, grains, held });
        }
        drop(state);
        self.changed.notify_all();
        Some(known as u64)
    }

    fn is_done(&self, how: Result<(), SendError>) {
        self.lock().done.get_or_insert(how);
        self.changed.notify_all();
    }

    /// Waits for the end.
    pub(super) fn done(&self) -> Result<(), SendError> {
        let mut state = self.lock();
        loop {
            if let Some(done) = state.done.take() {
                return done;
            }
            state = self.wait(state);
        }
    }

    /// Hears what the other end says, until it has said how it ended.
    pub(super) fn listen(&self, link: &Link, progress: &Progress) {
        let how = loop {
            let frame = match link.recv_urgent() {
                Ok(Some(frame)) => frame,
                Ok(None) => break Err(SendError::Link(LinkDown::Closed)),
                Err(down) => break Err(down.into()),
            };
            match frame.kind {
                kind::KNOWN => {
                    let Some(known) = KnownTo::decode(&frame.payload) else { break Err(SendError::NoSense) };
                    let mut state = self.lock();
                    state.end = state.end.max(known.end);
                    state.sums.extend(known.sums);
                    drop(state);
                    self.changed.notify_all();
                }
                kind::LACKING => match Lacking::decode(&frame.payload).and_then(|it| self.lacks(it)) {
                    Some(known) => {
                        progress.same.fetch_add(known, Relaxed);
                    }
                    None => break Err(SendError::NoSense),
                },
                kind::DONE => match decode_done(&frame.payload) {
                    Some((_, result)) => break result.map_err(|refused: Refused| SendError::There(refused.into())),
                    None => break Err(SendError::NoSense),
                },
                _ => break Err(SendError::NoSense),
            }
        };
        self.is_done(how);
    }
}
