//! The half of the host that a guest comes to.

use crate::{Answer, Start};

/// Where an incoming migration stands in the destination's journal. This is what decides who owns the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InStep {
    /// QEMU waits or receives; the source owns the guest.
    Prepared,
    /// This host owns the guest.
    Committed {
        /// It has not been set running yet, and is to be.
        must_run: bool,
    },
    /// This host never will own it, or does not any more, as it never ran here: whatever it had goes.
    Abandoned,
}

/// What the destination's QEMU was last told to be doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// There is none yet.
    None,
    /// It was not asked yet, or does not answer.
    Silent,
    /// It waits for the guest, or takes it in.
    Waits,
    /// It has all that it needs to run the guest, which stands.
    Loaded,
    /// The guest runs, or is in a state of its own: it was set running.
    Runs,
    /// It could not load the guest.
    Failed,
    /// The process is gone.
    Ended,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The source wants it to get ready.
    Prepare,
    /// The source wants it to take the guest over.
    Commit {
        /// The guest is to run.
        run: bool,
    },
    /// The source wants it to let go.
    Abandon,
    /// The source's user has kept the guest: this host is not to have it, even if it has.
    Fence,
    /// The source was not heard of for too long; or what brought the guest is gone; or QEMU took too long to load it.
    GiveUp,
    /// QEMU tells this.
    Told(Qemu),
    /// QEMU is about to be told to set the guest running; [`Event::Told`] or [`Event::Refused`] follows.
    Tries,
    /// QEMU has refused that, for good as far as is known, and the guest has executed nothing.
    Refused,
    /// This is in the journal.
    Wrote(InStep),
    /// This could not be written.
    NotWritten(InStep),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// Write this, durably; then tell [`Event::Wrote`] or [`Event::NotWritten`].
    Write(InStep),
    /// Start a QEMU that waits for the guest.
    Launch,
    /// Ask QEMU whether it has all that it needs. Then tell what it says, or [`Event::GiveUp`].
    Look,
    /// Pause the guest, which must not run here.
    Pause,
    /// Tell [`Event::Tries`] and set the guest running. Then tell what QEMU does, or [`Event::Refused`]. Nobody is
    /// answered in between.
    Run,
    /// End QEMU.
    End,
}

/// What is wished of it beyond what is in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Wish {
    None,
    Prepare,
    Commit { run: bool },
    LetGo,
    Fence,
}

/// Whether it was tried to set the guest running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Tried {
    No,
    /// QEMU has not answered yet.
    UnderWay,
    /// QEMU was told, and said no: it never will.
    Refused,
    /// As far as is known.
    Yes,
}

/// See the module's and the crate's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    row: Option<InStep>,
    qemu: Qemu,
    wish: Wish,
    tried: Tried,
}

impl Destination {
    /// Of a migration that this host has not heard of.
    pub fn new() -> Self {
        Self { row: None, qemu: Qemu::None, wish: Wish::None, tried: Tried::No }
    }

    /// What a journal's row means, when nothing else is known.
    pub fn recover(row: InStep) -> Self {
        // Whoever wrote it may have tried since.
        let tried = if matches!(row, InStep::Committed { .. }) { Tried::Yes } else { Tried::No };
        Self { row: Some(row), qemu: Qemu::Silent, wish: Wish::None, tried }
    }

    /// What the journal holds.
    pub fn row(self) -> Option<InStep> {
        self.row
    }

    /// What QEMU was last said to do.
    pub fn qemu(self) -> Qemu {
        self.qemu
    }

    /// QEMU is being told to set the guest running: what is to be answered is known in a moment.
    pub fn is_trying(self) -> bool {
        self.tried == Tried::UnderWay
    }

    fn may_have_run(self) -> bool {
        matches!(self.tried, Tried::UnderWay | Tried::Yes)
    }

    /// What is answered to the source, whatever it asked; not while it [is trying](Self::is_trying).
    pub fn answer(self) -> Answer {
        match self.row {
            Some(InStep::Committed { must_run }) if !must_run || self.qemu == Qemu::Runs => {
                Answer::Committed(Start::Done)
            }
            Some(InStep::Committed { .. }) if self.may_have_run() => Answer::Committed(Start::Tried),
            Some(InStep::Committed { .. }) => Answer::Committed(Start::Due),
            Some(InStep::Abandoned) => Answer::Abandoned,
            Some(InStep::Prepared) | None => Answer::Prepared,
        }
    }

