//! `bench`: measuring.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use vmferry_api::client::Client;
use vmferry_bench::batch::{Audience, Done, Job, Matrix, Place, batch as run_batch, read_all};
use vmferry_bench::compare::{Group, group_by_set_up, to_table, to_text};
use vmferry_bench::in_words;
use vmferry_bench::link::{LinkBenchOptions, bench_host, bench_loopback};
use vmferry_bench::ram::{RamBenchOptions, bench_ram};
use vmferry_bench::report::{Outcome, PageCheck, guestperf};
use vmferry_bench::run::{OtherHost, RunOptions, run as measure};
use vmferry_bench::scenario::{Scenario, names};

use crate::cli::{
    BatchOptions, BenchLinkOptions, BenchRamOptions, BenchRunOptions, CompareOptions, ImportOptions, PageOptions,
};
use crate::failure::Failure;

/// `client` is only asked for when an agent is needed.
pub(crate) async fn run(
    client: impl FnOnce() -> Result<Client, Failure>,
    options: BenchRunOptions,
) -> Result<(), Failure> {
    let to = options.to.map(|name| Ok::<_, Failure>(OtherHost { agent: client()?, name })).transpose()?;
    let guest = &options.guest;
    let wanted = RunOptions {
        vmferry: std::env::current_exe().map_err(Failure::NoFolder)?,
        scenario: Scenario::find(&options.scenario)?,
        engine: options.engine,
        kind: guest.accel.guest(),
        vcpus: guest.vcpus,
        mem: scaled(guest.mem, guest.scale),
        mode: guest.guest,
        rate: guest.rate,
        fill: guest.fill,
        transport: options.transport,
        link_bits: options.link,
        qemu_dir: options.qemu.map(std::path::absolute).transpose().map_err(Failure::NoFolder)?,
        kernel: options.kernel,
        to,
        before: guest.before,
        after: guest.after,
    };
    let report = unless_interrupted(async { Ok(measure(&wanted, |what| eprintln!("{what}")).await?) }).await?;
    write(Some(&options.output), &report.to_json())?;
    print!("{}", report.to_text());
    match report.page_check {
        PageCheck::Damaged { detail } => Err(Failure::Damaged(detail)),
        _ => Ok(()),
    }
}

/// In whole MiB, and no less than a guest needs to have something to rewrite.
fn scaled(mem: u64, scale: f64) -> u64 {
    const MIB: u64 = 1 << 20;
    ((mem as f64 * scale) as u64 / MIB * MIB).max(16 * MIB)
}

/// Does this until it is done or somebody ends it: then it is dropped, and with it all that it has started.
async fn unless_interrupted<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let mut terminated =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(Failure::Terminal)?;
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
        _ = terminated.recv() => Err(Failure::Interrupted),
    }
}

/// As above.
pub(crate) async fn batch(
    client: impl FnOnce() -> Result<Client, Failure>,
    options: BatchOptions,
) -> Result<(), Failure> {
    let vmferry = std::env::current_exe().map_err(Failure::NoFolder)?;
    let matrix = Matrix::read(&options.matrix)?;
    let to = matrix.to.clone().map(|name| Ok::<_, Failure>(OtherHost { agent: client()?, name })).transpose()?;
    let place = Place { vmferry, kernel: options.kernel, to };
    let bar = Bar::new();
    let running = async { Ok(run_batch(&matrix, &place, &options.output, &bar).await?) };
    let tally = Box::pin(unless_interrupted(running)).await?;
    bar.0.finish_and_clear();
    println!("{} runs measured, {} skipped, {} failed", tally.measured, tally.skipped, tally.failed);
    match tally.failed {
        0 => Ok(()),
        failed => Err(Failure::RunsFailed(failed)),
    }
}

/// How a batch goes: a bar at a terminal, and a line for each run.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let style = ProgressStyle::with_template("[{bar:24}] {pos}/{len} {msg}").expect("the template is valid");
        Self(ProgressBar::new(1).with_style(style.progress_chars("=> ")))
    }

    fn say(&self, line: &str) {
        if std::io::stderr().is_terminal() { self.0.println(line) } else { eprintln!("{line}") }
    }
}

impl Audience for Bar {
    fn begin(&self, done: usize, all: usize) {
        self.0.set_length(all as u64);
        self.0.set_position(done as u64);
        if done > 0 {
            self.say(&format!("{done} of {all} runs are done already"));
        }
    }

    fn run(&self, job: &Job) {
        self.0.set_message(job.name.clone());
    }

