//! What is done in one run of the torture, drawn from a seed: a plain value. The same seed always gives the same plan.

use std::fmt;
use std::time::Duration;

/// The source of the migration, and its destination.
pub(super) const ALPHA: usize = 0;
pub(super) const BETA: usize = 1;
const HOSTS: [&str; 2] = ["alpha", "beta"];

/// Everything about one run that can be decided beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub seed: u64,
    pub engine: Engine,
    pub qemus: Qemus,
    pub post_copy: bool,
    pub limits: Vec<Limit>,
    /// What the guest rewrites, in MiB/s; as fast as it can, when absent.
    pub writes: Option<u64>,
    /// One or two.
    pub strikes: Vec<Strike>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Engine {
    External,
    Qemu,
}

/// Which QEMU is where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Qemus {
    Newer,
    Older,
    OlderToNewer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Bandwidth,
    /// In seconds.
    MaxTime(u64),
    /// In ms.
    Downtime(u64),
}

/// A fault, and when it strikes: so long after this was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strike {
    pub moment: Moment,
    pub delay_ms: u64,
    pub fault: Fault,
}

/// What can be seen of a migration, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Moment {
    /// `vmferry migrate` was started.
    Command,
    Prepare,
    Copy,
    /// The guest was paused at the source.
    SwitchOver,
    /// The destination has said that it owns the guest, or runs it.
    Commit,
    PostCopy,
    Retire,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    KillAgent {
        host: usize,
        back_ms: u64,
    },
    KillBothAgents {
        back_ms: [u64; 2],
    },
    FreezeAgent {
        host: usize,
        for_ms: u64,
    },
    KillQemu {
        host: usize,
    },
    FreezeQemu {
        host: usize,
        for_ms: u64,
    },
    /// Needs root.
    CutLink {
        for_ms: u64,
    },
    /// Needs root.
    FillState {
        host: usize,
        for_ms: u64,
    },
    Cancel,
    Stop {
        host: usize,
        force: bool,
    },
    Reboot,
    PowerOff {
        button: bool,
    },
    /// By its user, who lets it go on when all is over.
    Pause,
}

impl Plan {
    pub(super) fn draw(seed: u64) -> Self {
        let mut draw = Draw(seed);
        let engine = draw.one_of(&[Engine::External, Engine::Qemu]);
        let qemus = draw.one_of(&[Qemus::Newer, Qemus::Newer, Qemus::Older, Qemus::OlderToNewer]);
        let mut strikes = vec![Strike::draw(&mut draw)];
        if draw.below(100) < 35 {
            strikes.push(Strike::draw(&mut draw));
        }
        let in_post_copy = strikes.iter().any(|strike| strike.moment == Moment::PostCopy);
        // An older QEMU that moves the RAM itself cannot do without, under emulation; README.md, Which QEMU.
        let must_post_copy = in_post_copy || (engine == Engine::Qemu && qemus != Qemus::Newer);
        let post_copy = must_post_copy || draw.below(2) == 0;
        let limits = match in_post_copy {
            // It comes to it, and lasts some seconds.
            true => vec![Limit::Bandwidth, Limit::MaxTime(1)],
            false => draw.one_of(&[
                vec![],
                vec![Limit::Bandwidth],
                vec![Limit::Bandwidth, Limit::MaxTime(6)],
                vec![Limit::MaxTime(5)],
                vec![Limit::Downtime(1000)],
                vec![Limit::Bandwidth, Limit::Downtime(60)],
            ]),
        };
        let writes = if in_post_copy { None } else { draw.one_of(&[None, Some(24), Some(24)]) };
        Self { seed, engine, qemus, post_copy, limits, writes, strikes }
    }

    /// The arguments of `vmferry migrate` beside what is always said.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        for limit in &self.limits {
            words.extend(limit.words().map(String::from));
        }
        if !self.post_copy {
            words.push("--no-post-copy".into());
        }
        words
    }

    /// The source's QEMU loses writes, so that the guest is paused and moves by post-copy.
    pub(super) fn is_paused_first(&self) -> bool {
        self.engine == Engine::Qemu && self.qemus != Qemus::Newer
    }

    pub(super) fn has(&self, is: impl Fn(Fault) -> bool) -> bool {
        self.strikes.iter().any(|strike| is(strike.fault))
    }
}

impl Strike {
    fn draw(draw: &mut Draw) -> Self {
        use Moment::{Command, Commit, Copy, PostCopy, Prepare, Retire, SwitchOver};
        let moment = draw.one_of(&[Command, Prepare, Copy, Copy, SwitchOver, SwitchOver, Commit, PostCopy, Retire]);
        // Often soon: many a migration is over within a second.
        let (soon, late) = match moment {
            Command => (1500, 6000),
            Prepare => (150, 500),
            Copy => (500, 3000),
            SwitchOver => (30, 120),
            Commit | Retire => (10, 60),
            PostCopy => (300, 2500),
        };
        let number = draw.next();
        let delay_ms = number / 2 % if number.is_multiple_of(2) { soon } else { late };
        Self { moment, delay_ms, fault: Fault::draw(draw) }
    }
}

