//! Understanding a QEMU command line: what it asks for, as far as moving the guest depends on it.
//!
//! What QEMU understands and this does not is left as it is; QEMU will judge it.

mod files;
mod images;
mod networks;
mod properties;

pub use files::{FileKind, FileUse};
pub use images::ImageWords;
pub use networks::Network;
pub(crate) use properties::{Properties, escape_commas};

/// The options that take no argument; all others do. QEMU's own list is qemu-options.def; this has those of all
/// versions, as an option that a QEMU does not have is an error either way.
const WITHOUT_ARGUMENT: &[&str] = &[
    "S",
    "async-teardown",
    "audio-help",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "jitdump",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "old-param",
    "one-insn-per-tb",
    "only-migratable",
    "perfmap",
    "portrait",
    "preconfig",
    "s",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];

/// What a machine gets that is not told how much RAM, in bytes.
const DEFAULT_MEMORY: u64 = 128 << 20;

/// Why a command line cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum CommandLineError {
    /// Nothing at all.
    #[error("the QEMU command line is empty: give it as for a shell, such as qemu-system-x86_64 -m 4G ...")]
    Empty,
    /// The last option lacks its argument.
    #[error("the option {option} needs an argument and nothing follows it")]
    MissingArgument {
        /// As it was written.
        option: String,
    },
    /// JSON that is none.
    #[error("the argument of {option} is not JSON, though it begins like it")]
    BadJson {
        /// The option.
        option: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A size that is none.
    #[error("the argument of {option} is not a size: {value} (write it as 4096M or 4G)")]
    BadSize {
        /// The option.
        option: String,
        /// What was given.
        value: String,
    },
    /// An option that cannot be used here.
    #[error("the option {option} cannot be used here: {advice}")]
    Refused {
        /// As it was written.
        option: String,
        /// Why, and what to do.
        advice: String,
    },
}

/// One option of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CommandOption {
    /// Its name without dashes; `-M` is `machine`, and a disk image without an option is `hda`, as it is to QEMU.
    pub(crate) name: String,
    /// The words of the command line that it stands for.
    pub(crate) words: Vec<String>,
}

impl CommandOption {
    /// One that is written as most are.
    pub(crate) fn new(name: &str, value: &str) -> Self {
        Self { name: name.into(), words: vec![format!("-{name}"), value.into()] }
    }

    /// Its argument; empty for options without.
    pub(crate) fn value(&self) -> &str {
        match self.words.as_slice() {
            [only] if !only.starts_with('-') => only,
            [_, value] => value,
            _ => "",
        }
    }

    /// As the user knows it.
    fn flag(&self) -> String {
        match self.words.as_slice() {
            [only] if !only.starts_with('-') => "disk image".into(),
            _ => self.words[0].clone(),
        }
    }

    /// The number of the VNC display that it asks for at a port of the host, if it does.
    pub(crate) fn vnc_display(&self) -> Option<u16> {
        match self.name.as_str() {
            "vnc" => display_number(self.value()),
            "display" => display_number(self.value().strip_prefix("vnc=")?),
            _ => None,
        }
    }

    /// The port of the host at which it asks for a SPICE display, plain or with TLS, if it does.
    pub(crate) fn spice_port(&self, key: &str) -> Option<u16> {
        self.properties().get(key)?.parse().ok().filter(|port| self.name == "spice" && *port != 0)
    }

    pub(crate) fn properties(&self) -> Properties {
        Properties::parse(self.value(), implied_key(&self.name))
    }
}

/// What the ports of a SPICE display are called, here and by QEMU's monitor.
pub const SPICE_PORTS: [&str; 2] = ["port", "tls-port"];

/// The key of an argument's first part when it has none.
fn implied_key(option: &str) -> Option<&'static str> {
    Some(match option {
        "machine" | "netdev" => "type",
        "accel" => "accel",
        "m" => "size",
        "device" | "blockdev" => "driver",
        "object" => "qom-type",
        "chardev" => "backend",
        "name" => "guest",
        "fsdev" | "virtfs" => "fsdriver",
        "fw_cfg" => "name",
        "mon" => "chardev",
        "smp" => "cpus",
        "cpu" => "model",
        _ => return None,
    })
}

/// A QEMU command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    binary: String,
    options: Vec<CommandOption>,
}

