//! After the handshake: requests one way, replies the other.
//!
//! Nothing here reads or writes. Headers are made and understood; the data that belongs to them is the driver's to move,
//! so that it is copied no more often than it must be.

mod command;
mod incoming;
mod replies;

pub use command::{BadRequest, Command, Decoded, Refusal, Tag};
pub use incoming::{Answer, BadReply, Event, Failed, Replies};
pub use replies::{Extent, Replier};
