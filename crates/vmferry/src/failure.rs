//! How a command fails: one line in plain words, what to do next, and an exit code.

mod nbd;

pub(crate) use nbd::NbdFailure;

use std::path::PathBuf;

use vmferry_api::client::ClientError;
use vmferry_api::{Code, in_one_line};
use vmferry_bench::batch::BatchError;
use vmferry_bench::link::LinkBenchError;
use vmferry_bench::report::ReadError;
use vmferry_bench::run::RunError;
use vmferry_bench::scenario::ScenarioError;
use vmferry_bench::testbed::TestbedError;

/// Why a command did not do what it was asked. The exit codes are listed in the help (`cli.rs`).
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// In the agent's words, or for want of an agent.
    #[error(transparent)]
    Agent(#[from] ClientError),
    #[error("stopped looking; the migration was asked to cancel and may still be under way")]
    StoppedLooking,
    #[error("stopped looking; the agent goes on with {0}")]
    LeftToTheAgent(String),
    #[error("{failed} of {of} VMs were not migrated")]
    SomeFailed { failed: usize, of: usize, code: u8 },
    #[error("{0} is for one VM: migrate that one by itself")]
    OnlyForOne(&'static str),
    #[error("lost sight of the copy")]
    LostCopy,
    #[error("lost sight of the move; the same command goes on with it when the agent is back")]
    LostMove,
    #[error("two places are given for the disk {0}")]
    TwoPlaces(String),
    #[error("{0:?} is no place for a copy: give HOST:PATH, where PATH begins with a slash and ends with a name")]
    BadTarget(String),
    #[error("cannot run the agent")]
    Serve(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot use the terminal")]
    Terminal(#[source] std::io::Error),
    #[error("nothing was decided: say `y`, or give --yes")]
    NotConfirmed,
    #[error("cannot run ssh")]
    Ssh(#[source] std::io::Error),
    #[error("{0:?} is no ssh destination: give ssh://HOST, ssh://USER@HOST or ssh://USER@HOST:PORT")]
    BadSshHost(String),
    #[error("could not get a join token from {host} over ssh: {}", ended(*code))]
    NoTokenOverSsh { host: String, code: Option<i32> },
    #[error("there is no policy {name:?}: there are {known}")]
    NoPolicy { name: String, known: String },
    #[error("{} tells of no guest: {why}", path.display())]
    NoTrace { path: PathBuf, why: String },
    #[error("cannot measure the link")]
    Bench(#[source] LinkBenchError),
    #[error("cannot measure the engines")]
    BenchRam(#[from] TestbedError),
    #[error(transparent)]
    Measure(#[from] RunError),
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    #[error(transparent)]
    ReadReport(#[from] ReadError),
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error("{0} of the runs failed; run it again to try them once more")]
    RunsFailed(usize),
    #[error("the guest's memory did not arrive as it was: {0}")]
    Damaged(String),
    #[error("interrupted; nothing is left running")]
    Interrupted,
    #[error("cannot write the report to {}", path.display())]
    Report { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Nbd(#[from] NbdFailure),
    #[error("cannot tell the current folder")]
    NoFolder(#[source] std::io::Error),
}

impl From<LinkBenchError> for Failure {
    fn from(error: LinkBenchError) -> Self {
        match error {
            LinkBenchError::Client(error) => Self::Agent(error),
            other => Self::Bench(other),
        }
    }
}

/// What the end of ssh, or of the command that it ran, means.
fn ended(code: Option<i32>) -> String {
    match code {
        Some(255) => "ssh could not log in".into(),
        Some(127) => "vmferry is not installed there".into(),
        Some(7) => "no agent answers there, and none could be started".into(),
        Some(code) => format!("`vmferry pair` there ended with {code}"),
        None => "ssh was ended".into(),
    }
}

impl Failure {
    pub(crate) fn tell(&self) {
        eprintln!("vmferry: {}", in_one_line(self));
        if let Some(hint) = self.hint() {
            eprintln!("  hint: {hint}");
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Agent(ClientError::NoAgent { .. }) => Some("start it with `vmferry agent`, as the same user".into()),
            Self::Agent(ClientError::Problem(problem)) => problem.hint.clone(),
            Self::Nbd(error) => error.hint().map(Into::into),
            Self::Agent(ClientError::LostSight) | Self::StoppedLooking => {
                Some("the guest runs on; `vmferry migrations` tells what became of the migration".into())
            }
            Self::LeftToTheAgent(_) => Some(
                "`vmferry migrations` shows how they stand; `vmferry cancel NAME` cancels one, or takes it out of the queue"
                    .into(),
            ),
            Self::LostCopy => Some("the same command goes on from what has arrived".into()),
            _ => None,
        }
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Agent(ClientError::NoAgent { .. }) => 7,
            Self::Agent(ClientError::Problem(problem)) => exit_code(problem.code),
            Self::Agent(ClientError::LostSight)
            | Self::StoppedLooking
            | Self::LostCopy
            | Self::LostMove
            | Self::LeftToTheAgent(_) => 6,
            Self::SomeFailed { code, .. } => *code,
            Self::Measure(error) | Self::Batch(BatchError::Run(error)) => measuring_code(error),
            Self::Nbd(error) => error.exit_code(),
            Self::Interrupted => 130,
            Self::BadSshHost(_)
            | Self::OnlyForOne(_)
            | Self::BadTarget(_)
            | Self::TwoPlaces(_)
            | Self::NoPolicy { .. }
            | Self::Scenario(_)
            | Self::Batch(
                BatchError::Toml { .. }
                | BatchError::Senseless(_)
                | BatchError::OtherMatrix(_)
                | BatchError::Scenario(_),
            ) => 2,
            Self::NotConfirmed
            | Self::Ssh(_)
            | Self::NoTokenOverSsh { .. }
            | Self::ReadReport(_)
            | Self::NoTrace { .. }
            | Self::Batch(BatchError::Read(_)) => 3,
            Self::Agent(ClientError::Lost(_))
            | Self::Bench(_)
            | Self::BenchRam(_)
            | Self::Batch(BatchError::Io { .. })
            | Self::RunsFailed(_)
            | Self::Damaged(_)
            | Self::Report { .. }
            | Self::Serve(_)
            | Self::Terminal(_)
            | Self::NoFolder(_) => 1,
        }
    }
}

fn measuring_code(error: &RunError) -> u8 {
    match error {
        RunError::Senseless { .. } => 2,
        RunError::CannotHere { .. } | RunError::NoMemory { .. } | RunError::NoRights { .. } => 3,
        _ => 1,
    }
}

/// Of several exit codes the one that a user has to know of first.
pub(crate) fn worst(codes: impl Iterator<Item = u8>) -> u8 {
    const FIRST: [u8; 7] = [6, 8, 4, 5, 1, 130, 3];
    let rank = |code: &u8| FIRST.iter().position(|it| it == code).unwrap_or(FIRST.len());
    codes.min_by_key(rank).unwrap_or(0)
}

pub(crate) fn exit_code(code: Code) -> u8 {
    match code {
        Code::Internal | Code::QemuFailed | Code::Other => 1,
        Code::MigrationFailed | Code::CopyFailed => 4,
        Code::GaveUp => 5,
        Code::GuestAtRisk => 6,
        Code::TooLate => 8,
        Code::Cancelled => 130,
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_exit_codes_the_one_about_a_guest_at_risk_comes_first() {
        assert_eq!(
            [3, 130, 6, 4].into_iter().max_by_key(|it| u8::from(worst([3, 130, 6, 4].into_iter()) == *it)),
            Some(6)
        );
        assert_eq!((worst([3, 5].into_iter()), worst(std::iter::empty())), (5, 0));
    }

    #[test]
    fn every_exit_code_of_the_help_is_given_for_something() {
        let given = [
            Code::Internal,
            Code::NoMemory,
            Code::MigrationFailed,
            Code::GaveUp,
            Code::GuestAtRisk,
            Code::TooLate,
            Code::Cancelled,
        ];
        assert_eq!(given.map(exit_code), [1, 3, 4, 5, 6, 8, 130]);
    }
}
