//! What a client hears: replies to the requests that it made, in any order and in as many chunks as the server likes.
//!
//! A server that is wrong, or hostile, must not make us take data for read that never came: each byte of a read comes
//! exactly once, an error makes the whole request fail, and whatever nobody asked for ends the connection.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::limits;
use crate::session::{Headers, Session};
use crate::transmission::{Command, Extent};
use crate::wire::{self, ErrorCode, Reader, chunk, state};

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done; of a read all data has arrived.
    Done,
    /// The status of the bytes from the request's offset on: one at least, and not always all of them.
    Status(Vec<Extent>),
}

/// The server could not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error}{}", after_colon(.text))]
pub struct Failed {
    /// Why.
    pub error: ErrorCode,
    /// What it says to people; may be empty.
    pub text: String,
}

fn after_colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {}", text.escape_debug()) }
}

/// What comes next of what the server says.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// More must arrive first.
    Incomplete,
    /// A part of an answer that is told when it is whole.
    Heard,
    /// So many bytes of data follow, which belong so far into the read. Whoever drives this takes them before it asks
    /// again.
    Data {
        /// Of which request.
        cookie: u64,
        /// How far into it.
        at: usize,
        /// How many.
        length: usize,
    },
    /// So many bytes of the read are zeroes.
    Zeroes {
        /// Of which request.
        cookie: u64,
        /// How far into it.
        at: usize,
        /// How many.
        length: usize,
    },
    /// Nothing more comes of a request.
    Finished {
        /// Which.
        cookie: u64,
        /// What came of it.
        answer: Result<Answer, Failed>,
    },
}

/// After this nothing that the server says can be understood, or believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadReply {
    /// There is no reply where one should begin.
    #[error("there is no reply where one should begin ({0:#010x})")]
    Magic(u32),
    /// It answers what was not asked.
    #[error("the server answers a request that was not made")]
    Unasked,
    /// It answers with something else.
    #[error("the server answers {0}")]
    Unfit(&'static str),
    /// It says that a read is done of which not everything came.
    #[error("the server says that a read is done, but sent {sent} of its {asked} bytes")]
    Missing {
        /// How many came.
        sent: u64,
        /// How many were asked for.
        asked: u64,
    },
}

/// In how many parts that do not join a read may come.
const MOST_PARTS: usize = 4096;

/// A request that is under way.
struct Asked {
    command: Command,
    /// What of a read came, from where to where.
    came: Vec<(u64, u64)>,
    status: Option<Vec<Extent>>,
    failed: Option<Failed>,
}

/// The client's side.
pub struct Replies {
    headers: Headers,
    allocation: Option<u32>,
    size: u64,
    asked: HashMap<u64, Asked>,
    next: u64,
    /// It is finished when its data has been taken.
    after_data: Option<u64>,
}

impl Session {
    /// What follows the requests of this session.
    pub fn replies(&self) -> Replies {
        Replies {
            headers: self.headers,
            allocation: self.allocation,
            size: self.export.size,
            asked: HashMap::new(),
            next: 1,
            after_data: None,
        }
    }
}

impl Replies {
    /// Appends the header of a request, and says by what its answer is known.
    pub fn ask(&mut self, command: Command, out: &mut Vec<u8>) -> u64 {
        let cookie = self.next;
        self.next += 1;
        command.encode(cookie, self.headers, out);
        self.asked.insert(cookie, Asked { command, came: Vec::new(), status: None, failed: None });
        cookie
    }

