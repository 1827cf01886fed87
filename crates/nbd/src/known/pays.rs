//! Whether it pays to offer what is to be sent. Without a clock and without I/O.
//!
//! An offer costs 1/128 of what it is about, reading at the other end, and a way there and back. So where nothing comes of
//! it there are fewer and fewer, and where something does they go on.

use std::sync::{Mutex, MutexGuard};

/// After so many grains were offered it is seen what came of it: 16 MiB.
const TRIAL: u64 = 4096;
/// Less than one in so many known does not pay.
const LEAST: u64 = 16;
/// So many grains are sent without being offered then: 64 MiB the first time, and twice as many each time after that, up to
/// a GiB.
const PAUSE: (u64, u64) = (16 << 10, 256 << 10);

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Pays(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    offered: u64,
    known: u64,
    /// So many are not to be offered.
    skip: u64,
    pauses: u32,
}

impl Pays {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics with this lock")
    }

    /// Whether so many grains are to be offered.
    pub(crate) fn offer(&self, grains: u64) -> bool {
        let mut state = self.lock();
        let skipped = state.skip > 0;
        state.skip = state.skip.saturating_sub(grains);
        !skipped
    }

    /// Of so many that were offered so many were known.
    pub(crate) fn came_of_it(&self, offered: u64, known: u64) {
        let mut state = self.lock();
        state.offered += offered;
        state.known += known;
        if state.offered < TRIAL {
            return;
        }
        if state.known * LEAST < state.offered {
            state.skip = (PAUSE.0 << state.pauses.min(16)).min(PAUSE.1);
            state.pauses += 1;
        } else {
            state.pauses = 0;
        }
        (state.offered, state.known) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of these blocks are offered, when of each so many grains are known.
    fn offered(blocks: impl Iterator<Item = u64>) -> u64 {
        let pays = Pays::default();
        let mut offered = 0;
        for known in blocks {
            if pays.offer(256) {
                offered += 1;
                pays.came_of_it(256, known);
            }
        }
        offered
    }

    #[test]
    fn what_is_known_goes_on_being_offered_and_what_is_not_hardly_is() {
        assert_eq!(offered((0..10_000).map(|_| 20)), 10_000);
        let in_vain = offered((0..10_000).map(|_| 1));
        assert!(in_vain < 300, "{in_vain}");
        // It begins to pay after half of a TiB.
        let late = offered((0..1 << 20).map(|block| if block < 1 << 19 { 0 } else { 256 }));
        assert!(late > (1 << 19) - 2000, "{late}");
    }
}
