//! The command line: what can be said, and the help that teaches it. What measures is in a file of its own.

mod bench;
mod disk;
mod how;
mod moving;
mod nbd;
mod predict;
mod sim;
mod tune;

pub(crate) use bench::{
    BatchOptions, Bench, BenchLinkOptions, BenchRamOptions, BenchRunOptions, CompareOptions, ImportOptions, PageOptions,
};

pub(crate) use disk::{Disk, DiskMoveOptions};
pub(crate) use how::How;
pub(crate) use moving::MoveOptions;
pub(crate) use nbd::{ClientTlsOptions, CopyOptions, InfoOptions, Nbd, ServeOptions, ServerTlsOptions};
pub(crate) use predict::PredictOptions;
pub(crate) use sim::SimOptions;
pub(crate) use tune::TuneOptions;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use vmferry_api::{Listen, Rate};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    an unexpected error
  2    the command line could not be understood
  3    refused; nothing was touched
  4    the migration, the move or the copy failed; the guest is at the source, unharmed
  5    gave up within the given limits; the guest runs on at the source
  6    the outcome is not known here, or the guest needs attention
  7    no agent answers on this host
  8    too late to cancel: the guest is at its destination, or may be
  130  cancelled; the guest runs on at the source";

const MIGRATE_HELP: &str = "\
Examples:
  vmferry migrate web1 --to beta
  vmferry migrate web1 --to beta --dry-run
  vmferry migrate web1 web2 db1 --to beta --bandwidth 500MiB/s

Over one link several are done soonest one after the other, so they go in turn: quiet guests first; two at once only where
one alone cannot fill the link. All are checked before the first one begins; one that cannot go is named and keeps no
other. The agent holds the queue, also when it is started anew: `vmferry migrations` shows it, `vmferry cancel NAME` takes
one out. What is asked for separately while another goes to the same host waits for its turn, too.

Ctrl-C cancels one that was asked for alone. Of several it only ends the looking: the agent goes on with them.

Exit codes are those of `vmferry --help`; of several the worst.";

/// Hands-off live migration for QEMU/KVM guests.
#[derive(Parser)]
#[command(name = "vmferry", version, after_long_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// This host's agent [default: the one in the agent's run folder]
    #[arg(long, global = true, env = "VMFERRY_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Serve this host: the daemon that everything else talks to
    Agent(AgentOptions),
    /// Start a VM from a QEMU command line
    #[command(after_long_help = "\
Example:
  vmferry run web1 -- qemu-system-x86_64 -m 4G -drive file=/srv/web1.qcow2,if=virtio

