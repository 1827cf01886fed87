//! How two machines differ, in words for their user.

use std::collections::BTreeMap;

use super::{Inventory, Layer, RamSize, cpuid};
use crate::io_limits::IoLimits;

/// Bits of CPUID that do not tell what a processor can do there. QEMU had PCOMMIT for a while, as no real processor ever
/// did, so that nothing uses it; and whether a package has several processors (HTT, CMP-LEGACY) follows from their places,
/// and is said among these bits by newer versions only.
const NOT_COMPARED: [(&str, u64); 3] = [("0x7.0 EBX", 1 << 22), ("0x1.0 EDX", 1 << 28), ("0x80000001.0 ECX", 1 << 1)];

/// Properties that no guest changes: other ones than at first are another device's under the same name.
const NEVER_THE_GUESTS: [&str; 5] = ["mac", "serial", "wwn", "netdev", "chardev"];

impl Inventory {
    /// How another differs from this one in what a guest that goes on there would notice. `here` and `there` are said of
    /// the two, such as "at alpha" or "now".
    ///
    /// Properties are compared only where they are as they were `before`, when this machine was started, and all of a
    /// device that came later: what its guest has changed is moved by a migration.
    pub fn differences(&self, other: &Self, before: Option<&Self>, here: &str, there: &str) -> Vec<String> {
        let mut differences = Vec::new();
        let mut say = |text: String| differences.push(text);
        for (of, from, only) in [(&self.devices, &other.devices, here), (&other.devices, &self.devices, there)] {
            for (device, _) in missing(of, from) {
                // What is below it is missing with it.
                if device.rsplit_once(" / ").is_none_or(|(above, _)| from.contains_key(above)) {
                    say(format!("there is a device only {only}: {}", last(device)));
                }
            }
        }
        for (device, ours, theirs) in both(&self.devices, &other.devices) {
            // What only one of two versions knows is as it was before in the other.
            let Some(before) = before else { continue };
            let at_first = before.devices.get(device);
            let is_fixed = |key: &str, value: &String| {
                NEVER_THE_GUESTS.contains(&key) || at_first.is_none_or(|it| it.get(key) == Some(value))
            };
            let differ = both(ours, theirs).filter(|(key, ours, theirs)| ours != theirs && is_fixed(key, ours));
            for (key, ours, theirs) in differ {
                say(format!("{} of {} is {ours} {here} and {theirs} {there}", key, last(device)));
            }
        }
        for (block, _) in missing(&self.ram, &other.ram) {
            say(format!("there is memory only {here}: {block}"));
        }
        for (block, ours, theirs) in both(&self.ram, &other.ram).filter(|(_, ours, theirs)| !fits(**ours, **theirs)) {
            say(format!("{block} has {} {here} and {} {there}", kib(ours.used), kib(theirs.used)));
        }
        let lacks: Vec<String> = self
            .cpu_features
            .iter()
            .flat_map(|(word, bits)| {
                let passed_over = NOT_COMPARED.iter().find(|(it, _)| it == word).map_or(0, |(_, bits)| *bits);
                cpuid::names(word, bits & !passed_over & !other.cpu_features.get(word).copied().unwrap_or(0))
            })
            .collect();
        if !lacks.is_empty() && !other.cpu_features.is_empty() {
            say(format!("the processor {there} lacks what the one {here} has: {}", lacks.join(", ")));
        }
        for (what, ours, theirs) in
            [("processor", &self.cpus, &other.cpus), ("memory device", &self.memory_devices, &other.memory_devices)]
        {
            for (name, about) in missing(ours, theirs) {
                say(format!("there is a {what} only {here}: {name} ({about})"));
            }
            for (name, about) in missing(theirs, ours) {
                say(format!("there is a {what} only {there}: {name} ({about})"));
            }
            for (name, ours, theirs) in both(ours, theirs).filter(|(_, ours, theirs)| ours != theirs) {
                say(format!("the {what} {name} is {ours} {here} and {theirs} {there}"));
            }
        }
        for (of, from, only) in [(&self.disks, &other.disks, here), (&other.disks, &self.disks, there)] {
            // Every version gives a machine some empty drives more.
            for (disk, layers) in missing(of, from).filter(|(_, layers)| !layers.is_empty()) {
                say(format!("there is a disk only {only}: {disk} ({})", in_words(layers)));
            }
        }
        for (disk, ours, theirs) in both(&self.disks, &other.disks).filter(|(_, ours, theirs)| ours != theirs) {
            say(format!("{disk} is {} {here} and {} {there}", in_words(ours), in_words(theirs)));
        }
        for (disk, ..) in both(&self.disks, &other.disks) {
            let [ours, theirs] = [self, other].map(|it| limits_in_words(it.io_limits.get(disk)));
            if ours != theirs {
                say(format!("{disk} is {ours} {here} and {theirs} {there}"));
            }
        }
        differences
    }
}

/// What came by a stream of this size fits there: a block that can grow does.
fn fits(ours: RamSize, theirs: RamSize) -> bool {
    ours.used == theirs.used || theirs.used != theirs.most && ours.used <= theirs.most
}

fn missing<'a, V>(
    of: &'a BTreeMap<String, V>,
    from: &'a BTreeMap<String, V>,
) -> impl Iterator<Item = (&'a str, &'a V)> {
    of.iter().filter(|(key, _)| !from.contains_key(*key)).map(|(key, value)| (key.as_str(), value))
}

fn both<'a, V>(
    ours: &'a BTreeMap<String, V>,
    theirs: &'a BTreeMap<String, V>,
) -> impl Iterator<Item = (&'a str, &'a V, &'a V)> {
    ours.iter().filter_map(|(key, value)| Some((key.as_str(), value, theirs.get(key)?)))
}

