//! Which files a command line names: the destination must have them.
//!
//! Files that QEMU looks up in its own data directory (`-bios bios.bin`, a card's `romfile=`) come with QEMU and are not
//! named here; nor are devices and what QEMU writes for people to read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CommandLine, CommandOption, Properties};

/// One file that a command line names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileUse {
    /// As it was given; relative to the folder that QEMU is started in.
    pub path: PathBuf,
    /// The option that names it, such as `-kernel`.
    pub option: String,
    /// What QEMU does with it.
    pub kind: FileKind,
}

/// What QEMU does with a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    /// Reads it, and the guest gets to see what is in it: firmware, kernels, CDs, disks that are read-only.
    ReadOnly,
    /// Reads it, and it may be another on every host: secrets, certificates, folders that are passed through.
    Private,
    /// A disk that the guest writes. Whether it is a file or a block device is for the caller to see.
    Disk {
        /// The image format, when the command line tells.
        format: Option<String>,
    },
    /// The guest's RAM; QEMU makes it when it is absent.
    Ram,
    /// A socket where somebody listens for QEMU: a TPM, a vhost-user back end.
    Socket,
}

/// Block drivers that reach another host, or another process.
const REMOTE_DRIVERS: &[&str] =
    &["curl", "ftp", "ftps", "gluster", "http", "https", "iscsi", "nbd", "nfs", "rbd", "ssh"];

/// Where a disk is.
enum Place {
    Local(String),
    Remote(String),
    /// Nothing that has a place, such as `null-co`, or something that only QEMU can tell.
    Nowhere,
}

/// How another block node or a device uses a node.
#[derive(Clone, Default)]
struct UsedBy {
    format: Option<String>,
    read_only: bool,
}

struct Disk {
    place: Place,
    option: String,
    kind: FileKind,
}

impl CommandLine {
    /// Every local file that must be there before QEMU starts.
    pub fn files(&self) -> Vec<FileUse> {
        let mut found = Vec::new();
        let used = self.nodes_in_use();
        for option in &self.options {
            let flag = format!("-{}", option.name);
            let disks = disks_of(option, &used).into_iter().filter_map(|disk| match disk.place {
                Place::Local(path) => Some(FileUse { path: path.into(), option: disk.option, kind: disk.kind }),
                Place::Remote(_) | Place::Nowhere => None,
            });
            found.extend(disks);
            if let Some((path, kind)) = plain_file(option) {
                found.push(FileUse { path: path.into(), option: flag, kind });
            }
        }
        found
    }

    /// The disks that are reached over a protocol, as the command line puts it.
    pub fn remote_disks(&self) -> Vec<String> {
        let used = self.nodes_in_use();
        let disks = self.options.iter().flat_map(|option| disks_of(option, &used));
        disks
            .filter_map(|disk| match disk.place {
                Place::Remote(url) => Some(url),
                Place::Local(_) | Place::Nowhere => None,
            })
            .collect()
    }

    /// What the guest writes to some disk is thrown away with this QEMU.
    pub fn snapshot(&self) -> bool {
        self.has("snapshot") || self.all("drive").any(|option| option.properties().is_on("snapshot"))
    }

    /// Nodes and drives that something refers to, by their name.
    fn nodes_in_use(&self) -> BTreeMap<String, UsedBy> {
        let mut used: BTreeMap<String, UsedBy> = BTreeMap::new();
        for option in self.all("device") {
            let device = option.properties();
            if let Some(drive) = device.get("drive") {
                let is_cd = device.get("driver").is_some_and(|driver| driver.ends_with("-cd"));
                used.entry(drive.into()).or_default().read_only |= is_cd;
            }
        }
        // From the guest downwards, that is against the order in which nodes must be declared.
        for node in self.all("blockdev").map(CommandOption::properties).collect::<Vec<_>>().iter().rev() {
            let above = node.get("node-name").and_then(|name| used.get(name)).cloned().unwrap_or_default();
            for (key, value) in node.iter() {
                let child = key.rsplit('.').next().unwrap_or(key);
                if !matches!(child, "file" | "backing" | "data-file") {
                    continue;
                }
                let parent = key.strip_suffix(child).unwrap_or_default();
                let below = used.entry(value.into()).or_default();
                below.read_only |= above.read_only || is_read_only(node, parent) || child == "backing";
                below.format = node.get(&format!("{parent}driver")).map(str::to_owned);
            }
        }
        used
    }
}

