//! What a link does when the network, or somebody on it, does its worst. Streams run over loopback through a proxy
//! that can cut connections, refuse new ones, and change bytes.

mod proxy;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proxy::Proxy;
use vmferry_link::{
    Acceptor, Arrival, Compression, Frame, Identity, Link, LinkDown, LinkOptions, Method, Protection, Reason, Refusal,
    SessionId, SessionKey, SessionOptions, Sessions, TcpDialer, Unattached, hello,
};

const MIB: usize = 1 << 20;

/// An agent's port: whatever comes is attached.
struct Port {
    sessions: Sessions,
    address: String,
    refusals: std::sync::mpsc::Receiver<Refusal>,
}

impl Port {
    fn open(identity: &Identity) -> Self {
        let (sessions, acceptor) = (Sessions::new(), Acceptor::new(identity, None));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (refused, refusals) = std::sync::mpsc::channel();
        let port = Self { sessions: sessions.clone(), address, refusals };
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                while let Ok((tcp, _)) = listener.accept().await {
                    let (acceptor, sessions, refused) = (acceptor.clone(), sessions.clone(), refused.clone());
                    tokio::spawn(async move {
                        let arrival = acceptor.accept_any(tcp, Duration::from_secs(5)).await;
                        let Ok(Arrival::Stream(stream)) = arrival else { return };
                        let attached = tokio::task::spawn_blocking(move || sessions.attach(*stream)).await.unwrap();
                        if let Err(refusal) = attached {
                            let _ = refused.send(refusal);
                        }
                    });
                }
            });
        });
        port
    }

    fn refusal(&self) -> Refusal {
        self.refusals.recv_timeout(Duration::from_secs(10)).expect("a stream is refused")
    }
}

struct Agents {
    alpha: Identity,
    beta: Identity,
    mallory: Identity,
    _dir: tempfile::TempDir,
}

fn agents() -> Agents {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| Identity::load_or_make(&dir.path().join(name), name).unwrap();
    Agents { alpha: make("alpha"), beta: make("beta"), mallory: make("mallory"), _dir: dir }
}

fn options() -> LinkOptions {
    LinkOptions { patience: Duration::from_secs(20), ..LinkOptions::new(SessionId::random(), SessionKey::random()) }
}

