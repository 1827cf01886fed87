//! `vmferry agent`: the daemon.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use vmferry_agent::config::{Config, LogFormat};

use crate::cli::AgentOptions;
use crate::failure::Failure;

/// What systemd gives to every service as the hard limit. Where that is a thousand million, as in some containers, a
/// QEMU that closes every descriptor there may be, as older ones do before they run a network script, does nothing else
/// for minutes.
const MOST_DESCRIPTORS: u64 = 524_288;

pub(crate) async fn run(options: AgentOptions) -> Result<(), Failure> {
    let mut config = Config::load(options.config.as_deref()).map_err(|error| Failure::Serve(error.into()))?;
    if let Some(listen) = options.listen {
        config.listen = listen;
    }
    log_to_stderr(config.log_format);
    raise_descriptor_limit();
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

/// Every VM takes some descriptors, and the soft limit is usually 1024, for the sake of programs that use `select`. Neither
/// the agent does nor QEMU, which inherits the limit and has a descriptor or more for each disk, network queue and client.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(MOST_DESCRIPTORS, |maximum| maximum.min(MOST_DESCRIPTORS));
    if limit.current.is_none_or(|current| current >= wanted) {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit }) {
        tracing::warn!(%error, wanted, "cannot raise the limit on open files");
    }
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
