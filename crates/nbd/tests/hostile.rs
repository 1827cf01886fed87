//! Clients that mean no good: each kind of attack that NBD servers have fallen to, against ours. The same server must go
//! on with those who behave.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_link::Channel;
use vmferry_nbd::backend::{Backend, Memory};
use vmferry_nbd::client::Client;
use vmferry_nbd::limits;
use vmferry_nbd::server::{Listening, Served, Server, Where};

const OPTION: &[u8; 8] = b"IHAVEOPT";

struct Bed {
    dir: tempfile::TempDir,
    listening: Option<Listening>,
}

impl Bed {
    fn new(disk: Memory) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disks = Served { name: "disk".into(), description: String::new(), backend: Arc::new(disk) };
        let server = Server::new(vec![disks], None);
        let listening = Listening::begin(server, &Where::Unix(dir.path().join("socket"))).unwrap();
        Self { dir, listening: Some(listening) }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// One that has heard the greeting and answered it.
    fn greeted(&self) -> UnixStream {
        let mut stream = self.connect();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        stream
    }

    /// One that may make requests, with structured replies and the allocation.
    fn agreed(&self) -> UnixStream {
        let mut stream = self.greeted();
        let name = [&4_u32.to_be_bytes()[..], b"disk"].concat();
        let query = [&1_u32.to_be_bytes()[..], &15_u32.to_be_bytes(), b"base:allocation"].concat();
        let options =
            [option(8, &[]), option(10, &[&name[..], &query].concat()), option(7, &[&name[..], &[0; 2]].concat())];
        stream.write_all(&options.concat()).unwrap();
        // Acks and information; the last one is the ack of GO.
        for _ in 0..6 {
            let mut header = [0; 20];
            stream.read_exact(&mut header).unwrap();
            assert_eq!(header[12] & 0x80, 0, "refused");
            let length = u32::from_be_bytes(header[16..].try_into().unwrap());
            stream.read_exact(&mut vec![0; length as usize]).unwrap();
        }
        stream
    }

