//! One migration on a testbed, measured: what its report says, what the guest felt, and what it cost the agents.

use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use vmferry_agent::api::types::{MigrationEvent, Report};

use crate::testbed::{GuestWatch, Testbed, TestbedError};
use vmferry_qemu::proc_stat::Stat;

/// A guest that goes on for so long afterwards shows what it felt.
const AFTERWARDS: Duration = Duration::from_secs(1);
/// How often the agents are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What became of a migration.
#[derive(Clone, Debug)]
pub struct Measured {
    /// What vmferry says of it.
    pub report: Report,
    /// From the wish to the end, in ms.
    pub total_ms: f64,
    /// What the guest felt.
    pub felt: Felt,
    /// The median of that before it began, and until it ran elsewhere, in ms.
    pub median_64_mib_ms: (Option<f64>, Option<f64>),
    /// What threads that only read did before it began, and until the guest ran elsewhere, in bytes a second.
    pub read_per_second: (f64, f64),
    /// Resident memory of the source's agent and the destination's, in MiB: before.
    pub idle_rss_mib: [Option<f64>; 2],
    /// The most of it while it lasted.
    pub most_rss_mib: [Option<f64>; 2],
    /// Processor time of both agents, in seconds.
    pub cpu_s: [Option<f64>; 2],
}

/// What a guest felt of a migration, from its heartbeat and its writes; absent where it said too little.
#[derive(Clone, Copy, Debug)]
pub struct Felt {
    /// How long nobody ran it, in ms.
    pub downtime_ms: Option<f64>,
    /// The longest that its heart stood still besides, in ms.
    pub worst_stall_ms: Option<f64>,
    /// The longest that it took for 64 MiB, in ms.
    pub worst_64_mib_ms: Option<f64>,
}

/// Lets a guest that was moved go on for a moment, has it verify its memory, and tells what it felt since it began.
pub async fn felt(watch: &GuestWatch, begun: Instant) -> Result<Felt, TestbedError> {
    tokio::time::sleep(AFTERWARDS).await;
    let end = Instant::now();
    let (pages, corrupt) = watch.verify(1).await?;
    let log = watch.log();
    if corrupt > 0 || log.restarted() {
        return Err(failed(format!("{corrupt} of {pages} pages are stale or torn, or the kernel crashed")));
    }
    Ok(Felt {
        downtime_ms: ms(log.downtime_felt()),
        worst_stall_ms: ms(log.worst_stall(begun, end)),
        worst_64_mib_ms: ms(log.worst_64_mib(begun, end)),
    })
}

fn failed(text: String) -> TestbedError {
    TestbedError::Io(std::io::Error::other(text))
}

fn ms(time: Option<Duration>) -> Option<f64> {
    time.map(|time| time.as_secs_f64() * 1e3)
}

/// Migrates a guest from the first host of a testbed to the second with these arguments, and has it verify its memory
/// there.
pub async fn measure(bed: &Testbed, watch: &GuestWatch, vm: &str, more: &[&str]) -> Result<Measured, TestbedError> {
    let pids = [bed.alpha(), bed.beta()].map(crate::testbed::Host::agent_pid);
    let [Some(here), Some(there)] = pids else { return Err(failed("an agent has ended".into())) };
    let agents = [here, there];
    let (idle_rss_mib, cpu) = (agents.map(rss_mib), agents.map(cpu_s));
    let (mut most_rss_mib, mut text) = (idle_rss_mib, String::new());
    let to = bed.beta().address.to_string();
    let arguments: Vec<&str> = ["migrate", vm, "--to", &to, "--json"].iter().chain(more).copied().collect();
    let before = Instant::now();
    tokio::time::sleep(AFTERWARDS).await;
    let begun = Instant::now();
    let mut command = bed.alpha().command(&arguments).stdout(Stdio::piped()).spawn()?;
    let mut said = command.stdout.take().ok_or_else(|| failed("no output".into()))?;
    let reading = said.read_to_string(&mut text);
    tokio::pin!(reading);
    loop {
        tokio::select! {
            read = &mut reading => { read?; break }
            () = tokio::time::sleep(LOOK) => {
                for (most, pid) in most_rss_mib.iter_mut().zip(agents) {
                    *most = [*most, rss_mib(pid)].into_iter().flatten().reduce(f64::max);
                }
            }
        }
    }
    command.wait().await?;
    let total = begun.elapsed();
    let cpu_s = [0, 1].map(|side| Some(cpu_s(agents[side])? - cpu[side]?));
    let last = text.lines().last().ok_or_else(|| failed("the migration said nothing".into()))?;
    let report = match serde_json::from_str(last) {
        Ok(MigrationEvent::Finished(report)) => *report,
        _ => return Err(failed(format!("the migration did not finish: {last}"))),
    };
    let felt = felt(watch, begun).await?;
    let log = watch.log();
    let left = log.switchovers().next_back().map_or_else(Instant::now, |it| it.last.at);
    Ok(Measured {
        total_ms: total.as_secs_f64() * 1e3,
        felt,
        median_64_mib_ms: (ms(log.median_64_mib(before, begun)), ms(log.median_64_mib(begun, left))),
        read_per_second: (log.read_per_second(before, begun), log.read_per_second(begun, left)),
        idle_rss_mib,
        most_rss_mib,
        cpu_s,
        report,
    })
}

/// Resident memory of a process that is there, in MiB.
fn rss_mib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    Some(kib?.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1024.0)
}

/// Processor time of a process that is there, in seconds.
fn cpu_s(pid: u32) -> Option<f64> {
    Stat::read(&format!("/proc/{pid}/stat")).map(|stat| stat.own_s)
}
