//! Two hosts, their agents, journals and QEMUs, and what is on its way between them: everything that the two halves of
//! the protocol can meet. The halves are the real ones; only what they stand on is made up.
//!
//! A message that was sent may come at any later time, any number of times, in any order, or never. An agent may be
//! killed between any two deeds and started again from its journal; a write or an order to QEMU may fail; a QEMU may be
//! killed, or set its guest running by itself when post-copy fails; a host may be gone for ever.

use vmferry_custody::destination::{self, Destination, InStep};
use vmferry_custody::source::{self, OutEnd, OutStep, Phase, Row, Source};
use vmferry_custody::{Answer, Start};

/// Who moves the RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Engine {
    /// The agents: QEMU never lets go, and nothing moves while the source's agent is dead.
    External,
    /// QEMU, which goes on without its agent, and lets go when post-copy begins.
    Qemu,
}

/// The guest at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Here {
    Runs,
    Stands,
    LetGo,
    Ended,
}

/// The guest at the destination, for one migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum There {
    None,
    Waits,
    Loaded,
    Runs,
    Ended,
}

/// What the source asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ask {
    Prepare,
    CommitAndRun,
    CommitPaused,
    Abandon,
    Fence,
}

pub(crate) const ASKS: [Ask; 5] = [Ask::Prepare, Ask::CommitAndRun, Ask::CommitPaused, Ask::Abandon, Ask::Fence];
pub(crate) const ANSWERS: [Answer; 5] = [
    Answer::Prepared,
    Answer::Committed(Start::Due),
    Answer::Committed(Start::Tried),
    Answer::Committed(Start::Done),
    Answer::Abandoned,
];

/// Migrations of the one VM, one after the other.
pub(crate) const MIGRATIONS: usize = 2;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) engine: Engine,
    /// The source's agent, unless it is dead, and with which migration it is.
    pub(crate) source: Option<Source>,
    pub(crate) now: u8,
    /// Its journal.
    pub(crate) out: [Option<Row>; MIGRATIONS],
    pub(crate) fences: [bool; MIGRATIONS],
    /// The destination's agent, unless it is dead, and its journal.
    pub(crate) destination: Option<[Destination; MIGRATIONS]>,
    pub(crate) incoming: [Option<InStep>; MIGRATIONS],
    pub(crate) here: Here,
    /// QEMU here is migrating.
    pub(crate) copies: bool,
    /// It set its guest running by itself.
    pub(crate) by_itself: bool,
    pub(crate) there: [There; MIGRATIONS],
    /// All of the guest's RAM is there; the guest was set running there.
    pub(crate) whole: [bool; MIGRATIONS],
    pub(crate) ran: [bool; MIGRATIONS],
    /// Nobody can tell that it executed nothing there: running was tried, or its agent ended when it was about to be.
    pub(crate) tried: [bool; MIGRATIONS],
    /// What was said, as bits of [`ASKS`] and [`ANSWERS`].
    pub(crate) asked: [u8; MIGRATIONS],
    pub(crate) answered: [u8; MIGRATIONS],
    pub(crate) begun: u8,
    /// What may still go wrong, and be asked by users.
    pub(crate) faults: u8,
    pub(crate) acts: u8,
    pub(crate) gone_here: bool,
    pub(crate) gone_there: bool,
    /// The source's QEMU was killed, or a host is gone.
    pub(crate) killed: bool,
    /// A destination's QEMU was killed.
    pub(crate) killed_there: [bool; MIGRATIONS],
    /// The guest is to run, as far as its user is concerned.
    pub(crate) wanted: bool,
    /// The user has decided something against what the agents know.
    pub(crate) risked: bool,
    /// What must never be.
    pub(crate) broken: Option<&'static str>,
    /// For one of the flaws: the source's agent drives its migration no more.
    pub(crate) given_up: bool,
    /// For one of the flaws: QEMU's word that it set the guest running was heard.
    pub(crate) heard_resume: bool,
    /// For one of the flaws: setting the guest running was tried.
    pub(crate) tried_to_run: bool,
}

impl World {
    pub(crate) fn new(engine: Engine, faults: u8, acts: u8) -> Self {
        Self {
            engine,
            source: Some(Source::new(true)),
            now: 0,
            out: [None; MIGRATIONS],
            fences: [false; MIGRATIONS],
            destination: Some([Destination::new(); MIGRATIONS]),
            incoming: [None; MIGRATIONS],
            here: Here::Runs,
            copies: false,
            by_itself: false,
            there: [There::None; MIGRATIONS],
            whole: [false; MIGRATIONS],
            ran: [false; MIGRATIONS],
            tried: [false; MIGRATIONS],
            asked: [0; MIGRATIONS],
            answered: [0; MIGRATIONS],
            begun: 0,
            faults,
            acts,
            gone_here: false,
            gone_there: false,
            killed: false,
            killed_there: [false; MIGRATIONS],
            wanted: true,
            risked: false,
            broken: None,
            given_up: false,
            heard_resume: false,
            tried_to_run: false,
        }
    }

