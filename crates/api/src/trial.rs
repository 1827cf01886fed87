//! A trial of a link: one side sends as fast as it can, the other takes it and echoes urgent questions, and both tell
//! what it cost them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmferry_link::{Compression, Link, LinkDown, LinkOptions, Method, SessionId, SessionKey, thread_cpu};

use crate::settings::Security;

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

/// Try the link to another agent.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialRequest {
    /// Which: a peer's name, or its address.
    pub to: String,
    /// What to try.
    pub trial: Trial,
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

impl TrialResult {
    /// How fast it was, in bytes a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / (self.time_ms / 1e3).max(1e-3)
    }
}

/// A trial that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadTrial(pub String);

impl Trial {
    /// The link that it wants; refuses what makes no sense.
    pub fn link_options(&self, session: SessionId, key: SessionKey) -> Result<LinkOptions, BadTrial> {
        let bad = |message: String| Err(BadTrial(message));
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
