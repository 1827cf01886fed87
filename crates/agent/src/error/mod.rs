//! What can go wrong in an agent, and how it is told: every error has a code that programs can match, a message in
//! plain words, and, where there is something to do about it, a hint.

use std::path::PathBuf;

use vmferry_api::trial::BadTrial;
use vmferry_api::{Code, Problem, in_one_line};
use vmferry_libvirt::ConnectionError;
use vmferry_link::LinkDown;
use vmferry_qemu::{CommandLineError, LaunchError, ProbeError, QmpError, StreamTlsError};
use vmferry_ram::RamError;

mod engine;
mod image;
mod peer;

pub use engine::EngineError;
pub use image::ImageError;
pub use peer::{API, PeerError};

/// An error of the agent. The message says what is wrong; the chain of sources says why.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No VM of that name.
    #[error("there is no VM named {name} on this host")]
    UnknownVm {
        /// The name asked for.
        name: String,
    },
    /// Its QEMU is gone.
    #[error("{name} does not run any more: {why}")]
    Ended {
        /// The VM.
        name: String,
        /// What became of it.
        why: String,
    },
    /// The name is taken.
    #[error("a VM named {name} exists on {host}")]
    VmExists {
        /// The name.
        name: String,
        /// The host that has it.
        host: String,
    },
    /// Something the user gave cannot be used.
    #[error("{message}")]
    BadRequest {
        /// What is wrong with it.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The VM is in a state in which that cannot be done.
    #[error("{message}")]
    Conflict {
        /// What stands in the way.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Later it may be different.
    #[error("wait for {what}")]
    Busy {
        /// What keeps it.
        what: String,
    },
    /// A migration of this VM is under way.
    #[error("{name} is being migrated")]
    MigrationRuns {
        /// The VM.
        name: String,
    },
    /// The user's limits make no sense.
    #[error("{message}")]
    BadLimit {
        /// Which, and what is allowed.
        message: String,
    },
    /// This VM cannot be migrated.
    #[error("{name} cannot be migrated: {reason}")]
    NotMigratable {
        /// The VM.
        name: String,
        /// Why, in QEMU's words or ours.
        reason: String,
        /// What to do.
        hint: Option<String>,
    },
    /// A machine that was changed since its start would arrive as it was before.
    #[error("{name} was changed since its start in a way that cannot go along: {}", some(changes))]
    Changed {
        /// The VM.
        name: String,
        /// How, one sentence each.
        changes: Vec<String>,
    },
    /// What was made at the destination is another machine.
    #[error("the machine that {to} has made for {name} is not the same: {}", some(differences))]
    OtherMachine {
        /// The VM.
        name: String,
        /// The destination.
        to: String,
        /// How, one sentence each.
        differences: Vec<String>,
    },
    /// The destination cannot take the VM.
    #[error("{host} cannot take {name}: {reason}")]
    Unsuitable {
        /// The destination.
        host: String,
        /// The VM.
        name: String,
        /// Which requirement is not met.
        code: Code,
        /// Why.
        reason: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Whoever asks is not a peer.
    #[error("{host} is not paired with this host")]
    NotPaired {
        /// Who was asked.
        host: String,
    },
    /// Whoever asks did not begin this migration.
    #[error("that migration is not yours")]
    NotYours,
    /// Somebody came with a token that is not valid.
    #[error("the join token is not valid any more: it was used, or has expired")]
    BadToken,
    /// No peer of that name.
    #[error("there is no peer named {name}")]
    UnknownPeer {
        /// The name or fingerprint asked for.
        name: String,
    },
    /// The other host's guests would travel without encryption, and this host's configuration does not want that.
    #[error("{host} does not send or take guests unencrypted")]
    PlainRefused {
        /// Who was asked.
        host: String,
    },
    /// The other agent could not be reached, or refused.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The link to the other agent broke, or could not be made.
    #[error(transparent)]
    Link(#[from] LinkDown),
    /// The migration failed; the guest runs on at the source.
    #[error("{message}; {name} runs on at the source, unharmed")]
    MigrationFailed {
        /// The VM.
        name: String,
        /// What happened.
        message: String,
    },
    /// The policy gave up within the user's limits.
    #[error("gave up: {reason}; {name} runs on at the source, unharmed")]
    GaveUp {
        /// The VM.
        name: String,
        /// Why.
        reason: String,
    },
    /// The user cancelled.
    #[error("cancelled; {name} runs on at the source")]
    Cancelled {
        /// The VM.
        name: String,
    },
    /// A copy of an image failed, or was cancelled.
    #[error("{message}")]
    CopyFailed {
        /// What happened.
        message: String,
        /// Its user wanted that.
        cancelled: bool,
    },
    /// The user wanted to cancel a migration that cannot be undone any more.
    #[error("too late to cancel it: {name} {}", if *is_there { "runs at its destination already, and can only go on there" } else { "may run at its destination already, which does not answer" })]
    TooLate {
        /// The VM.
        name: String,
        /// The destination has said that it owns the guest.
        is_there: bool,
    },
    /// The user has decided, in doubt, that the guest goes on at the source.
    #[error("{name} goes on here by its user's word; its destination lets go as soon as it hears of that")]
    Kept {
        /// The VM.
        name: String,
    },
    /// QEMU had let go of the guest for post-copy, and the destination never took it.
    #[error("{name} cannot go on: its QEMU here had let go of it for post-copy, and {reason}")]
    Nowhere {
        /// The VM.
        name: String,
        /// Why the destination has not got it.
        reason: String,
    },
    /// The destination owns the guest and has all of it, but has not said that it runs.
    #[error("{name} was handed over to {to} with all of its memory, but {to} has not said that it runs")]
    DoesNotRun {
        /// The VM.
        name: String,
        /// The destination.
        to: String,
    },
    /// Post-copy could not be finished.
    #[error("{name} was handed over to {to}, but post-copy could not be finished: {reason}; it may have lost memory")]
    GuestAtRisk {
        /// The VM.
        name: String,
        /// The destination.
        to: String,
        /// Why.
        reason: String,
    },
    /// The source's own QEMU ended.
    #[error("{name}'s own QEMU ended at the source while it was migrated ({why})")]
    SourceEnded {
        /// The VM.
        name: String,
        /// What was seen of it.
        why: String,
    },
    /// Neither libvirt has said where the guest is.
    #[error("{name} was being migrated to {to} by libvirt, and it is not known what came of it: {reason}")]
    WhereUnknown {
        /// The domain.
        name: String,
        /// The destination.
        to: String,
        /// What keeps it from being known.
        reason: String,
    },
    /// libvirt's post-copy broke.
    #[error("{name} runs on {to} without all of its memory: {reason}")]
    PostCopyBroke {
        /// The domain.
        name: String,
        /// The destination.
        to: String,
        /// Why.
        reason: String,
    },
    /// No QEMU of that name.
    #[error("{binary} was not found on {host}")]
    NoQemu {
        /// What was looked for.
        binary: String,
        /// On which host.
        host: String,
    },
    /// A QEMU command line that cannot be used.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// QEMU did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// QEMU could not be asked what it can do.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// QEMU did not do what it was told.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU's streams cannot be encrypted.
    #[error(transparent)]
    StreamTls(#[from] StreamTlsError),
    /// libvirt refused, failed, or has gone away.
    #[error(transparent)]
    Libvirt(#[from] ConnectionError),
    /// Copying the RAM failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A guest's RAM cannot be received.
    #[error("cannot receive the guest's RAM")]
    Ram(#[from] RamError),
    /// The journal cannot be read or written.
    #[error("the agent's journal cannot be used")]
    Store(#[from] rusqlite::Error),
    /// An image cannot be made or opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A disk was not moved.
    #[error("{message}; {name} keeps {disk} where it was, unharmed")]
    DiskMove {
        /// The VM.
        name: String,
        /// The disk.
        disk: String,
        /// What happened.
        message: String,
    },
    /// Nobody knows yet whether a disk was moved.
    #[error("where {disk} of {name} is, is not known yet: {message}")]
    DiskMoveUnclear {
        /// The VM.
        name: String,
        /// The disk.
        disk: String,
        /// What happened.
        message: String,
    },
    /// Its user cancelled the move of a disk.
    #[error("cancelled; {name} keeps {disk} where it was")]
    DiskMoveCancelled {
        /// The VM.
        name: String,
        /// The disk.
        disk: String,
    },
    /// A file or folder cannot be used.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl AgentError {
    /// An [`AgentError::Io`] of this path.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    fn code(&self) -> Code {
        match self {
            Self::UnknownVm { .. } => Code::UnknownVm,
            Self::VmExists { .. } => Code::VmExists,
            Self::BadRequest { .. } | Self::CommandLine(_) => Code::BadRequest,
            Self::Conflict { .. } | Self::Ended { .. } | Self::Image(_) | Self::Libvirt(_) => Code::Conflict,
            Self::Busy { .. } => Code::Busy,
            Self::MigrationRuns { .. } => Code::MigrationRuns,
            Self::BadLimit { .. } => Code::BadLimit,
            Self::NotMigratable { .. } | Self::Changed { .. } | Self::OtherMachine { .. } => Code::NotMigratable,
            Self::Unsuitable { code, .. } => *code,
            Self::NotPaired { .. } | Self::NotYours => Code::NotPaired,
            Self::BadToken => Code::BadToken,
            Self::UnknownPeer { .. } => Code::UnknownPeer,
            Self::PlainRefused { .. } => Code::PlainRefused,
            Self::Peer(error) => error.code(),
            Self::Link(_) => Code::Unreachable,
            Self::MigrationFailed { .. }
            | Self::DiskMove { .. }
            | Self::DiskMoveUnclear { .. }
            | Self::Kept { .. }
            | Self::Engine(_)
            | Self::Ram(_) => Code::MigrationFailed,
            Self::GaveUp { .. } => Code::GaveUp,
            Self::Cancelled { .. } | Self::DiskMoveCancelled { .. } | Self::CopyFailed { cancelled: true, .. } => {
                Code::Cancelled
            }
            Self::CopyFailed { .. } => Code::CopyFailed,
            Self::WhereUnknown { .. }
            | Self::PostCopyBroke { .. }
            | Self::GuestAtRisk { .. }
            | Self::Nowhere { .. }
            | Self::DoesNotRun { .. }
            | Self::SourceEnded { .. } => Code::GuestAtRisk,
            Self::TooLate { .. } => Code::TooLate,
            Self::NoQemu { .. } => Code::NoQemu,
            Self::Launch(_) | Self::Probe(_) | Self::Qmp(_) | Self::StreamTls(_) => Code::QemuFailed,
            Self::Store(_) | Self::Io { .. } => Code::Internal,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownVm { .. } => Some("`vmferry list` shows the VMs of this host".into()),
            Self::Ended { name, .. } => Some(format!("`vmferry start {name}` starts it again")),
            Self::VmExists { .. } => Some("choose another name, or stop that VM first".into()),
            Self::BadRequest { hint, .. }
            | Self::Conflict { hint, .. }
            | Self::NotMigratable { hint, .. }
            | Self::Unsuitable { hint, .. } => hint.clone(),
            Self::Changed { name, .. } => Some(format!(
                "undo what was changed (`vmferry show {name}` has all of it), or stop the VM and start it as it is to be"
            )),
            Self::OtherMachine { .. } => Some("use the same QEMU, firmware and files on both hosts".into()),
            Self::MigrationRuns { name } => Some(format!("wait for it, or cancel it with `vmferry cancel {name}`")),
            Self::NotPaired { .. } => {
                Some("pair the two: `vmferry pair` on one makes a token for `vmferry pair TOKEN` on the other".into())
            }
            Self::BadToken => Some("make a new one with `vmferry pair`".into()),
            Self::UnknownPeer { .. } => Some("`vmferry peers` lists them".into()),
            Self::PlainRefused { .. } => {
                Some("set security = \"plain\" for the network in the agents' configurations, on both hosts".into())
            }
            Self::Peer(error) => error.hint(),
            Self::Image(error) => error.hint().map(str::to_owned),
            Self::CopyFailed { .. } => Some("what has arrived is kept: the same command goes on from there".into()),
            Self::GuestAtRisk { name, .. } => Some(format!(
                "see `vmferry show {name}` there; what is left of it here stays until `vmferry resolve` or `vmferry stop --force`"
            )),
            Self::WhereUnknown { name, .. } => Some(format!(
                "the agent goes on asking, and notes it down (`vmferry migrations`); `virsh domstate {name} --reason` on both \
                 hosts tells the same"
            )),
            Self::PostCopyBroke { name, to, .. } => Some(format!(
                "`virsh migrate --live --p2p --postcopy --postcopy-resume {name} qemu+ssh://{to}/system` here resumes it; until then \
                 keep both hosts up"
            )),
            Self::DoesNotRun { name, .. } => Some(format!("see `vmferry show {name}` there: its agent goes on trying")),
            Self::TooLate { name, is_there: true } => {
                Some(format!("its memory follows; migrate {name} back when it is there"))
            }
            Self::TooLate { name, .. } => {
                Some(format!("wait for that host; if it never comes back: `vmferry resolve {name} --help`"))
            }
            Self::NoQemu { .. } => Some("install QEMU there, or name its folder in the agent's qemu_dirs".into()),
            _ => None,
        }
    }
}

/// As many as one reads.
fn some(sentences: &[String]) -> String {
    const MOST: usize = 5;
    let more = match sentences.len().checked_sub(MOST) {
        None | Some(0) => String::new(),
        Some(more) => format!("; and {more} more"),
    };
    let first: Vec<&str> = sentences.iter().take(MOST).map(String::as_str).collect();
    format!("{}{more}", first.join("; "))
}

impl From<BadTrial> for AgentError {
    fn from(BadTrial(message): BadTrial) -> Self {
        Self::BadLimit { message }
    }
}

impl From<&AgentError> for Problem {
    fn from(error: &AgentError) -> Self {
        if let AgentError::Peer(PeerError::Refused { problem, .. }) = error {
            return of_another(problem);
        }
        Problem { code: error.code(), message: in_one_line(error), hint: error.hint() }
    }
}

/// What another agent refused, as far as it may say that here: how a migration ended is this agent's to tell, and nobody
/// moves our user's cursor.
fn of_another(problem: &Problem) -> Problem {
    let plain = |text: &str| text.chars().filter(|c| !c.is_control()).collect::<String>();
    let code = match problem.code {
        Code::MigrationFailed
        | Code::CopyFailed
        | Code::GaveUp
        | Code::Cancelled
        | Code::GuestAtRisk
        | Code::TooLate => Code::Other,
        code => code,
    };
    Problem { code, message: plain(&problem.message), hint: problem.hint.as_deref().map(plain) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_agent_says_neither_how_a_migration_ended_nor_moves_the_cursor() {
        let said =
            Problem { code: Code::Cancelled, message: "\u{1b}[2Jall is well\r\n".into(), hint: Some("\u{7}".into()) };
        let told = Problem::from(&AgentError::Peer(PeerError::Refused { problem: said }));
        assert_eq!((told.code, told.message.as_str(), told.hint.as_deref()), (Code::Other, "[2Jall is well", Some("")));
        let said = Problem { code: Code::NoMemory, message: "too little".into(), hint: None };
        assert_eq!(Problem::from(&AgentError::Peer(PeerError::Refused { problem: said.clone() })), said);
    }
}
