//! Post-copy at the source: pages that faults ask for at once, and all others one after the other.
//!
//! A guest that begins anew touches some hundred pages one after the other, and each waits behind what is on its way. So
//! nothing else is sent then, until it asks for less ([`QUIET`]).

use std::time::{Duration, Instant};

use super::shipping::{Shipping, There};
use super::{Inner, Phase, RamError, workers};
use crate::PAGE;
use crate::wire::{
    ARMED, BUSY, COMPLETE, FaultTimes, MISSING, Malformed, PLACED, PUNCHED, READY, REFUSED, WANT, Want, decode_missing,
    decode_number,
};

/// What nobody asked for is not sent while a fault, or the switch, is no longer ago than that: a fault after it would wait
/// for all that fills the link meanwhile...
const QUIET: Duration = Duration::from_millis(10);
/// ...but for no longer than that in all: the link is not to lie idle for a guest that jumps.
const QUIET_AT_MOST: Duration = Duration::from_millis(300);
/// So long may pages take that go with the pause.
const WITH_THE_PAUSE: Duration = Duration::from_millis(8);
/// So many may go at least: 64 KiB.
const LEAST_WITH_THE_PAUSE: u64 = 16;
/// The most pages that lie alone.
const ALONE: u64 = 16;
/// So many runs are looked at for them: a large guest is not walked through while it is paused.
const MOST_RUNS_SEEN: u64 = 1 << 16;
/// How often it is looked whether the guest asks for less.
const GLANCE: Duration = Duration::from_micros(500);

impl Inner {
    /// Hears what the destination says, until the link is over.
    pub(super) fn listen(&self) -> Result<(), RamError> {
        vmferry_link::go_first();
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
                MISSING if self.resumed && !self.lock().ready => drop(decode_missing(&frame.payload, &self.pending)?),
                PUNCHED if self.lock().phase == Phase::Punching => self.lock().phase = Phase::PreCopy,
                ARMED if self.lock().phase == Phase::Arming => self.lock().phase = Phase::PostCopy,
                BUSY => self.lock().busy = Some(Instant::now()),
                COMPLETE if self.lock().phase == Phase::PostCopy => {
                    let times = FaultTimes::decode(&frame.payload)?;
                    let mut state = self.lock();
                    (state.complete, state.fault_times) = (true, Some(times));
                }
                REFUSED => {
                    return Err(RamError::Refused { reason: String::from_utf8_lossy(&frame.payload).into_owned() });
                }
                _ => return Err(Malformed("a frame that has no place here").into()),
            }
            self.news.notify_all();
        }
        Err(RamError::Link(vmferry_link::LinkDown::Closed))
    }

    /// Sends what a fault asks for, unless it is on its way already, and goes on from there. The page that somebody waits
    /// for goes alone and first.
    fn answer(&self, want: &Want) -> Result<(), RamError> {
        let set = &self.pending[want.block];
        {
            let mut state = self.lock();
            (state.cursor, state.wanted) = ((want.block, want.pages.end), Some(Instant::now()));
        }
        for pages in [want.first..want.first + 1, want.pages.clone()] {
            let mut frame = self.shipping.filling();
            while let Some(run) = set.take_run(pages.clone(), frame.room()) {
                self.fewer(run.end - run.start);
                self.read(&mut frame, want.block, run, There::Something, Shipping::ship_urgently)?;
                if frame.room() == 0 {
                    self.shipping.ship_urgently(std::mem::replace(&mut frame, self.shipping.filling()))?;
                }
            }
            self.shipping.ship_urgently(frame)?;
        }
        Ok(())
    }

    /// Sends what the guest is likely to touch first, so that it is there before the guest runs: stale pages that lie alone.
    /// Who rewrites much at a time leaves long runs; a kernel's own data, stacks and page tables are written here and there.
    pub(super) fn send_first_pages(&self) -> Result<(), RamError> {
        let fit = self.shipping.rate() as f64 * WITH_THE_PAUSE.as_secs_f64() / PAGE as f64;
        let mut left = (fit as u64).max(LEAST_WITH_THE_PAUSE);
        let (mut frame, mut runs) = (self.shipping.filling(), 0);
        'all: for (block, set) in self.pending.iter().enumerate() {
            let mut from = 0;
            while let Some(run) = set.next_run(from..set.pages()) {
                from = run.end;
                runs += 1;
                if runs > MOST_RUNS_SEEN || left == 0 {
                    break 'all;
                }
                if run.end - run.start <= ALONE.min(left)
                    && let Some(run) = set.take_run(run, ALONE)
                {
                    let length = run.end - run.start;
                    left -= length;
                    self.fewer(length);
                    self.read(&mut frame, block, run, There::Something, Shipping::ship_urgently)?;
                }
            }
        }
        Ok(self.shipping.ship_urgently(frame)?)
    }

    /// Waits while the guest asks for page after page.
    fn be_quiet(&self) {
        loop {
            let state = self.lock();
            let asks = state.wanted.is_some_and(|wanted| wanted.elapsed() < QUIET);
            if !asks || state.quiet >= QUIET_AT_MOST || state.failed.is_some() {
                return;
            }
            drop(state);
            let begun = Instant::now();
            std::thread::sleep(GLANCE);
            // All that push wait at the same time. On a busy host it takes longer than was asked for.
            self.lock().quiet += begun.elapsed() / workers() as u32;
        }
    }

    /// Sends what nobody has asked for yet.
    pub(super) fn push(&self) -> Result<(), RamError> {
        loop {
            // Before pages are taken: who waits for one of them must find it.
            self.be_quiet();
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
