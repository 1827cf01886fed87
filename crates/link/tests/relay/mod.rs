//! A long way between two agents: what is said arrives a while later, and no faster than the way carries.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// What is taken from a connection at once, in bytes.
const PIECE: usize = 64 << 10;
/// The queue before the way holds what it carries in this time; what comes then waits at its sender.
const QUEUE: Duration = Duration::from_millis(50);

/// One direction, which all connections share.
struct Way {
    /// From one end to the other.
    delay: Duration,
    /// Bytes a second.
    rate: f64,
    /// When all that was let in has left the queue.
    free: Mutex<Instant>,
}

impl Way {
    /// Lets so many bytes in, when there is room; gives back when they arrive.
    fn take(&self, bytes: usize) -> Instant {
        let (now, mut free) = (Instant::now(), self.free.lock().unwrap());
        *free = (*free).max(now) + Duration::from_secs_f64(bytes as f64 / self.rate);
        let (queued, arrives) = (*free - now, *free + self.delay);
        drop(free);
        thread::sleep(queued.saturating_sub(QUEUE));
        arrives
    }
}

/// What is on its way, and when it arrives; nothing is its end.
#[derive(Default)]
struct OnItsWay {
    pieces: Mutex<VecDeque<(Instant, Option<Vec<u8>>)>>,
    more: Condvar,
}

/// Relays connections to this address over a way that takes so long there and back, and carries so many bytes a second.
/// Gives back where it listens.
pub(crate) fn relay(server: &str, round_trip: Duration, rate: f64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let way = || Arc::new(Way { delay: round_trip / 2, rate, free: Mutex::new(Instant::now()) });
    let (server, ways) = (server.to_owned(), [way(), way()]);
    thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, TcpStream::connect(&server)) else { return };
            let again = |stream: &TcpStream| stream.try_clone().unwrap();
            for (way, from, to) in [(&ways[0], again(&client), again(&server)), (&ways[1], server, client)] {
                to.set_nodelay(true).unwrap();
                carry(Arc::clone(way), from, to);
            }
        }
    });
    address
}

fn carry(way: Arc<Way>, mut from: TcpStream, mut to: TcpStream) {
    let under_way = Arc::new(OnItsWay::default());
    let arriving = Arc::clone(&under_way);
    thread::spawn(move || {
        loop {
            let mut piece = vec![0; PIECE];
            let length = from.read(&mut piece).unwrap_or(0);
            piece.truncate(length);
            let arrives = way.take(length);
            under_way.pieces.lock().unwrap().push_back((arrives, (length > 0).then_some(piece)));
            under_way.more.notify_one();
            if length == 0 {
                return;
            }
        }
    });
    thread::spawn(move || {
        loop {
            let pieces = arriving.more.wait_while(arriving.pieces.lock().unwrap(), |pieces| pieces.is_empty());
            let (arrives, piece) = pieces.unwrap().pop_front().expect("there is one");
            thread::sleep(arrives.saturating_duration_since(Instant::now()));
            let Some(piece) = piece else { break };
            if to.write_all(&piece).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