/// Two ends of a link, and what lies between them.
struct Pair {
    alpha: Arc<Link>,
    beta: Arc<Link>,
    proxy: Proxy,
    _port: Port,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Security {
    Tls,
    Plain,
}

fn pair(security: Security, options: LinkOptions) -> Pair {
    let agents = agents();
    let port = Port::open(&agents.beta);
    let proxy = Proxy::to(&port.address);
    let protection = match security {
        Security::Tls => Protection::Tls(agents.alpha.fingerprint()),
        Security::Plain => Protection::Plain,
    };
    let beta = port.sessions.expect(SessionOptions { link: options.clone(), protection }).unwrap();
    let dialer = match security {
        Security::Tls => TcpDialer::tls(&proxy.address, &agents.alpha, agents.beta.fingerprint(), None),
        Security::Plain => TcpDialer::plain(&proxy.address),
    };
    let alpha = Link::connect(dialer, options).unwrap();
    Pair { alpha: Arc::new(alpha), beta: Arc::new(beta), proxy, _port: port }
}

/// A frame that tells its number and whose bytes can be checked.
fn numbered(number: u64, length: usize) -> Bytes {
    let mut bytes = number.to_be_bytes().to_vec();
    bytes.extend((8..length).map(|at| (number as usize * 31 + at * 7) as u8));
    bytes.into()
}

fn number(frame: &Frame) -> u64 {
    let number = u64::from_be_bytes(frame.payload[..8].try_into().unwrap());
    assert_eq!(frame.payload, numbered(number, frame.payload.len()), "frame {number} is not what was sent");
    number
}

fn send_numbered(link: &Arc<Link>, count: u64, length: usize) -> std::thread::JoinHandle<Result<(), LinkDown>> {
    let link = Arc::clone(link);
    std::thread::spawn(move || {
        for number in 0..count {
            link.send(number as u16, numbered(number, length))?;
        }
        link.flush()
    })
}

/// Takes so many frames and makes sure that they are the numbers from 0 on, each once.
fn take_numbered(link: &Arc<Link>, count: u64) -> std::thread::JoinHandle<()> {
    let link = Arc::clone(link);
    std::thread::spawn(move || {
        let mut seen = vec![false; count as usize];
        for _ in 0..count {
            let frame = link.recv().unwrap().expect("the link is not at its end");
            let number = number(&frame);
            assert_eq!(frame.kind, number as u16);
            assert!(!std::mem::replace(&mut seen[number as usize], true), "frame {number} came twice");
        }
    })
}

#[test]
fn frames_arrive_whole_and_once_in_both_directions_and_the_end_is_seen_as_one() {
    for (security, method) in
        [(Security::Tls, Method::None), (Security::Plain, Method::Lz4), (Security::Tls, Method::Zstd(1))]
    {
        let pair = pair(security, LinkOptions { compression: Compression::Fixed(method), ..options() });
        let both = [send_numbered(&pair.alpha, 200, 100_000), send_numbered(&pair.beta, 300, 50_000)];
        let taking = [take_numbered(&pair.beta, 200), take_numbered(&pair.alpha, 300)];
        for thread in taking {
            thread.join().unwrap();
        }
        for thread in both {
            thread.join().unwrap().unwrap();
        }
        let stats = pair.alpha.stats();
        assert!(stats.streams.iter().all(|stream| stream.protected == Some(security == Security::Tls)));
        assert_eq!((stats.raw_sent, stats.raw_received), (200 * 100_000, 300 * 50_000));
        assert_eq!(method == Method::None, stats.wire_sent >= stats.raw_sent);

        let beta = Arc::clone(&pair.beta);
        let end = std::thread::spawn(move || (beta.recv(), beta.recv_urgent()));
        pair.alpha.close().unwrap();
        let (bulk, urgent) = end.join().unwrap();
        assert!(matches!((bulk, urgent), (Ok(None), Ok(None))));
        assert!(matches!(pair.beta.send(1, numbered(0, 8)), Err(LinkDown::Closed)));
        pair.beta.close().unwrap();
    }
}

#[test]
fn what_was_sent_before_a_close_is_taken_before_the_end_is_seen() {
    let pair = pair(Security::Tls, options());
    for number in 0..50 {
        pair.alpha.send(1, numbered(number, 1000)).unwrap();
    }
    pair.alpha.send_urgent(2, numbered(50, 8)).unwrap();
    let closing = std::thread::spawn({
        let alpha = Arc::clone(&pair.alpha);
        move || alpha.close()
    });
    let mut taken = Vec::new();
    while let Some(frame) = pair.beta.recv().unwrap() {
        taken.push(number(&frame));
    }
    taken.sort_unstable();
    assert_eq!(taken, (0..50).collect::<Vec<_>>());
    assert_eq!(number(&pair.beta.recv_urgent().unwrap().unwrap()), 50);
    assert!(pair.beta.recv_urgent().unwrap().is_none());
    closing.join().unwrap().unwrap();
}

#[test]
fn streams_that_are_cut_while_data_flows_lose_nothing_and_repeat_nothing_and_nobody_notices() {
    for security in [Security::Tls, Security::Plain] {
        let pair = pair(security, options());
        let sending = [send_numbered(&pair.alpha, 2000, 100_000), send_numbered(&pair.beta, 1000, 20_000)];
        let taking = [take_numbered(&pair.beta, 2000), take_numbered(&pair.alpha, 1000)];
        while !sending.iter().all(std::thread::JoinHandle::is_finished) {
            pair.proxy.cut_one();
            std::thread::sleep(Duration::from_millis(30));
        }
        for thread in sending {
            thread.join().unwrap().unwrap();
        }
        for thread in taking {
            thread.join().unwrap();
        }
        assert!(pair.alpha.stats().reconnects > 0, "the proxy cut something");
    }
}

#[test]
fn when_all_streams_are_gone_for_three_seconds_the_link_goes_on() {
    let pair = pair(Security::Tls, options());
    let sending = send_numbered(&pair.alpha, 3000, 100_000);
    let taking = take_numbered(&pair.beta, 3000);
    pair.proxy.refuse(true);
    pair.proxy.cut_all();
    std::thread::sleep(Duration::from_secs(3));
    assert!(!sending.is_finished() && !taking.is_finished(), "nothing can have passed");
    pair.proxy.refuse(false);
    sending.join().unwrap().unwrap();
    taking.join().unwrap();
    assert_eq!(pair.alpha.stats().reconnects, 5);
}

#[test]
fn when_streams_stay_away_longer_than_the_patience_both_sides_are_told() {
    let pair = pair(Security::Tls, LinkOptions { patience: Duration::from_secs(1), ..options() });
    let waiting = [Arc::clone(&pair.alpha), Arc::clone(&pair.beta)]
        .map(|link| std::thread::spawn(move || (link.recv().unwrap_err(), link.recv_urgent().unwrap_err())));
    pair.proxy.refuse(true);
    pair.proxy.cut_all();
    let begun = Instant::now();
    for thread in waiting {
        let (bulk, urgent) = thread.join().unwrap();
        assert!(matches!(bulk, LinkDown::Lost { .. }), "{bulk}");
        assert!(matches!(urgent, LinkDown::Lost { .. }), "{urgent}");
    }
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert!(matches!(pair.alpha.send(1, numbered(0, 8)), Err(LinkDown::Lost { .. })));
}

#[test]
fn a_peer_that_takes_nothing_stops_the_sender_at_the_window_and_urgent_frames_still_pass() {
    let window = 5 * MIB;
    let pair = pair(Security::Tls, LinkOptions { window, streams: 2, ..options() });
    let sending = send_numbered(&pair.alpha, 200, MIB);
    std::thread::sleep(Duration::from_secs(6));
    assert!(!sending.is_finished());
    let held: usize = pair.alpha.stats().streams.iter().map(|stream| stream.held).sum();
    assert!(held <= 2 * window && held >= window, "{held}");
    assert!(pair.beta.stats().raw_received as usize <= 2 * window);
    assert_eq!(pair.alpha.stats().reconnects, 0, "a peer that takes nothing is not a dead one");
    pair.alpha.send_urgent(1, numbered(0, 8)).unwrap();
    pair.beta.recv_urgent().unwrap().unwrap();
    take_numbered(&pair.beta, 200).join().unwrap();
    sending.join().unwrap().unwrap();
}

#[test]
fn a_peer_that_is_dead_without_a_word_is_noticed_within_five_seconds() {
    let pair = pair(Security::Tls, LinkOptions { patience: Duration::from_millis(500), ..options() });
    let flowing = take_numbered(&pair.beta, 20);
    send_numbered(&pair.alpha, 20, 100_000).join().unwrap().unwrap();
    flowing.join().unwrap();
    pair.proxy.swallow(true);
    let begun = Instant::now();
    let alpha = Arc::clone(&pair.alpha);
    // One that keeps sending, so that the window and the kernel's buffers fill.
    let sending = std::thread::spawn(move || while alpha.send(1, numbered(0, MIB)).is_ok() {});
    let error = pair.alpha.recv().unwrap_err();
    assert!(matches!(error, LinkDown::Lost { .. }), "{error}");
    sending.join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[test]
fn a_link_that_is_dropped_tells_the_other_side_at_once() {
    let pair = pair(Security::Tls, options());
    drop(Arc::into_inner(pair.alpha));
    let begun = Instant::now();
    let error = pair.beta.recv().unwrap_err();
    assert!(matches!(error, LinkDown::PeerGaveUp), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_session_that_is_gone_is_not_dialled_again_and_again() {
    let pair = pair(Security::Tls, options());
    pair.proxy.swallow(true);
    drop(Arc::into_inner(pair.beta));
    std::thread::sleep(Duration::from_millis(200));
    pair.proxy.cut_all();
    pair.proxy.swallow(false);
    let error = pair.alpha.recv().unwrap_err();
    let LinkDown::Refused { refusal, .. } = error else { panic!("{error}") };
    assert_eq!(refusal.reason, Reason::UnknownSession);
}

#[test]
fn a_byte_that_is_changed_on_a_plain_stream_is_noticed_and_the_frame_is_sent_again() {
    let pair = pair(Security::Plain, LinkOptions { compression: Compression::Fixed(Method::None), ..options() });
    let sending = send_numbered(&pair.alpha, 1000, 100_000);
    let taking = take_numbered(&pair.beta, 1000);
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(20));
        pair.proxy.change_a_byte();
    }
    sending.join().unwrap().unwrap();
    taking.join().unwrap();
    assert!(pair.alpha.stats().reconnects > 0);
}

#[test]
fn who_hears_the_last_word_and_leaves_at_once_has_heard_it() {
    for _ in 0..10 {
        let pair = pair(Security::Tls, options());
        let beta = Arc::clone(&pair.beta);
        let answering = std::thread::spawn(move || {
            while let Some(frame) = beta.recv_urgent()? {
                beta.send_urgent(frame.kind, frame.payload)?;
            }
            beta.close()
        });
        pair.alpha.send_urgent(7, Bytes::from_static(b"and your last word?")).unwrap();
        assert_eq!(pair.alpha.recv_urgent().unwrap().unwrap().kind, 7);
        pair.alpha.close().unwrap();
        answering.join().unwrap().unwrap();
    }
}

#[test]
fn a_rate_is_kept_and_can_be_changed_while_data_flows() {
    let pair = pair(Security::Tls, LinkOptions { rate: Some(20_000_000), ..options() });
    let beta = Arc::clone(&pair.beta);
    std::thread::spawn(move || while let Ok(Some(_)) = beta.recv() {});
    let alpha = Arc::clone(&pair.alpha);
    std::thread::spawn(move || while alpha.send(1, Bytes::from(vec![0; 100_000])).is_ok() {});
    pair.alpha.set_compression(Compression::Fixed(Method::None));
    let rate = |over: Duration| {
        std::thread::sleep(Duration::from_millis(300));
        let (begun, before) = (Instant::now(), pair.beta.stats().raw_received);
        std::thread::sleep(over);
        (pair.beta.stats().raw_received - before) as f64 / begun.elapsed().as_secs_f64()
    };
    let slow = rate(Duration::from_secs(1));
    assert!((14e6..23e6).contains(&slow), "{slow}");
    pair.alpha.set_rate(Some(80_000_000));
    let fast = rate(Duration::from_secs(1));
    assert!((50e6..90e6).contains(&fast), "{fast}");
    pair.alpha.set_rate(None);
    assert!(rate(Duration::from_millis(500)) > 100e6);
}

/// Why a first connection is refused.
fn refused(dialer: TcpDialer, options: LinkOptions) -> Reason {
    let error = Link::connect(dialer, options).unwrap_err();
    let LinkDown::Refused { refusal, .. } = error else { panic!("{error}") };
    refusal.reason
}

#[test]
fn nobody_joins_somebody_elses_migration() {
    let agents = agents();
    let port = Port::open(&agents.beta);
    let options = options();
    let protection = Protection::Tls(agents.alpha.fingerprint());
    let expected = port.sessions.expect(SessionOptions { link: options.clone(), protection }).unwrap();
    let dial = |identity| TcpDialer::tls(&port.address, identity, agents.beta.fingerprint(), None);

    // Another agent, though it knows everything.
    assert_eq!(refused(dial(&agents.mallory), options.clone()), Reason::Foreign);
    // The right agent, with another key.
    let wrong_key = LinkOptions { key: SessionKey::random(), ..options.clone() };
    assert_eq!(refused(dial(&agents.alpha), wrong_key), Reason::Foreign);
    // A session that does not exist.
    let unknown = LinkOptions { session: SessionId::random(), ..options.clone() };
    assert_eq!(refused(dial(&agents.alpha), unknown), Reason::UnknownSession);
    // Without TLS.
    assert_eq!(refused(TcpDialer::plain(&port.address), options.clone()), Reason::Protection);
    // A stream that the session does not have.
    let more = LinkOptions { streams: 8, ..options.clone() };
    assert_eq!(refused(dial(&agents.alpha), more), Reason::Stream);

    assert!(expected.stats().streams.iter().all(|stream| !stream.connected));
    let link = Link::connect(dial(&agents.alpha), options).unwrap();
    link.send(1, numbered(0, 8)).unwrap();
    assert_eq!(number(&expected.recv().unwrap().unwrap()), 0);
}

#[test]
fn an_encrypted_stream_is_not_taken_for_a_plain_session() {
    let agents = agents();
    let port = Port::open(&agents.beta);
    let options = options();
    let _expected =
        port.sessions.expect(SessionOptions { link: options.clone(), protection: Protection::Plain }).unwrap();
    let dialer = TcpDialer::tls(&port.address, &agents.alpha, agents.beta.fingerprint(), None);
    assert_eq!(refused(dialer, options), Reason::Protection);
}

#[test]
fn an_old_hello_is_worth_nothing_again() {
    let agents = agents();
    let port = Port::open(&agents.beta);
    let options = LinkOptions { streams: 1, ..options() };
    let session = SessionOptions { link: options.clone(), protection: Protection::Plain };
    let expected = port.sessions.expect(session).unwrap();
    let proxy = Proxy::to(&port.address);
    let link = Link::connect(TcpDialer::plain(&proxy.address), options).unwrap();
    for recorded in proxy.recorded() {
        let mut replay = TcpStream::connect(&port.address).unwrap();
        replay.write_all(&recorded).unwrap();
        let mut answer = Vec::new();
        let _ = replay.read_to_end(&mut answer);
        assert_eq!(port.refusal().reason, Reason::Foreign);
    }
    link.send(1, numbered(0, 8)).unwrap();
    assert_eq!(number(&expected.recv().unwrap().unwrap()), 0);
    assert_eq!(link.stats().reconnects, 0, "the replay disturbed nobody");
}

#[test]
fn a_newer_version_is_refused_in_words() {
    let agents = agents();
    let port = Port::open(&agents.beta);
    let mut stream = TcpStream::connect(&port.address).unwrap();
    let hello = hello::Hello {
        versions: (7, 9),
        session: SessionId::random(),
        stream: 0,
        streams: 4,
        window: 8 << 20,
        nonce: [1; 32],
    };
    stream.write_all(&hello::Message::Hello(hello).encode()).unwrap();
    let Ok(hello::Message::Refused(refusal)) = hello::Message::read(&mut stream, false) else { panic!() };
    assert_eq!(refusal.reason, Reason::Version);
    assert!(refusal.words.contains("1 to 1") && refusal.words.contains("7 to 9"), "{refusal}");
}

#[test]
fn random_bytes_and_silence_instead_of_a_hello_are_refused_in_bounded_time() {
    let sessions = Sessions::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut nothing = garbage();
    nothing.extend(b"VMFERRY\0\x01\xff\xff");
    for said in [&nothing[..8], &nothing[8..], b"", b"VMFERRY\0"] {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(said).unwrap();
        let begun = Instant::now();
        let refusal = sessions.attach(Unattached::plain(listener.accept().unwrap().0)).unwrap_err();
        assert_eq!(refusal.reason, Reason::Malformed);
        assert!(begun.elapsed() < Duration::from_secs(6));
    }
}

/// Eight bytes that are nothing.
fn garbage() -> Vec<u8> {
    vec![0x80, 0x01, 0xfe, 0x33, 0x00, 0x77, 0x91, 0x12]
}

#[test]
fn random_bytes_after_the_handshake_break_the_connection_and_not_the_link() {
    let pair = pair(Security::Plain, options());
    send_and_take(&pair, 0);
    pair.proxy.inject(&[0xa5; 500]);
    send_and_take(&pair, 1);
    send_and_take(&pair, 2);
    let until = Instant::now() + Duration::from_secs(5);
    while pair.alpha.stats().reconnects < 5 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(pair.alpha.stats().reconnects, 5);
    send_and_take(&pair, 3);
}

fn send_and_take(pair: &Pair, which: u64) {
    pair.alpha.send(1, numbered(which, 1000)).unwrap();
    assert_eq!(number(&pair.beta.recv().unwrap().unwrap()), which);
}

#[test]
fn an_urgent_frame_overtakes_bulk() {
    let pair = pair(Security::Tls, LinkOptions { rate: Some(10_000_000), ..options() });
    let alpha = Arc::clone(&pair.alpha);
    let bulk = std::thread::spawn(move || while alpha.send(1, numbered(0, MIB)).is_ok() {});
    let beta = Arc::clone(&pair.beta);
    std::thread::spawn(move || {
        while let Ok(Some(frame)) = beta.recv_urgent() {
            let _ = beta.send_urgent(frame.kind, frame.payload);
        }
    });
    let beta = Arc::clone(&pair.beta);
    let draining = std::thread::spawn(move || while let Ok(Some(_)) = beta.recv() {});
    // Megabytes wait in front of the rate by now.
    std::thread::sleep(Duration::from_millis(300));
    let mut worst = Duration::ZERO;
    for number in 0..50 {
        let begun = Instant::now();
        pair.alpha.send_urgent(1, numbered(number, 64)).unwrap();
        pair.alpha.recv_urgent().unwrap().unwrap();
        worst = worst.max(begun.elapsed());
    }
    assert!(worst < Duration::from_millis(200), "{worst:?}");
    pair.alpha.give_up();
    bulk.join().unwrap();
    draining.join().unwrap();
}

#[test]
fn both_sides_can_close_as_soon_as_they_have_what_they_wait_for() {
    for _ in 0..30 {
        let pair = pair(Security::Plain, LinkOptions { streams: 2, ..options() });
        let beta = std::thread::spawn(move || {
            let mut taken = 0;
            while pair.beta.recv().unwrap().is_some() {
                taken += 1;
            }
            pair.beta.close().unwrap();
            // As when the process ends.
            drop(pair.beta);
            taken
        });
        for number in 0..20 {
            pair.alpha.send(1, numbered(number, 10_000)).unwrap();
        }
        pair.alpha.flush().unwrap();
        pair.alpha.close().unwrap();
        assert_eq!(beta.join().unwrap(), 20);
    }
}
