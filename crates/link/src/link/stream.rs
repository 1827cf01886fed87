//! The life of a stream. One thread makes or awaits connections and [writes](super::writing); for each connection there
//! is one that [reads](super::reading).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LinkDown;
use super::reading::Reading;
use super::state::{LAST_WORDS, Shared, State, URGENT};
use super::writing::Writing;
use crate::channel::{Cutter, ReadHalf, WriteHalf};
use crate::dial::Dialer;
use crate::frame::FrameError;
use crate::join::{self, JoinError};
use crate::sequence::SequenceError;

/// How long one attempt to connect may take.
const DIAL: Duration = Duration::from_secs(3);
/// The same when there is little patience left.
const LEAST_DIAL: Duration = Duration::from_millis(50);
/// Pauses between attempts: the first, doubled up to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// A connection that lasts so long was worth it.
const STABLE: Duration = Duration::from_secs(10);
/// A pause after one that was not.
const FRUITLESS: Duration = Duration::from_millis(100);

/// A connection that has joined its stream: frames may flow.
pub(crate) struct Connection {
    pub(crate) reader: ReadHalf,
    pub(crate) writer: WriteHalf,
    pub(crate) cutter: Cutter,
    /// TLS lies over it.
    pub(crate) protected: bool,
}

/// Why a connection of a stream ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    #[error("the connection broke")]
    Broken(#[from] io::Error),
    #[error("what arrived is no frame")]
    Frame(#[from] FrameError),
    #[error("what arrived does not follow what came before")]
    Sequence(#[from] SequenceError),
    #[error("a frame came after the end")]
    AfterEnd,
}

/// Starts the threads of a link; those of the connecting side have a dialer.
pub(crate) fn start(link: &Arc<Shared>, dialer: Option<&Arc<dyn Dialer>>) -> Result<(), LinkDown> {
    for index in 0..link.work.len() {
        let (shared, dialer) = (Arc::clone(link), dialer.cloned());
        let run = move || {
            if index == URGENT {
                crate::go_first();
            }
            keep_connected(&shared, index, dialer.as_deref());
        };
        if let Err(error) = std::thread::Builder::new().name(format!("link-{index}")).spawn(run) {
            let down = LinkDown::Thread(Arc::new(error));
            link.fail(down.clone());
            return Err(down);
        }
    }
    Ok(())
}

/// Connects a stream, and again when it broke, until the link is over.
fn keep_connected(shared: &Arc<Shared>, index: usize, dialer: Option<&dyn Dialer>) {
    let mut lost_since = Instant::now();
    let mut last_error: Arc<dyn std::error::Error + Send + Sync> =
        Arc::new(io::Error::new(io::ErrorKind::NotConnected, "nobody has connected yet"));
    loop {
        let until = lost_since + shared.options.patience;
        let connection = match dialer {
            Some(dialer) => dial(shared, index, dialer, until, &mut last_error),
            None => await_connection(shared, index, until),
        };
        let Some(connection) = connection else {
            let patience = shared.options.patience;
            if !is_over(&shared.lock(), index) {
                shared.fail(LinkDown::Lost { stream: index as u8, patience, source: last_error });
            }
            shared.progress.notify_all();
            return;
        };
        let (begun, before) = (Instant::now(), shared.lock().streams[index].progress());
        let ended = drive(shared, index, connection);
        let mut state = shared.lock();
        let stream = &mut state.streams[index];
        stream.connection = None;
        // One that connects again and again, and on which nothing gets through, is as good as gone.
        let fruitless = stream.progress() == before && begun.elapsed() < STABLE;
        if !fruitless {
            lost_since = Instant::now();
        }
        if let Some(fault) = stream.fault.take() {
            last_error = fault;
        } else if let Err(error) = ended {
            last_error = Arc::new(error);
        }
        shared.progress.notify_all();
        if is_over(&state, index) {
            return;
        }
        drop(state);
        tracing::debug!(session = %shared.options.session, stream = index, error = %last_error, "stream broke");
        if fruitless {
            rest(shared, index, Instant::now() + FRUITLESS);
        }
    }
}

/// The stream needs no connection any more.
fn is_over(state: &State, index: usize) -> bool {
    state.down.is_some() || state.streams[index].is_over()
}

/// How often a stream that was welcome before may be refused before that is believed.
const MOST_REFUSALS: u32 = 2;

/// Dials until a connection has joined the stream; `None` when the link is over or time is up.
fn dial(
    shared: &Shared,
    index: usize,
    dialer: &dyn Dialer,
    until: Instant,
    last_error: &mut Arc<dyn std::error::Error + Send + Sync>,
) -> Option<Connection> {
    let mut pause = PAUSES.0;
    let mut refusals = 0;
    loop {
        if is_over(&shared.lock(), index) {
            return None;
        }
        let attempt = Instant::now() + DIAL.min(until.saturating_duration_since(Instant::now()).max(LEAST_DIAL));
        let failed: JoinError = match dialer.dial(attempt.saturating_duration_since(Instant::now())) {
            Ok(channel) => match join::ask(channel, shared, index, attempt) {
                Ok(connection) => return Some(connection),
                Err(error) => error,
            },
            Err(error) => error.into(),
        };
        // A stream that never was connected has nothing to lose by failing at once, and its user waits for an answer.
        let first = shared.lock().streams[index].counters.connects == 0;
        match failed {
            // What was welcome before is refused when a byte was changed on the way: on plain streams TLS does not tell.
            JoinError::Refused(refusal) if !refusal.may_pass() && (first || refusals == MOST_REFUSALS) => {
                // What has been closed over there is not known there any more.
                let refused = LinkDown::Refused { stream: index as u8, refusal };
                let left = shared.lock().streams[index].left_by_peer();
                match left {
                    Some(true) => {}
                    Some(false) => shared.fail(LinkDown::PeerGaveUp),
                    None => shared.fail(refused),
                }
                return None;
            }
            other => {
                refusals += u32::from(matches!(&other, JoinError::Refused(refusal) if !refusal.may_pass()));
                *last_error = Arc::new(other);
            }
        }
        if first || Instant::now() + pause >= until {
            return None;
        }
        rest(shared, index, Instant::now() + pause);
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Waits until then, or until the link is over.
fn rest(shared: &Shared, index: usize, until: Instant) {
    let mut state = shared.lock();
    while Instant::now() < until && !is_over(&state, index) {
        state = Shared::wait_until(&shared.work[index], state, until);
    }
}

/// Waits until somebody attaches a connection.
fn await_connection(shared: &Shared, index: usize, until: Instant) -> Option<Connection> {
    let mut state = shared.lock();
    loop {
        if let Some(connection) = state.streams[index].offered.take() {
            return Some(connection);
        }
        if is_over(&state, index) || Instant::now() >= until {
            return None;
        }
        state = Shared::wait_until(&shared.work[index], state, until);
    }
}

/// Lets frames flow over a connection until it ends.
fn drive(shared: &Arc<Shared>, index: usize, connection: Connection) -> Result<(), StreamError> {
    let Connection { reader, mut writer, cutter, protected } = connection;
    {
        let mut state = shared.lock();
        let stream = &mut state.streams[index];
        stream.connection = Some(cutter.clone());
        stream.protected = Some(protected);
        stream.counters.connects += 1;
        stream.fault = None;
        (stream.pong, stream.ping) = (None, None);
        // An ack may have been lost with the last connection.
        stream.ack_due = Some(Instant::now());
        shared.progress.notify_all();
    }
    let reading = {
        let (shared, cutter) = (Arc::clone(shared), cutter.clone());
        let read = move || {
            let result = Reading::new(&shared, index, reader, protected).run();
            cutter.cut();
            let mut state = shared.lock();
            let error = result.err().unwrap_or_else(|| StreamError::Broken(io::ErrorKind::UnexpectedEof.into()));
            state.streams[index].fault = Some(Arc::new(error));
            drop(state);
            shared.work[index].notify_all();
        };
        std::thread::Builder::new().name(format!("link-{index}-in")).spawn(read)
    };
    let reading = match reading {
        Ok(reading) => reading,
        Err(error) => {
            cutter.cut();
            return Err(error.into());
        }
    };
    let result = Writing::new(shared, index, protected).run(&mut writer);
    if result.is_ok() {
        let _ = writer.end();
        // A connection that is closed with something unread makes the other side lose what it has not read either.
        let until = Instant::now() + LAST_WORDS;
        let mut state = shared.lock();
        while state.streams[index].fault.is_none() && Instant::now() < until {
            state = Shared::wait_until(&shared.work[index], state, until);
        }
    }
    cutter.cut();
    let _ = reading.join();
    result
}
