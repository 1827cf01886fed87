//! What agents say to each other, beside what the local API says too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;
use vmferry_api::trial::Trial;
use vmferry_api::{Security, VmSpec};
use vmferry_link::{CipherSpeed, SessionId, SessionKey};
use vmferry_qemu::Inventory;

use crate::engine::{NewSession, Protection, Setup};
use crate::host::{Content, Plug};
use crate::journal::Written;

/// Use a join token: said to the agent that made it.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct Join {
    /// The token's secret.
    pub secret: String,
    /// What the host that joins calls itself.
    pub name: String,
    /// Where its agent listens.
    pub port: Option<u16>,
}

/// A VM that a source would like to hand over.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Offer {
    /// The migration.
    pub id: Uuid,
    /// The source, as it calls itself.
    pub from: String,
    /// The VM.
    pub spec: VmSpec,
    /// Guest RAM, in bytes.
    pub ram_bytes: u64,
    /// The exact machine type.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The guest runs; otherwise it stays paused.
    pub running: bool,
    /// The features of the guest's processor, by QEMU's names, as far as they are known.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// The writable disks, as absolute paths. Beside each, the source has put a marker named after the migration.
    #[schema(value_type = Vec<String>)]
    pub disks: Vec<PathBuf>,
    /// What is known of those of them that can move with the guest, where they are not shared.
    #[serde(default)]
    pub images: Vec<OwnImage>,
    /// Those that do; as [`CheckReply::own_disks`] had it.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub own_disks: Vec<PathBuf>,
    /// They come over a link with this session.
    #[serde(default)]
    pub disks_session: Option<NewSession>,
    /// What the guest only reads, as absolute paths. There may be a marker beside it.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub read_only: Vec<PathBuf>,
    /// What is in some of those.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub contents: BTreeMap<PathBuf, Content>,
    /// The source's networks that it is on.
    #[serde(default)]
    pub networks: Vec<Plug>,
    /// It does not run, and is to be started there some day: it may do so with another accelerator.
    #[serde(default)]
    pub stopped: bool,
    /// The user vouches for what cannot be proven.
    pub disks_are_shared: bool,
    /// What QEMU must be set to; not known yet when this is only a question.
    pub setup: Setup,
    /// How what QEMU sends is protected; not known yet when this is only a question. When the agents move the RAM
    /// themselves, `plain` means their link too, and anything else that it is encrypted.
    pub protection: Protection,
    /// The agents move the RAM themselves, over a link with this session.
    #[serde(default)]
    pub external: Option<NewSession>,
}

impl Offer {
    /// What is known of this disk.
    pub fn image(&self, disk: &Path) -> Option<&OwnImage> {
        self.images.iter().find(|image| image.path == disk)
    }
}

/// A disk of the guest's own, which the destination is to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OwnImage {
    /// Where it is to be; absolute.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Such as `raw`.
    pub format: String,
    /// In bytes, as the guest sees it.
    pub size: u64,
    /// How much of it is allocated, in bytes.
    pub allocated: u64,
    /// Its user has named this place: what is behind it there may be another's, and a block device there is overwritten.
    #[serde(default)]
    pub placed: bool,
    /// Of a block device, what tells it from every other on whichever host, where something does.
    #[serde(default)]
    pub device_id: Option<String>,
    /// The file behind it, as it is named in it, and that one's format.
    #[serde(default)]
    pub backing: Option<(String, String)>,
    /// Whose file it is: the user and the group, by number.
    #[serde(default)]
    pub owner: Option<(u32, u32)>,
    /// Who may read and write it; nothing else of its mode counts.
    #[serde(default)]
    pub mode: Option<u32>,
}

/// This host could take the VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckReply {
    /// What this host calls itself.
    pub host: String,
    /// Its QEMU's version.
    pub qemu_version: String,
    /// The migration capabilities its QEMU has.
    pub capabilities: BTreeSet<String>,
    /// How guests from the source are to be protected on their way.
    pub security: Security,
    /// Its QEMU can encrypt what it receives.
    pub tls: bool,
    /// The ciphers that this host allows, and how fast they are here.
    #[schema(value_type = Vec<Object>)]
    pub ciphers: Vec<CipherSpeed>,
    /// Why its agent cannot move RAM itself; none when it can.
    #[serde(default)]
    pub external_obstacle: Option<String>,
    /// Those of what the guest only reads of which it is to be said what is in them: they may be other files here.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub unproven: Vec<PathBuf>,
    /// Those of the writable disks that are not here: they would have to be made here, and move with the guest.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub own_disks: Vec<PathBuf>,
    /// Those of them that are block devices here.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub devices: Vec<PathBuf>,
}

/// A QEMU waits.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Prepared {
    /// At which port of this host; none when its connections are relayed. A source takes no more from a destination
    /// than this: QEMU runs what some addresses name.
    pub port: Option<u16>,
    /// What it was set to: less than was asked for when this host does not permit post-copy.
    pub setup: Setup,
    /// Why the guest cannot run here before all of its RAM is here, where the agents move that; none when it can.
    #[serde(default)]
    pub post_copy_obstacle: Option<String>,
    /// What the user should know, one plain sentence each.
    pub notes: Vec<String>,
    /// What the machine that waits is made of; none when its QEMU does not tell, or of an agent that does not ask it.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub inventory: Option<Inventory>,
}

