//! The first words on a stream: which session it joins, and proofs that both ends have the session's key.
//!
//! ```text
//! connecting side                        accepting side
//! Hello      session, stream, nonce  →
//!                                    ←   Challenge  version, nonce
//! Join       received, proof         →
//!                                    ←   Welcome    received, proof        (or Refused, at any point)
//! ```
//!
//! Each proof covers everything that was said before, both nonces among it, so that nothing said once is worth anything
//! a second time, or in the other direction. Pure: messages in, messages out; `docs/PROTOCOL.md` has the layouts.

use std::io::Read;

use crate::random_bytes;
use crate::session::{SessionId, SessionKey};

/// What a hello begins with. No TLS record does, so that the first byte tells a plain stream.
pub const MAGIC: [u8; 8] = *b"VMFERRY\0";
/// The versions that this side speaks, the oldest and the newest.
pub const VERSIONS: (u16, u16) = (1, 1);
/// The longest message, its head included.
pub const LONGEST: usize = 512;
/// Letters of a refusal: however many bytes each takes, it fits.
const LONGEST_WORDS: usize = 120;
/// Streams of a link besides the urgent one.
pub const MOST_STREAMS: u8 = 8;

const FOR_JOIN: &[u8] = b"vmferry stream: the connecting side proves\0";
const FOR_WELCOME: &[u8] = b"vmferry stream: the accepting side proves\0";

/// One message of the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Opens a stream.
    Hello(Hello),
    /// Answers a hello that may go on.
    Challenge(Challenge),
    /// Proves the right to join.
    Join(Proved),
    /// Proves to be who was meant; frames follow.
    Welcome(Proved),
    /// Nothing comes of it; the connection is closed.
    Refused(Refusal),
}

/// What the connecting side wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The oldest and the newest version that it speaks.
    pub versions: (u16, u16),
    /// The session it belongs to.
    pub session: SessionId,
    /// Which stream: 0 is the urgent one, bulk streams count from 1.
    pub stream: u8,
    /// How many bulk streams the link has.
    pub streams: u8,
    /// How many bytes may wait here to be taken.
    pub window: u32,
    /// Unpredictable.
    pub nonce: [u8; 32],
}

/// What the accepting side says to a hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// The version that is spoken from here on.
    pub version: u16,
    /// How many bytes may wait there to be taken.
    pub window: u32,
    /// Unpredictable.
    pub nonce: [u8; 32],
}

/// What a side received before, with the proof that it is the one to say so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proved {
    /// Everything before this number has arrived.
    pub received: u64,
    /// HMAC-SHA256 with the session's key over what was said until here.
    pub proof: [u8; 32],
}

/// Why a stream is refused, as it is told to the other side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{words}")]
pub struct Refusal {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub words: String,
}

/// Kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// Something that is no hello, or not one that can be read.
    Malformed = 1,
    /// No common version.
    Version = 2,
    /// No such session here; it may have ended.
    UnknownSession = 3,
    /// The session belongs to somebody else, or the proof is wrong.
    Foreign = 4,
    /// The session is encrypted and the stream is not, or the other way round.
    Protection = 5,
    /// No such stream in the session.
    Stream = 6,
    /// The stream cannot be taken right now; trying again may help.
    Busy = 7,
    /// A reason of a newer version.
    Other = 255,
}

/// Why bytes are no message.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The stream ended or broke before there was an answer.
    #[error("the stream broke in its handshake")]
    Broken(#[from] std::io::Error),
    /// These are no words of a stream's handshake.
    #[error("the other side does not say what a stream of vmferry says")]
    Malformed,
}

