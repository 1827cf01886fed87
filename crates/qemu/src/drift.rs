//! Drift: how a machine was changed since its start, and the words of a command line that make it as it is now.
//!
//! Devices, processors and memory that were plugged in get words of their own, with the places and properties that they
//! have; those that were taken out lose theirs, and who stays is told its place, since QEMU gives places in the order of
//! the words. Disks follow their active layers. What cannot be told from outside (a key, a descriptor) is named, and stays
//! where it is. Whether the words make the same machine is for a comparison to tell ([`Inventory::differences`]).

mod disks;
mod parts;
mod plugged;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::command_line::{CommandLine, CommandOption, Properties};
use crate::host::SetByMachine;
use crate::inventory::Inventory;
use crate::io_limits::IoLimits;
use crate::qmp::commands::Drive;
use crate::qmp::{Qmp, QmpError};
use parts::{Device, Given, Parts, given_to_device, given_to_object, known_ids, place_of};

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drift {
    /// The command line of the machine as it is, as far as words can tell.
    pub argv: Vec<String>,
    /// What the host lets the guest do with its disks, which its QEMU is told when it has started.
    #[serde(default)]
    pub io_limits: Option<BTreeMap<String, IoLimits>>,
    /// What was changed and is in these, one sentence each; empty when nothing was.
    pub carried: Vec<String>,
    /// What of that QEMU does not tell, so that it becomes what it is by default, one sentence each.
    #[serde(default)]
    pub untold: Vec<String>,
    /// What is not in them, and why, one sentence each.
    pub obstacles: Vec<String>,
}

impl Drift {
    /// Something was changed, whether words can tell it or not.
    pub fn is_any(&self) -> bool {
        !(self.carried.is_empty() && self.obstacles.is_empty())
    }

    /// All that was changed, one sentence each.
    pub fn sentences(&self) -> impl Iterator<Item = &str> {
        self.carried.iter().chain(&self.untold).chain(&self.obstacles).map(String::as_str)
    }

    /// The same for its user, with what becomes of each.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        let carried = self.carried.iter().map(|change| format!("Changed since its start, and goes along: {change}."));
        let obstacles = self.obstacles.iter().map(|change| format!("Keeps it on this host: {change}."));
        let untold = self.untold.iter().map(|what| format!("Not known: {what}."));
        carried.chain(obstacles).chain(untold)
    }

    /// Compares a machine with the words that it was started with, and with what it was made of then, where that is known.
    /// What its machine type sets need not be said.
    pub async fn of(
        qmp: &Qmp,
        command: &CommandLine,
        first: Option<&Inventory>,
        now: &Inventory,
        set_by_machine: Option<&SetByMachine>,
    ) -> Result<Self, QmpError> {
        let parts = Parts::ask(qmp).await?;
        let added: Vec<&Device> = added(command, first, &parts).collect();
        let mut given = BTreeMap::new();
        for device in &added {
            // Those are told by commands of their own.
            if parts.cpu(device).is_none() && parts.memory(device).is_none() {
                let told = given_to_device(qmp, device, &parts, set_by_machine).await?;
                given.insert(device.path.clone(), told);
            }
        }
        let mut objects = BTreeMap::new();
        if !added.is_empty() {
            let ours: BTreeSet<String> = ids(command, "object").collect();
            for id in parts.objects.keys().filter(|id| !ours.contains(*id)) {
                objects.insert(id.clone(), given_to_object(qmp, id).await?);
            }
        }
        let mut words = Words::new(command, first, now, &parts, &objects);
        let stay = words.unplug();
        for (option, device) in stay {
            let places = place_of(qmp, device, &parts).await?;
            words.pin(option, device, &places);
        }
        words.follow_disks(&added);
        for device in by_bus(added, &given) {
            words.plug(device, given.get(&device.path));
        }
        words.keep_networks();
        words.keep_defaults();
        words.drop_what_is_gone();
        words.follow_limits();
        Ok(words.finish())
    }
}

/// The ids that options of this name have.
fn ids(command: &CommandLine, option: &str) -> impl Iterator<Item = String> {
    command.all(option).filter_map(|option| option.properties().get_some("id").map(str::to_owned))
}

