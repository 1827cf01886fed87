//! What a running machine is made of, as its QEMU tells: all that a migration depends on and that is not moved by it. Two
//! of them can be compared ([`Inventory::differences`]), whatever made them differ: something that was plugged in or out
//! since the start, another version of QEMU, another processor, another firmware file.
//!
//! The devices, with the buses that they are on and their properties, are told to humans only (`info qtree`), and so are
//! the sizes of RAM blocks (`info ramblock`); see QEMU's hmp-commands-info.hx.

mod compare;
mod cpuid;
mod qtree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::io_limits::IoLimits;
use crate::qmp::commands::{
    BlockImage, Drive, QomGet, QueryBlock, QueryCpusFast, QueryHotpluggableCpus, QueryMemoryDevices,
};
use crate::qmp::{Command, Qmp, QmpError};
use crate::ram::{ask_if_known, children, net_clients, ram_blocks};

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// The devices, each named by its way from the root: what it is, its id and its place on its bus.
    devices: BTreeMap<String, Properties>,
    /// QEMU's RAM blocks: the guest's RAM, video memory, firmware and ROMs.
    ram: BTreeMap<String, RamSize>,
    /// What the guest's processors have, as CPUID tells it: leaf, subleaf and register, and the bits.
    cpu_features: BTreeMap<String, u64>,
    /// The places for processors that have one.
    cpus: BTreeMap<String, String>,
    /// DIMMs and what else is memory that was plugged in, by id.
    memory_devices: BTreeMap<String, String>,
    /// The files that each disk and drive consists of, the one that the guest writes first; none in an empty drive.
    disks: BTreeMap<String, Vec<Layer>>,
    /// What the host lets the guest do with those of them that it limits.
    #[serde(default)]
    io_limits: BTreeMap<String, IoLimits>,
    /// The devices that words ask for, or the monitor: where QEMU has each, and what it is.
    #[serde(default)]
    peripherals: BTreeMap<String, String>,
    /// How many networks QEMU makes up by itself (`user`).
    #[serde(default)]
    user_networks: usize,
}

/// Of a device, by name.
type Properties = BTreeMap<String, String>;

/// Of a RAM block, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RamSize {
    /// What is used of it.
    used: u64,
    /// What it can grow to.
    most: u64,
}

/// One file of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// In QEMU's words: a path, a URL, or a description in JSON.
    pub file: String,
    /// Such as `qcow2`.
    pub format: String,
}

/// The part of a machine that its users change while it runs, which is asked in no time: to see whether anything was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glimpse {
    disks: Disks,
    peripherals: BTreeMap<String, String>,
}

impl Glimpse {
    /// Asks a QEMU.
    pub async fn of(qmp: &Qmp) -> Result<Self, QmpError> {
        Ok(Self { disks: Disks::of(qmp).await?, peripherals: peripherals(qmp).await? })
    }

    /// The same, where these disks are limited so.
    #[must_use]
    pub fn with_io_limits(mut self, limits: &BTreeMap<String, IoLimits>) -> Self {
        self.disks.io_limits.extend(limits.clone());
        self
    }
}

impl Inventory {
    /// Asks a QEMU, which runs its guest on meanwhile.
    pub async fn of(qmp: &Qmp) -> Result<Self, QmpError> {
        let ram = ram_blocks(&ask_if_known(qmp, "info ramblock").await?);
        let ram = ram.into_iter().filter_map(|it| Some((it.name, RamSize { used: it.used?, most: it.total? })));
        // None of a machine whose processors are as many as it began with.
        let plugged = or_none(qmp, QueryHotpluggableCpus {}).await?;
        let networks = net_clients(&ask_if_known(qmp, "info network").await?);
        let cpus = plugged.into_iter().filter(|it| it.qom_path.is_some()).map(|it| (it.props.to_string(), it.kind));
        let Disks { layers, io_limits } = Disks::of(qmp).await?;
        Ok(Self {
            devices: qtree::devices(&ask_if_known(qmp, "info qtree").await?),
            ram: ram.collect(),
            cpu_features: cpu_features(qmp).await?,
            cpus: cpus.collect(),
            memory_devices: memory_devices(qmp).await?,
            disks: layers,
            io_limits,
            peripherals: peripherals(qmp).await?,
            user_networks: networks.iter().filter(|it| it.kind == "user").count(),
        })
    }

