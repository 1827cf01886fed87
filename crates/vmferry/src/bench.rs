//! `bench`: measuring.

use std::path::Path;

use vmferry_agent::client::Client;
use vmferry_bench::link::{LinkBenchOptions, bench_host, bench_loopback};
use vmferry_bench::ram::{RamBenchOptions, bench_ram};

use crate::cli::{BenchLinkOptions, BenchRamOptions};
use crate::failure::Failure;

/// `client` is only asked for when an agent is needed.
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
    let wanted = RamBenchOptions { vmferry, rounds: options.rounds, only: options.only };
    let report = bench_ram(&wanted, |what| eprintln!("{what}")).await?;
    print!("{}", report.to_text());
    write(options.json.as_deref(), &report.to_json())
}

fn write(path: Option<&Path>, text: &str) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, text).map_err(|source| Failure::Report { path: path.into(), source })
}
