//! `vmferry bench link`: what moves bytes between two hosts, how fast, and what it costs.
//!
//! The link of vmferry, in all its settings, beside what people use today ([`today`]) and the ways that were compared
//! on libvirt's mailing list in 2009 ([`daemon`]), all in one run on the same machine. Ways are alternated, round by
//! round, so that a machine that gets slower does so for all; the rows are medians.

mod cost;
mod daemon;
mod report;
mod sshd;
mod today;

pub use report::{Group, LinkReport, Row, Urgent};

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cost::Idle;
use sshd::Sshd;
use vmferry_api::client::{Client, ClientError};
use vmferry_api::trial::{Data, Load, Trial, TrialResult, send, take};
use vmferry_api::{PeersView, Security, TrialRequest};
use vmferry_link::{
    Acceptor, Cipher, Identity, IdentityError, Incoming, Link, LinkDown, Protection, SessionId, SessionKey,
    SessionOptions, Sessions, TcpDialer, fastest_cipher, measure_ciphers, usual_streams,
};
use vmferry_qemu::tls_priority;

use crate::median;

/// What is written at once, in bytes.
const BLOCK: usize = 256 << 10;

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum LinkBenchError {
    /// A program is not there.
    #[error("{what} is missing: {hint}")]
    Missing {
        /// Which.
        what: &'static str,
        /// Where it comes from.
        hint: &'static str,
    },
    /// It did not work.
    #[error("{0}")]
    Failed(String),
    /// The link broke.
    #[error(transparent)]
    Link(#[from] LinkDown),
    /// Streams could not be encrypted.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS could not be spoken.
    #[error(transparent)]
    Tls(#[from] vmferry_link::LinkError),
    /// QEMU did not do as told.
    #[error(transparent)]
    Qmp(#[from] vmferry_qemu::QmpError),
    /// QEMU could not encrypt.
    #[error(transparent)]
    StreamTls(#[from] vmferry_qemu::StreamTlsError),
    /// The agent refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An input or output error.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl LinkBenchError {
    fn missing(what: &'static str, hint: &'static str) -> Self {
        Self::Missing { what, hint }
    }
}

/// A program that ends with what holds it.
struct Program(std::process::Child);

impl Drop for Program {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What to measure, and how often.
#[derive(Clone, Debug)]
pub struct LinkBenchOptions {
    /// How long each way is measured in each round.
    pub time: Duration,
    /// How often.
    pub rounds: u32,
    /// Only the link itself.
    pub only_ours: bool,
}

/// What one way did in one round.
#[derive(Clone, Debug, Default)]
struct Measured {
    bytes: u64,
    wire: Option<u64>,
    took: Duration,
    source_cpu: Option<Duration>,
    destination_cpu: Option<Duration>,
    idle: f64,
    urgent: Option<Urgent>,
}

/// One way to move bytes.
#[derive(Clone)]
struct Way {
    name: &'static str,
    group: Group,
    security: String,
    streams: u8,
    packing: &'static str,
    data: Data,
    how: How,
}

#[derive(Clone)]
enum How {
    Ours(Option<Cipher>),
    PlainTcp,
    Ssh(Option<&'static str>),
    /// With TLS of these ciphers, in `GnuTLS`'s words.
    Qemu(Option<&'static str>),
    Daemon(daemon::Way),
}

fn ours(cipher: Option<Cipher>, streams: u8, packing: &'static str, data: Data) -> Way {
    let security = cipher.map_or_else(|| "plain".into(), |cipher| cipher.to_string());
    Way { name: "vmferry", group: Group::Vmferry, security, streams, packing, data, how: How::Ours(cipher) }
}

/// All ways that can be measured on the loopback address.
fn ways(fastest: Cipher, options: &LinkBenchOptions) -> Vec<Way> {
    let mut ways = Vec::new();
    let many = usual_streams();
    for streams in [1, many] {
        ways.push(ours(None, streams, "none", Data::Random));
        ways.extend(Cipher::ALL.map(|cipher| ours(Some(cipher), streams, "none", Data::Random)));
    }
    for packing in ["adaptive", "lz4", "zstd:1"] {
        ways.push(ours(Some(fastest), many, packing, Data::Random));
    }
    for packing in ["none", "adaptive", "lz4", "zstd:1"] {
        ways.push(ours(Some(fastest), many, packing, Data::Text));
    }
    if options.only_ours {
        return ways;
    }
    // The fastest in QEMU.
    let aes = tls_priority(Cipher::Aes128Gcm);
    let other = |name, group, security: &str, streams, how| Way {
        name,
        group,
        security: security.into(),
        streams,
        packing: "none",
        data: Data::Random,
        how,
    };
    ways.extend([
        other("plain TCP, as iperf3", Group::Today, "plain", 1, How::PlainTcp),
        other("plain TCP, as iperf3", Group::Today, "plain", many, How::PlainTcp),
        other("ssh", Group::Today, "its choice", 1, How::Ssh(None)),
        other("ssh aes128-gcm", Group::Today, "aes-128-gcm", 1, How::Ssh(Some("aes128-gcm@openssh.com"))),
        other("QEMU", Group::Today, "plain", 1, How::Qemu(None)),
        other("QEMU TLS", Group::Today, "aes-128-gcm", 1, How::Qemu(Some(aes))),
        other("QEMU TLS, as it comes", Group::Today, "its choice", 1, How::Qemu(Some("NORMAL"))),
        other("QEMU multifd", Group::Today, "plain", many, How::Qemu(None)),
        other("QEMU TLS, multifd", Group::Today, "aes-128-gcm", many, How::Qemu(Some(aes))),
    ]);
    ways.extend(daemon::Way::ALL.map(|way| {
        let security = if way == daemon::Way::Plain { "plain" } else { "tls" };
        other(way.name(), Group::Study, security, 1, How::Daemon(way))
    }));
    ways
}

/// Measures everything on the loopback address; `tell` hears what is being done.
pub async fn bench_loopback(options: &LinkBenchOptions, tell: impl Fn(&str)) -> Result<LinkReport, LinkBenchError> {
    let speeds = measure_ciphers();
    let fastest = fastest_cipher(&speeds, &speeds).expect("three were measured");
    let mut missing = Vec::new();
    let bench = Arc::new(Loopback::start(options.only_ours, &mut missing).await?);
    let mut ways: Vec<(Way, Vec<Measured>)> = ways(fastest, options).into_iter().map(|way| (way, Vec::new())).collect();
    for round in 1..=options.rounds {
        let mut failed = Vec::new();
        for (index, (way, measured)) in ways.iter_mut().enumerate() {
            tell(&format!("round {round}: {}, {}, {} streams, {}", way.name, way.security, way.streams, way.packing));
            match bench.measure(way, options.time).await {
                Ok(done) => measured.push(done),
                Err(error) => {
                    missing.push(format!("{} ({} streams): {error}", way.name, way.streams));
                    failed.push(index);
                }
            }
        }
        // What failed once is not tried again.
        for index in failed.into_iter().rev() {
            ways.remove(index);
        }
    }
    let rows = ways.iter().map(|(way, measured)| row(way, measured)).collect();
    Ok(report("loopback".into(), options, &speeds, rows, missing))
}

fn report(
    between: String,
    options: &LinkBenchOptions,
    speeds: &[vmferry_link::CipherSpeed],
    rows: Vec<Row>,
    missing: Vec<String>,
) -> LinkReport {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    LinkReport {
        between,
        seconds: options.time.as_secs_f64(),
        rounds: options.rounds,
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        ciphers: speeds.iter().map(|it| (it.cipher.to_string(), mib(it.bytes_per_second))).collect(),
        rows,
        missing,
    }
}

fn row(way: &Way, measured: &[Measured]) -> Row {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let speed = |bytes: u64, took: Duration| gib(bytes) * 1024.0 / took.as_secs_f64();
    let cost = |cpu: Option<Duration>, it: &Measured| Some(cpu?.as_secs_f64() / gib(it.bytes));
    let urgent = || measured.iter().filter_map(|it| it.urgent);
    Row {
        name: way.name.into(),
        group: way.group,
        security: way.security.clone(),
        streams: way.streams,
        compression: way.packing.into(),
        data: word(way.data),
        mib_per_s: median(measured.iter().map(|it| speed(it.bytes, it.took))).unwrap_or(0.0),
        wire_mib_per_s: median(measured.iter().filter_map(|it| Some(speed(it.wire?, it.took)))),
        source_cpu: median(measured.iter().filter_map(|it| cost(it.source_cpu, it))),
        destination_cpu: median(measured.iter().filter_map(|it| cost(it.destination_cpu, it))),
        idle: median(measured.iter().map(|it| it.idle)).unwrap_or(0.0),
        urgent: median(urgent().map(|it| it.p50_ms))
            .zip(median(urgent().map(|it| it.p99_ms)))
            .map(|(p50_ms, p99_ms)| Urgent { p50_ms, p99_ms, asked: urgent().map(|it| it.asked).sum() }),
    }
}

fn word(data: Data) -> String {
    match data {
        Data::Random => "random",
        Data::Text => "text",
        Data::Zero => "zero",
    }
    .into()
}

/// Two agents' ends in this process, and what else is measured beside them.
struct Loopback {
    source: Identity,
    destination: Identity,
    sessions: Sessions,
    address: SocketAddr,
    random: Load,
    text: Load,
    sshd: Option<Sshd>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Loopback {
    async fn start(only_ours: bool, missing: &mut Vec<String>) -> Result<Self, LinkBenchError> {
        let dir = tempfile::Builder::new().prefix("vmferry-bench-").tempdir()?;
        let identity = |name: &str| Identity::load_or_make(&dir.path().join(name), name);
        let (source, destination) = (identity("source")?, identity("destination")?);
        let sessions = Sessions::new();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let mut incoming = Incoming::new(listener, Acceptor::new(&destination, None), sessions.clone())?;
        let address = incoming.local_addr();
        // Streams are attached on their way; nobody makes control connections.
        let accepting = tokio::spawn(async move {
            loop {
                incoming.next().await;
            }
        });
        let sshd = match only_ours {
            true => None,
            false => Sshd::start().inspect_err(|error| missing.push(format!("ssh: {error}"))).ok(),
        };
        Ok(Self {
            source,
            destination,
            sessions,
            address,
            random: Load::new(Data::Random),
            text: Load::new(Data::Text),
            sshd,
            accepting,
        })
    }

    fn load(&self, data: Data) -> &Load {
        match data {
            Data::Text => &self.text,
            _ => &self.random,
        }
    }

    async fn measure(self: &Arc<Self>, way: &Way, time: Duration) -> Result<Measured, LinkBenchError> {
        if let How::Qemu(tls) = way.how {
            return today::qemu(&self.random, tls, way.streams).await;
        }
        let (bench, way) = (Arc::clone(self), way.clone());
        let measuring = tokio::task::spawn_blocking(move || match way.how {
            How::Ours(cipher) => bench.ours(&way, cipher, time),
            How::PlainTcp => today::plain_tcp(&bench.random, way.streams, time),
            How::Ssh(cipher) => match &bench.sshd {
                Some(sshd) => today::ssh(&bench.random, sshd, cipher, time),
                None => Err(LinkBenchError::Failed("there is no sshd".into())),
            },
            How::Daemon(way) => daemon::measure(&bench, way, time),
            How::Qemu(_) => unreachable!("it was measured above"),
        });
        measuring.await.expect("measuring does not panic")
    }

    fn ours(&self, way: &Way, cipher: Option<Cipher>, time: Duration) -> Result<Measured, LinkBenchError> {
        let trial = Trial {
            security: if cipher.is_some() { Security::Tls } else { Security::Plain },
            streams: way.streams,
            packing: way.packing.into(),
            data: way.data,
            time_ms: time.as_millis() as u64,
            rate: None,
        };
        let (session, key) = (SessionId::random(), SessionKey::random());
        let link = trial.link_options(session, key).map_err(|error| LinkBenchError::Failed(error.to_string()))?;
        let address = self.address.to_string();
        let (protection, dialer) = match cipher {
            Some(_) => (
                Protection::Tls(self.source.fingerprint()),
                TcpDialer::tls(&address, &self.source, self.destination.fingerprint(), cipher),
            ),
            None => (Protection::Plain, TcpDialer::plain(&address)),
        };
        let taking = self.sessions.expect(SessionOptions { link: link.clone(), protection })?;
        std::thread::scope(|scope| {
            let taker = scope.spawn(move || take(&taking));
            let sending = Link::connect(dialer, link)?;
            let idle = Idle::begin();
            let result = send(&sending, self.load(way.data), time, &way.security)?;
            let idle = idle.share();
            taker.join().expect("taking does not panic")?;
            Ok(from_trial(&result, idle))
        })
    }
}

fn from_trial(result: &TrialResult, idle: f64) -> Measured {
    let time = |ms: f64| Duration::from_secs_f64(ms / 1e3);
    let at = |percent: usize| result.urgent_ms.len().checked_sub(1).map(|last| result.urgent_ms[last * percent / 100]);
    Measured {
        bytes: result.bytes,
        wire: Some(result.wire_bytes),
        took: time(result.time_ms),
        source_cpu: Some(time(result.source_cpu_ms)),
        destination_cpu: Some(time(result.destination_cpu_ms)),
        idle,
        urgent: at(50).zip(at(99)).map(|(p50_ms, p99_ms)| Urgent { p50_ms, p99_ms, asked: result.urgent_ms.len() }),
    }
}

/// Measures the link from this host's agent to another one's.
pub async fn bench_host(
    client: &Client,
    to: &str,
    options: &LinkBenchOptions,
    tell: impl Fn(&str),
) -> Result<LinkReport, LinkBenchError> {
    let here: PeersView = client.get("/v1/peers").await?;
    let many = usual_streams();
    let trial = |security, streams, packing: &'static str, data| (security, streams, packing, data);
    let mut trials: Vec<(_, Vec<Measured>, Option<String>)> = [
        trial(Security::Plain, 1, "none", Data::Random),
        trial(Security::Plain, many, "none", Data::Random),
        trial(Security::Tls, 1, "none", Data::Random),
        trial(Security::Tls, many, "none", Data::Random),
        trial(Security::Tls, many, "adaptive", Data::Random),
        trial(Security::Tls, many, "none", Data::Text),
        trial(Security::Tls, many, "adaptive", Data::Text),
        trial(Security::Tls, many, "lz4", Data::Text),
        trial(Security::Tls, many, "zstd:1", Data::Text),
    ]
    .into_iter()
    .map(|trial| (trial, Vec::new(), None))
    .collect();
    let mut missing = Vec::new();
    for round in 1..=options.rounds {
        let mut refused = Vec::new();
        for (index, ((security, streams, packing, data), measured, word)) in trials.iter_mut().enumerate() {
            tell(&format!("round {round}: {security:?}, {streams} streams, {packing}"));
            let trial = Trial {
                security: *security,
                streams: *streams,
                packing: (*packing).into(),
                data: *data,
                time_ms: options.time.as_millis() as u64,
                rate: None,
            };
            let idle = Idle::begin();
            match client.post::<_, TrialResult>("/v1/link-benchmark", &TrialRequest { to: to.into(), trial }).await {
                Ok(result) => {
                    *word = Some(result.security.clone());
                    measured.push(from_trial(&result, idle.share()));
                }
                // A network that is not declared trusted is measured encrypted only.
                Err(ClientError::Problem(problem)) if *security == Security::Plain => {
                    missing.push(format!("plain, {streams} streams: {}", problem.message));
                    refused.push(index);
                }
                Err(error) => return Err(error.into()),
            }
        }
        for index in refused.into_iter().rev() {
            trials.remove(index);
        }
    }
    let rows = trials.iter().map(|((security, streams, packing, data), measured, word)| {
        let security = word.clone().unwrap_or_else(|| format!("{security:?}"));
        let way = Way {
            name: "vmferry",
            group: Group::Vmferry,
            security,
            streams: *streams,
            packing,
            data: *data,
            how: How::Ours(None),
        };
        row(&way, measured)
    });
    let rows = rows.collect();
    Ok(report(format!("{} and {to}", here.name), options, &measure_ciphers(), rows, missing))
}