/// The devices that no words ask for.
fn added<'a>(command: &CommandLine, first: Option<&Inventory>, parts: &'a Parts) -> impl Iterator<Item = &'a Device> {
    let named: BTreeSet<String> = ids(command, "device").collect();
    let at_first: Option<BTreeSet<String>> = first.map(|it| it.peripherals().keys().cloned().collect());
    parts.devices.iter().filter(move |device| match (&device.id, &at_first) {
        (Some(id), _) => !named.contains(id),
        (None, Some(at_first)) => !at_first.contains(&device.path),
        (None, None) => false,
    })
}

/// Each device after the one whose bus it is on: QEMU does not tell in which order they came.
fn by_bus<'a>(mut devices: Vec<&'a Device>, given: &BTreeMap<String, Given>) -> Vec<&'a Device> {
    devices.sort_by_key(|it| &it.path);
    let mut sorted: Vec<&Device> = Vec::new();
    while !devices.is_empty() {
        let waits = |device: &&Device| {
            let bus = given.get(&device.path).and_then(Given::bus).unwrap_or_default();
            devices
                .iter()
                .filter_map(|it| it.id.as_deref())
                .any(|id| bus.strip_prefix(id).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
        };
        // Names may deceive, and then QEMU says so.
        let next = devices.iter().position(|it| !waits(it)).unwrap_or(0);
        sorted.push(devices.remove(next));
    }
    sorted
}

/// A command line that is being changed.
struct Words<'a> {
    command: &'a CommandLine,
    first: Option<&'a Inventory>,
    now: &'a Inventory,
    parts: &'a Parts,
    /// The properties of the objects that no words ask for.
    objects: &'a BTreeMap<String, Given>,
    /// The options as they were given, and as they are to be; none for one that goes.
    options: Vec<(CommandOption, Option<CommandOption>)>,
    more: Vec<CommandOption>,
    carried: Vec<String>,
    untold: Vec<String>,
    obstacles: Vec<String>,
}

