//! The agent's configuration: a TOML file with a sane default for every key, so none is needed.

use std::net::IpAddr;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use ipnet::IpNet;
use serde::Deserialize;
use vmferry_api::{EngineName, Listen, Rate, Security};
use vmferry_link::Cipher;

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

/// A certificate authority of the user's, and what it gave to this agent; all in PEM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthorityFiles {
    /// The authority's certificates. Every agent that one of them vouches for is a peer.
    pub roots: PathBuf,
    /// This agent's certificate, with those between it and the authority's; it names this host.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Which cipher encrypts; without one, the fastest that both hosts have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct CipherChoice(pub Option<Cipher>);

impl TryFrom<String> for CipherChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self(None));
        }
        let known = Cipher::ALL.into_iter().find(|cipher| cipher.to_string() == text);
        known
            .map(|cipher| Self(Some(cipher)))
            .ok_or_else(|| format!("{text:?} is no cipher: give auto, aes-128-gcm, aes-256-gcm or chacha20-poly1305"))
    }
}

/// What holds for the traffic with the hosts of one network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Which addresses.
    pub cidr: IpNet,
    /// How guests' bytes are protected.
    #[serde(default)]
    pub security: Security,
    /// What encrypts them.
    #[serde(default)]
    pub cipher: CipherChoice,
    /// The most that one migration sends unless its user says otherwise.
    pub rate: Option<Rate>,
}

/// What the agent has to do with the libvirt of its host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LibvirtConfig {
    /// It is followed, where there is one, and its domains can be migrated.
    pub enabled: bool,
    /// Its socket; found where libvirt puts it when absent.
    pub socket: Option<PathBuf>,
    /// Peers may migrate domains to it. They reach it for that one migration, and nothing else of it.
    pub arrivals: bool,
}

impl Default for LibvirtConfig {
    fn default() -> Self {
        Self { enabled: true, socket: None, arrivals: true }
    }
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
    /// Where other agents are served.
    pub listen: Listen,
    /// Where others reach this agent, HOST:PORT, for join tokens; found out when empty.
    pub advertise: Vec<String>,
    /// What holds for the traffic with some hosts.
    pub network: Vec<Network>,
    /// Who vouches for agents that are not paired.
    pub authority: Option<AuthorityFiles>,
    /// Memory that incoming VMs must leave free on this host.
    pub reserved_memory: ByteSize,
    /// Folders searched for QEMU before `PATH`.
    pub qemu_dirs: Vec<PathBuf>,
    /// Folders in which other agents, and `vmferry copy` from other hosts, may have this one make and write images.
    pub image_folders: Vec<PathBuf>,
    /// Images in those folders are indexed when nobody needs the disk, and what they have is not sent here again. Other
    /// hosts can find out whether a piece that they know is in one of them.
    pub index_images: bool,
    /// Which RAM engine is used unless a user says otherwise.
    pub engine: EngineName,
    /// Memory in which the `external` engine keeps what it has sent, for each migration, so that pages that change a
    /// little go as differences; 0 to do without.
    pub delta_cache: ByteSize,
    /// A QEMU whose user may not have the kernel wait for pages is lent `/dev/userfaultfd` while that is set up. Without
    /// it such guests can neither leave nor arrive by post-copy, nor be paced.
    pub lend_userfaultfd: bool,
    /// How many guests that leave this host may be in post-copy at a time, in which each needs two hosts.
    pub post_copies: NonZeroU8,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// The libvirt of this host.
    pub libvirt: LibvirtConfig,
}

