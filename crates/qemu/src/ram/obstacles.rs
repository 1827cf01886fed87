//! What keeps an engine from moving a guest's RAM from outside QEMU. Such an engine opens the RAM as a file, and sees
//! writes as they go through QEMU's page tables: what is no shared file, or is written by some other way, is not for it.
//!
//! The kernel's own vhost writes through QEMU's page tables, and is none of this.

use super::{BackendKind, OBJECTS, RamLayout, ask, children, monitor};
use crate::qmp::commands::{BlockNode, QueryKvm, QueryMigrateCapabilities, QueryNamedBlockNodes};
use crate::qmp::{Qmp, QmpError};

/// The capability without which QEMU sends shared RAM along with the device state.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// A capability that came with the release in which `x-ignore-shared` began to mean only RAM that has a path.
const SINCE_8_1: &str = "switchover-ack";

/// Why a guest's RAM cannot be moved from outside QEMU, in words for its user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Nobody but QEMU can open it.
    #[error("its RAM {backend} is not shared: that takes a memory backend with share=on")]
    NotShared {
        /// The id of the backend.
        backend: String,
    },
    /// The kernel does not tell who writes huge pages page by page.
    #[error("its RAM {backend} is of huge pages ({page_size} bytes each)")]
    HugePages {
        /// The id of the backend.
        backend: String,
        /// In bytes.
        page_size: u64,
    },
    /// Some of it is in no backend, or in one that has no name.
    #[error("{bytes} bytes of its RAM are in no memory backend")]
    NoBackend {
        /// How much.
        bytes: u64,
    },
    /// Hardware of the host writes it.
    #[error("{what} is hardware of the host, which writes RAM without QEMU")]
    Assigned {
        /// What does.
        what: String,
    },
    /// Another process has it mapped and writes it there.
    #[error("{what} is in another process, which writes RAM without QEMU")]
    OtherProcess {
        /// What does.
        what: String,
    },
    /// Parts of it come and go.
    #[error("{what} gives and takes RAM while the guest runs")]
    Resized {
        /// What does.
        what: String,
    },
    /// KVM and the processor write some pages by their physical address: those by which a nested guest's interrupts go.
    #[error(
        "its guest is a hypervisor (VMX is on), and the interrupts of nested guests are written where only KVM sees it"
    )]
    NestedGuests,
    /// QEMU would send the RAM too, as it has no path.
    #[error(
        "its RAM {backend} is not in a file with a path, and this QEMU leaves only such RAM out of a migration: use memory-backend-file,share=on"
    )]
    NoPath {
        /// The id of the backend.
        backend: String,
    },
    /// QEMU would send the RAM too.
    #[error("this QEMU cannot leave RAM out of a migration: it lacks {IGNORE_SHARED}")]
    NoIgnoreShared,
}

/// Asks a QEMU what keeps its guest's RAM, of which this is the layout, from being moved from outside; nothing, when the answer is empty. What QEMU
/// cannot tell, such as a seccomp sandbox around it or that a backend's file is on a disk, is for others to find.
pub async fn external_obstacles(qmp: &Qmp, layout: &RamLayout) -> Result<Vec<Obstacle>, QmpError> {
    let page_size = rustix::param::page_size() as u64;
    let mut found = of_ram(layout, page_size);
    for device in devices(qmp).await? {
        found.extend(of_device(&device));
    }
    for (id, kind) in children(qmp, OBJECTS).await? {
        if kind.contains("vhost-user") {
            found.push(Obstacle::OtherProcess { what: format!("{id} ({kind})") });
        }
    }
    for client in monitor::net_clients(&ask(qmp, "info network").await?) {
        let obstacle = of_net_client(&client);
        // A card with several queues has a client for each.
        found.extend(obstacle.filter(|obstacle| !found.contains(obstacle)));
    }
    for node in qmp.execute(QueryNamedBlockNodes { flat: true }).await? {
        found.extend(of_block_driver(&node.drv).filter(|obstacle| !found.contains(obstacle)));
    }
    // A nested guest's own writes go through the same page tables as others. But KVM has its virtual-APIC page and its
    // posted-interrupt descriptor mapped for itself and the processor, and notes writes to them in its own log only:
    // see nested_mark_vmcs12_pages_dirty() in Linux' arch/x86/kvm/vmx/nested.c. SVM has no such pages there.
    if qmp.execute(QueryKvm {}).await?.enabled && monitor::vmx_is_on(&ask(qmp, "info registers").await?) {
        found.push(Obstacle::NestedGuests);
    }
    let capabilities = qmp.execute(QueryMigrateCapabilities {}).await?;
    let has = |name: &str| capabilities.iter().any(|known| known.capability == name);
    if !has(IGNORE_SHARED) {
        found.push(Obstacle::NoIgnoreShared);
    }
    if has(SINCE_8_1) {
        let without = layout.backends.iter().filter(|ram| ram.kind != BackendKind::File);
        found.extend(without.map(|ram| Obstacle::NoPath { backend: ram.id.clone() }));
    }
    Ok(found)
}

