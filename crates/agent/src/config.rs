//! The agent's configuration: a TOML file with a sane default for every key, so none is needed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::Deserialize;

/// Where the configuration is read from when no path is given; it may be absent.
pub const DEFAULT_PATH: &str = "/etc/vmferry/agent.toml";

/// How log lines are written to standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people and the journal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// See the module's text. `packaging/agent.toml` shows every key.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What this host calls itself towards users and peers.
    pub name: String,
    /// Sockets, pidfiles and logs of running VMs; lost at a reboot, like the VMs.
    pub run_dir: PathBuf,
    /// The journal and the list of VMs.
    pub state_dir: PathBuf,
    /// Serve other agents here, without authentication.
    pub insecure_peers: Option<SocketAddr>,
    /// Memory that incoming VMs must leave free on this host.
    pub reserved_memory: ByteSize,
    /// Folders searched for QEMU before `PATH`.
    pub qemu_dirs: Vec<PathBuf>,
    /// How log lines are written.
    pub log_format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        let (run_dir, state_dir) = default_dirs();
        Self {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            run_dir,
            state_dir,
            insecure_peers: None,
            reserved_memory: ByteSize::mib(512),
            qemu_dirs: Vec::new(),
            log_format: LogFormat::Text,
        }
    }
}

/// The system's folders for root, the user's own otherwise.
fn default_dirs() -> (PathBuf, PathBuf) {
    if rustix::process::geteuid().is_root() {
        return ("/run/vmferry".into(), "/var/lib/vmferry".into());
    }
    let uid = rustix::process::geteuid().as_raw();
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from);
    let run = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| format!("/tmp/vmferry-{uid}").into(), PathBuf::from);
    let state = std::env::var_os("XDG_STATE_HOME").map_or_else(|| home.join(".local/state"), PathBuf::from);
    (run.join("vmferry"), state.join("vmferry"))
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not valid; the cause names line, key and what was expected.
    #[error("the configuration {path} is not valid")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What and where.
        #[source]
        source: Box<toml::de::Error>,
    },
}

impl Config {
    /// Reads `path`, or the default path if that exists, or takes the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = path.map_or((Path::new(DEFAULT_PATH), false), |path| (path, true));
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text)
                .map_err(|source| ConfigError::Invalid { path: path.into(), source: Box::new(source) }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    /// The Unix socket that the command line talks to.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// The folder of one VM's sockets, pidfile and log.
    pub fn vm_dir(&self, name: &str) -> PathBuf {
        self.run_dir.join("vms").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_configuration_is_complete() {
        let config: Config = toml::from_str("").unwrap();
        assert_eq!(config.insecure_peers, None);
        assert_eq!(config.reserved_memory, ByteSize::mib(512));
    }

    #[test]
    fn the_example_configuration_is_valid_and_shows_every_default() {
        let example = include_str!("../../../packaging/agent.toml");
        let uncommented: Vec<&str> = example
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(if line.starts_with('#') { "" } else { line }))
            .collect();
        let uncommented = uncommented.join("\n");
        let config: Config = toml::from_str(&uncommented).unwrap();
        assert_eq!(config.reserved_memory, Config::default().reserved_memory);
        assert_eq!(config.run_dir, Path::new("/run/vmferry"));
        for key in ["name", "run_dir", "state_dir", "insecure_peers", "reserved_memory", "qemu_dirs", "log_format"] {
            assert!(uncommented.contains(&format!("{key} =")), "{key} is not shown");
        }
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        let error = toml::from_str::<Config>("stat_dir = '/x'").unwrap_err().to_string();
        assert!(error.contains("stat_dir"), "{error}");
    }
}
