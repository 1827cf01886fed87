//! The parts of a machine that words of a command line make, as its QEMU tells.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::host::SetByMachine;
use crate::inventory::{or_none, peripherals};
use crate::qmp::commands::{
    BlockNode, CpuPlace, DeviceListProperties, Drive, MemoryDevice, QomGet, QomList, QueryBlock, QueryChardev,
    QueryHotpluggableCpus, QueryMemoryDevices, QueryNamedBlockNodes, XDebugQueryBlockGraph,
};
use crate::qmp::{Qmp, QmpError};
use crate::ram::{self, NetClient, OBJECTS, ask_if_known, net_clients};

/// Where devices that have an id are.
const NAMED: &str = "/machine/peripheral/";

/// Where a device is on its bus, whatever kind of bus that is.
pub(super) const PLACES: [&str; 7] = ["addr", "scsi-id", "lun", "port", "nr", "unit", "cad"];

/// See the module's text.
pub(super) struct Parts {
    /// Those that words ask for, or the monitor.
    pub(super) devices: Vec<Device>,
    pub(super) objects: BTreeMap<String, String>,
    /// Network back ends, by id, each with what the monitor says of it.
    pub(super) networks: BTreeMap<String, NetClient>,
    /// Ports that user networks forward, by back end, as words.
    pub(super) forwards: BTreeMap<String, Vec<String>>,
    /// The ports that USB devices are at, by id.
    pub(super) usb_ports: BTreeMap<String, String>,
    /// Character devices, by id, each with what the monitor says of it.
    pub(super) chardevs: BTreeMap<String, String>,
    pub(super) drives: Vec<Drive>,
    pub(super) nodes: BTreeMap<String, BlockNode>,
    /// The nodes that a node consists of, each with what it is there.
    pub(super) children: BTreeMap<String, Vec<(String, String)>>,
    pub(super) cpus: Vec<CpuPlace>,
    pub(super) memory: Vec<MemoryDevice>,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) path: String,
    pub(super) id: Option<String>,
    pub(super) driver: String,
}

impl Parts {
    pub(super) async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let device = |(path, driver): (String, String)| {
            let id = path.strip_prefix(NAMED).map(str::to_owned);
            Device { path, id, driver }
        };
        let named = or_none(qmp, QueryNamedBlockNodes { flat: true }).await?;
        let graph = qmp.execute(XDebugQueryBlockGraph {}).await?;
        let called: BTreeMap<u64, &str> = graph.nodes.iter().map(|it| (it.id, it.name.as_str())).collect();
        let mut children: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
        for edge in &graph.edges {
            if let (Some(parent), Some(child)) = (called.get(&edge.parent), called.get(&edge.child)) {
                children.entry((*parent).into()).or_default().push((edge.name.clone(), (*child).into()));
            }
        }
        Ok(Self {
            devices: peripherals(qmp).await?.into_iter().map(device).collect(),
            objects: ram::children(qmp, OBJECTS).await?.into_iter().collect(),
            networks: networks(&ask_if_known(qmp, "info network").await?),
            forwards: forwards(&ask_if_known(qmp, "info usernet").await.unwrap_or_default()),
            usb_ports: usb_ports(&ask_if_known(qmp, "info usb").await.unwrap_or_default()),
            chardevs: qmp.execute(QueryChardev {}).await?.into_iter().map(|it| (it.label, it.filename)).collect(),
            drives: qmp.execute(QueryBlock {}).await?,
            nodes: named.into_iter().map(|it| (it.node_name.clone(), it)).collect(),
            children,
            cpus: or_none(qmp, QueryHotpluggableCpus {}).await?,
            memory: or_none(qmp, QueryMemoryDevices {}).await?,
        })
    }

    /// The processor that this device is.
    pub(super) fn cpu(&self, device: &Device) -> Option<&CpuPlace> {
        self.cpus.iter().find(|it| it.qom_path.as_deref() == Some(&device.path))
    }

    /// The node that a node has for this.
    pub(super) fn child(&self, node: &str, role: &str) -> Option<&str> {
        let children = self.children.get(node)?;
        children.iter().find(|(name, _)| name == role).map(|(_, child)| child.as_str())
    }

    /// The memory that this device is.
    pub(super) fn memory(&self, device: &Device) -> Option<&MemoryDevice> {
        let id = device.id.as_deref()?;
        self.memory.iter().find(|it| it.data["id"].as_str() == Some(id))
    }
}

/// What an object or a device was given: all that is not as it would be by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) properties: Vec<(String, String)>,
    /// Those that words cannot tell.
    pub(super) unspeakable: Vec<String>,
}

