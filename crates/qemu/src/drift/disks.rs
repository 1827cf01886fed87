//! Words for disks and drives as they are: the active layer of each with what is behind it, media that were changed or
//! ejected, disks that came later.

use serde_json::Value;

use super::Words;
use super::parts::Device;
use crate::command_line::{CommandOption, Properties};
use crate::disk_place::{DiskPlace, is_same_place, place_in_words};
use crate::inventory::name_of;
use crate::qmp::commands::{BlockNode, Drive};

/// Drivers whose nodes are all told: by their file, and by the nodes that they consist of.
const TOLD_FORMATS: [&str; 6] = ["raw", "qcow2", "qed", "vmdk", "vdi", "vhdx"];

impl Words<'_> {
    /// Has the words of disks and drives say what is in them.
    pub(super) fn follow_disks(&mut self, added: &[&Device]) {
        let parts = self.parts;
        for drive in &parts.drives {
            let device = drive.qdev.as_deref().unwrap_or_default();
            let is_of = |it: &&&Device| it.id.as_deref() == Some(device) || is_within(device, &it.path);
            let Some(name) = name_of(drive) else { continue };
            // What came with a device is said with it.
            if added.iter().any(|it| is_of(&it)) || !self.is_changed(&name, drive) {
                continue;
            }
            let done = match drive.device.is_empty() {
                true => self.follow_node(device, drive),
                false => self.follow_drive(drive),
            };
            match done {
                Ok(()) => self.carried.push(format!("{name} is {}", in_words(drive))),
                Err(why) => self.obstacles.push(format!("{name} is {}, and {why}", in_words(drive))),
            }
        }
    }

    fn is_changed(&self, name: &str, drive: &Drive) -> bool {
        let (before, now) = (self.first.and_then(|it| it.disk(name)), self.now.disk(name));
        if before.is_some_and(|before| now.is_some_and(|now| now != before)) {
            return true;
        }
        // It may have been changed before it was first seen: then its words tell, where they are plain.
        match (self.option_of(drive), &drive.inserted) {
            (Some(at), Some(inserted)) => {
                let (said, told) = (file_of(&self.options[at].0), &inserted.image.filename);
                said.starts_with('/') && told.starts_with('/') && !is_same_place(&said, told)
            }
            _ => false,
        }
    }

    /// A drive that has a name: words of its own say what is in it.
    fn follow_drive(&mut self, drive: &Drive) -> Result<(), String> {
        let at = self.option_of(drive);
        let mut words = match at {
            // As it is to be by now: where it is may have been said.
            Some(at) => as_drive(self.options[at].1.as_ref().unwrap_or(&self.options[at].0)),
            None => by_name(&drive.device).ok_or("which words it had cannot be told")?,
        };
        let old = words.clone();
        words.retain(|key| {
            let is_content = ["file", "backing", "data-file"].iter().any(|it| key.split('.').next() == Some(it));
            !is_content && !matches!(key, "format" | "driver" | "node-name" | "readonly" | "read-only")
        });
        if let Some(inserted) = &drive.inserted {
            let node = self.told(&inserted.node_name)?.clone();
            if !TOLD_FORMATS.contains(&node.drv.as_str()) && !node.is_of_this_host() {
                return Err(format!("not all of its block driver {} can be told from outside", node.drv));
            }
            words.push("file", &node.file);
            words.push("format", &node.drv);
            if !node.node_name.starts_with('#') {
                words.push("node-name", &node.node_name);
            }
            if node.ro && old.get("media") != Some("cdrom") {
                words.push("readonly", "on");
            }
            if node.cache.direct && old.get("cache").is_none() && !old.is_on("cache.direct") {
                words.push("cache.direct", "on");
            }
        }
        let option = CommandOption::new("drive", &words.to_string());
        match at {
            Some(at) => self.options[at].1 = Some(option),
            None => self.more.push(option),
        }
        Ok(())
    }

    /// A device with a node: its words name another, or none.
    fn follow_node(&mut self, device: &str, drive: &Drive) -> Result<(), String> {
        let id = device.strip_prefix("/machine/peripheral/").unwrap_or(device);
        let id = id.split('/').next().unwrap_or_default();
        let at = self.find("device", "id", id).ok_or("its device has no id, so that its words cannot be told")?;
        let mut words = self.options[at].1.as_ref().map(CommandOption::properties).unwrap_or_default();
        let old = words.get("drive").map(str::to_owned);
        words.retain(|key| key != "drive");
        if let Some(inserted) = &drive.inserted {
            let like = old.and_then(|old| self.find("blockdev", "node-name", &old));
            let like = like.map(|at| self.with_aio_of_file(at));
            words.push("drive", &self.node(&inserted.node_name, Some(id), like.as_ref())?);
        }
        self.options[at].1 = Some(CommandOption::new("device", &words.to_string()));
        Ok(())
    }

    /// What a node's words say, with how its file is read and written, which the words of another node may say.
    fn with_aio_of_file(&self, at: usize) -> Properties {
        let mut words = self.options[at].0.properties();
        let below = words.get("file").and_then(|file| self.find("blockdev", "node-name", file));
        if let Some(aio) = below.and_then(|at| Some(self.options[at].0.properties().get("aio")?.to_owned())) {
            words.push("file.aio", &aio);
        }
        words
    }

    /// Has what a device that came later has for its drive be there; the answer is what it is called.
    pub(super) fn drive(&mut self, name: &str, device: Option<&str>) -> Result<String, String> {
        let Some(drive) = self.parts.drives.iter().find(|it| it.device == name) else {
            return self.node(name, device, None);
        };
        if !self.has("drive", "id", name) {
            let mut words = Properties::default();
            words.push("if", "none");
            words.push("id", name);
            let inserted = drive.inserted.as_ref();
            if let Some(node) = inserted.map(|it| self.told(&it.node_name)).transpose()?.cloned() {
                words.push("file", &node.file);
                words.push("format", &node.drv);
                for (key, is) in [("readonly", node.ro), ("cache.direct", node.cache.direct)] {
                    if is {
                        words.push(key, "on");
                    }
                }
            }
            self.add("drive", &words);
        }
        Ok(name.into())
    }

    /// Has a node be there, with all that it consists of. One without a name gets one after its device. It is used `like`
    /// one that was there before, of which more is known than QEMU tells.
    fn node(&mut self, name: &str, device: Option<&str>, like: Option<&Properties>) -> Result<String, String> {
        let called = match name.strip_prefix('#') {
            Some(number) => format!("vmferry-{}", device.unwrap_or(number)),
            None => name.to_owned(),
        };
        if self.more.iter().any(|it| it.name == "blockdev" && it.properties().get("node-name") == Some(&called)) {
            return Ok(called);
        }
        let own = self.find("blockdev", "node-name", &called);
        if let Some(at) = own
            && self.says(at, name)
        {
            return Ok(called);
        }
        let mut words = Properties::default();
        self.describe(&mut words, "", name, like)?;
        words.push("node-name", &called);
        if let Some(at) = own {
            // What it says beside what it consists of still holds.
            let old = self.options[at].0.properties();
            let consists =
                |key: &str| matches!(key.split('.').next(), Some("file" | "backing" | "data-file" | "driver"));
            for (key, value) in old.iter().filter(|(key, _)| !consists(key)) {
                if words.get(key).is_none() {
                    words.push(key, value);
                }
            }
            self.options[at].1 = None;
        }
        self.add("blockdev", &words);
        Ok(called)
    }

    /// An option says of what a node consists, and it does, all the way down.
    fn says(&self, at: usize, name: &str) -> bool {
        let words = self.options[at].0.properties();
        let Some(node) = self.parts.nodes.get(name) else { return false };
        let is_same = |key: &str, told: &str| words.get(key).is_none_or(|said| said == told);
        let is_made_of = |role: &str| {
            let child = self.parts.child(name, role);
            match words.get(role) {
                Some(named) => {
                    let below = self.find("blockdev", "node-name", named);
                    child == Some(named) && below.is_none_or(|below| self.says(below, named))
                }
                // A node that nobody named is made from its parent's words, or from the image.
                None => child.is_none_or(|child| child.starts_with('#')),
            }
        };
        is_same("driver", &node.drv)
            && is_same("filename", &node.file)
            && is_same("file.filename", &node.file)
            && ["file", "backing", "data-file"].into_iter().all(is_made_of)
    }

    /// Writes of what a node consists, each key after this prefix.
    fn describe(
        &mut self,
        words: &mut Properties,
        prefix: &str,
        name: &str,
        like: Option<&Properties>,
    ) -> Result<(), String> {
        let node = self.told(name)?.clone();
        let mut put = |key: &str, value: &str| words.push(&format!("{prefix}{key}"), value);
        put("driver", &node.drv);
        if node.cache.direct {
            put("cache.direct", "on");
        }
        if node.cache.no_flush {
            put("cache.no-flush", "on");
        }
        if prefix.is_empty() {
            if node.ro {
                put("read-only", "on");
            }
            if !matches!(node.detect_zeroes.as_str(), "" | "off") {
                put("detect-zeroes", &node.detect_zeroes);
            }
            if let Some(discard) = like.and_then(|like| like.get("discard")) {
                put("discard", discard);
            }
        }
        if node.is_of_this_host() {
            put("filename", &node.file);
            if let Some(aio) = like.and_then(|like| like.get("file.aio")) {
                put("aio", aio);
            }
            return Ok(());
        }
        if !TOLD_FORMATS.contains(&node.drv.as_str()) {
            let told = match node.file.strip_prefix("json:").map(serde_json::from_str::<Value>) {
                Some(Ok(json)) => Some(json),
                Some(Err(_)) => None,
                None => node.file.parse::<DiskPlace>().ok().filter(DiskPlace::is_remote).map(|it| it.options()),
            };
            return match told {
                Some(json) => {
                    let all = Properties::from_json(&json);
                    all.iter().filter(|(key, _)| *key != "driver").for_each(|(key, value)| put(key, value));
                    Ok(())
                }
                None => Err(format!("not all of its block driver {} can be told from outside", node.drv)),
            };
        }
        // A part of its file, which QEMU tells only in its description of the whole.
        if node.drv == "raw"
            && let Some(Ok(json)) = node.file.strip_prefix("json:").map(serde_json::from_str::<Value>)
        {
            let all = Properties::from_json(&json);
            for key in ["size", "offset"] {
                all.get(key).into_iter().for_each(|value| put(key, value));
            }
        }
        for (role, child) in self.parts.children.get(name).cloned().unwrap_or_default() {
            match (role.as_str(), child.starts_with('#')) {
                ("file", true) => self.describe(words, &format!("{prefix}file."), &child, like)?,
                // As the image says; which that is, is compared.
                ("backing", true) => {}
                ("file" | "backing" | "data-file", false) => {
                    let called = self.node(&child, None, None)?;
                    words.push(&format!("{prefix}{role}"), &called);
                }
                _ => return Err(format!("it has a {role}, which cannot be told from outside")),
            }
        }
        Ok(())
    }

    fn told(&self, node: &str) -> Result<&BlockNode, String> {
        let told = self.parts.nodes.get(node).ok_or_else(|| format!("its block node {node} is not told"))?;
        match told.encrypted {
            true => Err("it is encrypted, with a key that cannot be told from outside".into()),
            false => Ok(told),
        }
    }

    /// The words of a drive that has a name: by that, or by what was in it at its start.
    pub(super) fn option_of(&self, drive: &Drive) -> Option<usize> {
        let drives = || self.options.iter().enumerate().filter(|(_, (it, now))| now.is_some() && is_drive(&it.name));
        let by_id = drives().find(|(_, (it, _))| it.properties().get("id") == Some(&drive.device));
        if let Some((at, _)) = by_id {
            return Some(at);
        }
        let nameless = || drives().filter(|(_, (it, _))| it.name != "drive" || it.properties().get("id").is_none());
        let only = |found: Vec<(usize, &(CommandOption, Option<CommandOption>))>| match found[..] {
            [(at, _)] => Some(at),
            _ => None,
        };
        let file =
            self.first.and_then(|it| it.disk(&drive.device)).and_then(|layers| Some(layers.first()?.file.clone()));
        match file {
            Some(file) => only(nameless().filter(|(_, (it, _))| is_same_place(&file_of(it), &file)).collect()),
            // An empty one, of which there may be one among the words.
            None => only(nameless().filter(|(_, (it, _))| file_of(it).is_empty()).collect()),
        }
    }
}