impl Message {
    fn number(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Challenge(_) => 2,
            Self::Join(_) => 3,
            Self::Welcome(_) => 4,
            Self::Refused(_) => 5,
        }
    }

    /// As it is sent: a hello begins with the magic, then each message is a number, a length, and a body.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(128);
        match self {
            Self::Hello(hello) => {
                body.extend(hello.versions.0.to_be_bytes());
                body.extend(hello.versions.1.to_be_bytes());
                body.extend(hello.session.as_bytes());
                body.extend([hello.stream, hello.streams]);
                body.extend(hello.window.to_be_bytes());
                body.extend(hello.nonce);
            }
            Self::Challenge(challenge) => {
                body.extend(challenge.version.to_be_bytes());
                body.extend(challenge.window.to_be_bytes());
                body.extend(challenge.nonce);
            }
            Self::Join(proved) | Self::Welcome(proved) => {
                body.extend(proved.received.to_be_bytes());
                body.extend(proved.proof);
            }
            Self::Refused(refusal) => {
                body.push(refusal.reason as u8);
                body.extend(refusal.words.chars().take(LONGEST_WORDS).collect::<String>().into_bytes());
            }
        }
        let mut bytes = Vec::with_capacity(body.len() + MAGIC.len() + 3);
        if matches!(self, Self::Hello(_)) {
            bytes.extend(MAGIC);
        }
        bytes.push(self.number());
        bytes.extend((body.len() as u16).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    /// The next message of a stream. Only the first one on a connection can be a hello, and is nothing else.
    pub fn read(stream: &mut impl Read, first: bool) -> Result<Self, HelloError> {
        if first {
            let mut magic = MAGIC;
            stream.read_exact(&mut magic)?;
            if magic != MAGIC {
                return Err(HelloError::Malformed);
            }
        }
        let mut head = [0; 3];
        stream.read_exact(&mut head)?;
        let length = usize::from(u16::from_be_bytes([head[1], head[2]]));
        if length > LONGEST || first != (head[0] == 1) {
            return Err(HelloError::Malformed);
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body)?;
        Self::decode(head[0], &body).ok_or(HelloError::Malformed)
    }

    /// Bytes after the fields that are known are a newer version's and do not matter.
    fn decode(number: u8, body: &[u8]) -> Option<Self> {
        let mut body = Fields(body);
        Some(match number {
            1 => Self::Hello(Hello {
                versions: (body.u16()?, body.u16()?),
                session: SessionId::from_bytes(body.take()?),
                stream: body.u8()?,
                streams: body.u8()?,
                window: body.u32()?,
                nonce: body.take()?,
            }),
            2 => Self::Challenge(Challenge { version: body.u16()?, window: body.u32()?, nonce: body.take()? }),
            3 => Self::Join(body.proved()?),
            4 => Self::Welcome(body.proved()?),
            5 => Self::Refused(Refusal {
                reason: Reason::from_number(body.u8()?),
                // It is shown to people: nothing in it may steer their terminal.
                words: String::from_utf8_lossy(body.0).chars().filter(|letter| !letter.is_control()).collect(),
            }),
            _ => return None,
        })
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn proved(&mut self) -> Option<Proved> {
        Some(Proved { received: self.take().map(u64::from_be_bytes)?, proof: self.take()? })
    }
}

impl Reason {
    fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Malformed,
            2 => Self::Version,
            3 => Self::UnknownSession,
            4 => Self::Foreign,
            5 => Self::Protection,
            6 => Self::Stream,
            7 => Self::Busy,
            _ => Self::Other,
        }
    }
}

/// The newest version that both sides speak.
pub fn common_version(theirs: (u16, u16)) -> Result<u16, Refusal> {
    let newest = VERSIONS.1.min(theirs.1);
    if newest >= VERSIONS.0.max(theirs.0) {
        return Ok(newest);
    }
    let words = format!(
        "no common version of the stream protocol: this side speaks {} to {}, the other {} to {}",
        VERSIONS.0, VERSIONS.1, theirs.0, theirs.1
    );
    Err(Refusal { reason: Reason::Version, words })
}

/// What was said until the proofs, and the key that they are made with.
pub struct Transcript<'a> {
    key: &'a SessionKey,
    hello: Vec<u8>,
    challenge: Vec<u8>,
}

impl<'a> Transcript<'a> {
    /// Of these two messages.
    pub fn new(key: &'a SessionKey, hello: &Hello, challenge: &Challenge) -> Self {
        let hello = Message::Hello(hello.clone()).encode();
        Self { key, hello, challenge: Message::Challenge(challenge.clone()).encode() }
    }

    /// The connecting side's proof.
    pub fn join(&self, received: u64) -> Proved {
        let proof = self.key.prove(&[FOR_JOIN, &self.hello, &self.challenge, &received.to_be_bytes()]);
        Proved { received, proof }
    }

    /// The accepting side's proof.
    pub fn welcome(&self, join: &Proved, received: u64) -> Proved {
        let joined = Message::Join(join.clone()).encode();
        let proof = self.key.prove(&[FOR_WELCOME, &self.hello, &self.challenge, &joined, &received.to_be_bytes()]);
        Proved { received, proof }
    }

    /// Whether the connecting side has the key.
    pub fn join_is_right(&self, join: &Proved) -> bool {
        self.key.verify(&[FOR_JOIN, &self.hello, &self.challenge, &join.received.to_be_bytes()], &join.proof)
    }

