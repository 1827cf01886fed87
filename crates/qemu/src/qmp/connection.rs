//! One QMP connection: the task that reads and writes lines, and the commands that wait for their replies.

use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Map, Value};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot, watch};

use super::{Event, EventStream, MAX_DESCRIPTORS, QmpError};

/// The longest line that is taken, in bytes. The longest that QEMU is known to send is its schema, some 200 KiB.
const MAX_LINE: usize = 64 << 20;
/// Commands that may wait to be written.
const MAX_UNWRITTEN: usize = 64;
/// Commands that wait in QEMU for their turn. It keeps up to eight; with more it stops reading, and a command that is
/// to be done at once would wait behind them.
const MAX_IN_ORDER: usize = 7;
/// Events that a reader may be behind before it loses some.
const MAX_UNREAD_EVENTS: usize = 128;

type Reply = Result<Map<String, Value>, Refusal>;

struct Refusal {
    class: String,
    desc: String,
}

/// Why a connection is over.
#[derive(Clone, Debug)]
enum End {
    Closed,
    Protocol(String),
}

struct Line {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// When QEMU is to do a command.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// After those that were sent before it.
    InOrder,
    /// At once ("out of band").
    Now,
}

/// A command that QEMU has not answered. It stays until then even if nobody waits for the answer any more, as it takes
/// its place in QEMU.
struct Unanswered {
    waiting: oneshot::Sender<Reply>,
    /// None for one that is done at once.
    _place: Option<OwnedSemaphorePermit>,
}

#[derive(Default)]
struct Pending(Mutex<HashMap<u64, Unanswered>>);

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Unanswered>> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

/// The face of a connection; dropping it ends the connection.
pub(super) struct Connection {
    next_id: AtomicU64,
    lines: mpsc::Sender<Line>,
    pending: Arc<Pending>,
    places: Arc<Semaphore>,
    descriptors: tokio::sync::Mutex<()>,
    events: broadcast::WeakSender<Event>,
    end: watch::Receiver<Option<End>>,
}

impl Connection {
    /// Starts reading and writing; the second part resolves to what QEMU offers when it has greeted.
    pub(super) fn open(stream: UnixStream) -> (Self, oneshot::Receiver<Vec<String>>) {
        let (lines, unwritten) = mpsc::channel(MAX_UNWRITTEN);
        let (events, _) = broadcast::channel(MAX_UNREAD_EVENTS);
        let (ended, end) = watch::channel(None);
        let (greeted, greeting) = oneshot::channel();
        let pending = Arc::new(Pending::default());
        let connection = Self {
            next_id: AtomicU64::new(1),
            lines,
            pending: Arc::clone(&pending),
            places: Arc::new(Semaphore::new(MAX_IN_ORDER)),
            descriptors: tokio::sync::Mutex::default(),
            events: events.downgrade(),
            end,
        };
        tokio::spawn(async move {
            let incoming = Incoming { pending: &pending, events, greeted: Some(greeted) };
            let why = run(stream, unwritten, incoming).await;
            // In this order: whoever finds the connection open after it registered a command is still answered below.
            ended.send_replace(Some(why));
            pending.lock().clear();
        });
        (connection, greeting)
    }

    pub(super) fn events(&self) -> EventStream {
        // Of a connection that is over nothing will come: a channel without a sender says just that.
        EventStream(self.events.upgrade().map_or_else(|| broadcast::channel(1).1, |events| events.subscribe()))
    }

    pub(super) async fn closed(&self) {
        // An error means that the task is gone, which is the same.
        let _ = self.end.clone().wait_for(Option::is_some).await;
    }

    pub(super) fn is_closed(&self) -> bool {
        self.end.borrow().is_some() || self.end.has_changed().is_err()
    }

    pub(super) fn why_closed(&self) -> QmpError {
        match &*self.end.borrow() {
            Some(End::Protocol(what)) => QmpError::Protocol { what: what.clone() },
            _ => QmpError::Closed,
        }
    }

    /// To be held while a command is under way that takes descriptors along.
    pub(super) async fn descriptors(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.descriptors.lock().await
    }

    /// Sends a command and waits for its reply.
    pub(super) async fn exchange(
        &self,
        name: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
        turn: Turn,
    ) -> Result<Value, QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (verb, place) = match turn {
            Turn::Now => ("exec-oob", None),
            Turn::InOrder => {
                let place = Arc::clone(&self.places).acquire_owned().await;
                ("execute", Some(place.expect("nobody closes the semaphore")))
            }
        };
        let mut command = serde_json::json!({ verb: name, "id": id });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            command["arguments"] = arguments;
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(b'\n');

        let (answer, answered) = oneshot::channel();
        self.pending.lock().insert(id, Unanswered { waiting: answer, _place: place });
        if self.is_closed() || self.lines.send(Line { bytes, fds }).await.is_err() {
            self.pending.lock().remove(&id);
            return Err(self.why_closed());
        }
        match answered.await {
            Ok(Ok(mut reply)) => Ok(reply.remove("return").unwrap_or_default()),
            Ok(Err(Refusal { class, desc })) => Err(QmpError::Command { command: name.into(), class, desc }),
            Err(_) => Err(self.why_closed()),
        }
    }
}