/// A device's bus and properties, as words.
pub(super) async fn given_to_device(
    qmp: &Qmp,
    device: &Device,
    parts: &Parts,
    set_by_machine: Option<&SetByMachine>,
) -> Result<Given, QmpError> {
    let mut given = some_given(qmp, device, parts, |_| true).await?;
    if let Some(set) = set_by_machine {
        given.properties.retain(|property| !set.contains(property));
    }
    Ok(given)
}

/// Where a device is on its bus, as words.
pub(super) async fn place_of(qmp: &Qmp, device: &Device, parts: &Parts) -> Result<Vec<(String, String)>, QmpError> {
    Ok(some_given(qmp, device, parts, |name| PLACES.contains(&name)).await?.properties)
}

/// Its bus, and those of its properties that are meant, as words.
async fn some_given(
    qmp: &Qmp,
    device: &Device,
    parts: &Parts,
    is_meant: impl Fn(&str) -> bool,
) -> Result<Given, QmpError> {
    let get = async |property: &str| qmp.execute(QomGet { path: device.path.clone(), property: property.into() }).await;
    let mut given = Given::default();
    if let Ok(Value::String(bus)) = get("parent_bus").await
        && let Some((_, name)) = bus.rsplit_once('/')
    {
        given.properties.push(("bus".into(), name.into()));
    }
    let known = qmp.execute(DeviceListProperties { typename: device.driver.clone() }).await?;
    for property in known.into_iter().filter(|it| is_meant(&it.name)) {
        let Ok(value) = get(&property.name).await else { continue };
        let is_reference = property.kind == "str" || property.kind.starts_with("link<");
        let is_given = match &property.default_value {
            Some(default) => *default != value,
            // Of others it cannot be told whether they were given, or may be.
            None => is_reference,
        };
        // What the machine's type sets, for experts: whether it is the same there is compared.
        if is_given && !property.name.starts_with("x-") {
            given.add(&property.name, &property.kind, &value);
        }
    }
    given.add_port(device, parts);
    Ok(given)
}

/// What objects are given, of those that are carried. QEMU tells no defaults of objects, and newer versions have properties
/// that older ones refuse.
const GIVEN_TO_OBJECTS: [&str; 15] = [
    "size",
    "share",
    "mem-path",
    "prealloc",
    "hugetlb",
    "hugetlbsize",
    "align",
    "pmem",
    "readonly",
    "merge",
    "dump",
    "filename",
    "poll-max-ns",
    "poll-grow",
    "poll-shrink",
];

/// An object's properties, as words.
pub(super) async fn given_to_object(qmp: &Qmp, id: &str) -> Result<Given, QmpError> {
    let path = format!("/objects/{id}");
    let mut given = Given::default();
    let known = qmp.execute(QomList { path: path.clone() }).await?;
    for property in known.iter().filter(|it| GIVEN_TO_OBJECTS.contains(&it.name.as_str())) {
        if let Ok(value) = qmp.execute(QomGet { path: path.clone(), property: property.name.clone() }).await {
            given.add(&property.name, &property.kind, &value);
        }
    }
    Ok(given)
}

impl Given {
    /// A USB device is told its port by its bus; at a hub's, that is the one that QEMU made for want of ports, and makes
    /// again when the next device finds none.
    fn add_port(&mut self, device: &Device, parts: &Parts) {
        let port = device.id.as_ref().and_then(|id| parts.usb_ports.get(id));
        if let Some(port) =
            port.filter(|port| !port.contains('.')).filter(|_| !self.properties.iter().any(|(key, _)| key == "port"))
        {
            self.properties.push(("port".into(), port.clone()));
        }
    }

    pub(super) fn bus(&self) -> Option<&str> {
        self.properties.iter().find(|(key, _)| key == "bus").map(|(_, value)| value.as_str())
    }

    fn add(&mut self, name: &str, kind: &str, value: &Value) {
        let text = match value {
            Value::Null => return,
            Value::Bool(yes) => if *yes { "on" } else { "off" }.to_owned(),
            // A place on PCI, which is told as a number and taken as slot and function.
            Value::Number(number) if name == "addr" && matches!(kind, "str" | "int32") => {
                let devfn = number.as_u64().unwrap_or_default();
                format!("{:02x}.{:x}", devfn >> 3, devfn & 7)
            }
            Value::Number(number) => number.to_string(),
            Value::String(text) if text.is_empty() => return,
            // A part of the device, which it makes itself.
            Value::String(text) if kind.starts_with("link<") && text.starts_with("/machine/") => return,
            Value::String(_) if kind.starts_with("child<") => return,
            Value::String(text) => text.strip_prefix("/objects/").unwrap_or(text).to_owned(),
            Value::Array(items) if items.is_empty() => return,
            Value::Array(_) | Value::Object(_) => {
                self.unspeakable.push(name.into());
                return;
            }
        };
        self.properties.push((name.into(), text));
    }
}

