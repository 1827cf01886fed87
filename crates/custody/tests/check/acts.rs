//! What can happen next in a [`World`], and what comes of it.

use vmferry_custody::destination::{self, InStep};
use vmferry_custody::source::{self, OutStep, Phase, Row};
use vmferry_custody::{Answer, Start};

use crate::flaws::Flaw;
use crate::world::{ANSWERS, ASKS, Ask, Engine, Here, MIGRATIONS, There, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Act {
    /// Users.
    Begin,
    Cancel,
    KeepHere,
    RunsThere,
    Discard,
    PauseGuest,
    /// The engine, and what the source's agent sees of it.
    AskPrepare,
    Copy,
    Switch {
        complete: bool,
    },
    Ready,
    EngineFails,
    RestFollows,
    SeeComplete,
    SeeLost,
    SourceWaited,
    SourceLooks,
    /// Something that is due, and whether it comes off.
    Source(source::Deed, bool),
    Destination(usize, destination::Deed, bool),
    /// QEMU does not set the guest running.
    Refuses(usize),
    /// Messages.
    Deliver(usize, Ask),
    Answer(usize),
    Hear(Answer),
    AskFence(usize),
    HearFenced(usize),
    DestinationLooks(usize),
    GiveUp(usize),
    /// Faults.
    KillSource,
    StartSource,
    KillDestination,
    StartDestination,
    KillQemuHere,
    KillQemuThere(usize),
    ResumesByItself,
    SourceHostGone,
    DestinationHostGone,
}

/// Everything that can happen now.
pub(crate) fn possible(world: &World, flaw: Option<Flaw>, acts: &mut Vec<Act>) {
    let id = world.id();
    users(world, flaw, acts);
    engine(world, acts);
    if let Some(source) = &world.source {
        if source.qemu() != world.tells_here() && !source.is_at_rest() {
            acts.push(Act::SourceLooks);
        }
        for deed in source_due(world, flaw) {
            acts.push(Act::Source(deed, true));
            let can_fail = matches!(
                deed,
                source::Deed::Write(_) | source::Deed::Run | source::Deed::Pause | source::Deed::StopCopying
            );
            if can_fail && world.faults > 0 {
                acts.push(Act::Source(deed, false));
            }
        }
        acts.extend(ANSWERS.into_iter().filter(|it| world.was_answered(id, *it)).map(Act::Hear));
        for id in 0..MIGRATIONS {
            if world.fences[id] {
                acts.push(Act::AskFence(id));
                if world.was_answered(id, Answer::Abandoned) {
                    acts.push(Act::HearFenced(id));
                }
            }
        }
    }
    if let Some(agents) = &world.destination {
        for (id, agent) in agents.iter().enumerate() {
            acts.extend(ASKS.into_iter().filter(|it| world.was_asked(id, *it)).map(|ask| Act::Deliver(id, ask)));
            if world.asked[id] != 0 && agent.row().is_some() {
                acts.push(Act::Answer(id));
            }
            if agent.qemu() != world.tells_there(id) {
                acts.push(Act::DestinationLooks(id));
            }
            // While QEMU at the source has let go, only its source may say that it is over.
            if agent.row() == Some(InStep::Prepared) && world.here != Here::LetGo {
                acts.push(Act::GiveUp(id));
            }
            for deed in destination_due(world, flaw, id) {
                acts.push(Act::Destination(id, deed, true));
                if matches!(deed, destination::Deed::Write(_) | destination::Deed::Run) && world.faults > 0 {
                    acts.push(Act::Destination(id, deed, false));
                }
                // A QEMU whose source has let go is asked again for ever.
                if deed == destination::Deed::Run && world.faults > 0 && world.here != Here::LetGo {
                    acts.push(Act::Refuses(id));
                }
            }
        }
    }
    faults(world, acts);
}

fn users(world: &World, flaw: Option<Flaw>, acts: &mut Vec<Act>) {
    let Some(source) = &world.source else { return };
    if source.phase() == Phase::Owned && world.here != Here::Ended && usize::from(world.begun) < MIGRATIONS {
        acts.push(Act::Begin);
    }
    if world.acts == 0 {
        return;
    }
    match source.phase() {
        Phase::Moving | Phase::Sealed { .. } => acts.extend([Act::Cancel, Act::PauseGuest]),
        Phase::InDoubt { .. }
        | Phase::Away { complete: false, .. }
        | Phase::Away { start: Start::Due, .. }
        | Phase::Stranded { .. } => {
            acts.push(Act::Cancel);
            if flaw != Some(Flaw::NoWayOut) {
                acts.extend([Act::KeepHere, Act::RunsThere]);
            }
            if matches!(source.phase(), Phase::Stranded { .. }) {
                acts.push(Act::Discard);
            }
        }
        _ => {}
    }
}

fn engine(world: &World, acts: &mut Vec<Act>) {
    let id = world.id();
    let phase = world.source.map(source::Source::phase);
    let moves = phase == Some(Phase::Moving) && world.out[id] == Some(Row::Open(OutStep::CopyRam));
    if moves && !world.was_asked(id, Ask::Prepare) {
        acts.push(Act::AskPrepare);
    }
    // QEMU switches over without its agent, too.
    let alone = world.engine == Engine::Qemu && world.copies;
    let alive = matches!(world.here, Here::Runs | Here::Stands) && !world.by_itself;
    if world.there[id] == There::Waits && alive && (moves || alone) {
        if moves && world.engine == Engine::Qemu && !world.copies {
            acts.push(Act::Copy);
        }
        acts.push(Act::Switch { complete: true });
        if moves {
            acts.push(Act::Switch { complete: false });
        }
    }
    if moves && world.there[id] == There::Loaded && matches!(world.here, Here::Stands | Here::LetGo) {
        acts.push(Act::Ready);
    }
    if moves {
        acts.push(Act::EngineFails);
    }
    let Some(Phase::Away { complete: false, .. }) = phase else {
        if let Some(
            Phase::Away { .. }
            | Phase::Undoing { .. }
            | Phase::InDoubt { theirs: true, .. }
            | Phase::Stranded { theirs: Some(Start::Due) },
        ) = phase
        {
            acts.push(Act::SourceWaited);
        }
        return;
    };
    let can_serve = matches!(world.there[id], There::Loaded | There::Runs)
        && matches!(world.here, Here::Stands | Here::LetGo)
        && !world.by_itself;
    if can_serve && !world.whole[id] {
        acts.push(Act::RestFollows);
    }
    if world.whole[id] {
        acts.push(Act::SeeComplete);
    } else if !can_serve && world.destination.is_some() {
        acts.push(Act::SeeLost);
    }
}

fn faults(world: &World, acts: &mut Vec<Act>) {
    if world.source.is_none() && !world.gone_here {
        acts.push(Act::StartSource);
    }
    if world.destination.is_none() && !world.gone_there {
        acts.push(Act::StartDestination);
    }
    if world.faults == 0 || world.begun == 0 {
        return;
    }
    if world.source.is_some() {
        acts.push(Act::KillSource);
    }
    if world.destination.is_some() {
        acts.push(Act::KillDestination);
    }
    if world.here != Here::Ended {
        acts.push(Act::KillQemuHere);
    }
    for id in 0..MIGRATIONS {
        if !matches!(world.there[id], There::None | There::Ended) {
            acts.push(Act::KillQemuThere(id));
        }
    }
    if world.here == Here::LetGo && world.copies {
        acts.push(Act::ResumesByItself);
    }
    if !world.gone_here && !world.gone_there {
        acts.extend([Act::SourceHostGone, Act::DestinationHostGone]);
    }
}

/// What is due at the source; a flaw may keep some of it from being done.
pub(crate) fn source_due(world: &World, flaw: Option<Flaw>) -> Vec<source::Deed> {
    let Some(source) = &world.source else { return Vec::new() };
    let mut due = source.due();
    match flaw {
        Some(Flaw::GivesUpAfterTheCommit) if world.given_up => due.clear(),
        Some(Flaw::ActsOnTheEventOnly) if !world.heard_resume => due.retain(|deed| *deed != source::Deed::Pause),
        _ => {}
    }
    due
}

pub(crate) fn destination_due(world: &World, flaw: Option<Flaw>, id: usize) -> Vec<destination::Deed> {
    let Some(agents) = &world.destination else { return Vec::new() };
    let mut due = agents[id].due();
    if flaw == Some(Flaw::TriesToRunOnce) && world.tried_to_run {
        due.retain(|deed| *deed != destination::Deed::Run);
    }
    due
}

/// What comes of it; nothing, when it cannot happen after all.
pub(crate) fn happen(before: &World, flaw: Option<Flaw>, act: Act) -> Option<World> {
    let mut world = before.clone();
    let id = world.id();
    match act {
        Act::Begin => {
            world.now = world.begun;
            world.begun += 1;
            world.source_hears(source::Event::Begin);
            world.copies = false;
        }
        Act::Cancel => user(&mut world, source::Event::Cancel),
        Act::KeepHere => {
            user(&mut world, source::Event::KeepHere);
            world.risked |= matches!(world.source?.phase(), Phase::Undoing { kept: true, .. });
        }
        Act::RunsThere => {
            user(&mut world, source::Event::RunsThere);
            world.risked = true;
        }
        Act::Discard => {
            user(&mut world, source::Event::Discard);
            world.risked = true;
        }
        Act::PauseGuest => {
            if world.here != Here::Runs {
                return None;
            }
            world.acts -= 1;
            (world.here, world.wanted) = (Here::Stands, false);
            world.source_hears(source::Event::Wants { running: false });
        }
        Act::AskPrepare => world.ask(id, Ask::Prepare),
        Act::Copy => world.copies = true,
        Act::Switch { complete } => {
            // A QEMU that is done with all of it copies no more.
            (world.there[id], world.whole[id]) = (There::Loaded, complete);
            world.copies = world.engine == Engine::Qemu && !complete;
            world.here = if world.copies { Here::LetGo } else { Here::Stands };
        }
        Act::Ready => {
            world.source_hears(source::Event::Told(match world.here {
                Here::LetGo => source::Qemu::LetGo,
                _ => source::Qemu::Stands,
            }));
            world.source_hears(source::Event::Ready { complete: world.whole[id] });
        }
        Act::EngineFails => world.source_hears(source::Event::Failed),
        Act::RestFollows => world.whole[id] = true,
        Act::SeeComplete => world.source_hears(source::Event::Complete),
        Act::SeeLost => world.source_hears(source::Event::Lost),
        Act::SourceWaited => world.source_hears(source::Event::Waited),
        Act::SourceLooks => {
            let told = world.tells_here();
            world.source_hears(source::Event::Told(told));
        }
        Act::Source(deed, comes_off) => source_does(&mut world, flaw, deed, comes_off)?,
        Act::Destination(id, deed, comes_off) => destination_does(&mut world, flaw, id, deed, comes_off),
        Act::Refuses(id) => {
            if world.there[id] != There::Loaded {
                return None;
            }
            world.faults -= 1;
            world.destination_hears(id, destination::Event::Tries);
            if flaw == Some(Flaw::AnswersWhileItTries) {
                world.answer(id);
            }
            world.destination_hears(id, destination::Event::Refused);
        }
        Act::Deliver(id, ask) => world.destination_hears(
            id,
            match ask {
                Ask::Prepare => destination::Event::Prepare,
                Ask::CommitAndRun => destination::Event::Commit { run: true },
                Ask::CommitPaused => destination::Event::Commit { run: false },
                Ask::Abandon => destination::Event::Abandon,
                Ask::Fence => destination::Event::Fence,
            },
        ),
        Act::Answer(id) => world.answer(id),
        Act::Hear(answer) => {
            world.source_hears(source::Event::Answered(answer));
            let taken_for = match flaw {
                Some(Flaw::SaysSoUnasked) => Start::Done,
                Some(Flaw::TakesTheCommitForRunning) => Start::Tried,
                _ => Start::Due,
            };
            if let Answer::Committed(Start::Due | Start::Tried) = answer {
                world.source_hears(source::Event::Answered(Answer::Committed(taken_for)));
            }
        }
        Act::AskFence(id) => world.ask(id, Ask::Fence),
        Act::HearFenced(id) => world.fences[id] = false,
        Act::DestinationLooks(id) => {
            let told = world.tells_there(id);
            world.destination_hears(id, destination::Event::Told(told));
        }
        Act::GiveUp(id) => world.destination_hears(id, destination::Event::GiveUp),
        Act::StartSource => world.start_source(),
        Act::StartDestination => world.start_destination(),
        fault => fails(&mut world, fault),
    }
    (world != *before).then_some(world)
}

fn user(world: &mut World, asks: source::Event) {
    world.acts -= 1;
    world.source_hears(asks);
}

fn fails(world: &mut World, fault: Act) {
    world.faults -= 1;
    match fault {
        Act::KillSource => world.source = None,
        Act::KillDestination => world.destination = None,
        Act::KillQemuHere => (world.here, world.copies, world.killed) = (Here::Ended, false, true),
        Act::KillQemuThere(id) => (world.there[id], world.killed_there[id]) = (There::Ended, true),
        Act::ResumesByItself => {
            // As it was before it was migrated.
            world.here = if world.wanted { Here::Runs } else { Here::Stands };
            (world.copies, world.by_itself) = (false, true);
            world.heard_resume = world.source.is_some();
        }
        Act::SourceHostGone => {
            (world.source, world.here, world.gone_here, world.killed) = (None, Here::Ended, true, true);
        }
        Act::DestinationHostGone => {
            (world.destination, world.gone_there, world.killed) = (None, true, true);
            for there in &mut world.there {
                if *there != There::None {
                    *there = There::Ended;
                }
            }
        }
        other => unreachable!("{other:?} is no fault"),
    }
}

fn source_does(world: &mut World, flaw: Option<Flaw>, deed: source::Deed, comes_off: bool) -> Option<()> {
    use source::{Deed, Event, Qemu};
    let id = world.id();
    if !comes_off {
        world.faults -= 1;
        match deed {
            Deed::Write(row @ Row::Ended(_)) if flaw == Some(Flaw::FreeBeforeItIsWritten) => {
                // It is taken for written.
                world.source_hears(Event::Wrote(row));
            }
            Deed::Write(row) => {
                world.source_hears(Event::NotWritten(row));
                let after = matches!(world.source?.phase(), Phase::Away { .. });
                world.given_up |= after && flaw == Some(Flaw::GivesUpAfterTheCommit);
            }
            _ => world.source_hears(Event::Told(Qemu::Silent)),
        }
        return Some(());
    }
    match deed {
        Deed::Write(row) => {
            if flaw == Some(Flaw::FreeBeforeItIsWritten) {
                world.out[id] = Some(row);
            } else {
                world.write_out(row);
            }
            world.source_hears(Event::Wrote(row));
        }
        Deed::AskCommit => {
            world.ask(id, if world.source?.wants_running() { Ask::CommitAndRun } else { Ask::CommitPaused });
        }
        Deed::AskAbandon => world.ask(id, Ask::Abandon),
        Deed::AskFence => world.ask(id, Ask::Fence),
        Deed::StopCopying => {
            if world.here != Here::LetGo {
                world.copies = false;
            }
            let told = world.tells_here();
            world.source_hears(Event::Told(told));
        }
        Deed::Run => {
            if world.here == Here::Stands {
                world.here = Here::Runs;
            }
            let told = world.tells_here();
            world.source_hears(Event::Told(told));
        }
        Deed::Pause => {
            if world.here == Here::Runs {
                (world.here, world.by_itself) = (Here::Stands, world.by_itself);
            }
            let told = world.tells_here();
            world.source_hears(Event::Told(told));
        }
        // The engine does; see `RestFollows`.
        Deed::Serve => return None,
        Deed::End => {
            let handed_over = matches!(world.incoming[id], Some(InStep::Committed { .. })) && world.whole[id];
            if world.here != Here::Ended && !handed_over && !world.risked && !world.gone_there {
                world.broken = Some("a guest was ended at the source that had not been handed over");
            }
            (world.here, world.copies) = (Here::Ended, false);
            world.source_hears(Event::Told(Qemu::Ended));
        }
    }
    Some(())
}

fn destination_does(world: &mut World, flaw: Option<Flaw>, id: usize, deed: destination::Deed, comes_off: bool) {
    use destination::{Deed, Event, Qemu};
    if flaw == Some(Flaw::TriesToRunOnce) && deed == Deed::Run {
        world.tried_to_run = true;
    }
    if deed == Deed::Run {
        world.tried[id] = true;
        if flaw != Some(Flaw::ForgetsThatItTried) {
            world.destination_hears(id, Event::Tries);
        }
    }
    if !comes_off {
        world.faults -= 1;
        world.destination_hears(
            id,
            match deed {
                Deed::Write(row) => Event::NotWritten(row),
                _ => Event::Told(Qemu::Silent),
            },
        );
        return;
    }
    match deed {
        Deed::Write(row) => {
            let fenced = world.was_asked(id, Ask::Fence);
            let was_committed = matches!(world.incoming[id], Some(InStep::Committed { .. }));
            if row == InStep::Abandoned && was_committed && !fenced && (world.tried[id] || world.ran[id]) {
                world.broken = Some("a guest that was committed, and may have run, was abandoned");
            }
            world.incoming[id] = Some(row);
            world.destination_hears(id, Event::Wrote(row));
        }
        Deed::Launch => {
            world.there[id] = There::Waits;
            world.destination_hears(id, Event::Told(Qemu::Waits));
        }
        Deed::Look => {
            let told = world.tells_there(id);
            world.destination_hears(id, Event::Told(told));
        }
        Deed::Pause => {
            if world.there[id] == There::Runs {
                world.there[id] = There::Loaded;
            }
            world.destination_hears(id, Event::Told(Qemu::Loaded));
        }
        Deed::Run => {
            if world.there[id] == There::Loaded {
                (world.there[id], world.ran[id]) = (There::Runs, true);
            }
            let told = world.tells_there(id);
            world.destination_hears(id, Event::Told(told));
        }
        Deed::End => {
            if matches!(world.incoming[id], Some(InStep::Committed { .. })) {
                world.broken = Some("a guest was ended at the destination that owns it");
            }
            world.there[id] = There::Ended;
            world.destination_hears(id, Event::Told(Qemu::Ended));
        }
    }
}
