//! Command lines as people write them.

use super::*;

fn parse(line: &str) -> CommandLine {
    CommandLine::parse(&words(line)).unwrap()
}

/// Splits at blanks; these tests need no quotes.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn files(line: &str) -> Vec<(String, String, FileKind)> {
    let uses = parse(&format!("qemu {line}")).files();
    uses.into_iter().map(|file| (file.path.display().to_string(), file.option, file.kind)).collect()
}

fn disk(format: Option<&str>) -> FileKind {
    FileKind::Disk { format: format.map(str::to_owned) }
}

#[test]
fn one_dash_and_two_are_the_same() {
    let line = parse("qemu-system-x86_64 --machine q35 -M smm=off --m 64 -nographic --enable-kvm disk.img");
    assert_eq!(line.binary(), "qemu-system-x86_64");
    assert_eq!(line.values("-machine").collect::<Vec<_>>(), ["q35", "smm=off"]);
    assert_eq!(line.values("M").count(), 2);
    assert!(line.has("nographic") && line.has("--enable-kvm") && !line.has("daemonize"));
    assert_eq!(line.values("hda").collect::<Vec<_>>(), ["disk.img"]);
}

#[test]
fn an_option_takes_the_next_word_whatever_it_looks_like() {
    let line = parse("qemu -append -nographic -S -no-reboot x.img -name a");
    assert_eq!(line.values("append").collect::<Vec<_>>(), ["-nographic"]);
    assert!(!line.has("nographic") && line.has("S") && line.has("no-reboot"));
    assert_eq!(line.values("name").collect::<Vec<_>>(), ["a"]);
}

#[test]
fn an_option_without_its_argument_is_named() {
    let error = CommandLine::parse(&words("qemu -m 64 --drive")).unwrap_err();
    assert!(error.to_string().contains("--drive"), "{error}");
    assert!(matches!(CommandLine::parse(&[]), Err(CommandLineError::Empty)));
}

