//! The job that has QEMU mirror a disk to its new place, and the nodes that are made for it.

use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;
use vmferry_qemu::qmp::commands::{
    BlockJobCancel, BlockJobChange, BlockdevAdd, BlockdevCreate, BlockdevDel, BlockdevMirror, JobComplete, JobDismiss,
    JobInfo, MirrorSync, OnError, QueryJobs, QueryNamedBlockNodes,
};
use vmferry_qemu::{Qmp, QmpError};

const JOB: &str = "vmferry-move-";
const NODE: &str = "vmferry-disk-";
/// How much a mirror has under way: what a pause of the guest has to wait for.
const BUFFER: u64 = 4 << 20;
/// How often QEMU is asked how far its job is.
const LOOK: Duration = Duration::from_millis(100);
/// How long a job may take to end that was told to.
const END: Duration = Duration::from_secs(20);

pub(super) fn job_of(number: u64) -> String {
    format!("{JOB}{number}")
}

pub(super) fn node_of(number: u64) -> String {
    format!("{NODE}{number}")
}

/// One that no job and no node has, nor had one that is still there: a node of ours stays as long as its disk does.
pub(super) async fn free_number(qmp: &Qmp) -> Result<u64, QmpError> {
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
    let jobs = qmp.execute(QueryJobs {}).await?;
    let number = |name: &str, begin: &str| name.strip_prefix(begin)?.parse::<u64>().ok();
    let of_nodes = nodes.iter().filter_map(|it| number(&it.node_name, NODE));
    Ok(of_nodes.chain(jobs.iter().filter_map(|it| number(&it.id, JOB))).max().unwrap_or(0) + 1)
}

pub(super) async fn add(qmp: &Qmp, options: &Value) -> Result<(), QmpError> {
    let options: Map<String, Value> = options.as_object().cloned().unwrap_or_default();
    qmp.execute(BlockdevAdd { options }).await.map(drop)
}

/// Removes a node that nothing uses; the answer is whether it is gone.
pub(super) async fn remove(qmp: &Qmp, node: &str) -> Result<bool, QmpError> {
    match qmp.execute(BlockdevDel { node_name: node.into() }).await {
        Ok(_) => Ok(true),
        Err(QmpError::Command { desc, .. }) => Ok(desc.contains("find")),
        Err(error) => Err(error),
    }
}

/// How large the guest would see what is in a node, in bytes.
pub(super) async fn size_of(qmp: &Qmp, node: &str) -> Result<Option<u64>, QmpError> {
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
    Ok(nodes.into_iter().find(|it| it.node_name == node).and_then(|it| Some(it.image?.virtual_size)))
}

/// Makes an empty qcow2 image of this size in what these options open.
pub(super) async fn make_qcow2(qmp: &Qmp, number: u64, file: &Value, size: u64) -> Result<(), QmpError> {
    let (job, node) = (job_of(number), format!("{}-new", node_of(number)));
    let mut options = file.clone();
    options["node-name"] = json!(node);
    add(qmp, &options).await?;
    let options = json!({ "driver": "qcow2", "file": node, "size": size });
    let made = async {
        qmp.execute(BlockdevCreate { job_id: job.clone(), options }).await?;
        end_of(qmp, &job, "blockdev-create").await
    };
    let made = made.await;
    // The first error is the one to tell.
    let removed = remove(qmp, &node).await;
    made.and(removed.map(drop))
}

/// Begins to mirror.
pub(super) async fn begin(qmp: &Qmp, number: u64, disk: &str, rate: Option<u64>) -> Result<(), QmpError> {
    let mirror = BlockdevMirror {
        job_id: job_of(number),
        device: disk.into(),
        target: node_of(number),
        sync: MirrorSync::Full,
        buf_size: Some(BUFFER),
        speed: rate,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        auto_dismiss: false,
    };
    qmp.execute(mirror).await.map(drop)
}

async fn look(qmp: &Qmp, job: &str) -> Result<Option<JobInfo>, QmpError> {
    Ok(qmp.execute(QueryJobs {}).await?.into_iter().find(|it| it.id == job))
}

/// Waits until all is there and what the guest writes goes along; tells how far it is meanwhile. An error is the job's.
pub(super) async fn ready(
    qmp: &Qmp,
    number: u64,
    cancelled: &CancellationToken,
    mut tell: impl FnMut(&JobInfo),
) -> Result<(), QmpError> {
    let job = job_of(number);
    while !cancelled.is_cancelled() {
        match look(qmp, &job).await? {
            Some(it) if it.status == "ready" => {
                tell(&it);
                return Ok(());
            }
            Some(it) if it.status == "concluded" => return end_of(qmp, &job, "blockdev-mirror").await,
            Some(it) => tell(&it),
            None => return Ok(()),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = cancelled.cancelled() => {}
        }
    }
    Ok(())
}

/// Has the disk run from its copy from now on.
pub(super) async fn complete(qmp: &Qmp, number: u64, cancelled: &CancellationToken) -> Result<(), QmpError> {
    let job = job_of(number);
    let write_blocking = BlockJobChange { id: job.clone(), kind: "mirror", copy_mode: "write-blocking" };
    // Without it a guest that writes without a break keeps the job from its end; before 8.2 there is no such order.
    if let Err(error) = qmp.execute(write_blocking).await {
        tracing::debug!(job, %error, "its guest's writes do not wait for the copy");
    }
    qmp.execute(JobComplete { id: job.clone() }).await?;
    while look(qmp, &job).await?.is_some_and(|it| it.status != "concluded") && !cancelled.is_cancelled() {
        tokio::select! {
            () = tokio::time::sleep(LOOK / 10) => {}
            () = cancelled.cancelled() => {}
        }
    }
    Ok(())
}

/// Ends the job, whatever it does, and forgets it; one that is completing completes.
pub(super) async fn end(qmp: &Qmp, number: u64) -> Result<(), QmpError> {
    let job = job_of(number);
    match look(qmp, &job).await? {
        None => return Ok(()),
        Some(it) if it.status == "concluded" => {}
        Some(_) => match qmp.execute(BlockJobCancel { device: job.clone(), force: true }).await {
            // It may have ended just now, or be none that can be cancelled any more.
            Ok(_) | Err(QmpError::Command { .. }) => {}
            Err(error) => return Err(error),
        },
    }
    match end_of(qmp, &job, "blockdev-mirror").await {
        Err(QmpError::Command { .. }) | Ok(()) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Waits until a job has ended and forgets it; an error of its own is one of the command that began it.
async fn end_of(qmp: &Qmp, job: &str, command: &str) -> Result<(), QmpError> {
    let deadline = tokio::time::Instant::now() + END;
    loop {
        match look(qmp, job).await? {
            Some(it) if it.status == "concluded" => {
                qmp.execute(JobDismiss { id: it.id }).await?;
                return match it.error {
                    Some(desc) => {
                        Err(QmpError::Command { command: command.into(), class: "GenericError".into(), desc })
                    }
                    None => Ok(()),
                };
            }
            None => return Ok(()),
            Some(_) if tokio::time::Instant::now() > deadline => {
                return Err(QmpError::Timeout { command: command.into(), after: END });
            }
            Some(_) => tokio::time::sleep(LOOK / 10).await,
        }
    }
}
