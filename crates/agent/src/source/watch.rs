//! A guest is watched before its migration, and nothing of it is sent: how much it writes within how long.
//!
//! The agent tracks its memory where it can, whoever is to move it later. Where it cannot, QEMU tells of a sample of its
//! pages how many have changed (`calc-dirty-rate`, which reads them twice): one number where tracking gives a dozen. What
//! either leaves in the guest is nothing, also when the agent is killed meanwhile.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use vmferry_api::{WatchedView, Watcher, WrittenWithin, in_one_line};
use vmferry_qemu::Qmp;
use vmferry_ram::{Backend, GuestRam, RamError, Watch};

use crate::engine::movable::movable;
use crate::error::{AgentError, EngineError};
use crate::host::{Host, Vm};

/// How often it is looked what was written: seldom at the end, as what a short round leaves decides the downtime.
const LOOKS: u32 = 12;
/// Whoever asks may not want it any more.
const SLICE: Duration = Duration::from_millis(50);
/// QEMU looks at so many pages of each GiB, and at so many in all.
const SAMPLED: (u64, u64) = (4096, 65_536);
/// The fewest and the most of each GiB that it takes for an answer.
const SAMPLES: (u64, u64) = (128, 4096);
/// QEMU leaves out blocks of RAM that are smaller, in bytes.
pub(super) const LEAST_BLOCK: u64 = 128 << 20;
/// How much longer than was asked for its answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Watches this guest for so long, unless nobody wants it any more; then there is nothing. Says also why it could not be
/// watched as well as it should.
pub(super) async fn watch(
    host: &Host,
    vm: &Vm,
    time: Duration,
    unwanted: &CancellationToken,
) -> Result<Option<(WatchedView, Vec<String>)>, AgentError> {
    if time.is_zero() {
        let note = "The guest was not watched: how it writes is not known, and the ranges are wide.";
        return Ok(Some((WatchedView::default(), vec![note.into()])));
    }
    let by_agent = match movable(host, vm).await? {
        Ok(movable) => by_agent(vm.pid, movable.backends, time, unwanted).await.map_err(|error| in_one_line(&error)),
        Err(why) => Err(why),
    };
    let why = match by_agent {
        Ok(watched) => return Ok(watched.map(|view| (view, Vec::new()))),
        Err(why) => why,
    };
    match by_qemu(&vm.qmp, vm.ram_bytes().await?, time, unwanted).await {
        Ok(Some(view)) => {
            let note = format!("QEMU looked at a sample of the guest's pages, as the agent cannot track them: {why}.");
            Ok(Some((view, vec![note])))
        }
        Ok(None) => Ok(None),
        Err(too) => {
            let note = format!(
                "How the guest writes is not known, and the ranges are wide: the agent cannot track it ({why}), nor does \
                 QEMU tell ({too})."
            );
            Ok(Some((WatchedView::default(), vec![note])))
        }
    }
}

async fn by_agent(
    pid: u32,
    backends: Vec<Backend>,
    time: Duration,
    unwanted: &CancellationToken,
) -> Result<Option<WatchedView>, EngineError> {
    let unwanted = unwanted.clone();
    let watching = move || track(pid, &backends, time, &unwanted);
    Ok(tokio::task::spawn_blocking(watching).await.expect("watching does not panic")?)
}

/// Blocks.
fn track(
    pid: u32,
    backends: &[Backend],
    time: Duration,
    unwanted: &CancellationToken,
) -> Result<Option<WatchedView>, RamError> {
    let (begun, watch) = (Instant::now(), Watch::begin(GuestRam::open(pid, backends)?)?);
    let mut view = WatchedView { by: Watcher::Agent, ..WatchedView::default() };
    for look in 1..=LOOKS {
        let due = time.mul_f64(f64::from(look * look) / f64::from(LOOKS * LOOKS));
        while begun.elapsed() < due {
            if unwanted.is_cancelled() {
                return Ok(None);
            }
            std::thread::sleep(SLICE.min(due.saturating_sub(begun.elapsed())));
        }
        let found = watch.look()?;
        let is_new = |last: &WrittenWithin| ms(found.after) > last.ms;
        if view.written.last().is_none_or(is_new) {
            view.written.push(WrittenWithin { ms: ms(found.after), bytes: found.bytes });
        }
        view.longest_scan_ms = view.longest_scan_ms.max(ms(found.took));
        view.scans += 1;
        view.faults = found.bytes / vmferry_ram::PAGE;
    }
    view.in_use = (watch.tracked() as f64 * watch.share_in_use()?) as u64;
    view.stood_still_ms = ms(watch.beginning().0);
    view.ms = ms(begun.elapsed());
    Ok(Some(view))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What QEMU answers to `query-dirty-rate`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    status: String,
    /// In MiB a second, rounded down.
    #[serde(rename = "dirty-rate")]
    rate: Option<u64>,
    /// In seconds.
    calc_time: u64,
}

async fn by_qemu(
    qmp: &Qmp,
    ram: u64,
    time: Duration,
    unwanted: &CancellationToken,
) -> Result<Option<WatchedView>, String> {
    if ram < LEAST_BLOCK {
        return Err("it looks at no RAM of less than 128 MiB".into());
    }
    let failed = |error| in_one_line(&error);
    let seconds = time.as_secs_f64().ceil() as u64;
    let samples = (SAMPLED.1 * (1 << 30) / ram).min(SAMPLED.0).clamp(SAMPLES.0, SAMPLES.1);
    let asked = json!({ "calc-time": seconds, "sample-pages": samples });
    qmp.execute_raw("calc-dirty-rate", asked).await.map_err(failed)?;
    let begun = Instant::now();
    let told = loop {
        tokio::time::sleep(SLICE).await;
        if unwanted.is_cancelled() {
            return Ok(None);
        }
        let told = qmp.execute_raw("query-dirty-rate", json!({})).await.map_err(failed)?;
        let told: Told = serde_json::from_value(told).map_err(|error| in_one_line(&error))?;
        if told.status == "measured" {
            break told;
        }
        if begun.elapsed() > time + PATIENCE {
            return Err(format!("it was still {} after {} s", told.status, begun.elapsed().as_secs()));
        }
    };
    let rate = told.rate.ok_or("it measured, and gives no rate")?;
    let within = told.calc_time.max(1);
    let written = WrittenWithin { ms: within as f64 * 1e3, bytes: (rate * within) << 20 };
    let ms = ms(begun.elapsed());
    Ok(Some(WatchedView { by: Watcher::Qemu, ms, scans: 2, written: vec![written], ..WatchedView::default() }))
}
