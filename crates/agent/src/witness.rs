//! What a host hears of a measuring guest, told to whoever measures, on this host or another: lines of JSON.
//!
//! A [`Told`] comes for everything that the guest says, with the moment by this host's monotonic clock, as it arrived
//! from QEMU: what is on its way over a busy link costs the measurement nothing. Twice a second it tells what processors
//! did. An [`Asked`] can be answered at once, to compare the clocks of two hosts, or typed into the guest's console.
//!
//! A measuring guest lives for its witnesses: when this ends, and its host owns the guest, it is ended too.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::error::RecvError;
use tokio_util::codec::{Framed, LinesCodec};
use vmferry_qemu::processors::{Look, ProcessorUse, Watched};

use crate::Agent;
use crate::api::types::StopRequest;
use crate::console::Viewer;
use crate::error::{AgentError, in_one_line};
use crate::lifecycle;
use crate::vm::Vm;

/// What the API's routes upgrade to.
pub const PROTOCOL: &str = "vmferry-witness";
/// The longest line that either side reads, in bytes.
pub const LONGEST_LINE: usize = 1 << 20;

/// How often it is told what processors did.
const LOOK: Duration = Duration::from_millis(500);
/// How often it is looked whether the guest can be ended.
const END_AGAIN: Duration = Duration::from_millis(100);

/// What a witness tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// Of the host that it is on; first of all.
    Host(HostFacts),
    /// The guest said this.
    Said {
        /// When, in ns of this host's monotonic clock.
        at_ns: u64,
        /// What. It need not be whole lines.
        text: String,
        /// It was said before somebody listened: only that it was by then is known.
        before: bool,
    },
    /// It is now this time.
    Clock {
        /// As it was asked.
        asked: u64,
        /// In ns of this host's monotonic clock.
        at_ns: u64,
    },
    /// What processors did until then. The guest's QEMU and this agent are the first of their kind.
    Processors {
        /// Until when, in ns of this host's monotonic clock.
        at_ns: u64,
        /// What.
        used: ProcessorUse,
    },
}

/// What a witness is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Asked {
    /// What time it is; the number comes back.
    Clock(u64),
    /// To type this into the guest's console.
    Type(String),
}

/// What a host is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// What it calls itself.
    pub name: String,
    /// The model of its processor.
    pub model: String,
    /// Processors that can be used.
    pub processors: usize,
    /// Its memory, in bytes.
    pub ram: u64,
    /// Its kernel's release.
    pub kernel: String,
}

impl HostFacts {
    /// Of this host, which calls itself so.
    pub fn read(name: &str) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (cpuinfo, meminfo) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|it| it.1));
        let total =
            meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
        Self {
            name: name.into(),
            model: model.unwrap_or("unknown").trim().into(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            ram: total.map_or(0, |kib: u64| kib << 10),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
        }
    }
}

/// The monotonic clock, in ns.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Only a measuring guest is witnessed: of others, what they say is nobody's business, and they do not end so easily.
pub(crate) fn only_measuring(vm: Arc<Vm>) -> Result<Arc<Vm>, AgentError> {
    match vm.spec.measuring && vm.console().is_some() {
        true => Ok(vm),
        false => Err(AgentError::Conflict { message: format!("{} is no measuring guest", vm.name()), hint: None }),
    }
}

/// Tells until the guest, or whoever listens, is gone; ends the guest then.
pub(crate) async fn serve(agent: Arc<Agent>, vm: Arc<Vm>, connection: TokioIo<Upgraded>) {
    if let Some(console) = vm.console() {
        let lines = Framed::new(connection, LinesCodec::new_with_max_length(LONGEST_LINE));
        if let Err(error) = tell(&agent, &vm, console.view(), lines).await {
            tracing::debug!(vm = vm.name(), %error, "a witness was not heard to the end");
        }
    }
    if let Some(migration) = agent.migration_of(vm.name()) {
        // Too late once the guest is handed over; it has a witness there.
        migration.cancel();
    }
    while vm.is_alive() && vm.stage().is_migration() {
        tokio::time::sleep(END_AGAIN).await;
    }
    // Another VM may have that name by now.
    if !agent.vm(vm.name()).is_ok_and(|it| Arc::ptr_eq(&it, &vm)) {
        return;
    }
    let now = StopRequest { force: true, timeout_ms: 0 };
    if let Err(error) = lifecycle::stop(&agent, vm.name(), &now).await {
        tracing::warn!(vm = vm.name(), error = in_one_line(&error), "a measuring guest could not be ended");
    }
}

type Lines = Framed<TokioIo<Upgraded>, LinesCodec>;

async fn tell(
    agent: &Agent,
    vm: &Vm,
    mut viewer: Viewer,
    mut lines: Lines,
) -> Result<(), tokio_util::codec::LinesCodecError> {
    say(&mut lines, &Told::Host(HostFacts::read(&agent.config.name))).await?;
    if !viewer.past.is_empty() {
        say(&mut lines, &said(&viewer.past, true)).await?;
    }
    let watched = Watched { qemus: [Some(vm.pid), None], agents: [Some(std::process::id()), None] };
    let mut before = Look::take(&watched);
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
    loop {
        tokio::select! {
            // What the guest says is stamped before anything else is done.
            biased;
            output = viewer.output.recv() => match output {
                Ok(bytes) => say(&mut lines, &said(&bytes, false)).await?,
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(()),
            },
            line = lines.next() => match line.transpose()?.map(|line| serde_json::from_str(&line)) {
                Some(Ok(Asked::Clock(asked))) => say(&mut lines, &Told::Clock { asked, at_ns: monotonic_ns() }).await?,
                Some(Ok(Asked::Type(text))) => {
                    // The console is gone: its output says so.
                    let _ = viewer.input.send(text.into()).await;
                }
                Some(Err(error)) => tracing::debug!(%error, "a witness is asked something that it does not know"),
                None => return Ok(()),
            },
            _ = look.tick() => {
                let now = Look::take(&watched);
                let used = now.since(&before);
                before = now;
                say(&mut lines, &Told::Processors { at_ns: monotonic_ns(), used }).await?;
            }
        }
    }
}

fn said(bytes: &[u8], before: bool) -> Told {
    Told::Said { at_ns: monotonic_ns(), text: String::from_utf8_lossy(bytes).into_owned(), before }
}

async fn say(lines: &mut Lines, told: &Told) -> Result<(), tokio_util::codec::LinesCodecError> {
    lines.send(serde_json::to_string(told).expect("what is told is plain data")).await
}
