//! A trial of the link between two agents: one sends as fast as it can, the other takes it and echoes urgent questions,
//! and both tell what it cost them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedSemaphorePermit;
use utoipa::ToSchema;
use vmferry_link::{
    CipherSpeed, Compression, Link, LinkDown, LinkOptions, Method, Protection, SessionId, SessionKey, SessionOptions,
    TcpDialer, fastest_cipher, thread_cpu,
};

use crate::Agent;
use crate::config::Security;
use crate::error::AgentError;
use crate::peer::Met;
use crate::trust::{self, Caller};

/// What is sent in one frame, in bytes.
const BLOCK: usize = 256 << 10;
/// What is sent again and again, in bytes: more than caches hold.
const POOL: usize = 64 << 20;
/// Between two urgent questions.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// How long a trial may be, in ms.
const TIME_MS: std::ops::RangeInclusive<u64> = 10..=60_000;
const STREAMS: std::ops::RangeInclusive<u8> = 1..=8;
/// How long the streams of a trial may take to come, or to come back.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many trials an agent serves at a time.
pub(crate) const MOST_TRIALS: usize = 4;

/// Frames of a trial.
const LOAD: u16 = 1;
const ASK: u16 = 2;
const END: u16 = 3;
const RESULT: u16 = 4;

/// What kind of bytes is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Data {
    /// Nothing makes it shorter.
    Random,
    /// Words, which get half as long.
    Text,
    /// Zeroes.
    Zero,
}

/// What to try.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Trial {
    /// Plain only where both hosts' configuration permits it.
    pub security: Security,
    /// Parallel streams, 1 to 8.
    pub streams: u8,
    /// `adaptive`, `none`, `lz4` or `zstd:LEVEL`.
    pub packing: String,
    /// What is sent.
    pub data: Data,
    /// How long, in ms.
    pub time_ms: u64,
    /// The most to send, in bytes a second.
    pub rate: Option<u64>,
}

/// What a trial showed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialResult {
    /// What protected the streams: a cipher, or `plain`.
    pub security: String,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Bytes on the wire for that, at most: questions and their answers are in it.
    pub wire_bytes: u64,
    /// From the first to the last, in ms.
    pub time_ms: f64,
    /// Processor time of the sending side, in ms.
    pub source_cpu_ms: f64,
    /// Processor time of the taking side, in ms.
    pub destination_cpu_ms: f64,
    /// How long urgent questions took, in ms, shortest first.
    pub urgent_ms: Vec<f64>,
    /// What the streams were packed with at the end.
    pub packing: Vec<String>,
}

/// Asks an agent to take a trial.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialOffer {
    /// What will be tried.
    pub trial: Trial,
    /// The session of its streams.
    #[schema(value_type = String)]
    pub session: SessionId,
    /// Its key.
    #[schema(value_type = String)]
    pub key: SessionKey,
}

/// It waits for the streams.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialAccepted {
    /// The ciphers that this host allows, and how fast they are here.
    #[schema(value_type = Vec<Object>)]
    pub ciphers: Vec<CipherSpeed>,
}

/// What the taking side tells at the end.
#[derive(Debug, Serialize, Deserialize)]
struct Taken {
    bytes: u64,
    cpu_ms: f64,
}

/// Bytes to send, again and again.
pub struct Load(Bytes);

impl Load {
    /// Of this kind.
    pub fn new(data: Data) -> Self {
        let mut random = xorshift();
        let mut bytes = Vec::with_capacity(POOL + 64);
        match data {
            Data::Zero => bytes.resize(POOL, 0),
            Data::Random => {
                while bytes.len() < POOL {
                    bytes.extend(random().to_le_bytes());
                }
            }
            Data::Text => {
                let words: Vec<String> = (0..4096).map(|_| format!("{:x} ", random() % 0xf_ffff)).collect();
                while bytes.len() < POOL {
                    bytes.extend(words[(random() % 4096) as usize].as_bytes());
                }
            }
        }
        bytes.truncate(POOL);
        Self(bytes.into())
    }

