use serde_json::json;

use super::*;

fn command(line: &str) -> CommandLine {
    let words: Vec<String> = ["qemu"].into_iter().chain(line.split(' ')).map(str::to_owned).collect();
    CommandLine::parse(&words).unwrap()
}

fn device(path: &str, driver: &str) -> Device {
    let id = path.strip_prefix("/machine/peripheral/").map(str::to_owned);
    Device { path: path.into(), id, driver: driver.into() }
}

fn drive(name: &str, device: &str, file: Option<&str>) -> Drive {
    let image = |file: &str| json!({ "image": { "filename": file, "format": "raw" }, "node-name": "#block1" });
    serde_json::from_value(json!({ "device": name, "qdev": device, "inserted": file.map(image) })).unwrap()
}

fn parts(devices: &[(&str, &str)], drives: Vec<Drive>) -> Parts {
    let node = |file: &str| {
        let told = json!({ "drv": "raw", "file": file, "node-name": "#block1", "cache": { "direct": false } });
        ("#block1".to_owned(), serde_json::from_value(told).unwrap())
    };
    let file = drives.iter().find_map(|it| Some(it.inserted.as_ref()?.image.filename.clone()));
    Parts {
        devices: devices.iter().map(|(path, driver)| device(path, driver)).collect(),
        objects: BTreeMap::new(),
        networks: BTreeMap::new(),
        forwards: BTreeMap::new(),
        usb_ports: BTreeMap::new(),
        chardevs: BTreeMap::new(),
        drives,
        nodes: file.iter().map(|file| node(file)).collect(),
        children: BTreeMap::new(),
        cpus: Vec::new(),
        memory: Vec::new(),
    }
}

/// What is made of these words; the first sight of the machine is not known.
fn followed(line: &str, parts: &Parts) -> Drift {
    let (command, objects, now) = (command(line), BTreeMap::new(), Inventory::default());
    let mut words = Words::new(&command, None, &now, parts, &objects);
    words.unplug();
    words.follow_disks(&[]);
    words.drop_what_is_gone();
    words.finish()
}

fn text(drift: &Drift) -> String {
    drift.argv[1..].join(" ")
}

#[test]
fn words_of_a_machine_that_was_not_changed_stay_as_they_are() {
    let line = "-M q35 -drive file=a,id=d,if=none -device virtio-blk,drive=d,id=v -serial stdio";
    let same = parts(&[("/machine/peripheral/v", "virtio-blk-pci")], vec![drive("d", "v", Some("a"))]);
    let drift = followed(line, &same);
    assert_eq!(text(&drift), line);
    assert!(!drift.is_any());
}

#[test]
fn a_device_that_was_taken_out_goes_with_what_only_it_has_used() {
    let line =
        "-netdev user,id=n -device virtio-net-pci,netdev=n,id=card -netdev user,id=m -device e1000,netdev=m,id=other";
    let mut rest = parts(&[("/machine/peripheral/other", "e1000")], vec![]);
    // That the other's back end is not told must not take it away.
    rest.networks.clear();
    let drift = followed(line, &rest);
    assert_eq!(text(&drift), "-netdev user,id=m -device e1000,netdev=m,id=other");
    assert_eq!(drift.carried, ["virtio-net-pci card was taken out"]);
}

#[test]
fn a_drive_holds_what_is_in_it_now_however_it_was_said() {
    for (line, name, file, expected) in [
        (
            "-drive file=/a,id=d,if=none,aio=native",
            "d",
            Some("/b,c"),
            "-drive id=d,if=none,aio=native,file=/b,,c,format=raw",
        ),
        ("-drive file.filename=/a,format=qcow2,id=d", "d", None, "-drive id=d"),
    ] {
        let drift = followed(line, &parts(&[], vec![drive(name, "x", file)]));
        // Nothing is known of what was in it at first, so that only a plain path tells.
        let tells = line.contains("file=/a");
        assert_eq!(text(&drift), if tells { expected } else { line }, "{line}");
    }
    assert_eq!(disks::by_name("ide2-cd0").unwrap().to_string(), "if=ide,bus=2,unit=0,media=cdrom");
    assert_eq!(disks::by_name("floppy1").unwrap().to_string(), "if=floppy,index=1");
    assert!(disks::by_name("virtio0").is_none() && disks::by_name("floppyx").is_none());
}

#[test]
fn devices_without_an_id_are_in_the_order_in_which_qemu_makes_them() {
    let line = r#"-drive file=a,if=virtio -device {"driver":"e1000"} -device virtio-rng-pci -device x,id=y"#;
    let drivers: Vec<String> = nameless(&command(line)).into_iter().map(|(_, driver)| driver).collect();
    assert_eq!(drivers, ["virtio-rng-pci", "virtio-blk-pci", "e1000"]);
    assert_eq!(number_of("/machine/peripheral-anon/device[12]"), Some(12));
}

#[test]
fn a_device_comes_after_the_one_whose_bus_it_is_on() {
    let [disk, host, port] = [("a", "scsi-hd"), ("z", "virtio-scsi-pci"), ("p", "pcie-root-port")]
        .map(|(id, driver)| device(&format!("/machine/peripheral/{id}"), driver));
    let on = |bus: &str| Given { properties: vec![("bus".into(), bus.into())], unspeakable: vec![] };
    let given =
        [(disk.path.clone(), on("z.0")), (host.path.clone(), on("p")), (port.path.clone(), on("pcie.0"))].into();
    let sorted: Vec<&str> = by_bus(vec![&disk, &host, &port], &given).iter().map(|it| it.driver.as_str()).collect();
    assert_eq!(sorted, ["pcie-root-port", "virtio-scsi-pci", "scsi-hd"]);
}