    pub(crate) fn id(&self) -> usize {
        self.now as usize
    }

    pub(crate) fn running(&self) -> usize {
        usize::from(self.here == Here::Runs) + self.there.iter().filter(|it| **it == There::Runs).count()
    }

    /// What the source's QEMU would tell.
    pub(crate) fn tells_here(&self) -> source::Qemu {
        match self.here {
            Here::Ended => source::Qemu::Ended,
            Here::LetGo => source::Qemu::LetGo,
            _ if self.copies => source::Qemu::Copying,
            Here::Runs => source::Qemu::Runs,
            Here::Stands => source::Qemu::Stands,
        }
    }

    /// What a destination's QEMU would tell.
    pub(crate) fn tells_there(&self, id: usize) -> destination::Qemu {
        match self.there[id] {
            There::None => destination::Qemu::None,
            There::Waits => destination::Qemu::Waits,
            There::Loaded => destination::Qemu::Loaded,
            There::Runs => destination::Qemu::Runs,
            There::Ended => destination::Qemu::Ended,
        }
    }

    pub(crate) fn ask(&mut self, id: usize, ask: Ask) {
        self.asked[id] |= 1 << ask as u8;
    }

    pub(crate) fn was_asked(&self, id: usize, ask: Ask) -> bool {
        self.asked[id] & (1 << ask as u8) != 0
    }

    /// The destination's word, as it is now, is on its way.
    pub(crate) fn answer(&mut self, id: usize) {
        if let Some(agents) = &self.destination {
            let said = agents[id].answer();
            let bit = ANSWERS.iter().position(|it| *it == said).expect("it is one of them");
            self.answered[id] |= 1 << bit;
        }
    }

    pub(crate) fn was_answered(&self, id: usize, answer: Answer) -> bool {
        let bit = ANSWERS.iter().position(|it| *it == answer).expect("it is one of them");
        self.answered[id] & (1 << bit) != 0
    }

    /// The source's agent takes something in.
    pub(crate) fn source_hears(&mut self, event: source::Event) {
        if let Some(source) = &mut self.source {
            // What a user asks may be refused.
            let _ = source.apply(event);
            if let (Phase::Over { runs: true }, false) = (source.phase(), self.risked)
                && !self.ran[self.now as usize]
                && self.wanted
            {
                self.broken = Some("the user was told that it runs there, and it never did");
            }
        }
    }

    pub(crate) fn destination_hears(&mut self, id: usize, event: destination::Event) {
        if let Some(agents) = &mut self.destination {
            agents[id].apply(event);
        }
    }

    /// The source's agent is started again and finds its journal.
    pub(crate) fn start_source(&mut self) {
        let open = (0..MIGRATIONS).find_map(|id| match self.out[id] {
            Some(Row::Open(step)) => Some((id, step)),
            _ => None,
        });
        (self.given_up, self.heard_resume) = (false, false);
        let last = usize::from(self.begun.max(1)) - 1;
        let source = match open {
            Some((id, step)) => {
                self.now = id as u8;
                Source::recover(step, self.wanted)
            }
            None if self.out[last] == Some(Row::Ended(OutEnd::Done)) => {
                let mut over = Source::recover(OutStep::Retire, self.wanted);
                over.apply(source::Event::Wrote(Row::Ended(OutEnd::Done))).expect("that is no request");
                over
            }
            None => Source::new(self.wanted),
        };
        self.source = Some(source);
    }

    /// A guest may be gone with the QEMU that was killed.
    pub(crate) fn may_be_lost(&self) -> bool {
        let there = |id: usize| {
            let paused = self.incoming[id] == Some(InStep::Committed { must_run: false });
            self.killed_there[id] && (self.tried[id] || paused || self.here == Here::LetGo)
        };
        self.killed || (0..MIGRATIONS).any(there)
    }

    pub(crate) fn start_destination(&mut self) {
        for id in 0..MIGRATIONS {
            self.tried[id] |= matches!(self.incoming[id], Some(InStep::Committed { .. }));
        }
        let found = |row: &Option<InStep>| row.map_or_else(Destination::new, Destination::recover);
        self.destination = Some([found(&self.incoming[0]), found(&self.incoming[1])]);
        self.tried_to_run = false;
    }

    /// Writes a row of the source's journal.
    pub(crate) fn write_out(&mut self, row: Row) {
        let id = self.id();
        let others = (0..MIGRATIONS).any(|it| it != id && matches!(self.out[it], Some(Row::Open(_))));
        if others && matches!(row, Row::Open(OutStep::CopyRam)) {
            self.broken = Some("a second migration was begun while one is open");
        }
        if let Row::Open(OutStep::KeptHere) = row {
            self.fences[id] = true;
        }
        self.out[id] = Some(row);
    }
}
