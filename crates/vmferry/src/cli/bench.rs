//! `bench`: what can be measured, and how.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use vmferry_api::{EngineName, Rate};
use vmferry_bench::run::Transport;
use vmferry_bench::scenario::parse_bits;
use vmferry_bench::{Fill, GuestKind, Mode};

use super::duration;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// One migration of a measuring guest, as a scenario says; the report tells what the guest felt
    #[command(after_long_help = "\
Example:
  vmferry bench run --vcpus 1 --mem 1G --scenario post-copy-5-iters --link 1gbit -o report.json
  vmferry bench run --vcpus 1 --mem 1G --scenario vmferry --engine external --to beta -o report.json

Two hosts are made on this one (two network namespaces, joined and shaped) and go when it ends, so this needs root; with
--transport tcp or unix it does not. The guest rewrites its memory and beats every 5 ms; the host stamps what it says.

Scenarios for QEMU's own means drive two bare QEMUs over QMP; the others, and all with --engine external, go through two
real agents. With --to, this host's agent and the other's do all of it: both hear the guest, compare their clocks, and end
it when this ends. A scenario of your own is a TOML file: docs/BENCH.md.

Exit codes: 0 measured (also when the migration did not complete, which is a result), 1 the guest's memory was damaged or
something failed, 3 nothing was measured, for the reason that is told.")]
    Run(Box<BenchRunOptions>),
    /// Many runs: a matrix of scenarios, engines, guests and links, in an order made by chance; can be taken up again
    #[command(after_long_help = "\
Example of a matrix:
  repetitions = 3
  scenarios = [\"post-copy-5-iters\", \"auto-converge-10\"]
  engines = [\"qemu\", \"external\"]
  links = [\"1gbit\"]
  guests = [{ vcpus = 1, mem-mib = 256 }]

docs/BENCH.md has all fields. Each run leaves its report in the folder; the same command goes on where it was interrupted.
What a QEMU cannot do is skipped and said.")]
    Batch(BatchOptions),
    /// Runs side by side: medians, spread, ratios with their confidence, and what is noise
    #[command(after_long_help = "\
With one folder, its set-ups are compared with the first of them; with more, the same set-ups in each. Files and folders
that have no set-up in common are compared as they are.")]
    Compare(CompareOptions),
    /// Draw reports: one HTML page that needs nothing else
    Page(PageOptions),
    /// List the scenarios that come with vmferry
    Scenarios,
    /// Make a report out of one of guestperf, QEMU's own harness
    ImportGuestperf(ImportOptions),
    /// What the link carries and costs, with every protection and packing
    #[command(after_long_help = "\
With --loopback, what people use today is measured beside it in the same run: plain TCP, ssh, QEMU's own migration and
TLS, and the ways that libvirt's developers compared in 2009. That needs QEMU and an sshd, which is started with keys
and a configuration of its own, on the loopback address only.

To another host, both agents must run and be paired; plain is measured where both hosts' configuration permits it.")]
    Link(BenchLinkOptions),
    /// The engines side by side: the same guests over the same link, moved by the agents and by QEMU
    #[command(after_long_help = "\
Needs root, for two hosts in network namespaces of this one, QEMU, and the kernel of the measuring guest.")]
    Ram(BenchRamOptions),
}

#[derive(Args)]
pub(crate) struct BenchRamOptions {
    /// How often; the table has medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: u32,
    /// Only set-ups whose names contain this
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub only: String,
    /// kvm: a guest that needs no kernel, under any KVM; auto: Linux, under KVM where that works for it, else under TCG
    #[arg(long, value_name = "WHICH", default_value = "auto")]
    pub accel: Accelerator,
    /// Write the report there, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct BenchLinkOptions {
    /// The other host: a peer's name or its address
    #[arg(required_unless_present = "loopback", conflicts_with = "loopback")]
    pub host: Option<String>,
    /// On this host alone, without agents
    #[arg(long)]
    pub loopback: bool,
    /// How long each way is measured in each round
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration)]
    pub time: Duration,
    /// How often; the table has medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub rounds: u32,
    /// Nothing but vmferry's own link
    #[arg(long)]
    pub only_ours: bool,
    /// Write the report there, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the report there, as a page
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct BenchRunOptions {
    /// A scenario's name, or a TOML file
    #[arg(long, value_name = "NAME|FILE")]
    pub scenario: String,
    /// Who moves the memory: external (the agents) or qemu (QEMU itself)
    #[arg(long, value_name = "ENGINE", default_value = "qemu")]
    pub engine: EngineName,
    /// Write the report there
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    pub guest: GuestOptions,
    /// What the link is shaped to, such as 1gbit [default: not at all]
    #[arg(long, value_name = "RATE", value_parser = parse_bits)]
    pub link: Option<u64>,
    /// What carries the guest: link (between two hosts), tcp or unix (within this one), rdma
    #[arg(long, value_name = "WHAT", default_value = "link")]
    pub transport: Transport,
    /// To another host, by a peer's name or its address, instead of two on this one; both agents must run and be paired
    #[arg(long, value_name = "HOST", conflicts_with_all = ["link", "transport"])]
    pub to: Option<String>,
    /// A folder that is searched for QEMU before PATH
    #[arg(long, value_name = "FOLDER")]
    pub qemu: Option<PathBuf>,
    /// The guest's kernel, a vmlinuz [default: the one that scripts/setup.sh has fetched]
    #[arg(long, value_name = "FILE", env = "VMFERRY_GUEST_KERNEL")]
    pub kernel: Option<PathBuf>,
}

/// What is to run the measuring guest.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Accelerator {
    Auto,
    Kvm,
}

