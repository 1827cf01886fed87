//! Domains, and what libvirt tells of them.

use uuid::Uuid;

use crate::param::Params;
use crate::xdr::{Decoder, Encoder, Malformed};

/// A domain as libvirt's protocol names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name: one a host, and it may change.
    pub name: String,
    /// What stays, on every host.
    pub uuid: Uuid,
    /// Its number while it runs; -1 otherwise.
    pub id: i32,
}

impl Domain {
    pub(crate) fn encode<'a>(&self, to: &'a mut Encoder) -> &'a mut Encoder {
        to.string(&self.name).fixed(self.uuid.as_bytes()).i32(self.id)
    }

    pub(crate) fn decode(from: &mut Decoder<'_>) -> Result<Self, Malformed> {
        Ok(Self { name: from.string()?.to_owned(), uuid: from.uuid()?, id: from.i32()? })
    }
}

/// How a domain stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// It runs.
    Running,
    /// It does not, and could go on.
    Paused(PausedWhy),
    /// It has no process.
    ShutOff,
    /// It has one, and is none of the above: it shuts down, crashed, or sleeps.
    Other(u32),
}

/// Why it is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PausedWhy {
    /// For a migration: it waits for its RAM, or has just handed it over.
    Migration,
    /// It runs at its destination, and its RAM is still needed here.
    PostCopy,
    /// Post-copy broke: neither host can run it before it is resumed.
    PostCopyFailed,
    /// Anything else, such as its user.
    Other,
}

/// How a domain stands, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// How.
    pub run: RunState,
    /// Why, in libvirt's number for that state.
    pub reason: i32,
}

impl State {
    pub(crate) fn of(state: i32, reason: i32) -> Self {
        let run = match state {
            1 => RunState::Running,
            3 => RunState::Paused(match reason {
                2 | 11 => PausedWhy::Migration,
                12 => PausedWhy::PostCopy,
                13 => PausedWhy::PostCopyFailed,
                _ => PausedWhy::Other,
            }),
            5 => RunState::ShutOff,
            other => RunState::Other(other.cast_unsigned()),
        };
        Self { run, reason }
    }

    /// It runs, and part of its RAM is missing that can come only when the broken post-copy is resumed.
    pub fn runs_without_its_ram(self) -> bool {
        self.run == RunState::Running && self.reason == 11
    }

    /// It has a process.
    pub fn is_active(self) -> bool {
        self.run != RunState::ShutOff
    }

    /// In the words of `virsh domstate`.
    pub fn in_words(self) -> &'static str {
        match self.run {
            RunState::Running => "running",
            RunState::Paused(_) => "paused",
            RunState::ShutOff => "shut off",
            RunState::Other(2) => "idle",
            RunState::Other(4) => "in shutdown",
            RunState::Other(6) => "crashed",
            RunState::Other(7) => "pmsuspended",
            RunState::Other(_) => "no state",
        }
    }
}

/// What a domain has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// The most RAM that it may have, in bytes.
    pub max_memory: u64,
    /// Its virtual CPUs.
    pub vcpus: u32,
}

/// How far QEMU's look at what a domain writes is, which is taken with a sample of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyRate {
    /// It is under way, or was never begun.
    NotYet,
    /// It is done.
    Measured {
        /// So much was written a second, in bytes, rounded down to MiB.
        rate: u64,
        /// Of so many seconds.
        seconds: u64,
    },
}

impl DirtyRate {
    pub(crate) fn of(stats: &Params) -> Self {
        const MEASURED: u64 = 2;
        let of = |name: &str| stats.number(&format!("dirtyrate.{name}"));
        match (of("calc_status"), of("megabytes_per_second"), of("calc_period")) {
            (Some(MEASURED), Some(mib), Some(seconds)) => Self::Measured { rate: mib.saturating_mul(1 << 20), seconds },
            _ => Self::NotYet,
        }
    }
}

/// What a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// There is none.
    None,
    /// It is under way.
    UnderWay,
    /// It is over and done.
    Completed,
    /// It is over, and failed or was cancelled.
    Failed,
}

/// A domain's job, such as a migration.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// What it is.
    pub kind: JobKind,
    /// How far it is, in libvirt's words.
    pub stats: Params,
}

impl Job {
    pub(crate) fn decode(from: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let kind = match from.u32()? {
            0 => JobKind::None,
            1 | 2 => JobKind::UnderWay,
            3 => JobKind::Completed,
            4 | 5 => JobKind::Failed,
            value => return Err(Malformed::Unknown { what: "job's type", value }),
        };
        Ok(Self { kind, stats: Params::decode(from)? })
    }

    /// It is a migration to another host.
    pub fn is_migration_out(&self) -> bool {
        self.kind == JobKind::UnderWay && self.stats.number("operation") == Some(5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::param::Param;

    #[test]
    fn what_a_domain_writes_is_known_when_libvirt_says_that_it_was_measured() {
        let told = |status| {
            let all = [("calc_status", status), ("calc_period", 3), ("megabytes_per_second", 40)];
            DirtyRate::of(&Params(all.map(|(name, it)| Param::number(&format!("dirtyrate.{name}"), it)).into()))
        };
        assert_eq!(told(2), DirtyRate::Measured { rate: 40 << 20, seconds: 3 });
        assert_eq!([told(0), told(1), DirtyRate::of(&Params::default())], [DirtyRate::NotYet; 3]);
    }
}
