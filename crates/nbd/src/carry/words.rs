//! What is asked of a disk at the other end, and what is answered.

use std::io;

use crate::backend::Zeroing;
use crate::blocks::{BLOCK, GRAIN, GRAINS, Grains, gathered, which};
use crate::known::Offered;
use crate::wire::ErrorCode;

/// Something is to be done to a disk; a bulk frame.
pub(super) const DO: u16 = 1;
/// It was done, or was not; an urgent frame.
pub(super) const DONE: u16 = 2;
/// Disk, number, what, flags, offset, length; big-endian. The data of a write follow.
pub(super) const HEAD: usize = 2 + 8 + 1 + 1 + 8 + 8;
/// The longest reason that is told why something was not done, in bytes.
const MOST_WORDS: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Write,
    Zero(Zeroing),
    Trim,
    Flush,
    /// Flush, and let go of the disk.
    LetGo,
    /// What will be written is offered; what is there of it is written.
    Offer,
    /// What is not.
    Rest,
}

/// What comes with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body<'a> {
    /// What is to be written; nothing for what writes nothing.
    Data(&'a [u8]),
    Offer(Offered),
    /// Of these grains, what is in them.
    Rest(Grains, &'a [u8]),
}

impl What {
    fn to_wire(self) -> [u8; 2] {
        match self {
            Self::Write => [0, 0],
            Self::Zero(how) => [1, u8::from(how.may_punch) | u8::from(how.fast) << 1],
            Self::Trim => [2, 0],
            Self::Flush => [3, 0],
            Self::LetGo => [4, 0],
            Self::Offer => [5, 0],
            Self::Rest => [6, 0],
        }
    }

    fn from_wire(bytes: [u8; 2]) -> Option<Self> {
        Some(match bytes {
            [0, 0] => Self::Write,
            [1, flags @ 0..4] => Self::Zero(Zeroing { may_punch: flags & 1 != 0, fast: flags & 2 != 0 }),
            [2, 0] => Self::Trim,
            [3, 0] => Self::Flush,
            [4, 0] => Self::LetGo,
            [5, 0] => Self::Offer,
            [6, 0] => Self::Rest,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) disk: u16,
    pub(super) number: u64,
    pub(super) what: What,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Request {
    pub(super) fn encode(&self, data: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(HEAD + data.len());
        frame.extend(self.disk.to_be_bytes());
        frame.extend(self.number.to_be_bytes());
        frame.extend(self.what.to_wire());
        frame.extend(self.offset.to_be_bytes());
        frame.extend(self.length.to_be_bytes());
        frame.extend(data);
        frame
    }

    /// With what comes with it; `None` when this is none of ours.
    pub(super) fn decode(frame: &[u8]) -> Option<(Self, Body<'_>)> {
        let (head, data) = frame.split_first_chunk::<HEAD>()?;
        let number = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let request = Self {
            disk: u16::from_be_bytes([head[0], head[1]]),
            number: number(2),
            what: What::from_wire([head[10], head[11]])?,
            offset: number(12),
            length: number(20),
        };
        let length = usize::try_from(request.length).ok();
        let body = match request.what {
            What::Offer => Body::Offer(Offered::read(data, length?)?),
            What::Rest => {
                let (grains, packed) = data.split_first_chunk::<GRAINS>()?;
                let length = length.filter(|it| *it as u64 <= BLOCK)?;
                let fits = which(grains).all(|number| number * GRAIN < length);
                Body::Rest(*grains, Some(packed).filter(|it| fits && it.len() == gathered(grains, length))?)
            }
            What::Write => Body::Data(Some(data).filter(|it| Some(it.len()) == length)?),
            _ => Body::Data(Some(data).filter(|it| it.is_empty())?),
        };
        Some((request, body))
    }
}

pub(crate) fn encode_done<T>(number: u64, result: &io::Result<T>) -> Vec<u8> {
    let mut frame = number.to_be_bytes().to_vec();
    match result {
        Ok(_) => frame.extend(0_u32.to_be_bytes()),
        Err(error) => {
            frame.extend((ErrorCode::of(error) as u32).to_be_bytes());
            let words = error.to_string();
            frame.extend(&words.as_bytes()[..words.len().min(MOST_WORDS)]);
        }
    }
    frame
}

pub(crate) fn decode_done(frame: &[u8]) -> Option<(u64, Result<(), Refused>)> {
    let (number, rest) = frame.split_first_chunk::<8>()?;
    let (code, words) = rest.split_first_chunk::<4>()?;
    let result = match ErrorCode::from_wire(u32::from_be_bytes(*code)) {
        None => Ok(()),
        Some(code) => {
            let words = String::from_utf8_lossy(&words[..words.len().min(MOST_WORDS)]);
            Err(Refused { code, words: words.chars().map(|c| if c.is_control() { ' ' } else { c }).collect() })
        }
    };
    Some((u64::from_be_bytes(*number), result))
}

/// What is lacking of what was offered follows an answer that all is well; of what was not offered nothing is.
pub(super) fn encode_answer(number: u64, result: &io::Result<Grains>) -> Vec<u8> {
    let mut frame = encode_done(number, result);
    frame.extend(result.iter().flatten());
    frame
}

pub(super) fn decode_answer(frame: &[u8]) -> Option<(u64, Result<Grains, Refused>)> {
    let (number, result) = decode_done(frame)?;
    let result = match result {
        Ok(()) => Ok(frame[8 + 4..].try_into().ok()?),
        Err(refused) => Err(refused),
    };
    Some((number, result))
}

/// What the other end says of something that it could not do.
#[derive(Debug, thiserror::Error)]
#[error("at the other end: {words}")]
pub(crate) struct Refused {
    code: ErrorCode,
    pub(super) words: String,
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        let kind = match refused.code {
            ErrorCode::NoSpace => io::ErrorKind::StorageFull,
            ErrorCode::NotPermitted => io::ErrorKind::PermissionDenied,
            ErrorCode::NotSupported => io::ErrorKind::Unsupported,
            ErrorCode::Invalid => io::ErrorKind::InvalidInput,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, refused)
    }
}
