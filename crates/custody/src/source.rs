//! The half of the host that a guest leaves.

use crate::{Answer, Start};

/// A step in the source's journal while a migration is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutStep {
    /// The destination is made ready, and RAM is copied. The guest is ours.
    CopyRam,
    /// The destination is being asked to take the guest over. Whether it did is known only there.
    Commit,
    /// Our user has decided that the guest goes on here, whatever the destination thinks.
    KeptHere,
    /// The destination owns the guest; its RAM follows.
    PostCopy,
    /// The destination owns the guest and has all of it. What is left here goes.
    Retire,
    /// The destination owns the guest, but not all of its RAM could follow.
    Stranded,
}

/// How a migration ended, in the source's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutEnd {
    /// The guest is there.
    Done,
    /// The guest is here.
    Abandoned,
}

/// What is written to the source's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Row {
    /// The migration is open, at this step.
    Open(OutStep),
    /// It is over. Of one that was kept here the journal remembers, until the destination has let go, that it must be
    /// asked to ([`Deed::AskFence`]).
    Ended(OutEnd),
}

/// What the source's QEMU was last told to be doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// It was not asked yet, or does not answer.
    Silent,
    /// The guest is being copied; whether it runs does not matter yet.
    Copying,
    /// The guest runs.
    Runs,
    /// The guest is paused, and could run.
    Stands,
    /// The guest is in a state of its own that neither runs nor is to be ended by us: shut down, crashed, out of disk.
    Rests,
    /// QEMU has begun post-copy by itself: it will not let the guest run any more.
    LetGo,
    /// The process is gone.
    Ended,
}

impl Qemu {
    /// Nothing is copied any more.
    fn is_free(self) -> bool {
        matches!(self, Self::Runs | Self::Stands | Self::Rests | Self::Ended)
    }
}

/// How far the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The guest is ours and no migration is open.
    Owned,
    /// The guest is ours; a migration prepares and copies.
    Moving,
    /// The destination has what it needs to run the guest, which stands. The journal is to say so first.
    Sealed {
        /// All of its RAM is there.
        complete: bool,
    },
    /// The destination may own the guest.
    InDoubt {
        /// All of its RAM is there, as far as is known.
        complete: bool,
        /// By our user's word it is there. The destination is given its time to say otherwise, or to take it.
        theirs: bool,
    },
    /// The guest is ours again: what was begun is undone.
    Undoing {
        /// The destination has said that it let go.
        let_go: bool,
        /// By our user's word, against the destination's.
        kept: bool,
    },
    /// The destination owns the guest.
    Away {
        /// All of its RAM is there.
        complete: bool,
        /// What was said of its running there.
        start: Start,
    },
    /// The guest cannot go on as it is: QEMU here let go of it, or its RAM cannot follow.
    Stranded {
        /// The destination owns it, and this was said of its running there; otherwise it never will, and nobody does.
        theirs: Option<Start>,
    },
    /// The destination owns the guest and nothing is left here.
    Over {
        /// It was said to be as it is to be there.
        runs: bool,
    },
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The user wants the guest elsewhere.
    Begin,
    /// The user does not want it any more.
    Cancel,
    /// Preparing or copying failed, or the limits were reached.
    Failed,
    /// The destination has what it needs, and the guest stands.
    Ready {
        /// All of its RAM is there.
        complete: bool,
    },
    /// All of its RAM is there.
    Complete,
    /// The rest of its RAM cannot follow.
    Lost,
    /// The destination said this, in answer to whatever it was asked.
    Answered(Answer),
    /// QEMU tells this.
    Told(Qemu),
    /// This is in the journal.
    Wrote(Row),
    /// This could not be written.
    NotWritten(Row),
    /// What is asked of the destination was given its time.
    Waited,
    /// The guest's user wants it to run, or to be paused.
    Wants {
        /// To run.
        running: bool,
    },
    /// The user decides that the guest goes on here.
    KeepHere,
    /// The user knows that it runs at the destination.
    RunsThere,
    /// The user gives up what is left here.
    Discard,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// Write this, durably; then tell [`Event::Wrote`] or [`Event::NotWritten`].
    Write(Row),
    /// Ask the destination to take the guest over.
    AskCommit,
    /// Ask the destination to let go of what it prepared.
    AskAbandon,
    /// Have the destination let go of the guest even if it owns it: our user has kept it.
    AskFence,
    /// Have QEMU stop copying; the guest stays as it is. Then tell what QEMU does.
    StopCopying,
    /// Set the guest running. Then tell what QEMU does.
    Run,
    /// Pause the guest, which may run elsewhere; end its QEMU where it cannot be paused and the destination is known to
    /// own the guest. Then tell what QEMU does.
    Pause,
    /// Have the rest of the RAM follow, over new connections where one is lost.
    Serve,
    /// End QEMU.
    End,
}

