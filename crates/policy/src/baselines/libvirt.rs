//! QEMU as it comes, and libvirt, which leaves it at that unless it is told otherwise.
//!
//! QEMU's limits are in its `migration/options.c`: 300 ms (`DEFAULT_MIGRATE_SET_DOWNTIME`) and 128 MiB/s
//! (`MAX_THROTTLE`); libvirt lifts the second. `virsh migrate` has `--auto-converge`, and `--postcopy
//! --postcopy-after-precopy`, which turns to post-copy when all RAM was sent once. Its `--timeout` has no default.
//!
//! The study of 2016 is Daniel Berrangé's "Analysis of techniques for ensuring migration completion with KVM": post-copy
//! where there is, else auto-converge, and no compression.

use crate::{Action, BytesPerSec, Observation, Phase, Policy};

use super::auto_converge::AutoConverge;
use super::levers::Levers;

const DOWNTIME_MS: u64 = 300;
pub(super) const QEMU_BANDWIDTH: BytesPerSec = BytesPerSec(128 << 20);

/// Sets nothing, and never gives up.
#[derive(Clone, Debug, Default)]
pub struct PlainQemu(Levers);

impl Policy for PlainQemu {
    fn decide(&mut self, _: &Observation) -> Action {
        self.0.allow_ms(DOWNTIME_MS);
        self.0.next()
    }
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Libvirt {
    levers: Levers,
    auto_converge: bool,
    post_copy: bool,
    qemu: AutoConverge,
}

impl Libvirt {
    /// `virsh migrate --live`.
    pub fn plain() -> Self {
        Self::default()
    }

    /// With `--auto-converge`.
    pub fn auto_converge() -> Self {
        Self { auto_converge: true, ..Self::default() }
    }

    /// With `--postcopy --postcopy-after-precopy`.
    pub fn post_copy_after_pre_copy() -> Self {
        Self { post_copy: true, ..Self::default() }
    }

    /// What the study of 2016 advises.
    pub fn study() -> Self {
        Self { post_copy: true, auto_converge: true, ..Self::default() }
    }
}

impl Policy for Libvirt {
    fn decide(&mut self, seen: &Observation) -> Action {
        if seen.phase != Phase::PreCopy || self.levers.over {
            return self.levers.next();
        }
        self.levers.allow_ms(DOWNTIME_MS);
        let post_copy = self.post_copy && seen.limits.post_copy;
        if post_copy && seen.round > 1 {
            self.levers.last(Action::PostCopy);
        }
        if self.auto_converge && !post_copy {
            self.levers.queue.extend(self.qemu.step(seen));
        }
        self.levers.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::said;

    #[test]
    fn qemu_alone_goes_on_for_ever_and_after_the_first_pass_comes_post_copy_where_asked_for() {
        assert_eq!(said(&mut PlainQemu::default(), 1000, 2000).len(), 1);
        let said = said(&mut Libvirt::post_copy_after_pre_copy(), 100, 2000);
        assert!(matches!(said[..], [(_, Action::Allow(_)), (at, Action::PostCopy)] if at < 5.2), "{said:?}");
    }
}
