//! The protocol, explored exhaustively: both halves, two QEMUs, two journals, and everything that can go wrong between
//! them, as often as the budget of faults permits and at every step.
//!
//! Always: never two guests run; never is a guest ended that had not been handed over; nobody is told what is not so.
//! From every state that is reached, when faults cease: one guest runs, within bounded steps, or a user can decide.
//!
//! `make model` explores further than `make test` does: `VMFERRY_MODEL=FAULTS,ACTS,STATES,SECONDS`.

mod acts;
mod flaws;
mod settle;
mod world;

use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Property};

use acts::{Act, happen, possible};
use flaws::{FLAWS, Flaw};
use world::{Engine, Here, World};

struct Protocol {
    faults: u8,
    acts: u8,
    flaw: Option<Flaw>,
}

impl Model for Protocol {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        [Engine::External, Engine::Qemu].map(|engine| World::new(engine, self.faults, self.acts)).into()
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        possible(world, self.flaw, acts);
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        happen(world, self.flaw, act)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never do two run", |_: &Self, world: &World| {
                // What QEMU does by itself nobody can forbid it: that it is stopped is seen when faults cease.
                world.running() <= 1 || world.risked || world.by_itself && world.here == Here::Runs
            }),
            Property::always("nothing is done or told that must not be", |_: &Self, world: &World| {
                world.broken.is_none()
            }),
            Property::always("it settles when faults cease", |model: &Self, world: &World| {
                settle::settles(world, model.flaw).is_ok()
            }),
        ]
    }
}

/// Explores, and tells how much in which time, and what was found.
fn explore(protocol: Protocol, states: usize, time: Duration) -> (usize, usize, Duration, Vec<(String, String)>) {
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let flaw = protocol.flaw;
    let checker = protocol.checker().threads(threads).target_state_count(states).timeout(time);
    let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = checker.discoveries().into_iter().map(|(name, path)| {
        let last = path.last_state().clone();
        let why = settle::settles(&last, flaw).err().unwrap_or_else(|| format!("{last:?}"));
        let acts: Vec<String> = path.into_actions().iter().map(|act| format!("{act:?}")).collect();
        (name.to_owned(), format!("{}\n  => {why}", acts.join("\n  ")))
    });
    let found = found.collect();
    (checker.unique_state_count(), checker.max_depth(), begun.elapsed(), found)
}

/// How far `make test` goes, or whoever asks for more: faults, acts of users, states, seconds.
fn extent() -> (u8, u8, usize, u64) {
    let asked = std::env::var("VMFERRY_MODEL").unwrap_or_else(|_| "2,1,12000000,100".into());
    let numbers: Vec<u64> = asked.split(',').map(|it| it.trim().parse().expect("four numbers")).collect();
    let [faults, acts, states, seconds] = numbers[..] else { panic!("four numbers, not {asked:?}") };
    (faults as u8, acts as u8, states as usize, seconds)
}

#[test]
fn exactly_one_guest_goes_on_whatever_fails_wherever() {
    let (faults, acts, states, seconds) = extent();
    let protocol = Protocol { faults, acts, flaw: None };
    let (count, depth, took, found) = explore(protocol, states, Duration::from_secs(seconds));
    println!("{count} distinct states, {depth} deep, with {faults} faults and {acts} acts, in {took:.1?}");
    for (name, path) in &found {
        println!("NOT SO: {name}\n  {path}");
    }
    assert!(found.is_empty(), "{} of what must be is not", found.len());
    assert!(count >= 1_000_000.min(states), "only {count} states were reached");
}

#[test]
fn each_flaw_of_the_earlier_protocol_is_found() {
    for flaw in FLAWS {
        let protocol = Protocol { faults: 2, acts: 1, flaw: Some(flaw) };
        let (count, depth, took, found) = explore(protocol, 12_000_000, Duration::from_secs(60));
        println!("{flaw:?}: {count} states, {depth} deep, {took:.1?}");
        for (name, path) in &found {
            println!("  NOT SO: {name}\n  {path}");
        }
        assert!(!found.is_empty(), "{flaw:?} is not found in {count} states");
    }
}
