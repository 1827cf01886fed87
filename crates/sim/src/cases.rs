//! The cases that policies are compared by: any number of them from a seed, and some that somebody has published.

use vmferry_policy::Limits;

use crate::guest::{GIB, MIB};
use crate::link::MBIT;
use crate::{Engine, Guest, Link, Part, Random};

/// A migration to be decided about.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is called: its seed, guest and link.
    pub name: String,
    /// From which it comes, and by which it is replayed.
    pub seed: u64,
    /// The guest.
    pub guest: Guest,
    /// The link.
    pub link: Link,
    /// What the user allows.
    pub limits: Limits,
}

impl Case {
    /// The one of this seed.
    pub fn of(seed: u64, limits: Limits) -> Self {
        let mut random = Random::new(seed);
        let (guest, link) = (Guest::any(&mut random), Link::any(&mut random));
        Self { name: named(seed, &guest, &link), seed, guest, link, limits }
    }
}

fn named(seed: u64, guest: &Guest, link: &Link) -> String {
    let changes = match link.changes.as_slice() {
        [] => "",
        [(_, share), ..] if *share == 0.0 => ", an outage",
        [_, .., (_, share)] if share.total_cmp(&1.0).is_eq() => ", a tenth for a while",
        _ => ", which changes",
    };
    format!("{seed}: {} of {:.1} GiB, {:.0} Mbit/s{changes}", guest.name, guest.ram() / GIB, link.rate / MBIT)
}

/// So many from this seed on.
pub fn cases(first: u64, count: u64, limits: Limits) -> impl Iterator<Item = Case> {
    (first..first.saturating_add(count)).map(move |seed| Case::of(seed, limits))
}

/// KubeVirt's trial of VEP 291: a worker node of a hosted cluster, 8 GiB, 1 Gbit/s, which makes 650 Mbit/s stale on
/// average. Without its tuning it took 112.4 s on average (to 161), 451 ms of downtime and 69 rounds; with it 92.2 s (to
/// 98), 611 ms and 28. Nothing is published of how it writes: here it rewrites a gigabyte at random by 650 Mbit/s, more
/// and less by turns.
pub fn published(seed: u64, limits: Limits) -> Case {
    let mut random = Random::new(seed);
    let rate = 650.0 * 1e6 / 8.0;
    let mut guest = Guest::uniform(8.0 * GIB, 7.9 * GIB, 1.0 * GIB, rate);
    // Always something is written, and in turns of some seconds more of it.
    guest.parts.push(Part { bytes: 0.05 * GIB, rate: 10.0 * MIB, sweeps: false, zero: false });
    guest.phases = (0..40).map(|_| (random.between(2.0, 8.0), random.between(0.7, 1.4))).collect();
    guest.processors = 4.0;
    Case { name: "kubevirt-291".into(), seed, guest, link: Link::steady(1000.0), limits }
}

/// The engine that a case is played with by default.
impl Default for Engine {
    fn default() -> Self {
        Self::external()
    }
}