impl CommandLine {
    /// Parses a command line; the first word is the binary. Whether QEMU can be started with it by us is another
    /// question: [`check_runnable`](Self::check_runnable).
    pub fn parse(argv: &[String]) -> Result<Self, CommandLineError> {
        let (binary, words) = argv.split_first().ok_or(CommandLineError::Empty)?;
        let mut options = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let option = match name_of(word) {
                None => CommandOption { name: "hda".into(), words: vec![word.clone()] },
                Some(name) if WITHOUT_ARGUMENT.contains(&name) => {
                    CommandOption { name: name.into(), words: vec![word.clone()] }
                }
                Some(name) => {
                    let value =
                        words.next().ok_or_else(|| CommandLineError::MissingArgument { option: word.clone() })?;
                    let name = if name == "M" { "machine" } else { name };
                    CommandOption { name: name.into(), words: vec![word.clone(), value.clone()] }
                }
            };
            check_json(&option)?;
            options.push(option);
        }
        Ok(Self { binary: binary.clone(), options })
    }

    /// Refuses what cannot be started and watched by us: QEMUs that do something else than run a guest, or wait for one
    /// that somebody else sends.
    pub fn check_runnable(&self) -> Result<(), CommandLineError> {
        match self.options.iter().find(|option| option.name == "incoming") {
            Some(option) => Err(CommandLineError::Refused {
                option: option.words.join(" "),
                advice: "vmferry starts the waiting side of a migration itself; leave it out".into(),
            }),
            None => self.check_incoming_runnable(),
        }
    }

    /// The same for the waiting side of a migration, where an `-incoming` of old is replaced.
    pub(crate) fn check_incoming_runnable(&self) -> Result<(), CommandLineError> {
        for option in &self.options {
            let advice = match option.name.as_str() {
                "preconfig" => "the guest must start without further orders over QMP; leave it out",
                "readconfig" => "what that file says cannot be seen from here; write its options on the command line",
                "h" | "help" | "version" | "audio-help" => "it starts no guest; run it without vmferry",
                "machine" | "cpu" | "accel" | "device" | "chardev" | "netdev" | "object" | "display" | "vga"
                    if matches!(option.value(), "help" | "?") =>
                {
                    "it starts no guest; run it without vmferry"
                }
                _ => continue,
            };
            return Err(CommandLineError::Refused { option: option.words.join(" "), advice: advice.into() });
        }
        Ok(())
    }

    /// All of its words.
    pub(crate) fn argv(&self) -> Vec<String> {
        let words = self.options.iter().flat_map(|option| &option.words);
        std::iter::once(&self.binary).chain(words).cloned().collect()
    }

    /// The QEMU binary, as it was given.
    pub fn binary(&self) -> &str {
        &self.binary
    }

    /// The arguments of an option, in order; the option without or with dashes. `-M` is `machine`, and a disk image
    /// without an option is `hda`.
    pub fn values(&self, option: &str) -> impl Iterator<Item = &str> {
        self.all(option).map(CommandOption::value)
    }

    /// The option is given.
    pub fn has(&self, option: &str) -> bool {
        self.all(option).next().is_some()
    }

    pub(crate) fn options(&self) -> &[CommandOption] {
        &self.options
    }

    pub(crate) fn all(&self, option: &str) -> impl Iterator<Item = &CommandOption> {
        let name = match option.trim_start_matches('-') {
            "M" => "machine",
            name => name,
        }
        .to_owned();
        self.options.iter().filter(move |option| option.name == name)
    }

    /// A property of an option that may be given more than once, where the last counts.
    fn property(&self, option: &str, key: &str) -> Option<String> {
        self.all(option).filter_map(|option| option.properties().get_some(key).map(str::to_owned)).last()
    }

    /// Guest RAM at the start, in bytes, rounded up as QEMU does.
    pub fn memory_size(&self) -> Result<u64, CommandLineError> {
        let Some(size) = self.property("m", "size") else { return Ok(DEFAULT_MEMORY) };
        let bytes = parse_size(&size).ok_or(CommandLineError::BadSize { option: "-m".into(), value: size })?;
        Ok(if bytes == 0 { DEFAULT_MEMORY } else { bytes.next_multiple_of(8192) })
    }

    /// The size of the huge pages that the guest's RAM is made of, in bytes, where QEMU makes them itself
    /// (`memory-backend-memfd` with `hugetlb`); of RAM in a file the file system tells.
    pub fn huge_page(&self) -> Option<u64> {
        let huge = self
            .all("object")
            .map(CommandOption::properties)
            .find(|object| object.get_some("qom-type") == Some("memory-backend-memfd") && object.is_on("hugetlb"))?;
        // Without a size, the kernel's default; almost everywhere that is this.
        Some(huge.get_some("hugetlbsize").and_then(parse_size).unwrap_or(2 << 20))
    }

    /// The machine type, as it is given; none for the binary's default.
    pub fn machine_type(&self) -> Option<&str> {
        self.all("machine").filter_map(|option| first_or(option.value(), "type")).last()
    }

    /// The CPU model without its features; none for the machine's default.
    pub fn cpu_model(&self) -> Option<&str> {
        self.all("cpu").filter_map(|option| option.value().split(',').next()).last()
    }

    /// The number of the VNC display that it asks for at a port of the host, if it does: the port is 5900 and that.
    pub fn vnc_display(&self) -> Option<u16> {
        self.all("vnc").chain(self.all("display")).filter_map(CommandOption::vnc_display).last()
    }

    /// The port of the host at which it asks for a SPICE display, plain or with TLS, if it does.
    pub fn spice_port(&self, key: &str) -> Option<u16> {
        self.all("spice").find_map(|option| option.spice_port(key))
    }

    /// The kinds of its displays that a password opens which is set while it runs: nobody can ask for that.
    pub fn passwords_set_later(&self) -> Vec<&'static str> {
        let is_given = |words: &Properties| ["password", "password-secret"].iter().any(|key| words.get(key).is_some());
        let vnc = self.all("vnc").chain(self.all("display")).map(CommandOption::properties);
        let vnc = vnc.filter(|words| words.is_on("password") && words.get("password-secret").is_none()).map(|_| "VNC");
        let spice = self.all("spice").map(CommandOption::properties);
        let spice = spice.filter(|words| !words.is_on("disable-ticketing") && !is_given(words)).map(|_| "SPICE");
        vnc.chain(spice).collect()
    }

    /// The accelerators that may be used, the most wanted first; empty when QEMU may choose.
    pub fn accelerators(&self) -> Vec<&str> {
        let by_accel = self.all("accel").filter_map(|option| first_or(option.value(), "accel"));
        let by_machine = self.all("machine").filter_map(|option| key_of(option.value(), "accel"));
        let by_flag = self.all("enable-kvm").map(|_| "kvm");
        by_accel.chain(by_machine).chain(by_flag).flat_map(|names| names.split(':')).collect()
    }
}