/// Options that name one file and are no disks.
fn plain_file(option: &CommandOption) -> Option<(String, FileKind)> {
    let properties = option.properties();
    let read_only = |key: &str| Some((properties.get_some(key)?.to_owned(), FileKind::ReadOnly));
    let private = |key: &str| Some((properties.get_some(key)?.to_owned(), FileKind::Private));
    match option.name.as_str() {
        "kernel" | "initrd" | "dtb" | "shim" => Some((option.value().to_owned(), FileKind::ReadOnly)),
        "bios" | "option-rom" => in_a_folder(option.value()),
        "machine" => ["kernel", "initrd", "dtb"]
            .iter()
            .find_map(|key| read_only(key))
            .or_else(|| in_a_folder(properties.get("firmware")?)),
        "mem-path" => Some((option.value().to_owned(), FileKind::Ram)),
        "smbios" => read_only("file").or_else(|| read_only("path")),
        "acpitable" => read_only("file").or_else(|| read_only("data")),
        "fw_cfg" => read_only("file"),
        "chardev" if properties.get("backend") == Some("socket") => {
            let waits_for_nobody =
                ["server", "reconnect", "reconnect-ms"].iter().any(|key| properties.get(key).is_some());
            let path = properties.get_some("path").filter(|_| !waits_for_nobody && !properties.is_on("abstract"))?;
            Some((path.to_owned(), FileKind::Socket))
        }
        "fsdev" | "virtfs" => private("path"),
        "device" => match properties.get("driver") {
            Some("loader" | "guest-loader") => read_only("file"),
            _ => in_a_folder(properties.get_some("romfile")?),
        },
        "object" => match properties.get("qom-type")? {
            "memory-backend-file" => Some((properties.get_some("mem-path")?.to_owned(), FileKind::Ram)),
            "secret" => private("file"),
            kind if kind.starts_with("tls-creds") => private("dir"),
            "authz-list-file" => private("filename"),
            _ => None,
        },
        _ => None,
    }
}

/// A firmware file, unless QEMU may find it in its data directory.
fn in_a_folder(path: &str) -> Option<(String, FileKind)> {
    path.contains('/').then(|| (path.to_owned(), FileKind::ReadOnly))
}

fn disks_of(option: &CommandOption, used: &BTreeMap<String, UsedBy>) -> Vec<Disk> {
    let flag = match option.words.len() {
        1 => "disk image".to_owned(),
        _ => format!("-{}", option.name),
    };
    let writable = FileKind::Disk { format: None };
    match option.name.as_str() {
        "hda" | "hdb" | "hdc" | "hdd" | "fda" | "fdb" | "mtdblock" | "sd" | "pflash" => {
            vec![Disk { place: place_of(option.value()), option: flag, kind: writable }]
        }
        "cdrom" => vec![Disk { place: place_of(option.value()), option: flag, kind: FileKind::ReadOnly }],
        "drive" => {
            let drive = option.properties();
            let by_device = drive.get("id").and_then(|id| used.get(id)).is_some_and(|by| by.read_only);
            let read_only = by_device || drive.is_on("readonly") || drive.get("media") == Some("cdrom");
            let format = drive.get("format").map(str::to_owned);
            let mut disks = nodes(&drive, &UsedBy { format: format.clone(), read_only }, &flag);
            if let Some(path) = drive.get_some("file") {
                let by = UsedBy { format: format.or(drive.get("driver").map(str::to_owned)), read_only };
                disks.extend(drive_file(path, &by, is_read_only(&drive, ""), &flag));
            }
            disks
        }
        "blockdev" => {
            let node = option.properties();
            let by = node.get("node-name").and_then(|name| used.get(name)).cloned().unwrap_or_default();
            nodes(&node, &by, &flag)
        }
        _ => Vec::new(),
    }
}