#[test]
fn broken_json_is_refused_with_the_option() {
    let error = CommandLine::parse(&words(r#"qemu -blockdev {"driver":"#)).unwrap_err();
    assert!(matches!(&error, CommandLineError::BadJson { option, .. } if option == "-blockdev"), "{error}");
}

#[test]
fn what_starts_no_guest_of_ours_is_refused() {
    for line in
        ["-incoming defer", "--preconfig", "-h", "--help", "-version", "-machine help", "-cpu ?", "-readconfig x"]
    {
        let error = parse(&format!("qemu -m 64 {line}")).check_runnable().unwrap_err();
        assert!(error.to_string().contains(line), "{line}: {error}");
    }
    for line in ["-daemonize", "-loadvm a", "-S", "-name help"] {
        parse(&format!("qemu {line}")).check_runnable().unwrap();
    }
}

#[test]
fn memory_is_what_qemu_makes_of_it() {
    for (option, expected) in [
        ("", 128 << 20),
        ("-m 64", 64 << 20),
        ("-m 4G", 4 << 30),
        ("-m 4g,slots=2,maxmem=8G", 4 << 30),
        ("-m size=1.5G", 3 << 29),
        ("-m 512K", 512 << 10),
        ("-m 1T", 1 << 40),
        ("-m 8193B", 16384),
        ("-m 0", 128 << 20),
        ("-m slots=2,maxmem=8G", 128 << 20),
        ("-m 64 -m 128", 128 << 20),
        ("-m 64 -m maxmem=1G", 64 << 20),
    ] {
        assert_eq!(parse(&format!("qemu {option}")).memory_size().unwrap(), expected, "{option}");
    }
    for bad in ["-m 4X", "-m GG", "-m 99999999999999999999", "-m 4GB"] {
        let error = parse(&format!("qemu {bad}")).memory_size().unwrap_err();
        assert!(error.to_string().contains("-m"), "{bad}: {error}");
    }
}

#[test]
fn the_cpu_model_stands_before_its_features() {
    assert_eq!(parse("qemu -cpu host,-avx").cpu_model(), Some("host"));
    assert_eq!(parse("qemu -m 1").cpu_model(), None);
}

#[test]
fn accelerators_come_from_three_options() {
    for (option, expected) in [
        ("", &[][..]),
        ("-accel tcg,thread=multi", &["tcg"]),
        ("-accel kvm -accel tcg", &["kvm", "tcg"]),
        ("-accel accel=kvm", &["kvm"]),
        ("-machine q35,accel=kvm:tcg", &["kvm", "tcg"]),
        ("-enable-kvm", &["kvm"]),
    ] {
        assert_eq!(parse(&format!("qemu {option}")).accelerators(), expected, "{option}");
    }
}

#[test]
fn every_way_to_name_a_file_is_known() {
    let one = |path: &str, option: &str, kind| vec![(path.to_owned(), option.to_owned(), kind)];
    for (line, expected) in [
        ("-kernel k", one("k", "-kernel", FileKind::ReadOnly)),
        ("-initrd a,b", one("a,b", "-initrd", FileKind::ReadOnly)),
        ("-machine q35,kernel=k", one("k", "-machine", FileKind::ReadOnly)),
        ("-bios ./b.bin", one("./b.bin", "-bios", FileKind::ReadOnly)),
        ("-pflash p", one("p", "-pflash", disk(None))),
        ("d.img", one("d.img", "disk image", disk(None))),
        ("-hda d.img", one("d.img", "-hda", disk(None))),
        ("-cdrom c.iso", one("c.iso", "-cdrom", FileKind::ReadOnly)),
        ("-drive file=a,,b.img,if=virtio", one("a,b.img", "-drive", disk(None))),
        ("-drive file=a,format=qcow2", one("a", "-drive", disk(Some("qcow2")))),
        ("-drive driver=qcow2,file.driver=file,file.filename=a", one("a", "-drive", disk(Some("qcow2")))),
        ("-drive file=file:a,readonly=on", one("a", "-drive", FileKind::ReadOnly)),
        ("-drive if=pflash,readonly,file=/ovmf.fd", one("/ovmf.fd", "-drive", FileKind::ReadOnly)),
        ("-drive file=a,media=cdrom", one("a", "-drive", FileKind::ReadOnly)),
        ("-device ide-cd,drive=x -drive if=none,id=x,file=a", one("a", "-drive", FileKind::ReadOnly)),
        (
            r#"-drive file=json:{"driver":"raw",,"file":{"driver":"file",,"filename":"a"}}"#,
            one("a", "-drive", disk(Some("raw"))),
        ),
        (
            r#"-blockdev {"driver":"qcow2","file":{"driver":"file","filename":"a,b"}}"#,
            one("a,b", "-blockdev", disk(Some("qcow2"))),
        ),
        ("-blockdev raw,node-name=r,file.driver=file,file.filename=a", one("a", "-blockdev", disk(Some("raw")))),
        ("-blockdev file,filename=a,read-only=on", one("a", "-blockdev", FileKind::ReadOnly)),
        ("-blockdev file,node-name=f,filename=a -blockdev qcow2,file=f", one("a", "-blockdev", disk(Some("qcow2")))),
        (
            "-blockdev file,node-name=f,filename=a -blockdev raw,file=f,read-only=on",
            one("a", "-blockdev", FileKind::ReadOnly),
        ),
        (
            "-blockdev file,node-name=f,filename=a -blockdev raw,node-name=r,file=f -device scsi-cd,drive=r",
            one("a", "-blockdev", FileKind::ReadOnly),
        ),
        ("-blockdev host_device,filename=/dev/sdb", one("/dev/sdb", "-blockdev", disk(None))),
        ("-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x", one("/dev/shm/x", "-object", FileKind::Ram)),
        (r#"-object {"qom-type":"secret","id":"s","file":"key"}"#, one("key", "-object", FileKind::Private)),
        ("-object tls-creds-x509,id=t,dir=/pki", one("/pki", "-object", FileKind::Private)),
        ("-fw_cfg name=opt/x,file=f", one("f", "-fw_cfg", FileKind::ReadOnly)),
        ("-fw_cfg opt/x,string=f", vec![]),
        ("-smbios type=1,serial=x", vec![]),
        ("-acpitable file=t", one("t", "-acpitable", FileKind::ReadOnly)),
        ("-device loader,file=l", one("l", "-device", FileKind::ReadOnly)),
        ("-device virtio-net-pci,romfile=", vec![]),
        ("-device virtio-net-pci,romfile=efi-virtio.rom", vec![]),
        ("-device e1000,romfile=/r", one("/r", "-device", FileKind::ReadOnly)),
        ("-device vfio-pci,host=01:00.0,sysfsdev=/sys/x", vec![]),
        ("-drive if=none,id=x", vec![]),
        ("-mem-path /dev/hugepages", one("/dev/hugepages", "-mem-path", FileKind::Ram)),
    ] {
        assert_eq!(files(line), expected, "{line}");
    }
}

#[test]
fn a_backing_file_is_only_read() {
    let line = r#"-blockdev {"driver":"qcow2","file":{"driver":"file","filename":"top"},"backing":{"driver":"qcow2","file":{"driver":"file","filename":"base"}}}"#;
    let mut found = files(line);
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(found[0], ("base".into(), "-blockdev".into(), FileKind::ReadOnly));
    assert_eq!(found[1], ("top".into(), "-blockdev".into(), disk(Some("qcow2"))));
}

#[test]
fn disks_behind_a_protocol_are_no_files() {
    for (line, expected) in [
        ("-drive file=nbd://host/x", "nbd://host/x"),
        ("-hda nbd:unix:/run/x.sock", "nbd:unix:/run/x.sock"),
        ("-drive file=nbd+unix:///x?socket=/run/x", "nbd+unix:///x?socket=/run/x"),
        ("-drive file=rbd:pool/image,format=raw", "rbd:pool/image"),
        (
            "-blockdev nbd,node-name=n,server.type=unix,server.path=/s",
            "driver=nbd,node-name=n,server.type=unix,server.path=/s",
        ),
        ("-drive file.driver=iscsi,file.portal=p,format=raw", "driver=iscsi,portal=p"),
    ] {
        assert_eq!(parse(&format!("qemu {line}")).remote_disks(), [expected], "{line}");
        assert_eq!(files(line), [], "{line}");
    }
    for line in ["-drive file=fat:rw:/x", "-drive file=null-co://", "-drive file=a"] {
        assert!(parse(&format!("qemu {line}")).remote_disks().is_empty(), "{line}");
    }
}

#[test]
fn snapshots_are_seen() {
    assert!(parse("qemu -snapshot").snapshot());
    assert!(parse("qemu -drive file=a,snapshot=on").snapshot());
    assert!(!parse("qemu -drive file=a,snapshot=off").snapshot());
}

#[test]
fn huge_pages_are_seen_with_their_size() {
    let memfd = "qemu -object memory-backend-memfd,id=ram,size=1G,hugetlb=on";
    assert_eq!(parse(memfd).huge_page(), Some(2 << 20));
    assert_eq!(parse(&format!("{memfd},hugetlbsize=1G")).huge_page(), Some(1 << 30));
    assert_eq!(parse("qemu -object memory-backend-memfd,id=ram,size=1G").huge_page(), None);
}
