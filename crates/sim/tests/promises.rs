//! What our policy promises, whatever the guest: on migrations that are only reckoned.

use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use vmferry_policy::{Action, BytesPerSec, LeastHarm, Limits, Otherwise, Percent};
use vmferry_sim::{Case, End, Engine, Link, Outcome, best_in_hindsight, run, run_tuned};

/// The case of this seed on a link that stays as it is.
fn steady(seed: u64, limits: Limits) -> Case {
    let case = Case::of(seed, limits);
    Case { link: Link { changes: Vec::new(), ..case.link.clone() }, ..case }
}

fn decided(case: &Case, engine: Engine) -> Outcome {
    run(&case.guest, &case.link, engine, case.limits, case.seed, None, &mut LeastHarm::default())
}

fn limits() -> impl Strategy<Value = Limits> {
    (any::<[bool; 2]>(), prop_oneof![Just(0u8), Just(50), Just(100)]).prop_map(|([post_copy, gives_up], slow)| Limits {
        post_copy,
        slow: Percent(slow),
        otherwise: if gives_up { Otherwise::GiveUp } else { Otherwise::Finish },
        ..Limits::default()
    })
}

fn engine() -> impl Strategy<Value = Engine> {
    prop_oneof![Just(Engine::external()), Just(Engine::qemu())]
}

/// So many, the same each time.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::default() }
}

