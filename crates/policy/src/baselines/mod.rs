//! What today's managers decide, each from its project's sources and with its defaults (docs/POLICY.md says where they
//! stand). They are here to be compared with: none decides about anybody's guest unless asked to by name.
//!
//! All of them watch QEMU, which switches over by itself when what is left fits its downtime limit ([`Action::Allow`]).

mod auto_converge;
mod cloud_hypervisor;
mod kubevirt;
mod kubevirt_stall;
mod levers;
mod libvirt;
mod nova;
mod ovirt;
mod proxmox;
mod spoken;

pub use auto_converge::AutoConverge;
pub use cloud_hypervisor::CloudHypervisor;
pub use kubevirt::{KubeVirt, KubeVirtTuning};
pub use kubevirt_stall::KubeVirtStall;
pub use libvirt::{Libvirt, PlainQemu};
pub use nova::Nova;
pub use ovirt::Ovirt;
pub use proxmox::Proxmox;
pub use spoken::Spoken;

use crate::{BytesPerSec, Policy};

/// A manager by name.
#[derive(Clone, Copy)]
pub struct Baseline {
    /// As it is asked for.
    pub name: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
    /// What it lets QEMU send, where that is not as much as the link carries.
    pub bandwidth: Option<BytesPerSec>,
    /// It can turn to post-copy.
    pub post_copy: bool,
    /// It slows the guest down.
    pub throttle: bool,
    /// One for one migration.
    pub make: fn() -> Box<dyn Policy>,
}

const fn of(name: &'static str, about: &'static str, post_copy: bool, make: fn() -> Box<dyn Policy>) -> Baseline {
    Baseline { name, about, bandwidth: None, post_copy, throttle: false, make }
}

const fn slowing(baseline: Baseline) -> Baseline {
    Baseline { throttle: true, ..baseline }
}

/// All of them.
pub const ALL: [Baseline; 16] = [
    Baseline {
        bandwidth: Some(libvirt::QEMU_BANDWIDTH),
        ..of("qemu", "QEMU as it comes", false, || Box::<PlainQemu>::default())
    },
    of("libvirt", "virsh migrate --live", false, || Box::new(Libvirt::plain())),
    slowing(of("libvirt-auto-converge", "with --auto-converge", false, || Box::new(Libvirt::auto_converge()))),
    of("libvirt-post-copy", "with --postcopy-after-precopy", true, || Box::new(Libvirt::post_copy_after_pre_copy())),
    slowing(of("study-2016", "post-copy, else auto-converge", true, || Box::new(Libvirt::study()))),
    of("nova", "OpenStack Nova 2026.1", false, || Box::new(Nova::aborts())),
    slowing(of("nova-force", "with force_complete and post-copy", true, || Box::new(Nova::forces()))),
    of("proxmox", "Proxmox VE", false, || Box::<Proxmox>::default()),
    slowing(of("ovirt-minimal-downtime", "oVirt, Minimal downtime", false, || Box::new(Ovirt::minimal_downtime()))),
    slowing(of("ovirt-suspend", "oVirt, Suspend workload if needed", false, || Box::new(Ovirt::suspend_workload()))),
    slowing(of("ovirt-post-copy", "oVirt, Post-copy migration", true, || Box::new(Ovirt::post_copy()))),
    of("kubevirt", "KubeVirt, its defaults", false, || Box::new(KubeVirt::aborts())),
    of("kubevirt-tuning", "KubeVirt, VEP 291 (downtime)", false, || Box::<KubeVirtTuning>::default()),
    of("kubevirt-stall", "KubeVirt, VEP 248 (stall detection)", false, || Box::new(KubeVirtStall::new(false))),
    of("kubevirt-stall-post-copy", "VEP 248, disruption allowed", true, || Box::new(KubeVirtStall::new(true))),
    of("cloud-hypervisor", "Cloud Hypervisor v53", false, || Box::<CloudHypervisor>::default()),
];