/// The device itself, without its way.
fn last(path: &str) -> &str {
    path.rsplit_once(" / ").map_or(path, |(_, last)| last)
}

fn kib(bytes: u64) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}

fn in_words(layers: &[Layer]) -> String {
    match layers {
        [] => "empty".into(),
        layers => layers.iter().map(|it| it.file.as_str()).collect::<Vec<_>>().join(" over "),
    }
}

fn limits_in_words(limits: Option<&IoLimits>) -> String {
    limits.map_or_else(|| "not limited".into(), IoLimits::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Inventory {
        let properties = |addr: &str| [("addr".to_owned(), addr.to_owned())].into();
        let layer = |file: &str| Layer { file: file.into(), format: "qcow2".into() };
        Inventory {
            devices: [
                ("host on main".into(), BTreeMap::new()),
                ("host on main / net on pci.0 addr 03.0".into(), properties("03.0")),
                ("host on main / net on pci.0 addr 03.0 / part on bus".into(), properties("1")),
            ]
            .into(),
            ram: [
                ("pc.ram".into(), RamSize { used: 1 << 20, most: 1 << 20 }),
                ("acpi".into(), RamSize { used: 4096, most: 65536 }),
            ]
            .into(),
            cpu_features: [("0x7.0 EBX".into(), 0b111)].into(),
            cpus: [("core 0".into(), "max".into())].into(),
            memory_devices: BTreeMap::new(),
            disks: [("d0".into(), vec![layer("a.qcow2")])].into(),
            io_limits: BTreeMap::new(),
            peripherals: BTreeMap::new(),
            user_networks: 0,
        }
    }

    fn differences(change: impl Fn(&mut Inventory)) -> Vec<String> {
        let mut other = machine();
        change(&mut other);
        machine().differences(&other, Some(&machine()), "here", "there")
    }

    #[test]
    fn what_differs_is_named_once() {
        assert_eq!(differences(|_| {}), Vec::<String>::new());
        let gone = differences(|it| it.devices.retain(|key, _| !key.contains("net")));
        assert_eq!(gone, ["there is a device only here: net on pci.0 addr 03.0"]);
        let ghost = differences(|it| {
            it.devices.insert("host on main / disk on pci.0 addr 04.0".into(), BTreeMap::new());
        });
        assert_eq!(ghost, ["there is a device only there: disk on pci.0 addr 04.0"]);
        let rom = differences(|it| *it.ram.get_mut("pc.ram").unwrap() = RamSize { used: 2 << 20, most: 2 << 20 });
        assert_eq!(rom, ["pc.ram has 1024 KiB here and 2048 KiB there"]);
        let lacks = differences(|it| *it.cpu_features.get_mut("0x7.0 EBX").unwrap() = 0b10);
        assert_eq!(lacks, ["the processor there lacks what the one here has: fsgsbase, sgx"]);
        let plugged = differences(|it| {
            it.cpus.insert("core 1".into(), "max".into());
        });
        assert_eq!(plugged, ["there is a processor only there: core 1 (max)"]);
        let disk = differences(|it| {
            it.disks.get_mut("d0").unwrap().insert(0, Layer { file: "b.qcow2".into(), format: "qcow2".into() });
        });
        assert_eq!(disk, ["d0 is a.qcow2 here and b.qcow2 over a.qcow2 there"]);
    }

    #[test]
    fn what_an_older_qemu_cannot_load_is_known() {
        let with = |user_networks: usize| Inventory { user_networks, ..machine() };
        assert!(with(2).unloadable("7.2.22", "10.0.2").is_some_and(|why| why.contains("2 user networks")));
        for (networks, by, from) in [(1, "7.2.22", "10.0.2"), (2, "10.0.2", "7.2.22"), (2, "10.0.2", "10.1.0")] {
            assert_eq!(with(networks).unloadable(by, from), None);
        }
    }

    #[test]
    fn a_property_is_compared_unless_the_guest_has_changed_it() {
        let device = "host on main / net on pci.0 addr 03.0 / part on bus";
        let set = |it: &mut Inventory, value: &str| {
            it.devices.get_mut(device).unwrap().insert("queues".into(), value.into());
        };
        let [mut ours, mut theirs, mut before] = [machine(), machine(), machine()];
        set(&mut ours, "4");
        set(&mut theirs, "1");
        set(&mut before, "4");
        let told = ours.differences(&theirs, Some(&before), "here", "there");
        assert_eq!(told, ["queues of part on bus is 4 here and 1 there"]);
        set(&mut before, "1");
        assert!(ours.differences(&theirs, Some(&before), "here", "there").is_empty());
        assert!(ours.differences(&theirs, None, "here", "there").is_empty());
    }

    #[test]
    fn what_does_not_matter_is_not_told() {
        // A table that grows, features that nobody uses, and a property that only one version knows.
        assert!(differences(|it| it.ram.get_mut("acpi").unwrap().used = 8192).is_empty());
        assert!(differences(|it| *it.cpu_features.get_mut("0x7.0 EBX").unwrap() = 0b1111).is_empty());
        let mut with_pcommit = machine();
        with_pcommit.cpu_features.insert("0x7.0 EBX".into(), 0b111 | 1 << 22);
        assert!(with_pcommit.differences(&machine(), None, "here", "there").is_empty());
        assert!(
            differences(|it| {
                it.devices.get_mut("host on main").unwrap().insert("new".into(), "on".into());
            })
            .is_empty()
        );
    }
}