impl Fault {
    fn draw(draw: &mut Draw) -> Self {
        let host = draw.one_of(&[ALPHA, BETA]);
        match draw.below(14) {
            0 | 1 => Self::KillAgent { host, back_ms: draw.below(3001) },
            2 => Self::KillBothAgents { back_ms: [draw.below(3001), draw.below(3001)] },
            3 | 4 => Self::FreezeAgent { host, for_ms: draw.between(500, 8000) },
            5 => Self::KillQemu { host },
            6 => Self::FreezeQemu { host, for_ms: draw.between(200, 5000) },
            7 | 8 => Self::CutLink { for_ms: draw.between(100, 20_000) },
            9 => Self::FillState { host, for_ms: draw.between(2000, 10_000) },
            10 => Self::Cancel,
            11 => Self::Stop { host, force: draw.below(2) == 0 },
            12 => draw.one_of(&[Self::Reboot, Self::PowerOff { button: true }, Self::PowerOff { button: false }]),
            _ => Self::Pause,
        }
    }

    /// For the table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::KillAgent { host: ALPHA, .. } => "kill source's agent",
            Self::KillAgent { .. } => "kill destination's agent",
            Self::KillBothAgents { .. } => "kill both agents",
            Self::FreezeAgent { host: ALPHA, .. } => "freeze source's agent",
            Self::FreezeAgent { .. } => "freeze destination's agent",
            Self::KillQemu { host: ALPHA } => "kill source's QEMU",
            Self::KillQemu { .. } => "kill destination's QEMU",
            Self::FreezeQemu { host: ALPHA, .. } => "freeze source's QEMU",
            Self::FreezeQemu { .. } => "freeze destination's QEMU",
            Self::CutLink { .. } => "cut the link",
            Self::FillState { host: ALPHA, .. } => "fill source's disk",
            Self::FillState { .. } => "fill destination's disk",
            Self::Cancel => "cancel",
            Self::Stop { .. } => "stop",
            Self::Reboot => "reboot",
            Self::PowerOff { .. } => "power off",
            Self::Pause => "pause",
        }
    }
}

impl Limit {
    fn words(self) -> [String; 2] {
        match self {
            Self::Bandwidth => ["--bandwidth".into(), "40MiB/s".into()],
            Self::MaxTime(seconds) => ["--max-time".into(), format!("{seconds}s")],
            Self::Downtime(ms) => ["--downtime".into(), format!("{ms}ms")],
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let writes = self.writes.map_or("writes all it can".into(), |rate| format!("writes {rate} MiB/s"));
        write!(f, "{}, {}, {writes}", self.engine, self.qemus)?;
        for word in self.arguments() {
            write!(f, "{}{word}", if word.starts_with("--") { ", " } else { " " })?;
        }
        for (index, strike) in self.strikes.iter().enumerate() {
            write!(f, "{} {strike}", if index == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::External => "external",
            Self::Qemu => "qemu",
        })
    }
}

impl fmt::Display for Qemus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Newer => "newer QEMUs",
            Self::Older => "older QEMUs",
            Self::OlderToNewer => "older to newer QEMU",
        })
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Command => "command",
            Self::Prepare => "prepare",
            Self::Copy => "copy",
            Self::SwitchOver => "switch-over",
            Self::Commit => "commit",
            Self::PostCopy => "post-copy",
            Self::Retire => "retire",
        })
    }
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms after {}: {}", self.delay_ms, self.moment, self.fault)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        match self {
            Self::KillAgent { back_ms, .. } => write!(f, "{name}, back after {back_ms} ms"),
            Self::KillBothAgents { back_ms: [a, b] } => write!(f, "{name}, back after {a} and {b} ms"),
            Self::FreezeAgent { for_ms, .. }
            | Self::FreezeQemu { for_ms, .. }
            | Self::CutLink { for_ms }
            | Self::FillState { for_ms, .. } => write!(f, "{name} for {for_ms} ms"),
            Self::Stop { host, force } => {
                write!(f, "{name} on {}{}", HOSTS[*host], if *force { " by force" } else { "" })
            }
            Self::PowerOff { button: true } => write!(f, "{name} by its button"),
            Self::KillQemu { .. } | Self::Cancel | Self::Reboot | Self::PowerOff { .. } | Self::Pause => {
                f.write_str(name)
            }
        }
    }
}

/// `SplitMix64` (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014): the numbers that a seed
/// gives must not change with the version of a library.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }

    fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize].clone()
    }
}

/// So long.
pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn a_seed_always_gives_the_same_plan_and_another_seed_another() {
    for seed in 0..200 {
        assert_eq!(Plan::draw(seed), Plan::draw(seed));
        assert_ne!(Plan::draw(seed).to_string(), Plan::draw(seed + 1).to_string());
    }
    // Somebody else's seed must mean the same.
    assert_eq!(
        Plan::draw(1).to_string(),
        "qemu, older to newer QEMU, writes 24 MiB/s, --downtime 1000ms: 2117 ms after copy: kill both agents, back after \
         2486 and 1996 ms; 368 ms after prepare: kill source's agent, back after 447 ms"
    );
}

#[test]
fn the_seeds_reach_every_fault_in_every_phase_with_both_engines() {
    let mut seen = std::collections::BTreeSet::new();
    for plan in (0..20_000).map(Plan::draw) {
        assert!(!plan.to_string().contains('\n'));
        seen.extend(plan.strikes.iter().map(|strike| (strike.fault.name(), strike.moment, plan.engine)));
    }
    assert_eq!(seen.len(), 17 * 7 * 2);
}
