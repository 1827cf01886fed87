//! What is taken from libvirt's XML: of a domain what a migration has to know, of a host whose user its QEMUs are.

use std::path::PathBuf;

use roxmltree::{Document, Node};
use uuid::Uuid;

/// It is no XML, or not that of a domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("libvirt's XML cannot be used: {0}")]
pub struct InvalidXml(String);

/// A domain, as its XML describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The machine type, as far as it is said.
    pub machine: Option<String>,
    /// Its disks, without drives that have nothing in them.
    pub disks: Vec<Disk>,
    /// Its RAM is in pages that the host keeps apart, and does not count as its processes'.
    pub huge_pages: bool,
    /// A device of the host was given to it.
    pub host_device: Option<String>,
    /// Who keeps a record of it beside libvirt's, and writes that down in it.
    pub manager: Option<Manager>,
}

/// Who manages domains by libvirt, and keeps a record of where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manager {
    /// What it is called.
    pub name: &'static str,
    /// The namespace of what it writes down in a domain.
    pub namespace: &'static str,
}

/// Those whose marks in a domain's metadata are known, by their own sources.
const MANAGERS: [Manager; 5] = [
    Manager { name: "OpenStack's Nova", namespace: "http://openstack.org/xmlns/libvirt/nova/1.0" },
    Manager { name: "OpenStack's Nova", namespace: "http://openstack.org/xmlns/libvirt/nova/1.1" },
    Manager { name: "oVirt", namespace: "http://ovirt.org/vm/1.0" },
    Manager { name: "KubeVirt", namespace: "http://kubevirt.io" },
    Manager { name: "OpenNebula", namespace: "http://opennebula.org/xmlns/libvirt/1.0" },
];

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What the guest has it as, such as `vda`: one a domain.
    pub target: String,
    /// Where it is.
    pub kind: DiskKind,
    /// The guest does not write to it.
    pub read_only: bool,
    /// Other guests write to it, too: libvirt does not copy it.
    pub shareable: bool,
    /// How QEMU caches it, if that is said.
    pub cache: Option<String>,
}

/// Where a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A file of this host, or of storage that several have.
    File(PathBuf),
    /// A block device.
    Block(PathBuf),
    /// A server's: every host that reaches it has the same.
    Network,
    /// Anything else, in libvirt's word.
    Other(String),
}

impl Description {
    /// Of a domain's XML.
    pub fn parse(xml: &str) -> Result<Self, InvalidXml> {
        let document = Document::parse(xml).map_err(|error| InvalidXml(error.to_string()))?;
        let domain = document.root_element();
        if !domain.has_tag_name("domain") {
            return Err(InvalidXml(format!("it is a <{}>", domain.tag_name().name())));
        }
        let missing = |what: &str| InvalidXml(format!("it has no {what}"));
        let (name, uuid) = named(domain)?;
        let kind = domain.attribute("type").ok_or_else(|| missing("type"))?;
        let machine = child(domain, "os").and_then(|os| child(os, "type")?.attribute("machine"));
        let devices = child(domain, "devices");
        let all = |name: &'static str| {
            devices.into_iter().flat_map(|it| it.children()).filter(move |it| it.has_tag_name(name))
        };
        let host_device =
            all("hostdev").next().map(|it| format!("a {} device", it.attribute("type").unwrap_or("host")));
        Ok(Self {
            name,
            uuid,
            accelerator: if kind == "qemu" { "tcg".into() } else { kind.into() },
            machine: machine.map(str::to_owned),
            disks: all("disk").filter_map(disk).collect(),
            huge_pages: child(domain, "memoryBacking").and_then(|it| child(it, "hugepages")).is_some(),
            host_device,
            manager: child(domain, "metadata").and_then(manager),
        })
    }
}

/// Of which domains a migration's cookie tells, by name and UUID: its own, and those that are described in it.
pub(crate) fn domains_in_cookie(cookie: &str) -> Result<Vec<(String, Uuid)>, InvalidXml> {
    let document = Document::parse(cookie).map_err(|error| InvalidXml(error.to_string()))?;
    let root = document.root_element();
    if root.tag_name().name() != "qemu-migration" {
        return Err(InvalidXml(format!("it is a <{}>", root.tag_name().name())));
    }
    let described = root.descendants().filter(|it| it.tag_name().name() == "domain");
    std::iter::once(root).chain(described).map(named).collect()
}

/// The name and the UUID of what is described, which must be there once each, in whatever way somebody reads XML.
fn named(node: Node<'_, '_>) -> Result<(String, Uuid), InvalidXml> {
    let only = |name: &str| {
        let mut all = node.children().filter(|it| it.tag_name().name() == name);
        let (Some(it), None) = (all.next(), all.next()) else {
            return Err(InvalidXml(format!("it has not one {name}")));
        };
        let mut parts = it.children();
        match (parts.next(), parts.next(), it.tag_name().namespace()) {
            (Some(text), None, None) if text.is_text() => Ok(text.text().unwrap_or_default().trim().to_owned()),
            _ => Err(InvalidXml(format!("its {name} is no plain text"))),
        }
    };
    let name = only("name")?;
    let uuid = only("uuid")?.parse().map_err(|_| InvalidXml("its uuid is none".into()))?;
    if name.is_empty() { Err(InvalidXml("its name is empty".into())) } else { Ok((name, uuid)) }
}

