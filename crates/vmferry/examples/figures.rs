//! `make bench`: the figures of docs/FIGURES.md, measured side by side in one run and printed as medians.
//!
//! Needs root (the hosts are network namespaces) and both QEMUs (`scripts/setup.sh --for-tests`). What is compared is
//! alternated, so that a machine that gets slower does so for both.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use vmferry_agent::api::types::{Step, StepTime};
use vmferry_bench::migration::{Felt, felt, measure};
use vmferry_bench::testbed::{Testbed, TestbedOptions, two_qemus};
use vmferry_bench::{Fill, GuestOptions, Mode, in_words};
use vmferry_qemu::qmp::commands::{
    CapabilityState, Migrate, MigrateIncoming, MigrateSetCapabilities, MigrationParameters, QueryMigrate, Quit,
};
use vmferry_qemu::{MigrationStatus, Qmp};

const RUNS: usize = 5;
const RAM_MIB: u64 = 1024;
const WRITTEN_MIB: u64 = 512;
const GIGABIT: u64 = 1_000_000_000;
const SOON: Duration = Duration::from_secs(10);
const VM: &str = "figures";

type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime needs only threads and an epoll descriptor");
    let figures = async {
        tokio::select! {
            done = figures() => done,
            _ = tokio::signal::ctrl_c() => Err("interrupted; nothing is left running".into()),
        }
    };
    match runtime.block_on(figures) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("figures: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn figures() -> Result<(), Error> {
    let [older, newer] = two_qemus()?;
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|it| it == part);
    if wants("link") {
        link().await?;
    }
    if wants("idle") {
        idle(newer.clone()).await?;
    }
    if wants("writing") {
        writing("the newer QEMU", newer).await?;
        writing("the older QEMU", older).await?;
    }
    Ok(())
}

/// What one migration did.
struct Run {
    /// From the wish to the source's end, in ms.
    total: f64,
    /// Of that, copying the RAM and switching over.
    copy: f64,
    felt: Felt,
    sent_mib: Option<f64>,
    how: &'static str,
    steps: Vec<StepTime>,
    /// Of the source's agent, in MiB: before, and the most while it migrated.
    rss: (Option<f64>, Option<f64>),
}

/// What the link carries and costs: between two hosts at 1 Gbit/s, and where the processor is the limit, beside others.
async fn link() -> Result<(), Error> {
    let testbed = testbed(None, Some(GIGABIT), Network::Trusted).await?;
    println!("\nThe link, 1 Gbit/s\n");
    print_said(&testbed.alpha().vmferry(&["bench", "link", "beta", "--time", "8s"]).await?)?;
    drop(testbed);
    println!("\nThe link, loopback\n");
    let loopback = ["bench", "link", "--loopback", "--time", "2s", "--rounds", "3"];
    print_said(&tokio::process::Command::new(vmferry()?).args(loopback).output().await?)
}

fn print_said(output: &std::process::Output) -> Result<(), Error> {
    print!("{}", String::from_utf8_lossy(&output.stdout));
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
    }
}

/// An idle guest over a link that is as fast as it gets: vmferry beside the same two QEMUs driven by hand.
async fn idle(qemu: Option<PathBuf>) -> Result<(), Error> {
    let guest = GuestOptions { mem: WRITTEN_MIB << 20, threads: 1, mode: Mode::Idle, rate: None, fill: Fill::Random };
    let (mut plain, mut by_hand, mut encrypted, mut multifd) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let no_post_copy = ["--no-post-copy"];
    for _ in 0..RUNS {
        plain.push(migrate(qemu.clone(), None, Network::Trusted, &guest, &[]).await?);
        by_hand.push(drive_by_hand(qemu.clone(), &guest).await?);
        encrypted.push(migrate(qemu.clone(), None, Network::Any, &guest, &[]).await?);
        multifd.push(migrate(qemu.clone(), None, Network::Any, &guest, &no_post_copy).await?);
    }
    println!(
        "\nIdle guest of {RAM_MIB} MiB, {WRITTEN_MIB} MiB of it random, unshaped link; medians of {RUNS} (lowest to highest)\n"
    );
    println!("| | total | RAM and switchover | downtime felt |");
    println!("| --- | --- | --- | --- |");
    for (name, runs) in [
        ("by hand over QMP, plain", &by_hand),
        ("vmferry, plain", &plain),
        ("vmferry, encrypted", &encrypted),
        ("vmferry, encrypted, multifd", &multifd),
    ] {
        println!(
            "| {name} | {} | {} | {} |",
            ms(runs, |it| Some(it.total)),
            ms(runs, |it| Some(it.copy)),
            ms(runs, |it| it.felt.downtime_ms)
        );
    }
    println!(
        "\nvmferry / by hand, both plain: total {}, downtime felt {}",
        ratio(&plain, &by_hand, |it| Some(it.total)),
        ratio(&plain, &by_hand, |it| it.felt.downtime_ms)
    );
    steps(&plain);
    memory(&encrypted);
    Ok(())
}

