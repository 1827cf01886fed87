//! Whatever is observed, no policy panics, and ours does nothing that cannot be taken back on nothing.

use std::time::Duration;

use proptest::prelude::*;
use vmferry_policy::baselines::ALL;
use vmferry_policy::{
    Action, Bytes, BytesPerSec, Costs, LeastHarm, Limits, Means, Observation, Otherwise, Percent, Phase, Policy,
    Preference, Scan,
};

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(u64::MAX), 0..1u64 << 20, 1u64 << 20..1 << 40]
}

fn duration() -> impl Strategy<Value = Duration> {
    prop_oneof![Just(Duration::ZERO), Just(Duration::MAX), (0..10_000_000u64).prop_map(Duration::from_micros)]
}

fn limits() -> impl Strategy<Value = Limits> {
    let bandwidth = proptest::option::of(number());
    (duration(), proptest::option::of(duration()), any::<[bool; 3]>(), any::<u8>(), bandwidth).prop_map(
        |(downtime, max_time, [post_copy, gives_up, gentle], slow, bandwidth)| Limits {
            downtime,
            max_time,
            post_copy,
            slow: Percent(slow),
            bandwidth: bandwidth.map(BytesPerSec),
            otherwise: if gives_up { Otherwise::GiveUp } else { Otherwise::Finish },
            prefer: if gentle { Preference::Gentle } else { Preference::Short },
        },
    )
}

fn observation() -> impl Strategy<Value = Observation> {
    let sizes = (number(), number(), number(), number(), number(), number());
    let times = (duration(), duration(), duration(), duration(), duration());
    (sizes, times, proptest::option::of((duration(), number())), 0u32..5, limits(), any::<[bool; 2]>(), any::<u8>())
        .prop_map(|(sizes, times, scan, round, limits, [pace, throttle], slowed)| Observation {
            elapsed: times.0,
            phase: Phase::PreCopy,
            round,
            remaining: Bytes(sizes.0),
            total: Bytes(sizes.1),
            scan: scan.map(|(interval, left)| Scan { interval, left: Bytes(left) }),
            stale: Bytes(sizes.2),
            sent: Bytes(sizes.3),
            dirty_rate: BytesPerSec(sizes.4),
            link_rate: BytesPerSec(sizes.5),
            round_trip: times.1,
            throttle: Percent(slowed),
            means: Means { pace, throttle },
            costs: Costs { switchover: times.2, post_copy: times.3, fault: times.4 },
            limits,
        })
}

proptest! {
    #[test]
    fn nothing_that_is_observed_makes_a_policy_panic(all in proptest::collection::vec(observation(), 1..40)) {
        let ours: Box<dyn Policy> = Box::<LeastHarm>::default();
        for mut policy in ALL.iter().map(|it| (it.make)()).chain([ours]) {
            for seen in &all {
                policy.decide(seen);
                policy.words();
            }
        }
    }

    #[test]
    fn over_a_link_that_carries_nothing_ours_leaves_it_to_the_engine_or_gives_up(all in proptest::collection::vec(observation(), 1..40)) {
        let mut policy = LeastHarm::default();
        for seen in all {
            let action = policy.decide(&Observation { link_rate: BytesPerSec(0), ..seen });
            // What the engine cannot reckon, as it knows no rate either, it does not take for allowed.
            let most = seen.limits.downtime.as_secs_f64() * 1.001 + 0.01;
            let is_cautious = match action {
                Action::Continue | Action::GiveUp(_) => true,
                Action::Allow(pause) => pause.as_secs_f64() <= most,
                _ => false,
            };
            prop_assert!(is_cautious, "{action:?}");
        }
    }
}