    /// The server still serves who behaves.
    #[track_caller]
    fn assert_serves(&self) {
        let client = Client::over(Channel::over(self.connect()), "here", None, "disk").unwrap();
        assert_eq!(client.read(0, vec![1; 512]).unwrap(), [0; 512]);
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [&OPTION[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn request(flags: u16, kind: u16, offset: u64, length: u32) -> Vec<u8> {
    let numbers = [&0x2560_9513_u32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &[7; 8]].concat();
    [&numbers[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// The error of the reply that comes next, 0 for none; its payload is read.
fn error_of_reply(stream: &mut UnixStream) -> u32 {
    let mut magic = [0; 4];
    stream.read_exact(&mut magic).unwrap();
    if magic == 0x6744_6698_u32.to_be_bytes() {
        let mut rest = [0; 12];
        stream.read_exact(&mut rest).unwrap();
        return u32::from_be_bytes(rest[..4].try_into().unwrap());
    }
    let mut rest = [0; 16];
    stream.read_exact(&mut rest).unwrap();
    let mut payload = vec![0; u32::from_be_bytes(rest[12..].try_into().unwrap()) as usize];
    stream.read_exact(&mut payload).unwrap();
    if rest[2] & 0x80 == 0 { 0 } else { u32::from_be_bytes(payload[..4].try_into().unwrap()) }
}

/// The server closes it, whatever it says before.
#[track_caller]
fn assert_sent_away(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
}

/// The text and the kind of the answer that comes next.
fn answer(stream: &mut UnixStream) -> (u32, Vec<u8>) {
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    let mut data = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut data).unwrap();
    (u32::from_be_bytes(header[12..16].try_into().unwrap()), data)
}

#[test]
fn names_of_impossible_length_are_refused_and_never_repeated() {
    let bed = Bed::new(Memory::new(1 << 20));
    let mut stream = bed.greeted();
    let secret = b"SECRET";
    for data in [
        [&u32::MAX.to_be_bytes()[..], secret].concat(),
        [&8000_u32.to_be_bytes()[..], &secret.repeat(8000)[..8000], &[0; 2]].concat(),
        [&6_u32.to_be_bytes()[..], secret, &[0; 2]].concat(),
    ] {
        for number in [6, 7, 9, 10] {
            stream.write_all(&option(number, &data)).unwrap();
            let (kind, text) = answer(&mut stream);
            assert!(kind & 1 << 31 != 0, "{number}: {kind:#x}");
            assert!(!text.windows(6).any(|part| part == secret), "what a client says is not said to others");
            assert!(text.len() < 200);
        }
    }
    bed.assert_serves();
}

#[test]
fn options_without_an_end_and_without_number_end_the_connection() {
    let bed = Bed::new(Memory::new(1 << 20));
    let mut stream = bed.greeted();
    stream.write_all(&[&OPTION[..], &7_u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat()).unwrap();
    assert_sent_away(&mut stream);
    let mut stream = bed.greeted();
    let sent = (0..10_000).take_while(|_| stream.write_all(&option(3, &[])).is_ok()).count();
    assert!(sent < 10_000);
    bed.assert_serves();
}

#[test]
fn garbage_and_leaving_at_any_moment_hurt_nobody() {
    let bed = Bed::new(Memory::new(1 << 20));
    let name = [&4_u32.to_be_bytes()[..], b"disk", &[0; 2]].concat();
    let whole = [&3_u32.to_be_bytes()[..], &option(8, &[]), &option(7, &name), &request(0, 0, 0, 4096)].concat();
    for length in 0..=whole.len() {
        let mut stream = bed.connect();
        stream.write_all(&whole[..length]).unwrap();
    }
    for _ in 0..200 {
        let mut stream = bed.connect();
        let garbage: Vec<u8> = (0..500).map(|_| fastrand::u8(..)).collect();
        let _ = stream.write_all(&garbage);
        assert_sent_away(&mut stream);
    }
    // Requests where options should be, and options where requests should be.
    let mut stream = bed.greeted();
    stream.write_all(&request(0, 0, 0, 512)).unwrap();
    assert_sent_away(&mut stream);
    let mut stream = bed.agreed();
    stream.write_all(&option(3, &[0; 30])).unwrap();
    assert_sent_away(&mut stream);
    bed.assert_serves();
}

#[test]
fn who_says_nothing_is_sent_away_and_a_server_full_of_such_ends_when_it_is_told() {
    let mut bed = Bed::new(Memory::new(1 << 20));
    let begun = Instant::now();
    let mut silent: Vec<_> = (0..limits::CONNECTIONS).map(|_| bed.greeted()).collect();
    // There is no place for one more, which is told so at once.
    assert_sent_away(&mut bed.connect());
    assert!(begun.elapsed() < limits::HANDSHAKE);
    for stream in &mut silent {
        assert_sent_away(stream);
    }
    assert!(begun.elapsed() < limits::HANDSHAKE + Duration::from_secs(15), "{:?}", begun.elapsed());
    let until = Instant::now() + Duration::from_secs(10);
    while bed.listening.as_ref().unwrap().clients() > 0 {
        assert!(Instant::now() < until, "places are free again");
        std::thread::sleep(Duration::from_millis(10));
    }
    bed.assert_serves();
    let mut open = [bed.greeted(), bed.agreed()];
    let ending = Instant::now();
    drop(bed.listening.take());
    open.iter_mut().for_each(assert_sent_away);
    assert!(ending.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_is_said_between_starttls_and_tls_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("cert"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(path("key"), key.serialize_pem()).unwrap();
    let certificate = vmferry_nbd::tls::Certificate { chain: path("cert"), key: path("key") };
    let tls = vmferry_nbd::tls::ServerTls::with_certificate(&certificate, None).unwrap();
    let disk = Arc::new(Memory::new(1 << 20));
    let disks = Served { name: "disk".into(), description: String::new(), backend: disk };
    let server = Server::new(vec![disks], Some(tls));
    let listening = Some(Listening::begin(server, &Where::Unix(path("socket"))).unwrap());
    let bed = Bed { dir, listening };
    let mut stream = bed.greeted();
    // As one in between would, so that the client gets structured replies without having asked for them.
    stream.write_all(&[option(5, &[]), option(8, &[])].concat()).unwrap();
    assert_eq!(answer(&mut stream).0, 1);
    assert_sent_away(&mut stream);
    let mut stream = bed.greeted();
    stream.write_all(&option(3, &[])).unwrap();
    let (kind, text) = answer(&mut stream);
    assert_eq!(kind, (1 << 31) + 5);
    assert!(String::from_utf8_lossy(&text).contains("STARTTLS"));
}

#[test]
fn the_largest_block_status_is_no_larger_than_its_limit() {
    let disk = Memory::new(128 << 20);
    for at in (4096..128 << 20).step_by(8192) {
        disk.write(at, &[1]).unwrap();
    }
    let bed = Bed::new(disk);
    let mut stream = bed.agreed();
    stream.write_all(&request(0, 7, 0, 128 << 20)).unwrap();
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    let length = u32::from_be_bytes(header[16..].try_into().unwrap()) as usize;
    assert_eq!(length, 4 + 8 * limits::DESCRIPTORS);
    stream.read_exact(&mut vec![0; length]).unwrap();
    for (offset, length) in [(0, 0), (0, u32::MAX), (u64::MAX, u32::MAX), (1 << 62, 512)] {
        stream.write_all(&request(0, 7, offset, length)).unwrap();
        assert_eq!(error_of_reply(&mut stream), 22, "{offset} {length}");
    }
    bed.assert_serves();
}

#[test]
fn requests_that_overflow_or_write_where_nothing_may_be_written_change_nothing() {
    let disk = Arc::new(Memory::holding(vec![7; 1 << 20]).read_only());
    let disks = Served { name: "disk".into(), description: String::new(), backend: Arc::<Memory>::clone(&disk) };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(vec![disks], None);
    let listening = Some(Listening::begin(server, &Where::Unix(dir.path().join("socket"))).unwrap());
    let bed = Bed { dir, listening };
    let mut stream = bed.agreed();
    stream.write_all(&[request(0, 1, 0, 512), vec![9; 512]].concat()).unwrap();
    assert_eq!(error_of_reply(&mut stream), 1);
    for (bytes, error) in [
        (request(0, 4, 0, 512), 1),
        (request(0, 6, 0, 512), 1),
        (request(0, 0, u64::MAX - 511, 512), 22),
        (request(0, 0, u64::MAX, u32::MAX), 22),
        (request(0, 0, 0, (32 << 20) + 1), 22),
        (request(1 << 12, 0, 0, 512), 22),
        (request(0, 99, 0, 512), 22),
        (request(0, 8, 0, 512), 22),
    ] {
        stream.write_all(&bytes).unwrap();
        assert_eq!(error_of_reply(&mut stream), error, "{bytes:?}");
    }
    stream.write_all(&request(0, 1, 0, (32 << 20) + 512)).unwrap();
    assert_sent_away(&mut stream);
    assert!(disk.contents() == vec![7; 1 << 20]);
}

#[test]
fn who_reads_no_replies_or_sends_drop_by_drop_is_sent_away_and_holds_up_nobody() {
    let bed = Bed::new(Memory::new(64 << 20));
    let before = resident();
    let mut deaf: Vec<_> = (0..8).map(|_| bed.agreed()).collect();
    for stream in &mut deaf {
        stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        while stream.write_all(&request(0, 0, 0, 16 << 20)).is_ok() {}
    }
    let mut dripping = bed.agreed();
    bed.assert_serves();
    // Disks of tests beside this one count too.
    assert!(resident() - before < 2 * limits::BYTES_OF_ALL, "{} MiB", (resident() - before) >> 20);
    let begun = Instant::now();
    let mut drops = request(0, 1, 0, 1 << 20).into_iter().cycle();
    while dripping.write_all(&[drops.next().unwrap()]).is_ok() {
        assert!(begun.elapsed() < 2 * limits::STALL + Duration::from_secs(30));
        std::thread::sleep(Duration::from_secs(2));
    }
    let until = begun + 2 * limits::STALL + Duration::from_secs(30);
    while bed.listening.as_ref().unwrap().clients() > 0 {
        assert!(Instant::now() < until, "all have been sent away");
        std::thread::sleep(Duration::from_millis(100));
    }
    bed.assert_serves();
}

/// The memory of this process that is in use.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_socket_that_is_for_one_process_sends_others_away() {
    use std::os::linux::net::SocketAddrExt;
    let own = std::process::id();
    for (pid, is_ours) in [(own, true), (own + 1, false)] {
        let name = format!("vmferry-test-{own}-{pid}");
        let served =
            Served { name: "disk".into(), description: String::new(), backend: Arc::new(Memory::new(1 << 20)) };
        let at = Where::Abstract { name: name.clone(), pid };
        let _listening = Listening::begin(Server::new(vec![served], None), &at).unwrap();
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let mut stream = UnixStream::connect_addr(&address).unwrap();
        assert_eq!(stream.read_exact(&mut [0; 18]).is_ok(), is_ours);
    }
}
