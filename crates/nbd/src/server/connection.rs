//! One client, after the handshake.
//!
//! One thread reads its requests. What can be done without waiting it does at once (reads of what the kernel has in
//! memory, writes that only copy to it) and gathers the replies until nothing more has arrived: many small requests then
//! cost a few system calls. What may have to wait goes to workers, and their replies go out as they are made.

use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vmferry_link::channel::{Cutter, ReadHalf, WriteHalf};

use crate::backend::{Backend, Zeroing};
use crate::limits;
use crate::server::ServeError;
use crate::server::budget::{Budget, Taken};
use crate::server::workers::Queue;
use crate::session::Session;
use crate::transmission::{Command, Decoded, Replier, Tag};
use crate::wire::ErrorCode;

/// How much is read from the client at once.
const READ_AT_ONCE: usize = 128 << 10;
/// Longer reads are left to workers.
const LONG_READ: u32 = 1 << 20;
/// A write that takes longer than it takes to copy it had to wait: the kernel slows down whoever writes faster than the
/// disk, thread by thread ...
const SLOW_WRITE: Duration = Duration::from_micros(500);
/// ... so that so many of those that follow are better left to several.
const WRITES_FOR_WORKERS: u32 = 64;
/// Requests of this weight are usual.
const USUAL: u32 = 1 << 20;
/// So much of a reply, or of several, is gathered before it is sent.
const GATHERED: usize = 256 << 10;

/// See the module's text.
pub(crate) struct Connection<'a> {
    pub(crate) session: Session,
    pub(crate) backend: &'a dyn Backend,
    pub(crate) of_all: &'a Budget,
    pub(crate) writer: Mutex<WriteHalf>,
    pub(crate) cutter: Cutter,
}

/// What a worker has to do.
struct Job<'a> {
    tag: Tag,
    command: Command,
    payload: Vec<u8>,
    _held: (Taken<'a>, Taken<'a>),
}

