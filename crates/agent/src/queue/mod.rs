//! The migrations that wait for their turn, and those that have begun.
//!
//! A migration that is asked for while no other is under way begins at once. Otherwise it is planned, so that what can be
//! refused is refused while its user looks, and waits until the link to its destination is free
//! (`vmferry_policy::queue` decides); then it is planned again and begins. Those that are asked for together are sorted,
//! quiet guests first; what is asked for later comes later.
//!
//! What waits is in the journal: an agent that is started again goes on with it, and says of those that cannot begin any
//! more why.

mod asking;
mod drive;
mod entry;
mod line;

pub(crate) use asking::Queue;
