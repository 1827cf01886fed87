//! What QEMU tells about its guest's RAM, held against the kernel's list of QEMU's mappings.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::json;
use vmferry_qemu::qmp::commands::*;
use vmferry_qemu::*;

use super::{Vm, Wish, start, try_start, with_each_qemu};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A line of `/proc/PID/maps`.
#[derive(Debug)]
struct Mapping {
    length: u64,
    shared: bool,
    inode: u64,
    path: String,
}

/// The mapping that begins at this address.
fn mapping_at(vm: &Vm, address: u64) -> Mapping {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.launched.pid)).unwrap();
    let begins = format!("{address:x}-");
    let line = maps.lines().find(|line| line.starts_with(&begins));
    let line = line.unwrap_or_else(|| panic!("nothing begins at {address:#x} in:\n{maps}"));
    let fields: Vec<&str> = line.split_whitespace().collect();
    let end = u64::from_str_radix(fields[0].split_once('-').unwrap().1, 16).unwrap();
    Mapping {
        length: end - address,
        shared: fields[1].ends_with('s'),
        inode: fields[4].parse().unwrap(),
        path: fields.get(5).copied().unwrap_or_default().into(),
    }
}

/// The file of QEMU's that has this inode.
fn file_of(vm: &Vm, inode: u64) -> File {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", vm.launched.pid)).unwrap();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    let is_memfd = |path: &std::path::Path| std::fs::read_link(path).unwrap().to_str().unwrap().starts_with("/memfd:");
    let path = paths.find(|path| is_memfd(path) && std::fs::metadata(path).unwrap().ino() == inode).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

/// Asserts that the VM's RAM is just these backends, of these sizes and at these places of the guest's memory, and that
/// each is a memfd, mapped where it is told to be.
async fn assert_memfds(vm: &Vm, expected: &[(&str, u64, u64)]) {
    let qmp = &vm.launched.qmp;
    let layout = ram_backends(qmp).await.unwrap();
    assert_eq!(layout.elsewhere, 0);
    assert_eq!(layout.backends.len(), expected.len(), "{layout:?}");
    for (nth, (id, size, guest_address)) in expected.iter().enumerate() {
        let backend = layout.backends.iter().find(|backend| backend.id == *id).unwrap();
        assert_eq!((&backend.kind, backend.shared, backend.size), (&BackendKind::Memfd, true, *size));
        assert_eq!(backend.page_size, Some(rustix::param::page_size() as u64));
        let mapping = mapping_at(vm, backend.address.expect("QEMU did not tell the address"));
        assert!(mapping.shared && mapping.path.starts_with("/memfd:"), "{mapping:?}");
        assert!(mapping.length >= *size, "{backend:?} {mapping:?}");
        // What is written there is what the guest sees.
        let mark = 0xA1 + nth as u8;
        file_of(vm, mapping.inode).write_all_at(&[mark], 0).unwrap();
        let line = format!("xp /1xb {guest_address:#x}");
        let seen = qmp.execute(HumanMonitorCommand { command_line: line }).await.unwrap();
        assert!(seen.trim().ends_with(&format!("{mark:#x}")), "{id}: {seen}");
    }
    assert_eq!(obstacles(vm).await, []);
}

async fn all_obstacles(vm: &Vm) -> Vec<Obstacle> {
    let qmp = &vm.launched.qmp;
    external_obstacles(qmp, &ram_backends(qmp).await.unwrap()).await.unwrap()
}

/// All but that the RAM of these tests, being memfds, has no path.
async fn obstacles(vm: &Vm) -> Vec<Obstacle> {
    all_obstacles(vm).await.into_iter().filter(|it| !matches!(it, Obstacle::NoPath { .. })).collect()
}

#[tokio::test]
async fn ram_that_qemu_would_send_itself_is_an_obstacle_and_ours_is_not() {
    with_each_qemu(|qemu| async move {
        let ours =
            try_start(&qemu, Wish { shared_ram: true, ..Wish::new("-M q35 -m 64M -nodefaults -S") }).await.unwrap();
        assert_eq!(all_obstacles(&ours).await, []);
        let memfd =
            "-M q35,memory-backend=ram0 -m 64M -nodefaults -S -object memory-backend-memfd,id=ram0,size=64M,share=on";
        let memfd = start(&qemu, memfd).await;
        let version = memfd.launched.qmp.execute(QueryVersion {}).await.unwrap().to_string();
        let expected = match version.starts_with("7.") {
            true => vec![],
            false => vec![Obstacle::NoPath { backend: "ram0".into() }],
        };
        assert_eq!(all_obstacles(&memfd).await, expected, "{version}");
    })
    .await;
}

/// Plugs 256 MiB in, as `more`.
async fn plug_dimm(qmp: &Qmp) {
    let idle = json!({ "qom-type": "memory-backend-memfd", "id": "idle", "size": 256 * MIB, "share": true });
    let memory = json!({ "qom-type": "memory-backend-memfd", "id": "more", "size": 256 * MIB, "share": true });
    for backend in [idle, memory] {
        qmp.execute_raw("object-add", backend).await.unwrap();
    }
    let dimm = json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "more" });
    qmp.execute_raw("device_add", dimm).await.unwrap();
}

