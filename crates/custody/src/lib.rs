//! Who owns a guest while it is migrated: the protocol between two agents as a state machine, in two halves, without
//! I/O and without a clock.
//!
//! A half is driven from outside. [`Source::apply`] and [`Destination::apply`] take in what happened: what the user asks,
//! what the other agent says, what QEMU tells, what was or could not be written, that time has passed. `due` tells what
//! is to be done now, as a function of the state alone. So it is level-triggered: what did not come off stays due, and
//! is due again after the next event or tick, whatever was lost, doubled or late. Whoever drives it does all that is due,
//! in order, and takes in how it came out. **Recovery is the same machine, made from what the journal holds.**
//!
//! # The agreement
//!
//! The destination's journal decides. Until it says [`InStep::Committed`] the source owns the guest; that it is
//! [`InStep::Abandoned`] is final, and whoever asks again hears the same. So a source that asked for the commit, and does
//! not know what came of it, owns nothing and gives up nothing: it asks until it knows.
//!
//! A guest that is committed may still be given back, while it is known that it has executed nothing there: its QEMU ended
//! and nobody had tried to set it running, or it refused to ([`Start::Due`]). The destination abandons it then. So the
//! source ends what it has only when it has heard that running was tried.
//!
//! A row is written before what it allows is done, and a row that could not be written allows nothing. What the journal
//! of the source says is never ahead of what is so, and where it lags behind, recovery from it comes to the same end.
//!
//! # Allowed combinations
//!
//! | source: phase | source's open row | destination's row | who owns it | QEMU here | QEMU there |
//! | --- | --- | --- | --- | --- | --- |
//! | `Owned` | none | none, abandoned | here | as its user wants | none, or ended |
//! | `Moving` | none (until written), copy-ram | none, prepared, abandoned | here | as its user wants, copied | waits |
//! | `Sealed` | copy-ram | prepared, abandoned | here | stands | has what it needs |
//! | `InDoubt` | commit | prepared, committed, abandoned | whoever the destination's row says | stands | waits, or runs if committed |
//! | `Undoing` | copy-ram | none, prepared, abandoned | here | as its user wants | waits, or ended |
//! | `Undoing` | commit, post-copy, stranded | abandoned | here | as its user wants | ended |
//! | `Undoing`, kept | kept-here | any | here, by its user's word | as its user wants | ended as soon as it hears of it |
//! | `Away`, start due | commit, post-copy | committed, abandoned | whoever the destination's row says | stands | is set running, or ended |
//! | `Away` | commit, post-copy, retire | committed | there | stands, then ended | as its user wants |
//! | `Stranded` | commit, post-copy, stranded | committed, or abandoned after QEMU here let go | there, or nobody | stands | as it can |
//! | `Over` | none | committed | there | ended | as its user wants |
//!
//! A source in doubt whose user says that the guest runs there gives the destination its time to say otherwise, or to take
//! it, before what is left here goes.
//!
//! A QEMU that moves the RAM itself *lets go* of the guest when post-copy begins ([`source::Qemu::LetGo`]): from then on
//! it cannot be undone, so that whatever was to undo it goes forward. A QEMU whose migration fails at its very end may
//! set its guest running by itself: wherever the table says that it stands, that it runs makes stopping it due.
//!
//! The first six `Flaw`s in the check (`tests/check/`) are sequences that an earlier version of this protocol allowed.

pub mod destination;
pub mod source;

pub use destination::{Destination, InStep};
pub use source::{OutEnd, OutStep, Source};

/// What a destination answers about one migration, whatever it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// Nothing is decided yet: the source owns the guest.
    Prepared,
    /// The destination owns the guest.
    Committed(Start),
    /// The destination never will own it, or does not any more.
    Abandoned,
}

/// How far a guest that the destination owns is with running there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Start {
    /// It has executed nothing there, and is given back if it never can.
    Due,
    /// It was tried to set it running: it may have executed something. From now on it is never given back.
    Tried,
    /// It is as it is to be there: set running, or paused because it was paused.
    Done,
}