/// Reads and writes until one of them cannot go on.
async fn run(mut stream: UnixStream, mut unwritten: mpsc::Receiver<Line>, mut incoming: Incoming<'_>) -> End {
    let (reader, writer) = stream.split();
    let read = async {
        let mut reader = BufReader::with_capacity(64 << 10, reader);
        let mut line = Vec::new();
        loop {
            match read_line(&mut reader, &mut line).await {
                Ok(true) => {}
                Ok(false) => return End::Closed,
                Err(end) => return end,
            }
            if let Err(what) = incoming.take(&line) {
                tracing::warn!(what, "a QEMU broke the QMP protocol");
                return End::Protocol(what);
            }
        }
    };
    let write = async {
        while let Some(line) = unwritten.recv().await {
            if write_line(writer.as_ref(), &line).await.is_err() {
                return;
            }
        }
    };
    tokio::pin!(read);
    tokio::select! {
        end = &mut read => end,
        // Nobody is left to send, or QEMU takes nothing any more. In the latter case what it said before counts.
        () = write => if unwritten.is_closed() && unwritten.is_empty() { End::Closed } else { read.await },
    }
}

/// Reads one line without its end; false when there is no more.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> Result<bool, End> {
    line.clear();
    loop {
        // A connection that breaks is over, as one that is closed.
        let buffered = reader.fill_buf().await.map_err(|_| End::Closed)?;
        if buffered.is_empty() {
            return Ok(false);
        }
        let newline = buffered.iter().position(|byte| *byte == b'\n');
        let taken = newline.unwrap_or(buffered.len());
        if line.len() + taken > MAX_LINE {
            return Err(End::Protocol(format!("a line longer than {} MiB", MAX_LINE >> 20)));
        }
        line.extend_from_slice(&buffered[..taken]);
        reader.consume(taken + usize::from(newline.is_some()));
        if newline.is_some() {
            return Ok(true);
        }
    }
}

/// Descriptors go with the first byte of their command: QEMU keeps them for the command that it is reading.
async fn write_line(stream: &UnixStream, line: &Line) -> std::io::Result<()> {
    let mut written = 0;
    while written < line.bytes.len() {
        stream.writable().await?;
        let attempt = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<_> = line.fds.iter().map(AsFd::as_fd).collect();
            if written == 0 && !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "the caller bounds their number");
            }
            let rest = [IoSlice::new(&line.bytes[written..])];
            Ok(rustix::net::sendmsg(stream, &rest, &mut control, SendFlags::NOSIGNAL)?)
        });
        match attempt {
            Ok(count) => written += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where what QEMU says goes.
struct Incoming<'a> {
    pending: &'a Pending,
    events: broadcast::Sender<Event>,
    greeted: Option<oneshot::Sender<Vec<String>>>,
}

impl Incoming<'_> {
    fn take(&mut self, line: &[u8]) -> Result<(), String> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let mut message: Map<String, Value> = serde_json::from_slice(line)
            .map_err(|error| format!("{} ({error})", String::from_utf8_lossy(&line[..line.len().min(80)])))?;
        if let Some(Value::String(name)) = message.remove("event") {
            let data = message.remove("data").unwrap_or_default();
            // Nobody listening is fine.
            let _ = self.events.send(Event { name, data, at: std::time::Instant::now() });
        } else if let Some(greeting) = message.get("QMP") {
            let offered = greeting["capabilities"].as_array().into_iter().flatten().filter_map(Value::as_str);
            if let Some(greeted) = self.greeted.take() {
                let _ = greeted.send(offered.map(str::to_owned).collect());
            }
        } else if message.contains_key("return") || message.contains_key("error") {
            self.answer(message);
        } else {
            tracing::debug!(?message, "QEMU says something unknown");
        }
        Ok(())
    }

    fn answer(&self, mut message: Map<String, Value>) {
        let refusal = message.get("error").map(|error| {
            let text = |key| error.get(key).and_then(Value::as_str).unwrap_or("(no word)").to_owned();
            Refusal { class: text("class"), desc: text("desc") }
        });
        let unanswered = message.remove("id").and_then(|id| id.as_u64()).and_then(|id| self.pending.lock().remove(&id));
        match (unanswered, refusal) {
            // The waiting side may have given up in the meantime.
            (Some(it), Some(refusal)) => drop(it.waiting.send(Err(refusal))),
            (Some(it), None) => drop(it.waiting.send(Ok(message))),
            (None, Some(refusal)) => tracing::warn!(refusal.class, refusal.desc, "an error that nobody waits for"),
            (None, None) => tracing::debug!("a reply that nobody waits for any more"),
        }
    }
}