#[tokio::test]
async fn each_backend_is_told_with_its_place_in_qemu() {
    with_each_qemu(|qemu| async move {
        let one = "-object memory-backend-memfd,id=ram0,share=on,size";
        let vm = start(&qemu, &format!("-M q35,memory-backend=ram0 -m 512 {one}=512M -nodefaults -S")).await;
        assert_memfds(&vm, &[("ram0", 512 * MIB, 0)]).await;

        // In two pieces, with the hole below 4 GiB between them.
        let vm = start(&qemu, &format!("-M q35,memory-backend=ram0 -m 5G {one}=5G -nodefaults -S")).await;
        assert_memfds(&vm, &[("ram0", 5 * GIB, 0)]).await;

        let vm = start(
            &qemu,
            "-M q35 -m 512 -nodefaults -S -numa node,memdev=a -numa node,memdev=b \
             -object memory-backend-memfd,id=b,size=256M,share=on -object memory-backend-memfd,id=a,size=256M,share=on",
        )
        .await;
        assert_memfds(&vm, &[("a", 256 * MIB, 0), ("b", 256 * MIB, 256 * MIB)]).await;
    })
    .await;
}

#[tokio::test]
async fn plugged_memory_is_told_and_a_backend_without_a_use_is_not() {
    with_each_qemu(|qemu| async move {
        let vm = start(
            &qemu,
            "-M q35,memory-backend=ram0 -m 512M,slots=4,maxmem=2G -nodefaults -S \
             -object memory-backend-memfd,id=ram0,size=512M,share=on",
        )
        .await;
        plug_dimm(&vm.launched.qmp).await;
        assert_memfds(&vm, &[("ram0", 512 * MIB, 0), ("more", 256 * MIB, 4 * GIB)]).await;
    })
    .await;
}

#[tokio::test]
async fn old_machine_types_name_their_ram_in_another_way() {
    with_each_qemu(|qemu| async move {
        let vm = start(
            &qemu,
            "-M pc,memory-backend=ram0 -m 64 -nodefaults -S \
             -object memory-backend-memfd,id=ram0,size=64M,share=on,x-use-canonical-path-for-ramblock-id=on",
        )
        .await;
        assert_memfds(&vm, &[("ram0", 64 * MIB, 0)]).await;
    })
    .await;
}

#[tokio::test]
async fn anonymous_and_huge_pages_are_obstacles() {
    with_each_qemu(|qemu| async move {
        let vm = start(&qemu, "-M q35 -m 64 -nodefaults -S").await;
        let layout = ram_backends(&vm.launched.qmp).await.unwrap();
        let [ram] = layout.backends.as_slice() else { panic!("{layout:?}") };
        assert_eq!((&ram.kind, ram.shared, ram.size), (&BackendKind::Ram, false, 64 * MIB));
        assert!(!mapping_at(&vm, ram.address.unwrap()).shared);
        let anonymous = Obstacle::NotShared { backend: "pc.ram".into() };
        assert_eq!(obstacles(&vm).await, std::slice::from_ref(&anonymous));

        // Without reserve there need be no huge pages, as long as nobody touches them.
        let vm = start(
            &qemu,
            "-M q35 -m 64M,slots=1,maxmem=1G -nodefaults -S -device pc-dimm,memdev=huge -object \
             memory-backend-memfd,id=huge,size=128M,share=on,hugetlb=on,hugetlbsize=2M,reserve=off",
        )
        .await;
        let huge = Obstacle::HugePages { backend: "huge".into(), page_size: 2 * MIB };
        let found = obstacles(&vm).await;
        assert!(found.len() == 2 && found.contains(&huge) && found.contains(&anonymous), "{found:?}");
    })
    .await;
}

