//! Bytes that no decent peer would send, against the state machines and both ends.
//!
//! What is kept in tests/corpus is changed at random, from a seed; what makes something happen that did not happen before is
//! changed further. A few seconds each time the tests run; `VMFERRY_FUZZ_SECONDS=2400` for ten minutes each, `VMFERRY_FUZZ_KEEP=1` to
//! keep what was found.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_link::Channel;
use vmferry_nbd::backend::Memory;
use vmferry_nbd::client::Client;
use vmferry_nbd::handshake::{Asking, Offer, Offering, Outcome, Step, Wish};
use vmferry_nbd::server::{Served, Server};
use vmferry_nbd::transmission::{Command, Decoded, Event};
use vmferry_nbd::{Abilities, BlockSizes, Export};

const SIZE: usize = 1 << 20;
/// No more are kept.
const MOST: usize = 400;

/// Changes what there is, and keeps what is new, until time is up. `act` says what happened.
fn fuzz(corpus: &str, seed: u64, share: f64, mut act: impl FnMut(&[u8]) -> u64) -> u64 {
    let seconds = std::env::var("VMFERRY_FUZZ_SECONDS").map_or(4.0, |it| it.parse().expect("a number of seconds"));
    let keep = std::env::var_os("VMFERRY_FUZZ_KEEP").is_some();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(corpus);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut kept: Vec<Vec<u8>> =
        std::fs::read_dir(&folder).unwrap().map(|it| std::fs::read(it.unwrap().path()).unwrap()).collect();
    assert!(!kept.is_empty(), "{} has nothing to begin with", folder.display());
    let mut known: HashSet<u64> = kept.iter().map(|it| act(it)).collect();
    let until = Instant::now() + Duration::from_secs_f64(seconds * share);
    let mut rounds = 0;
    while Instant::now() < until {
        let changed = change(&kept, &mut random);
        rounds += 1;
        if known.insert(act(&changed)) && kept.len() < MOST {
            if keep {
                std::fs::write(folder.join(format!("{seed:x}-{rounds}")), &changed).unwrap();
            }
            kept.push(changed);
        }
    }
    println!("{corpus}: {rounds} rounds, {} kinds of outcomes", known.len());
    rounds
}

fn change(kept: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    const NUMBERS: [u64; 10] = [0, 1, 7, 511, 512, 4096, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];
    let mut bytes = kept[random.usize(..kept.len())].clone();
    for _ in 0..random.usize(1..6) {
        let at = random.usize(..=bytes.len());
        let width = [1, 2, 4, 8][random.usize(..4)];
        match random.u8(..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.u8(..8),
            1 if at < bytes.len() => bytes[at] = random.u8(..),
            2 if at + width <= bytes.len() => {
                let number = NUMBERS[random.usize(..NUMBERS.len())].to_be_bytes();
                bytes[at..at + width].copy_from_slice(&number[8 - width..]);
            }
            3 => bytes.truncate(at),
            4 => {
                let other = &kept[random.usize(..kept.len())];
                let from = random.usize(..=other.len());
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            5 => {
                let end = (at + random.usize(..64)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                let end = (at + random.usize(..64)).min(bytes.len());
                bytes.drain(at..end);
            }
        }
    }
    bytes.truncate(64 << 10);
    bytes
}

fn offer() -> Arc<Offer> {
    let export = |name: &str| Export {
        name: name.into(),
        description: String::new(),
        size: SIZE as u64,
        abilities: abilities(),
        blocks: BlockSizes::DEFAULT,
    };
    Arc::new(Offer { exports: vec![export("disk"), export("other")], tls: false })
}

/// Of a disk of ours.
fn abilities() -> Abilities {
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| server().serve(Channel::over(there)));
        Client::over(Channel::over(here), "here", None, "disk").unwrap().session().export.abilities
    })
}

fn server() -> Server {
    let served =
        |name: &str| Served { name: name.into(), description: String::new(), backend: Arc::new(Memory::new(SIZE)) };
    Server::new(vec![served("disk"), served("other")], None)
}