/// When, and in which round, the guest was slowed by another share.
fn levers_moved(outcome: &Outcome) -> Vec<(f64, u32)> {
    let levers = outcome.actions.iter().filter(|it| matches!(it.2, Action::Pace(_) | Action::Throttle(_)));
    levers.map(|(at, round, _)| (*at, *round)).collect()
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn it_always_ends_and_gives_up_only_where_that_is_allowed(seed in 0u64..1 << 32, limits in limits(), by in engine()) {
        let case = steady(seed, limits);
        let outcome = decided(&case, by);
        prop_assert_ne!(outcome.end, End::TooLong, "{}: {:#?}", case.name, outcome.words);
        let may_give_up = limits.otherwise == Otherwise::GiveUp && !limits.post_copy;
        prop_assert!(outcome.end == End::Completed || may_give_up, "{}: {:#?}", case.name, outcome.words);
    }

    #[test]
    fn it_ends_whatever_becomes_of_the_link_and_the_guest_meanwhile(seed in 0u64..1 << 32, limits in limits()) {
        // Links that drop to a tenth or to nothing and come back, and guests that have a job at night, are among them.
        let case = Case::of(seed, limits);
        let outcome = decided(&case, Engine::external());
        prop_assert_ne!(outcome.end, End::TooLong, "{}: {:#?}", case.name, outcome.words);
    }

    #[test]
    fn who_may_not_be_slowed_is_not_and_nobody_more_than_is_allowed(seed in 0u64..1 << 32, limits in limits(), by in engine()) {
        let outcome = decided(&Case::of(seed, limits), by);
        for (_, _, action) in &outcome.actions {
            match action {
                Action::Throttle(share) => prop_assert!(*share <= limits.slow, "{:?}", outcome.actions),
                Action::Pace(_) => prop_assert!(limits.slow.0 > 0, "{:?}", outcome.actions),
                Action::PostCopy => prop_assert!(limits.post_copy, "{:?}", outcome.actions),
                _ => {}
            }
        }
    }

    #[test]
    fn who_would_rather_have_it_stay_never_stands_for_longer_than_is_allowed(seed in 0u64..1 << 32, slow in 0u8..=100, by in engine()) {
        let limits = Limits { post_copy: false, slow: Percent(slow), otherwise: Otherwise::GiveUp, ..Limits::default() };
        let outcome = decided(&steady(seed, limits), by);
        let allowed = limits.downtime.as_secs_f64() * 1.1;
        prop_assert!(outcome.end == End::GaveUp || outcome.felt.downtime <= allowed, "{:?} {:#?}", outcome.felt, outcome.words);
    }

    #[test]
    fn no_lever_is_moved_twice_in_a_round_unless_more_is_known(seed in 0u64..1 << 32, limits in limits(), by in engine()) {
        let case = steady(seed, limits);
        let outcome = decided(&case, by);
        for pair in levers_moved(&outcome).windows(2) {
            let ((before, round), (after, next)) = (pair[0], pair[1]);
            // The first round brings news all the time.
            prop_assert!(next > round || round == 1 && after - before >= 0.25, "{}: {:?}", case.name, outcome.actions);
        }
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn no_downtime_is_longer_than_allowed_where_a_simple_plan_would_have_kept_to_it(
        seed in 0u64..1 << 32,
        post_copy in any::<bool>(),
    ) {
        let case = steady(seed, Limits { post_copy, ..Limits::default() });
        let outcome = decided(&case, Engine::external());
        let allowed = case.limits.downtime.as_secs_f64();
        // What is measured of a link is never exact.
        if outcome.felt.downtime > allowed * 1.05 {
            let best = best_in_hindsight(&case, Engine::external());
            prop_assert!(best.felt.downtime > allowed, "{}: {:?} but {best:?}", case.name, outcome.felt);
        }
    }

    #[test]
    fn no_time_is_exceeded_that_a_simple_plan_would_have_kept(seed in 0u64..1 << 32, times in 1.2..5.0f64, post_copy in any::<bool>()) {
        let case = steady(seed, Limits { post_copy, ..Limits::default() });
        let once = case.guest.parts.iter().map(|part| part.bytes).sum::<f64>() / case.link.rate;
        let max_time = Some(Duration::from_secs_f64(once * times + 1.0));
        let case = Case { limits: Limits { max_time, ..case.limits }, ..case };
        let outcome = decided(&case, Engine::external());
        let allowed = case.limits.max_time.expect("it is set").as_secs_f64();
        if outcome.felt.total > allowed * 1.05 {
            let best = best_in_hindsight(&case, Engine::external());
            prop_assert!(best.felt.exceeds(&case.limits) > 0.0, "{}: {allowed} {:?} {:#?} but {best:?}", case.name, outcome.felt, outcome.words);
        }
    }
}

/// Not quite never: of 4000 others two are.
#[test]
fn a_link_half_as_fast_again_is_not_worse_by_more_than_a_tenth() {
    let mut worse = Vec::new();
    for (seed, post_copy) in (0..100).flat_map(|seed| [(seed, true), (seed, false)]) {
        let case = steady(seed, Limits { post_copy, ..Limits::default() });
        let faster = Case { link: Link { rate: case.link.rate * 1.5, ..case.link.clone() }, ..case.clone() };
        let harm = |case: &Case| decided(case, Engine::external()).felt.harm(case.limits.prefer);
        // A post-copy that is just entered, or just not, is half a second.
        if harm(&faster) > harm(&case) * 1.1 + 0.5 {
            worse.push(format!("{}: {} and {}", case.name, harm(&faster), harm(&case)));
        }
    }
    assert!(worse.is_empty(), "of 200: {worse:#?}");
}

#[test]
fn the_same_seed_is_the_same_migration() {
    for seed in 0..20 {
        let case = Case::of(seed, Limits::default());
        assert_eq!(decided(&case, Engine::external()), decided(&Case::of(seed, Limits::default()), Engine::external()));
    }
}

/// Other limits after a share of the time that all RAM takes: when, the downtime in ms, post-copy or not, and a share of the
/// link to send with, or all of it.
fn change() -> impl Strategy<Value = (f64, u64, bool, Option<f64>)> {
    let downtime = prop_oneof![Just(50u64), Just(300), Just(1000)];
    (0.02..1.5f64, downtime, any::<bool>(), proptest::option::of(0.3..0.9f64))
}

/// A case whose user changes the limits, in seconds.
fn tuned(seed: u64, limits: Limits, change: (f64, u64, bool, Option<f64>)) -> (Case, Vec<(f64, Limits)>) {
    let case = steady(seed, limits);
    let (share, downtime, post_copy, bandwidth) = change;
    let at = case.guest.ram() / case.link.rate * share;
    let bandwidth = bandwidth.map(|share| BytesPerSec((case.link.rate * share) as u64));
    let downtime = Duration::from_millis(downtime);
    let changes = vec![(at, Limits { downtime, post_copy, bandwidth, ..limits })];
    (case, changes)
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn limits_that_change_in_the_middle_are_kept_and_it_ends_all_the_same(
        seed in 0u64..1 << 32,
        limits in limits(),
        change in change(),
        by in engine(),
    ) {
        let (case, changes) = tuned(seed, limits, change);
        let mut policy = LeastHarm::default();
        let outcome = run_tuned(&case.guest, &case.link, by, (limits, &changes), seed, None, &mut policy);
        prop_assert_ne!(outcome.end, End::TooLong, "{}: {:?} {:#?}", case.name, changes, outcome.words);
        let (at, new) = changes[0];
        let in_force = |when: f64| if when >= at { new } else { limits };
        for (when, _, action) in &outcome.actions {
            let limits = in_force(*when);
            match action {
                Action::PostCopy => prop_assert!(limits.post_copy, "{}: {} {:?}", case.name, when, changes),
                Action::GiveUp(_) => prop_assert!(limits.otherwise == Otherwise::GiveUp && !limits.post_copy),
                _ => {}
            }
        }
        // The first round brings news all the time, and so does a user.
        for pair in levers_moved(&outcome).windows(2) {
            let ((before, round), (after, next)) = (pair[0], pair[1]);
            let is_tuned = before < at && at <= after;
            prop_assert!(next > round || is_tuned || round == 1 && after - before >= 0.25, "{}: {:?}", case.name, outcome.actions);
        }
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn no_downtime_is_longer_than_allowed_after_a_change_where_a_simple_plan_would_have_kept_to_it(
        seed in 0u64..1 << 32,
        change in change(),
    ) {
        let (case, changes) = tuned(seed, Limits::default(), change);
        let mut policy = LeastHarm::default();
        let (limits, by) = (case.limits, Engine::external());
        let outcome = run_tuned(&case.guest, &case.link, by, (limits, &changes), seed, None, &mut policy);
        let switched = outcome.felt.total - outcome.felt.at_risk - outcome.felt.downtime;
        let limits = if switched >= changes[0].0 { changes[0].1 } else { limits };
        let allowed = limits.downtime.as_secs_f64();
        if outcome.felt.downtime > allowed * 1.05 {
            let best = best_in_hindsight(&Case { limits, ..case.clone() }, by);
            prop_assert!(best.felt.downtime > allowed, "{}: {:?} {:#?} but {:?}", case.name, changes, outcome.words, best);
        }
    }
}