    /// What of it a QEMU of this version cannot load from one of that version, though it has all of it: QEMU 7.2 takes
    /// the states of all `user` networks for that of one, as it wrote them; 10.0 tells them apart.
    pub fn unloadable(&self, by: &str, from: &str) -> Option<String> {
        let major = |version: &str| version.split('.').next()?.parse::<u32>().ok();
        let is_old = major(by)? < 9 && major(from)? >= 9;
        (is_old && self.user_networks > 1).then(|| {
            format!("QEMU {by} cannot load the state of {} user networks from QEMU {from}", self.user_networks)
        })
    }

    /// The devices that words ask for, or the monitor: where QEMU has each, and what it is.
    pub(crate) fn peripherals(&self) -> &BTreeMap<String, String> {
        &self.peripherals
    }

    /// The places for processors that have one here and none in another.
    pub(crate) fn cpus_without(&self, other: &Self) -> Vec<&str> {
        self.cpus.keys().filter(|it| !other.cpus.contains_key(*it)).map(String::as_str).collect()
    }

    /// The files that this disk or drive consists of; none when there is no such.
    pub(crate) fn disk(&self, name: &str) -> Option<&[Layer]> {
        self.disks.get(name).map(Vec::as_slice)
    }

    /// Says that the disk whose own file is this one has it at another place.
    pub fn disk_is_at(&mut self, file: &str, place: &str) {
        for own in self.disks.values_mut().filter_map(|layers| layers.first_mut()).filter(|own| own.file == file) {
            own.file = place.into();
        }
    }

    /// What the host lets the guest do with those of its disks that it limits, by disk.
    pub fn io_limits(&self) -> &BTreeMap<String, IoLimits> {
        &self.io_limits
    }

    /// The features of the guest's processor, by QEMU's names.
    pub fn cpu_features(&self) -> BTreeSet<String> {
        self.cpu_features.iter().flat_map(|(word, bits)| cpuid::names(word, *bits)).collect()
    }

    /// Whether a processor that is told to have these features, by QEMU's names, lacks this one for sure.
    pub fn lacks_for_sure(features: &BTreeSet<String>, feature: &str) -> bool {
        !features.is_empty() && cpuid::tells(feature) && !features.contains(feature)
    }

    /// The local files that have what the guest reads of its disks and has not written: what is behind those that it
    /// writes. As they were given; relative to the folder that QEMU was started in.
    pub fn backing_files(&self) -> Vec<PathBuf> {
        let behind = self.disks.values().flat_map(|layers| layers.iter().skip(1));
        let mut files: Vec<PathBuf> = behind.flat_map(|layer| local_files(&layer.file)).collect();
        files.sort();
        files.dedup();
        files
    }
}

/// Of a path, a URL, or a description in JSON.
fn local_files(file: &str) -> Vec<PathBuf> {
    if let Some(json) = file.strip_prefix("json:") {
        let mut files = Vec::new();
        file_names(&serde_json::from_str(json).unwrap_or_default(), &mut files);
        return files;
    }
    let before_slash = file.split('/').next().unwrap_or_default();
    match before_slash.contains(':') {
        true => Vec::new(),
        false => vec![file.into()],
    }
}

fn file_names(description: &serde_json::Value, found: &mut Vec<PathBuf>) {
    let Some(node) = description.as_object() else { return };
    if let Some(name) = node.get("filename").and_then(|name| name.as_str()) {
        found.push(name.into());
    }
    node.values().for_each(|below| file_names(below, found));
}

