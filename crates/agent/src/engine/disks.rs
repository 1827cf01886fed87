//! A guest's own disks on their way to another host, at the source.
//!
//! QEMU mirrors each to a server of ours on a Unix socket, which only it may connect to, and which passes it on over a link (`vmferry_nbd::carry`). The guest
//! goes on with its disks, and what it writes goes along. When it stands, the mirrors end, the destination has everything
//! on its disks and lets go of them; only then does QEMU give away the state of the devices.
//!
//! What answers QEMU is always on this host: were it another one that falls silent, QEMU could not even pause its guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_nbd::backend::Backend;
use vmferry_nbd::carry::{Carried, Carrier};
use vmferry_nbd::server::{Listening, Served, Server, Where};
use vmferry_qemu::qmp::commands::{
    BlockJobCancel, BlockdevAdd, BlockdevDel, BlockdevMirror, JobDismiss, JobInfo, MirrorSync, OnError, QueryJobs,
    QueryNamedBlockNodes,
};
use vmferry_qemu::{IoLimits, Qmp, QmpError};

use super::disk_pacing::{DiskPacing, Seen};
use super::external::WayThere;
use super::movable::Slowed;
use super::{EngineError, NewSession};

/// What our jobs and nodes in QEMU are called begins with this.
const OURS: &str = "vmferry-copy-";
const LIMITS: &str = "disks-limits.json";
/// How much a mirror has under way: enough for a link whose queue holds its data for 100 ms at 1 Gbit/s.
const BUFFER: u64 = 16 << 20;
/// How often QEMU is asked how far its jobs are.
const LOOK: Duration = Duration::from_millis(100);
/// What is left to be copied when the guest may be paused, in bytes.
const LITTLE: u64 = 1 << 20;
/// How long it may take until it is so little.
const SETTLE: Duration = Duration::from_secs(120);
/// How long jobs may take to end that nothing keeps from it.
const END: Duration = Duration::from_secs(5);
/// How long the mirrors may take for their end while the guest stands.
const CUT_OVER: Duration = Duration::from_secs(10);

/// Whose disks they are.
#[derive(Clone, Copy)]
pub(crate) struct Guest<'a> {
    pub(crate) qmp: &'a Qmp,
    /// Of its QEMU.
    pub(crate) pid: u32,
    /// For what is to be known of it to the next agent, too.
    pub(crate) dir: &'a Path,
}

/// One disk that is to move.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// What its user calls it.
    pub(crate) name: String,
    /// Its topmost node.
    pub(crate) node: String,
    /// In bytes, as the guest sees it.
    pub(crate) size: u64,
    /// What is behind it is at the destination, too.
    pub(crate) sync: MirrorSync,
    /// There it is all zero in the beginning.
    pub(crate) is_new: bool,
}

/// How far they are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    /// What is to be read, in bytes; grows while the guest writes.
    pub(crate) total: u64,
    /// What is left of it.
    pub(crate) remaining: u64,
    /// All that there was is there, and what is written goes along.
    pub(crate) ready: bool,
    /// Over the link, in bytes.
    pub(crate) sent: u64,
    /// From now on the guest may write no more than this, in bytes a second.
    pub(crate) slowed: Option<u64>,
}

/// See the module's text.
pub(crate) struct Mirrors {
    qmp: Qmp,
    disks: Vec<(Disk, Arc<Carried>)>,
    carrier: Arc<Carrier>,
    /// Where it is noted how its disks were limited by their user.
    notes: PathBuf,
    own_limits: BTreeMap<String, IoLimits>,
    slowed: Slowed,
    pacing: Mutex<(DiskPacing, Instant)>,
    listening: Mutex<Option<Listening>>,
}

impl Mirrors {
    /// Begins to copy these disks, over a link that the destination expects.
    pub(crate) async fn begin(
        guest: Guest<'_>,
        disks: Vec<Disk>,
        way: WayThere,
        session: NewSession,
        rate: Option<u64>,
        slowed: Slowed,
    ) -> Result<Self, EngineError> {
        let Guest { qmp, pid, dir } = guest;
        let own_limits = IoLimits::of_all(qmp).await?;
        let notes = dir.join(LIMITS);
        let socket = format!("vmferry-disks-{}", Uuid::new_v4());
        let at = Where::Abstract { name: socket.clone(), pid };
        let begin = move || {
            let carrier = Carrier::begin(way.connect(session, rate)?).map_err(|error| failed("a thread", &error))?;
            let at_the_other_end = disks.into_iter().zip(0..).map(|(disk, number)| {
                let far = Arc::new(carrier.disk(number, disk.size, disk.is_new));
                (disk, far)
            });
            let disks: Vec<(Disk, Arc<Carried>)> = at_the_other_end.collect();
            let exports = disks.iter().zip(0..).map(|((_, far), number)| Served {
                name: node_of(number),
                description: String::new(),
                backend: Arc::clone(far) as Arc<dyn Backend>,
            });
            let server = Server::new(exports.collect(), None);
            let listening = Listening::begin(server, &at).map_err(|error| failed("a socket for QEMU", &error))?;
            Ok::<_, EngineError>((carrier, disks, listening))
        };
        let (carrier, disks, listening) =
            tokio::task::spawn_blocking(begin).await.expect("making a link does not panic")?;
        let mirrors = Self {
            qmp: qmp.clone(),
            disks,
            carrier,
            notes,
            own_limits,
            slowed,
            pacing: Mutex::new((DiskPacing::default(), Instant::now())),
            listening: Mutex::new(Some(listening)),
        };
        if let Err(error) = mirrors.start(&socket).await {
            mirrors.end().await;
            return Err(error.into());
        }
        Ok(mirrors)
    }