    /// Understands what is at the beginning of `input`, and takes it from there.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Event, BadReply> {
        if let Some(cookie) = self.after_data.take() {
            return self.finish(cookie);
        }
        let mut reader = Reader(input);
        let Some(magic) = reader.u32() else { return Ok(Event::Incomplete) };
        let event = match (magic, self.headers) {
            (wire::SIMPLE_REPLY, Headers::Simple | Headers::Structured) => self.simple(&mut reader)?,
            (wire::CHUNK, Headers::Structured) | (wire::EXTENDED_CHUNK, Headers::Extended) => {
                self.chunk(&mut reader)?
            }
            (magic, _) => return Err(BadReply::Magic(magic)),
        };
        let Some(event) = event else { return Ok(Event::Incomplete) };
        *input = reader.0;
        Ok(event)
    }

    fn simple(&mut self, reader: &mut Reader<'_>) -> Result<Option<Event>, BadReply> {
        let (Some(error), Some(cookie)) = (reader.u32(), reader.u64()) else { return Ok(None) };
        let asked = self.asked.get_mut(&cookie).ok_or(BadReply::Unasked)?;
        asked.failed = ErrorCode::from_wire(error).map(|error| Failed { error, text: String::new() });
        match asked.command {
            Command::Read { .. } if self.headers != Headers::Simple => {
                return Err(BadReply::Unfit("a read with a simple reply"));
            }
            Command::Read { length: length @ 1.., .. } if asked.failed.is_none() => {
                asked.came.push((0, length.into()));
                self.after_data = Some(cookie);
                return Ok(Some(Event::Data { cookie, at: 0, length: length as usize }));
            }
            _ => {}
        }
        self.finish(cookie).map(Some)
    }

    fn chunk(&mut self, reader: &mut Reader<'_>) -> Result<Option<Event>, BadReply> {
        let header = (|| {
            let (flags, kind, cookie) = (reader.u16()?, reader.u16()?, reader.u64()?);
            let extended = self.headers == Headers::Extended;
            let offset = if extended { Some(reader.u64()?) } else { None };
            let length = if extended { reader.u64()? } else { reader.u32()?.into() };
            Some((flags & chunk::DONE != 0, kind, cookie, offset, length))
        })();
        let Some((last, kind, cookie, offset, length)) = header else { return Ok(None) };
        let asked = self.asked.get_mut(&cookie).ok_or(BadReply::Unasked)?;
        if offset.is_some_and(|offset| offset != asked.command.range().0) {
            return Err(BadReply::Unfit("with another offset than was asked for"));
        }
        let most = match kind {
            chunk::DATA => 8 + u64::from(limits::PAYLOAD),
            chunk::STATUS | chunk::EXTENDED_STATUS => 8 + 16 * limits::DESCRIPTORS_TAKEN as u64,
            _ => 14 + limits::NAME as u64,
        };
        if length > most {
            return Err(BadReply::Unfit("with a chunk of impossible length"));
        }
        if kind == chunk::DATA {
            let Some(offset) = reader.u64() else { return Ok(None) };
            let length = length.checked_sub(8).ok_or(BadReply::Unfit("with a chunk that is too short"))?;
            let at = asked.take(offset, length)?;
            self.after_data = last.then_some(cookie);
            return Ok(Some(Event::Data { cookie, at, length: length as usize }));
        }
        let Some(payload) = reader.bytes(length as usize) else { return Ok(None) };
        let mut payload = Reader(payload);
        let mut event = None;
        match kind {
            chunk::NONE if length == 0 && last => {}
            chunk::NONE => return Err(BadReply::Unfit("with an end that is none")),
            chunk::HOLE => {
                let (Some(offset), Some(length), []) = (payload.u64(), payload.u32(), payload.0) else {
                    return Err(BadReply::Unfit("with a hole that is none"));
                };
                let at = asked.take(offset, length.into())?;
                event = Some(Event::Zeroes { cookie, at, length: length as usize });
            }
            chunk::STATUS | chunk::EXTENDED_STATUS => {
                if (kind == chunk::EXTENDED_STATUS) != (self.headers == Headers::Extended) {
                    return Err(BadReply::Unfit("with a status of the other kind"));
                }
                asked.take_status(kind, payload, self.allocation, self.size)?;
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let (error, text) = (payload.u32(), payload.u16());
                let (Some(error), Some(text)) = (error, text.and_then(|length| payload.bytes(length.into()))) else {
                    return Err(BadReply::Unfit("with an error that is none"));
                };
                // An error of no number is one all the same.
                let error = ErrorCode::from_wire(error).unwrap_or(ErrorCode::Invalid);
                let text = String::from_utf8_lossy(text).into_owned();
                asked.failed.get_or_insert(Failed { error, text });
            }
            _ => return Err(BadReply::Unfit("with a chunk of an unknown kind")),
        }
        Ok(Some(match event {
            Some(event) => {
                self.after_data = last.then_some(cookie);
                event
            }
            None if last => self.finish(cookie)?,
            None => Event::Heard,
        }))
    }

    fn finish(&mut self, cookie: u64) -> Result<Event, BadReply> {
        let asked = self.asked.remove(&cookie).ok_or(BadReply::Unasked)?;
        Ok(Event::Finished { cookie, answer: asked.end()? })
    }
}

