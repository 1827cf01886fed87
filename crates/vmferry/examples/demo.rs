//! `make demo`: a guest that writes to its memory without a pause moves between two hosts, and keeps running.
//!
//! The two hosts are network namespaces when this runs as root, else two ports of the loopback address.

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use vmferry_agent::api::types::{MigrationEvent, Report};
use vmferry_bench::testbed::{GuestWatch, Testbed, TestbedOptions};
use vmferry_bench::{Fill, GuestOptions, Mode, in_words};

/// What the link between the namespaces carries.
const LINK_BITS: u64 = 1_000_000_000;
const RAM_MIB: u64 = 1024;
const WRITTEN_MIB: u64 = 512;
const MIB: f64 = 1_048_576.0;

type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime needs only threads and an epoll descriptor");
    match runtime.block_on(until_interrupted(demo())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A signal drops the demo where it stands, and the testbed with all it started.
async fn until_interrupted(demo: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        done = demo => done,
        _ = tokio::signal::ctrl_c() => Err("interrupted; nothing is left running".into()),
        _ = terminate.recv() => Err("terminated; nothing is left running".into()),
        _ = hangup.recv() => Err("hung up; nothing is left running".into()),
    }
}

/// The binary beside this one's folder: both are built by one `cargo build`.
fn vmferry_binary() -> Result<PathBuf, Error> {
    let here = std::env::current_exe()?;
    let binary = here.parent().and_then(|dir| dir.parent()).map(|dir| dir.join("vmferry"));
    binary.filter(|path| path.exists()).ok_or_else(|| "the vmferry binary is not built: use `make demo`".into())
}

async fn demo() -> Result<(), Error> {
    let namespaces = rustix::process::geteuid().is_root();
    let options = TestbedOptions {
        namespaces,
        link_bits: namespaces.then_some(LINK_BITS),
        ..TestbedOptions::new(vmferry_binary()?)
    };
    println!(
        "Two hosts, alpha and beta: {}.",
        match namespaces {
            true => "network namespaces, joined by a link of 1 Gbit/s",
            false => "two agents on the loopback address (as root they would be network namespaces)",
        }
    );
    let bed = Testbed::start(options).await?;

    println!("Booting a guest of {RAM_MIB} MiB on alpha; it rewrites {WRITTEN_MIB} MiB as fast as it can.");
    let guest = GuestOptions { mem: WRITTEN_MIB << 20, threads: 1, mode: Mode::Write, rate: None, fill: Fill::Random };
    let argv = bed.guest_command_line(&guest, RAM_MIB, 1)?;
    let (watch, notes) = bed.start_guest_and_hear("demo", argv).await?;
    for note in notes {
        println!("{note}");
    }
    let booted = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;

    println!("\n$ vmferry migrate demo --to {}\n", bed.beta().address);
    let begun = Instant::now();
    let report = migrate(&bed).await?;
    let over = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;

    println!("\nVerifying every page of the guest on beta.");
    let (pages, corrupt) = watch.verify(1).await?;
    print_table(&report, &watch, booted, begun, over);
    let log = watch.log();
    if log.restarted() {
        return Err("the guest's kernel crashed and rebooted".into());
    }
    if corrupt > 0 || !log.corrupt().is_empty() {
        return Err(format!("{corrupt} of {pages} pages are stale or torn: {:?}", log.corrupt()).into());
    }
    println!("All {pages} pages are as the guest wrote them.");
    Ok(())
}

/// As a user would, with the progress on the terminal; the report comes from the agent's events.
async fn migrate(bed: &Testbed) -> Result<Report, Error> {
    let to = bed.beta().address.to_string();
    let mut shown = bed.alpha().command(&["migrate", "demo", "--to", &to]).stdout(Stdio::null()).spawn()?;
    let client = bed.alpha().client()?;
    let id = loop {
        if let Some(id) = bed.alpha().show("demo").await?.and_then(|vm| vm.migration) {
            break id;
        }
        if let Some(status) = shown.try_wait()? {
            return Err(format!("the migration did not begin ({status})").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let path = format!("/v1/migrations/{id}/events");
    let report = client.follow(&path, |event| match event {
        MigrationEvent::Finished(report) => Some(Ok(*report)),
        MigrationEvent::Failed(problem) => Some(Err(problem.message)),
        _ => None,
    });
    let report = report.await??;
    shown.wait().await?;
    Ok(report)
}

fn print_table(report: &Report, watch: &GuestWatch, booted: Instant, begun: Instant, over: Instant) {
    let log = watch.log();
    let ms = |it: Option<Duration>| in_words(it.map(|it| it.as_secs_f64() * 1e3), |ms| format!("{ms:.0} ms"));
    let after = over + Duration::from_secs(60);
    // Of a round that was not ended it is known only how much of what was sent the guest wrote again.
    let least = if report.rounds > 1 { "" } else { "at least " };
    let dirty_rate = (report.dirty_rate > 0).then_some(report.dirty_rate as f64 / MIB);
    let dirty_rate = in_words(dirty_rate, |rate| format!("{least}{rate:.0} MiB/s"));
    let rows = [
        ("total time", format!("{:.1} s", report.total_ms / 1e3)),
        ("downtime, as the guest felt it", ms(log.downtime_felt())),
        ("worst stall of the running guest", ms(log.worst_stall(begun, after))),
        ("64 MiB rewritten, before", ms(log.median_64_mib(booted, begun))),
        ("64 MiB rewritten, worst", ms(log.worst_64_mib(begun, after))),
        ("bytes sent", format!("{:.0} MiB", report.sent as f64 / MIB)),
        ("dirty rate", dirty_rate),
        ("how", report.method().into()),
    ];
    println!();
    for (what, figure) in rows {
        println!("  {what:<34} {figure:>29}");
    }
    println!();
}
