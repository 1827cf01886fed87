//! How fast a link is, what it costs, and how long urgent frames take meanwhile.
//!
//! Two processes, a sender and a receiver, on loopback or in two network namespaces that are there already:
//!
//! ```text
//! cargo run --release -p vmferry-link --example throughput -- --security plain
//! cargo run --release -p vmferry-link --example throughput -- --namespaces alpha,beta --address 10.9.0.2:7499
//! ```

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Parser, Subcommand, ValueEnum};
use rustix::time::{ClockId, clock_gettime};
use vmferry_link::{
    Acceptor, Arrival, Cipher, Compression, Identity, Link, LinkOptions, LinkStats, Method, Protection, SessionId,
    SessionKey, SessionOptions, Sessions, TcpDialer,
};

type Failed = Box<dyn Error + Send + Sync>;

/// Measures a link between two processes.
#[derive(Parser, Clone)]
struct Options {
    /// How streams are protected.
    #[arg(long, value_enum, default_value = "tls")]
    security: Security,
    /// Bulk streams.
    #[arg(long, default_value_t = 4)]
    streams: u8,
    /// none, lz4, adaptive, or zstd:LEVEL.
    #[arg(long, default_value = "none")]
    compression: String,
    /// What is sent.
    #[arg(long, value_enum, default_value = "random")]
    data: Data,
    /// How long.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Bytes of a frame.
    #[arg(long, default_value_t = 256 << 10)]
    frame: usize,
    /// The most to send, in bytes a second.
    #[arg(long)]
    rate: Option<u64>,
    /// Ask something urgent each so many milliseconds; 0 is never.
    #[arg(long, default_value_t = 5)]
    urgent_ms: u64,
    /// Where the receiver listens.
    #[arg(long, default_value = "127.0.0.1:7499")]
    address: String,
    /// Network namespaces of the sender and the receiver.
    #[arg(long, value_delimiter = ',')]
    namespaces: Vec<String>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand, Clone)]
enum Role {
    /// One side; started by the measurement itself.
    #[command(hide = true)]
    Send { dir: PathBuf, session: SessionId, key: String },
    /// The other side.
    #[command(hide = true)]
    Receive { dir: PathBuf, session: SessionId, key: String },
}

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Security {
    Plain,
    Tls,
    #[value(name = "aes-128-gcm")]
    Aes128,
    #[value(name = "aes-256-gcm")]
    Aes256,
    #[value(name = "chacha20-poly1305")]
    ChaCha,
}

#[derive(Clone, Copy, ValueEnum)]
enum Data {
    Random,
    Text,
    Zero,
}

fn main() -> Result<(), Failed> {
    let options = Options::parse();
    match options.role.clone() {
        Some(Role::Send { dir, session, key }) => send(&options, &dir, link_options(&options, session, &key)?),
        Some(Role::Receive { dir, session, key }) => receive(&options, &dir, link_options(&options, session, &key)?),
        None => measure(&options),
    }
}

/// Starts both sides with the same options.
fn measure(options: &Options) -> Result<(), Failed> {
    let dir = std::env::temp_dir().join(format!("vmferry-throughput-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    for side in ["sender", "receiver"] {
        Identity::load_or_make(&dir.join(side), side)?;
    }
    let (session, key) = (SessionId::random().to_string(), String::from(SessionKey::random()));
    let start = |role: &str, namespace: Option<&String>| -> std::io::Result<Child> {
        let this = std::env::current_exe()?;
        let mut command = match namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(this);
                command
            }
            None => Command::new(this),
        };
        command.args(std::env::args_os().skip(1)).arg(role).arg(&dir).args([&session, &key]);
        command.stdout(Stdio::piped()).spawn()
    };
    let result = (|| {
        let mut receiver = start("receive", options.namespaces.get(1))?;
        let mut said = BufReader::new(receiver.stdout.take().ok_or("no pipe")?).lines();
        said.next().ok_or("the receiver ended")??;
        let sender = start("send", options.namespaces.first())?.wait_with_output()?;
        print!("{}", String::from_utf8_lossy(&sender.stdout));
        for line in said {
            println!("{}", line?);
        }
        match sender.status.success() && receiver.wait()?.success() {
            true => Ok(()),
            false => Err("a side failed".into()),
        }
    })();
    std::fs::remove_dir_all(&dir)?;
    result
}

fn link_options(options: &Options, session: SessionId, key: &str) -> Result<LinkOptions, Failed> {
    let compression = match options.compression.as_str() {
        "adaptive" => Compression::Adaptive,
        "none" => Compression::Fixed(Method::None),
        "lz4" => Compression::Fixed(Method::Lz4),
        other => {
            let level = other.strip_prefix("zstd:").ok_or("--compression is none, lz4, adaptive or zstd:LEVEL")?;
            Compression::Fixed(Method::Zstd(level.parse()?))
        }
    };
    let mut link = LinkOptions::new(session, key.parse()?);
    (link.streams, link.compression, link.rate) = (options.streams, compression, options.rate);
    Ok(link)
}

fn identities(dir: &Path) -> Result<(Identity, Identity), Failed> {
    let load = |side| Identity::load_or_make(&dir.join(side), side);
    Ok((load("sender")?, load("receiver")?))
}

fn process_cpu() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