    fn done(&self, job: &Job, how: &Done<'_>, left: Option<Duration>) {
        self.0.inc(1);
        let words = match how {
            Done::Skipped(why) => format!("skipped: {why}"),
            Done::Failed(why) => format!("FAILED: {why}"),
            Done::Measured(report) => {
                let memory =
                    if matches!(report.page_check, PageCheck::Damaged { .. }) { ", memory DAMAGED" } else { "" };
                match &report.outcome {
                    Outcome::Completed => {
                        let total = in_words(report.summary.total_ms, |ms| format!("{:.1} s", ms / 1e3));
                        format!("{total}{memory}")
                    }
                    Outcome::NotCompleted { reason } => format!("did not complete: {reason}{memory}"),
                }
            }
        };
        let left = left.map_or(0, |left| left.as_secs());
        let eta = humantime::format_duration(Duration::from_secs(left));
        self.say(&format!("{}: {words} ({eta} left)", job.name));
    }
}

pub(crate) fn compare(options: &CompareOptions) -> Result<(), Failure> {
    if options.table {
        let mut groups = group_by_set_up(read_all(&options.what)?);
        groups.sort_by(|a, b| a.name.cmp(&b.name));
        print!("{}", to_table(&groups));
        return Ok(());
    }
    let mut sides = Vec::new();
    for path in &options.what {
        let runs = read_all(std::slice::from_ref(path))?;
        sides.push(Group { name: path.display().to_string(), runs });
    }
    if let [one] = sides.as_slice() {
        print!("{}", to_text(&group_by_set_up(one.runs.clone())));
        return Ok(());
    }
    let mut nothing_in_common = true;
    let all = sides.iter().flat_map(|side| side.runs.clone()).collect();
    for set_up in group_by_set_up(all) {
        let of_each = |side: &Group| {
            let runs: Vec<_> = side.runs.iter().filter(|run| run.set_up() == set_up.name).cloned().collect();
            (!runs.is_empty()).then(|| Group { name: side.name.clone(), runs })
        };
        let groups: Vec<Group> = sides.iter().filter_map(of_each).collect();
        if groups.len() > 1 {
            nothing_in_common = false;
            println!("{}\n\n{}", set_up.name, to_text(&groups));
        }
    }
    if nothing_in_common {
        print!("{}", to_text(&sides));
    }
    Ok(())
}

pub(crate) fn page(options: &PageOptions) -> Result<(), Failure> {
    let reports = read_all(&options.what)?;
    write(Some(&options.output), &vmferry_bench::page::page(&options.title, &reports))
}

pub(crate) fn scenarios() -> Result<(), Failure> {
    for name in names() {
        let scenario = Scenario::find(name)?;
        let engines: Vec<String> = scenario.engines.iter().map(ToString::to_string).collect();
        println!("{name:<28} {:<14} {}", engines.join(", "), scenario.about);
    }
    Ok(())
}

pub(crate) fn import_guestperf(options: &ImportOptions) -> Result<(), Failure> {
    let report = guestperf::import(&options.file)?;
    write(Some(&options.output), &report.to_json())?;
    print!("{}", report.to_text());
    Ok(())
}

/// As above.
pub(crate) async fn link(
    client: impl FnOnce() -> Result<Client, Failure>,
    options: BenchLinkOptions,
) -> Result<(), Failure> {
    let wanted = LinkBenchOptions { time: options.time, rounds: options.rounds, only_ours: options.only_ours };
    let tell = |what: &str| eprintln!("{what}");
    let report = match &options.host {
        Some(host) => bench_host(&client()?, host, &wanted, tell).await?,
        None => bench_loopback(&wanted, tell).await?,
    };
    print!("{}", report.to_text());
    write(options.json.as_deref(), &report.to_json())?;
    write(options.html.as_deref(), &report.to_html())
}

pub(crate) async fn ram(options: BenchRamOptions) -> Result<(), Failure> {
    let vmferry = std::env::current_exe().map_err(Failure::NoFolder)?;
    let wanted = RamBenchOptions { vmferry, rounds: options.rounds, only: options.only, kind: options.accel.guest() };
    let report = unless_interrupted(async { Ok(bench_ram(&wanted, |what| eprintln!("{what}")).await?) }).await?;
    print!("{}", report.to_text());
    write(options.json.as_deref(), &report.to_json())
}

fn write(path: Option<&Path>, text: &str) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, text).map_err(|source| Failure::Report { path: path.into(), source })
}
