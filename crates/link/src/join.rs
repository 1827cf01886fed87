//! How a connection becomes part of a stream: the handshake of [`hello`](crate::hello), from both ends.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::channel::{Channel, Cutter, ReadHalf, WriteHalf, take_records};
use crate::hello::{
    Challenge, Hello, HelloError, Message, Proved, Reason, Refusal, Transcript, VERSIONS, common_version, nonce,
};
use crate::link::state::Shared;
use crate::link::stream::Connection;
use crate::session::SessionId;
use crate::tls::LinkError;
use crate::{Fingerprint, sessions};

/// How long whoever connects may take for the handshake of a stream.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long an old connection may take to end before a new one takes its place.
const EVICTION: Duration = Duration::from_secs(2);

/// Why a connection did not become part of a stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    #[error("cannot connect")]
    Dial(#[from] LinkError),
    #[error("the handshake failed")]
    Hello(#[from] HelloError),
    #[error("the other agent refused the stream: {0}")]
    Refused(Refusal),
}

impl Refusal {
    /// Whether trying again may help.
    pub(crate) fn may_pass(&self) -> bool {
        self.reason == Reason::Busy
    }

    pub(crate) fn new(reason: Reason, words: impl Into<String>) -> Self {
        Self { reason, words: words.into() }
    }
}

/// Both halves of a channel while the handshake lasts.
struct Talk {
    reader: ReadHalf,
    writer: WriteHalf,
    cutter: Cutter,
    protected: bool,
}

impl Talk {
    fn begin(channel: Channel, deadline: Instant) -> Self {
        let (cutter, protected) = (channel.cutter(), channel.is_protected());
        let (mut reader, writer) = channel.split();
        reader.set_deadline(Some(deadline));
        Self { reader, writer, cutter, protected }
    }

    fn say(&mut self, message: &Message) -> Result<(), HelloError> {
        Ok(self.writer.write_all(&message.encode())?)
    }

    fn hear(&mut self) -> Result<Message, HelloError> {
        Message::read(&mut self.reader, false)
    }

    /// To be called when the other side waits for an answer.
    fn take_records(&mut self) -> Result<(), HelloError> {
        if self.protected {
            take_records(&mut self.reader, &mut self.writer)?;
        }
        Ok(())
    }

    fn refuse(&mut self, refusal: &Refusal) {
        // Whoever does not listen has lost nothing.
        let _ = self.say(&Message::Refused(refusal.clone()));
        let _ = self.writer.end();
    }

    fn into_connection(mut self) -> Connection {
        self.reader.set_deadline(None);
        Connection { reader: self.reader, writer: self.writer, cutter: self.cutter, protected: self.protected }
    }
}

/// The connecting side.
pub(crate) fn ask(channel: Channel, shared: &Shared, index: usize, deadline: Instant) -> Result<Connection, JoinError> {
    let mut talk = Talk::begin(channel, deadline);
    let hello = Hello {
        versions: VERSIONS,
        session: shared.options.session,
        stream: index as u8,
        streams: shared.options.streams,
        window: shared.options.window as u32,
        nonce: nonce(),
    };
    // Nothing is said to us before we speak.
    talk.take_records()?;
    talk.say(&Message::Hello(hello.clone()))?;
    let challenge = match talk.hear()? {
        Message::Challenge(challenge) => challenge,
        Message::Refused(refusal) => return Err(JoinError::Refused(refusal)),
        _ => return Err(HelloError::Malformed.into()),
    };
    common_version((challenge.version, challenge.version)).map_err(JoinError::Refused)?;
    let transcript = Transcript::new(&shared.options.key, &hello, &challenge);
    let join = transcript.join(shared.lock().streams[index].incoming.received());
    talk.say(&Message::Join(join.clone()))?;
    let welcome = match talk.hear()? {
        Message::Welcome(welcome) => welcome,
        Message::Refused(refusal) => return Err(JoinError::Refused(refusal)),
        _ => return Err(HelloError::Malformed.into()),
    };
    if !transcript.welcome_is_right(&join, &welcome) {
        let words = "the side that accepted the stream does not have the session's key";
        return Err(JoinError::Refused(Refusal::new(Reason::Foreign, words)));
    }
    resume(shared, index, &welcome, challenge.window).map_err(JoinError::Refused)?;
    Ok(talk.into_connection())
}

/// The accepting side. `find` looks a session up; whoever is in it is asked for by fingerprint, or by none on plain
/// streams.
pub(crate) fn answer(
    channel: Channel,
    peer: Option<Fingerprint>,
    find: impl FnOnce(SessionId) -> Option<sessions::Expected>,
) -> Result<(SessionId, u8), Refusal> {
    let mut talk = Talk::begin(channel, Instant::now() + DEADLINE);
    let result = try_answer(&mut talk, peer, find);
    match result {
        Ok((expected, hello)) => {
            let index = usize::from(hello.stream);
            let mut state = expected.link.lock();
            state.streams[index].joining = false;
            state.streams[index].offered = Some(talk.into_connection());
            drop(state);
            expected.link.work[index].notify_all();
            Ok((hello.session, hello.stream))
        }
        Err(refusal) => {
            talk.refuse(&refusal);
            Err(refusal)
        }
    }
}

fn try_answer(
    talk: &mut Talk,
    peer: Option<Fingerprint>,
    find: impl FnOnce(SessionId) -> Option<sessions::Expected>,
) -> Result<(sessions::Expected, Hello), Refusal> {
    let malformed = |error: HelloError| Refusal::new(Reason::Malformed, error.to_string());
    let Message::Hello(hello) = Message::read(&mut talk.reader, true).map_err(malformed)? else {
        return Err(malformed(HelloError::Malformed));
    };
    talk.take_records().map_err(malformed)?;
    let version = common_version(hello.versions)?;
    let expected = find(hello.session)
        .ok_or_else(|| Refusal::new(Reason::UnknownSession, "there is no such session here (any more)"))?;
    match (expected.peer, peer) {
        (Some(_), None) => {
            return Err(Refusal::new(Reason::Protection, "the session is encrypted and the stream is not"));
        }
        (None, Some(_)) => {
            return Err(Refusal::new(Reason::Protection, "the session is plain and the stream is encrypted"));
        }
        (Some(owner), Some(peer)) if owner != peer => {
            return Err(Refusal::new(Reason::Foreign, "the session belongs to another agent"));
        }
        _ => {}
    }
    let options = &expected.link.options;
    if hello.streams != options.streams || hello.stream > hello.streams {
        let words = format!(
            "stream {} of {} was asked for: the session has {} and the urgent one",
            hello.stream, hello.streams, options.streams
        );
        return Err(Refusal::new(Reason::Stream, words));
    }
    let challenge = Challenge { version, window: options.window as u32, nonce: nonce() };
    talk.say(&Message::Challenge(challenge.clone())).map_err(malformed)?;
    let Message::Join(join) = talk.hear().map_err(malformed)? else {
        return Err(malformed(HelloError::Malformed));
    };
    let transcript = Transcript::new(&options.key, &hello, &challenge);
    if !transcript.join_is_right(&join) {
        return Err(Refusal::new(Reason::Foreign, "the proof is wrong: it is not made with the session's key"));
    }
    let index = usize::from(hello.stream);
    make_way(&expected.link, index)?;
    let welcomed = (|| {
        resume(&expected.link, index, &join, hello.window)?;
        let received = expected.link.lock().streams[index].incoming.received();
        talk.say(&Message::Welcome(transcript.welcome(&join, received))).map_err(malformed)
    })();
    if let Err(refusal) = welcomed {
        expected.link.lock().streams[index].joining = false;
        return Err(refusal);
    }
    Ok((expected, hello))
}

/// Ends the stream's old connection, which this side may not know to be dead, so that nothing more is received on it.
fn make_way(link: &Shared, index: usize) -> Result<(), Refusal> {
    let busy = || Refusal::new(Reason::Busy, "the stream's last connection has not ended yet");
    let until = Instant::now() + EVICTION;
    let mut state = link.lock();
    if state.streams[index].joining {
        return Err(busy());
    }
    state.streams[index].joining = true;
    loop {
        let stream = &mut state.streams[index];
        stream.offered = None;
        match &stream.connection {
            None => return Ok(()),
            Some(cutter) => cutter.cut(),
        }
        if Instant::now() >= until {
            stream.joining = false;
            return Err(busy());
        }
        state = Shared::wait_until(&link.progress, state, until);
    }
}

/// Goes on where the other side says that it stopped.
fn resume(shared: &Shared, index: usize, there: &Proved, window: u32) -> Result<(), Refusal> {
    let mut state = shared.lock();
    let outgoing = &mut state.streams[index].outgoing;
    outgoing.limit_window(window as usize);
    outgoing.resume(there.received).map_err(|error| Refusal::new(Reason::Malformed, error.to_string()))
}
