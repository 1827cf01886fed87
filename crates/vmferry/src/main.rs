//! vmferry: hands-off live migration for QEMU/KVM guests.
//!
//! One binary: `vmferry agent` is the daemon, everything else talks to this host's agent over its Unix socket.

mod agent;
mod bench;
mod cli;
mod console;
mod copy;
mod disk;
mod failure;
mod migrate;
mod moving;
mod nbd;
mod pair;
mod predict;
mod request;
mod resolve;
mod several;
mod sim;
mod trace;
mod tune;
mod vms;
mod watched;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use vmferry_api::Resolve;
use vmferry_api::client::Client;

use crate::cli::{Bench, Cli, Command, Nbd};
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.command, Command::TraceQemu) {
        // Before there are other threads.
        vmferry_ram::trace_qemu();
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime needs only threads and an epoll descriptor");
    let result = runtime.block_on(run(cli));
    // A thread may still be reading the terminal.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.tell();
            ExitCode::from(failure.exit_code())
        }
    }
}

async fn run(cli: Cli) -> Result<(), Failure> {
    // The agent and the completions need no agent.
    let client = || client(cli.socket);
    match cli.command {
        Command::Agent(options) => agent::run(options).await,
        Command::Run { name, autostart, argv } => vms::run(&client()?, name, autostart, argv).await,
        Command::Adopt { name, qmp } => vms::adopt(&client()?, name, qmp).await,
        Command::List { json } => vms::list(&client()?, json).await,
        Command::Show { name, json } => vms::show(&client()?, &name, json).await,
        Command::Stop { name, force, keep, timeout } => vms::stop(&client()?, &name, force, keep, timeout.into()).await,
        Command::Start { name, undisputed } => vms::start(&client()?, &name, undisputed).await,
        Command::Pause { name } => vms::pause(&client()?, &name).await,
        Command::Resume { name } => vms::resume(&client()?, &name).await,
        Command::Autostart { name, on } => vms::autostart(&client()?, &name, on == "on").await,
        Command::Console { name } => console::run(&client()?, &name).await,
        Command::Migrate(options) if options.names.len() > 1 => several::run(&client()?, options).await,
        Command::Migrate(options) => migrate::run(&client()?, options).await,
        Command::Predict(options) => predict::run(&client()?, options).await,
        Command::Sim(options) => sim::run(&options),
        Command::Move(options) => moving::run(&client()?, options).await,
        Command::Copy(options) => copy::run(&client()?, options).await,
        Command::Tune(options) => tune::run(&client()?, options).await,
        Command::PostCopy { name } => migrate::post_copy(&client()?, &name).await,
        Command::Cancel { name } => migrate::cancel(&client()?, &name).await,
        Command::Resolve { name, keep_here, yes, .. } => {
            let how = if keep_here { Resolve::KeepHere } else { Resolve::ItRunsThere };
            resolve::run(&client()?, &name, how, yes).await
        }
        Command::Pair { token: Some(token), .. } => pair::use_token(&client()?, token).await,
        Command::Pair { token: None, expires, quiet } => pair::make_token(&client()?, expires.into(), quiet).await,
        Command::Peers { json } => pair::list(&client()?, json).await,
        Command::Unpair { peer } => pair::unpair(&client()?, &peer).await,
        Command::Migrations { json } => migrate::list(&client()?, json).await,
        Command::Bench(Bench::Run(options)) => Box::pin(bench::run(client, *options)).await,
        Command::Bench(Bench::Batch(options)) => Box::pin(bench::batch(client, options)).await,
        Command::Bench(Bench::Compare(options)) => bench::compare(&options),
        Command::Bench(Bench::Page(options)) => bench::page(&options),
        Command::Bench(Bench::Scenarios) => bench::scenarios(),
        Command::Bench(Bench::ImportGuestperf(options)) => bench::import_guestperf(&options),
        Command::Bench(Bench::Link(options)) => bench::link(client, options).await,
        Command::Bench(Bench::Ram(options)) => bench::ram(options).await,
        Command::Disk(what) => disk::run(&client()?, what).await,
        Command::Nbd(Nbd::Serve(options)) => nbd::serve(options).await,
        Command::Nbd(Nbd::Info(options)) => nbd::info(&options),
        Command::Nbd(Nbd::Copy(options)) => nbd::copy(&options).await,
        Command::TraceQemu => unreachable!("it has a process without a runtime"),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "vmferry", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// This host's agent: at the socket given, or at the one that its configuration names.
fn client(socket: Option<PathBuf>) -> Result<Client, Failure> {
    let socket = match socket {
        Some(socket) => socket,
        None => agent::usual_socket()?,
    };
    Ok(Client::new(&socket)?)
}