impl Connection<'_> {
    /// Serves until the client leaves. `early` is what came with the handshake.
    pub(crate) fn run(&self, reader: ReadHalf, early: &[u8]) -> Result<(), ServeError> {
        let budget = Budget::new(limits::BYTES);
        let queue = Queue::new();
        std::thread::scope(|scope| {
            let mut inbox = Inbox::new(reader, early);
            let mut replies = Gathered::new(self.session.replier());
            let mut for_workers = 0;
            let done = loop {
                match self.step(&mut inbox, &mut replies, &mut for_workers) {
                    Ok(Some((tag, command, payload))) => {
                        // Whoever waits for memory or a thread has said what it has to say.
                        if let Err(error) = self.send(&mut replies) {
                            break Err(error.into());
                        }
                        let weight = command.weight();
                        // Others that hold everything cannot keep a client from its only, usual, request.
                        let usual = weight <= USUAL && budget.is_whole();
                        let of_all = if usual { 0 } else { weight.into() };
                        let held = (budget.take(weight.into()), self.of_all.take(of_all));
                        let job = Job { tag, command, payload, _held: held };
                        if let Err(job) = queue.put(job, scope, |job| self.work(&job)) {
                            self.work(&job);
                        }
                    }
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                }
            };
            queue.close();
            if done.is_err() {
                self.cutter.cut();
            }
            done
        })
    }

    /// Reads requests and does what needs no waiting, until there is one that does. So many of the writes that follow are
    /// `for_workers`.
    fn step(
        &self,
        inbox: &mut Inbox,
        replies: &mut Gathered,
        for_workers: &mut u32,
    ) -> Result<Option<(Tag, Command, Vec<u8>)>, ServeError> {
        loop {
            let (tag, command) = match self.session.decode(inbox.unread())? {
                Decoded::Incomplete => {
                    self.send(replies)?;
                    if !inbox.more()? {
                        return Ok(None);
                    }
                    continue;
                }
                Decoded::Refused(refusal) => {
                    inbox.take(self.session.request_header());
                    self.send_before_waiting(inbox, refusal.discard, replies)?;
                    inbox.pieces(refusal.discard, |_| ())?;
                    replies.failed(refusal.tag, refusal.error, refusal.text);
                    continue;
                }
                Decoded::Request { tag, command } => (tag, command),
            };
            inbox.take(self.session.request_header());
            match command {
                Command::Disconnect => {
                    self.send(replies)?;
                    return Ok(None);
                }
                Command::Read { offset, length } if length <= LONG_READ => {
                    if replies.would_overflow(length) {
                        self.send(replies)?;
                    }
                    if !replies.read_at_once(tag, self.backend, offset, length) {
                        return Ok(Some((tag, command, Vec::new())));
                    }
                }
                Command::Write { offset, length, fua: false }
                    if self.backend.writes_are_quick() && (*for_workers == 0 || length > USUAL) =>
                {
                    self.send_before_waiting(inbox, length, replies)?;
                    let (mut at, mut failed) = (offset, None);
                    inbox.pieces(length, |piece| {
                        let begun = Instant::now();
                        if failed.is_none() {
                            failed = self.backend.write(at, piece).err();
                        }
                        if begun.elapsed() > SLOW_WRITE {
                            *for_workers = WRITES_FOR_WORKERS;
                        }
                        at += piece.len() as u64;
                    })?;
                    replies.ended(tag, failed.map_or(Ok(()), Err));
                }
                Command::Write { length, .. } => {
                    *for_workers = for_workers.saturating_sub(1);
                    self.send_before_waiting(inbox, length, replies)?;
                    // The memory is there before it is filled; the kernel gives it page by page.
                    let mut payload = vec![0; length as usize];
                    let mut filled = 0;
                    inbox.pieces(length, |piece| {
                        payload[filled..filled + piece.len()].copy_from_slice(piece);
                        filled += piece.len();
                    })?;
                    return Ok(Some((tag, command, payload)));
                }
                _ => return Ok(Some((tag, command, Vec::new()))),
            }
        }
    }

    /// Replies must not wait for a payload that has not arrived.
    fn send_before_waiting(&self, inbox: &Inbox, payload: u32, replies: &mut Gathered) -> io::Result<()> {
        if inbox.unread().len() < payload as usize { self.send(replies) } else { Ok(()) }
    }

    fn send(&self, replies: &mut Gathered) -> io::Result<()> {
        if !replies.is_empty() {
            self.writer.lock().expect("nobody panics with this lock").write_all(replies.bytes())?;
            replies.clear();
        }
        Ok(())
    }

    /// Does something that may have to wait.
    fn work(&self, job: &Job<'_>) {
        let mut replies = Gathered::new(self.session.replier());
        match job.command {
            Command::Read { offset, length } => replies.read(job.tag, self.backend, offset, length),
            Command::BlockStatus { offset, length, one } => {
                let most = if one { 1 } else { limits::DESCRIPTORS };
                match self.backend.status(offset, length, most) {
                    Ok(extents) => replies.replier.status(job.tag, &extents, &mut replies.text),
                    Err(error) => replies.ended(job.tag, Err(error)),
                }
            }
            _ => replies.ended(job.tag, self.change(job.command, &job.payload)),
        }
        // The thread that reads then finds the connection at its end.
        if self.send(&mut replies).is_err() {
            self.cutter.cut();
        }
    }

    fn change(&self, command: Command, payload: &[u8]) -> io::Result<()> {
        let fua = match command {
            Command::Write { offset, fua, .. } => self.backend.write(offset, payload).map(|()| fua),
            Command::Trim { offset, length, fua } => self.backend.trim(offset, length).map(|()| fua),
            Command::WriteZeroes { offset, length, fua, may_punch, fast } => {
                self.backend.write_zeroes(offset, length, Zeroing { may_punch, fast }).map(|()| fua)
            }
            Command::Cache { offset, length } => self.backend.cache(offset, length).map(|()| false),
            Command::Flush => Ok(true),
            Command::Read { .. } | Command::BlockStatus { .. } | Command::Disconnect => {
                unreachable!("these change nothing and were answered before")
            }
        }?;
        if fua { self.backend.flush() } else { Ok(()) }
    }
}

/// Replies that have not been sent.
struct Gathered {
    replier: Replier,
    /// Heads, and replies without data.
    text: Vec<u8>,
    /// Replies with data; as long as it ever was, so that it need not be cleared again and again.
    data: Vec<u8>,
    filled: usize,
}

impl Gathered {
    fn new(replier: Replier) -> Self {
        Self { replier, text: Vec::new(), data: Vec::new(), filled: 0 }
    }

    fn is_empty(&self) -> bool {
        self.filled == 0 && self.text.is_empty()
    }

