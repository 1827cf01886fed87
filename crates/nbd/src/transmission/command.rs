//! What a client asks for, as it is on the wire, and what of it makes no sense.

use crate::limits;
use crate::session::{Headers, Session};
use crate::wire::{self, ErrorCode, Reader, command, flag};

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// So many bytes.
    Read {
        /// From where.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// The bytes after the header are to be written.
    Write {
        /// Where.
        offset: u64,
        /// How many.
        length: u32,
        /// They are on the disk when it is answered.
        fua: bool,
    },
    /// All is on the disk, of whatever was answered before this.
    Flush,
    /// These bytes are not needed any more.
    Trim {
        /// Where.
        offset: u64,
        /// How many.
        length: u64,
        /// It is on the disk when it is answered.
        fua: bool,
    },
    /// These bytes will be needed soon.
    Cache {
        /// Where.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// These bytes become zeroes.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How many.
        length: u64,
        /// They are on the disk when it is answered.
        fua: bool,
        /// They may become a hole.
        may_punch: bool,
        /// Only if that is faster than writing them.
        fast: bool,
    },
    /// What of these bytes is a hole, and what is zero.
    BlockStatus {
        /// From where.
        offset: u64,
        /// How many.
        length: u64,
        /// One answer is enough.
        one: bool,
    },
    /// Nothing follows.
    Disconnect,
}

impl Command {
    /// Where, and how many bytes of the export.
    pub fn range(&self) -> (u64, u64) {
        match *self {
            Self::Read { offset, length } | Self::Write { offset, length, .. } => (offset, length.into()),
            Self::Trim { offset, length, .. }
            | Self::Cache { offset, length }
            | Self::WriteZeroes { offset, length, .. }
            | Self::BlockStatus { offset, length, .. } => (offset, length),
            Self::Flush | Self::Disconnect => (0, 0),
        }
    }

    /// How many bytes follow its header.
    pub fn payload(&self) -> u32 {
        if let Self::Write { length, .. } = *self { length } else { 0 }
    }

    /// How many bytes it fetches or brings.
    pub fn weight(&self) -> u32 {
        match *self {
            Self::Read { length, .. } | Self::Write { length, .. } => length,
            _ => 0,
        }
    }

    /// Appends its header. A length that the header cannot say is the caller's mistake.
    pub fn encode(&self, cookie: u64, headers: Headers, out: &mut Vec<u8>) {
        let set = |condition: bool, flag: u16| if condition { flag } else { 0 };
        let (kind, mut flags) = match *self {
            Self::Read { .. } => (command::READ, 0),
            Self::Write { fua, .. } => (command::WRITE, set(fua, flag::FUA)),
            Self::Flush => (command::FLUSH, 0),
            Self::Trim { fua, .. } => (command::TRIM, set(fua, flag::FUA)),
            Self::Cache { .. } => (command::CACHE, 0),
            Self::WriteZeroes { fua, may_punch, fast, .. } => (
                command::WRITE_ZEROES,
                set(fua, flag::FUA) | set(!may_punch, flag::NO_HOLE) | set(fast, flag::FAST_ZERO),
            ),
            Self::BlockStatus { one, .. } => (command::BLOCK_STATUS, set(one, flag::ONE)),
            Self::Disconnect => (command::DISCONNECT, 0),
        };
        let (offset, length) = self.range();
        if headers == Headers::Extended {
            flags |= set(kind == command::WRITE, flag::PAYLOAD);
            out.extend(wire::EXTENDED_REQUEST.to_be_bytes());
        } else {
            out.extend(wire::REQUEST.to_be_bytes());
        }
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        if headers == Headers::Extended {
            out.extend(length.to_be_bytes());
        } else {
            let length = u32::try_from(length).expect("what is longer is asked for in parts without extended headers");
            out.extend(length.to_be_bytes());
        }
    }
}

/// What a reply is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Chosen by the client.
    pub cookie: u64,
    /// The request's offset, which extended replies repeat.
    pub offset: u64,
}