    /// Without end.
    pub fn blocks(&self) -> impl Iterator<Item = Bytes> + '_ {
        (0..POOL / BLOCK).cycle().map(|at| self.0.slice(at * BLOCK..(at + 1) * BLOCK))
    }
}

/// Fast, and the same each time (Marsaglia, "Xorshift RNGs", 2003).
fn xorshift() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The taking side, until the other closes the link. Blocks.
pub fn take(link: &Link) -> Result<(), LinkDown> {
    let bytes = std::sync::atomic::AtomicU64::new(0);
    let bulk_cpu = std::sync::Mutex::new(Duration::ZERO);
    std::thread::scope(|scope| {
        let bulk = scope.spawn(|| {
            while let Some(frame) = link.recv()? {
                bytes.fetch_add(frame.payload.len() as u64, Ordering::Relaxed);
                *bulk_cpu.lock().expect("no holder of this lock panics") = thread_cpu();
            }
            Ok(())
        });
        while let Some(frame) = link.recv_urgent()? {
            if frame.kind != END {
                link.send_urgent(frame.kind, frame.payload)?;
                continue;
            }
            let cpu = link.stats().cpu + *bulk_cpu.lock().expect("no holder of this lock panics") + thread_cpu();
            let taken = Taken { bytes: bytes.load(Ordering::Relaxed), cpu_ms: ms(cpu) };
            link.send_urgent(RESULT, serde_json::to_vec(&taken).expect("plain data"))?;
        }
        bulk.join().expect("taking does not panic")
    })?;
    link.close()
}

/// The sending side, for this long. Blocks.
pub fn send(link: &Link, load: &Load, time: Duration, security: &str) -> Result<TrialResult, LinkDown> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask(link, &over));
        let (begun, cpu_before) = (Instant::now(), thread_cpu());
        let mut sent = Ok(());
        for block in load.blocks() {
            if begun.elapsed() > time || sent.is_err() {
                break;
            }
            sent = link.send(LOAD, block);
        }
        let sent = sent.and_then(|()| link.flush());
        let took = begun.elapsed();
        over.store(true, Ordering::Relaxed);
        let (urgent, asking_cpu) = asking.join().expect("asking does not panic");
        sent?;
        let stats = link.stats();
        let cpu = stats.cpu + thread_cpu().saturating_sub(cpu_before) + asking_cpu;
        link.send_urgent(END, Bytes::new())?;
        let taken = loop {
            let frame = link.recv_urgent()?.ok_or(LinkDown::Closed)?;
            if frame.kind == RESULT {
                break serde_json::from_slice::<Taken>(&frame.payload).map_err(|_| LinkDown::PeerGaveUp)?;
            }
        };
        // All is known; how the link ends changes nothing.
        if let Err(error) = link.close() {
            tracing::debug!(%error, "a trial's link did not end in order");
        }
        let mut urgent_ms: Vec<f64> = urgent.into_iter().map(ms).collect();
        urgent_ms.sort_by(f64::total_cmp);
        Ok(TrialResult {
            security: security.into(),
            bytes: taken.bytes,
            wire_bytes: stats.wire_sent,
            time_ms: ms(took),
            source_cpu_ms: ms(cpu),
            destination_cpu_ms: taken.cpu_ms,
            urgent_ms,
            packing: stats.streams.iter().skip(1).map(|stream| stream.method.to_string()).collect(),
        })
    })
}

/// Asks something urgent again and again; how long each answer took, and what asking cost.
fn ask(link: &Link, over: &AtomicBool) -> (Vec<Duration>, Duration) {
    let mut times = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let asked = link.send_urgent(ASK, Bytes::from_static(&[7; 64]));
        if asked.is_err() || !matches!(link.recv_urgent(), Ok(Some(_))) {
            break;
        }
        times.push(begun.elapsed());
        std::thread::sleep(ASK_EVERY);
    }
    (times, thread_cpu())
}