/// Why something that a user asked is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// A migration is open already.
    Busy,
    /// There is no migration that this could mean.
    NotMoving,
    /// The destination was asked to take the guest over, or has.
    TooLate,
    /// Nothing is in doubt.
    NoDoubt,
    /// QEMU here has let go of the guest, or is gone, and cannot run it.
    CannotRun,
    /// Whether QEMU here could run it is not known: it does not answer.
    Silent,
}

/// See the module's and the crate's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    phase: Phase,
    /// What the journal holds of an open migration.
    row: Option<OutStep>,
    /// The guest is to run while it is ours.
    running: bool,
    qemu: Qemu,
    /// The destination was given its time in this phase.
    waited: bool,
}

impl Source {
    /// A guest that is ours, with no migration open.
    pub fn new(running: bool) -> Self {
        Self { phase: Phase::Owned, row: None, running, qemu: Qemu::Silent, waited: false }
    }

    /// What a journal's open row means, when nothing else is known.
    pub fn recover(row: OutStep, running: bool) -> Self {
        Self { phase: phase_of(row), row: Some(row), ..Self::new(running) }
    }

    /// How far it is.
    pub fn phase(self) -> Phase {
        self.phase
    }

    /// What the journal holds of an open migration.
    pub fn row(self) -> Option<OutStep> {
        self.row
    }

    /// The guest is to run, wherever it is.
    pub fn wants_running(self) -> bool {
        self.running
    }

    /// What QEMU was last said to do.
    pub fn qemu(self) -> Qemu {
        self.qemu
    }

    /// Only its user can say how it goes on.
    pub fn needs_its_user(self) -> bool {
        match self.phase {
            // It may be given back.
            Phase::Stranded { theirs: Some(Start::Due) } => self.waited,
            Phase::Stranded { .. } => true,
            _ => false,
        }
    }

    /// Nothing will be due again before something happens.
    pub fn is_at_rest(self) -> bool {
        matches!(self.phase, Phase::Owned | Phase::Over { .. })
    }

    /// The guest may not run here.
    pub fn must_stand(self) -> bool {
        match self.phase {
            Phase::InDoubt { .. } | Phase::Away { .. } | Phase::Stranded { .. } => true,
            // Until the journal says that it was kept, it was not.
            Phase::Undoing { kept, .. } => kept && self.row != Some(OutStep::KeptHere),
            _ => false,
        }
    }

    /// Takes in what happened. What a user asks may be refused; nothing has changed then.
    pub fn apply(&mut self, event: Event) -> Result<(), Refused> {
        let before = self.phase;
        match event {
            Event::Begin | Event::Cancel | Event::KeepHere | Event::RunsThere | Event::Discard => self.ask(event)?,
            Event::Wants { running } => self.running = running,
            Event::Failed => {
                if let Phase::Moving | Phase::Sealed { .. } = self.phase {
                    self.phase = self.undone();
                }
            }
            Event::Ready { complete } => {
                if self.phase == Phase::Moving {
                    self.phase = Phase::Sealed { complete };
                }
            }
            Event::Complete => match &mut self.phase {
                Phase::Away { complete, .. } | Phase::InDoubt { complete, .. } | Phase::Sealed { complete } => {
                    *complete = true;
                }
                _ => {}
            },
            Event::Lost => {
                if let Phase::Away { complete: false, start } = self.phase {
                    self.phase = Phase::Stranded { theirs: Some(start) };
                }
            }
            Event::Answered(answer) => self.hear(answer),
            Event::Told(qemu) => self.tell(qemu),
            Event::Wrote(row) => self.wrote(row),
            Event::NotWritten(row) => self.not_written(row),
            Event::Waited => {
                self.waited = true;
                if let Phase::InDoubt { theirs: true, .. } = self.phase {
                    self.phase = Phase::Away { complete: true, start: Start::Done };
                }
            }
        }
        if std::mem::discriminant(&before) != std::mem::discriminant(&self.phase) {
            self.waited = false;
            // Whatever it was said to do before: it may have begun to copy, or let go, since.
            if matches!(self.phase, Phase::Undoing { .. }) && !matches!(self.qemu, Qemu::LetGo | Qemu::Ended) {
                self.qemu = Qemu::Copying;
            }
        }
        Ok(())
    }

