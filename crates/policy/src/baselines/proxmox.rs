//! Proxmox VE: a downtime that doubles whenever what is left has grown for the sixth time.
//!
//! `phase2` in `src/PVE/QemuMigrate.pm` of its `qemu-server`; the 100 ms are `migrate_downtime`'s default. It looks once
//! a second, and ten times once what is left is less than it sends between two looks on average.

use std::time::Duration;

use crate::{Action, Observation, Phase, Policy};

use super::levers::{Every, Levers};

const DOWNTIME_MS: u64 = 100;
const GROWN: u32 = 5;
const POLL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_millis(100));

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Proxmox {
    levers: Levers,
    every: Every,
    is_near: bool,
    looks: u64,
    sent: u64,
    remaining: Option<u64>,
    grown: u32,
    downtime_ms: u64,
}

impl Policy for Proxmox {
    fn decide(&mut self, seen: &Observation) -> Action {
        if self.downtime_ms == 0 {
            self.downtime_ms = DOWNTIME_MS;
            self.levers.allow_ms(DOWNTIME_MS);
        }
        let poll = if self.is_near { POLL.1 } else { POLL.0 };
        if seen.phase != Phase::PreCopy || !self.every.is_due(seen, poll) {
            return self.levers.next();
        }
        self.looks += 1;
        let average = self.sent / self.looks;
        let sent = std::mem::replace(&mut self.sent, seen.sent.0);
        if seen.sent.0 == sent {
            return self.levers.next();
        }
        let left = seen.remaining.0;
        self.is_near |= average > 0 && left < average;
        if self.remaining.is_some_and(|before| before > 0 && left > before) || left == 0 {
            self.grown += 1;
        }
        self.remaining = Some(left);
        if self.grown > GROWN {
            self.grown = 0;
            self.downtime_ms = self.downtime_ms.saturating_mul(2);
            self.levers.allow_ms(self.downtime_ms);
        }
        self.levers.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::{allowed, said};

    #[test]
    fn it_doubles_when_what_is_left_has_grown_six_times() {
        let said = said(&mut Proxmox::default(), 100, 2000);
        assert_eq!(allowed(&said), [100, 200, 400, 800]);
        assert!((said[1].0 - 30.0).abs() < 1.5, "{said:?}");
    }
}
