//! From an observation to an action: when a migration goes on, throttles, switches over, turns to post-copy or gives up.
//!
//! A policy is a pure function with memory: no clock, no I/O, no async. Whoever drives a migration shows it what was
//! seen ([`Observation`]) and does what it says ([`Action`]); the same policy can therefore steer any RAM engine, a
//! simulator or a recorded run.

mod after_rounds;
mod simple;

pub use after_rounds::AfterRounds;
pub use simple::Simple;

use std::time::Duration;

/// An amount of data, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// A rate, in bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BytesPerSec(pub u64);

/// A share of a whole, 0 to 100.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(pub u8);

impl Bytes {
    /// How long the link takes for this much; `None` while no rate is known.
    pub fn time_at(self, rate: BytesPerSec) -> Option<Duration> {
        (rate.0 > 0).then(|| Duration::from_secs_f64(self.0 as f64 / rate.0 as f64))
    }
}

/// Where copying the RAM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest runs on the source while its RAM is sent, round by round.
    PreCopy,
    /// The source is paused and the destination does not run yet.
    SwitchOver,
    /// The guest runs on the destination; what it misses follows.
    PostCopy,
}

/// What the user set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nobody may run the guest for longer than this at switchover, as far as pre-copy can tell beforehand.
    pub downtime: Duration,
    /// The whole migration should be over by then.
    pub max_time: Option<Duration>,
    /// Post-copy is allowed and both sides can do it.
    pub post_copy: bool,
}

/// What is seen of a migration at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Since copying the RAM began.
    pub elapsed: Duration,
    /// Where it stands.
    pub phase: Phase,
    /// The pre-copy round, from 1.
    pub round: u32,
    /// What is still to be sent in this round, or in post-copy at all.
    pub remaining: Bytes,
    /// The guest's RAM.
    pub total: Bytes,
    /// How much of what the first round has sent the guest has written again; 0 while too little was sent to tell, and
    /// where that is not known before the end of a round.
    pub stale: Percent,
    /// What went over the link so far.
    pub sent: Bytes,
    /// How fast the guest makes pages stale, as of the last completed round; before that as far as it is seen, or 0.
    pub dirty_rate: BytesPerSec,
    /// How fast the link carries RAM; 0 when not known yet.
    pub link_rate: BytesPerSec,
    /// How much the guest is slowed down on purpose.
    pub throttle: Percent,
    /// The guest's writes can be paced.
    pub can_pace: bool,
    /// What the user set.
    pub limits: Limits,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: go on as it is.
    Continue,
    /// Slow the guest down by this share of its time.
    Throttle(Percent),
    /// Have the guest make pages stale no faster than this share of what the link carries.
    Pace(Percent),
    /// Let the destination run at once and fetch what it misses.
    PostCopy,
    /// Pause the guest, and send what is left while it stands still.
    Pause,
    /// Stop the migration; the guest stays where it is.
    GiveUp(Reason),
}

/// Why a policy gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The time the user allowed is over and post-copy may not be used.
    OutOfTime {
        /// What the user allowed.
        allowed: Duration,
    },
    /// Throttled as far as it goes, the guest still writes faster than the link carries.
    NotConverging {
        /// How fast the guest makes pages stale.
        dirty_rate: BytesPerSec,
        /// How fast the link carries them.
        link_rate: BytesPerSec,
    },
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::OutOfTime { allowed } => {
                write!(f, "not done within the {:.0} s allowed, and post-copy may not be used", allowed.as_secs_f64())
            }
            Reason::NotConverging { dirty_rate, link_rate } => write!(
                f,
                "the guest writes {:.0} MiB/s, the link carries {:.0} MiB/s, and neither throttling nor post-copy could help",
                dirty_rate.0 as f64 / 1_048_576.0,
                link_rate.0 as f64 / 1_048_576.0
            ),
        }
    }
}

/// Decides what a migration does next.
pub trait Policy: Send {
    /// What to do, given what is seen now. Called several times a second, in the order of time.
    fn decide(&mut self, seen: &Observation) -> Action;
}
