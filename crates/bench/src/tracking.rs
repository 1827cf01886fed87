//! What it costs a guest that its writes are tracked, and nothing else is done to it.

use std::time::{Duration, Instant};

use serde::Serialize;
use vmferry_ram::{Backend, GuestRam, Tracking, TrackingError};

use crate::testbed::{GuestWatch, TestbedError};

/// How long the guest's speed is measured each time.
const WINDOW: Duration = Duration::from_secs(3);

/// How fast a guest rewrote its memory, or read it, in MiB/s.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Tracked {
    /// What it does.
    pub(crate) what: &'static str,
    /// Before, untouched.
    pub(crate) before: f64,
    /// While all its RAM was tracked: how often it was looked what was written, in ms, and the speed.
    pub(crate) looks: Vec<(u64, f64)>,
    /// In the three seconds after that ended.
    pub(crate) after: f64,
}

/// Tracks the RAM, of so many bytes, of the QEMU of this process.
pub(crate) async fn track(
    watch: &GuestWatch,
    pid: u32,
    ram_bytes: u64,
    what: &'static str,
    every: &[Duration],
) -> Result<Tracked, TestbedError> {
    let speed = || {
        let now = Instant::now();
        let (since, log) = (now.checked_sub(WINDOW).unwrap_or(now), watch.log());
        (log.rewritten_per_second(since, now) + log.read_per_second(since, now)) / f64::from(1 << 20)
    };
    tokio::time::sleep(WINDOW).await;
    let before = speed();
    let mut looks = Vec::new();
    for every in every.iter().copied() {
        let tracked = tokio::task::spawn_blocking(move || look_for(pid, ram_bytes, every)).await;
        tracked.expect("tracking does not panic").map_err(|error| TestbedError::Io(std::io::Error::other(error)))?;
        looks.push((every.as_millis() as u64, speed()));
    }
    tokio::time::sleep(WINDOW).await;
    Ok(Tracked { what, before, looks, after: speed() })
}

fn look_for(pid: u32, ram_bytes: u64, every: Duration) -> Result<(), TrackingError> {
    let ram = GuestRam::open(pid, &[Backend { id: "ram".into(), size: ram_bytes, address: None }])?;
    let tracking = Tracking::begin(&ram)?;
    tracking.protect(0, 0..ram_bytes)?;
    let (begun, mut written) = (Instant::now(), Vec::new());
    while begun.elapsed() < WINDOW {
        std::thread::sleep(every);
        written.clear();
        tracking.take_written(0, 0..ram_bytes, &mut written)?;
    }
    Ok(())
}