impl Trial {
    /// The link that it wants; refuses what makes no sense.
    pub fn link_options(&self, session: SessionId, key: SessionKey) -> Result<LinkOptions, AgentError> {
        let bad = |message: String| Err(AgentError::BadLimit { message });
        if !TIME_MS.contains(&self.time_ms) {
            return bad(format!("a trial of {} ms makes no sense: give 10 ms to 60 s", self.time_ms));
        }
        if !STREAMS.contains(&self.streams) {
            return bad(format!("{} streams make no sense: give 1 to 8", self.streams));
        }
        let compression = match self.packing.as_str() {
            "adaptive" => Compression::Adaptive,
            "none" => Compression::Fixed(Method::None),
            "lz4" => Compression::Fixed(Method::Lz4),
            other => match other.strip_prefix("zstd:").and_then(|level| level.parse().ok()) {
                Some(level @ -3..=3) => Compression::Fixed(Method::Zstd(level)),
                _ => return bad(format!("{other:?} packs nothing: give adaptive, none, lz4 or zstd:-3 to zstd:3")),
            },
        };
        let mut options = LinkOptions::new(session, key);
        (options.streams, options.compression, options.rate) = (self.streams, compression, self.rate);
        options.patience = PATIENCE;
        Ok(options)
    }
}

/// A place for one trial, for as long as it is kept.
fn take_place(agent: &Agent) -> Result<OwnedSemaphorePermit, AgentError> {
    Arc::clone(&agent.trials).try_acquire_owned().map_err(|_| AgentError::Conflict {
        message: format!("{MOST_TRIALS} trials of the link are under way here already"),
        hint: Some("try again later".into()),
    })
}

/// Another agent wants to try the link to this one.
pub(crate) fn accept(agent: &Agent, offer: TrialOffer, caller: &Caller) -> Result<TrialAccepted, AgentError> {
    let link = offer.trial.link_options(offer.session, offer.key)?;
    let protection = match offer.trial.security {
        Security::Tls => Protection::Tls(caller.key),
        Security::Plain if agent.config.security_of(caller.remote) == Security::Plain => Protection::Plain,
        Security::Plain => {
            tracing::warn!(from = %caller.remote, fingerprint = %caller.key, "refused streams that are not encrypted");
            return Err(AgentError::PlainRefused { host: agent.config.name.clone() });
        }
    };
    let place = take_place(agent)?;
    let link = agent.sessions.expect(SessionOptions { link, protection })?;
    std::thread::spawn(move || {
        let _place = place;
        if let Err(error) = take(&link) {
            tracing::debug!(%error, "a trial of the link ended early");
        }
    });
    Ok(TrialAccepted { ciphers: agent.ciphers_for(caller.remote) })
}

/// Tries the link to another agent.
pub(crate) async fn run(agent: &Arc<Agent>, to: &str, trial: Trial) -> Result<TrialResult, AgentError> {
    let found = trust::find_peer(agent, to)?;
    let met = found.hello().await?;
    let peer = found.pinned_to(&met);
    if trial.security == Security::Plain && agent.config.security_of(met.ip()) != Security::Plain {
        return Err(AgentError::PlainRefused { host: agent.config.name.clone() });
    }
    let place = take_place(agent)?;
    let (session, key) = (SessionId::random(), SessionKey::random());
    let options = trial.link_options(session, key.clone())?;
    let accepted = peer.try_streams(&TrialOffer { trial: trial.clone(), session, key }).await?;
    let (dialer, security) = dialer(agent, peer.address(), &met, trial.security, &accepted.ciphers);
    let running = tokio::task::spawn_blocking(move || {
        let _place = place;
        let link = Link::connect(dialer, options)?;
        send(&link, &Load::new(trial.data), Duration::from_millis(trial.time_ms), &security)
    });
    Ok(running.await.expect("a trial does not panic")?)
}

/// What makes the streams of a link, and what protects them, in a word.
fn dialer(
    agent: &Agent,
    address: &str,
    met: &Met,
    security: Security,
    their_ciphers: &[CipherSpeed],
) -> (TcpDialer, String) {
    if security == Security::Plain {
        return (TcpDialer::plain(address), "plain".into());
    }
    let cipher = fastest_cipher(&agent.ciphers_for(met.ip()), their_ciphers);
    let word = cipher.map_or_else(|| "tls".into(), |cipher| cipher.to_string());
    (TcpDialer::tls(address, &agent.trusts.identity, met.key, cipher), word)
}