/// A guest that writes faster than the link carries.
async fn writing(which: &str, qemu: Option<PathBuf>) -> Result<(), Error> {
    let guest = GuestOptions { mem: WRITTEN_MIB << 20, threads: 1, mode: Mode::Write, rate: None, fill: Fill::Random };
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(migrate(qemu.clone(), Some(GIGABIT), Network::Any, &guest, &[]).await?);
    }
    println!(
        "\nGuest of {RAM_MIB} MiB that rewrites {WRITTEN_MIB} MiB at full speed, 1 Gbit/s, {which}; medians of {RUNS} (lowest to highest)\n"
    );
    println!("| total | downtime felt | worst stall | 64 MiB rewritten, worst | sent (MiB) | how |");
    println!("| --- | --- | --- | --- | --- | --- |");
    println!(
        "| {} | {} | {} | {} | {} | {} |",
        ms(&runs, |it| Some(it.total)),
        ms(&runs, |it| it.felt.downtime_ms),
        ms(&runs, |it| it.felt.worst_stall_ms),
        ms(&runs, |it| it.felt.worst_64_mib_ms),
        number(median(&runs, |it| it.sent_mib), 0),
        runs[0].how
    );
    memory(&runs);
    Ok(())
}

fn steps(runs: &[Run]) {
    let words: Vec<String> = (0..runs[0].steps.len())
        .map(|index| {
            let ms = median(runs, |it| Some(it.steps.get(index)?.ms));
            format!("{:?} {}", runs[0].steps[index].step, number(ms, 0))
        })
        .collect();
    println!("\nSteps of vmferry, in ms: {}", words.join(", "));
}

fn memory(runs: &[Run]) {
    println!(
        "\nMemory of the source's agent (RSS): {} MiB idle, {} MiB migrating",
        number(median(runs, |it| it.rss.0), 1),
        number(median(runs, |it| it.rss.1), 1)
    );
}

/// Of the runs that have it.
fn sorted(runs: &[Run], figure: impl Fn(&Run) -> Option<f64>) -> Vec<f64> {
    let mut figures: Vec<f64> = runs.iter().filter_map(figure).collect();
    figures.sort_by(f64::total_cmp);
    figures
}

fn median(runs: &[Run], figure: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
    let figures = sorted(runs, figure);
    figures.get(figures.len() / 2).copied()
}

fn number(figure: Option<f64>, digits: usize) -> String {
    in_words(figure, |it| format!("{it:.digits$}"))
}

fn ratio(of: &[Run], to: &[Run], figure: impl Fn(&Run) -> Option<f64>) -> String {
    number(median(of, &figure).zip(median(to, &figure)).map(|(of, to)| of / to), 2)
}

fn ms(runs: &[Run], figure: impl Fn(&Run) -> Option<f64>) -> String {
    let figures = sorted(runs, &figure);
    in_words(median(runs, &figure), |median| {
        format!("{median:.0} ms ({:.0} to {:.0})", figures[0], figures[figures.len() - 1])
    })
}

/// Whether guests travel encrypted.
#[derive(Clone, Copy)]
enum Network {
    Any,
    Trusted,
}

fn vmferry() -> Result<PathBuf, Error> {
    let here = std::env::current_exe()?;
    Ok(here.parent().and_then(Path::parent).ok_or("this is in no folder")?.join("vmferry"))
}

async fn testbed(qemu: Option<PathBuf>, link_bits: Option<u64>, network: Network) -> Result<Testbed, Error> {
    let config = match network {
        Network::Any => String::new(),
        Network::Trusted => "[[network]]\ncidr = \"192.0.2.0/24\"\nsecurity = \"plain\"".into(),
    };
    let options = TestbedOptions {
        namespaces: true,
        link_bits,
        qemu_dirs: [qemu.clone(), qemu],
        config: [config.clone(), config],
        ..TestbedOptions::new(vmferry()?)
    };
    Ok(Testbed::start(options).await?)
}

