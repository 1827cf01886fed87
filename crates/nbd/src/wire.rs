//! The numbers of the protocol, as its text (proto.md of the NBD project) gives them.

/// What a server says first.
pub(crate) const INIT: u64 = 0x4e42_444d_4147_4943;
/// What precedes each option, and the flags of a server that takes options.
pub(crate) const OPTION: u64 = 0x4948_4156_454f_5054;
/// What follows [`INIT`] when the server is of the old style, that knew no options.
pub(crate) const OLD_STYLE: u64 = 0x0000_4202_8186_1253;
/// What precedes each answer to an option.
pub(crate) const ANSWER: u64 = 0x0003_e889_0455_65a9;
/// What precedes a request; its header has 28 bytes.
pub(crate) const REQUEST: u32 = 0x2560_9513;
/// What precedes a request with an extended header, which has 32 bytes.
pub(crate) const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
/// What precedes a simple reply; its header has 16 bytes.
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
/// What precedes a chunk of a structured reply; its header has 20 bytes.
pub(crate) const CHUNK: u32 = 0x668e_33ef;
/// What precedes a chunk with an extended header, which has 32 bytes.
pub(crate) const EXTENDED_CHUNK: u32 = 0x6e8a_278c;

/// Flags of the greeting.
pub(crate) mod greeting {
    pub(crate) const FIXED: u16 = 1;
    pub(crate) const NO_ZEROES: u16 = 2;
}

/// Options.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Answers to options.
pub(crate) mod answer {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Set in all those that say no.
    pub(crate) const ERROR: u32 = 1 << 31;
    pub(crate) const UNSUPPORTED: u32 = ERROR + 1;
    pub(crate) const POLICY: u32 = ERROR + 2;
    pub(crate) const INVALID: u32 = ERROR + 3;
    pub(crate) const TLS_REQUIRED: u32 = ERROR + 5;
    pub(crate) const UNKNOWN: u32 = ERROR + 6;
    pub(crate) const TOO_BIG: u32 = ERROR + 9;
    pub(crate) const EXTENDED_REQUIRED: u32 = ERROR + 10;
}

/// What is told about an export.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What can be done with an export.
pub(crate) mod export {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const FUA: u16 = 1 << 3;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const WHOLE_READS: u16 = 1 << 7;
    pub(crate) const MULTI_CONN: u16 = 1 << 8;
    pub(crate) const CACHE: u16 = 1 << 10;
    pub(crate) const FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const WHOLE: u16 = 1 << 2;
    pub(crate) const ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD: u16 = 1 << 5;
}

/// Chunks of structured replies.
pub(crate) mod chunk {
    /// The flag of the last one.
    pub(crate) const DONE: u16 = 1;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const DATA: u16 = 1;
    pub(crate) const HOLE: u16 = 2;
    pub(crate) const STATUS: u16 = 5;
    pub(crate) const EXTENDED_STATUS: u16 = 6;
    /// Set in all those that say no.
    pub(crate) const ERROR_BIT: u16 = 1 << 15;
    pub(crate) const ERROR: u16 = ERROR_BIT + 1;
}

/// Bits of `base:allocation`.
pub(crate) mod state {
    pub(crate) const HOLE: u32 = 1;
    pub(crate) const ZERO: u32 = 2;
}

/// The only metadata context there is here.
pub(crate) const ALLOCATION: &str = "base:allocation";

/// How a request failed, in the protocol's few words for it. What a peer says beyond them counts as
/// [`Invalid`](ErrorCode::Invalid), as its text asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// It is not allowed; the export is read-only.
    NotPermitted = 1,
    /// The disk failed.
    Io = 5,
    /// There was no memory for it.
    NoMemory = 12,
    /// It makes no sense.
    Invalid = 22,
    /// There is no room for it.
    NoSpace = 28,
    /// It asks for too much at once.
    TooLarge = 75,
    /// It is not supported, or not fast.
    NotSupported = 95,
    /// The server is about to end.
    ShuttingDown = 108,
}

impl ErrorCode {
    const ALL: [Self; 8] = [
        Self::NotPermitted,
        Self::Io,
        Self::NoMemory,
        Self::Invalid,
        Self::NoSpace,
        Self::TooLarge,
        Self::NotSupported,
        Self::ShuttingDown,
    ];

    /// As it is on the wire; zero is none.
    pub(crate) fn from_wire(value: u32) -> Option<Self> {
        match value {
            0 => None,
            value => Some(Self::ALL.into_iter().find(|it| *it as u32 == value).unwrap_or(Self::Invalid)),
        }
    }

    /// What a client is told of this.
    pub fn of(error: &std::io::Error) -> Self {
        use rustix::io::Errno;
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::PERM | Errno::ACCESS | Errno::ROFS | Errno::TXTBSY) => Self::NotPermitted,
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Self::NoSpace,
            Some(Errno::NOMEM) => Self::NoMemory,
            Some(Errno::INVAL) => Self::Invalid,
            Some(Errno::OPNOTSUPP) => Self::NotSupported,
            Some(Errno::SHUTDOWN) => Self::ShuttingDown,
            _ => match error.kind() {
                std::io::ErrorKind::Unsupported => Self::NotSupported,
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => Self::NotPermitted,
                std::io::ErrorKind::StorageFull => Self::NoSpace,
                std::io::ErrorKind::InvalidInput => Self::Invalid,
                _ => Self::Io,
            },
        }
    }

    #[cfg(test)]
    /// The kernel's error of the same name.
    fn into_io(self) -> std::io::Error {
        use rustix::io::Errno;
        std::io::Error::from(match self {
            Self::NotPermitted => Errno::PERM,
            Self::Io => Errno::IO,
            Self::NoMemory => Errno::NOMEM,
            Self::Invalid => Errno::INVAL,
            Self::NoSpace => Errno::NOSPC,
            Self::TooLarge => Errno::OVERFLOW,
            Self::NotSupported => Errno::OPNOTSUPP,
            Self::ShuttingDown => Errno::SHUTDOWN,
        })
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotPermitted => "not permitted",
            Self::Io => "input/output error",
            Self::NoMemory => "out of memory",
            Self::Invalid => "invalid request",
            Self::NoSpace => "no space left",
            Self::TooLarge => "too large",
            Self::NotSupported => "not supported",
            Self::ShuttingDown => "the server is shutting down",
        })
    }
}

/// Takes numbers and bytes off the front of a message; `None` when it is too short.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, left) = self.0.split_at_checked(length)?;
        self.0 = left;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N).map(|bytes| bytes.try_into().expect("it has as many bytes as were asked for"))
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of 32 bits and as many bytes of text.
    pub(crate) fn text(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.bytes(length as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_read_as_it_is_written_and_an_unknown_one_is_invalid() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_wire(code as u32), Some(code));
            assert_eq!(ErrorCode::of(&code.into_io()), if code == ErrorCode::TooLarge { ErrorCode::Io } else { code });
        }
        assert_eq!(ErrorCode::from_wire(0), None);
        assert_eq!(ErrorCode::from_wire(4711), Some(ErrorCode::Invalid));
    }

    #[test]
    fn a_message_that_is_too_short_yields_nothing() {
        let mut reader = Reader(&[0, 0, 0, 9, 1, 2]);
        assert_eq!(reader.text(), None);
        assert_eq!(Reader(&[1]).u16(), None);
        assert_eq!(Reader(&[0, 0, 0, 2, 1, 2, 3]).text(), Some(&[1, 2][..]));
    }
}
