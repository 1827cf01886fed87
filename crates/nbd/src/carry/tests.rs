use std::io;
use std::net::TcpListener;
use std::sync::Arc;

use vmferry_link::{
    Link, LinkOptions, Protection, SessionId, SessionKey, SessionOptions, Sessions, TcpDialer, Unattached,
};

use super::carrier::GRANULE;
use super::words::{Body, DO, HEAD, Request, What, decode_answer, encode_answer};
use super::*;
use crate::backend::{Access, Backend, File, Memory, Zeroing};
use crate::blocks::{GRAIN, GRAINS};
use crate::known::{Base, Bases, Offered};
use crate::transmission::Extent;

const MIB: u64 = 1 << 20;

/// Both ends of a plain link over the loopback address.
pub(crate) fn links() -> (Link, Link) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let sessions = Sessions::new();
    let options = LinkOptions::new(SessionId::random(), SessionKey::random());
    let streams = options.streams;
    let there = sessions.expect(SessionOptions { link: options.clone(), protection: Protection::Plain }).unwrap();
    std::thread::spawn(move || {
        for tcp in listener.incoming().take(usize::from(streams) + 1) {
            let (sessions, stream) = (sessions.clone(), Unattached::plain(tcp.unwrap()));
            std::thread::spawn(move || sessions.attach(stream));
        }
    });
    (Link::connect(TcpDialer::plain(&address), options).unwrap(), there)
}

fn carried(disks: Vec<Box<dyn Backend>>) -> (Arc<Carrier>, std::thread::JoinHandle<Result<(), LandError>>) {
    let (here, there) = links();
    let disks = disks.into_iter().map(|disk| Landing { disk, bases: Bases::default() }).collect();
    let landing = std::thread::spawn(move || land(&there, disks));
    (Carrier::begin(here).unwrap(), landing)
}

fn landing(disk: impl Backend) -> Landing {
    Landing { disk: Box::new(disk), bases: Bases::default() }
}

fn file(size: u64) -> (tempfile::NamedTempFile, Box<dyn Backend>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    let image = File::open(file.path(), Access::Write).unwrap();
    (file, Box::new(image))
}

fn allocated(file: &tempfile::NamedTempFile) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap()) * 512
}

#[test]
fn what_is_done_here_is_done_there_and_what_is_zero_stays_thin() {
    let (file, image) = file(64 * MIB);
    let (carrier, landing) = carried(vec![image]);
    let disk = carrier.disk(0, 64 * MIB, true);
    let punch = Zeroing { may_punch: true, fast: false };
    disk.write_zeroes(0, 64 * MIB, Zeroing { may_punch: false, fast: false }).unwrap();
    assert_eq!(disk.status(0, 64 * MIB, 9).unwrap(), [Extent::hole(64 * MIB)]);
    assert_eq!(allocated(&file), 0, "nothing was sent of it");
    let data: Vec<u8> = (0..5 * MIB).map(|at| (at % 251 + 1) as u8).collect();
    disk.write(3 * MIB + 512, &data).unwrap();
    disk.write_zeroes(4 * MIB, 2 * MIB, punch).unwrap();
    disk.trim(10 * MIB, 50 * MIB).unwrap();
    disk.flush().unwrap();
    let told = disk.status(0, 16 * MIB, 9).unwrap();
    assert_eq!(told[..2], [Extent::hole(3 * MIB), Extent::data(5 * MIB + GRANULE)]);
    carrier.let_go(0).unwrap();
    assert!(disk.write(0, &data).is_err(), "it was let go of");
    let there = std::fs::read(file.path()).unwrap();
    let mut expected = vec![0; 64 << 20];
    expected[(3 << 20) + 512..][..5 << 20].copy_from_slice(&data);
    expected[4 << 20..6 << 20].fill(0);
    assert!(there == expected);
    assert!(allocated(&file) <= 4 * MIB, "{}", allocated(&file));
    // Nobody holds it any more.
    drop(File::open(file.path(), Access::Write).unwrap());
    carrier.close().unwrap();
    landing.join().unwrap().unwrap();
}

#[test]
fn what_is_there_is_not_sent_and_the_rest_is_where_it_belongs() {
    let mut old = vec![0; 6 << 20];
    fastrand::Rng::with_seed(1).fill(&mut old);
    let mut new = old.clone();
    // Some grains are others, some are zero, and of the last MiB nothing is there.
    for grain in [0, 1, 300, 700] {
        new[grain * GRAIN + 5] ^= 1;
    }
    new[2 << 20..(2 << 20) + 5 * GRAIN].fill(0);
    fastrand::Rng::with_seed(2).fill(&mut new[5 << 20..]);
    let (file, image) = file(6 * MIB);
    let bases = Bases::new(vec![Base::new(Box::new(Memory::holding(old)), None).alike()], Arc::default());
    let (here, there) = links();
    let landed = std::thread::spawn(move || land(&there, vec![Landing { disk: image, bases }]));
    let carrier = Carrier::begin(here).unwrap();
    let disk = carrier.disk(0, 6 * MIB, true);
    // Several pieces at once, one that is too small to be asked for, and one that lies across grains.
    disk.write(0, &new[..3 << 20]).unwrap();
    disk.write(3 * MIB, &new[3 << 20..][..512]).unwrap();
    disk.write(3 * MIB + 512, &new[(3 << 20) + 512..][..100_000]).unwrap();
    disk.write(3 * MIB, &new[3 << 20..]).unwrap();
    assert_eq!(disk.sent(), 4 * GRAIN as u64 + 512 + 100_000 + MIB);
    carrier.let_go(0).unwrap();
    assert!(std::fs::read(file.path()).unwrap() == new);
    assert!(allocated(&file) <= 6 * MIB - 5 * GRAIN as u64);
    carrier.close().unwrap();
    landed.join().unwrap().unwrap();
}

