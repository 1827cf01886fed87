//! One connection to a server: any number of threads ask, one hears the answers.

use std::collections::HashMap;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use socket2::SockRef;
use vmferry_link::Channel;
use vmferry_link::channel::{ReadHalf, WriteHalf};

use crate::client::{ClientError, Lost};
use crate::handshake::{Asking, Step, Told, Wish};
use crate::limits;
use crate::session::Session;
use crate::tls::ClientTls;
use crate::transmission::{Answer, Command, Event, Failed, Replies};
use crate::uri::Place;

/// How much is read from the server at once.
const READ_AT_ONCE: usize = 64 << 10;

/// See the module's text. When it is dropped it tells the server that nothing follows.
pub struct Client {
    session: Session,
    shared: Arc<Shared>,
    writer: Mutex<WriteHalf>,
    listening: Option<JoinHandle<()>>,
    cutter: vmferry_link::channel::Cutter,
}

struct Shared(Mutex<State>);

struct State {
    replies: Replies,
    waiting: HashMap<u64, Waiting>,
    lost: Option<Arc<Lost>>,
}

/// Who waits for an answer, with the room for what it reads.
struct Waiting {
    into: Vec<u8>,
    tell: SyncSender<(Result<Answer, Failed>, Vec<u8>)>,
}

/// The exports of the server there.
pub fn list(place: &Place, tls: Option<&ClientTls>) -> Result<Vec<Told>, ClientError> {
    let (channel, agreed) = shake_hands(open(place)?, &place.to_string(), tls, Wish::List)?;
    let _ = channel.split().1.end();
    match agreed.1 {
        Step::Listed(told) => Ok(told),
        _ => unreachable!("a list was wished for"),
    }
}

/// What an export is, without using it: a server for one client alone goes on waiting for that.
pub fn look(place: &Place, tls: Option<&ClientTls>, export: &str) -> Result<Session, ClientError> {
    let (channel, agreed) = shake_hands(open(place)?, &place.to_string(), tls, Wish::Info(export.into()))?;
    let _ = channel.split().1.end();
    match agreed.1 {
        Step::Agreed(session) => Ok(*session),
        _ => unreachable!("to be told of an export was wished for"),
    }
}

fn open(place: &Place) -> Result<Channel, ClientError> {
    let failed = |source| ClientError::Connect { at: place.to_string(), source };
    match place {
        Place::Unix(path) => Ok(Channel::over(UnixStream::connect(path).map_err(failed)?)),
        Place::Tcp { host, port } => {
            let tcp = TcpStream::connect((host.as_str(), *port)).map_err(failed)?;
            tcp.set_nodelay(true).map_err(failed)?;
            SockRef::from(&tcp).set_keepalive(true).map_err(failed)?;
            Ok(Channel::over(tcp))
        }
    }
}

/// Until it is agreed upon, or told, what was wished for; and what has arrived beyond that.
fn shake_hands(
    mut channel: Channel,
    at: &str,
    tls: Option<&ClientTls>,
    wish: Wish,
) -> Result<(Channel, (Vec<u8>, Step)), ClientError> {
    let broken = |source| ClientError::Connect { at: at.into(), source };
    channel.set_deadline(Some(Instant::now() + limits::HANDSHAKE));
    let mut asking = Asking::new(wish, tls.is_some());
    let (mut heard, mut out, mut bytes) = (Vec::new(), Vec::new(), [0; 4096]);
    loop {
        let mut input = &heard[..];
        let step =
            asking.receive(&mut input, &mut out).map_err(|source| ClientError::Handshake { at: at.into(), source })?;
        heard = input.to_vec();
        if step == Step::StartTls {
            let tls = tls.expect("TLS was wished for");
            channel = tls.connect(channel).map_err(|source| ClientError::Tls { at: at.into(), source })?;
            asking.tls_begins(&mut out);
        }
        channel.write_all(&out).map_err(broken)?;
        out.clear();
        match step {
            Step::Incomplete | Step::StartTls => {
                let count = channel.read(&mut bytes).map_err(broken)?;
                if count == 0 {
                    return Err(broken(io::ErrorKind::UnexpectedEof.into()));
                }
                heard.extend(&bytes[..count]);
            }
            Step::Agreed(_) | Step::Listed(_) => {
                channel.set_deadline(None);
                return Ok((channel, (heard, step)));
            }
        }
    }
}

impl Client {
    /// Uses an export of the server there; with TLS, or not at all.
    pub fn connect(place: &Place, tls: Option<&ClientTls>, export: &str) -> Result<Self, ClientError> {
        Self::over(open(place)?, &place.to_string(), tls, export)
    }

    /// The same over what is connected already.
    pub fn over(channel: Channel, at: &str, tls: Option<&ClientTls>, export: &str) -> Result<Self, ClientError> {
        let (channel, (early, step)) = shake_hands(channel, at, tls, Wish::Use(export.into()))?;
        let Step::Agreed(session) = step else { unreachable!("an export was wished for") };
        let state = State { replies: session.replies(), waiting: HashMap::new(), lost: None };
        let shared = Arc::new(Shared(Mutex::new(state)));
        let cutter = channel.cutter();
        let (reader, writer) = channel.split();
        let listening = {
            let (shared, cutter) = (Arc::clone(&shared), cutter.clone());
            let hear = move || {
                let lost = shared.hear(reader, early).err().unwrap_or(Lost::Closed);
                cutter.cut();
                let mut state = shared.lock();
                state.lost = Some(Arc::new(lost));
                // Whoever waits is woken by that.
                state.waiting.clear();
            };
            std::thread::Builder::new()
                .name("nbd-replies".into())
                .spawn(hear)
                .map_err(|source| ClientError::Connect { at: at.into(), source })?
        };
        Ok(Self { session: *session, shared, writer: Mutex::new(writer), listening: Some(listening), cutter })
    }

