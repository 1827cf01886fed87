//! What streams of a link say: frames. A frame is a header of 28 bytes and, when it carries data, a payload.
//!
//! The header has a check of its own on every stream: nothing in it is believed, least of all a length, before that
//! fits. The payload has one on plain streams only; TLS authenticates every byte already. `docs/PROTOCOL.md` has the
//! layout in words. No I/O here: bytes in, frames out.

use std::io::{self, Read};

/// Bytes of a header.
pub const HEADER: usize = 28;
/// The largest payload, before compression and after: one frame must never keep a stream busy for long.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Type {
    /// Carries what a user sends.
    Data = 1,
    /// The last frame that its sender sends on this stream.
    End = 2,
    /// Everything before `sequence` was taken by the user at the other end.
    Ack = 3,
    /// Asks for a pong with the same `sequence`.
    Ping = 4,
    /// Answers a ping.
    Pong = 5,
    /// The sender gives the link up; nothing follows on any stream.
    Abort = 6,
}

/// How a payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// Not at all.
    Raw = 0,
    /// As an LZ4 block.
    Lz4 = 1,
    /// As a zstd frame.
    Zstd = 2,
}

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is for.
    pub frame: Type,
    /// How the payload is compressed.
    pub encoding: Encoding,
    /// What the payload is to the users of the link, which give the numbers their meaning.
    pub kind: u16,
    /// Bytes of payload that follow.
    pub length: u32,
    /// Bytes of the payload when it is unpacked.
    pub raw_length: u32,
    /// The number of a `Data` or `End` frame, counted from 0 on each stream in each direction; see [`Type`] for others.
    pub sequence: u64,
    /// CRC-32 of the payload as it is sent; 0 on protected streams.
    pub check: u32,
}

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended or broke.
    #[error("the stream broke")]
    Broken(#[from] io::Error),
    /// The header was damaged, or these bytes are none.
    #[error("a frame's header does not fit its check")]
    HeaderCheck,
    /// The payload was damaged.
    #[error("a frame's payload does not fit its check")]
    PayloadCheck,
    /// A field has a value that this version does not know.
    #[error("a frame of an unknown type or encoding")]
    Unknown,
    /// Longer than a frame may be.
    #[error("a frame of {0} bytes: at most {MAX_PAYLOAD} are allowed")]
    TooLong(u32),
    /// Fields contradict each other.
    #[error("a frame whose lengths contradict what it is")]
    Contradiction,
}

impl Header {
    /// A frame without payload.
    pub fn bare(frame: Type, sequence: u64) -> Self {
        Self { frame, encoding: Encoding::Raw, kind: 0, length: 0, raw_length: 0, sequence, check: 0 }
    }

    /// As it is sent.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.frame as u8;
        bytes[1] = self.encoding as u8;
        bytes[2..4].copy_from_slice(&self.kind.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.length.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.raw_length.to_be_bytes());
        bytes[12..20].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[20..24].copy_from_slice(&self.check.to_be_bytes());
        let check = crc32fast::hash(&bytes[..24]);
        bytes[24..].copy_from_slice(&check.to_be_bytes());
        bytes
    }

    /// From 28 bytes that arrived.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, FrameError> {
        if crc32fast::hash(&bytes[..24]) != u32::from_be_bytes(part(bytes, 24)) {
            return Err(FrameError::HeaderCheck);
        }
        let header = Self {
            frame: match bytes[0] {
                1 => Type::Data,
                2 => Type::End,
                3 => Type::Ack,
                4 => Type::Ping,
                5 => Type::Pong,
                6 => Type::Abort,
                _ => return Err(FrameError::Unknown),
            },
            encoding: match bytes[1] {
                0 => Encoding::Raw,
                1 => Encoding::Lz4,
                2 => Encoding::Zstd,
                _ => return Err(FrameError::Unknown),
            },
            kind: u16::from_be_bytes(part(bytes, 2)),
            length: u32::from_be_bytes(part(bytes, 4)),
            raw_length: u32::from_be_bytes(part(bytes, 8)),
            sequence: u64::from_be_bytes(part(bytes, 12)),
            check: u32::from_be_bytes(part(bytes, 20)),
        };
        for length in [header.length, header.raw_length] {
            if length as usize > MAX_PAYLOAD {
                return Err(FrameError::TooLong(length));
            }
        }
        let agrees = match (header.frame, header.encoding) {
            (Type::Data, Encoding::Raw) => header.length == header.raw_length,
            // What does not get shorter is sent as it is.
            (Type::Data, _) => header.length < header.raw_length,
            (bare, _) => header == Self::bare(bare, header.sequence),
        };
        if agrees { Ok(header) } else { Err(FrameError::Contradiction) }
    }

    /// The next header of a stream.
    pub fn read(stream: &mut impl Read) -> Result<Self, FrameError> {
        let mut bytes = [0; HEADER];
        stream.read_exact(&mut bytes)?;
        Self::decode(&bytes)
    }

    /// Fills in the payload's check.
    #[must_use]
    pub fn with_check_of(mut self, payload: &[u8]) -> Self {
        self.check = crc32fast::hash(payload);
        self
    }

    /// Whether the payload is the one that was sent.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), FrameError> {
        if crc32fast::hash(payload) == self.check { Ok(()) } else { Err(FrameError::PayloadCheck) }
    }
}

