//! `vmferry bench batch`: many runs, in an order made by chance, that can be taken up again after an interruption.
//!
//! A matrix is a TOML file with a list for each dimension; all combinations are run, so often. Each run leaves one file in
//! the batch's folder: its report, or why it could not be run (`.skipped`: it is not tried again). What has no file yet is
//! what is left to do. The order is made anew from a seed that the folder keeps, so that a machine that gets slower, or
//! an hour in which others use it, does not fall on one set-up alone.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmferry_api::EngineName;

use crate::report::{self, ReadError, RunReport};
use crate::run::{OtherHost, RunError, RunOptions, Transport, run};
use crate::scenario::{Scenario, ScenarioError, parse_bits};
use crate::{Fill, GuestKind, Mode};

/// No batch is larger.
const MOST_RUNS: usize = 10_000;
const PLAN: &str = "batch.json";
/// A run that an error ended is tried so often before the batch goes on without it.
const TRIES: u32 = 2;

/// A matrix, as it is written in its file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Matrix {
    /// How often each combination is run.
    #[serde(default = "one")]
    pub repetitions: u32,
    /// Names or files.
    pub scenarios: Vec<String>,
    /// Engines; a scenario that is not for one of them is left out.
    #[serde(default = "qemu")]
    pub engines: Vec<EngineName>,
    /// The guest's processors and what it rewrites.
    pub guests: Vec<GuestSize>,
    /// Links, such as `1gbit`; `none` is not shaped.
    #[serde(default = "unshaped")]
    pub links: Vec<String>,
    /// What carries the guest.
    #[serde(default)]
    pub transport: Transports,
    /// Folders that are searched for QEMU before `PATH`; empty: none. Relative ones start at the matrix.
    #[serde(default = "system")]
    pub qemus: Vec<String>,
    /// How guests rewrite.
    #[serde(default = "write_mode")]
    pub mode: String,
    /// What their pages hold.
    #[serde(default = "random")]
    pub fill: String,
    /// How fast at most, in bytes a second.
    pub rate: Option<u64>,
    /// How long a guest is watched before and after, in ms.
    #[serde(default = "three_seconds")]
    pub watched_ms: u64,
    /// Another host, by a peer's name or its address, instead of two on this one.
    pub to: Option<String>,
}

/// What a batch's runs have in common beside what its matrix says.
#[derive(Clone, Debug)]
pub struct Place {
    /// The `vmferry` binary.
    pub vmferry: PathBuf,
    /// See [`RunOptions::kernel`].
    pub kernel: Option<PathBuf>,
    /// The host that the matrix names, if it does.
    pub to: Option<OtherHost>,
}

/// A guest's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GuestSize {
    /// Processors.
    pub vcpus: u32,
    /// What they rewrite, in MiB.
    pub mem_mib: u64,
}

/// See [`Transport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Transports(Vec<String>);

impl Default for Transports {
    fn default() -> Self {
        Self(vec!["link".into()])
    }
}

fn one() -> u32 {
    1
}
fn qemu() -> Vec<EngineName> {
    vec![EngineName::Qemu]
}
fn unshaped() -> Vec<String> {
    vec!["none".into()]
}
fn system() -> Vec<String> {
    vec![String::new()]
}
fn write_mode() -> String {
    "write".into()
}
fn random() -> String {
    "random".into()
}
fn three_seconds() -> u64 {
    3000
}