/// What a header turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Not all of it is there yet.
    Incomplete,
    /// It is to be done; its [payload](Command::payload) follows.
    Request {
        /// What its reply is known by.
        tag: Tag,
        /// What is asked for.
        command: Command,
    },
    /// It is to be refused.
    Refused(Refusal),
}

/// What is refused, and the connection goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What its reply is known by.
    pub tag: Tag,
    /// How it is refused.
    pub error: ErrorCode,
    /// For people.
    pub text: &'static str,
    /// So many bytes follow the header, and belong to nothing.
    pub discard: u32,
}

/// After this nothing that the client says can be understood, or trusted not to be an attack.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadRequest {
    /// There is no request where one should begin.
    #[error("there is no request where one should begin ({0:#010x})")]
    Magic(u32),
    /// It brings more than anybody may.
    #[error("a request brings {0} bytes; the most is {max}", max = limits::PAYLOAD)]
    Payload(u64),
}

impl Session {
    /// How many bytes the header of a request has.
    pub fn request_header(&self) -> usize {
        if self.headers == Headers::Extended { 32 } else { 28 }
    }

    /// Understands the header at the beginning of these bytes.
    pub fn decode(&self, bytes: &[u8]) -> Result<Decoded, BadRequest> {
        let Some(header) = bytes.get(..self.request_header()) else { return Ok(Decoded::Incomplete) };
        Ok(self.decode_whole(Reader(header))?.expect("the header is as long as its parts"))
    }

    fn decode_whole(&self, mut reader: Reader<'_>) -> Result<Option<Decoded>, BadRequest> {
        let extended = self.headers == Headers::Extended;
        let magic = if extended { wire::EXTENDED_REQUEST } else { wire::REQUEST };
        let read = (|| {
            let found = reader.u32()?;
            let (flags, kind, cookie, offset) = (reader.u16()?, reader.u16()?, reader.u64()?, reader.u64()?);
            let length = if extended { reader.u64()? } else { reader.u32()?.into() };
            Some((found, flags, kind, cookie, offset, length))
        })();
        let Some((found, flags, kind, cookie, offset, length)) = read else { return Ok(None) };
        if found != magic {
            return Err(BadRequest::Magic(found));
        }
        // QEMU takes a write for one with data also when it does not say so; then so must we, to stay in step.
        let brings = kind == command::WRITE || extended && flags & flag::PAYLOAD != 0;
        let discard = match brings {
            true if length > limits::PAYLOAD.into() => return Err(BadRequest::Payload(length)),
            true => length as u32,
            false => 0,
        };
        Ok(Some(match self.understand(flags, kind, offset, length) {
            Ok(command) => Decoded::Request { tag: Tag { cookie, offset }, command },
            Err((error, text)) => Decoded::Refused(Refusal { tag: Tag { cookie, offset }, error, text, discard }),
        }))
    }