    /// What was agreed upon.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Fills `into` from there.
    pub fn read(&self, offset: u64, into: Vec<u8>) -> Result<Vec<u8>, ClientError> {
        let command = Command::Read { offset, length: into.len() as u32 };
        self.ask(command, &[], into, "read").map(|it| it.1)
    }

    /// Writes these bytes there.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ClientError> {
        let command = Command::Write { offset, length: bytes.len() as u32, fua: false };
        self.ask(command, bytes, Vec::new(), "write").map(drop)
    }

    /// Has the server do something that has no data.
    pub fn tell(&self, command: Command) -> Result<Answer, ClientError> {
        let what = match command {
            Command::Flush => "put everything on its disk",
            Command::Trim { .. } => "give back space",
            Command::WriteZeroes { .. } => "write zeroes",
            Command::BlockStatus { .. } => "tell what is allocated",
            _ => "do what it is asked for",
        };
        self.ask(command, &[], Vec::new(), what).map(|it| it.0)
    }

    fn ask(
        &self,
        command: Command,
        payload: &[u8],
        into: Vec<u8>,
        what: &'static str,
    ) -> Result<(Answer, Vec<u8>), ClientError> {
        let (tell, told) = sync_channel(1);
        let mut header = Vec::with_capacity(32);
        {
            // Headers go out in the order in which they were made, each with its payload.
            let mut writer = self.writer.lock().expect("nobody panics with this lock");
            let mut state = self.shared.lock();
            if let Some(lost) = &state.lost {
                return Err(ClientError::Lost(Arc::clone(lost)));
            }
            let cookie = state.replies.ask(command, &mut header);
            state.waiting.insert(cookie, Waiting { into, tell });
            drop(state);
            if writer.write_all_vectored(&mut [IoSlice::new(&header), IoSlice::new(payload)]).is_err() {
                // The thread that hears tells why.
                self.cutter.cut();
            }
        }
        match told.recv() {
            Ok((Ok(answer), bytes)) => Ok((answer, bytes)),
            Ok((Err(source), _)) => Err(ClientError::Failed { what, source }),
            Err(_) => {
                let lost = self.shared.lock().lost.clone();
                Err(ClientError::Lost(lost.expect("nobody else drops those who wait")))
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut last = Vec::new();
        Command::Disconnect.encode(0, self.session.headers, &mut last);
        let writer = self.writer.get_mut().expect("nobody panics with this lock");
        let _ = writer.write_all_vectored(&mut [IoSlice::new(&last)]);
        let _ = writer.end();
        self.cutter.cut();
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics with this lock")
    }

    /// Until the connection ends.
    fn hear(&self, mut reader: ReadHalf, early: Vec<u8>) -> Result<(), Lost> {
        // It grows to the longest chunk that has to be there as a whole, which its limits bound.
        let (mut bytes, mut begin, mut end) = (early, 0, 0);
        end += bytes.len();
        bytes.resize(READ_AT_ONCE.max(end), 0);
        loop {
            let mut input = &bytes[begin..end];
            let event = self.lock().replies.next(&mut input)?;
            begin = end - input.len();
            match event {
                Event::Heard => {}
                Event::Incomplete => {
                    bytes.copy_within(begin..end, 0);
                    (begin, end) = (0, end - begin);
                    if end == bytes.len() {
                        bytes.resize(2 * end, 0);
                    }
                    match reader.read(&mut bytes[end..])? {
                        0 => return Ok(()),
                        count => end += count,
                    }
                }
                Event::Data { cookie, at, length } => {
                    let mut into = self.borrow(cookie);
                    let room = &mut into[at..at + length];
                    let here = length.min(end - begin);
                    room[..here].copy_from_slice(&bytes[begin..begin + here]);
                    begin += here;
                    reader.read_exact(&mut room[here..])?;
                    self.give_back(cookie, into);
                }
                Event::Zeroes { cookie, at, length } => {
                    let mut into = self.borrow(cookie);
                    into[at..at + length].fill(0);
                    self.give_back(cookie, into);
                }
                Event::Finished { cookie, answer } => {
                    if let Some(waiting) = self.lock().waiting.remove(&cookie) {
                        let _ = waiting.tell.send((answer, waiting.into));
                    }
                }
            }
        }
    }

    fn borrow(&self, cookie: u64) -> Vec<u8> {
        let mut state = self.lock();
        std::mem::take(&mut state.waiting.get_mut(&cookie).expect("whoever asks waits until it is finished").into)
    }

    fn give_back(&self, cookie: u64, into: Vec<u8>) {
        self.lock().waiting.get_mut(&cookie).expect("whoever asks waits until it is finished").into = into;
    }
}