vmferry adds what it needs: a monitor, a pidfile, the name, a serial console when the command line leaves it open, and
shared memory for RAM when only -m is given. The VM outlives the agent.")]
    Run {
        /// Its name, one a host
        name: String,
        /// Start it whenever this host is started; it is not forgotten when it shuts down
        #[arg(long)]
        autostart: bool,
        /// The QEMU command line, after --
        #[arg(last = true, required = true, value_name = "QEMU COMMAND LINE")]
        argv: Vec<String>,
    },
    /// Take over a QEMU that somebody else started
    Adopt {
        /// The name to give it
        name: String,
        /// Its QMP socket (-qmp unix:PATH,server=on,wait=off); nobody else may be connected to it
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
    },
    /// List the VMs of this host
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one VM
    Show {
        /// Its name
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Shut a VM down
    Stop {
        /// Its name
        name: String,
        /// End it like a power cut
        #[arg(long)]
        force: bool,
        /// Keep it on the list, to be started again or moved to another host
        #[arg(long)]
        keep: bool,
        /// How long the guest may take to shut down
        #[arg(long, value_name = "TIME", default_value = "60s")]
        timeout: humantime::Duration,
    },
    /// Start a VM again whose QEMU has ended, or whose host was restarted
    Start {
        /// Its name
        name: String,
        /// It came from a host that cannot be asked whether the guest was kept there, and I know that it was not
        #[arg(long)]
        undisputed: bool,
    },
    /// Pause a guest; one that is being migrated arrives paused
    Pause {
        /// Its name
        name: String,
    },
    /// Have a paused guest go on
    Resume {
        /// Its name
        name: String,
    },
    /// Start a VM whenever this host is started, or not any more
    Autostart {
        /// Its name
        name: String,
        /// Whether it is
        #[arg(value_parser = ["on", "off"])]
        on: String,
    },
    /// Attach to a VM's serial console; Ctrl-] detaches
    Console {
        /// Its name
        name: String,
    },
    /// Move a running VM to another host, or several, one after the other
    #[command(after_long_help = MIGRATE_HELP)]
    Migrate(MigrateOptions),
    /// Watch a running VM for some seconds, and say what its migration would do
    #[command(after_long_help = predict::PREDICT_HELP)]
    Predict(PredictOptions),
    /// Move a VM that does not run to another host, with its disks
    #[command(after_long_help = moving::MOVE_HELP)]
    Move(MoveOptions),
    /// Copy an image that no guest runs from to another host
    #[command(after_long_help = "\
Examples:
  vmferry copy /srv/images/web1.raw beta:/srv/images/web1.raw
  vmferry copy --update /srv/images/web1.raw beta:/srv/images/web1.raw      only what has changed since

The image is copied byte by byte, whatever is in it: a raw or qcow2 file, or what a block device has. Holes and zeroes
are not sent, and are holes in the copy. While it is written it is called PATH.vmferry-part; PATH is there when all of it
is, and on its disk. Whatever ends it before, the same command goes on from what has arrived; remove the part to give
it up. PATH has to be in one of the folders that image_folders names in the other agent's configuration.")]
    Copy(CopyImageOptions),
    /// Try policies out on migrations that are only reckoned: ours beside what other managers decide
    #[command(after_long_help = sim::SIM_HELP)]
    Sim(SimOptions),
    /// Change the limits of a migration that is under way
    #[command(after_long_help = tune::TUNE_HELP)]
    Tune(TuneOptions),
    /// Have the destination run a VM that is being migrated at once; what is missing of its memory follows
    PostCopy {
        /// The VM's name
        name: String,
    },
    /// Cancel the migration of a VM, or take it out of the queue; the guest runs on here
    Cancel {
        /// The VM's name
        name: String,
    },
    /// Decide about a guest of which the agents do not know where it is
    #[command(after_long_help = "\
A guest is `in-doubt` when it was handed over and its destination does not answer whether it took it. It stays paused
here, as it may run there. When that host comes back, all is well by itself. When it never will, only you can know
whether the guest runs there.

--keep-here lets it go on here. Be sure that it does not run there: two guests that write to one disk destroy it. The
other host lets go of it as soon as it can be told, also when it comes back later, at another address, or set up anew
(pair it again under its old name then).

--it-runs-there ends what is left of it here.

A VM that does not run is `leaving` when it was moved and the other host does not answer whether it took it. --keep-here
makes it this host's again: be sure that the other has not taken it, as it is not asked later.

The same decides about a guest that is `stranded` (its post-copy could not be finished), `leaving` (the destination of
its post-copy does not answer), or `unclear` (found running after the agent's journal was lost).")]
    Resolve {
        /// The VM's name
        name: String,
        /// It goes on here
        #[arg(long, required_unless_present = "it_runs_there", conflicts_with = "it_runs_there")]
        keep_here: bool,
        /// It runs at the other host
        #[arg(long)]
        it_runs_there: bool,
        /// Do not ask again
        #[arg(long)]
        yes: bool,
    },
    /// Make two hosts peers: without a token, make one; with a token of the other host, use it
    #[command(after_long_help = "\
Example:
  beta#  vmferry pair
  alpha# vmferry pair vmferry-aeaaa...

A token is good for one host and some minutes. Whoever has it can become a peer, so treat it like a password; where
others use the host too, `vmferry pair -` keeps it off the command line. Be sure of the other host: a peer can start
QEMU here with any arguments, as the agent's user.")]
    Pair {
        /// What `vmferry pair` printed on the other host; `-` reads it from standard input
        token: Option<String>,
        /// How long a new token is good for
        #[arg(long, value_name = "TIME", default_value = "10m", conflicts_with = "token")]
        expires: humantime::Duration,
        /// Print nothing but the token
        #[arg(long, conflicts_with = "token")]
        quiet: bool,
    },
    /// List the hosts that this one is paired with
    Peers {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Trust a peer no more
    Unpair {
        /// Its name, or its fingerprint
        peer: String,
    },
    /// List the migrations away from this host: those that wait, and how the last ones ended
    Migrations {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Measure
    #[command(subcommand)]
    Bench(Bench),
    /// A VM's disks: list them, and move one to another place on this host or to a server
    #[command(subcommand)]
    Disk(Disk),
    /// Disks over the network: serve, look at, and copy them, as QEMU, nbdkit and libnbd do
    #[command(subcommand)]
    Nbd(Nbd),
    /// What the agent has QEMU traced by; of no use to anybody else
    #[command(hide = true)]
    TraceQemu,
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

#[derive(Args)]
pub(crate) struct AgentOptions {
    /// The configuration [default: /etc/vmferry/agent.toml, if it exists]
    #[arg(long, env = "VMFERRY_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Serve other agents here, or "none" [default: [::]:7420, which is every address of this host]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<Listen>,
}

#[derive(Args)]
pub(crate) struct MigrateOptions {
    /// The VM's name, or those of several
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    #[command(flatten)]
    pub how: How,
    /// Check everything, watch the guest, and say what would be done and how it would turn out; touch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How long a dry run watches the guest, in seconds or as a time such as 500ms; 0: not at all
    #[arg(long, value_name = "SECONDS", default_value = "3", allow_hyphen_values = true, value_parser = predict::seconds)]
    pub watch: std::time::Duration,
    /// Print JSON, one event a line; the last one is the report
    #[arg(long)]
    pub json: bool,
    /// Say each decision, and what was expected of it
    #[arg(long, short)]
    pub verbose: bool,
    /// Write a report of it there, which `vmferry bench page` draws and `vmferry sim --trace` plays; also when it does not
    /// complete
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    pub record: Option<PathBuf>,
    /// Whose policy decides: vmferry's, or what another manager does, by its name in `vmferry sim` (such as nova or proxmox);
    /// these steer QEMU's own migration (--engine qemu), by limits of their own [default: vmferry]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["downtime", "max_time", "prefer"])]
    pub policy: Option<String>,
    /// Refuse it when a disk would have to move with the VM, as it is not on storage that both hosts see
    #[arg(long)]
    pub no_copy_disks: bool,
}

#[derive(Args)]
pub(crate) struct CopyImageOptions {
    /// A file or a block device
    pub image: PathBuf,
    /// The peer's name or address (or ssh://[USER@]HOST[:PORT]), and the absolute path that the copy is to have there
    #[arg(value_name = "HOST:PATH")]
    pub target: String,
    /// Send no faster than this [default: as fast as the link carries]
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// PATH may be there already: only what differs is sent, and it becomes what the image is, all at once
    #[arg(long)]
    pub update: bool,
    /// Do not sum what was read and what arrived: saves processor time, and nobody notices if one host's memory, or
    /// software, has spoilt something on the way
    #[arg(long)]
    pub no_verify: bool,
    /// Print JSON, one event a line; the last one is the report
    #[arg(long)]
    pub json: bool,
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; give a time such as 300ms, 10s or 5m"))
}

fn place(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && path.starts_with('/') => Ok((name.into(), path.into())),
        _ => Err("give the disk's name and an absolute path, such as virtio0=/srv/web1.raw".into()),
    }
}

fn rate(text: &str) -> Result<u64, String> {
    text.parse().map(|Rate(rate)| rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_negative_or_unreadable_time_is_refused_with_an_example() {
        for bad in ["-5ms", "soon", ""] {
            assert!(duration(bad).unwrap_err().contains("300ms"), "{bad}");
        }
    }
}