    fn understand(
        &self,
        flags: u16,
        kind: u16,
        offset: u64,
        length: u64,
    ) -> Result<Command, (ErrorCode, &'static str)> {
        let payload = if self.headers == Headers::Extended { flag::PAYLOAD } else { 0 };
        let whole = if self.headers == Headers::Simple { 0 } else { flag::WHOLE };
        let known = match kind {
            command::READ => whole,
            command::WRITE => payload,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::ONE,
            command::DISCONNECT => return Ok(Command::Disconnect),
            command::FLUSH | command::TRIM | command::CACHE => 0,
            _ => return Err((ErrorCode::Invalid, "there is no such command")),
        };
        // Clients are known to set FUA everywhere.
        if flags & !(known | flag::FUA) != 0 {
            return Err((ErrorCode::Invalid, "the command has no such flag"));
        }
        let fua = flags & flag::FUA != 0;
        let writes = matches!(kind, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        if writes && self.export.abilities.read_only() {
            return Err((ErrorCode::NotPermitted, "the export is read-only"));
        }
        if kind == command::FLUSH {
            return match (offset, length) {
                (0, 0) => Ok(Command::Flush),
                _ => Err((ErrorCode::Invalid, "a flush has no offset and no length")),
            };
        }
        if offset.checked_add(length).is_none_or(|end| end > self.export.size) {
            let error = match kind {
                command::WRITE | command::WRITE_ZEROES => ErrorCode::NoSpace,
                _ => ErrorCode::Invalid,
            };
            return Err((error, "it ends beyond the end of the export"));
        }
        let blocks = self.export.blocks;
        let aligned = |value: u64| value.is_multiple_of(blocks.minimum.into());
        if !aligned(offset) || !aligned(length) {
            return Err((ErrorCode::Invalid, "it is not aligned to the minimum block size"));
        }
        let short = || match u32::try_from(length) {
            Ok(length) if length <= blocks.maximum => Ok(length),
            _ => Err((ErrorCode::Invalid, "it is longer than the maximum payload")),
        };
        Ok(match kind {
            command::READ => Command::Read { offset, length: short()? },
            command::WRITE => Command::Write { offset, length: short()?, fua },
            command::TRIM => Command::Trim { offset, length, fua },
            command::CACHE => Command::Cache { offset, length },
            command::WRITE_ZEROES => Command::WriteZeroes {
                offset,
                length,
                fua,
                may_punch: flags & flag::NO_HOLE == 0,
                fast: flags & flag::FAST_ZERO != 0,
            },
            _ if self.allocation.is_none() => {
                return Err((ErrorCode::Invalid, "no metadata context was agreed upon"));
            }
            _ if length == 0 => return Err((ErrorCode::Invalid, "the status of nothing was asked for")),
            _ => Command::BlockStatus { offset, length, one: flags & flag::ONE != 0 },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::session::{Abilities, BlockSizes, Export};

    fn session(headers: Headers, read_only: bool) -> Session {
        let export = Export {
            name: String::new(),
            description: String::new(),
            size: 1 << 20,
            abilities: Abilities::of_ours(read_only),
            blocks: BlockSizes::with_minimum(512).unwrap(),
        };
        Session { headers, allocation: Some(1), export }
    }

    fn raw(flags: u16, kind: u16, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = wire::REQUEST.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    #[track_caller]
    fn refused(session: &Session, bytes: &[u8]) -> (ErrorCode, u32) {
        match session.decode(bytes) {
            Ok(Decoded::Refused(Refusal { tag: Tag { cookie: 7, .. }, error, discard, .. })) => (error, discard),
            other => panic!("{other:?}"),
        }
    }

    fn commands() -> impl Strategy<Value = Command> {
        let (offset, length) = ((0..1024_u64).prop_map(|it| it * 512), (1..1024_u64).prop_map(|it| it * 512));
        (offset, length, 0..8_u8, any::<[bool; 3]>()).prop_map(|(offset, length, kind, [fua, may_punch, fast])| {
            match kind {
                0 => Command::Read { offset, length: length as u32 },
                1 => Command::Write { offset, length: length as u32, fua },
                2 => Command::Flush,
                3 => Command::Trim { offset, length, fua },
                4 => Command::Cache { offset, length },
                5 => Command::WriteZeroes { offset, length, fua, may_punch, fast },
                6 => Command::BlockStatus { offset, length, one: fast },
                _ => Command::Disconnect,
            }
        })
    }

    proptest! {
        #[test]
        fn a_request_is_read_as_it_is_written(command in commands(), cookie: u64, extended: bool) {
            let headers = if extended { Headers::Extended } else { Headers::Structured };
            let session = session(headers, false);
            let mut bytes = Vec::new();
            command.encode(cookie, headers, &mut bytes);
            prop_assert_eq!(bytes.len(), session.request_header());
            for short in 0..bytes.len() {
                prop_assert_eq!(session.decode(&bytes[..short]), Ok(Decoded::Incomplete));
            }
            let (offset, length) = command.range();
            match session.decode(&bytes) {
                Ok(Decoded::Request { tag, command: back }) => prop_assert_eq!((tag.cookie, back), (cookie, command)),
                Ok(Decoded::Refused(_)) => prop_assert!(offset + length > session.export.size),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn what_ends_beyond_the_end_is_refused_also_when_the_sum_overflows() {
        let session = session(Headers::Structured, false);
        for (kind, error) in [
            (command::READ, ErrorCode::Invalid),
            (command::WRITE, ErrorCode::NoSpace),
            (command::TRIM, ErrorCode::Invalid),
            (command::CACHE, ErrorCode::Invalid),
            (command::WRITE_ZEROES, ErrorCode::NoSpace),
            (command::BLOCK_STATUS, ErrorCode::Invalid),
        ] {
            let discard = if kind == command::WRITE { 1024 } else { 0 };
            for offset in [(1 << 20) - 512, 1 << 20, u64::MAX - 511, u64::MAX - 1023] {
                assert_eq!(refused(&session, &raw(0, kind, offset, 1024)), (error, discard), "{kind} at {offset}");
            }
        }
        let mut bytes = Vec::new();
        let command = Command::Trim { offset: 512, length: u64::MAX - 511, fua: false };
        command.encode(7, Headers::Extended, &mut bytes);
        let session = self::session(Headers::Extended, false);
        assert_eq!(refused(&session, &bytes).0, ErrorCode::Invalid);
    }

    #[test]
    fn a_read_only_export_refuses_all_that_writes_and_knows_what_came_with_it() {
        let session = session(Headers::Structured, true);
        assert_eq!(refused(&session, &raw(0, command::WRITE, 0, 512)), (ErrorCode::NotPermitted, 512));
        assert_eq!(refused(&session, &raw(0, command::TRIM, 0, 512)), (ErrorCode::NotPermitted, 0));
        assert_eq!(refused(&session, &raw(0, command::WRITE_ZEROES, 0, 512)), (ErrorCode::NotPermitted, 0));
        assert!(matches!(session.decode(&raw(0, command::READ, 0, 512)), Ok(Decoded::Request { .. })));
    }

    #[test]
    fn unknown_commands_and_flags_and_crooked_requests_are_refused() {
        let session = session(Headers::Structured, false);
        for bytes in [
            raw(0, 8, 0, 0),
            raw(0, 4711, 0, 0),
            raw(flag::NO_HOLE, command::READ, 0, 512),
            raw(flag::WHOLE, command::WRITE_ZEROES, 0, 512),
            raw(flag::PAYLOAD, command::BLOCK_STATUS, 0, 512),
            raw(1 << 15, command::READ, 0, 512),
            raw(0, command::READ, 1, 512),
            raw(0, command::READ, 512, 1),
            raw(0, command::FLUSH, 512, 0),
            raw(0, command::BLOCK_STATUS, 0, 0),
        ] {
            assert_eq!(refused(&session, &bytes).0, ErrorCode::Invalid, "{bytes:?}");
        }
        let without = Session { allocation: None, ..session };
        assert_eq!(refused(&without, &raw(0, command::BLOCK_STATUS, 0, 512)).0, ErrorCode::Invalid);
    }

    #[test]
    fn more_than_the_limit_is_refused_or_ends_the_connection() {
        let mut session = session(Headers::Structured, false);
        session.export.size = 1 << 40;
        let long = limits::PAYLOAD + 512;
        assert_eq!(refused(&session, &raw(0, command::READ, 0, long)).0, ErrorCode::Invalid);
        assert_eq!(session.decode(&raw(0, command::WRITE, 0, long)), Err(BadRequest::Payload(long.into())));
        assert!(matches!(session.decode(&raw(0, command::WRITE_ZEROES, 0, long)), Ok(Decoded::Request { .. })));
        assert_eq!(session.decode(&[0; 28]), Err(BadRequest::Magic(0)));
    }
}