/// Of `0.0.0.0:1,password=on`: 1. None of a display that is somewhere else than at a port of its own.
fn display_number(value: &str) -> Option<u16> {
    let (_, number) = value.split(',').next()?.rsplit_once(':')?;
    if value.starts_with("unix:") || value.contains(",reverse") {
        return None;
    }
    number.parse().ok()
}

/// The option's name, if the word is one.
fn name_of(word: &str) -> Option<&str> {
    let name = word.strip_prefix('-')?;
    Some(name.strip_prefix('-').unwrap_or(name))
}

fn check_json(option: &CommandOption) -> Result<(), CommandLineError> {
    let takes_json =
        matches!(option.name.as_str(), "blockdev" | "object" | "device" | "netdev" | "audiodev" | "display" | "compat");
    if takes_json && option.value().starts_with('{') {
        serde_json::from_str::<serde_json::Map<_, _>>(option.value())
            .map_err(|source| CommandLineError::BadJson { option: option.flag(), source })?;
    }
    Ok(())
}

/// The part of a `key=value` list for this key. For values that hold no commas.
fn key_of<'a>(value: &'a str, key: &str) -> Option<&'a str> {
    value.split(',').filter_map(|part| part.strip_prefix(key)?.strip_prefix('=')).next_back()
}

/// The same, where the first part may lack the key.
fn first_or<'a>(value: &'a str, key: &str) -> Option<&'a str> {
    key_of(value, key)
        .or_else(|| value.split(',').next().filter(|first| !first.contains('=')))
        .filter(|found| !found.is_empty())
}

/// A size as `-m` takes it, in bytes; bare numbers are MiB.
fn parse_size(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit {
        "" | "M" | "m" => 20,
        "B" | "b" => 0,
        "K" | "k" => 10,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    let fraction: f64 = number.parse().ok()?;
    let bytes = fraction * (1_u64 << shift) as f64;
    (bytes < u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests;
