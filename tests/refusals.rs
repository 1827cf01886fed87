//! What cannot be done is refused with words that name it, and the guest never notices.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use vmferry_agent::peers::{Content, Offer, Plug};
use vmferry_bench::Mode;
use vmferry_bench::testbed::{TestbedOptions, two_qemus};

use crate::bed::{self, Bed, VM, guest, options, text};

/// Refused with this exit code and these words, and the guest at the source never stopped.
async fn assert_refused(bed: &Bed, output: &Output, code: i32, words: &[&str]) {
    let said = text(output);
    assert_eq!(output.status.code(), Some(code), "{said}\n{}", bed.logs());
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert_eq!(bed.view(0).await.state, "running");
    bed.assert_never_stopped().await;
}

async fn busy_guest() -> Bed {
    bed::start(options(), guest(Mode::Write)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_vm_is_refused() {
    let bed = busy_guest().await;
    let output = bed.alpha().vmferry(&["migrate", "web2", "--to", &bed.to()]).await.expect("runs");
    assert_refused(&bed, &output, 3, &["no VM named web2", "vmferry list"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_does_not_answer_is_refused() {
    let bed = busy_guest().await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let output = bed.alpha().vmferry(&["migrate", VM, "--to", &nobody.to_string()]).await.expect("runs");
    assert_refused(&bed, &output, 3, &["cannot reach an agent at", &nobody.to_string(), "vmferry agent"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_name_is_nonsense_is_refused() {
    let bed = busy_guest().await;
    let output = bed.alpha().vmferry(&["migrate", VM, "--to", "not a host"]).await.expect("runs");
    assert_refused(&bed, &output, 3, &["names no host", "HOST:PORT"]).await;
    let output = bed.alpha().vmferry(&["migrate", VM, "--to", "no-such-host.invalid"]).await.expect("runs");
    assert_refused(&bed, &output, 3, &["cannot reach an agent at no-such-host.invalid:7420"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_not_an_agent_is_refused() {
    let bed = busy_guest().await;
    for reply in ["HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "SSH-2.0-OpenSSH_9.2\r\n"] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let stranger = std::thread::spawn(move || {
            use std::io::{Read, Write};
            let (mut stream, _) = listener.accept().expect("somebody calls");
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(reply.as_bytes());
            std::thread::sleep(Duration::from_millis(200));
        });
        let output = bed.alpha().vmferry(&["migrate", VM, "--to", &address]).await.expect("runs");
        assert_refused(&bed, &output, 3, &["is not a vmferry agent", &address]).await;
        stranger.join().expect("the stranger ends");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_with_a_vm_of_that_name_is_refused() {
    let bed = busy_guest().await;
    let there = ["run", VM, "--", "qemu-system-x86_64", "-machine", "q35", "-m", "64", "-S"];
    let output = bed.beta().vmferry(&there).await.expect("runs");
    assert!(output.status.success(), "{}", text(&output));
    let output = bed.migrate(&[]).await;
    assert_refused(&bed, &output, 3, &["a VM named web1 exists on beta"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_with_too_little_memory_is_refused() {
    let config = [String::new(), "reserved_memory = \"1TiB\"".into()];
    let bed = bed::start(TestbedOptions { config, ..options() }, guest(Mode::Write)).await;
    let output = bed.migrate(&[]).await;
    assert_refused(&bed, &output, 3, &["beta cannot take web1", "MiB", "reserved_memory"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_without_that_qemu_is_refused() {
    // The guest's QEMU has a name of its own, which only alpha's folder knows.
    let dir = tempfile::tempdir().expect("a folder");
    let system = "/usr/bin/qemu-system-x86_64";
    std::os::unix::fs::symlink(system, dir.path().join("qemu-special")).expect("a link");
    let options = TestbedOptions { qemu_dirs: [Some(dir.path().into()), None], ..options() };
    let bed = bed::start_as(options, guest(Mode::Write), "qemu-special").await;
    let output = bed.migrate(&[]).await;
    assert_refused(&bed, &output, 3, &["qemu-special was not found on beta", "qemu_dirs"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_qemu_lacks_the_cpu_model_is_refused() {
    let models = |dir: &Option<std::path::PathBuf>| {
        let binary = dir.as_ref().map_or("qemu-system-x86_64".into(), |dir| dir.join("qemu-system-x86_64"));
        let output = std::process::Command::new(binary).args(["-cpu", "help"]).output().expect("QEMU runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = text.lines().filter_map(|line| line.strip_prefix("x86 ").or(line.strip_prefix("  ")));
        names.filter_map(|rest| rest.split_whitespace().next().map(str::to_owned)).collect::<Vec<_>>()
    };
    let [older, newer] = two_qemus().expect("two QEMUs");
    let (known, all) = (models(&older), models(&newer));
    let model = all.iter().find(|name| name.contains("-v") && !known.contains(name)).expect("a newer model");
    // The older machine type is in both, so that only the CPU model stands in the way.
    let options = TestbedOptions { qemu_dirs: [newer, older], ..options() };
    let bed = bed::start_with(options, guest(Mode::Write), &["-machine", "pc-q35-7.2", "-cpu", model]).await;
    let output = bed.migrate(&[]).await;
    assert_refused(&bed, &output, 3, &["lacks the CPU model", model]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_missing_at_the_destination_is_refused() {
    // The hosts share a file system, so the file goes after the VM has opened it.
    let dir = tempfile::tempdir().expect("a folder");
    let cdrom = dir.path().join("tools.iso");
    std::fs::write(&cdrom, vec![0; 1 << 20]).expect("written");
    let drive = format!("file={},media=cdrom,readonly=on,format=raw", cdrom.display());
    let bed = bed::start_with(options(), guest(Mode::Write), &["-drive", &drive]).await;
    std::fs::remove_file(&cdrom).expect("removed");
    let output = bed.migrate(&[]).await;
    assert_refused(&bed, &output, 3, &["beta cannot take web1", &cdrom.display().to_string(), "-drive"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_proven_to_be_shared_is_refused_unless_vouched_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("written");
    let drive = format!("file={},format=raw,if=virtio", disk.display());
    let bed = bed::start_with(options(), guest(Mode::Write), &["-drive", &drive]).await;
    // On one machine the disk is the same, and the marker proves it.
    let output = bed.migrate(&["--dry-run"]).await;
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 1, "the marker is gone again");
    // The same path leading elsewhere, as on a host with a disk of its own there, is no proof.
    let elsewhere = tempfile::tempdir().expect("a folder");
    let other = elsewhere.path().join("disk.raw");
    std::fs::write(&other, vec![0; 1 << 20]).expect("written");
    let offer = crate::api::offer_with_disk(&bed, &other).await;
    let refusal = crate::api::check(&bed, &offer).await.expect_err("there is no marker beside it");
    assert!(refusal.message.contains("is not the same file on both hosts"), "{}", refusal.message);
    let vouched = Offer { disks_are_shared: true, ..offer };
    crate::api::check(&bed, &vouched).await.expect("the user vouches for it");
    bed.assert_never_stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_reads_must_have_the_same_in_it_on_both_hosts() {
    let dir = tempfile::tempdir().expect("a folder");
    let iso = dir.path().join("tools.iso");
    std::fs::write(&iso, vec![7; 1 << 20]).expect("written");
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let offer = crate::api::offer_with_disk(&bed, &iso).await;
    let offer = Offer { disks: vec![], read_only: vec![iso.clone()], ..offer };
    let reply = crate::api::check(&bed, &offer).await.expect("it is only asked about");
    assert_eq!(reply.unproven, std::slice::from_ref(&iso));
    let with = |blake3: &str| {
        let content = Content { size: 1 << 20, blake3: blake3.into() };
        Offer { contents: [(iso.clone(), content)].into(), ..offer.clone() }
    };
    let same = blake3::hash(&vec![7; 1 << 20]).to_hex().to_string();
    let reply = crate::api::check(&bed, &with(&same)).await.expect("it is the same");
    assert!(reply.unproven.is_empty());
    let refusal = crate::api::check(&bed, &with(&"0".repeat(64))).await.expect_err("it is another");
    assert!(refusal.message.contains("tools.iso is another file there"), "{}", refusal.message);
    let vouched = Offer { disks_are_shared: true, ..with("") };
    crate::api::check(&bed, &vouched).await.expect("the user vouches for it");
    bed.assert_never_stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_or_a_socket_that_is_missing_at_the_destination_is_refused() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let offer = crate::api::offer_with_disk(&bed, Path::new("/none")).await;
    let offer = Offer { disks: vec![], ..offer };
    let plug = |interface: Option<&str>, bridge: &str| Plug {
        interface: interface.map(str::to_owned),
        bridge: Some(bridge.into()),
    };
    for (plug, words) in [
        (plug(None, "vmferry-none0"), "it lacks the bridge vmferry-none0"),
        (plug(Some("vmferry-none1"), "br0"), "it lacks the network interface vmferry-none1"),
        (plug(Some("lo"), "br0"), "lo is in no bridge there, and in the bridge br0 here"),
    ] {
        let refusal = crate::api::check(&bed, &Offer { networks: vec![plug], ..offer.clone() }).await;
        let refusal = refusal.expect_err("it is not there");
        assert!(refusal.message.contains(words), "{}", refusal.message);
    }
    let mut offer = offer;
    offer.spec.argv.extend(["-chardev".into(), "socket,id=tpm,path=/no/such/swtpm.sock".into()]);
    let refusal = crate::api::check(&bed, &offer).await.expect_err("nobody listens there");
    assert!(refusal.message.contains("/no/such/swtpm.sock (-chardev) cannot be used there"), "{}", refusal.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_not_written_when_its_guest_asks_for_that_is_refused_unless_vouched_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("written");
    let drive = format!("file={},format=raw,if=virtio,cache=unsafe", disk.display());
    let bed = bed::start_with(options(), guest(Mode::Idle), &["-drive", &drive]).await;
    let output = bed.migrate(&[]).await;
    assert_refused(&bed, &output, 3, &["cache=unsafe", "disk.raw", "--disks-are-shared"]).await;
    let output = bed.migrate(&["--disks-are-shared"]).await;
    assert!(output.status.success(), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_disk_changes_are_temporary_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("written");
    let drive = format!("file={},format=raw,if=virtio", disk.display());
    let bed = bed::start_with(options(), guest(Mode::Write), &["-snapshot", "-drive", &drive]).await;
    let output = bed.migrate(&[]).await;
    assert_refused(&bed, &output, 3, &["cannot be migrated", "temporary file", "snapshot"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_migration_of_the_same_vm_is_refused_and_the_first_goes_on() {
    let bed = busy_guest().await;
    let mut first = bed.begin_slow_migration().await;
    let output = bed.migrate(&[]).await;
    let said = text(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("web1 is being migrated") && said.contains("vmferry cancel web1"), "{said}");
    let output = bed.alpha().vmferry(&["stop", VM, "--force"]).await.expect("runs");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    bed.assert_never_stopped().await;
    assert!(first.wait().await.expect("it ends").success(), "{}", bed.logs());
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_that_make_no_sense_are_refused() {
    let bed = busy_guest().await;
    for (limit, code, word) in [
        (["--downtime", "0"], 3, "1 ms to 60 s"),
        (["--downtime", "-5ms"], 2, "300ms"),
        (["--downtime", "soon"], 2, "300ms"),
        (["--downtime", "3h"], 3, "1 ms to 60 s"),
        (["--max-time", "0"], 3, "1 s to 7 days"),
        (["--max-time", "1000years"], 3, "1 s to 7 days"),
        (["--bandwidth", "-1gbit"], 2, "1Gbit/s"),
        (["--bandwidth", "5kbit"], 3, "at least 1 MiB/s"),
    ] {
        let output = bed.migrate(&limit).await;
        assert_refused(&bed, &output, code, &[word]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_cannot_have_anything_started_but_a_qemu() {
    let bed = bed::start(options(), guest(Mode::Idle)).await;
    let mut offer = crate::api::offer_with_disk(&bed, "/nowhere".as_ref()).await;
    offer.disks.clear();
    offer.spec.argv[0] = "/bin/sh".into();
    let problem = crate::api::check(&bed, &offer).await.expect_err("that is no QEMU");
    assert!(problem.message.contains("is no QEMU"), "{problem:?}");
}