impl Default for Config {
    fn default() -> Self {
        let (run_dir, state_dir) = default_dirs();
        Self {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            run_dir,
            state_dir,
            listen: Listen::default(),
            advertise: Vec::new(),
            network: Vec::new(),
            authority: None,
            reserved_memory: ByteSize::mib(512),
            qemu_dirs: Vec::new(),
            image_folders: ["/var/lib/vmferry/images", "/var/lib/libvirt/images", "/var/lib/vz/images"]
                .map(PathBuf::from)
                .into(),
            index_images: true,
            engine: EngineName::default(),
            delta_cache: ByteSize::mib(64),
            lend_userfaultfd: true,
            post_copies: NonZeroU8::MIN,
            log_format: LogFormat::Text,
            libvirt: LibvirtConfig::default(),
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

    /// What was configured for the traffic with this address: the entry with the longest prefix.
    pub fn network_of(&self, address: IpAddr) -> Option<&Network> {
        let address = address.to_canonical();
        self.network.iter().filter(|it| it.cidr.contains(&address)).max_by_key(|it| it.cidr.prefix_len())
    }

    /// How guests' bytes to and from this address are to be protected.
    pub fn security_of(&self, address: IpAddr) -> Security {
        self.network_of(address).map(|it| it.security).unwrap_or_default()
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
        assert_eq!(config.listen, Listen::At("[::]:7420".parse().unwrap()));
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
        assert_eq!(config.delta_cache, Config::default().delta_cache);
        assert_eq!(config.image_folders, Config::default().image_folders);
        assert_eq!(config.index_images, Config::default().index_images);
        assert_eq!(config.run_dir, Path::new("/run/vmferry"));
        assert_eq!(config.listen, Listen::default());
        assert_eq!(config.network.len(), 1);
        let libvirt = LibvirtConfig { socket: config.libvirt.socket.clone(), ..LibvirtConfig::default() };
        assert_eq!(config.libvirt, libvirt);
        for key in [
            "name",
            "run_dir",
            "state_dir",
            "listen",
            "advertise",
            "cidr",
            "security",
            "cipher",
            "rate",
            "roots",
            "certificate",
            "key",
            "reserved_memory",
            "qemu_dirs",
            "image_folders",
            "index_images",
            "delta_cache",
            "lend_userfaultfd",
            "post_copies",
            "log_format",
            "enabled",
            "socket",
            "arrivals",
        ] {
            assert!(uncommented.contains(&format!("{key} =")), "{key} is not shown");
        }
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        let error = toml::from_str::<Config>("stat_dir = '/x'").unwrap_err().to_string();
        assert!(error.contains("stat_dir"), "{error}");
    }

    #[test]
    fn the_most_specific_network_counts() {
        let text = "
            [[network]]
            cidr = '10.0.0.0/8'
            security = 'plain'
            rate = '1Gbit/s'
            [[network]]
            cidr = '10.1.0.0/16'
            cipher = 'aes-128-gcm'
        ";
        let config: Config = toml::from_str(text).unwrap();
        let security = |address: &str| config.security_of(address.parse().unwrap());
        assert_eq!(security("10.2.3.4"), Security::Plain);
        assert_eq!(security("::ffff:10.2.3.4"), Security::Plain);
        assert_eq!(security("10.1.3.4"), Security::Tls);
        assert_eq!(security("192.0.2.1"), Security::Tls);
        assert_eq!(config.network[0].rate, Some(Rate(125_000_000)));
        assert_eq!(config.network[1].cipher, CipherChoice(Some(Cipher::Aes128Gcm)));
    }

    #[test]
    fn what_is_no_network_is_refused_with_words() {
        for (bad, word) in [
            ("cidr = '10.0.0.0/99'", "cidr"),
            ("cidr = '10.0.0.0/8'\nsecurity = 'none'", "none"),
            ("cidr = '10.0.0.0/8'\nrate = 'fast'", "100MiB/s"),
            ("cidr = '10.0.0.0/8'\ncipher = 'rot13'", "chacha20-poly1305"),
            ("cidr = '10.0.0.0/8'\nciper = 'auto'", "ciper"),
        ] {
            let error = toml::from_str::<Config>(&format!("[[network]]\n{bad}")).unwrap_err().to_string();
            assert!(error.contains(word), "{bad}: {error}");
        }
        let error = toml::from_str::<Config>("listen = '7420'").unwrap_err().to_string();
        assert!(error.contains("192.0.2.1:7420"), "{error}");
    }
}