/// Of the first processor: all are alike.
async fn cpu_features(qmp: &Qmp) -> Result<BTreeMap<String, u64>, QmpError> {
    let cpus = qmp.execute(QueryCpusFast {}).await?;
    let Some(path) = cpus.into_iter().next().map(|cpu| cpu.qom_path) else { return Ok(BTreeMap::new()) };
    let words = match qmp.execute(QomGet { path, property: "feature-words".into() }).await {
        Ok(words) => words,
        // Not a PC.
        Err(QmpError::Command { .. }) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let word = |it: &serde_json::Value| {
        let leaf = it["cpuid-input-eax"].as_u64()?;
        let subleaf = it["cpuid-input-ecx"].as_u64().unwrap_or(0);
        let register = it["cpuid-register"].as_str()?;
        Some((format!("{leaf:#x}.{subleaf} {register}"), it["features"].as_u64()?))
    };
    Ok(words.as_array().into_iter().flatten().filter_map(word).collect())
}

async fn memory_devices(qmp: &Qmp) -> Result<BTreeMap<String, String>, QmpError> {
    let devices = qmp.execute(QueryMemoryDevices {}).await?;
    let one = |(n, it): (usize, crate::qmp::commands::MemoryDevice)| {
        let of = |key: &str| it.data[key].clone();
        let id = of("id").as_str().map_or_else(|| format!("{} {n}", it.kind), str::to_owned);
        (id, format!("{} of {} bytes at {}", it.kind, of("size"), of("addr")))
    };
    Ok(devices.into_iter().enumerate().map(one).collect())
}

/// Disks and drives, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Disks {
    layers: BTreeMap<String, Vec<Layer>>,
    io_limits: BTreeMap<String, IoLimits>,
}

impl Disks {
    async fn of(qmp: &Qmp) -> Result<Self, QmpError> {
        let (mut layers, mut io_limits) = (BTreeMap::new(), BTreeMap::new());
        for (n, it) in qmp.execute(QueryBlock {}).await?.into_iter().enumerate() {
            let name = name_of(&it).unwrap_or_else(|| format!("drive {n}"));
            if let Some(limits) = IoLimits::of(&it) {
                io_limits.insert(name.clone(), limits);
            }
            layers.insert(name, layers_of(it));
        }
        Ok(Self { layers, io_limits })
    }
}

fn layers_of(drive: Drive) -> Vec<Layer> {
    let mut layers = Vec::new();
    let mut image: Option<Box<BlockImage>> = drive.inserted.map(|inserted| Box::new(inserted.image));
    while let Some(layer) = image {
        layers.push(Layer { file: layer.filename, format: layer.format });
        image = layer.backing_image;
    }
    layers
}

/// What a disk or drive is called. A device that has no id is told apart by its number, which says nothing elsewhere; its
/// node is called the same.
pub(crate) fn name_of(drive: &Drive) -> Option<String> {
    let node = drive.inserted.as_ref().map(|it| it.node_name.as_str()).filter(|node| !node.starts_with('#'));
    let device = drive.qdev.as_deref();
    let device = match device.is_some_and(|it| it.starts_with("/machine/") && !it.starts_with("/machine/peripheral/")) {
        true => node.or(device),
        false => device,
    };
    // Of a virtio disk, the part that is no PCI device is told.
    let device = device.map(|it| match it.strip_suffix("/virtio-backend") {
        Some(of) => of.strip_prefix("/machine/peripheral/").unwrap_or(it),
        None => it,
    });
    [Some(drive.device.as_str()), device].into_iter().flatten().find(|name| !name.is_empty()).map(str::to_owned)
}

/// See [`Inventory::peripherals`].
pub(crate) async fn peripherals(qmp: &Qmp) -> Result<BTreeMap<String, String>, QmpError> {
    let mut devices = BTreeMap::new();
    for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let below = children(qmp, folder).await?.into_iter();
        devices.extend(below.map(|(name, driver)| (format!("{folder}/{name}"), driver)));
    }
    Ok(devices)
}

/// What a machine that lacks the command has none of.
pub(crate) async fn or_none<C: Command<Reply = Vec<T>>, T>(qmp: &Qmp, command: C) -> Result<Vec<T>, QmpError> {
    match qmp.execute(command).await {
        Err(QmpError::Command { .. }) => Ok(Vec::new()),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_a_disk_is_found_however_it_is_described() {
        let layer = |file: &str| Layer { file: file.into(), format: "qcow2".into() };
        let nested = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/srv/c.qcow2"}}"#;
        let disks = [
            ("a".to_owned(), vec![layer("/srv/top.qcow2"), layer("../base.qcow2"), layer(nested)]),
            ("b".to_owned(), vec![layer("/srv/alone.raw")]),
            ("c".to_owned(), vec![layer("/srv/top.qcow2"), layer("nbd://storage/base"), layer("../base.qcow2")]),
            ("empty".to_owned(), vec![]),
        ];
        let inventory = Inventory { disks: disks.into(), ..Inventory::default() };
        assert_eq!(inventory.backing_files(), [PathBuf::from("/srv/c.qcow2"), "../base.qcow2".into()]);
    }
}
