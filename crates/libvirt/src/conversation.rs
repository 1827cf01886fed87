//! One conversation with a daemon: which call an answer belongs to. No I/O, no clock.

use std::collections::BTreeSet;

use crate::call::Call;
use crate::event::Event;
use crate::frame::{Frame, KEEPALIVE, Kind, REMOTE};
use crate::xdr::{Decoder, Encoder, Malformed};

/// The procedures of keepalive.
const PING: u32 = 1;
const PONG: u32 = 2;

/// What libvirt refused, or what failed there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    /// libvirt's number of the error.
    pub code: i32,
    /// In its words.
    pub message: String,
}

impl RemoteError {
    /// There is no such domain.
    pub fn is_no_domain(&self) -> bool {
        self.code == 42
    }

    /// Its user, or somebody else, ended it.
    pub fn is_aborted(&self) -> bool {
        self.code == 78
    }

    fn decode(payload: &[u8]) -> Result<Self, Malformed> {
        let mut from = Decoder::new(payload);
        let code = from.i32()?;
        let _domain = from.i32()?;
        let message = from.optional(|it| it.string().map(str::to_owned))?;
        Ok(Self { code, message: message.unwrap_or_else(|| format!("libvirt gives no reason (error {code})")) })
    }

    /// As a daemon would answer it.
    pub fn encode(&self) -> Vec<u8> {
        let mut to = Encoder::new();
        // Of libvirt's remote driver, an error; no domain, texts, or network come with it.
        to.i32(self.code).i32(13).optional_string(Some(&self.message)).i32(2);
        to.u32(0).u32(0).u32(0).u32(0).i32(0).i32(0).u32(0);
        to.finish()
    }
}

/// What a frame of the daemon means.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// The answer to this call.
    Answer {
        /// Its serial.
        serial: u32,
        /// What was answered.
        answer: Result<Vec<u8>, RemoteError>,
    },
    /// Something happened.
    Event(Event),
    /// This is to be sent back.
    Send(Frame),
    /// Nothing that concerns us.
    Nothing,
}

/// What a daemon said makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Nonsense {
    /// It cannot be read.
    #[error("libvirt said something that cannot be read: {0}")]
    Malformed(#[from] Malformed),
    /// An answer to nothing.
    #[error("libvirt answered call {0}, which was not made")]
    NotAsked(u32),
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Conversation {
    last: u32,
    open: BTreeSet<u32>,
}

impl Conversation {
    /// Nothing was said yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The frame of this call.
    pub fn ask(&mut self, call: Call) -> Frame {
        // A serial is used again only after four thousand million others.
        self.last = self.last.wrapping_add(1);
        self.open.insert(self.last);
        Frame::call(call.procedure, self.last, call.arguments)
    }

    /// What this frame of the daemon means.
    pub fn hear(&mut self, frame: Frame) -> Result<Heard, Nonsense> {
        match (frame.program, frame.kind) {
            (KEEPALIVE, Kind::Message) if frame.procedure == PING => {
                Ok(Heard::Send(Frame { procedure: PONG, ..frame }))
            }
            (REMOTE, Kind::Reply) => {
                if !self.open.remove(&frame.serial) {
                    return Err(Nonsense::NotAsked(frame.serial));
                }
                let answer = match frame.is_error {
                    true => Err(RemoteError::decode(&frame.payload)?),
                    false => Ok(frame.payload),
                };
                Ok(Heard::Answer { serial: frame.serial, answer })
            }
            (REMOTE, Kind::Message) => Ok(Event::of(&frame)?.map_or(Heard::Nothing, Heard::Event)),
            _ => Ok(Heard::Nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::number;

    fn reply(to: &Frame, is_error: bool, payload: Vec<u8>) -> Frame {
        Frame { kind: Kind::Reply, is_error, payload, ..to.clone() }
    }

    #[test]
    fn answers_find_their_calls_in_any_order_and_one_that_was_not_asked_for_is_nonsense() {
        let mut it = Conversation::new();
        let (first, second) = (it.ask(Call::bare(number::GET_VERSION)), it.ask(Call::lookup_by_name("web1")));
        assert_ne!(first.serial, second.serial);
        let refused = RemoteError { code: 42, message: "no domain".into() };
        let answer = it.hear(reply(&second, true, refused.encode())).unwrap();
        assert_eq!(answer, Heard::Answer { serial: second.serial, answer: Err(refused.clone()) });
        assert!(refused.is_no_domain());
        let answer = it.hear(reply(&first, false, vec![0; 8])).unwrap();
        assert_eq!(answer, Heard::Answer { serial: first.serial, answer: Ok(vec![0; 8]) });
        assert_eq!(it.hear(reply(&first, false, vec![])), Err(Nonsense::NotAsked(first.serial)));
    }

    #[test]
    fn a_ping_is_answered_and_what_is_not_known_is_passed_over() {
        let mut it = Conversation::new();
        let ping = Frame { program: KEEPALIVE, procedure: PING, kind: Kind::Message, ..Frame::call(0, 0, vec![]) };
        assert_eq!(it.hear(ping.clone()).unwrap(), Heard::Send(Frame { procedure: PONG, ..ping.clone() }));
        assert_eq!(it.hear(Frame { program: REMOTE, procedure: 999, ..ping.clone() }).unwrap(), Heard::Nothing);
        assert_eq!(it.hear(Frame { program: 5, kind: Kind::Other(3), ..ping }).unwrap(), Heard::Nothing);
    }
}