/// The file of a `-drive`, which may be a path, a URL or a description in JSON.
fn drive_file(path: &str, by: &UsedBy, read_only: bool, flag: &str) -> Vec<Disk> {
    let by = UsedBy { read_only: by.read_only || read_only, ..by.clone() };
    match path.strip_prefix("json:").map(serde_json::from_str::<Value>) {
        Some(Ok(json)) => nodes(&Properties::from_json(&json), &by, flag),
        _ => vec![Disk { place: place_of(path), option: flag.into(), kind: kind_of(&by) }],
    }
}

fn kind_of(by: &UsedBy) -> FileKind {
    if by.read_only { FileKind::ReadOnly } else { FileKind::Disk { format: by.format.clone() } }
}

/// The nodes of a description that reach outside of QEMU. A nested node's keys begin with where it hangs: `file.`.
fn nodes(all: &Properties, by: &UsedBy, flag: &str) -> Vec<Disk> {
    let mut disks = Vec::new();
    for (key, value) in all.iter() {
        if let Some(prefix) = key.strip_suffix("filename").filter(|prefix| is_prefix(prefix)) {
            let driver = all.get(&format!("{prefix}driver"));
            if driver.is_some_and(|driver| REMOTE_DRIVERS.contains(&driver)) {
                continue;
            }
            let place = match driver {
                Some(_) => Place::Local(value.into()),
                None => place_of(value),
            };
            let around = parent_of(prefix);
            let format = around.and_then(|around| all.get(&format!("{around}driver")).map(str::to_owned));
            let here = UsedBy {
                format: format.or_else(|| by.format.clone()),
                read_only: by.read_only || is_read_only(all, prefix),
            };
            disks.push(Disk { place, option: flag.into(), kind: kind_of(&here) });
        } else if let Some(prefix) = key.strip_suffix("driver").filter(|prefix| is_prefix(prefix))
            && REMOTE_DRIVERS.contains(&value)
        {
            let inside = all.iter().filter_map(|(key, value)| Some(format!("{}={value}", key.strip_prefix(prefix)?)));
            disks.push(Disk {
                place: Place::Remote(inside.collect::<Vec<_>>().join(",")),
                option: flag.into(),
                kind: kind_of(by),
            });
        }
    }
    disks
}

fn is_prefix(prefix: &str) -> bool {
    prefix.is_empty() || prefix.ends_with('.')
}

/// `a.file.` hangs in `a.`; the outermost node in none.
fn parent_of(prefix: &str) -> Option<&str> {
    let path = prefix.strip_suffix('.')?;
    Some(path.rfind('.').map_or("", |dot| &path[..=dot]))
}

/// This node or one that it hangs in is read-only; a backing file always is.
fn is_read_only(all: &Properties, prefix: &str) -> bool {
    let mut at = Some(prefix);
    while let Some(prefix) = at {
        if all.is_on(&format!("{prefix}read-only")) || prefix.ends_with("backing.") {
            return true;
        }
        at = parent_of(prefix);
    }
    false
}

/// As QEMU does: what has a colon before any slash begins with a protocol.
fn place_of(path: &str) -> Place {
    let path = path.strip_prefix("file:").unwrap_or(path);
    let protocol = match path.find([':', '/']) {
        Some(at) if path[at..].starts_with(':') => &path[..at],
        _ if path.is_empty() => return Place::Nowhere,
        _ => return Place::Local(path.into()),
    };
    match protocol {
        "fat" | "null-co" | "null-aio" | "blkdebug" | "blkverify" | "json" | "nvme" => Place::Nowhere,
        _ => Place::Remote(path.into()),
    }
}