fn manager(metadata: Node<'_, '_>) -> Option<Manager> {
    let mut namespaces = metadata.children().filter_map(|it| it.tag_name().namespace());
    namespaces.find_map(|it| MANAGERS.into_iter().find(|known| known.namespace == it))
}

fn child<'a, 'b>(node: Node<'a, 'b>, name: &str) -> Option<Node<'a, 'b>> {
    node.children().find(|it| it.has_tag_name(name))
}

fn disk(disk: Node<'_, '_>) -> Option<Disk> {
    let source = child(disk, "source");
    let path = |name: &str| source.and_then(|it| it.attribute(name)).map(PathBuf::from);
    let kind = match disk.attribute("type").unwrap_or("file") {
        // A drive with nothing in it has no source.
        "file" => DiskKind::File(path("file")?),
        "block" => DiskKind::Block(path("dev")?),
        "network" => DiskKind::Network,
        other => DiskKind::Other(other.into()),
    };
    let device = disk.attribute("device").unwrap_or("disk");
    Some(Disk {
        target: child(disk, "target")?.attribute("dev")?.into(),
        kind,
        read_only: child(disk, "readonly").is_some() || device == "cdrom",
        shareable: child(disk, "shareable").is_some(),
        cache: child(disk, "driver").and_then(|it| it.attribute("cache")).map(str::to_owned),
    })
}

/// As whom libvirt runs QEMUs, by its capabilities: user and group. None where it does not change that.
pub fn qemu_user(capabilities: &str) -> Result<Option<(u32, u32)>, InvalidXml> {
    let document = Document::parse(capabilities).map_err(|error| InvalidXml(error.to_string()))?;
    let models = document.descendants().filter(|it| it.has_tag_name("secmodel"));
    let dac = models.into_iter().find(|it| child(*it, "model").and_then(|it| it.text()) == Some("dac"));
    let label = dac.and_then(|it| child(it, "baselabel")?.text());
    let both = label.and_then(|it| it.split_once(':'));
    let number = |text: &str| text.trim_start_matches('+').parse().ok();
    Ok(both.and_then(|(user, group)| Some((number(user)?, number(group)?))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB1: &str = "<domain type='qemu' id='3'>
  <name>web1</name>
  <uuid>9d7a4c1e-0000-4000-8000-000000000001</uuid>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/><source file='/img/a&amp;b.raw'/><target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/d.iso'/><target dev='sdb'/><readonly/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdb'/><shareable/></disk>
    <disk type='block' device='disk'><source dev='/dev/vg/x'/><target dev='vdc'/></disk>
    <disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdd'/></disk>
  </devices>
</domain>";

    #[test]
    fn a_domains_disks_are_those_with_something_in_them() {
        let it = Description::parse(WEB1).unwrap();
        assert_eq!(
            (it.name.as_str(), it.accelerator.as_str(), it.machine.as_deref()),
            ("web1", "tcg", Some("pc-q35-7.2"))
        );
        let disks: Vec<_> = it.disks.iter().map(|it| (it.target.as_str(), it.kind.clone(), it.read_only)).collect();
        assert_eq!(
            disks,
            [
                ("vda", DiskKind::File("/img/a&b.raw".into()), false),
                ("sdb", DiskKind::File("/iso/d.iso".into()), true),
                ("vdb", DiskKind::Network, false),
                ("vdc", DiskKind::Block("/dev/vg/x".into()), false),
                ("vdd", DiskKind::Other("volume".into()), false),
            ]
        );
        assert_eq!((it.disks[0].cache.as_deref(), it.disks[2].shareable, it.host_device), (Some("none"), true, None));
    }

    #[test]
    fn what_is_no_domain_is_an_error() {
        for bad in ["", "<domain", "<network/>", "<domain type='kvm'/>", "<domain type='kvm'><uuid>x</uuid></domain>"] {
            assert!(Description::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_user_of_qemus_is_that_of_the_security_model_dac() {
        let host = "<capabilities><host>
            <secmodel><model>apparmor</model><doi>0</doi></secmodel>
            <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+108</baselabel></secmodel>
            </host></capabilities>";
        assert_eq!(qemu_user(host), Ok(Some((64055, 108))));
        assert_eq!(qemu_user("<capabilities/>"), Ok(None));
        assert!(qemu_user("no XML").is_err());
    }

    #[test]
    fn who_keeps_a_record_of_a_domain_is_told_by_what_it_writes_down_in_it() {
        let of = |metadata: &str| {
            let xml = format!(
                "<domain type='kvm'><name>a</name><uuid>{}</uuid><metadata>{metadata}</metadata></domain>",
                Uuid::nil()
            );
            Description::parse(&xml).unwrap().manager.map(|it| it.name)
        };
        let nova = "<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:name>a</nova:name></nova:instance>";
        let os = "<libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'/>";
        assert_eq!(of(&format!("{os}{nova}")), Some("OpenStack's Nova"));
        assert_eq!(of("<kubevirt xmlns='http://kubevirt.io'><uid/></kubevirt>"), Some("KubeVirt"));
        assert_eq!(of("<ovirt-vm:vm xmlns:ovirt-vm='http://ovirt.org/vm/1.0'/>"), Some("oVirt"));
        assert_eq!(of(os), None);
    }
}