fn is_drive(option: &str) -> bool {
    matches!(option, "drive" | "cdrom" | "hda" | "hdb" | "hdc" | "hdd" | "fda" | "fdb" | "pflash" | "mtdblock" | "sd")
}

fn file_of(option: &CommandOption) -> String {
    as_drive(option).image().unwrap_or_default()
}

/// What shorter words stand for; see QEMU's `-hda` and its likes.
fn as_drive(option: &CommandOption) -> Properties {
    let of = |words: &[(&str, &str)]| {
        let mut drive = Properties::default();
        for (key, value) in words {
            drive.push(key, value);
        }
        drive.push("file", option.value());
        drive
    };
    match option.name.as_str() {
        "hda" => of(&[("index", "0"), ("media", "disk")]),
        "hdb" => of(&[("index", "1"), ("media", "disk")]),
        "hdc" => of(&[("index", "2"), ("media", "disk")]),
        "hdd" => of(&[("index", "3"), ("media", "disk")]),
        "cdrom" => of(&[("index", "2"), ("media", "cdrom")]),
        "fda" => of(&[("index", "0"), ("if", "floppy")]),
        "fdb" => of(&[("index", "1"), ("if", "floppy")]),
        kind @ ("pflash" | "sd") => of(&[("if", kind)]),
        "mtdblock" => of(&[("if", "mtd")]),
        _ => option.properties(),
    }
}

/// Of a drive that every machine gets: `ide2-cd0` is the first on the third bus, and holds CDs.
pub(super) fn by_name(name: &str) -> Option<Properties> {
    let mut words = Properties::default();
    if let Some(rest) = name.strip_prefix("ide") {
        let (bus, rest) = rest.split_once('-')?;
        let (media, unit) = rest.split_at_checked(2)?;
        words.push("if", "ide");
        words.push("bus", bus);
        words.push("unit", unit);
        words.push("media", if media == "cd" { "cdrom" } else { "disk" });
    } else {
        words.push("if", "floppy");
        words.push("index", name.strip_prefix("floppy").filter(|it| it.parse::<u8>().is_ok())?);
    }
    Some(words)
}

pub(super) fn is_within(path: &str, device: &str) -> bool {
    path.strip_prefix(device).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn in_words(drive: &Drive) -> String {
    drive.inserted.as_ref().map_or_else(|| "empty".into(), |it| format!("{} now", place_in_words(&it.image.filename)))
}
