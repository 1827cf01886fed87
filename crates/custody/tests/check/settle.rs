//! Faults cease: agents are started again, messages come, what is due is done and comes off. Then, within bounded steps,
//! one guest runs, or whoever must decide is told how.

use vmferry_custody::source::{self, Phase};
use vmferry_custody::{Answer, InStep, Start};

use crate::acts::{Act, destination_due, happen, source_due};
use crate::flaws::Flaw;
use crate::world::{Ask, Here, MIGRATIONS, There, World};

/// Rounds of everything that is due, until nothing changes.
const ROUNDS: usize = 40;

/// Whether all is well when faults have ceased; or what is not.
pub(crate) fn settles(world: &World, flaw: Option<Flaw>) -> Result<(), String> {
    let (settled, rounds) = settle(world.clone(), flaw);
    if rounds == ROUNDS {
        return Err(format!("it does not come to rest: {settled:?}"));
    }
    if let Some(broken) = settled.broken {
        return Err(format!("{broken}: {settled:?}"));
    }
    judge(&settled, flaw)
}

fn judge(settled: &World, flaw: Option<Flaw>) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{what}: {settled:?}"));
    if settled.running() > 1 {
        return wrong("two run");
    }
    let here = matches!(settled.here, Here::Runs) || !settled.wanted && settled.here == Here::Stands;
    let there = |id: usize| settled.there[id] == There::Runs || !settled.wanted && settled.there[id] == There::Loaded;
    let owner = (0..MIGRATIONS).find(|id| matches!(settled.incoming[*id], Some(InStep::Committed { .. })));
    let goes_on = match owner {
        Some(id) if !settled.gone_there => there(id),
        _ => here,
    };
    let at_rest = settled.source.is_none_or(source::Source::is_at_rest);
    if goes_on && at_rest {
        return Ok(());
    }
    // Where the user has decided against what is so, the guest may be gone; but nothing may hang.
    if (settled.may_be_lost() || settled.risked) && at_rest {
        return Ok(());
    }
    let Some(source) = settled.source else { return wrong("no guest goes on") };
    // It is for the user to decide, who can.
    match source.phase() {
        Phase::InDoubt { .. } | Phase::Away { complete: false, .. } | Phase::Away { start: Start::Due, .. }
            if settled.gone_there => {}
        // A QEMU that let go of its guest and then failed.
        Phase::Stranded { .. } if settled.may_be_lost() || settled.by_itself || settled.here == Here::LetGo => {}
        _ => return wrong("no guest goes on, and nobody can do anything about it"),
    }
    if matches!(source.phase(), Phase::Stranded { .. }) && goes_on {
        return Ok(());
    }
    if flaw == Some(Flaw::NoWayOut) {
        return wrong("there is no way out");
    }
    let mut decided = settled.clone();
    decided.acts = 1;
    let can_run = matches!(decided.here, Here::Runs | Here::Stands);
    let way = if can_run { Act::KeepHere } else { Act::RunsThere };
    let Some(decided) = happen(&decided, flaw, way) else { return wrong("the way out is closed") };
    let (decided, _) = settle(decided, flaw);
    let free = decided.source.is_some_and(source::Source::is_at_rest);
    if !free || can_run && decided.wanted && decided.here != Here::Runs {
        return wrong("the way out leads nowhere");
    }
    Ok(())
}

/// The world at rest, and after how many rounds.
fn settle(mut world: World, flaw: Option<Flaw>) -> (World, usize) {
    for round in 0..ROUNDS {
        let before = world.clone();
        world = one_round(world, flaw, round);
        // In the first ones nobody's time has run out.
        if before == world && round > 8 {
            return (world, round);
        }
    }
    (world, ROUNDS)
}