fn part<const N: usize>(bytes: &[u8; HEADER], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the fields lie within the header")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(length: u32, raw_length: u32, encoding: Encoding) -> Header {
        Header { encoding, kind: 7, length, raw_length, check: 9, ..Header::bare(Type::Data, 5) }
    }

    /// Encoded with a right check, whatever the fields say.
    fn forged(change: impl Fn(&mut [u8; HEADER])) -> [u8; HEADER] {
        let mut bytes = data(10, 10, Encoding::Raw).encode();
        change(&mut bytes);
        let check = crc32fast::hash(&bytes[..24]);
        bytes[24..].copy_from_slice(&check.to_be_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn a_header_is_read_as_it_was_written(
            kind: u16, length in 0..=MAX_PAYLOAD as u32, more in 0..1000_u32, sequence: u64, check: u32, which in 0..3,
        ) {
            let (encoding, raw_length) = match which {
                0 => (Encoding::Raw, length),
                1 => (Encoding::Lz4, (length + 1 + more).min(MAX_PAYLOAD as u32)),
                _ => (Encoding::Zstd, (length + 1 + more).min(MAX_PAYLOAD as u32)),
            };
            prop_assume!(which == 0 || raw_length > length);
            let header = Header { frame: Type::Data, encoding, kind, length, raw_length, sequence, check };
            prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }

        #[test]
        fn any_changed_bit_of_a_header_is_noticed(bit in 0..HEADER * 8, sequence: u64) {
            let mut bytes = Header { sequence, ..data(1000, 2000, Encoding::Zstd) }.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn random_bytes_are_no_header(bytes: [u8; HEADER]) {
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_cut_header_is_a_broken_stream() {
        let bytes = data(10, 10, Encoding::Raw).encode();
        for cut in 0..HEADER {
            assert!(matches!(Header::read(&mut &bytes[..cut]), Err(FrameError::Broken(_))), "{cut}");
        }
    }

    #[test]
    fn what_is_too_long_unknown_or_contradicts_itself_is_refused_though_its_check_fits() {
        let long = (MAX_PAYLOAD as u32 + 1).to_be_bytes();
        let too_long = forged(|bytes| bytes[4..8].copy_from_slice(&long));
        assert!(matches!(Header::decode(&too_long), Err(FrameError::TooLong(_))));
        let unpacks_too_long = forged(|bytes| {
            bytes[1] = 2;
            bytes[8..12].copy_from_slice(&long);
        });
        assert!(matches!(Header::decode(&unpacks_too_long), Err(FrameError::TooLong(_))));
        for (at, value) in [(0, 0), (0, 7), (1, 3)] {
            assert!(matches!(Header::decode(&forged(|bytes| bytes[at] = value)), Err(FrameError::Unknown)));
        }
        // An ack with a payload, a raw frame that would grow, a packed one that did not shrink.
        for (at, value) in [(0, 3), (11, 11), (1, 1)] {
            assert!(matches!(Header::decode(&forged(|bytes| bytes[at] = value)), Err(FrameError::Contradiction)));
        }
    }

    #[test]
    fn a_changed_payload_is_noticed() {
        let header = data(4, 4, Encoding::Raw).with_check_of(b"page");
        assert!(header.check_payload(b"page").is_ok());
        assert!(matches!(header.check_payload(b"pagf"), Err(FrameError::PayloadCheck)));
    }
}