    /// Whether the accepting side has the key.
    pub fn welcome_is_right(&self, join: &Proved, welcome: &Proved) -> bool {
        let joined = Message::Join(join.clone()).encode();
        let parts: [&[u8]; 5] = [FOR_WELCOME, &self.hello, &self.challenge, &joined, &welcome.received.to_be_bytes()];
        self.key.verify(&parts, &welcome.proof)
    }
}

/// A nonce for a hello or a challenge.
pub(crate) fn nonce() -> [u8; 32] {
    random_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            versions: VERSIONS,
            session: SessionId::random(),
            stream: 2,
            streams: 4,
            window: 1 << 20,
            nonce: nonce(),
        }
    }

    fn challenge() -> Challenge {
        Challenge { version: 1, window: 1 << 20, nonce: nonce() }
    }

    #[test]
    fn messages_are_read_as_they_were_written() {
        let proved = Proved { received: 77, proof: nonce() };
        let refusal = Refusal { reason: Reason::Foreign, words: "not yours".into() };
        for message in [
            Message::Hello(hello()),
            Message::Challenge(challenge()),
            Message::Join(proved.clone()),
            Message::Welcome(proved),
            Message::Refused(refusal),
        ] {
            let first = matches!(message, Message::Hello(_));
            let bytes = message.encode();
            assert_eq!(Message::read(&mut &bytes[..], first).unwrap(), message);
            for cut in 0..bytes.len() {
                assert!(matches!(Message::read(&mut &bytes[..cut], first), Err(HelloError::Broken(_))));
            }
            assert!(Message::read(&mut &bytes[..], !first).is_err());
        }
    }

    #[test]
    fn a_newer_hello_with_more_fields_can_still_be_read_and_is_refused_in_words() {
        let newer = Hello { versions: (2, 3), ..hello() };
        let mut bytes = Message::Hello(newer.clone()).encode();
        bytes.extend([0xab; 40]);
        let length = (bytes.len() - MAGIC.len() - 3) as u16;
        bytes[MAGIC.len() + 1..MAGIC.len() + 3].copy_from_slice(&length.to_be_bytes());
        assert_eq!(Message::read(&mut &bytes[..], true).unwrap(), Message::Hello(newer.clone()));
        let refusal = common_version(newer.versions).unwrap_err();
        assert_eq!(refusal.reason, Reason::Version);
        assert!(refusal.words.contains("1 to 1") && refusal.words.contains("2 to 3"), "{refusal}");
        assert_eq!(common_version((0, 9)), Ok(1));
    }

    #[test]
    fn a_proof_is_worth_nothing_with_another_key_nonce_stream_direction_or_count() {
        let (key, hello, challenge) = (SessionKey::random(), hello(), challenge());
        let transcript = Transcript::new(&key, &hello, &challenge);
        let join = transcript.join(5);
        let welcome = transcript.welcome(&join, 9);
        assert!(transcript.join_is_right(&join) && transcript.welcome_is_right(&join, &welcome));

        let other_key = SessionKey::random();
        assert!(!Transcript::new(&other_key, &hello, &challenge).join_is_right(&join));
        let replayed = Challenge { nonce: nonce(), ..challenge.clone() };
        assert!(!Transcript::new(&key, &hello, &replayed).join_is_right(&join));
        let elsewhere = Hello { stream: 3, ..hello.clone() };
        assert!(!Transcript::new(&key, &elsewhere, &challenge).join_is_right(&join));
        assert!(!transcript.join_is_right(&Proved { received: 6, ..join.clone() }));
        assert!(!transcript.join_is_right(&welcome));
        assert!(!transcript.welcome_is_right(&join, &join));
        assert!(!transcript.welcome_is_right(&transcript.join(6), &welcome));
    }

    #[test]
    fn the_magic_cannot_begin_a_tls_record() {
        assert!(!(20..=24).contains(&MAGIC[0]));
    }

    #[test]
    fn a_refusal_is_short_enough_and_cannot_steer_a_terminal() {
        let words = format!("\u{1b}[2J{}", "ä".repeat(400));
        let bytes = Message::Refused(Refusal { reason: Reason::Busy, words }).encode();
        let Ok(Message::Refused(read)) = Message::read(&mut &bytes[..], false) else { panic!() };
        assert!(read.words.starts_with("[2Jää") && read.words.chars().skip(3).all(|letter| letter == 'ä'));
    }

    proptest! {
        #[test]
        fn random_bytes_are_refused_and_never_read_far(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert!(Message::read(&mut &bytes[..], true).is_err());
            let mut rest = &bytes[..];
            let _ = Message::read(&mut rest, false);
            prop_assert!(bytes.len() - rest.len() <= LONGEST + 3);
        }
    }
}
