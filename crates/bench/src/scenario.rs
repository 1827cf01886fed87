//! Scenarios: how a measured migration is driven, and with which means of QEMU.
//!
//! A scenario is a small TOML file. Those of the 2016 study and newer ones are in `crates/bench/scenarios/`, compiled in
//! and known by name; users name files of their own. docs/BENCH.md describes the fields.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};
use vmferry_api::{EngineName, Rate};

/// How different a name may be from the one that is suggested for it, 0 to 1.
const ALIKE: f64 = 0.6;

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it is called: its file's name.
    pub name: String,
    /// In a sentence.
    pub about: String,
    /// Those that can do it.
    pub engines: Vec<EngineName>,
    /// vmferry's policy decides, rather than what follows.
    pub automatic: bool,
    /// Another policy than vmferry's decides, of this name.
    pub policy: Option<String>,
    /// The policy may turn to post-copy.
    pub post_copy: bool,
    /// Turn to post-copy when so many rounds are done.
    pub post_copy_after: Option<u32>,
    /// Pause the guest when so many rounds are done.
    pub pause_after: Option<u32>,
    /// The most to send, in bits a second.
    pub bandwidth_bits: Option<u64>,
    /// The pause at switchover that is aimed at.
    pub downtime: Duration,
    /// Not completed after so many rounds.
    pub most_rounds: u32,
    /// Not completed after so long.
    pub most_time: Duration,
    /// The guest is encrypted on its way.
    pub tls: bool,
    /// What QEMU is to use: the first of these that it has.
    pub qemu: Vec<Means>,
}

/// Means of QEMU's own migration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Means {
    /// Capabilities to switch on, on both sides.
    pub capabilities: Vec<String>,
    /// Parameters to set, on both sides, in QEMU's words.
    pub parameters: Map<String, Value>,
    /// Parameters in bytes, given in percent of the guest's RAM; the largest power of two that is no more is set.
    pub percent_of_ram: std::collections::BTreeMap<String, u64>,
}

impl Means {
    /// The parameters for a guest with so much RAM.
    pub fn parameters_for(&self, ram: u64) -> Map<String, Value> {
        let mut all = self.parameters.clone();
        // QEMU's cache has a power of two for its size.
        let bytes = |percent: &u64| 1u64 << (ram / 100 * percent).max(4096).ilog2();
        all.extend(self.percent_of_ram.iter().map(|(name, percent)| (name.clone(), bytes(percent).into())));
        all
    }
}

/// A scenario's file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    about: String,
    engines: Vec<EngineName>,
    #[serde(default)]
    automatic: bool,
    policy: Option<String>,
    #[serde(default = "yes")]
    post_copy: bool,
    post_copy_after: Option<u32>,
    pause_after: Option<u32>,
    bandwidth: Option<String>,
    // As in the study.
    #[serde(default = "half_a_second", with = "humantime_text")]
    downtime: Duration,
    #[serde(default = "thirty")]
    most_rounds: u32,
    #[serde(default = "five_minutes", with = "humantime_text")]
    most_time: Duration,
    #[serde(default)]
    tls: bool,
    #[serde(default)]
    qemu: Vec<Means>,
}

fn yes() -> bool {
    true
}

fn half_a_second() -> Duration {
    Duration::from_millis(500)
}

fn thirty() -> u32 {
    30
}

fn five_minutes() -> Duration {
    Duration::from_secs(300)
}

