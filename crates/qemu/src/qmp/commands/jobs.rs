//! Block nodes that come and go while the guest runs, and jobs that copy disks. QEMU describes them in
//! qapi/block-core.json and qapi/job.json.

use super::{Deserialize, Nothing, Serialize, Value, commands};

commands! {
    /// Makes a block node, with what is in it.
    BlockdevAdd {
        /// Its options, as in `-blockdev`.
        #[serde(flatten)]
        options: serde_json::Map<String, Value>,
    } = "blockdev-add" -> Nothing;
    /// Removes a block node that nothing uses.
    BlockdevDel {
        /// Its name.
        node_name: String,
    } = "blockdev-del" -> Nothing;
    /// Copies a disk to another node, and what the guest writes to it meanwhile.
    BlockdevMirror {
        /// What the job is called.
        job_id: String,
        /// The disk's node, or its drive.
        device: String,
        /// The node that becomes its copy.
        target: String,
        /// What is copied.
        sync: MirrorSync,
        /// The most that it reads ahead, in bytes; fixed once it runs.
        #[serde(skip_serializing_if = "Option::is_none")]
        buf_size: Option<u64>,
        /// Bytes a second; 0 is no limit.
        #[serde(skip_serializing_if = "Option::is_none")]
        speed: Option<u64>,
        /// When the disk cannot be read.
        on_source_error: OnError,
        /// When the copy cannot be written.
        on_target_error: OnError,
        /// It goes by itself when it has ended; else it stays to be asked.
        auto_dismiss: bool,
    } = "blockdev-mirror" -> Nothing;
    /// Ends a job. A mirror that is ready leaves a copy as the disk is now; the disk stays what it was.
    BlockJobCancel {
        /// What the job is called.
        device: String,
        /// At once, whatever the copy is like then.
        force: bool,
    } = "block-job-cancel" -> Nothing;
    /// Changes how fast a job copies.
    BlockJobSetSpeed {
        /// What the job is called.
        device: String,
        /// Bytes a second; 0 is no limit.
        speed: u64,
    } = "block-job-set-speed" -> Nothing;
    /// Makes an image of a format in a node that is there.
    BlockdevCreate {
        /// What the job is called.
        job_id: String,
        /// See QEMU's `BlockdevCreateOptions`.
        options: Value,
    } = "blockdev-create" -> Nothing;
    /// Opens nodes again with other options; all that are not given are as they are by default.
    BlockdevReopen {
        /// Of each node all of them, as in `-blockdev`.
        options: Vec<Value>,
    } = "blockdev-reopen" -> Nothing;
    /// Changes a job that runs; not known before 8.2.
    BlockJobChange {
        /// What it is called.
        id: String,
        /// Such as `mirror`.
        #[serde(rename = "type")]
        kind: &'static str,
        /// `write-blocking` has the guest's writes wait for the copy; nothing else can be told to a mirror.
        copy_mode: &'static str,
    } = "block-job-change" -> Nothing;
    /// Has a mirror that is ready take the place of its disk.
    JobComplete {
        /// What the job is called.
        id: String,
    } = "job-complete" -> Nothing;
    /// Forgets a job that has ended.
    JobDismiss {
        /// What it was called.
        id: String,
    } = "job-dismiss" -> Nothing;
    /// All jobs, also those that have ended and were not dismissed.
    QueryJobs {} = "query-jobs" -> Vec<JobInfo>;
}

/// What a mirror copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorSync {
    /// Everything that the guest reads.
    Full,
    /// What is in the topmost image only.
    Top,
}

/// What a job does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// It ends with it.
    Report,
}

/// Answer to [`QueryJobs`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// What it is called.
    pub id: String,
    /// Such as `mirror`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Such as `running`, `ready`, `concluded`.
    pub status: String,
    /// How much of it is done, in its own measure (bytes, for a mirror).
    pub current_progress: u64,
    /// How much there is to do, as far as is known; it grows when the guest writes.
    pub total_progress: u64,
    /// Why it has failed.
    pub error: Option<String>,
}
