//! What a link carries between two hosts that are far from each other.

mod relay;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use vmferry_link::{
    Link, LinkOptions, Protection, SessionId, SessionKey, SessionOptions, Sessions, TcpDialer, Unattached,
};

use relay::relay;

const MIB: usize = 1 << 20;

/// Both ends of a plain link over such a way.
fn far_apart(round_trip: Duration, rate: f64, streams: u8, window: usize) -> (Link, Link) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = relay(&listener.local_addr().unwrap().to_string(), round_trip, rate);
    let sessions = Sessions::new();
    let options = LinkOptions { streams, window, ..LinkOptions::new(SessionId::random(), SessionKey::random()) };
    let there = sessions.expect(SessionOptions { link: options.clone(), protection: Protection::Plain }).unwrap();
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let (sessions, stream) = (sessions.clone(), Unattached::plain(tcp.unwrap()));
            std::thread::spawn(move || sessions.attach(stream));
        }
    });
    (Link::connect(TcpDialer::plain(&address), options).unwrap(), there)
}

/// How many bytes a second arrive, from a second after the first on.
fn carries(round_trip: Duration, rate: f64, streams: u8, window: usize) -> f64 {
    let (here, there) = far_apart(round_trip, rate, streams, window);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // What does not get smaller on its way.
            let payload: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(256 << 10).collect();
            while here.send(1, payload.clone()).is_ok() {}
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) {
            there.recv().unwrap();
        }
        let (begun, mut bytes) = (Instant::now(), 0);
        while begun.elapsed() < Duration::from_secs(2) {
            bytes += there.recv().unwrap().map_or(0, |frame| frame.payload.len());
        }
        let carried = bytes as f64 / begun.elapsed().as_secs_f64();
        here.give_up();
        carried
    })
}

#[test]
fn a_long_way_is_filled_by_windows_that_hold_what_is_under_way_and_by_no_smaller_ones() {
    let (round_trip, rate) = (Duration::from_millis(80), 100e6);
    for (streams, window) in [(4, 8 * MIB), (1, 32 * MIB)] {
        let carried = carries(round_trip, rate, streams, window);
        assert!(carried > 0.85 * rate, "{carried} of {rate} by {streams} streams");
    }
    // It holds half of what is under way.
    let carried = carries(round_trip, rate, 1, 4 * MIB + 1024);
    assert!(carried < 0.65 * rate, "{carried} of {rate}: the way is no long one");
}

#[test]
#[ignore = "prints figures"]
fn what_a_long_way_carries() {
    for (millis, rate) in [(0, 125e6), (40, 125e6), (40, 250e6), (80, 125e6), (0, 500e6), (40, 500e6)] {
        for window in [8 * MIB, 32 * MIB] {
            let carried = carries(Duration::from_millis(millis), rate, 4, window);
            println!(
                "{millis} ms, {:.0} MB/s, {} MiB a stream: {:.0} MB/s, {:.2}",
                rate / 1e6,
                window / MIB,
                carried / 1e6,
                carried / rate
            );
        }
    }
}