mod humantime_text {
    use serde::{Deserialize, Deserializer};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<std::time::Duration, D::Error> {
        humantime::parse_duration(&String::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}

/// Why there is no such scenario.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// No such name.
    #[error("there is no scenario {name:?}{}", suggestion(nearest.as_deref()))]
    Unknown {
        /// What was asked for.
        name: String,
        /// One that is called much like it.
        nearest: Option<String>,
    },
    /// The file cannot be read.
    #[error("cannot read the scenario {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not as a scenario has to be.
    #[error("the scenario {name} cannot be understood")]
    Toml {
        /// Which.
        name: String,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// What it says does not go together.
    #[error("the scenario {name} makes no sense: {why}")]
    Senseless {
        /// Which.
        name: String,
        /// Why.
        why: String,
    },
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map_or_else(
        || "; `vmferry bench scenarios` lists them, and a file of your own ends in .toml".into(),
        |name| format!("; did you mean {name}?"),
    )
}

macro_rules! standard {
    ($($name:literal,)*) => {
        /// Names and texts of the scenarios that are compiled in.
        const STANDARD: &[(&str, &str)] = &[$(($name, include_str!(concat!("../scenarios/", $name, ".toml")))),*];
    };
}

standard! {
    "pause-0-iters",
    "pause-1-iters",
    "pause-5-iters",
    "pause-20-iters",
    "pause-5-iters-100mbit",
    "pause-5-iters-300mbit",
    "pause-5-iters-1gbit",
    "pause-5-iters-10gbit",
    "post-copy-0-iters",
    "post-copy-1-iters",
    "post-copy-5-iters",
    "post-copy-20-iters",
    "post-copy-5-iters-100mbit",
    "post-copy-5-iters-300mbit",
    "post-copy-5-iters-1gbit",
    "post-copy-5-iters-10gbit",
    "auto-converge-5",
    "auto-converge-10",
    "auto-converge-20",
    "auto-converge-10-100mbit",
    "auto-converge-10-300mbit",
    "auto-converge-10-1gbit",
    "auto-converge-10-10gbit",
    "compress-1",
    "compress-2",
    "compress-4",
    "xbzrle-5",
    "xbzrle-10",
    "xbzrle-20",
    "xbzrle-50",
    "multifd-1",
    "multifd-1-zlib",
    "multifd-1-zstd",
    "multifd-2",
    "multifd-2-zlib",
    "multifd-2-zstd",
    "multifd-4",
    "multifd-4-zlib",
    "multifd-4-zstd",
    "multifd-8",
    "multifd-8-zlib",
    "multifd-8-zstd",
    "post-copy-preempt",
    "dirty-limit",
    "pre-copy",
    "pre-copy-tls",
    "post-copy-5-iters-tls",
    "vmferry",
    "vmferry-plain",
    "vmferry-no-post-copy",
    "vmferry-no-post-copy-100mbit",
    "vmferry-no-post-copy-300mbit",
    "vmferry-no-post-copy-1gbit",
    "vmferry-no-post-copy-10gbit",
    "libvirt",
    "libvirt-auto-converge",
    "libvirt-post-copy",
    "nova",
    "nova-force",
    "proxmox",
    "ovirt-post-copy",
    "kubevirt-tuning",
}

/// The names of the scenarios that are compiled in.
pub fn names() -> impl Iterator<Item = &'static str> {
    STANDARD.iter().map(|(name, _)| *name)
}

impl Scenario {
    /// One of ours by its name, or a file of the user's.
    pub fn find(wanted: &str) -> Result<Self, ScenarioError> {
        if let Some((name, text)) = STANDARD.iter().find(|(name, _)| *name == wanted) {
            return Self::parse(name, text);
        }
        if Self::is_file(wanted) {
            let path = Path::new(wanted);
            let text =
                std::fs::read_to_string(path).map_err(|source| ScenarioError::Io { path: path.into(), source })?;
            let name = path.file_stem().map_or_else(|| wanted.into(), |stem| stem.to_string_lossy().into_owned());
            return Self::parse(&name, &text);
        }
        let likeness = |name: &str| strsim::jaro_winkler(name, wanted).max(strsim::sorensen_dice(name, wanted));
        let nearest = names().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).filter(|name| likeness(name) > ALIKE);
        Err(ScenarioError::Unknown { name: wanted.into(), nearest: nearest.map(str::to_owned) })
    }

    /// Not the name of one of ours, but a file's.
    pub fn is_file(wanted: &str) -> bool {
        wanted.contains('/') || Path::new(wanted).extension().is_some_and(|extension| extension == "toml")
    }

    fn parse(name: &str, text: &str) -> Result<Self, ScenarioError> {
        let file: File = toml::from_str(text)
            .map_err(|source| ScenarioError::Toml { name: name.into(), source: Box::new(source) })?;
        let senseless = |why: String| ScenarioError::Senseless { name: name.into(), why };
        let bandwidth_bits = file.bandwidth.as_deref().map(parse_bits).transpose().map_err(senseless)?;
        let scenario = Self {
            name: name.into(),
            about: file.about,
            engines: file.engines,
            automatic: file.automatic,
            policy: file.policy,
            post_copy: file.post_copy,
            post_copy_after: file.post_copy_after,
            pause_after: file.pause_after,
            bandwidth_bits,
            downtime: file.downtime,
            most_rounds: file.most_rounds,
            most_time: file.most_time,
            tls: file.tls,
            qemu: if file.qemu.is_empty() { vec![Means::default()] } else { file.qemu },
        };
        match scenario.contradiction() {
            Some(why) => Err(senseless(why.into())),
            None => Ok(scenario),
        }
    }