    /// Nothing will be due again before something happens.
    pub fn is_at_rest(self) -> bool {
        match self.row {
            None | Some(InStep::Prepared) => false,
            Some(InStep::Committed { must_run }) => {
                (!must_run || self.qemu == Qemu::Ended && self.may_have_run()) && self.wish != Wish::Fence
            }
            Some(InStep::Abandoned) => matches!(self.qemu, Qemu::Ended | Qemu::None),
        }
    }

    /// Takes in what happened.
    pub fn apply(&mut self, event: Event) {
        match event {
            // What was begun, or abandoned unheard, is not begun again.
            Event::Prepare => {
                if self.row.is_none() && self.wish == Wish::None {
                    self.wish = Wish::Prepare;
                }
            }
            Event::Commit { run } => match self.row {
                Some(InStep::Prepared) if self.wish == Wish::None => self.wish = Wish::Commit { run },
                // It never came so far here, and must not come so far any more.
                None => self.wish = Wish::LetGo,
                _ => {}
            },
            Event::Abandon | Event::GiveUp => {
                if !matches!(self.row, Some(InStep::Committed { .. } | InStep::Abandoned)) && self.wish != Wish::Fence {
                    self.wish = Wish::LetGo;
                }
            }
            Event::Fence => self.wish = Wish::Fence,
            Event::Told(qemu) => {
                self.qemu = qemu;
                if self.tried == Tried::UnderWay {
                    self.tried = Tried::Yes;
                }
            }
            Event::Tries => {
                if self.tried != Tried::Yes {
                    self.tried = Tried::UnderWay;
                }
            }
            Event::Refused => {
                if self.tried == Tried::UnderWay {
                    self.tried = Tried::Refused;
                }
            }
            Event::Wrote(row) => {
                self.row = Some(row);
                match (row, self.wish) {
                    (InStep::Committed { .. }, Wish::Fence) | (InStep::Prepared, Wish::LetGo | Wish::Fence) => {}
                    _ => self.wish = Wish::None,
                }
            }
            // It can be asked again, or asked something else: nothing is decided.
            Event::NotWritten(InStep::Committed { .. }) if self.row == Some(InStep::Prepared) => self.wish = Wish::None,
            Event::NotWritten(InStep::Prepared) if self.wish == Wish::Prepare => self.wish = Wish::None,
            Event::NotWritten(_) => {}
        }
    }

    /// What is to be done now, in this order.
    pub fn due(self) -> Vec<Deed> {
        let lets_go = matches!(self.wish, Wish::LetGo | Wish::Fence);
        match self.row {
            Some(InStep::Abandoned) if matches!(self.qemu, Qemu::Ended | Qemu::None) => vec![],
            Some(InStep::Abandoned) => vec![Deed::End],
            _ if lets_go => vec![Deed::Write(InStep::Abandoned)],
            None if self.wish == Wish::Prepare => vec![Deed::Write(InStep::Prepared)],
            Some(InStep::Prepared) => self.prepared(),
            Some(InStep::Committed { must_run: true }) => match self.qemu {
                Qemu::Runs => vec![Deed::Write(InStep::Committed { must_run: false })],
                // It may have run here, but never will again: nobody is told that it does.
                Qemu::Ended if self.may_have_run() => vec![],
                // It never ran here: its source has it still.
                Qemu::Ended => vec![Deed::Write(InStep::Abandoned)],
                _ if self.tried == Tried::Refused => vec![Deed::Write(InStep::Abandoned)],
                _ => vec![Deed::Run],
            },
            None | Some(InStep::Committed { must_run: false }) => vec![],
        }
    }

    fn prepared(self) -> Vec<Deed> {
        match (self.qemu, self.wish) {
            (Qemu::None, _) => vec![Deed::Launch],
            (Qemu::Ended | Qemu::Failed, _) => vec![Deed::Write(InStep::Abandoned)],
            (Qemu::Runs, _) => vec![Deed::Pause],
            (Qemu::Loaded, Wish::Commit { run }) => vec![Deed::Write(InStep::Committed { must_run: run })],
            (_, Wish::Commit { .. }) => vec![Deed::Look],
            _ => vec![],
        }
    }
}

impl Default for Destination {
    fn default() -> Self {
        Self::new()
    }
}