/// Where an incoming migration stands, for the source that asks. This is what decides who owns the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InWord {
    /// QEMU waits or receives; the source owns the guest.
    Prepared,
    /// This host owns the guest.
    Committed,
    /// This host never will, or does not any more: whatever it had is gone.
    Abandoned,
}

/// How a guest is taken over.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct Commit {
    /// It is to run; otherwise it stays paused.
    pub run: bool,
    /// The source's QEMU would not let it run any more, as far as is known there: only this host can have it.
    #[serde(default)]
    pub let_go: bool,
}

/// A guest that its source's user has kept.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Fence {
    /// What the VM is called.
    pub vm: String,
}

/// How a migration away from a host stands, for its destination that asks.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct OutgoingState {
    /// In the journal's word; none when it is not known there.
    pub step: Option<String>,
}

fn tried() -> bool {
    true
}

/// How an incoming migration stands.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct IncomingState {
    /// Who owns the guest.
    pub step: InWord,
    /// It owns the guest, and it may have run there: it is not given back any more. What does not say so does not know
    /// of giving back.
    #[serde(default = "tried")]
    pub tried: bool,
    /// It owns the guest, and has it as it is to be: running, or paused because it was.
    pub runs: bool,
    /// The QEMU that it was to run in, or ran in, is gone.
    #[serde(default)]
    pub ended: bool,
    /// Why, when it was abandoned.
    pub detail: Option<String>,
    /// Post-copy waits for a new connection.
    pub listens: bool,
    /// At this port; none when its connections are relayed.
    pub port: Option<u16>,
    /// For a link with this session.
    #[serde(default)]
    pub session: Option<NewSession>,
    /// Post-copy was to be recovered, but all memory is here.
    pub complete: bool,
    /// So much has arrived of its disks and is kept for another try, in bytes.
    #[serde(default)]
    pub kept: u64,
}

/// Has the destination let go of a guest.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema, IntoParams)]
pub struct Abandon {
    /// Its user does not want it moved any more: nothing is kept for another try.
    #[serde(default)]
    pub drop_disks: bool,
}

/// Asks an agent to take a trial.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialOffer {
    /// What will be tried.
    pub trial: Trial,
    /// The session of its streams.
    #[schema(value_type = String)]
    pub session: SessionId,
    /// Its key.
    #[schema(value_type = String)]
    pub key: SessionKey,
}

/// It waits for the streams.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrialAccepted {
    /// The ciphers that this host allows, and how fast they are here.
    #[schema(value_type = Vec<Object>)]
    pub ciphers: Vec<CipherSpeed>,
}

/// An image that a host would like to copy to another.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CopyOffer {
    /// The copy.
    pub id: Uuid,
    /// Those of the same host that are under way, whose ends here must not be taken for what a dead one has left.
    pub under_way: Vec<Uuid>,
    /// Where it is to be; absolute.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Its size, in bytes.
    pub size: u64,
    /// Something may be there, and is replaced.
    pub update: bool,
    /// The source's configuration has nothing against its being sent unencrypted.
    pub plain: bool,
    /// It comes over a link with this session.
    pub session: NewSession,
}

/// It waits for the streams.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CopyAccepted {
    /// They are not encrypted.
    pub plain: bool,
    /// Other images here may have parts of this one.
    pub known: bool,
    /// The ciphers that this host allows, and how fast they are here.
    #[schema(value_type = Vec<Object>)]
    pub ciphers: Vec<CipherSpeed>,
}

/// A VM that does not run, which a host would like to give away.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MoveOffer {
    /// The VM, and what it needs; its `own_disks` are those that are copied.
    pub vm: Offer,
    /// It is started when its host is.
    pub autostart: bool,
    /// What is copied, as it was last written: of each of `own_disks`, in their order.
    pub written: Vec<Written>,
}

/// What a host has of a VM that comes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MoveReply {
    /// What this host calls itself.
    pub host: String,
    /// Those of what the guest only reads of which it is to be said what is in them: they may be other files here.
    #[schema(value_type = Vec<String>)]
    pub unproven: Vec<PathBuf>,
    /// Those of the writable disks that are not here: they would have to be copied.
    #[schema(value_type = Vec<String>)]
    pub own_disks: Vec<PathBuf>,
    /// What is there of each of those, once the move has begun.
    pub there: Vec<DiskThere>,
}

/// What is there of a disk that is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskThere {
    /// Nothing that has its name.
    Nothing,
    /// An older copy.
    Older,
    /// All of it.
    Whole,
}

/// Whose a VM is that was given away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Taken {
    /// It is the host's that answers. Otherwise it never will be by this move.
    pub taken: bool,
    /// Why it is not.
    pub why: Option<String>,
}

/// Whether a host has a file.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct BootFile {
    /// It does.
    pub is_there: bool,
}
