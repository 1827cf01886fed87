//! What a host hears of a measuring guest, told to whoever measures, on this host or another: lines of JSON.
//!
//! A [`Told`] comes for everything that the guest says, with the moment by this host's monotonic clock, as it arrived
//! from QEMU: what is on its way over a busy link costs the measurement nothing. Twice a second it tells what processors
//! did. An [`Asked`] can be answered at once, to compare the clocks of two hosts, or typed into the guest's console.
//!
//! A measuring guest lives for its witnesses: when the last one goes, it is ended on the host that owns it ([`guard`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::MissedTickBehavior;
use tokio_util::codec::{Framed, LinesCodec};
use vmferry_api::witness::{Asked, HostFacts, LONGEST_LINE, Told, monotonic_ns};
use vmferry_api::{StopRequest, in_one_line};
use vmferry_qemu::processors::{Look, Watched};

use crate::error::AgentError;
use crate::host::{self, Host, Present, Viewer, Vm};

/// How often it is told what processors did.
const LOOK: Duration = Duration::from_millis(500);
/// How often it is looked whether a guest has witnesses.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The first one may take so long to come.
const LONELY: Duration = Duration::from_secs(20);

/// Only a measuring guest is witnessed: of others, what they say is nobody's business, and they do not end so easily.
pub(crate) fn only_measuring(vm: Arc<Vm>) -> Result<Arc<Vm>, AgentError> {
    match vm.spec.measuring && vm.console().is_some() {
        true => Ok(vm),
        false => Err(AgentError::Conflict { message: format!("{} is no measuring guest", vm.name()), hint: None }),
    }
}

/// Tells until the guest, or whoever listens, is gone.
pub(crate) async fn serve(host: Arc<Host>, vm: Arc<Vm>, connection: TokioIo<Upgraded>) {
    let Some(console) = vm.console() else { return };
    let _present = Present::of(&vm.attendance);
    let lines = Framed::new(connection, LinesCodec::new_with_max_length(LONGEST_LINE));
    if let Err(error) = tell(&host, &vm, console.view(), lines).await {
        tracing::debug!(vm = vm.name(), %error, "a witness was not heard to the end");
    }
}

/// Ends a measuring guest that no witness has any more, or that none has come to for a while: `cancel` ends its migration
/// first, unless that is too late. One that another host owns is that host's to end.
pub(crate) async fn guard(host: Arc<Host>, vm: Arc<Vm>, cancel: impl Fn(&str)) {
    let mut alone_since = Instant::now();
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        // Another VM may have that name by now.
        if !host.vm(vm.name()).is_ok_and(|it| Arc::ptr_eq(&it, &vm)) {
            return;
        }
        if vm.attendance.is_witnessed() {
            alone_since = Instant::now();
            continue;
        }
        if !vm.attendance.ever() && alone_since.elapsed() < LONELY {
            continue;
        }
        cancel(vm.name());
        if !vm.stage().is_migration() {
            let now = StopRequest { force: true, keep: false, timeout_ms: 0 };
            if let Err(error) = host::stop(&host, vm.name(), &now).await {
                tracing::warn!(vm = vm.name(), error = in_one_line(&error), "a measuring guest cannot be ended yet");
            }
        }
    }
}

type Lines = Framed<TokioIo<Upgraded>, LinesCodec>;

async fn tell(
    host: &Host,
    vm: &Vm,
    mut viewer: Viewer,
    mut lines: Lines,
) -> Result<(), tokio_util::codec::LinesCodecError> {
    say(&mut lines, &Told::Host(HostFacts::read(&host.config.name))).await?;
    if !viewer.past.is_empty() {
        say(&mut lines, &said(monotonic_ns(), &viewer.past, true)).await?;
    }
    let watched = Watched { qemus: [Some(vm.pid), None], agents: [Some(std::process::id()), None] };
    let mut before = Look::take(&watched);
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            output = viewer.output.recv() => match output {
                Ok(printed) => say(&mut lines, &said(printed.at_ns, &printed.bytes, false)).await?,
                Err(RecvError::Lagged(pieces)) => say(&mut lines, &Told::Lost { pieces }).await?,
                Err(RecvError::Closed) => return Ok(()),
            },
            line = lines.next() => match line.transpose()?.map(|line| serde_json::from_str(&line)) {
                Some(Ok(Asked::Clock(asked))) => say(&mut lines, &Told::Clock { asked, at_ns: monotonic_ns() }).await?,
                Some(Ok(Asked::Type(text))) => {
                    // The console is gone, which its output says; or the guest takes nothing, which the asker notices.
                    let _ = viewer.input.try_send(text.into());
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

fn said(at_ns: u64, bytes: &[u8], before: bool) -> Told {
    Told::Said { at_ns, text: String::from_utf8_lossy(bytes).into_owned(), before }
}

async fn say(lines: &mut Lines, told: &Told) -> Result<(), tokio_util::codec::LinesCodecError> {
    lines.send(serde_json::to_string(told).expect("what is told is plain data")).await
}
