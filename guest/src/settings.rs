//! What the guest is told at boot: `vmferry.<name>=<value>` words on the kernel's command line.
//!
//! The host's side of this is `crates/bench/src/guest.rs`.

/// Which pages are rewritten, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// None: everything is filled once.
    Idle,
    /// All of them in order, again and again.
    Write,
    /// Any, uniformly at random.
    Random,
    /// A tenth of them gets nine tenths of the writes.
    HotCold,
    /// As `Write` by every other thread; those between only read.
    Mixed,
    /// None, and all are read in order, again and again.
    Read,
}

/// What the pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Bytes that no compressor can shrink.
    Random,
    /// Words, which compress two to four times.
    Text,
}

/// All that the guest can be told at boot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Memory to fill and rewrite, in bytes.
    pub(crate) mem: u64,
    /// How many threads share it.
    pub(crate) threads: u32,
    pub(crate) mode: Mode,
    /// Bytes rewritten in a second, by all threads together; as fast as it goes when absent.
    pub(crate) rate: Option<u64>,
    pub(crate) fill: Fill,
    /// How much of a virtio disk to write and read, in bytes; the disk is left alone when absent.
    pub(crate) disk: Option<u64>,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Idle => "idle",
            Mode::Write => "write",
            Mode::Random => "random",
            Mode::HotCold => "hotcold",
            Mode::Mixed => "mixed",
            Mode::Read => "read",
        }
    }
}

impl Settings {
    /// Reads the words that are ours; the kernel's are left alone. The error names the word at fault.
    pub(crate) fn parse(command_line: &str) -> Result<Settings, String> {
        let mut mem = None;
        let mut settings =
            Settings { mem: 0, threads: 1, mode: Mode::Write, rate: None, fill: Fill::Random, disk: None };
        for word in command_line.split_ascii_whitespace() {
            let Some(ours) = word.strip_prefix("vmferry.") else { continue };
            let (name, value) = ours.split_once('=').ok_or_else(|| format!("vmferry.{ours} has no value"))?;
            let refused = |allowed: &str| format!("vmferry.{name}={value} is not {allowed}");
            match name {
                "mem" => mem = Some(size(value).ok_or_else(|| refused("a size such as 512M"))?),
                "threads" => {
                    settings.threads = value
                        .parse()
                        .ok()
                        .filter(|threads| (1..=256).contains(threads))
                        .ok_or_else(|| refused("a number from 1 to 256"))?;
                }
                "mode" => {
                    settings.mode = [Mode::Idle, Mode::Write, Mode::Random, Mode::HotCold, Mode::Mixed, Mode::Read]
                        .into_iter()
                        .find(|mode| mode.name() == value)
                        .ok_or_else(|| refused("idle, write, random, hotcold, mixed or read"))?;
                }
                "rate" => settings.rate = Some(size(value).ok_or_else(|| refused("a size a second such as 100M"))?),
                "disk" => settings.disk = Some(size(value).ok_or_else(|| refused("a size such as 16M"))?),
                "fill" => {
                    settings.fill = match value {
                        "random" => Fill::Random,
                        "text" => Fill::Text,
                        _ => return Err(refused("random or text")),
                    }
                }
                _ => return Err(format!("vmferry.{name} is unknown")),
            }
        }
        settings.mem = mem.ok_or("vmferry.mem is missing")?;
        Ok(settings)
    }
}

/// `4096`, `64K`, `512M`, `2G`: bytes, in powers of 1024, more than none.
fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift).filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_read_and_the_kernels_words_are_skipped() {
        let line = "console=ttyS0 quiet vmferry.mem=512M vmferry.threads=2 vmferry.mode=hotcold vmferry.rate=100M \
                    vmferry.fill=text vmferry.disk=16M panic=-1\n";
        let expected = Settings {
            mem: 512 << 20,
            threads: 2,
            mode: Mode::HotCold,
            rate: Some(100 << 20),
            fill: Fill::Text,
            disk: Some(16 << 20),
        };
        assert_eq!(Settings::parse(line), Ok(expected));
    }

    #[test]
    fn a_bad_value_is_refused_by_name() {
        for (line, named) in [
            ("vmferry.mem=lots", "vmferry.mem"),
            ("vmferry.mem=0M", "vmferry.mem"),
            ("vmferry.mem=99999999999G", "vmferry.mem"),
            ("vmferry.mem=1M vmferry.threads=0", "vmferry.threads"),
            ("vmferry.mem=1M vmferry.mode=lazy", "vmferry.mode"),
            ("vmferry.mem=1M vmferry.rate=-3", "vmferry.rate"),
            ("vmferry.mem=1M vmferry.fill=zero", "vmferry.fill"),
            ("vmferry.mem=1M vmferry.disk=yes", "vmferry.disk"),
            ("vmferry.mem=1M vmferry.speed=2", "vmferry.speed"),
            ("vmferry.mem", "vmferry.mem"),
            ("quiet", "vmferry.mem is missing"),
        ] {
            let error = Settings::parse(line).unwrap_err();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