    fn contradiction(&self) -> Option<&'static str> {
        let post_copy = |means: &Means| means.capabilities.iter().any(|it| it == "postcopy-ram");
        let by_qemu = self.engines.contains(&EngineName::Qemu);
        if self.engines.is_empty() {
            Some("it names no engine")
        } else if self.automatic && (self.post_copy_after.is_some() || self.pause_after.is_some()) {
            Some("it is automatic, so that vmferry decides when to turn to post-copy, and nobody pauses the guest")
        } else if self.automatic && self.qemu.iter().any(|it| !it.capabilities.is_empty() || !it.parameters.is_empty())
        {
            Some("it is automatic, so that vmferry decides which means of QEMU are used")
        } else if self.policy.is_some() && (!self.automatic || self.engines != [EngineName::Qemu]) {
            Some(
                "a policy of another manager's steers QEMU, and nothing else is said: automatic = true, engines = [\"qemu\"]",
            )
        } else if self.post_copy_after.is_some() && self.pause_after.is_some() {
            Some("a guest that is paused does not go on to post-copy: give one of pause-after and post-copy-after")
        } else if self.post_copy_after.is_some() && by_qemu && !self.qemu.iter().all(post_copy) {
            Some("QEMU turns to post-copy only with the capability postcopy-ram")
        } else if !self.post_copy && !self.automatic {
            Some("post-copy = false keeps vmferry from it where it is automatic; others only do what they name")
        } else if self.most_rounds == 0 || self.most_time.is_zero() {
            Some("it gives up before it begins")
        } else {
            None
        }
    }

    /// The most to send, in bytes a second.
    pub fn bandwidth(&self) -> Option<u64> {
        self.bandwidth_bits.map(|bits| bits / 8)
    }
}

/// A rate as it is said of links, such as `100mbit`; in bits a second.
pub fn parse_bits(text: &str) -> Result<u64, String> {
    let Rate(bytes) = text.parse().map_err(|_| format!("{text:?} is no rate of a link: give one such as 100mbit"))?;
    match (1_000_000..=1_000_000_000_000).contains(&bytes.saturating_mul(8)) {
        true => Ok(bytes * 8),
        false => Err(format!("{text} makes no sense for a link: give 1mbit to 1000gbit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_of_ours_can_be_read_and_all_are_listed() {
        for name in names() {
            let scenario = Scenario::find(name).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert!(!scenario.about.is_empty());
        }
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), names().count());
    }

    #[test]
    fn an_unknown_scenario_is_met_with_the_nearest_one() {
        for (wanted, meant) in [
            ("post-copy-5-iter", "post-copy-5-iters"),
            ("xbzlre-10", "xbzrle-10"),
            ("auto-convergence-10", "auto-converge-10"),
            ("postcopy-preempt", "post-copy-preempt"),
        ] {
            let told = Scenario::find(wanted).unwrap_err().to_string();
            assert!(told.ends_with(&format!("did you mean {meant}?")), "{told}");
        }
        assert!(Scenario::find("qqqq").unwrap_err().to_string().contains("bench scenarios"));
        assert!(Scenario::find("./missing.toml").unwrap_err().to_string().contains("missing.toml"));
    }

    #[test]
    fn a_scenario_of_the_users_that_makes_no_sense_is_told_why() {
        let refusal = |text: &str| {
            let error = Scenario::parse("mine", text).unwrap_err();
            let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            format!("{error} {why}")
        };
        let base = "about = \"x\"\nengines = [\"qemu\"]\n";
        for (more, why) in [
            ("pause-aftre = 3", "pause-after"),
            ("post-copy-after = 3", "postcopy-ram"),
            ("automatic = true\npause-after = 1", "automatic"),
            ("policy = \"nova\"", "automatic = true"),
            ("bandwidth = \"fast\"", "100mbit"),
            ("downtime = \"later\"", "downtime"),
            ("post-copy = false", "automatic"),
            ("most-rounds = 0", "gives up"),
        ] {
            assert!(refusal(&format!("{base}{more}")).contains(why), "{}", refusal(&format!("{base}{more}")));
        }
        assert!(refusal("about = \"x\"\nengines = [\"qemo\"]").contains("qemo"));
    }

    #[test]
    fn a_share_of_the_ram_becomes_bytes() {
        let scenario = Scenario::find("xbzrle-10").unwrap();
        assert_eq!(scenario.qemu[0].parameters_for(1000 << 20)["xbzrle-cache-size"], 64 << 20);
    }

    #[test]
    fn rates_of_links_are_read_in_bits() {
        assert_eq!(parse_bits("100mbit"), Ok(100_000_000));
        assert_eq!(parse_bits("2.5 Gbit"), Ok(2_500_000_000));
        for bad in ["", "fast", "-1gbit", "0mbit", "1e30gbit", "1.gbit.", "mbit"] {
            assert!(parse_bits(bad).is_err(), "{bad}");
        }
    }
}
