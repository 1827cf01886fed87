//! Which disks a QEMU has open.

use serde::Deserialize;

use super::commands;

commands! {
    /// The guest's disks, as devices.
    QueryBlock {} = "query-block" -> Vec<BlockDevice>;
    /// Every node of the block layer.
    QueryNamedBlockNodes {
        /// Leave out what lies beneath each node, which is long.
        #[serde(skip_serializing_if = "Option::is_none")]
        flat: Option<bool>,
    } = "query-named-block-nodes" -> Vec<BlockNode>;
}

/// One disk of the guest.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockDevice {
    /// The id of its `-drive`, or empty.
    pub device: String,
    /// Where its device is among QEMU's objects.
    pub qdev: Option<String>,
    /// It is a drive whose medium can be taken out.
    pub removable: bool,
    /// The medium; none when the drive is empty.
    pub inserted: Option<BlockNode>,
}

/// One node of the block layer: a file, or a format over one.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNode {
    /// Its name.
    pub node_name: Option<String>,
    /// The file name, or a `json:` description of what is open.
    pub file: String,
    /// Cannot be written.
    pub ro: bool,
    /// The driver, such as `qcow2` or `file`.
    pub drv: String,
    /// The file of the image that it lies over.
    #[serde(rename = "backing_file")]
    pub backing_file: Option<String>,
}