async fn migrate(
    qemu: Option<PathBuf>,
    link_bits: Option<u64>,
    network: Network,
    guest: &GuestOptions,
    more: &[&str],
) -> Result<Run, Error> {
    let bed = testbed(qemu, link_bits, network).await?;
    let watch = bed.start_guest(VM, bed.guest_command_line(guest, RAM_MIB, 1)?).await?;
    let measured = measure(&bed, &watch, VM, more).await?;
    let report = measured.report;
    let before_or_after = [Step::Plan, Step::Prepare, Step::Retire];
    let copy: f64 = report.steps.iter().filter(|it| !before_or_after.contains(&it.step)).map(|it| it.ms).sum();
    Ok(Run {
        total: measured.total_ms,
        copy,
        felt: measured.felt,
        sent_mib: Some(report.sent as f64 / f64::from(1 << 20)),
        how: report.method(),
        steps: report.steps,
        rss: (measured.idle_rss_mib[0], measured.most_rss_mib[0]),
    })
}

/// The same migration as somebody who knows QEMU well would do it in a script: the destination's QEMU with the source's
/// command line, the same capabilities, no cap on the bandwidth, and nothing in between.
async fn drive_by_hand(qemu: Option<PathBuf>, guest: &GuestOptions) -> Result<Run, Error> {
    let bed = testbed(qemu, None, Network::Trusted).await?;
    let mut argv = bed.guest_command_line(guest, RAM_MIB, 1)?;
    argv.extend(["-qmp", "unix:hand.sock,server=on,wait=off"].map(str::to_owned));
    let mut watch = bed.start_guest(VM, argv).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let source = Qmp::connect(&bed.dir().join("hand.sock"), SOON).await?;
    let pid = bed.alpha().show(VM).await?.ok_or("the VM is gone")?.pid;
    let argv = vmferry_qemu::process_command_line(pid);
    let binary = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    let environment = std::fs::read(format!("/proc/{pid}/environ"))?;
    let dir = bed.dir().join("by-hand");
    std::fs::create_dir(&dir)?;
    let theirs = bed.alpha().run_dir.join("vms").join(VM).display().to_string();
    let begun = Instant::now();

    let mut command = bed.beta().process(&binary);
    command
        .args(argv.iter().skip(1).map(|word| of_its_own(&word.replace(&theirs, &dir.display().to_string()))))
        .args(["-incoming", "defer"])
        .envs(environment_of(&environment))
        .current_dir(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    let mut there = command.spawn()?;
    let destination = Qmp::connect(&dir.join("qmp.sock"), SOON).await?;
    watch.follow_socket(1, &dir.join("console.sock")).await?;
    let copying = Instant::now();
    let states =
        |names: &[&str]| names.iter().map(|name| CapabilityState { capability: (*name).into(), state: true }).collect();
    let capabilities = ["events", "return-path", "auto-converge", "postcopy-ram", "postcopy-preempt"];
    for qmp in [&source, &destination] {
        qmp.execute(MigrateSetCapabilities { capabilities: states(&capabilities) }).await?;
    }
    let parameters = MigrationParameters {
        max_bandwidth: Some(1 << 50),
        downtime_limit: Some(300),
        ..MigrationParameters::default()
    };
    source.execute(parameters).await?;
    let address = bed.beta().address.ip();
    destination.execute(MigrateIncoming { uri: format!("tcp:{address}:0") }).await?;
    let listening = destination.execute(QueryMigrate {}).await?.socket_address.ok_or("it does not listen")?;
    let port = listening[0].tcp_port().ok_or("it listens on no port")?;
    let mut events = source.events();
    source.execute(Migrate { uri: format!("tcp:{address}:{port}"), resume: None }).await?;
    loop {
        match events.next().await.ok_or("the source's QEMU ended")?.as_migration_status() {
            Some(MigrationStatus::Completed) => break,
            Some(MigrationStatus::Failed) => return Err("QEMU's migration failed".into()),
            _ => {}
        }
    }
    let copy = copying.elapsed().as_secs_f64() * 1e3;
    source.execute(Quit {}).await?;
    source.closed().await;
    let total = begun.elapsed();
    let felt = felt(&watch, begun).await?;
    there.kill().await?;
    let total = total.as_secs_f64() * 1e3;
    Ok(Run { total, copy, felt, sent_mib: None, how: "by hand", steps: Vec::new(), rss: (None, None) })
}

/// The source's RAM is a descriptor that it has inherited.
fn of_its_own(word: &str) -> String {
    match word.split_once("mem-path=/proc/self/fd/") {
        Some((before, after)) => {
            let rest = after.trim_start_matches(|digit: char| digit.is_ascii_digit());
            format!("{before}mem-path=/dev/shm{rest}")
        }
        None => word.to_owned(),
    }
}

fn environment_of(bytes: &[u8]) -> impl Iterator<Item = (String, String)> {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let pairs: Vec<(String, String)> =
        text.split('\0').filter_map(|pair| pair.split_once('=').map(|(k, v)| (k.into(), v.into()))).collect();
    pairs.into_iter()
}
