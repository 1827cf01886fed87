//! A copy of an image that no guest runs from: what is asked for, what it tells while it goes, and what it did.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::problem::Problem;

/// Copy an image to another host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CopyRequest {
    /// Which: a file or block device of this host, as an absolute path.
    #[schema(value_type = String)]
    pub image: PathBuf,
    /// To which host: a peer's name, or its address.
    pub to: String,
    /// What it is to be there: an absolute path.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// The most that may be sent, in bytes a second.
    pub bandwidth: Option<u64>,
    /// The two hosts compare sums of what was read here and of what arrived there.
    pub verify: bool,
    /// It may be there already, and is replaced.
    pub update: bool,
}

/// A copy has begun.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct CopyBegun {
    /// Its id, under which its events are found.
    pub id: Uuid,
}

/// How far a copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CopyProgress {
    /// Since it began, in ms.
    pub elapsed_ms: u64,
    /// The image's size, in bytes.
    pub total: u64,
    /// How much of it is done, in bytes.
    pub done: u64,
    /// How much of that was sent, in bytes.
    pub sent: u64,
    /// How much of it was there already, in bytes.
    pub same: u64,
    /// Bytes on the wire for that.
    pub wire_sent: u64,
    /// What the link carries, in bytes a second.
    pub link_rate: u64,
    /// How much of the image is done in a second, in bytes, with what is zero or there already.
    pub rate: u64,
}

/// What a copy did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CopyReport {
    /// Its id.
    pub id: Uuid,
    /// What was copied.
    #[schema(value_type = String)]
    pub image: PathBuf,
    /// To which host, as that calls itself.
    pub to: String,
    /// What it is there.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// The image's size, in bytes.
    pub size: u64,
    /// What was sent of it, in bytes: what is neither zero nor was there already.
    pub sent: u64,
    /// What was there already, in bytes.
    pub same: u64,
    /// Bytes on the wire for that, before encryption.
    pub wire_sent: u64,
    /// How long it took, in ms.
    pub total_ms: u64,
    /// What protected it on its way: a cipher, `tls`, or `plain`.
    pub protection: String,
    /// Sums were compared.
    pub verified: bool,
}

/// What a copy tells while it goes; the last one is `finished` or `failed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum CopyEvent {
    /// How far it is, several times a second.
    Progress(CopyProgress),
    /// The whole of it is there, under its name and on its disk.
    Finished(Box<CopyReport>),
    /// Nothing new has its name there.
    Failed(Problem),
}

impl CopyEvent {
    /// Nothing comes after it.
    pub fn is_last(&self) -> bool {
        !matches!(self, Self::Progress(_))
    }
}