/// Of `info network`; what hangs in a hub is called `hub0port1: #net184` there.
fn networks(text: &str) -> BTreeMap<String, NetClient> {
    let back_ends = net_clients(text).into_iter().filter(|it| !matches!(it.kind.as_str(), "nic" | "hubport"));
    let own = |name: &str| name.rsplit(": ").next().unwrap_or(name).to_owned();
    back_ends.map(|it| (own(&it.name), it)).collect()
}

/// Of `info usb`: `  Device 0.2, Port 3, Speed 480 Mb/s, Product QEMU USB Tablet, ID: tab1`.
fn usb_ports(text: &str) -> BTreeMap<String, String> {
    let one = |line: &str| {
        let (_, port) = line.split_once(", Port ")?;
        Some((line.trim_end().rsplit_once(", ID: ")?.1.to_owned(), port.split(',').next()?.to_owned()))
    };
    text.lines().filter_map(one).collect()
}

/// Of `info usernet`: `Hub -1 (net9):` and below it `TCP[HOST_FORWARD]  15  127.0.0.1  2222  10.0.2.15  22  0  0`.
fn forwards(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut forwards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut of = None;
    for line in text.lines() {
        if let Some((_, name)) = line.trim_end().strip_suffix("):").and_then(|line| line.rsplit_once('(')) {
            of = Some(name.to_owned());
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let [protocol, _, host, port, guest, guest_port, ..] = words[..] else { continue };
        let (Some(of), Some(protocol)) = (&of, protocol.strip_suffix("[HOST_FORWARD]")) else { continue };
        let host = if host == "*" { "" } else { host };
        let word = format!("{}:{host}:{port}-{guest}:{guest_port}", protocol.to_lowercase());
        forwards.entry(of.clone()).or_default().push(word);
    }
    forwards
}

/// The ids of all that words may refer to.
pub(super) fn known_ids(parts: &Parts) -> BTreeSet<&str> {
    let drives = parts.drives.iter().map(|it| it.device.as_str());
    let ids = parts.objects.keys().chain(parts.networks.keys()).chain(parts.chardevs.keys()).chain(parts.nodes.keys());
    ids.map(String::as_str).chain(drives).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_ends_are_read_from_what_the_monitor_says_to_people() {
        let text = "hub 0\r\n \\ hub0port1: #net184: index=0,type=user,net=10.0.2.0,restrict=off\r\n \
                    \\ hub0port0: e1000e.0: index=0,type=nic,model=e1000e,macaddr=52:54:00:12:34:56\r\n\
                    nic9: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n \
                    \\ net9: index=0,type=tap,ifname=t0,script=no,downscript=no\r\n\
                    alone: index=0,type=user,net=10.0.2.0,restrict=on\r\n";
        let networks = networks(text);
        let read: Vec<_> =
            networks.iter().map(|(id, it)| (id.as_str(), format!("type={},{}", it.kind, it.about))).collect();
        let of = |name: &'static str, about: &str| (name, about.to_owned());
        assert_eq!(
            read,
            [
                of("#net184", "type=user,net=10.0.2.0,restrict=off"),
                of("alone", "type=user,net=10.0.2.0,restrict=on"),
                of("net9", "type=tap,ifname=t0,script=no,downscript=no"),
            ]
        );
        let text = "Hub -1 (net9):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n\
                    \u{20} TCP[HOST_FORWARD]  15       127.0.0.1  2222       10.0.2.15    22     0     0\r\n\
                    \u{20} UDP[HOST_FORWARD]  16               *  53       10.0.2.15    53     0     0\r\n";
        let usb = usb_ports(
            "  Device 0.2, Port 3.1, Speed 480 Mb/s, Product QEMU USB Tablet, ID: tab1\r\n  Device 0.0, Port 1, x\r\n",
        );
        assert_eq!(usb.into_iter().collect::<Vec<_>>(), [("tab1".to_owned(), "3.1".to_owned())]);
        let read = forwards(text);
        assert_eq!(read["net9"], ["tcp:127.0.0.1:2222-10.0.2.15:22", "udp::53-10.0.2.15:53"]);
    }
}