impl<'a> Words<'a> {
    fn new(
        command: &'a CommandLine,
        first: Option<&'a Inventory>,
        now: &'a Inventory,
        parts: &'a Parts,
        objects: &'a BTreeMap<String, Given>,
    ) -> Self {
        let options = command.options().iter().map(|it| (it.clone(), Some(it.clone()))).collect();
        let (more, carried, untold, obstacles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { command, first, now, parts, objects, options, more, carried, untold, obstacles }
    }

    fn finish(mut self) -> Drift {
        let json = self.all_in_one_form();
        let options = self.options.into_iter().filter_map(|(_, now)| now).chain(json).chain(self.more);
        let words = options.flat_map(|option| option.words);
        let argv = std::iter::once(self.command.binary().to_owned()).chain(words).collect();
        let io_limits = Some(self.now.io_limits().clone());
        Drift { argv, io_limits, carried: self.carried, untold: self.untold, obstacles: self.obstacles }
    }

    /// QEMU makes devices that are said in JSON after all that are said otherwise: where some are ours, which are said
    /// otherwise, the user's are, too, and come between those and ours.
    fn all_in_one_form(&mut self) -> Vec<CommandOption> {
        let is_device = |option: &CommandOption| option.name == "device";
        let ours = self.options.iter().any(|(then, now)| now.as_ref().is_some_and(|now| is_device(now) && now != then));
        let mut plain = Vec::new();
        if !(ours || self.more.iter().any(is_device)) {
            return plain;
        }
        for (_, now) in &mut self.options {
            let Some(option) = now.take_if(|it| is_device(it) && it.value().starts_with('{')) else {
                continue;
            };
            let words = option.properties();
            if let Some((key, _)) = words.iter().find(|(key, _)| key.contains(".0")) {
                self.obstacles.push(format!("{key} of a device cannot be said beside what was changed"));
            }
            plain.push(CommandOption::new("device", &words.to_string()));
        }
        plain
    }

    fn add(&mut self, name: &str, value: &Properties) {
        self.more.push(CommandOption::new(name, &value.to_string()));
    }

    /// The option of this name that has this id, as it is to be.
    fn find(&self, name: &str, key: &str, id: &str) -> Option<usize> {
        self.options
            .iter()
            .position(|(_, now)| now.as_ref().is_some_and(|it| it.name == name && it.properties().get(key) == Some(id)))
    }

    /// It is among the words.
    fn has(&self, name: &str, key: &str, id: &str) -> bool {
        let is_it = |option: &CommandOption| option.name == name && option.properties().get(key) == Some(id);
        self.find(name, key, id).is_some() || self.more.iter().any(is_it)
    }

    /// Removes the words of devices that are gone. The answer is who stays, if somebody goes.
    fn unplug(&mut self) -> Vec<(usize, &'a Device)> {
        let parts = self.parts;
        let by_id = |id: &str| parts.devices.iter().find(|it| it.id.as_deref() == Some(id));
        let (mut gone, mut stay) = (Vec::new(), Vec::new());
        for (n, (option, _)) in self.options.iter().enumerate().filter(|(_, (option, _))| option.name == "device") {
            let properties = option.properties();
            let Some(id) = properties.get_some("id") else { continue };
            match by_id(id) {
                Some(device) => stay.push((n, device)),
                // It is hidden from the guest until that can do without it.
                None if properties.get("failover_pair_id").is_some() => {}
                None => gone.push((n, format!("{} {id}", properties.get("driver").unwrap_or("a device")))),
            }
        }
        if let Some(first) = self.first {
            let nameless = nameless(self.command);
            let at_first: Vec<(&String, &String)> =
                first.peripherals().iter().filter(|(path, _)| number_of(path).is_some()).collect();
            let is_there = |path: &str| parts.devices.iter().find(|it| it.path == path);
            let in_order = in_order(at_first);
            let are_told =
                in_order.len() == nameless.len() && in_order.iter().zip(&nameless).all(|(it, word)| is(it.1, &word.1));
            for (at, (path, driver)) in in_order.into_iter().enumerate() {
                match (is_there(path), are_told.then(|| nameless[at].0)) {
                    (Some(device), Some(option)) => stay.push((option, device)),
                    (Some(_), None) => {}
                    (None, Some(option)) => gone.push((option, driver.clone())),
                    (None, None) => self
                        .obstacles
                        .push(format!("a {driver} that has no id was taken out: which words it had cannot be told")),
                }
            }
        }
        // Those that came by words of their own have gone with those.
        let cpus = gone.iter().filter(|(_, what)| what.contains("-cpu")).count();
        for cpu in self.first.map(|first| first.cpus_without(self.now)).unwrap_or_default().into_iter().skip(cpus) {
            self.obstacles.push(format!("the processor {cpu} was taken out, with which it was started"));
        }
        for (option, what) in &gone {
            self.options[*option].1 = None;
            self.carried.push(format!("{what} was taken out"));
        }
        if gone.is_empty() { Vec::new() } else { stay }
    }

    /// Says which limits of disks are others than at first.
    fn follow_limits(&mut self) {
        let Some(first) = self.first else { return };
        let (before, now) = (first.io_limits(), self.now.io_limits());
        let names: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
        for name in names.into_iter().filter(|name| before.get(*name) != now.get(*name)) {
            let what = now.get(name).map_or_else(|| "not limited any more".into(), IoLimits::to_string);
            self.carried.push(format!("{name} is {what}"));
        }
    }

    /// Has a device be where it is.
    fn pin(&mut self, option: usize, device: &Device, places: &[(String, String)]) {
        let Some(words) = self.options[option].1.clone() else { return };
        if words.name != "device" {
            return self.pin_drive(option, &words, device, places);
        }
        let mut properties = words.properties();
        for (key, value) in places {
            if properties.get(key).is_none() {
                properties.push(key, value);
            }
        }
        self.options[option].1 = Some(CommandOption::new("device", &properties.to_string()));
    }

    /// A network that QEMU makes up by itself has a state that moves along, whether a card is on it or not.
    fn keep_networks(&mut self) {
        let parts = self.parts;
        let made_up = parts.networks.iter().filter(|(id, it)| it.kind == "user" && !id.starts_with('#'));
        for (id, _) in made_up {
            if let Err(why) = self.network(id) {
                self.obstacles.push(format!("the network {id} was added, and {why}"));
            }
        }
    }

    /// Has QEMU give what it gives to a machine for which nothing of the kind is asked: words of ours ask for it.
    fn keep_defaults(&mut self) {
        let has = |name: &str| self.options.iter().any(|(option, _)| option.name == name);
        if has("nodefaults") {
            return;
        }
        let mut more = Vec::new();
        if self.more.iter().any(|it| it.name == "netdev") && !["netdev", "net", "nic"].iter().any(|it| has(it)) {
            more.extend(["nic", "user"].map(|kind| CommandOption::new("net", kind)));
        }
        let holds_media = |it: &CommandOption| {
            it.name == "device"
                && matches!(it.properties().get("driver"), Some("ide-cd" | "ide-hd" | "scsi-cd" | "scsi-hd"))
        };
        if self.more.iter().any(holds_media) {
            let drives = self.parts.drives.iter().filter(|it| it.device.contains("-cd"));
            let unasked = drives.filter(|it| self.option_of(it).is_none() && !self.has("drive", "id", &it.device));
            let words = unasked.filter_map(|it| disks::by_name(&it.device));
            more.extend(words.map(|words| CommandOption::new("drive", &words.to_string())));
        }
        self.more.extend(more);
    }

    /// A drive whose words ask for a device, too, gets one with words of its own.
    fn pin_drive(&mut self, option: usize, words: &CommandOption, device: &Device, places: &[(String, String)]) {
        let is_its = |it: &&Drive| it.qdev.as_deref().is_some_and(|qdev| disks::is_within(qdev, &device.path));
        let Some(drive) = self.parts.drives.iter().find(is_its).filter(|it| !it.device.is_empty()) else { return };
        let mut properties = words.properties();
        properties.put_first("if", "none");
        properties.put_first("id", &drive.device);
        self.options[option].1 = Some(CommandOption::new("drive", &properties.to_string()));
        let mut own = Properties::default();
        own.push("driver", &device.driver);
        own.push("drive", &drive.device);
        for (key, value) in places {
            own.push(key, value);
        }
        self.add("device", &own);
    }

    /// Removes the words of back ends that are gone, as those are that only a device which was taken out has used.
    fn drop_what_is_gone(&mut self) {
        let known = known_ids(self.parts);
        loop {
            let used: BTreeSet<String> = self.values_of_all().collect();
            let is_gone = |option: &CommandOption| {
                let key = match option.name.as_str() {
                    "netdev" | "chardev" | "object" | "drive" => "id",
                    "blockdev" => "node-name",
                    _ => return false,
                };
                let properties = option.properties();
                properties.get_some(key).is_some_and(|id| !known.contains(id) && !used.contains(id))
            };
            let Some(gone) = self.options.iter().position(|(_, now)| now.as_ref().is_some_and(is_gone)) else { return };
            self.options[gone].1 = None;
        }
    }

    /// What options say, but for what they call themselves: whatever they refer to is among it.
    fn values_of_all(&self) -> impl Iterator<Item = String> {
        let all = self.options.iter().filter_map(|(_, now)| now.as_ref()).chain(&self.more);
        all.flat_map(|option| {
            let properties = option.properties();
            let others = properties.iter().filter(|(key, _)| !matches!(*key, "id" | "node-name"));
            others.map(|(_, value)| value.trim_start_matches("chardev:").to_owned()).collect::<Vec<_>>()
        })
    }
}

/// The words of devices that have no id, in the order in which QEMU makes those: options of which it keeps the words as
/// they are, then those in JSON, then what drives ask for. Each with its driver.
fn nameless(command: &CommandLine) -> Vec<(usize, String)> {
    let options: Vec<(usize, &CommandOption)> = command.options().iter().enumerate().collect();
    let devices = options.iter().filter(|(_, it)| it.name == "device" && it.properties().get_some("id").is_none());
    let of = |(n, it): &(usize, &CommandOption)| (*n, it.properties().get("driver").unwrap_or_default().to_owned());
    let (json, plain): (Vec<_>, Vec<_>) = devices.partition(|(_, it)| it.value().starts_with('{'));
    let drives = options.iter().filter(|(_, it)| it.name == "drive" && it.properties().get("if") == Some("virtio"));
    let plain = plain.into_iter().map(of);
    plain.chain(drives.map(|(n, _)| (*n, "virtio-blk-pci".to_owned()))).chain(json.into_iter().map(of)).collect()
}

/// QEMU knows some devices by shorter words.
fn is(driver: &str, word: &str) -> bool {
    driver == word || driver.strip_suffix("-pci") == Some(word)
}

/// Of `/machine/peripheral-anon/device[3]`.
fn number_of(path: &str) -> Option<u32> {
    path.strip_prefix("/machine/peripheral-anon/device[")?.strip_suffix(']')?.parse().ok()
}

fn in_order<'a>(mut devices: Vec<(&'a String, &'a String)>) -> Vec<(&'a String, &'a String)> {
    devices.sort_by_key(|(path, _)| number_of(path));
    devices
}

#[cfg(test)]
mod tests;
