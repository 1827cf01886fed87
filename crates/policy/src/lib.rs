//! From an observation to an action: when a migration goes on, slows the guest, switches over, turns to post-copy or gives
//! up.
//!
//! A policy is a pure function with memory: no clock, no I/O, no async. Whoever drives a migration shows it what was
//! seen ([`Observation`]) and does what it says ([`Action`]); the same policy can therefore steer any RAM engine, a
//! simulator or a recorded run.
//!
//! [`LeastHarm`] is ours: it predicts what each way forward would do ([`predict`](mod@predict)) from what scans have
//! told of the guest ([`DirtySet`]), and takes the one that harms the guest least ([`harm`](mod@harm)). docs/POLICY.md
//! has the formulas. [`baselines`] are what others decide. A [`Lesson`] is what came of earlier predictions.

mod after_rounds;
pub mod baselines;
mod choices;
mod dirty_set;
pub mod harm;
mod least_harm;
mod lesson;
mod link;
pub mod predict;
pub mod queue;
mod units;

pub use after_rounds::AfterRounds;
pub use dirty_set::{DirtySet, Range};
pub use least_harm::LeastHarm;
pub use lesson::Lesson;
pub use link::LinkRate;
pub use units::{Bytes, BytesPerSec, Percent};

use std::time::Duration;

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
    /// Nobody may run the guest for longer than this at switchover, as far as can be told beforehand.
    pub downtime: Duration,
    /// The whole migration should be over by then.
    pub max_time: Option<Duration>,
    /// Post-copy is allowed and both sides can do it.
    pub post_copy: bool,
    /// By how much the guest may be slowed down: 0 is not at all, 100 as much as it takes.
    pub slow: Percent,
    /// The most that may be sent, in bytes a second.
    pub bandwidth: Option<BytesPerSec>,
    /// What is done when no way keeps these.
    pub otherwise: Otherwise,
    /// What matters more.
    pub prefer: Preference,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            max_time: None,
            post_copy: true,
            slow: Percent(100),
            bandwidth: None,
            otherwise: Otherwise::Finish,
            prefer: Preference::Short,
        }
    }
}

impl Limits {
    /// The same where post-copy may not be used: who says by when it has to be done wants the guest to stay otherwise.
    #[must_use]
    pub fn without_post_copy(self) -> Self {
        let otherwise = if self.max_time.is_some() { Otherwise::GiveUp } else { self.otherwise };
        Self { post_copy: false, otherwise, ..self }
    }

    /// For how long pages may be sent while nobody runs the guest: what the rest of a switchover leaves of the downtime,
    /// and however long that takes, a quarter.
    pub fn for_pages(&self, costs: &Costs) -> Duration {
        self.downtime.saturating_sub(costs.switchover).max(self.downtime / 4)
    }
}

/// What matters more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// That it is soon over.
    #[default]
    Short,
    /// That the guest feels little of it.
    Gentle,
}

/// What is done when no way keeps the limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Otherwise {
    /// The migration ends by the way that exceeds them least.
    #[default]
    Finish,
    /// The guest stays where it is.
    GiveUp,
}

/// Which levers the engine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Means {
    /// The guest's writes can be paced ([`Action::Pace`]).
    pub pace: bool,
    /// Its processors can be slowed down ([`Action::Throttle`]).
    pub throttle: bool,
}

/// What a switch costs, as far as the engine knows: its own last ones, or what is usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// What a switchover takes besides the pages that are left.
    pub switchover: Duration,
    /// For how long nobody runs the guest when it turns to post-copy.
    pub post_copy: Duration,
    /// How long the guest waits for a page that it misses.
    pub fault: Duration,
}

impl Default for Costs {
    /// Measured (docs/FIGURES.md): 20 to 50 ms of switchover, faults of 3.1 and 3.3 ms (medians).
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self { switchover: ms(40), post_copy: ms(50), fault: ms(3) }
    }
}

/// What a look at all pages has found. One ends each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// Since the scan before, or since the copy began: how long the round took.
    pub interval: Duration,
    /// What is to be sent since then: what the guest wrote in that time and is not at the destination.
    pub left: Bytes,
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
    /// The scan that began this round; none in the first one.
    pub scan: Option<Scan>,
    /// How much of what the first round has sent the guest has written again; 0 while too little was sent to tell, and
    /// where that is not known before the end of a round.
    pub stale: Bytes,
    /// What went over the link so far.
    pub sent: Bytes,
    /// How fast the guest makes pages stale, as of the last completed round; before that as far as it is seen, or 0.
    pub dirty_rate: BytesPerSec,
    /// How fast the link carries RAM; 0 when not known yet.
    pub link_rate: BytesPerSec,
    /// How long a byte takes there and an answer back; 0 when not known.
    pub round_trip: Duration,
    /// How much the guest is slowed down on purpose.
    pub throttle: Percent,
    /// What the engine can do.
    pub means: Means,
    /// What a switch costs.
    pub costs: Costs,
    /// What the user set.
    pub limits: Limits,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: go on as it is.
    Continue,
    /// From here on, switch over at the first scan that leaves no more pages than take this long to send. Before the
    /// first of these no engine switches over by itself.
    Allow(Duration),
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The time is over that it was allowed, or that it allows itself.
    OutOfTime {
        /// What was allowed.
        allowed: Duration,
    },
    /// The guest writes faster than the link carries, and nothing that is allowed helps.
    NotConverging {
        /// How fast the guest makes pages stale.
        dirty_rate: BytesPerSec,
        /// How fast the link carries them.
        link_rate: BytesPerSec,
        /// What the least harmful way would have taken, in words; empty when that is not known.
        instead: String,
    },
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::OutOfTime { allowed } => {
                write!(f, "not done within the {:.0} s allowed, and post-copy may not be used", allowed.as_secs_f64())
            }
            Reason::NotConverging { dirty_rate, link_rate, instead } => {
                write!(
                    f,
                    "the guest writes {dirty_rate}, the link carries {link_rate}, and nothing that is allowed keeps the limits"
                )?;
                match instead.as_str() {
                    "" => Ok(()),
                    instead => write!(f, "; the least that it takes: {instead}"),
                }
            }
        }
    }
}

/// Decides what a migration does next.
pub trait Policy: Send {
    /// What to do, given what is seen now. Called several times a second and at each scan, in the order of time.
    fn decide(&mut self, seen: &Observation) -> Action;

    /// The last decision in one line, where it was made since this was asked last.
    fn words(&mut self) -> Option<String> {
        None
    }
}