    async fn start(&self, socket: &str) -> Result<(), QmpError> {
        for ((disk, _), number) in self.disks.iter().zip(0..) {
            let target = node_of(number);
            let options = json!({
                "driver": "nbd",
                "node-name": target,
                "server": {"type": "unix", "path": socket, "abstract": true},
                "export": target,
                "discard": "unmap",
                "detect-zeroes": "unmap",
            });
            let Value::Object(options) = options else { unreachable!("it is an object") };
            self.qmp.execute(BlockdevAdd { options }).await?;
            let mirror = BlockdevMirror {
                job_id: target.clone(),
                device: disk.node.clone(),
                target,
                sync: disk.sync,
                buf_size: Some(BUFFER),
                speed: None,
                on_source_error: OnError::Report,
                on_target_error: OnError::Report,
                auto_dismiss: false,
            };
            self.qmp.execute(mirror).await?;
        }
        Ok(())
    }

    /// Waits a moment, and tells how far they are; fails when one of them has. A guest that writes faster than is copied is
    /// slowed.
    pub(crate) async fn wait(&self) -> Result<Progress, EngineError> {
        tokio::time::sleep(LOOK).await;
        let mut seen = self.look().await?;
        let carried = self.disks.iter().map(|(_, carried)| carried.sent()).sum();
        let limit = {
            let (pacing, begun) = &mut *self.pacing.lock().expect("no holder of this lock panics");
            pacing.see(begun.elapsed(), Seen { remaining: seen.remaining, carried, on_wire: seen.sent })
        };
        if let Some(limit) = limit {
            self.slow_down(limit).await?;
            seen.slowed = Some(limit);
        }
        Ok(seen)
    }

    /// Has the guest write no more than this to these disks together, in bytes a second.
    async fn slow_down(&self, limit: u64) -> Result<(), EngineError> {
        let noted = serde_json::to_vec(&self.own_limits).expect("they are plain data");
        std::fs::write(&self.notes, noted).map_err(|error| failed("its disks' own limits", &error))?;
        let each = limit / self.disks.len().max(1) as u64;
        let mut limits = self.own_limits.clone();
        for (disk, _) in &self.disks {
            let own = limits.remove(&disk.name).unwrap_or_default();
            limits.insert(disk.name.clone(), own.with_writes_at_most(each));
        }
        IoLimits::set(&self.qmp, &limits).await?;
        // In QEMU's words.
        *self.slowed.lock().expect("no holder of this lock panics") = IoLimits::of_all(&self.qmp).await?;
        Ok(())
    }

    /// How far they are.
    async fn look(&self) -> Result<Progress, EngineError> {
        let jobs = self.qmp.execute(QueryJobs {}).await?;
        let mut all = Progress { ready: true, sent: self.sent(), ..Progress::default() };
        for ((disk, _), number) in self.disks.iter().zip(0..) {
            let job = jobs.iter().find(|job| job.id == node_of(number));
            let Some(job) = job.filter(|job| !has_ended(job)) else {
                return Err(ended(disk, job));
            };
            all.total += job.total_progress;
            all.remaining += job.total_progress.saturating_sub(job.current_progress);
            all.ready &= job.status == "ready";
        }
        Ok(all)
    }

    /// Ends what is left of it, whatever it is: nothing of ours stays in QEMU, and the disks are the guest's as before.
    pub(crate) async fn end(&self) {
        // Whoever waits for the other host is told that it does not answer.
        self.carrier.give_up();
        forget(&self.qmp, self.notes.parent().unwrap_or(&self.notes)).await;
        let listening = self.lock().take();
        tokio::task::spawn_blocking(move || drop(listening));
    }

    /// Each disk with its size and what was sent of it, in bytes.
    pub(crate) fn sent_of_each(&self) -> Vec<(String, u64, u64)> {
        self.disks.iter().map(|(disk, carried)| (disk.name.clone(), disk.size, carried.sent())).collect()
    }

    /// So much was sent of them, in bytes on the wire.
    pub(crate) fn sent(&self) -> u64 {
        self.carrier.stats().wire_sent
    }