/// The one of this name.
pub fn by_name(name: &str) -> Option<&'static Baseline> {
    ALL.iter().find(|it| it.name == name)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::time::Duration;

    use crate::{Action, Bytes, Costs, Limits, Means, Observation, Percent, Phase, Reason, Scan};

    pub(crate) fn seen(elapsed: f64, round: u32, remaining: u64) -> Observation {
        Observation {
            elapsed: Duration::from_secs_f64(elapsed),
            phase: Phase::PreCopy,
            round,
            remaining: Bytes(remaining << 20),
            total: Bytes(8 << 30),
            scan: (round > 1).then_some(Scan { interval: Duration::from_secs(1), left: Bytes(remaining << 20) }),
            stale: Bytes(0),
            sent: Bytes((elapsed * 1e8) as u64),
            dirty_rate: BytesPerSec(0),
            link_rate: BytesPerSec(100 << 20),
            round_trip: Duration::ZERO,
            throttle: Percent(0),
            means: Means { pace: false, throttle: true },
            costs: Costs::default(),
            limits: Limits::default(),
        }
    }

    /// What it says over this time in which what is left goes up and down around so many MiB, with when.
    pub(super) fn said(policy: &mut dyn Policy, seconds: u32, around: u64) -> Vec<(f64, Action)> {
        let mut said = Vec::new();
        for tick in 1..=seconds * 10 {
            let elapsed = f64::from(tick) / 10.0;
            // Rounds of 5 s, at the end of which it is a tenth.
            let (round, into) = (1 + tick / 50, f64::from(tick % 50) / 50.0);
            let left = (around as f64 * (1.0 - 0.9 * into)) as u64;
            let seen = seen(elapsed, round, left);
            loop {
                match policy.decide(&seen) {
                    Action::Continue => break,
                    action => said.push((elapsed, action)),
                }
            }
        }
        said
    }

    pub(super) fn allowed(said: &[(f64, Action)]) -> Vec<u128> {
        let pauses = said.iter().filter_map(|(_, action)| match action {
            Action::Allow(pause) => Some(pause.as_millis()),
            _ => None,
        });
        pauses.collect()
    }

    #[test]
    fn their_names_are_theirs_alone_and_each_can_be_asked_for() {
        for baseline in ALL {
            assert_eq!(by_name(baseline.name).map(|it| it.about), Some(baseline.about));
            assert!(matches!((baseline.make)().decide(&seen(0.1, 1, 1000)), Action::Allow(_)), "{}", baseline.name);
        }
        assert!(by_name("nobody").is_none());
    }

    #[test]
    fn none_breaks_on_nothing_zeroes_or_clocks_that_go_backwards() {
        for baseline in ALL {
            let mut policy = (baseline.make)();
            for elapsed in [0.0, 100.0, 5.0, 1e6] {
                for round in [0, 3, 1] {
                    let seen = Observation { link_rate: BytesPerSec(0), sent: Bytes(0), ..seen(elapsed, round, 0) };
                    policy.decide(&Observation { total: Bytes(0), ..seen });
                }
            }
        }
    }

    #[test]
    fn managers_that_abort_do_it_when_their_sources_say() {
        // For 8 GiB; KubeVirt since nothing less was left for 150 s.
        for (name, seconds) in [("nova", 6400), ("kubevirt", 155), ("cloud-hypervisor", 3600)] {
            let baseline = by_name(name).expect(name);
            let said = said(&mut *(baseline.make)(), 6500, 2000);
            let given_up: Vec<f64> = said
                .iter()
                .filter(|(_, action)| matches!(action, Action::GiveUp(Reason::OutOfTime { .. })))
                .map(|(at, _)| *at)
                .collect();
            assert_eq!(given_up.len(), 1, "{name}");
            assert!((given_up[0] - f64::from(seconds)).abs() <= 5.1, "{name}: {given_up:?}");
        }
    }
}
