//! Their clients, our server.

use super::*;

#[test]
fn nbdinfo_sees_what_there_is() {
    if !there(&["nbdinfo"]) {
        return;
    }
    let bed = Bed::new();
    let (_listening, uri) = bed.serve("image", Access::Write);
    let told = run("nbdinfo", &[&uri]);
    for line in [
        "using structured packets",
        "export-size: 67108864",
        "base:allocation",
        "can_fast_zero: true",
        "can_multi_conn: true",
        "block_size_maximum: 33554432",
        "description: a disk",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    let listed = run("nbdinfo", &["--list", &format!("nbd+unix://?socket={}", bed.text("socket"))]);
    assert!(listed.contains("export=\"disk\""), "{listed}");
    let map = run("nbdinfo", &["--map", &uri]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
}

#[test]
fn nbdcopy_copies_out_of_it_and_into_it_and_holes_stay() {
    if !there(&["nbdcopy"]) {
        return;
    }
    let bed = Bed::new();
    bed.empty("target");
    for connections in ["1", "4"] {
        let out = bed.text("out");
        let (listening, uri) = bed.serve("image", Access::Read);
        run("nbdcopy", &["-C", connections, &uri, &out]);
        bed.assert_same("image", "out");
        drop(listening);
        let (_listening, uri) = bed.serve("target", Access::Write);
        run("nbdcopy", &["-C", connections, "--flush", &bed.text("image"), &uri]);
        bed.assert_same("image", "target");
    }
    assert!(bed.allocated("target") <= bed.allocated("image") + MIB);
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    if !there(&["qemu-img"]) {
        return;
    }
    let bed = Bed::new();
    bed.empty("target");
    {
        let (_listening, uri) = bed.serve("image", Access::Read);
        let map = run("qemu-img", &["map", "--output=json", &uri]);
        assert!(map.contains("\"data\": false") && map.contains("\"data\": true"), "{map}");
        run("qemu-img", &["convert", "-O", "qcow2", &uri, &bed.text("qcow2")]);
    }
    let (listening, uri) = bed.serve("target", Access::Write);
    run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-O", "raw", &bed.text("qcow2"), &uri]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &bed.text("qcow2"), &uri]);
    drop(listening);
    bed.assert_same("image", "target");
    assert!(bed.allocated("target") <= bed.allocated("image") + MIB);
}

#[test]
fn qemus_block_layer_writes_zeroes_discards_and_flushes() {
    if !there(&["qemu-io"]) {
        return;
    }
    let bed = Bed::new();
    bed.empty("target");
    let (listening, uri) = bed.serve("target", Access::Write);
    let told = run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-d",
            "unmap",
            "-c",
            "write -P 7 0 8M",
            "-c",
            "write -f -P 9 512 1024",
            "-c",
            "read -P 9 512 1024",
            "-c",
            "write -z 1M 1M",
            "-c",
            "write -z -u 2M 1M",
            "-c",
            "discard 4M 1M",
            "-c",
            "flush",
            "-c",
            "read -P 0 1M 2M",
            "-c",
            "read -P 7 3M 1M",
            "-c",
            "read -P 0 4M 1M",
            "-c",
            "read -P 7 5M 3M",
            &uri,
        ],
    );
    assert!(!told.contains("failed"), "{told}");
    drop(listening);
    assert!(bed.allocated("target") <= 6 * MIB + 65536, "{}", bed.allocated("target"));
}

#[test]
fn a_read_only_export_is_read_only_to_everybody() {
    if !there(&["qemu-io", "nbdcopy"]) {
        return;
    }
    let bed = Bed::new();
    let before = std::fs::read(bed.path("image")).unwrap();
    let (_listening, uri) = bed.serve("image", Access::Read);
    assert!(!attempt("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]).0);
    assert!(!attempt("nbdcopy", &[&bed.text("image"), &uri]).0);
    assert!(std::fs::read(bed.path("image")).unwrap() == before);
}

#[test]
fn a_qemu_and_we_never_have_the_same_image() {
    if !there(&["qemu-io", "qemu-nbd"]) {
        return;
    }
    let bed = Bed::new();
    let ours = bed.file("image", Access::Write);
    let (opened, said) = attempt("qemu-io", &["-f", "raw", "-c", "read 0 4k", &bed.text("image")]);
    assert!(!opened && said.contains("lock"), "{said}");
    drop(ours);
    let (image, socket) = (bed.text("image"), bed.text("theirs"));
    let _theirs = bed.start("theirs", "qemu-nbd", &["-t", "-f", "raw", "-k", &socket, &image]);
    // It listens before it opens the image, and answers after that.
    run("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512", &format!("nbd+unix:///?socket={socket}")]);
    for access in [Access::Write, Access::Read] {
        let error = File::open(&bed.path("image"), access).err().unwrap();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("another process"), "{error}");
    }
}

#[test]
fn fio_reads_and_writes_and_finds_what_it_wrote() {
    if !there(&["fio"]) || !run("fio", &["--enghelp"]).contains("nbd") {
        eprintln!("skipped: this fio has no nbd engine");
        return;
    }
    let bed = Bed::new();
    bed.empty("target");
    let (_listening, uri) = bed.serve("target", Access::Write);
    let job = format!(
        "[job]\nioengine=nbd\nuri={uri}\nrw=randwrite\nbs=4k-64k\niodepth=16\nsize=64M\nverify=crc32c\nverify_fatal=1\nverify_state_save=0\n"
    );
    std::fs::write(bed.path("job"), job).unwrap();
    let told = run("fio", &[&bed.text("job")]);
    assert!(told.contains("err= 0"), "{told}");
}

#[test]
fn nbd_clients_userland_lists_exports() {
    if !there(&["/usr/sbin/nbd-client"]) {
        return;
    }
    let bed = Bed::new();
    let (_listening, _) = bed.serve("image", Access::Read);
    let told = run("/usr/sbin/nbd-client", &["-l", "-u", &bed.text("socket")]);
    assert!(told.contains("disk"), "{told}");
}

#[test]
fn nbdkit_serves_ours_again_with_the_blocks_that_its_policy_wants() {
    if !there(&["nbdkit", "nbdcopy"]) {
        return;
    }
    let bed = Bed::new();
    let (_listening, uri) = bed.serve("image", Access::Read);
    let socket = bed.text("theirs");
    let policy = ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"];
    let arguments = [&["-f", "-r", "-U", &socket, policy[0], "nbd", &uri], &policy[1..]].concat();
    let _nbdkit = bed.start("theirs", "nbdkit", &arguments);
    run("nbdcopy", &[&format!("nbd+unix:///?socket={socket}"), &bed.text("out")]);
    bed.assert_same("image", "out");
}