    /// What is begun is undone; what was not even written has not begun.
    fn undone(self) -> Phase {
        match self.row {
            None => Phase::Owned,
            // There is only forward.
            Some(_) if self.qemu == Qemu::LetGo => Phase::Sealed { complete: false },
            Some(_) => Phase::Undoing { let_go: false, kept: false },
        }
    }

    fn ask(&mut self, event: Event) -> Result<(), Refused> {
        self.phase = match (event, self.phase) {
            (Event::Begin, Phase::Owned) => {
                self.qemu = Qemu::Copying;
                Phase::Moving
            }
            (Event::Begin, Phase::Over { .. }) => return Err(Refused::CannotRun),
            (Event::Cancel, Phase::Moving) => self.undone(),
            // It is being undone already.
            (Event::Cancel, undoing @ Phase::Undoing { .. }) => undoing,
            (Event::Cancel, Phase::Owned) => return Err(Refused::NotMoving),
            (Event::Cancel, _) => return Err(Refused::TooLate),
            (
                Event::KeepHere,
                Phase::InDoubt { .. }
                | Phase::Away { complete: false, .. }
                | Phase::Away { start: Start::Due, .. }
                | Phase::Stranded { .. },
            ) => match self.qemu {
                Qemu::LetGo | Qemu::Ended => return Err(Refused::CannotRun),
                Qemu::Silent | Qemu::Copying => return Err(Refused::Silent),
                Qemu::Runs | Qemu::Stands | Qemu::Rests => Phase::Undoing { let_go: false, kept: true },
            },
            (Event::RunsThere, Phase::InDoubt { complete, .. }) => Phase::InDoubt { complete, theirs: true },
            (Event::RunsThere, Phase::Away { .. } | Phase::Stranded { .. })
            | (Event::Discard, Phase::Stranded { .. }) => Phase::Away { complete: true, start: Start::Done },
            (Event::Discard, Phase::Owned) => Phase::Owned,
            (Event::Begin | Event::Discard, _) => return Err(Refused::Busy),
            _ => return Err(Refused::NoDoubt),
        };
        Ok(())
    }

    fn hear(&mut self, answer: Answer) {
        self.phase = match (answer, self.phase) {
            (Answer::Committed(start), Phase::Sealed { complete } | Phase::InDoubt { complete, .. }) => {
                Phase::Away { complete, start }
            }
            // Somebody over there has decided so.
            (Answer::Committed(start), Phase::Moving | Phase::Undoing { let_go: false, kept: false }) => {
                Phase::Away { complete: false, start }
            }
            (Answer::Committed(now), Phase::Away { complete, start }) => {
                Phase::Away { complete, start: start.max(now) }
            }
            (Answer::Committed(now), Phase::Stranded { theirs: Some(start) }) => {
                Phase::Stranded { theirs: Some(start.max(now)) }
            }
            (
                Answer::Abandoned,
                Phase::Moving
                | Phase::Sealed { .. }
                | Phase::InDoubt { .. }
                | Phase::Away { .. }
                | Phase::Stranded { theirs: Some(_) },
            ) => match self.qemu {
                // Its QEMU here cannot run the guest any more, and that over there never will.
                Qemu::LetGo => Phase::Stranded { theirs: None },
                _ => Phase::Undoing { let_go: true, kept: false },
            },
            (Answer::Abandoned, Phase::Undoing { kept, .. }) => Phase::Undoing { let_go: true, kept },
            (_, phase) => phase,
        };
    }

    fn tell(&mut self, qemu: Qemu) {
        self.qemu = qemu;
        self.phase = match (qemu, self.phase) {
            // There is only forward.
            (Qemu::LetGo, Phase::Undoing { let_go: false, kept: false }) => Phase::Sealed { complete: false },
            (Qemu::LetGo, Phase::Undoing { let_go: true, .. }) => Phase::Stranded { theirs: None },
            // Its post-copy failed, or was none, and it can run the guest.
            (Qemu::Runs | Qemu::Stands | Qemu::Rests, Phase::Stranded { theirs: None }) => {
                Phase::Undoing { let_go: true, kept: false }
            }
            (Qemu::Ended, Phase::Moving | Phase::Sealed { complete: false }) => self.undone(),
            (_, phase) => phase,
        };
    }

