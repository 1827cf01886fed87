//! What an earlier version of the protocol did wrong, each put back where it was, and what whoever drives this one could
//! do wrong: to show that the check finds it.

/// See each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// A migration that was undone left its VM free although its end could not be written, and the next one began beside
    /// the row that was still open.
    FreeBeforeItIsWritten,
    /// A row that could not be written after the commit ended the migration's driver: nobody served post-copy any more.
    GivesUpAfterTheCommit,
    /// A guest in doubt had no way out when its destination was gone.
    NoWayOut,
    /// That a guest which was handed over must not run was seen to on one event only, not when an agent had been dead
    /// while that came.
    ActsOnTheEventOnly,
    /// An agent that was started again set a guest running that it owns once, and not again when that failed.
    TriesToRunOnce,
    /// The user was told that the guest runs there when it had only been committed.
    SaysSoUnasked,
    /// The source ended what it had as soon as it heard of the commit, so that nothing could be given back to it.
    TakesTheCommitForRunning,
    /// The destination's driver does not tell that it is about to set the guest running: what had run was given back.
    ForgetsThatItTried,
    /// The destination answers while QEMU is being told to set the guest running: that it was tried, and then QEMU refuses.
    AnswersWhileItTries,
}

pub(crate) const FLAWS: [Flaw; 9] = [
    Flaw::FreeBeforeItIsWritten,
    Flaw::GivesUpAfterTheCommit,
    Flaw::NoWayOut,
    Flaw::ActsOnTheEventOnly,
    Flaw::TriesToRunOnce,
    Flaw::SaysSoUnasked,
    Flaw::TakesTheCommitForRunning,
    Flaw::ForgetsThatItTried,
    Flaw::AnswersWhileItTries,
];
