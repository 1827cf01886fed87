//! `vmferry agent`: the daemon.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use vmferry_agent::config::{Config, LogFormat};

use crate::cli::AgentOptions;
use crate::failure::Failure;

pub(crate) async fn run(options: AgentOptions) -> Result<(), Failure> {
    let mut config = Config::load(options.config.as_deref()).map_err(|error| Failure::Serve(error.into()))?;
    if let Some(listen) = options.listen {
        config.listen = listen;
    }
    log_to_stderr(config.log_format);
    vmferry_ram::trace_by(|| {
        let mut tracer = Command::new("/proc/self/exe");
        tracer.arg("trace-qemu");
        tracer
    });
    let end = CancellationToken::new();
    let failed = |error: std::io::Error| Failure::Serve(error.into());
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::spawn({
        let end = end.clone();
        async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            end.cancel();
        }
    });
    vmferry_agent::serve(config, end).await.map_err(|error| Failure::Serve(error.into()))
}

/// Where the agent of this host is reached, as its configuration says.
pub(crate) fn usual_socket() -> Result<PathBuf, Failure> {
    Ok(Config::load(None).map_err(|error| Failure::Serve(error.into()))?.socket())
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Colours are for people who look on; a journal or a file keeps them as noise.
    let log = log.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}