impl Asked {
    /// Takes note of so many bytes of a read, and says how far into it they belong.
    fn take(&mut self, offset: u64, length: u64) -> Result<usize, BadReply> {
        let Command::Read { offset: begin, length: asked } = self.command else {
            return Err(BadReply::Unfit("with data where none was asked for"));
        };
        let fits = (|| {
            let at = offset.checked_sub(begin)?;
            let end = at.checked_add(length)?;
            (length > 0 && end <= asked.into()).then_some((at, end))
        })();
        let (at, end) = fits.ok_or(BadReply::Unfit("with data from elsewhere"))?;
        if self.came.iter().any(|came| at < came.1 && came.0 < end) {
            return Err(BadReply::Unfit("with the same data twice"));
        }
        // Parts come in order nearly always, and are then kept as one.
        let parts = self.came.len();
        match self.came.last_mut() {
            Some(last) if last.1 == at => last.1 = end,
            _ if parts == MOST_PARTS => return Err(BadReply::Unfit("in too many parts")),
            _ => self.came.push((at, end)),
        }
        Ok(at as usize)
    }

    fn take_status(
        &mut self,
        kind: u16,
        mut payload: Reader<'_>,
        allocation: Option<u32>,
        size: u64,
    ) -> Result<(), BadReply> {
        const UNFIT: BadReply = BadReply::Unfit("with a status that is none");
        let Command::BlockStatus { offset, .. } = self.command else {
            return Err(BadReply::Unfit("with a status that was not asked for"));
        };
        let context = payload.u32().ok_or(UNFIT)?;
        if Some(context) != allocation || self.status.is_some() {
            return Err(BadReply::Unfit("with a status of something else"));
        }
        let (mut extents, mut left) = (Vec::new(), size.saturating_sub(offset));
        let extended = kind == chunk::EXTENDED_STATUS;
        let count = if extended { Some(payload.u32().ok_or(UNFIT)?) } else { None };
        while !payload.0.is_empty() {
            let (length, flags) = match extended {
                true => (payload.u64(), payload.u64()),
                false => (payload.u32().map(u64::from), payload.u32().map(u64::from)),
            };
            let (Some(length @ 1..), Some(flags)) = (length, flags) else { return Err(UNFIT) };
            let has = |bit: u32| flags & u64::from(bit) != 0;
            // The last one may go on further than there is anything, and what we want to know of it then is up to there.
            if left > 0 {
                let length = length.min(left);
                extents.push(Extent { length, hole: has(state::HOLE), zero: has(state::ZERO) });
                left -= length;
            }
        }
        if extents.is_empty() || count.is_some_and(|count| count as usize != extents.len() && left > 0) {
            return Err(UNFIT);
        }
        self.status = Some(extents);
        Ok(())
    }

    fn end(self) -> Result<Result<Answer, Failed>, BadReply> {
        if let Some(failed) = self.failed {
            return Ok(Err(failed));
        }
        match self.command {
            Command::Read { length, .. } => {
                let (sent, asked) = (self.came.iter().map(|(from, to)| to - from).sum(), length.into());
                if sent == asked { Ok(Ok(Answer::Done)) } else { Err(BadReply::Missing { sent, asked }) }
            }
            Command::BlockStatus { .. } => match self.status {
                Some(status) => Ok(Ok(Answer::Status(status))),
                None => Err(BadReply::Unfit("a question for a status with none")),
            },
            _ => Ok(Ok(Answer::Done)),
        }
    }
}