/// Whether disks are read straight into the guest's RAM, by `O_DIRECT` or what amounts to it: the host's hardware writes
/// a page some time after the kernel took it to be written, so that a page that is copied in between is stale, unless
/// I/O is drained in between. So do file systems that a program or another host serves, which may not use a cache either.
pub async fn uses_direct_io(qmp: &Qmp) -> Result<bool, QmpError> {
    let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
    if nodes.iter().any(|node| node.cache.direct) || devices(qmp).await?.iter().any(Device::passes_commands) {
        return Ok(true);
    }
    let files: Vec<String> = nodes.into_iter().filter(BlockNode::is_of_this_host).map(|node| node.file).collect();
    // Their storage may not answer.
    let served = tokio::task::spawn_blocking(move || files.iter().any(|file| is_served(file)));
    Ok(served.await.expect("asking for a file system does not panic"))
}

/// FUSE, 9p, CIFS and SMB: `statfs(2)`.
const SERVED: [u32; 4] = [0x6573_5546, 0x0102_1997, 0xff53_4d42, 0xfe53_4d42];

/// It lies on one of those, or where cannot be told.
fn is_served(file: &str) -> bool {
    let kind = file.starts_with('/').then(|| rustix::fs::statfs(file).ok()).flatten().map(|it| it.f_type as u32);
    kind.is_none_or(|kind| SERVED.contains(&kind))
}

/// A device that the user gave to the guest, on whatever bus.
struct Device {
    /// Only those that the user named have one.
    id: Option<String>,
    kind: String,
}

impl Device {
    /// The host's disk is given the guest's SCSI commands with the guest's buffers, whatever the cache.
    fn passes_commands(&self) -> bool {
        self.kind == "scsi-block"
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.id {
            Some(id) => write!(f, "{id} ({})", self.kind),
            None => write!(f, "a {}", self.kind),
        }
    }
}

async fn devices(qmp: &Qmp) -> Result<Vec<Device>, QmpError> {
    let named = children(qmp, "/machine/peripheral").await?.into_iter().map(|(id, kind)| (Some(id), kind));
    let others = children(qmp, "/machine/peripheral-anon").await?.into_iter().map(|(_, kind)| (None, kind));
    Ok(named.chain(others).map(|(id, kind)| Device { id, kind }).collect())
}

fn of_ram(layout: &RamLayout, page_size: u64) -> Vec<Obstacle> {
    let mut found = Vec::new();
    for ram in &layout.backends {
        if !ram.shared {
            found.push(Obstacle::NotShared { backend: ram.id.clone() });
        }
        if let Some(page_size) = ram.page_size.filter(|theirs| *theirs > page_size) {
            found.push(Obstacle::HugePages { backend: ram.id.clone(), page_size });
        }
    }
    if layout.elsewhere > 0 {
        found.push(Obstacle::NoBackend { bytes: layout.elsewhere });
    }
    found
}

fn of_device(device: &Device) -> Option<Obstacle> {
    let is = |start: &str| device.kind.starts_with(start);
    let what = device.to_string();
    if is("vfio-user") || is("vhost-user") || is("ivshmem") || is("x-pci-proxy-dev") {
        Some(Obstacle::OtherProcess { what })
    } else if is("vfio-") || is("vhost-vdpa") || is("vhost-scsi") || is("pvrdma") {
        Some(Obstacle::Assigned { what })
    } else if is("virtio-mem") {
        Some(Obstacle::Resized { what })
    } else {
        None
    }
}

