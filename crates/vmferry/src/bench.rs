//! `bench`: measuring.

use vmferry_agent::client::Client;
use vmferry_bench::link::{LinkBenchOptions, bench_host, bench_loopback};

use crate::cli::BenchLinkOptions;
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
    for (path, text) in [(&options.json, report.to_json()), (&options.html, report.to_html())] {
        if let Some(path) = path {
            std::fs::write(path, text).map_err(|source| Failure::Report { path: path.clone(), source })?;
        }
    }
    Ok(())
}
