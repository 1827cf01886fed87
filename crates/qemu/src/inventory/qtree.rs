//! Reads the answer to `info qtree`: buses, the devices on them, their properties, and the buses that those have, each
//! further to the right than what it hangs in. Its words are no interface, so a line that is not understood is skipped.

use std::collections::BTreeMap;

use super::Properties;

/// What firmware sets as soon as it runs, and what does not reach the guest: names of files and disks, whose content
/// counts, defaults that were written otherwise in earlier versions, and of what a guest may tell the host that it panicked.
const NOT_COMPARED: [&str; 7] = ["MCFG", "busnr", "smb_io_base", "romfile", "rombar", "drive", "events"];

/// Where a device is on its bus, whatever kind of bus that is.
const PLACES: [&str; 8] = ["addr", "unit", "scsi-id", "lun", "cad", "nr", "port", "iobase"];

/// A device whose lines are being read.
struct Open {
    indent: usize,
    parent: String,
    kind: String,
    id: String,
    properties: Properties,
    /// Of the buses below it.
    children: Vec<Open>,
}

/// The devices, each named by its way from the root.
pub(super) fn devices(text: &str) -> BTreeMap<String, Properties> {
    let mut roots: Vec<Open> = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    let close = |open: &mut Vec<Open>, roots: &mut Vec<Open>, indent: usize| {
        while open.last().is_some_and(|it| it.indent >= indent) {
            let done = open.pop().expect("there is a last one");
            match open.last_mut() {
                Some(above) => above.children.push(done),
                None => roots.push(done),
            }
        }
    };
    let mut buses: Vec<(usize, &str)> = Vec::new();
    for line in text.lines().map(str::trim_end) {
        let words = line.trim_start();
        let indent = line.len() - words.len();
        if let Some(name) = words.strip_prefix("bus: ") {
            close(&mut open, &mut roots, indent);
            buses.retain(|(above, _)| *above < indent);
            buses.push((indent, name));
        } else if let Some(about) = words.strip_prefix("dev: ") {
            close(&mut open, &mut roots, indent);
            buses.retain(|(above, _)| *above < indent);
            let (kind, id) = about.split_once(", id ").unwrap_or((about, ""));
            open.push(Open {
                indent,
                parent: buses.last().map_or("", |(_, name)| name).into(),
                kind: kind.into(),
                id: id.trim_matches('"').into(),
                properties: Properties::new(),
                children: Vec::new(),
            });
        } else if let Some(device) = open.last_mut() {
            device.properties.extend(property(words));
        }
    }
    close(&mut open, &mut roots, 0);
    let mut devices = BTreeMap::new();
    name("", roots, &mut devices);
    devices
}

/// `addr = 0a.0`, `romsize = 4294967295 (0xffffffff)`; and `class ..., addr 00:0a.0, pci id 1af4:1001 (sub 1af4:0002)`.
/// The last that is said of a key counts.
fn property(words: &str) -> Option<(String, String)> {
    if words.starts_with("class ") {
        return Some(("pci id".into(), words.split_once("pci id ")?.1.into()));
    }
    // `addr 0.2, port 3, speed 480, name QEMU USB Tablet, attached`: where a USB device is, whatever was asked for.
    if let Some((_, port)) = words.strip_prefix("addr ").and_then(|words| words.split_once(", port ")) {
        return Some(("port".into(), port.split(',').next()?.into()));
    }
    let (key, value) = words.split_once(" = ")?;
    // A name that QEMU has made up is another one every time.
    if NOT_COMPARED.contains(&key) || key.contains(' ') || value.starts_with("\"#") {
        return None;
    }
    let is_number = value.starts_with(|it: char| it.is_ascii_digit() || it == '-');
    let value = if is_number { value.split(" (").next().unwrap_or(value) } else { value };
    Some((key.into(), value.into()))
}

/// Two that are called the same are told apart by their order.
fn name(above: &str, devices: Vec<Open>, named: &mut BTreeMap<String, Properties>) {
    for device in devices {
        let place = PLACES.iter().filter_map(|place| Some(format!("{place} {}", device.properties.get(*place)?)));
        let place = place.collect::<Vec<_>>().join(" ");
        let words = [device.kind.as_str(), &device.id, "on", &device.parent, &place];
        let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
        let called = format!("{above}{}", words.join(" "));
        let path = (1..).map(|n| if n == 1 { called.clone() } else { format!("{called} ({n})") });
        let path = path.into_iter().find(|path| !named.contains_key(path)).expect("numbers do not end");
        named.insert(path.clone(), device.properties);
        name(&format!("{path} / "), device.children, named);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = "\
bus: main-system-bus\r
  type System\r
  dev: q35-pcihost, id \"\"\r
    MCFG = 2952790016 (0xb0000000)\r
    below-4g-mem-size = 268435456 (256 MiB)\r
    bus: pcie.0\r
      type PCIE\r
      dev: virtio-blk-pci, id \"\"\r
        addr = 0a.0\r
        rombar = 1 (0x1)\r
        class SCSI controller, addr 00:0a.0, pci id 1af4:1001 (sub 1af4:0002)\r
        bar 0: i/o at 0xc000 [0xc07f]\r
        bus: virtio-bus\r
          type virtio-pci-bus\r
          dev: virtio-blk-device, id \"\"\r
            drive = \"virtio0\"\r
      dev: pcie-root-port, id \"rp1\"\r
        addr = 02.0\r
        bus: rp1\r
          type PCIE\r
  dev: ioapic, id \"\"\r
    version = 32 (0x20)\r
    mmio 00000000fec00000/0000000000001000\r
  dev: ioapic, id \"\"\r
";

    #[test]
    fn devices_are_named_by_their_way_from_the_root() {
        let devices = devices(TREE);
        let host = "q35-pcihost on main-system-bus";
        let disk = format!("{host} / virtio-blk-pci on pcie.0 addr 0a.0");
        let names: Vec<&str> = devices.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "ioapic on main-system-bus",
                "ioapic on main-system-bus (2)",
                host,
                &format!("{host} / pcie-root-port rp1 on pcie.0 addr 02.0"),
                &disk,
                &format!("{disk} / virtio-blk-device on virtio-bus"),
            ]
        );
        let of = |words: &[(&str, &str)]| -> Properties {
            words.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        assert_eq!(devices[host], of(&[("below-4g-mem-size", "268435456")]));
        assert_eq!(devices[&disk], of(&[("addr", "0a.0"), ("pci id", "1af4:1001 (sub 1af4:0002)")]));
        assert_eq!(devices["ioapic on main-system-bus"], of(&[("version", "32")]));
    }

    #[test]
    fn what_is_not_understood_is_skipped() {
        assert!(super::devices("unknown command: 'info qtree'\r\n").is_empty());
        assert!(super::devices("").is_empty());
    }
}