fn one_round(mut world: World, flaw: Option<Flaw>, round: usize) -> World {
    let attempt = |world: &mut World, act: Act| {
        if let Some(after) = happen(world, flaw, act) {
            *world = after;
        }
    };
    if world.source.is_none() && !world.gone_here {
        attempt(&mut world, Act::StartSource);
    }
    if world.destination.is_none() && !world.gone_there {
        attempt(&mut world, Act::StartDestination);
    }
    let id = world.id();
    if world.source.is_some() {
        attempt(&mut world, Act::SourceLooks);
        move_on(&mut world, flaw);
        for deed in source_due(&world, flaw) {
            if source_due(&world, flaw).contains(&deed) {
                attempt(&mut world, Act::Source(deed, true));
            }
        }
        if round > 6
            && matches!(
                world.source.map(source::Source::phase),
                Some(
                    Phase::Undoing { .. }
                        | Phase::Away { .. }
                        | Phase::InDoubt { theirs: true, .. }
                        | Phase::Stranded { theirs: Some(Start::Due) }
                )
            )
        {
            attempt(&mut world, Act::SourceWaited);
        }
        for id in 0..MIGRATIONS {
            if world.fences[id] {
                attempt(&mut world, Act::AskFence(id));
            }
        }
    }
    if world.destination.is_some() {
        for id in 0..MIGRATIONS {
            for ask in [Ask::Prepare, Ask::Abandon, Ask::CommitAndRun, Ask::CommitPaused, Ask::Fence] {
                // Only what is asked now: what is late has come already, or never will.
                if is_asked_now(&world, id, ask) {
                    attempt(&mut world, Act::Deliver(id, ask));
                }
            }
            attempt(&mut world, Act::DestinationLooks(id));
            if round > 6 && needs_no_more(&world, id) {
                attempt(&mut world, Act::GiveUp(id));
            }
            for deed in destination_due(&world, flaw, id) {
                attempt(&mut world, Act::Destination(id, deed, true));
            }
            world.answered[id] = 0;
            if world.asked[id] != 0 {
                attempt(&mut world, Act::Answer(id));
            }
        }
    } else {
        world.answered = [0; MIGRATIONS];
    }
    for answer in crate::world::ANSWERS {
        if world.source.is_some() && world.was_answered(id, answer) {
            attempt(&mut world, Act::Hear(answer));
        }
    }
    for id in 0..MIGRATIONS {
        if world.fences[id] && world.was_answered(id, Answer::Abandoned) {
            attempt(&mut world, Act::HearFenced(id));
        }
    }
    world
}

fn is_asked_now(world: &World, id: usize, ask: Ask) -> bool {
    let is_current = id == world.id() && world.source.is_some();
    match ask {
        Ask::Fence => world.was_asked(id, ask),
        _ if !is_current => false,
        _ => world.was_asked(id, ask),
    }
}

/// The source is done with this migration, whose lease runs out.
fn needs_no_more(world: &World, id: usize) -> bool {
    let Some(source) = &world.source else { return true };
    id != world.id() || source.is_at_rest()
}

/// A migration under way goes on as far as it can.
fn move_on(world: &mut World, flaw: Option<Flaw>) {
    let id = world.id();
    let Some(source) = world.source else { return };
    let mut attempt = |act: Act| {
        if let Some(after) = happen(world, flaw, act) {
            *world = after;
            return true;
        }
        false
    };
    match source.phase() {
        Phase::Moving if source.row().is_some() => {
            let _ = attempt(Act::AskPrepare);
            let (here, there) = (world.here, world.there[id]);
            if there == There::Loaded && matches!(here, Here::Stands | Here::LetGo) {
                if let Some(after) = happen(world, flaw, Act::Ready) {
                    *world = after;
                }
            } else if there == There::Waits && matches!(here, Here::Runs | Here::Stands) {
                if let Some(after) = happen(world, flaw, Act::Switch { complete: true }) {
                    *world = after;
                }
            } else if let (true, Some(after)) =
                (there != There::None || here == Here::Ended || world.gone_there, happen(world, flaw, Act::EngineFails))
            {
                *world = after;
            }
        }
        Phase::Away { complete: false, .. } => {
            let driven = source_due(world, flaw).contains(&source::Deed::Serve);
            let serves = matches!(world.there[id], There::Loaded | There::Runs)
                && matches!(world.here, Here::Stands | Here::LetGo)
                && !world.by_itself;
            let next = match () {
                () if !driven => return,
                () if world.whole[id] => Act::SeeComplete,
                () if serves => Act::RestFollows,
                () if world.destination.is_some() => Act::SeeLost,
                () => return,
            };
            if let Some(after) = happen(world, flaw, next) {
                *world = after;
            }
        }
        _ => {}
    }
}
