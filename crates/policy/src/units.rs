//! Amounts, rates and shares, and how they are said.

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
        (rate.0 > 0).then(|| seconds(self.0 as f64 / rate.0 as f64))
    }
}

impl Percent {
    /// From 0 to 1.
    pub fn share(self) -> f64 {
        f64::from(self.0.min(100)) / 100.0
    }
}

/// As long as a `Duration` can say, whatever is asked.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

const MIB: f64 = 1_048_576.0;

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = self.0 as f64 / MIB;
        match mib {
            ..10.0 => write!(f, "{mib:.1} MiB"),
            ..10_000.0 => write!(f, "{mib:.0} MiB"),
            _ => write!(f, "{:.1} GiB", mib / 1024.0),
        }
    }
}

impl std::fmt::Display for BytesPerSec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} MiB/s", self.0 as f64 / MIB)
    }
}

/// A time as people say it.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        ..1.0 => format!("{:.0} ms", seconds * 1e3),
        ..100.0 => format!("{seconds:.1} s"),
        _ => format!("{seconds:.0} s"),
    }
}