/// Why a batch cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The matrix cannot be read, or the folder not used.
    #[error("cannot use {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The matrix is not as it has to be.
    #[error("the matrix {} cannot be understood", path.display())]
    Toml {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// It makes no sense.
    #[error("the matrix makes no sense: {0}")]
    Senseless(String),
    /// The folder has runs of another matrix.
    #[error("{} has runs of another matrix: give another folder, or the matrix that it was begun with", .0.display())]
    OtherMatrix(PathBuf),
    /// A scenario is none.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// What must not be passed over: without rights or memory no run will do.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A report in the folder cannot be used.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// What the folder keeps of the batch itself.
#[derive(Serialize, Deserialize)]
struct Plan {
    seed: u64,
    matrix: Matrix,
}

/// One run of a batch.
#[derive(Clone, Debug)]
pub struct Job {
    /// What its file is called, without an ending.
    pub name: String,
    /// What is measured.
    pub options: RunOptions,
}

/// How a run went.
#[derive(Debug)]
pub enum Done<'a> {
    /// It was measured.
    Measured(&'a RunReport),
    /// It could not be.
    Skipped(&'a str),
    /// It failed, so often as it is tried.
    Failed(&'a str),
}

/// Hears how a batch goes.
pub trait Audience {
    /// So many of all are done already, from an earlier time.
    fn begin(&self, done: usize, all: usize);
    /// This one is under way.
    fn run(&self, job: &Job);
    /// It is done; so long it may take until all are.
    fn done(&self, job: &Job, how: &Done<'_>, left: Option<Duration>);
}

/// What a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Reports in the folder.
    pub measured: usize,
    /// Runs that could not be.
    pub skipped: usize,
    /// Runs that failed; they are tried again when the batch is.
    pub failed: usize,
}

impl Matrix {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, BatchError> {
        let text = std::fs::read_to_string(path).map_err(|source| BatchError::Io { path: path.into(), source })?;
        let mut matrix: Self =
            toml::from_str(&text).map_err(|source| BatchError::Toml { path: path.into(), source: Box::new(source) })?;
        let here = path.parent().unwrap_or(Path::new(""));
        for folder in matrix.qemus.iter_mut().filter(|it| !it.is_empty()) {
            *folder = here.join(&*folder).display().to_string();
        }
        for scenario in matrix.scenarios.iter_mut().filter(|it| Scenario::is_file(it)) {
            *scenario = here.join(&*scenario).display().to_string();
        }
        Ok(matrix)
    }

    /// All runs, in order; those that a scenario is not meant for are left out.
    pub fn jobs(&self, place: &Place) -> Result<Vec<Job>, BatchError> {
        let senseless = |why: String| BatchError::Senseless(why);
        let mode: Mode = self.mode.parse().map_err(|error: crate::ParseError| senseless(error.to_string()))?;
        let fill: Fill = self.fill.parse().map_err(|error: crate::ParseError| senseless(error.to_string()))?;
        let links: Vec<Option<u64>> = self
            .links
            .iter()
            .map(|it| if it == "none" { Ok(None) } else { parse_bits(it).map(Some) })
            .collect::<Result<_, _>>()
            .map_err(senseless)?;
        let transports: Vec<Transport> =
            self.transport.0.iter().map(|it| it.parse()).collect::<Result<_, _>>().map_err(senseless)?;
        let watched = Duration::from_millis(self.watched_ms);
        let base = RunOptions {
            kind: GuestKind::Linux,
            vmferry: place.vmferry.clone(),
            scenario: Scenario::find("pre-copy")?,
            engine: EngineName::Qemu,
            vcpus: 1,
            mem: 0,
            mode,
            rate: self.rate,
            fill,
            transport: Transport::Link,
            link_bits: None,
            qemu_dir: None,
            kernel: place.kernel.clone(),
            to: place.to.clone(),
            before: watched,
            after: watched,
        };
        let scenarios: Vec<Scenario> = self.scenarios.iter().map(|it| Scenario::find(it)).collect::<Result<_, _>>()?;
        // Dimension by dimension, each multiplies what there is.
        let mut jobs = vec![Job { name: String::new(), options: base }];
        jobs = each(&jobs, &scenarios, |job, scenario| {
            job.name.clone_from(&scenario.name);
            job.options.scenario = scenario.clone();
        })?;
        jobs = each(&jobs, &self.engines, |job, engine| {
            write!(job.name, "-{engine}").expect("a String takes everything");
            job.options.engine = *engine;
        })?;
        jobs.retain(|job| job.options.scenario.engines.contains(&job.options.engine));
        let qemus: Vec<(usize, &String)> = self.qemus.iter().enumerate().collect();
        jobs = each(&jobs, &qemus, |job, (which, folder)| {
            write!(job.name, "-q{which}").expect("a String takes everything");
            // QEMUs are started in other folders than this one.
            job.options.qemu_dir = std::path::absolute(folder).ok();
        })?;
        jobs = each(&jobs, &self.guests, |job, GuestSize { vcpus, mem_mib }| {
            write!(job.name, "-{vcpus}x{mem_mib}M").expect("a String takes everything");
            (job.options.vcpus, job.options.mem) = (*vcpus, mem_mib << 20);
        })?;
        jobs = each(&jobs, &transports, |job, transport| {
            write!(job.name, "-{}", transport.as_str()).expect("a String takes everything");
            job.options.transport = *transport;
        })?;
        jobs = each(&jobs, &links, |job, bits| {
            let link = bits.map_or_else(|| "unshaped".into(), |bits| format!("{}mbit", bits / 1_000_000));
            write!(job.name, "-{link}").expect("a String takes everything");
            job.options.link_bits = *bits;
        })?;
        let repetitions: Vec<u32> = (1..=self.repetitions).collect();
        jobs = each(&jobs, &repetitions, |job, repetition| {
            write!(job.name, "-r{repetition}").expect("a String takes everything");
        })?;
        match jobs.is_empty() {
            true => Err(senseless("it has no runs: every scenario is for another engine, or a list is empty".into())),
            false => Ok(jobs),
        }
    }
}

/// One job for each of these, for every job so far.
fn each<T>(jobs: &[Job], values: &[T], set: impl Fn(&mut Job, &T)) -> Result<Vec<Job>, BatchError> {
    if jobs.len() * values.len() > MOST_RUNS {
        return Err(BatchError::Senseless(format!("it has more than {MOST_RUNS} runs")));
    }
    let with = |job: &Job, value: &T| {
        let mut job = job.clone();
        set(&mut job, value);
        job
    };
    Ok(jobs.iter().flat_map(|job| values.iter().map(|value| with(job, value)).collect::<Vec<_>>()).collect())
}

/// What is left of a batch, in its order, and how many runs are done.
fn left(jobs: Vec<Job>, folder: &Path, seed: u64) -> (Vec<Job>, usize) {
    let mut jobs = jobs;
    let all = jobs.len();
    fastrand::Rng::with_seed(seed).shuffle(&mut jobs);
    // A report that was cut off, or cannot be used, is measured again.
    jobs.retain(|job| !skipped_file(folder, job).exists() && report::read(&report_file(folder, job)).is_err());
    let done = all - jobs.len();
    (jobs, done)
}

fn report_file(folder: &Path, job: &Job) -> PathBuf {
    folder.join(format!("{}.json", job.name))
}

fn skipped_file(folder: &Path, job: &Job) -> PathBuf {
    folder.join(format!("{}.skipped", job.name))
}

/// Runs what is left of a matrix. Dropping the future keeps what was measured.
pub async fn batch(
    matrix: &Matrix,
    place: &Place,
    folder: &Path,
    audience: &impl Audience,
) -> Result<Tally, BatchError> {
    let jobs = matrix.jobs(place)?;
    let seed = take_up(matrix, folder)?;
    let all = jobs.len();
    let (jobs, done) = left(jobs, folder, seed);
    audience.begin(done, all);
    let (begun, mut failed) = (Instant::now(), 0);
    for (index, job) in jobs.iter().enumerate() {
        audience.run(job);
        let how = one_run(job, folder).await?;
        let so_far = index as u32 + 1;
        let rest = (begun.elapsed() / so_far).checked_mul(jobs.len() as u32 - so_far);
        match &how {
            Ok(report) => audience.done(job, &Done::Measured(report), rest),
            Err((true, why)) => audience.done(job, &Done::Skipped(why), rest),
            Err((false, why)) => {
                failed += 1;
                audience.done(job, &Done::Failed(why), rest);
            }
        }
    }
    let skipped = matrix.jobs(place)?.iter().filter(|job| skipped_file(folder, job).exists()).count();
    Ok(Tally { measured: all - skipped - failed, skipped, failed })
}

/// Measures one; or why not, and whether that is how it has to be.
async fn one_run(job: &Job, folder: &Path) -> Result<Result<RunReport, (bool, String)>, BatchError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match run(&job.options, |_| ()).await {
            Ok(report) => {
                write_whole(&report_file(folder, job), &report.to_json())?;
                return Ok(Ok(report));
            }
            Err(RunError::CannotHere { reason }) => {
                write_whole(&skipped_file(folder, job), &reason)?;
                return Ok(Err((true, reason)));
            }
            Err(error @ (RunError::NoRights { .. } | RunError::NoMemory { .. } | RunError::Senseless { .. })) => {
                return Err(error.into());
            }
            Err(error) if tries == TRIES => return Ok(Err((false, vmferry_api::in_one_line(&error)))),
            Err(_) => {}
        }
    }
}

/// So that an interruption leaves no half of a file.
fn write_whole(path: &Path, text: &str) -> Result<(), BatchError> {
    let io = |source| BatchError::Io { path: path.into(), source };
    let half = path.with_extension("part");
    std::fs::write(&half, text).map_err(io)?;
    std::fs::rename(&half, path).map_err(io)
}

/// The seed of the folder's batch: a new one, or that of the batch which is taken up again.
fn take_up(matrix: &Matrix, folder: &Path) -> Result<u64, BatchError> {
    let path = folder.join(PLAN);
    let io = |source| BatchError::Io { path: path.clone(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    match std::fs::read_to_string(&path) {
        Ok(text) => match serde_json::from_str::<Plan>(&text) {
            Ok(plan) if plan.matrix == *matrix => Ok(plan.seed),
            _ => Err(BatchError::OtherMatrix(folder.into())),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let plan = Plan { seed: fastrand::u64(..), matrix: matrix.clone() };
            write_whole(&path, &serde_json::to_string_pretty(&plan).expect("a plan is plain data"))?;
            Ok(plan.seed)
        }
        Err(error) => Err(io(error)),
    }
}

/// Reports from files and from folders of them; in folders, other files are passed over.
pub fn read_all(paths: &[PathBuf]) -> Result<Vec<RunReport>, BatchError> {
    let mut reports = Vec::new();
    for path in paths {
        if !path.is_dir() {
            reports.push(report::read(path)?);
            continue;
        }
        let io = |source| BatchError::Io { path: path.clone(), source };
        let entries: Result<Vec<_>, _> = std::fs::read_dir(path).map_err(io)?.collect();
        let mut files: Vec<PathBuf> = entries.map_err(io)?.into_iter().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|it| it == "json") && !file.ends_with(PLAN));
        files.sort();
        for file in files {
            reports.push(report::read(&file)?);
        }
    }
    match reports.is_empty() {
        true => Err(BatchError::Senseless("there are no reports in it".into())),
        false => Ok(reports),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Place {
        Place { vmferry: "vmferry".into(), kernel: None, to: None }
    }

    fn matrix(text: &str) -> Result<Matrix, BatchError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.toml");
        std::fs::write(&path, text).unwrap();
        Matrix::read(&path)
    }

    const SMALL: &str = "repetitions = 2\nscenarios = [\"compress-1\", \"post-copy-1-iters\"]\n\
        engines = [\"qemu\", \"external\"]\nlinks = [\"100mbit\", \"none\"]\nguests = [{ vcpus = 1, mem-mib = 64 }]\n";

    #[test]
    fn a_matrix_is_all_combinations_that_make_sense() {
        let jobs = matrix(SMALL).unwrap().jobs(&here()).unwrap();
        // Compressing is for QEMU alone: (1 + 2) engines, 2 links, 2 times.
        assert_eq!(jobs.len(), 12);
        let mut names: Vec<&str> = jobs.iter().map(|it| it.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 12);
    }

    #[test]
    fn what_is_done_is_not_done_again_and_what_was_cut_off_is() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = matrix(SMALL).unwrap().jobs(&here()).unwrap();
        let whole = RunReport::new(report::Origin::Bench, jobs[0].options.settings()).to_json();
        std::fs::write(report_file(folder.path(), &jobs[0]), &whole).unwrap();
        std::fs::write(report_file(folder.path(), &jobs[1]), &whole[..whole.len() / 2]).unwrap();
        std::fs::write(skipped_file(folder.path(), &jobs[2]), "no such QEMU").unwrap();
        let (rest, done) = left(jobs.clone(), folder.path(), 7);
        assert_eq!((rest.len(), done), (10, 2));
        assert!(rest.iter().any(|it| it.name == jobs[1].name));
        let names = |jobs: &[Job]| jobs.iter().map(|it| it.name.clone()).collect::<Vec<_>>();
        let (again, _) = left(jobs.clone(), folder.path(), 7);
        assert_eq!(names(&rest), names(&again), "the same seed gives the same order");
        assert_ne!(names(&rest), names(&left(jobs, folder.path(), 8).0));
    }

    #[test]
    fn a_folder_with_runs_of_another_matrix_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let one = matrix(SMALL).unwrap();
        let seed = take_up(&one, folder.path()).unwrap();
        assert_eq!(take_up(&one, folder.path()).unwrap(), seed);
        let other = Matrix { repetitions: 9, ..one };
        assert!(matches!(take_up(&other, folder.path()), Err(BatchError::OtherMatrix(_))));
    }

    #[test]
    fn a_matrix_that_makes_no_sense_is_told_why() {
        let why = |change: &str| {
            let text = format!("{SMALL}\n{change}");
            match matrix(&text) {
                Ok(matrix) => matrix.jobs(&here()).unwrap_err().to_string(),
                Err(error) => vmferry_api::in_one_line(&error),
            }
        };
        assert!(why("mode = \"lazy\"").contains("none of idle, write"));
        assert!(why("transport = [\"pigeon\"]").contains("pigeon"));
        assert!(why("rate-of-fire = 5").contains("rate-of-fire"));
        let none = SMALL.replace("[\"qemu\", \"external\"]", "[]");
        assert!(matrix(&none).unwrap().jobs(&here()).unwrap_err().to_string().contains("no runs"));
        let unknown = SMALL.replace("post-copy-1-iters", "post-copy-1-iter");
        assert!(matrix(&unknown).unwrap().jobs(&here()).unwrap_err().to_string().contains("did you mean"));
    }
}
