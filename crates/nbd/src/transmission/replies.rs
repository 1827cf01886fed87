//! What a server answers, as it is on the wire.

use crate::limits;
use crate::session::{Headers, Session};
use crate::transmission::Tag;
use crate::wire::{self, ErrorCode, chunk, state};

/// Consecutive bytes of which the same is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How many; never none.
    pub length: u64,
    /// Nothing is allocated for them.
    pub hole: bool,
    /// They read as zeroes.
    pub zero: bool,
}

impl Extent {
    /// Bytes of which nothing is known.
    pub fn data(length: u64) -> Self {
        Self { length, hole: false, zero: false }
    }

    /// Zeroes for which nothing is allocated.
    pub fn hole(length: u64) -> Self {
        Self { length, hole: true, zero: true }
    }

    fn state(self) -> u32 {
        (if self.hole { state::HOLE } else { 0 }) | (if self.zero { state::ZERO } else { 0 })
    }
}

/// What does not fit into 32 bits is not told, and the client asks again. Blocks stay whole.
const LONGEST: u64 = 1 << 31;

/// Makes the replies of a session.
#[derive(Clone, Copy, Debug)]
pub struct Replier {
    headers: Headers,
    allocation: Option<u32>,
}

impl Session {
    /// What makes its replies.
    pub fn replier(&self) -> Replier {
        Replier { headers: self.headers, allocation: self.allocation }
    }
}

impl Replier {
    /// Appends that it is done and nothing more is to be said.
    pub fn done(self, tag: Tag, out: &mut Vec<u8>) {
        match self.headers {
            Headers::Extended => self.chunk(chunk::NONE, tag, 0, out),
            // Shorter than a chunk, and allowed for all but reads.
            Headers::Simple | Headers::Structured => simple(0, tag, out),
        }
    }

    /// Appends that it failed, and why.
    pub fn failed(self, tag: Tag, error: ErrorCode, text: &str, out: &mut Vec<u8>) {
        if self.headers == Headers::Simple {
            return simple(error as u32, tag, out);
        }
        let text = &text.as_bytes()[..text.len().min(limits::NAME)];
        self.chunk(chunk::ERROR, tag, 6 + text.len(), out);
        out.extend((error as u32).to_be_bytes());
        out.extend((text.len() as u16).to_be_bytes());
        out.extend(text);
    }

    /// How many bytes precede the data of a read.
    pub fn data_header(self) -> usize {
        match self.headers {
            Headers::Simple => 16,
            Headers::Structured => 20 + 8,
            Headers::Extended => 32 + 8,
        }
    }

    /// Appends what precedes the data of a whole read, which is to follow.
    pub fn data(self, tag: Tag, length: u32, out: &mut Vec<u8>) {
        match self.headers {
            Headers::Simple => simple(0, tag, out),
            // There are no chunks of no data.
            Headers::Structured | Headers::Extended if length == 0 => self.chunk(chunk::NONE, tag, 0, out),
            Headers::Structured | Headers::Extended => {
                self.chunk(chunk::DATA, tag, 8 + length as usize, out);
                out.extend(tag.offset.to_be_bytes());
            }
        }
    }

    /// Appends the status of the bytes from the request's offset on: one extent at least, and as many as may be told at once.
    pub fn status(self, tag: Tag, extents: &[Extent], out: &mut Vec<u8>) {
        let context = self.allocation.expect("a request for a status is refused without a context");
        let extents = &extents[..extents.len().min(limits::DESCRIPTORS)];
        if self.headers == Headers::Extended {
            self.chunk(chunk::EXTENDED_STATUS, tag, 8 + 16 * extents.len(), out);
            out.extend(context.to_be_bytes());
            out.extend((extents.len() as u32).to_be_bytes());
            for extent in extents {
                out.extend(extent.length.to_be_bytes());
                out.extend(u64::from(extent.state()).to_be_bytes());
            }
            return;
        }
        let told = extents.iter().position(|it| it.length > LONGEST).map_or(extents.len(), |cut| cut + 1);
        self.chunk(chunk::STATUS, tag, 4 + 8 * told, out);
        out.extend(context.to_be_bytes());
        for extent in &extents[..told] {
            out.extend((extent.length.min(LONGEST) as u32).to_be_bytes());
            out.extend(extent.state().to_be_bytes());
        }
    }

    /// A chunk that is the last one, as ours all are.
    fn chunk(self, kind: u16, tag: Tag, length: usize, out: &mut Vec<u8>) {
        let extended = self.headers == Headers::Extended;
        out.extend(if extended { wire::EXTENDED_CHUNK } else { wire::CHUNK }.to_be_bytes());
        out.extend(chunk::DONE.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(tag.cookie.to_be_bytes());
        if extended {
            out.extend(tag.offset.to_be_bytes());
            out.extend((length as u64).to_be_bytes());
        } else {
            out.extend((length as u32).to_be_bytes());
        }
    }
}

fn simple(error: u32, tag: Tag, out: &mut Vec<u8>) {
    out.extend(wire::SIMPLE_REPLY.to_be_bytes());
    out.extend(error.to_be_bytes());
    out.extend(tag.cookie.to_be_bytes());
}