    fn would_overflow(&self, length: u32) -> bool {
        self.filled > 0 && self.filled + length as usize > GATHERED
    }

    fn clear(&mut self) {
        self.filled = 0;
        self.text.clear();
    }

    fn bytes(&mut self) -> &[u8] {
        self.settle();
        &self.data[..self.filled]
    }

    /// Puts what was said since behind the data that was read before it.
    fn settle(&mut self) {
        let end = self.filled + self.text.len();
        self.grow(end);
        self.data[self.filled..end].copy_from_slice(&self.text);
        self.filled = end;
        self.text.clear();
    }

    fn grow(&mut self, to: usize) {
        if self.data.len() < to {
            self.data.resize(to, 0);
        }
    }

    fn failed(&mut self, tag: Tag, error: ErrorCode, text: &str) {
        self.replier.failed(tag, error, text, &mut self.text);
    }

    fn ended(&mut self, tag: Tag, result: io::Result<()>) {
        match result {
            Ok(()) => self.replier.done(tag, &mut self.text),
            Err(error) => self.failed(tag, ErrorCode::of(&error), &error.to_string()),
        }
    }

    /// Puts the head of a read, and makes room for its data; says where the reply begins and its data does.
    fn room(&mut self, tag: Tag, length: u32) -> (usize, usize) {
        self.settle();
        let begin = self.filled;
        self.replier.data(tag, length, &mut self.text);
        self.settle();
        let at = self.filled;
        self.filled += length as usize;
        self.grow(self.filled);
        (begin, at)
    }

    fn read(&mut self, tag: Tag, backend: &dyn Backend, offset: u64, length: u32) {
        let (begin, at) = self.room(tag, length);
        if let Err(error) = backend.read(offset, &mut self.data[at..self.filled]) {
            self.filled = begin;
            self.ended(tag, Err(error));
        }
    }

    /// Says whether it could be done, or failed, without waiting.
    fn read_at_once(&mut self, tag: Tag, backend: &dyn Backend, offset: u64, length: u32) -> bool {
        let (begin, at) = self.room(tag, length);
        match backend.read_at_once(offset, &mut self.data[at..self.filled]) {
            Ok(true) => return true,
            Ok(false) => self.filled = begin,
            Err(error) => {
                self.filled = begin;
                self.ended(tag, Err(error));
                return true;
            }
        }
        false
    }
}

/// What a client has sent and nobody has looked at.
struct Inbox {
    reader: ReadHalf,
    bytes: Vec<u8>,
    begin: usize,
    end: usize,
    /// When what is there now, and is not whole, began to arrive.
    since: Option<Instant>,
}

impl Inbox {
    fn new(reader: ReadHalf, early: &[u8]) -> Self {
        let mut bytes = vec![0; READ_AT_ONCE.max(early.len())];
        bytes[..early.len()].copy_from_slice(early);
        Self { reader, bytes, begin: 0, end: early.len(), since: None }
    }

    fn unread(&self) -> &[u8] {
        &self.bytes[self.begin..self.end]
    }

    fn take(&mut self, count: usize) {
        self.since = None;
        self.begin += count;
    }

    /// Waits for more; `false` when the client has left between two requests. What has begun has to come in time.
    fn more(&mut self) -> io::Result<bool> {
        self.bytes.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        let begun = self.end > 0;
        self.since = begun.then(|| self.since.unwrap_or_else(Instant::now));
        self.reader.set_deadline(self.since.map(|since| since + limits::STALL));
        match self.reader.read(&mut self.bytes[self.end..])? {
            0 if begun => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.end += count;
                Ok(count > 0)
            }
        }
    }

    /// Takes so many bytes in pieces, as they come. They have to come in time.
    fn pieces(&mut self, length: u32, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut left = length as usize;
        let deadline = Instant::now() + limits::STALL + Duration::from_secs(u64::from(length) / limits::SLOWEST);
        while left > 0 {
            if self.begin == self.end {
                // No more than belongs to it, so that the next header begins a buffer.
                self.reader.set_deadline(Some(deadline));
                let room = left.min(self.bytes.len());
                (self.begin, self.end) = (0, self.reader.read(&mut self.bytes[..room])?);
                if self.end == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            let count = left.min(self.end - self.begin);
            each(&self.bytes[self.begin..self.begin + count]);
            self.begin += count;
            left -= count;
        }
        Ok(())
    }
}
