//! Post-copy at the source: pages that faults ask for at once, and all others one after the other.

use super::shipping::{Shipping, There};
use super::{Inner, Phase, RamError};
use crate::wire::{
    ARMED, COMPLETE, MISSING, MOST_DATA, Malformed, PLACED, PUNCHED, READY, REFUSED, WANT, Want, decode_missing,
    decode_number,
};

impl Inner {
    /// Hears what the destination says, until the link is over.
    pub(super) fn listen(&self) -> Result<(), RamError> {
        let blocks: Vec<u64> = self.pending.iter().map(crate::pages::PageSet::pages).collect();
        while let Some(frame) = self.link.recv_urgent()? {
            match frame.kind {
                PLACED => {
                    if !self.shipping.on_placed(decode_number(&frame.payload)?) {
                        return Err(Malformed("it has put into place what was not sent").into());
                    }
                }
                WANT if self.lock().phase == Phase::PostCopy => self.answer(&Want::decode(&frame.payload, &blocks)?)?,
                READY => {
                    if self.resumed {
                        self.recount();
                    }
                    self.lock().ready = true;
                }
                // Only to a source that resumes: before it is ready.
                MISSING if self.resumed && !self.lock().ready => decode_missing(&frame.payload, &self.pending)?,
                PUNCHED if self.lock().phase == Phase::Punching => self.lock().phase = Phase::PreCopy,
                ARMED if self.lock().phase == Phase::Arming => self.lock().phase = Phase::PostCopy,
                COMPLETE if self.lock().phase == Phase::PostCopy => self.lock().complete = true,
                REFUSED => {
                    return Err(RamError::Refused { reason: String::from_utf8_lossy(&frame.payload).into_owned() });
                }
                _ => return Err(Malformed("a frame that has no place here").into()),
            }
            self.news.notify_all();
        }
        Err(RamError::Link(vmferry_link::LinkDown::Closed))
    }

    /// Sends what a fault asks for, unless it is on its way already, and goes on from there.
    fn answer(&self, want: &Want) -> Result<(), RamError> {
        let set = &self.pending[want.block];
        self.lock().cursor = (want.block, want.pages.end);
        let mut frame = self.shipping.filling();
        while let Some(run) = set.take_run(want.pages.clone(), MOST_DATA) {
            self.fewer(run.end - run.start);
            self.read(&mut frame, want.block, run, There::Something, Shipping::ship_urgently)?;
        }
        Ok(self.shipping.ship_urgently(frame)?)
    }

    /// Sends what nobody has asked for yet.
    pub(super) fn push(&self) -> Result<(), RamError> {
        loop {
            let mut frame = self.shipping.filling();
            while frame.room() > 0
                && let Some((block, run)) = self.next_to_push(frame.room())
            {
                self.fewer(run.end - run.start);
                frame.read(&self.ram, block, run, There::Something).map_err(RamError::io)?;
            }
            if frame.is_empty() {
                return Ok(());
            }
            self.shipping.ship(frame)?;
        }
    }

    /// The next pages from where the last fault was, and then around.
    fn next_to_push(&self, most: u64) -> Option<(usize, std::ops::Range<u64>)> {
        let mut state = self.lock();
        let (block, page) = state.cursor;
        let blocks = self.pending.len();
        // The block of the cursor comes twice: from there on, and up to there.
        let parts = (0..=blocks).map(|turn| ((block + turn) % blocks, if turn == 0 { page } else { 0 }));
        let found = parts.into_iter().find_map(|(block, from)| {
            let set = &self.pending[block];
            Some((block, set.take_run(from.min(set.pages())..set.pages(), most)?))
        });
        if let Some((block, run)) = &found {
            state.cursor = (*block, run.end);
        }
        found
    }
}