    fn wrote(&mut self, row: Row) {
        match row {
            Row::Open(step) => {
                self.row = Some(step);
                if let (OutStep::Commit, Phase::Sealed { complete }) = (step, self.phase) {
                    self.phase = Phase::InDoubt { complete, theirs: false };
                }
            }
            Row::Ended(end) => {
                self.row = None;
                self.phase = match (end, self.phase) {
                    (OutEnd::Done, Phase::Away { start, .. }) => Phase::Over { runs: start == Start::Done },
                    (OutEnd::Done, _) => Phase::Over { runs: false },
                    (OutEnd::Abandoned, _) => Phase::Owned,
                };
            }
        }
    }

    fn not_written(&mut self, row: Row) {
        match (row, self.phase) {
            (Row::Open(OutStep::CopyRam), Phase::Moving) => self.phase = Phase::Owned,
            // The destination was not asked: it is as if nothing had been copied.
            (Row::Open(OutStep::Commit), Phase::Sealed { .. }) if self.qemu != Qemu::LetGo => {
                self.phase = self.undone();
            }
            (Row::Open(OutStep::KeptHere), Phase::Undoing { .. }) => {
                self.phase = self.row.map_or(Phase::Owned, phase_of);
            }
            // What the journal holds leads to the same end; it is due again.
            _ => {}
        }
    }

    /// What is to be done now, in this order.
    pub fn due(self) -> Vec<Deed> {
        let mut due = Vec::new();
        if self.must_stand() && self.qemu == Qemu::Runs {
            due.push(Deed::Pause);
        }
        let mut write = |step: OutStep| {
            if self.row != Some(step) {
                due.push(Deed::Write(Row::Open(step)));
            }
        };
        match self.phase {
            Phase::Moving if self.row.is_none() => write(OutStep::CopyRam),
            Phase::Owned | Phase::Over { .. } | Phase::Moving => {}
            Phase::Sealed { .. } => write(OutStep::Commit),
            Phase::InDoubt { .. } => due.push(Deed::AskCommit),
            Phase::Undoing { kept: true, .. } if self.row != Some(OutStep::KeptHere) => write(OutStep::KeptHere),
            Phase::Undoing { let_go, kept } => self.undo(let_go, kept, &mut due),
            Phase::Away { complete: false, .. } => {
                write(OutStep::PostCopy);
                due.push(Deed::Serve);
            }
            Phase::Away { complete: true, start } => {
                // While its start is due, it may be given back.
                if self.qemu != Qemu::Ended && start != Start::Due {
                    write(OutStep::Retire);
                    due.push(Deed::End);
                } else if self.qemu == Qemu::Ended && (start == Start::Done || self.waited) {
                    due.push(Deed::Write(Row::Ended(OutEnd::Done)));
                } else {
                    due.push(Deed::AskCommit);
                }
            }
            Phase::Stranded { .. } if self.qemu == Qemu::Ended => due.push(Deed::Write(Row::Ended(OutEnd::Done))),
            Phase::Stranded { theirs } => {
                write(OutStep::Stranded);
                if theirs == Some(Start::Due) {
                    due.push(Deed::AskCommit);
                }
            }
        }
        due
    }

    /// QEMU first, as it may have let go; then the destination, whose QEMU may hold the disks; then the guest runs.
    fn undo(self, let_go: bool, kept: bool, due: &mut Vec<Deed>) {
        if !self.qemu.is_free() {
            due.push(Deed::StopCopying);
            return;
        }
        if !let_go {
            due.push(if kept { Deed::AskFence } else { Deed::AskAbandon });
            if !kept && !self.waited {
                return;
            }
        }
        if self.running && self.qemu == Qemu::Stands {
            due.push(Deed::Run);
        } else if self.row.is_some() {
            due.push(Deed::Write(Row::Ended(OutEnd::Abandoned)));
        }
    }
}

fn phase_of(row: OutStep) -> Phase {
    match row {
        OutStep::CopyRam => Phase::Undoing { let_go: false, kept: false },
        OutStep::Commit => Phase::InDoubt { complete: false, theirs: false },
        OutStep::KeptHere => Phase::Undoing { let_go: false, kept: true },
        OutStep::PostCopy => Phase::Away { complete: false, start: Start::Due },
        // It is written when that is known.
        OutStep::Retire => Phase::Away { complete: true, start: Start::Tried },
        OutStep::Stranded => Phase::Stranded { theirs: Some(Start::Due) },
    }
}
