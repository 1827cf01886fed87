//! Events, as a daemon sends them to those who have registered for them.

use crate::domain::Domain;
use crate::frame::{Frame, Kind, REMOTE};
use crate::param::Params;
use crate::xdr::{Decoder, Malformed};

/// Numbers of the kinds of events that are registered for.
pub const KINDS: [i32; 3] = [0, 20, 21];

const LIFECYCLE: u32 = 318;
const ITERATION: u32 = 359;
const JOB_COMPLETED: u32 = 363;

/// What happened to a domain.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Its life took a turn.
    Lifecycle {
        /// Which.
        domain: Domain,
        /// What.
        turn: Turn,
        /// More about it, in libvirt's number.
        detail: i32,
    },
    /// A round of its migration began.
    Iteration {
        /// Which.
        domain: Domain,
        /// From 1.
        round: u32,
    },
    /// Its job is over.
    JobCompleted {
        /// Which.
        domain: Domain,
        /// What came of it.
        stats: Params,
    },
}

/// A turn in a domain's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It was defined, or defined anew.
    Defined,
    /// It is not any more.
    Undefined,
    /// It has a process.
    Started,
    /// It does not run any more.
    Suspended,
    /// It runs again.
    Resumed,
    /// Its process is gone.
    Stopped,
    /// Anything else.
    Other(u32),
}

impl Event {
    /// Whose it is.
    pub fn domain(&self) -> &Domain {
        match self {
            Self::Lifecycle { domain, .. } | Self::Iteration { domain, .. } | Self::JobCompleted { domain, .. } => {
                domain
            }
        }
    }

    /// It was suspended as its migration comes to an end.
    pub fn hands_over(&self) -> bool {
        matches!(self, Self::Lifecycle { turn: Turn::Suspended, detail: 1 | 7, .. })
    }

    /// What a frame tells; none when it is no event, or one of another kind.
    pub fn of(frame: &Frame) -> Result<Option<Self>, Malformed> {
        if frame.program != REMOTE || frame.kind != Kind::Message {
            return Ok(None);
        }
        let mut from = Decoder::new(&frame.payload);
        Ok(match frame.procedure {
            LIFECYCLE => {
                let _registration = from.i32()?;
                let domain = Domain::decode(&mut from)?;
                let turn = match from.u32()? {
                    0 => Turn::Defined,
                    1 => Turn::Undefined,
                    2 => Turn::Started,
                    3 => Turn::Suspended,
                    4 => Turn::Resumed,
                    5 => Turn::Stopped,
                    other => Turn::Other(other),
                };
                Some(Self::Lifecycle { domain, turn, detail: from.i32()? })
            }
            ITERATION => {
                let _registration = from.i32()?;
                Some(Self::Iteration { domain: Domain::decode(&mut from)?, round: from.u32()? })
            }
            JOB_COMPLETED => {
                let _registration = from.i32()?;
                Some(Self::JobCompleted { domain: Domain::decode(&mut from)?, stats: Params::decode(&mut from)? })
            }
            _ => None,
        })
    }
}