fn send(options: &Options, dir: &Path, link: LinkOptions) -> Result<(), Failed> {
    let (identity, receiver) = identities(dir)?;
    let cipher = match options.security {
        Security::Plain | Security::Tls => None,
        Security::Aes128 => Some(Cipher::Aes128Gcm),
        Security::Aes256 => Some(Cipher::Aes256Gcm),
        Security::ChaCha => Some(Cipher::ChaCha20Poly1305),
    };
    let dialer = match options.security {
        Security::Plain => TcpDialer::plain(&options.address),
        _ => TcpDialer::tls(&options.address, &identity, receiver.fingerprint(), cipher),
    };
    let link = Arc::new(Link::connect(dialer, link)?);
    let pool = data(options.data, 64 << 20);
    let over = Arc::new(AtomicBool::new(false));
    let urgent = std::thread::spawn({
        let (link, over, pause) = (Arc::clone(&link), Arc::clone(&over), Duration::from_millis(options.urgent_ms));
        move || ask_urgently(&link, &over, pause)
    });
    let (begun, cpu) = (Instant::now(), process_cpu());
    let (mut at, mut sent) = (0, 0_u64);
    while begun.elapsed().as_secs_f64() < options.seconds {
        if at + options.frame > pool.len() {
            at = 0;
        }
        link.send(1, pool.slice(at..at + options.frame))?;
        at += options.frame;
        sent += options.frame as u64;
    }
    over.store(true, Ordering::Relaxed);
    link.flush()?;
    let (took, cpu) = (begun.elapsed().as_secs_f64(), process_cpu().saturating_sub(cpu));
    let mut round_trips = urgent.join().map_err(|_| "the urgent thread failed")?;
    let stats = link.stats();
    link.close()?;
    println!(
        "sent      {:8.1} MiB/s  ({:.1} on the wire)  {:.3} CPU s/GiB",
        mebibytes(sent) / took,
        mebibytes(stats.wire_sent) / took,
        cpu.as_secs_f64() / (mebibytes(sent) / 1024.0)
    );
    round_trips.sort();
    if let Some(last) = round_trips.len().checked_sub(1) {
        let percentile = |percent: usize| round_trips[last * percent / 100].as_secs_f64() * 1e3;
        println!(
            "urgent    p50 {:.2} ms  p99 {:.2} ms  worst {:.2} ms  ({} asked)",
            percentile(50),
            percentile(99),
            percentile(100),
            last + 1
        );
    }
    let methods: Vec<_> = stats.streams.iter().skip(1).map(|stream| stream.method.to_string()).collect();
    println!("packing   {}", methods.join(" "));
    Ok(())
}

/// Asks again and again; gives back how long each answer took.
fn ask_urgently(link: &Link, over: &AtomicBool, pause: Duration) -> Vec<Duration> {
    let mut round_trips = Vec::new();
    while !pause.is_zero() && !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        if link.send_urgent(2, Bytes::from_static(&[7; 64])).is_err() || !matches!(link.recv_urgent(), Ok(Some(_))) {
            break;
        }
        round_trips.push(begun.elapsed());
        std::thread::sleep(pause);
    }
    round_trips
}

fn receive(options: &Options, dir: &Path, link: LinkOptions) -> Result<(), Failed> {
    let (sender, identity) = identities(dir)?;
    let protection = match options.security {
        Security::Plain => Protection::Plain,
        _ => Protection::Tls(sender.fingerprint()),
    };
    let sessions = Sessions::new();
    let link = Arc::new(sessions.expect(SessionOptions { link, protection })?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind(&options.address))?;
    println!("ready");
    let acceptor = Acceptor::new(&identity, None);
    runtime.spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(arrival) = acceptor.accept_any(tcp, Duration::from_secs(5)).await else { continue };
            let Arrival::Stream(stream) = arrival else { continue };
            let sessions = sessions.clone();
            tokio::task::spawn_blocking(move || sessions.attach(*stream));
        }
    });
    let echo = Arc::clone(&link);
    std::thread::spawn(move || {
        while let Ok(Some(frame)) = echo.recv_urgent() {
            let _ = echo.send_urgent(frame.kind, frame.payload);
        }
    });
    let cpu = process_cpu();
    while link.recv()?.is_some() {}
    let stats: LinkStats = link.stats();
    link.close()?;
    let gibibytes = mebibytes(stats.raw_received) / 1024.0;
    println!(
        "received  {:8.1} MiB  {:.3} CPU s/GiB",
        gibibytes * 1024.0,
        (process_cpu().saturating_sub(cpu)).as_secs_f64() / gibibytes
    );
    Ok(())
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Bytes of a kind. Text is words in random order, which packs as programs and documents do: to about a half.
fn data(kind: Data, length: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(length + 64);
    match kind {
        Data::Zero => bytes.resize(length, 0),
        Data::Random => {
            while bytes.len() < length {
                bytes.extend(random().to_le_bytes());
            }
        }
        Data::Text => {
            let words: Vec<String> = (0..4096).map(|_| format!("{:x} ", random() % 0xf_ffff)).collect();
            while bytes.len() < length {
                bytes.extend(words[(random() % 4096) as usize].as_bytes());
            }
        }
    }
    bytes.truncate(length);
    bytes.into()
}