    /// From now on they are sent at this rate at most, in bytes a second.
    pub(crate) fn set_rate(&self, rate: Option<u64>) {
        self.carrier.set_rate(rate);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Listening>> {
        self.listening.lock().expect("no holder of this lock panics")
    }

    async fn each(&self, ask: impl Fn(&Carried) -> std::io::Result<()> + Send + 'static) -> Result<(), EngineError> {
        let disks: Vec<_> = self.disks.iter().map(|(_, carried)| Arc::clone(carried)).collect();
        blocking(move || disks.iter().try_for_each(|carried| ask(carried))).await
    }
}

impl Mirrors {
    /// Waits until little is left to be done when the guest stands, and what was copied is on the disks there.
    pub(crate) async fn settle(&self) -> Result<(), EngineError> {
        let begun = Instant::now();
        while self.look().await?.remaining > LITTLE {
            self.wait().await?;
            if begun.elapsed() > SETTLE {
                let reason = format!("they were not in step within {} s: its guest writes too fast", SETTLE.as_secs());
                return Err(EngineError::Disks { reason });
            }
        }
        self.each(Backend::flush).await
    }

    /// The guest stands: has the destination have all of its disks, and let go of them.
    pub(crate) async fn cut_over(&self) -> Result<(), EngineError> {
        if !self.look().await?.ready {
            return Err(EngineError::Disks { reason: "they are not in step any more".into() });
        }
        for number in 0..self.disks.len() {
            self.qmp.execute(BlockJobCancel { device: node_of(number), force: false }).await?;
        }
        let deadline = Instant::now() + CUT_OVER;
        loop {
            let jobs = self.qmp.execute(QueryJobs {}).await?;
            let mut over = 0;
            for ((disk, _), number) in self.disks.iter().zip(0..) {
                match jobs.iter().find(|job| job.id == node_of(number)) {
                    Some(job) if has_ended(job) && job.error.is_none() => over += 1,
                    Some(job) if !has_ended(job) => {}
                    job => return Err(ended(disk, job)),
                }
            }
            if over == self.disks.len() {
                break;
            }
            if Instant::now() > deadline {
                let reason = format!("they were not in step within {} s of its pause", CUT_OVER.as_secs());
                return Err(EngineError::Disks { reason });
            }
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
        for number in 0..self.disks.len() {
            self.qmp.execute(JobDismiss { id: node_of(number) }).await?;
            self.qmp.execute(BlockdevDel { node_name: node_of(number) }).await?;
        }
        let (carrier, disks) = (Arc::clone(&self.carrier), self.disks.len());
        blocking(move || (0..disks).try_for_each(|disk| carrier.let_go(disk as u16))).await
    }
}

async fn blocking(work: impl FnOnce() -> std::io::Result<()> + Send + 'static) -> Result<(), EngineError> {
    let done = tokio::task::spawn_blocking(work).await.expect("asking for disks does not panic");
    done.map_err(|error| EngineError::Disks { reason: error.to_string() })
}

fn failed(what: &str, error: &std::io::Error) -> EngineError {
    EngineError::Disks { reason: format!("{what}: {error}") }
}

fn node_of(number: usize) -> String {
    format!("{OURS}{number}")
}

fn has_ended(job: &JobInfo) -> bool {
    matches!(job.status.as_str(), "aborting" | "concluded" | "null")
}

fn ended(disk: &Disk, job: Option<&JobInfo>) -> EngineError {
    let why = job.and_then(|job| job.error.clone()).unwrap_or_else(|| "somebody has ended it".into());
    EngineError::Disks { reason: format!("{}: {why}", disk.name) }
}

/// Nothing of ours is left in the QEMU of this VM, whose folder this is, and its disks have their own limits.
pub(crate) async fn forget(qmp: &Qmp, dir: &Path) {
    let notes = dir.join(LIMITS);
    let own = std::fs::read(&notes).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let done = async {
        sweep(qmp).await?;
        if let Some(own) = own {
            IoLimits::set(qmp, &own).await?;
            let _ = std::fs::remove_file(&notes);
        }
        Ok::<_, QmpError>(())
    };
    if let Err(error) = done.await
        && !qmp.is_closed()
    {
        tracing::warn!(error = in_one_line(&error), "its disks are not left as they were");
    }
}

/// Removes jobs and nodes of ours from a QEMU, whoever made them.
async fn sweep(qmp: &Qmp) -> Result<(), QmpError> {
    let deadline = Instant::now() + END;
    loop {
        let jobs = qmp.execute(QueryJobs {}).await?;
        let jobs: Vec<JobInfo> = jobs.into_iter().filter(|job| job.id.starts_with(OURS)).collect();
        if jobs.is_empty() || Instant::now() > deadline {
            break;
        }
        for job in jobs {
            // It may end meanwhile, by itself.
            let _ = match has_ended(&job) {
                true => qmp.execute(JobDismiss { id: job.id }).await,
                false => qmp.execute(BlockJobCancel { device: job.id, force: true }).await,
            };
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for node in qmp.execute(QueryNamedBlockNodes { flat: true }).await? {
        if node.node_name.starts_with(OURS) {
            qmp.execute(BlockdevDel { node_name: node.node_name }).await?;
        }
    }
    Ok(())
}
