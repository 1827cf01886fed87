//! The threads that rewrite memory, and verify each page before they do.
//!
//! Each thread has a part of the memory to itself, and keeps beside it the sequence number that each page should hold.
//! A verification on demand is a round that all threads take part in, each at its next page boundary.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::console::Console;
use crate::pages::{Found, PAGE_BYTES, Page, Pattern, Random};
use crate::settings::{Mode, Settings};

/// Rewriting is reported each time a thread has done this much.
const REPORT_BYTES: u64 = 64 << 20;

/// Lines about damaged pages, after which they are only counted: memory lost as a whole must not drown the heartbeat.
const CORRUPT_LINES: u64 = 64;

/// A rate is kept over pieces of this length, as sleeps much shorter than that are not what they say.
const PACE: Duration = Duration::from_millis(2);

/// A paced thread that is later than this (the guest was paused, or cannot go that fast) does not catch up.
const FORGIVEN: Duration = Duration::from_millis(50);

/// What the writers share with each other and with whoever asks for a verification.
pub(crate) struct Shared {
    console: Arc<Console>,
    threads: u32,
    /// The verification that was asked for last; a writer compares it with the one it did last.
    round: AtomicU32,
    outcome: Mutex<Outcome>,
    changed: Condvar,
    /// Damaged pages ever seen, by verifications and before rewriting.
    corrupt: AtomicU64,
}

/// The verification under way.
#[derive(Default)]
struct Outcome {
    finished: u32,
    pages: u64,
    corrupt: u64,
}

impl Shared {
    pub(crate) fn new(console: Arc<Console>, threads: u32) -> Shared {
        Shared {
            console,
            threads,
            round: AtomicU32::new(0),
            outcome: Mutex::default(),
            changed: Condvar::new(),
            corrupt: AtomicU64::new(0),
        }
    }

