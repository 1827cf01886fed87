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
/// 98), 611 ms and 28. Nothing is published of how it writes. Here it is a guest that was looked for (some thousands, at
/// random) so that the trial without the tuning comes out: 2.8 GiB rewritten at random, 20 MiB far more often, more and
/// less by turns. What the tuning does to it was not looked at.
pub fn published(seed: u64, limits: Limits) -> Case {
    let mut random = Random::new(seed);
    let (hot, set) = (20.0 * MIB, 2900.0 * MIB);
    let mut guest = Guest::uniform(8.0 * GIB, 7.9 * GIB - hot, set, 63.0 * MIB);
    guest.parts.push(Part { bytes: hot, rate: 375.0 * MIB, sweeps: false, zero: false });
    guest.phases = (0..200).map(|_| (random.between(4.3, 17.0), random.between(0.5, 1.9))).collect();
    guest.processors = 4.0;
    Case { name: "kubevirt-291".into(), seed, guest, link: Link::steady(1000.0), limits }
}

/// The engine that a case is played with by default.
impl Default for Engine {
    fn default() -> Self {
        Self::external()
    }
}