fn of_net_client(client: &monitor::NetClient) -> Option<Obstacle> {
    let what = format!("netdev {} ({})", client.name, client.kind);
    match client.kind.as_str() {
        "vhost-vdpa" => Some(Obstacle::Assigned { what }),
        "vhost-user" => Some(Obstacle::OtherProcess { what }),
        // It can be either (10.1 and newer).
        "passt" if client.about.starts_with("vhost-user") => Some(Obstacle::OtherProcess { what }),
        _ => None,
    }
}

/// Drivers that hand the guest's buffers to somebody else.
fn of_block_driver(driver: &str) -> Option<Obstacle> {
    let what = format!("a disk by the driver {driver}");
    match driver {
        "nvme" | "virtio-blk-vfio-pci" | "virtio-blk-vhost-vdpa" => Some(Obstacle::Assigned { what }),
        "virtio-blk-vhost-user" => Some(Obstacle::OtherProcess { what }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{BackendKind, RamBackend};

    #[test]
    fn an_obstacle_says_what_and_why() {
        let device = |kind: &str| of_device(&Device { id: Some("x0".into()), kind: kind.into() });
        for kind in ["vfio-pci", "vfio-pci-nohotplug", "vfio-ccw", "vhost-vdpa-device-pci", "vhost-scsi-pci"] {
            assert_eq!(device(kind), Some(Obstacle::Assigned { what: format!("x0 ({kind})") }));
        }
        for kind in ["vhost-user-blk-pci", "vhost-user-fs-pci", "vfio-user-pci", "ivshmem-plain"] {
            assert_eq!(device(kind), Some(Obstacle::OtherProcess { what: format!("x0 ({kind})") }));
        }
        for kind in ["virtio-net-pci", "vhost-vsock-pci", "pc-dimm", "nvdimm", "nvme", "pcie-root-port"] {
            assert_eq!(device(kind), None, "{kind}");
        }
        let words = of_device(&Device { id: None, kind: "vfio-pci".into() }).unwrap().to_string();
        assert_eq!(words, "a vfio-pci is hardware of the host, which writes RAM without QEMU");
    }

    #[test]
    fn a_netdev_is_an_obstacle_when_its_other_end_maps_ram() {
        let about = |kind: &str, about: &str| {
            let client = monitor::NetClient { name: "n0".into(), kind: kind.into(), about: about.into() };
            of_net_client(&client).map(|obstacle| obstacle.to_string())
        };
        assert!(about("vhost-user", "vhost-user0 to vu").unwrap().starts_with("netdev n0 (vhost-user) is in another"));
        assert!(about("vhost-vdpa", "").unwrap().starts_with("netdev n0 (vhost-vdpa) is hardware"));
        assert!(about("passt", "vhost-user,connected to pid 7").is_some());
        assert_eq!(about("passt", "stream,connected to pid 7"), None);
        assert_eq!(about("tap", "ifname=tap0,script=vhost-user,downscript=no"), None);
    }

    #[test]
    fn shared_ram_of_small_pages_is_no_obstacle() {
        let ram = RamBackend {
            id: "ram0".into(),
            kind: BackendKind::Memfd,
            size: 1 << 30,
            shared: true,
            page_size: Some(1 << 16),
            address: None,
        };
        let layout = |ram, elsewhere| RamLayout { backends: vec![ram], elsewhere };
        assert_eq!(of_ram(&layout(ram.clone(), 0), 1 << 16), []);
        let backend = String::from("ram0");
        let huge = Obstacle::HugePages { backend: backend.clone(), page_size: 1 << 16 };
        assert_eq!(of_ram(&layout(ram.clone(), 0), 1 << 12), [huge]);
        let private = RamBackend { shared: false, ..ram };
        let expected = [Obstacle::NotShared { backend }, Obstacle::NoBackend { bytes: 5 }];
        assert_eq!(of_ram(&layout(private, 5), 1 << 16), expected);
    }

    #[test]
    fn some_drivers_of_disks_and_some_disks_write_ram_by_another_way() {
        assert!(of_block_driver("nvme").is_some() && of_block_driver("virtio-blk-vhost-user").is_some());
        assert!(of_block_driver("qcow2").is_none() && of_block_driver("host_device").is_none());
        let passes = |kind: &str| Device { id: None, kind: kind.into() }.passes_commands();
        assert!(passes("scsi-block") && !passes("scsi-hd") && !passes("scsi-generic"));
    }
}