    /// Has every thread verify its whole part and says what they found. One at a time.
    pub(crate) fn verify_all(&self) {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        *outcome = Outcome::default();
        self.round.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_all();
        while outcome.finished < self.threads {
            outcome = self.changed.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
        self.console.say(&format!(
            r#"{{"verified":{{"pages":{},"corrupt":{},"total":{}}}}}"#,
            outcome.pages,
            outcome.corrupt,
            self.corrupt.load(Ordering::Relaxed),
        ));
    }

    fn take_part(&self, pages: u64, corrupt: u64) {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.finished += 1;
        outcome.pages += pages;
        outcome.corrupt += corrupt;
        self.changed.notify_all();
    }

    /// Sleeps until the deadline (for ever without one) or until a round that is not this one is asked for.
    fn wait_for_round_after(&self, round: u32, deadline: Option<Instant>) {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        while self.round.load(Ordering::Relaxed) == round {
            outcome = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(outcome).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return,
                Some(left) => self.changed.wait_timeout(outcome, left).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
    }

    #[cold]
    fn report_corrupt(&self, page: u64, expected: u32, found: Found) {
        let before = self.corrupt.fetch_add(1, Ordering::Relaxed);
        if before < CORRUPT_LINES {
            let found = match found {
                Found::Sequence(sequence) => sequence.to_string(),
                Found::Torn => "torn".to_owned(),
            };
            self.console.say(&format!("CORRUPT page={page} expected={expected} found={found}"));
        }
    }
}

/// One thread's part of the memory.
pub(crate) struct Writer {
    thread: usize,
    pages: &'static mut [Page],
    /// The number of the first page, among those of all threads.
    first: u64,
    /// What sequence number each page should hold.
    expected: Vec<u32>,
    pattern: Arc<Pattern>,
    shared: Arc<Shared>,
    /// The last verification this thread took part in.
    round: u32,
    mode: Mode,
    rate: Option<u64>,
}

impl Writer {
    pub(crate) fn new(
        thread: usize,
        pages: &'static mut [Page],
        pattern: Arc<Pattern>,
        shared: Arc<Shared>,
        settings: &Settings,
    ) -> Writer {
        Writer {
            thread,
            first: (thread * pages.len()) as u64,
            expected: vec![0; pages.len()],
            pages,
            pattern,
            shared,
            round: 0,
            mode: settings.mode,
            rate: settings.rate.map(|rate| (rate / u64::from(settings.threads)).max(1)),
        }
    }

    /// Gives every page its first content.
    pub(crate) fn fill(mut self) -> Writer {
        for (index, page) in self.pages.iter_mut().enumerate() {
            self.expected[index] = 1; // Written, not left zero: the table is to be in memory from the start.
            self.pattern.write(page, self.first + index as u64, 1);
        }
        self
    }

    /// Rewrites pages as the mode says, and verifies when asked, for ever.
    pub(crate) fn run(mut self) -> ! {
        let mut next = match self.mode {
            Mode::Idle => loop {
                self.shared.wait_for_round_after(self.round, None);
                self.verify_if_asked();
            },
            Mode::Read => self.read(),
            Mode::Mixed if self.thread % 2 == 1 => self.read(),
            Mode::Write | Mode::Mixed => Order::InTurn { next: 0 },
            Mode::Random => Order::Random { random: Random::new(self.first), hot: None },
            Mode::HotCold => {
                Order::Random { random: Random::new(self.first), hot: Some(self.pages.len().div_ceil(10)) }
            }
        };
        let page_bytes = PAGE_BYTES as u64;
        let part = self.pages.len() as u64 * page_bytes;
        let mut pace = self.rate.map(|rate| Pace::new(rate, Instant::now()));
        let mut written = 0;
        let mut reported = Instant::now();
        loop {
            self.verify_if_asked();
            self.rewrite(next.next(self.pages.len()));
            written += page_bytes;
            if written.is_multiple_of(REPORT_BYTES) {
                let now = Instant::now();
                self.report("written", written / REPORT_BYTES, now - reported, written / part);
                reported = now;
            }
            if let Some(deadline) = pace.as_mut().and_then(|pace| pace.after(page_bytes)) {
                while Instant::now() < deadline {
                    self.shared.wait_for_round_after(self.round, Some(deadline));
                    self.verify_if_asked();
                }
            }
        }
    }

    /// Verifies pages in turn, for ever.
    fn read(mut self) -> ! {
        let page_bytes = PAGE_BYTES as u64;
        let part = self.pages.len() as u64 * page_bytes;
        let (mut order, mut read, mut reported) = (Order::InTurn { next: 0 }, 0, Instant::now());
        loop {
            self.verify_if_asked();
            let index = order.next(self.pages.len());
            let number = self.first + index as u64;
            if let Err(found) = self.pattern.verify(&self.pages[index], number, self.expected[index]) {
                self.shared.report_corrupt(number, self.expected[index], found);
            }
            read += page_bytes;
            if read.is_multiple_of(REPORT_BYTES) {
                let now = Instant::now();
                self.report("read", read / REPORT_BYTES, now - reported, read / part);
                reported = now;
            }
        }
    }

    #[inline]
    fn rewrite(&mut self, index: usize) {
        let number = self.first + index as u64;
        let expected = self.expected[index];
        let sequence = expected.wrapping_add(1);
        if let Err(found) = self.pattern.rewrite(&mut self.pages[index], number, expected, sequence) {
            self.shared.report_corrupt(number, expected, found);
        }
        self.expected[index] = sequence;
    }

    #[inline]
    fn verify_if_asked(&mut self) {
        let round = self.shared.round.load(Ordering::Relaxed);
        if round != self.round {
            self.round = round;
            self.verify_part();
        }
    }

    #[cold]
    fn verify_part(&self) {
        let mut corrupt = 0;
        for (index, (page, &expected)) in self.pages.iter().zip(&self.expected).enumerate() {
            let number = self.first + index as u64;
            if let Err(found) = self.pattern.verify(page, number, expected) {
                corrupt += 1;
                self.shared.report_corrupt(number, expected, found);
            }
        }
        self.shared.take_part(self.pages.len() as u64, corrupt);
    }

    #[cold]
    fn report(&self, what: &str, n: u64, took: Duration, pass: u64) {
        self.shared.console.say(&format!(
            r#"{{"{what}":{{"thread":{},"n":{n},"ms":{:.1},"pass":{pass}}}}}"#,
            self.thread,
            took.as_secs_f64() * 1e3,
        ));
    }
}

/// Which page comes next.
enum Order {
    InTurn {
        next: usize,
    },
    /// With `hot`, nine writes of ten go to that many pages.
    Random {
        random: Random,
        hot: Option<usize>,
    },
}

impl Order {
    #[inline]
    fn next(&mut self, pages: usize) -> usize {
        match self {
            Order::InTurn { next } => {
                let this = *next;
                *next = if this + 1 == pages { 0 } else { this + 1 };
                this
            }
            Order::Random { random, hot: None } => random.below(pages),
            Order::Random { random, hot: Some(hot) } => {
                let bound = if random.below(10) < 9 { *hot } else { pages };
                random.below(bound)
            }
        }
    }
}

/// Keeps a thread to its rate, piece by piece.
struct Pace {
    bytes_per_second: u64,
    /// A piece: written at once, then slept for.
    piece: u64,
    done: u64,
    deadline: Instant,
}

impl Pace {
    fn new(bytes_per_second: u64, now: Instant) -> Pace {
        let in_one_pace = bytes_per_second * u64::try_from(PACE.as_millis()).expect("a few") / 1000;
        Pace { bytes_per_second, piece: in_one_pace.max(PAGE_BYTES as u64), done: 0, deadline: now }
    }

    /// To be told of bytes written; says until when to sleep, when a piece is done.
    #[inline]
    fn after(&mut self, bytes: u64) -> Option<Instant> {
        self.done += bytes;
        (self.done >= self.piece).then(|| self.end_piece(Instant::now()))
    }

    fn end_piece(&mut self, now: Instant) -> Instant {
        self.deadline += Duration::from_secs_f64(self.done as f64 / self.bytes_per_second as f64);
        self.done = 0;
        if self.deadline + FORGIVEN < now {
            self.deadline = now;
        }
        self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_turn_visits_every_page_and_starts_over() {
        let mut order = Order::InTurn { next: 0 };
        let visited: Vec<_> = (0..7).map(|_| order.next(3)).collect();
        assert_eq!(visited, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn a_tenth_of_the_pages_gets_nine_tenths_of_the_writes() {
        let mut order = Order::Random { random: Random::new(1), hot: Some(100) };
        let hot = (0..10_000).filter(|_| order.next(1000) < 100).count();
        // The cold tenth of the writes goes anywhere, so a tenth of it is hot too.
        assert!((9000..9200).contains(&hot), "{hot}");
    }

    #[test]
    fn a_pace_keeps_its_rate_and_does_not_catch_up() {
        let start = Instant::now();
        let mut pace = Pace::new(100 << 20, start);
        pace.done = 10 << 20;
        assert_eq!(pace.end_piece(start), start + Duration::from_millis(100));
        let late = start + Duration::from_secs(9);
        pace.done = 10 << 20;
        assert_eq!(pace.end_piece(late), late);
    }
}
