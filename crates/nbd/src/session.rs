//! What both sides know of each other when the handshake is over.

use crate::limits;
use crate::wire::export;

/// How requests and replies are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Headers {
    /// A reply is a status, and the data after it; nothing can be said about holes.
    Simple,
    /// A reply comes in chunks, each of which says what it is.
    Structured,
    /// The same with lengths of 64 bits.
    Extended,
}

/// What can be done with an export.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Abilities(pub(crate) u16);

impl Abilities {
    /// All that is implemented here, or what of it reads only.
    pub(crate) fn of_ours(read_only: bool) -> Self {
        let reading = export::HAS_FLAGS | export::MULTI_CONN | export::CACHE | export::FLUSH | export::FUA;
        let writing = export::TRIM | export::WRITE_ZEROES | export::FAST_ZERO;
        Self(reading | if read_only { export::READ_ONLY } else { writing })
    }

    fn has(self, flag: u16) -> bool {
        self.0 & flag != 0
    }

    /// Nothing can be written to it.
    pub fn read_only(self) -> bool {
        self.has(export::READ_ONLY)
    }

    /// It can be told to put on the disk all that was written.
    pub fn flush(self) -> bool {
        self.has(export::FLUSH)
    }

    /// A write can wait until it is on the disk.
    pub fn fua(self) -> bool {
        self.has(export::FUA)
    }

    /// It can be told what is not needed any more.
    pub fn trim(self) -> bool {
        self.has(export::TRIM)
    }

    /// It can be told to make zeroes.
    pub fn write_zeroes(self) -> bool {
        self.has(export::WRITE_ZEROES)
    }

    /// And to say so when that would take as long as writing them.
    pub fn fast_zero(self) -> bool {
        self.has(export::FAST_ZERO)
    }

    /// What one connection has flushed is there for all of them.
    pub fn multi_conn(self) -> bool {
        self.has(export::MULTI_CONN)
    }

    /// It can be told what will be read soon.
    pub fn cache(self) -> bool {
        self.has(export::CACHE)
    }

    /// With the flag that belongs to chunks.
    pub(crate) fn over(self, headers: Headers) -> Self {
        if headers == Headers::Simple { self } else { Self(self.0 | export::WHOLE_READS) }
    }
}

impl std::fmt::Debug for Abilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = [
            (self.read_only(), "read-only"),
            (self.flush(), "flush"),
            (self.fua(), "fua"),
            (self.trim(), "trim"),
            (self.write_zeroes(), "write-zeroes"),
            (self.fast_zero(), "fast-zero"),
            (self.multi_conn(), "multi-conn"),
            (self.cache(), "cache"),
        ];
        f.debug_set().entries(named.into_iter().filter(|it| it.0).map(|it| it.1)).finish()
    }
}

/// In which sizes an export is read and written, in bytes. All are powers of two but the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this.
    pub minimum: u32,
    /// And should be of this.
    pub preferred: u32,
    /// No request carries more data.
    pub maximum: u32,
}

impl BlockSizes {
    /// What the protocol takes for granted where nothing is said.
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, maximum: limits::PAYLOAD };

    /// With this minimum; `None` when that is no power of two, or more than 64 KiB.
    pub fn with_minimum(minimum: u32) -> Option<Self> {
        let usual = Self::DEFAULT;
        let it = Self { minimum, preferred: minimum.max(usual.preferred), ..usual };
        it.is_sensible().then_some(it)
    }

    /// As the protocol demands.
    pub(crate) fn is_sensible(self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 64 << 10
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum.max(512)
            && self.maximum >= self.preferred
    }
}

/// An export, as a server tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// What it is asked for by; the empty name is the default's.
    pub name: String,
    /// For people.
    pub description: String,
    /// In bytes.
    pub size: u64,
    /// What can be done with it.
    pub abilities: Abilities,
    /// In which sizes.
    pub blocks: BlockSizes,
}

/// What was agreed upon for one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// How requests and replies are framed.
    pub headers: Headers,
    /// The number under which `base:allocation` is told, if it was asked for.
    pub allocation: Option<u32>,
    /// Of what.
    pub export: Export,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimum_that_the_protocol_forbids_is_refused() {
        assert_eq!(BlockSizes::with_minimum(4096).unwrap().preferred, 4096);
        assert_eq!(BlockSizes::with_minimum(65536).unwrap().preferred, 65536);
        for bad in [0, 3, 513, 131_072] {
            assert_eq!(BlockSizes::with_minimum(bad), None, "{bad}");
        }
    }
}