impl Accelerator {
    pub(crate) fn guest(self) -> GuestKind {
        match self {
            Self::Auto => GuestKind::Linux,
            Self::Kvm => GuestKind::Bare,
        }
    }
}

/// The measuring guest.
#[derive(Args)]
pub(crate) struct GuestOptions {
    /// kvm: a guest that needs no kernel, under any KVM; auto: Linux, under KVM where that works for it, else under TCG
    #[arg(long, value_name = "WHICH", default_value = "auto")]
    pub accel: Accelerator,
    /// The guest's processors, each with a thread that rewrites memory
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: u32,
    /// What the guest rewrites; its RAM is larger by some 200 MiB for its kernel
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = memory)]
    pub mem: u64,
    /// Only so much of it: 0.25 makes 256 MiB of 1 GiB
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = scale)]
    pub scale: f64,
    /// How it rewrites: write (in order), random, hotcold (a tenth of the pages nine times of ten), read
    /// or idle
    #[arg(long, value_name = "HOW", default_value = "write")]
    pub guest: Mode,
    /// How fast at most, such as 50MiB/s [default: as fast as it goes]
    #[arg(long, value_name = "RATE", value_parser = bytes_a_second)]
    pub rate: Option<u64>,
    /// What its pages hold: random (which nothing can pack) or text
    #[arg(long, value_name = "WHAT", default_value = "random")]
    pub fill: Fill,
    /// How long it is watched before
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = duration)]
    pub before: Duration,
    /// How long it is watched after
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = duration)]
    pub after: Duration,
}

#[derive(Args)]
pub(crate) struct BatchOptions {
    /// The matrix, a TOML file
    pub matrix: PathBuf,
    /// The folder for the reports; it is made
    #[arg(short, long, value_name = "FOLDER")]
    pub output: PathBuf,
    /// The guest's kernel, a vmlinuz [default: the one that scripts/setup.sh has fetched]
    #[arg(long, value_name = "FILE", env = "VMFERRY_GUEST_KERNEL")]
    pub kernel: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct CompareOptions {
    /// Reports, and folders of reports
    #[arg(required = true, value_name = "FILE|FOLDER")]
    pub what: Vec<PathBuf>,
    /// A line for each set-up, as a table in Markdown, sorted by name
    #[arg(long)]
    pub table: bool,
}

#[derive(Args)]
pub(crate) struct PageOptions {
    /// Reports, and folders of reports
    #[arg(required = true, value_name = "FILE|FOLDER")]
    pub what: Vec<PathBuf>,
    /// Write the page there
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// What it is called
    #[arg(long, value_name = "TEXT", default_value = "Live migration, measured")]
    pub title: String,
}

#[derive(Args)]
pub(crate) struct ImportOptions {
    /// The report of guestperf
    pub file: PathBuf,
    /// Write ours there
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// A size as QEMU takes it: `64M`, `1G`.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no size of a guest; give one such as 64M or 1G");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        _ => return Err(bad()),
    };
    let bytes = digits.parse::<f64>().map_err(|_| bad())? * factor as f64;
    match (f64::from(16 << 20)..=f64::from(1 << 30) * 4096.0).contains(&bytes) {
        true => Ok(bytes as u64),
        false => Err(format!("{text} makes no sense for a guest; give 16M to 4096G")),
    }
}

fn scale(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.001..=1.0).contains(share)).ok_or_else(|| "give a share from 0.001 to 1".into())
}

fn bytes_a_second(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(Rate(rate)) if rate >= 4096 => Ok(rate),
        Ok(_) => Err("the guest writes at least a page a second: give 4KiB/s or more".into()),
        Err(why) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        assert_eq!(memory("64M"), Ok(64 << 20));
        assert_eq!(memory("1.5G"), Ok(3 << 29));
        for bad in ["", "1", "1T2", "-1G", "0M", "1e9G", "999999G", "nanG"] {
            assert!(memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shares_and_rates_that_make_no_sense_are_refused() {
        assert!(["0", "1.1", "-1", "nan", "x"].iter().all(|bad| scale(bad).is_err()));
        assert!(bytes_a_second("0").is_err() && bytes_a_second("1MiB/s") == Ok(1 << 20));
    }
}