#[tokio::test]
async fn devices_that_share_or_change_ram_are_obstacles() {
    with_each_qemu(|qemu| async move {
        let vm = start(
            &qemu,
            "-M q35,memory-backend=ram0 -m 64M,maxmem=1G -nodefaults -S \
             -object memory-backend-memfd,id=ram0,size=64M,share=on \
             -object memory-backend-memfd,id=both,size=16M,share=on \
             -object memory-backend-memfd,id=elastic,size=128M,share=on \
             -device pcie-root-port,id=bridge,chassis=1 -device ivshmem-plain,id=between,memdev=both,bus=bridge \
             -device virtio-mem-pci,memdev=elastic",
        )
        .await;
        let between = Obstacle::OtherProcess { what: "between (ivshmem-plain)".into() };
        let elastic = Obstacle::Resized { what: "a virtio-mem-pci".into() };
        assert_eq!(obstacles(&vm).await, [between, elastic]);
    })
    .await;
}

/// Says of itself that it can do nothing, which is enough for QEMU to start. See QEMU's docs/interop/vhost-user.rst.
fn serve_vhost_user(mut qemu: UnixStream) -> std::io::Result<()> {
    const GET_FEATURES: u32 = 1;
    const VERSION_AND_REPLY: u32 = 1 | 1 << 2;
    loop {
        let mut header = [0; 12];
        qemu.read_exact(&mut header)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        qemu.read_exact(&mut vec![0; word(8) as usize])?;
        if word(0) == GET_FEATURES {
            let reply = [GET_FEATURES, VERSION_AND_REPLY, 8, 0, 0].map(u32::to_le_bytes);
            qemu.write_all(reply.as_flattened())?;
        }
    }
}

#[tokio::test]
async fn a_netdev_of_another_process_is_an_obstacle() {
    with_each_qemu(|qemu| async move {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vhost.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || serve_vhost_user(listener.accept().unwrap().0));
        let vm = start(
            &qemu,
            &format!(
                "-M q35,memory-backend=ram0 -m 64M -nodefaults -S -object memory-backend-memfd,id=ram0,size=64M,share=on \
                 -netdev user,id=near -device virtio-net-pci,netdev=near \
                 -chardev socket,id=vhost,path={} -netdev vhost-user,id=far,chardev=vhost \
                 -device virtio-net-pci,netdev=far",
                socket.display()
            ),
        )
        .await;
        assert_eq!(obstacles(&vm).await, [Obstacle::OtherProcess { what: "netdev far (vhost-user)".into() }]);
    })
    .await;
}

#[tokio::test]
async fn disks_without_the_hosts_cache_are_seen() {
    with_each_qemu(|qemu| async move {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let disk = dir.path().join("disk.raw");
        File::create(&disk).unwrap().set_len(MIB).unwrap();
        let disk = disk.display();
        let drive = format!("-drive if=virtio,format=raw,file={disk},cache");
        let file = format!("-blockdev driver=file,node-name=d0,filename={disk},cache.direct");
        for (disks, direct) in [
            (String::new(), false),
            (format!("{drive}=writeback"), false),
            (format!("{drive}=none"), true),
            (format!("{file}=off -device virtio-blk-pci,drive=d0"), false),
            (format!("{file}=on -device virtio-blk-pci,drive=d0"), true),
        ] {
            let vm = start(&qemu, &format!("-M q35 -m 16 -nodefaults -S {disks}")).await;
            assert_eq!(uses_direct_io(&vm.launched.qmp).await.unwrap(), direct, "{disks}");
        }
    })
    .await;
}