fn kind<T: std::fmt::Debug>(of: &T) -> String {
    format!("{of:?}").split(|it: char| !it.is_alphanumeric()).take(3).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_servers_machines_take_any_bytes() {
    let offer = offer();
    let act = |bytes: &[u8]| {
        let (mut happened, mut out) = (DefaultHasher::new(), Vec::new());
        let mut offering = Offering::begin(Arc::clone(&offer), &mut out);
        let mut input = bytes;
        let outcome = offering.receive(&mut input, &mut out);
        // Which answers came, without their texts.
        out.chunks(20).map(|it| it.get(12..16)).collect::<Vec<_>>().hash(&mut happened);
        kind(&outcome).hash(&mut happened);
        if let Ok(Outcome::Go { session, .. }) = outcome {
            while let Ok(decoded) = session.decode(input) {
                kind(&decoded).hash(&mut happened);
                let skip = match decoded {
                    Decoded::Incomplete => break,
                    Decoded::Request { command, .. } => {
                        let (offset, length) = command.range();
                        assert!(offset.checked_add(length).is_some_and(|end| end <= SIZE as u64));
                        command.payload()
                    }
                    Decoded::Refused(refusal) => refusal.discard,
                };
                input = &input[(session.request_header() + skip as usize).min(input.len())..];
            }
        }
        happened.finish()
    };
    fuzz("to-server", fastrand::u64(..), 0.25, act);
}

#[test]
fn the_clients_machines_take_any_bytes() {
    let act = |bytes: &[u8]| {
        let (mut happened, mut out) = (DefaultHasher::new(), Vec::new());
        let mut input = bytes;
        let step = Asking::new(Wish::Use("disk".into()), false).receive(&mut input, &mut out);
        kind(&step).hash(&mut happened);
        let Ok(Step::Agreed(session)) = step else { return happened.finish() };
        let mut replies = session.replies();
        replies.ask(Command::Read { offset: 4096, length: 8192 }, &mut out);
        replies.ask(Command::Flush, &mut out);
        if session.allocation.is_some() {
            replies.ask(Command::BlockStatus { offset: 0, length: SIZE as u64, one: false }, &mut out);
        }
        while let Ok(event) = replies.next(&mut input) {
            kind(&event).hash(&mut happened);
            match event {
                Event::Incomplete => break,
                Event::Data { at, length, .. } | Event::Zeroes { at, length, .. } if at + length > 8192 => {
                    panic!("data beyond the end of what was asked for")
                }
                Event::Data { length, .. } => input = &input[length.min(input.len())..],
                _ => {}
            }
        }
        happened.finish()
    };
    fuzz("to-client", fastrand::u64(..), 0.25, act);
}

#[test]
fn our_server_outlives_any_bytes() {
    let server = server();
    let act = |bytes: &[u8]| {
        let (mut here, there) = UnixStream::pair().unwrap();
        let mut said = Vec::new();
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| server.serve(Channel::over(there)));
            let mut reading = here.try_clone().unwrap();
            let read = scope.spawn(move || {
                let mut said = Vec::new();
                let _ = reading.read_to_end(&mut said);
                said
            });
            let _ = here.write_all(bytes);
            let _ = here.shutdown(std::net::Shutdown::Write);
            let _ = serving.join().expect("the server does not panic");
            said = read.join().unwrap();
        });
        // What it says tells what happened; not how long it is.
        let mut happened = DefaultHasher::new();
        said.get(18..)
            .unwrap_or_default()
            .chunks(20)
            .take(40)
            .map(|it| it.get(12..16))
            .collect::<Vec<_>>()
            .hash(&mut happened);
        happened.finish()
    };
    fuzz("to-server", fastrand::u64(..), 0.25, act);
}

#[test]
fn our_client_outlives_any_bytes() {
    let act = |bytes: &[u8]| {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut happened = DefaultHasher::new();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut heard = there.try_clone().unwrap();
                let _ = there.write_all(bytes);
                let _ = there.shutdown(std::net::Shutdown::Write);
                let _ = heard.read_to_end(&mut Vec::new());
            });
            match Client::over(Channel::over(here), "here", None, "disk") {
                Ok(client) => {
                    kind(&client.read(4096, vec![0; 8192]).map(drop)).hash(&mut happened);
                    kind(&client.tell(Command::Flush)).hash(&mut happened);
                }
                Err(error) => kind(&error).hash(&mut happened),
            }
        });
        happened.finish()
    };
    fuzz("to-client", fastrand::u64(..), 0.25, act);
}

/// Writes what fuzzing begins with: what our two ends say to each other. `cargo test --test fuzz -- --ignored`.
#[test]
#[ignore = "makes the corpus anew"]
fn the_corpus_is_made() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let (here, client_side) = UnixStream::pair().unwrap();
    let (server_side, there) = UnixStream::pair().unwrap();
    let record = |from: &UnixStream, to: &UnixStream, path: std::path::PathBuf| {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        move || {
            let (mut all, mut bytes) = (Vec::new(), vec![0; 65536]);
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                all.extend(&bytes[..count]);
                let _ = to.write_all(&bytes[..count]);
            }
            let _ = to.shutdown(std::net::Shutdown::Write);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, all).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| server().serve(Channel::over(there)));
        scope.spawn(record(&client_side, &server_side, corpus.join("to-server/ours")));
        scope.spawn(record(&server_side, &client_side, corpus.join("to-client/ours")));
        let client = Client::over(Channel::over(here), "here", None, "disk").unwrap();
        client.read(4096, vec![0; 8192]).unwrap();
        client.tell(Command::Flush).unwrap();
        client.tell(Command::BlockStatus { offset: 0, length: SIZE as u64, one: false }).unwrap();
        client.write(512, &[7; 512]).unwrap();
        client.tell(Command::WriteZeroes { offset: 0, length: 4096, fua: true, may_punch: true, fast: true }).unwrap();
        client.tell(Command::Trim { offset: 0, length: 4096, fua: false }).unwrap();
        client.tell(Command::Cache { offset: 0, length: 4096 }).unwrap();
        drop(client);
    });
}