#[test]
fn zeroes_are_written_to_a_target_that_was_not_new() {
    let (file, image) = file(4 * MIB);
    image.write(0, &vec![7; 4 << 20]).unwrap();
    let (carrier, _landing) = carried(vec![image]);
    let disk = carrier.disk(0, 4 * MIB, false);
    disk.write_zeroes(MIB, MIB, Zeroing { may_punch: false, fast: false }).unwrap();
    assert_eq!(disk.status(0, 4 * MIB, 9).unwrap(), [Extent::data(4 * MIB)]);
    let there = std::fs::read(file.path()).unwrap();
    assert!(there[1 << 20..2 << 20].iter().all(|byte| *byte == 0) && there[(1 << 20) - 1] == 7);
}

#[test]
fn what_the_other_end_cannot_do_fails_here_with_its_words() {
    let (carrier, _landing) =
        carried(vec![Box::new(Memory::new(8 << 20).with_room(0)), Box::new(Memory::new(1 << 20))]);
    let disk = carrier.disk(0, 8 * MIB, true);
    let error = disk.write(0, &vec![1; 3 << 20]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert!(error.to_string().contains("no room there"), "{error}");
    let short = carrier.disk(1, 2 * MIB, true);
    assert!(short.write(2 * MIB - 512, &[1; 512]).unwrap_err().to_string().contains("beyond the end"));
    short.write(0, &[1; 512]).unwrap();
    assert!(short.read(0, &mut [0; 512]).is_err());
}

#[test]
fn when_the_link_ends_whoever_waits_is_told() {
    let (here, there) = links();
    let carrier = Carrier::begin(here).unwrap();
    let disk = carrier.disk(0, MIB, true);
    let waits = std::thread::spawn(move || disk.write(0, &[1; 512]));
    // Nobody serves it.
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!waits.is_finished());
    drop(there);
    assert_eq!(waits.join().unwrap().unwrap_err().kind(), io::ErrorKind::NotConnected);
    assert!(carrier.let_go(0).is_err());
}

#[test]
fn what_is_no_request_ends_the_link() {
    let good = Request { disk: 0, number: 1, what: What::Write, offset: 0, length: 4 }.encode(&[0; 4]);
    let other_disk = Request { disk: 9, number: 1, what: What::Flush, offset: 0, length: 0 }.encode(&[]);
    let (mut other_word, mut longer) = (good.clone(), good.clone());
    other_word[10] = 9;
    longer.push(0);
    let body = |what, length, data: &[u8]| Request { disk: 0, number: 1, what, offset: 0, length }.encode(data);
    let offered = Offered::of(&vec![1; 5000]);
    let mut offer = Vec::new();
    offered.write(&mut offer);
    let (second, rest) = ([&[2][..], &[0; GRAINS - 1]].concat(), vec![7; 904]);
    assert!(Request::decode(&body(What::Offer, 5000, &offer)).is_some());
    assert!(Request::decode(&body(What::Rest, 5000, &[&second[..], &rest].concat())).is_some());
    let hostile = [
        body(What::Offer, GRAIN as u64, &offer),
        body(What::Offer, u64::MAX, &offer),
        body(What::Offer, 5000, &offer[..offer.len() - 1]),
        body(What::Rest, 5001, &[&second[..], &rest].concat()),
        body(What::Rest, GRAIN as u64, &second),
        body(What::Rest, u64::MAX, &[&[0xff; GRAINS][..], &vec![0; 1 << 20]].concat()),
        body(What::Rest, 5000, &second[1..]),
    ];
    let others = [&good[..HEAD - 1], &good[..HEAD + 3], &other_word, &longer, &other_disk];
    for bad in others.into_iter().chain(hostile.iter().map(|it| &it[..])) {
        let (here, there) = links();
        let landed = std::thread::spawn(move || land(&there, vec![landing(Memory::new(1 << 20))]));
        here.send(DO, bad.to_vec()).unwrap();
        assert!(matches!(landed.join().unwrap(), Err(LandError::NoRequest)), "{bad:?}");
    }
}

#[test]
fn requests_and_answers_are_read_as_they_were_written() {
    for what in [
        What::Write,
        What::Zero(Zeroing { may_punch: true, fast: false }),
        What::Zero(Zeroing { may_punch: false, fast: true }),
        What::Trim,
        What::Flush,
        What::LetGo,
    ] {
        let request = Request { disk: 3, number: 1 << 40, what, offset: 77, length: 2 };
        let data: &[u8] = if what == What::Write { &[1, 2] } else { &[] };
        assert_eq!(Request::decode(&request.encode(data)), Some((request, Body::Data(data))));
    }
    let lacking = [7; GRAINS];
    assert_eq!(decode_answer(&encode_answer(9, &Ok(lacking))).map(|it| (it.0, it.1.unwrap())), Some((9, lacking)));
    let (number, result) = decode_answer(&encode_answer(9, &Err(io::Error::other("it is broken")))).unwrap();
    assert!(number == 9 && result.unwrap_err().words == "it is broken");
    assert!(decode_answer(&encode_done(9, &Ok(()))).is_none());
    let (number, result) = decode_done(&encode_done::<()>(7, &Err(io::Error::other("a\nb")))).unwrap();
    assert_eq!((number, result.unwrap_err().words.as_str()), (7, "a b"));
    assert!(decode_done(&encode_done(7, &Ok(()))).unwrap().1.is_ok());
    assert!(decode_done(&[0; 11]).is_none());
}
