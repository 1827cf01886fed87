//! A guest: parts of its memory, each written at its own rate, all of them at once or one page after another.

use crate::Random;

pub(crate) const MIB: f64 = 1_048_576.0;
pub(crate) const GIB: f64 = 1024.0 * MIB;

/// A part of a guest's memory within which all pages are alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Its size, in bytes.
    pub bytes: f64,
    /// How much is written to it, in bytes of pages a second; what is written twice counts twice.
    pub rate: f64,
    /// One page after another, rather than anywhere.
    pub sweeps: bool,
    /// It is all zero when the migration begins.
    pub zero: bool,
}

/// See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Guest {
    /// What it is.
    pub name: String,
    /// Its RAM, without what is zero and stays so.
    pub parts: Vec<Part>,
    /// RAM that is zero and stays so, in bytes.
    pub zero: f64,
    /// It writes at these shares of its rates, each for so many seconds, over and over; always the same when empty.
    pub phases: Vec<(f64, f64)>,
    /// Processors.
    pub processors: f64,
}

impl Guest {
    fn new(name: String, parts: Vec<Part>, ram: f64) -> Self {
        let used: f64 = parts.iter().map(|part| part.bytes).sum();
        Self { name, parts, zero: (ram - used).max(0.0), phases: Vec::new(), processors: 2.0 }
    }

    fn part(bytes: f64, rate: f64) -> Part {
        Part { bytes, rate, sweeps: false, zero: false }
    }

    /// Writes nothing to speak of.
    pub fn idle(ram: f64, used: f64) -> Self {
        Self::new("idle".into(), vec![Self::part(used * 0.98, 0.0), Self::part(used * 0.02, 0.2 * MIB)], ram)
    }

    /// Writes anywhere in a part of its memory.
    pub fn uniform(ram: f64, used: f64, set: f64, rate: f64) -> Self {
        Self::new("uniform".into(), vec![Self::part((used - set).max(0.0), 0.0), Self::part(set, rate)], ram)
    }

    /// Rewrites a part of its memory from its beginning to its end, over and over.
    pub fn sweep(ram: f64, used: f64, set: f64, rate: f64) -> Self {
        let sweeps = Part { sweeps: true, ..Self::part(set, rate) };
        Self::new("sweep".into(), vec![Self::part((used - set).max(0.0), 0.0), sweeps], ram)
    }

    /// Nine of ten writes go to a tenth of its set.
    pub fn hot_cold(ram: f64, used: f64, set: f64, rate: f64) -> Self {
        let parts = vec![
            Self::part((used - set).max(0.0), 0.0),
            Self::part(set * 0.9, rate * 0.1),
            Self::part(set * 0.1, rate * 0.9),
        ];
        Self::new("hot-cold".into(), parts, ram)
    }

    /// The k-th eighth of its set (each half as large as the one before) is written as often as the others, as by Zipf's
    /// law.
    pub fn zipf(ram: f64, used: f64, set: f64, rate: f64) -> Self {
        let mut parts = vec![Self::part((used - set).max(0.0), 0.0)];
        let mut rest = set;
        for step in 0..8 {
            let bytes = if step == 7 { rest } else { rest / 2.0 };
            rest -= bytes;
            parts.push(Self::part(bytes, rate / 8.0));
        }
        Self::new("zipf".into(), parts, ram)
    }

    /// Calm, and every now and then a job that writes ten times as fast.
    pub fn phases(ram: f64, used: f64, set: f64, rate: f64, calm: f64, busy: f64) -> Self {
        let phases = vec![(calm, 0.1), (busy, 1.0)];
        Self { name: "phases".into(), phases, ..Self::uniform(ram, used, set, rate) }
    }

    /// Takes memory that was zero until then.
    pub fn growing(ram: f64, used: f64, rate: f64) -> Self {
        let heap = Part { bytes: (ram - used).max(0.0) * 0.9, rate, sweeps: true, zero: true };
        Self::new("growing".into(), vec![Self::part(used * 0.95, 0.0), Self::part(used * 0.05, rate), heap], ram)
    }

    /// As it was seen to write: seconds and bytes a second of it, anywhere in a set of this size.
    pub fn trace(ram: f64, used: f64, set: f64, seen: &[(f64, f64)]) -> Self {
        let most = seen.iter().map(|(_, rate)| *rate).fold(1.0, f64::max);
        let phases = seen.iter().map(|(seconds, rate)| (*seconds, rate / most)).collect();
        Self { name: "trace".into(), phases, ..Self::uniform(ram, used, set, most) }
    }

    /// Its RAM, in bytes.
    pub fn ram(&self) -> f64 {
        self.zero + self.parts.iter().map(|part| part.bytes).sum::<f64>()
    }

    /// At which share of its rates it writes, and for how long from now, in seconds.
    pub(crate) fn pace_at(&self, at: f64) -> (f64, f64) {
        let all: f64 = self.phases.iter().map(|(seconds, _)| seconds).sum();
        if all <= 0.0 {
            return (1.0, f64::INFINITY);
        }
        let mut into = at % all;
        for (seconds, pace) in &self.phases {
            if into < *seconds {
                return (*pace, (seconds - into).max(1e-3));
            }
            into -= seconds;
        }
        (1.0, 1e-3)
    }

    /// One of all kinds.
    pub fn any(random: &mut Random) -> Self {
        let ram = random.between(0.5 * GIB, 64.0 * GIB);
        let used = ram * random.between(0.3, 0.95);
        let set = used * random.between(0.01, 0.9);
        let rate = random.between(4.0 * MIB, 4000.0 * MIB);
        let kind = random.below(8);
        let guest = match kind {
            0 => Self::uniform(ram, used, set, rate),
            1 => Self::sweep(ram, used, set, rate),
            2 => Self::hot_cold(ram, used, set, rate),
            3 => Self::zipf(ram, used, set, rate),
            4 => {
                let calm = random.between(5.0, 300.0);
                Self::phases(ram, used, set, rate, calm, random.between(5.0, 120.0))
            }
            5 => Self::growing(ram, used, random.between(1.0 * MIB, 500.0 * MIB)),
            6 => Self::idle(ram, used),
            _ => {
                let seen: Vec<(f64, f64)> =
                    (0..12).map(|_| (random.between(1.0, 30.0), random.between(1.0 * MIB, 2000.0 * MIB))).collect();
                Self::trace(ram, used, set, &seen)
            }
        };
        Self { processors: f64::from(1 << random.below(4)), ..guest }
    }
}
