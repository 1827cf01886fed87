//! Our client, their servers.

use vmferry_nbd::client::{Client, ClientError, Remote, list};
use vmferry_nbd::copy::{How, Progress, copy};
use vmferry_nbd::uri::{Place, Uri};
use vmferry_nbd::{ErrorCode, Headers};

use super::*;

const HOW: How = How { requests: 8, target_is_zero: false };

fn place(bed: &Bed, socket: &str) -> Place {
    Place::Unix(bed.path(socket))
}

fn connect(bed: &Bed, connections: usize) -> Remote {
    Remote::connect(&place(bed, "theirs"), None, "", connections).unwrap()
}

/// Copies all out of it and back into another.
fn there_and_back(bed: &Bed, connections: usize) {
    bed.empty("out");
    copy(&connect(bed, connections), &*bed.file("out", Access::Write), HOW, &Progress::default()).unwrap();
    bed.assert_same("image", "out");
    assert!(bed.allocated("out") <= bed.allocated("image") + MIB);
}

#[test]
fn a_qemu_nbd_is_copied_from_and_to() {
    if !there(&["qemu-nbd"]) {
        return;
    }
    let bed = Bed::new();
    let (image, socket) = (bed.text("image"), bed.text("theirs"));
    {
        let _theirs = bed.start("theirs", "qemu-nbd", &["-t", "-r", "-e", "4", "-f", "raw", "-k", &socket, &image]);
        assert_eq!(connect(&bed, 1).session().headers, Headers::Structured);
        for connections in [1, 4] {
            there_and_back(&bed, connections);
        }
        assert_eq!(list(&place(&bed, "theirs"), None).unwrap().len(), 1);
    }
    bed.empty("target");
    std::fs::remove_file(bed.path("theirs")).unwrap();
    let target = bed.text("target");
    let arguments = ["-t", "-e", "4", "-f", "raw", "--discard=unmap", "-k", &socket, &target];
    let theirs = bed.start("theirs", "qemu-nbd", &arguments);
    copy(&*bed.file("image", Access::Read), &connect(&bed, 4), HOW, &Progress::default()).unwrap();
    drop(theirs);
    bed.assert_same("image", "target");
    assert!(bed.allocated("target") <= bed.allocated("image") + MIB);
}

#[test]
fn an_nbdkit_is_copied_from_whatever_blocks_it_wants() {
    if !there(&["nbdkit"]) {
        return;
    }
    for policy in [
        &[][..],
        &["blocksize-minimum=4096", "blocksize-error-policy=error"],
        &["blocksize-minimum=65536", "blocksize-preferred=65536", "blocksize-error-policy=error"],
        &["blocksize-maximum=64K", "blocksize-preferred=4096", "blocksize-error-policy=error"],
    ] {
        let bed = Bed::new();
        let (image, socket) = (bed.text("image"), bed.text("theirs"));
        let filter = if policy.is_empty() { &[][..] } else { &["--filter=blocksize-policy"] };
        let arguments = [&["-f", "-r", "-U", &socket], filter, &["file", &image], policy].concat();
        let _nbdkit = bed.start("theirs", "nbdkit", &arguments);
        there_and_back(&bed, 4);
    }
}

#[test]
fn an_nbdkit_that_is_slow_is_waited_for() {
    if !there(&["nbdkit"]) {
        return;
    }
    let bed = Bed::new();
    let (image, socket) = (bed.text("image"), bed.text("theirs"));
    let arguments = ["-f", "-r", "-U", &socket, "--filter=delay", "file", &image, "delay-read=20ms"];
    let _nbdkit = bed.start("theirs", "nbdkit", &arguments);
    there_and_back(&bed, 2);
}

#[test]
fn an_nbdkit_that_fails_makes_the_copy_fail() {
    if !there(&["nbdkit"]) {
        return;
    }
    let bed = Bed::new();
    let (image, socket) = (bed.text("image"), bed.text("theirs"));
    let arguments =
        ["-f", "-U", &socket, "--filter=error", "file", &image, "error-pread=ENOSPC", "error-pread-rate=50%"];
    let _nbdkit = bed.start("theirs", "nbdkit", &arguments);
    bed.empty("out");
    let error = copy(&connect(&bed, 4), &*bed.file("out", Access::Write), HOW, &Progress::default()).unwrap_err();
    let error = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.contains("cannot read"), "{error}");
    let client = Client::connect(&place(&bed, "theirs"), None, "").unwrap();
    let failed = (0..1000).find_map(|_| client.read(0, vec![0; 4096]).err()).expect("half of them fail");
    assert!(matches!(failed, ClientError::Failed { source, .. } if source.error == ErrorCode::NoSpace));
}

#[test]
fn a_server_that_ends_is_noticed_by_all_who_wait() {
    if !there(&["nbdkit"]) {
        return;
    }
    let bed = Bed::new();
    let socket = bed.text("theirs");
    let arguments = ["-f", "-U", &socket, "--filter=delay", "memory", "1M", "delay-read=100"];
    let nbdkit = bed.start("theirs", "nbdkit", &arguments);
    let client = Client::connect(&place(&bed, "theirs"), None, "").unwrap();
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| client.read(0, vec![0; 512]))).collect();
        drop(nbdkit);
        for it in waiting {
            assert!(matches!(it.join().unwrap(), Err(ClientError::Lost(_))));
        }
    });
    assert!(matches!(client.write(0, &[0; 512]), Err(ClientError::Lost(_))));
}

#[test]
fn a_uri_leads_to_ours_over_tcp() {
    let bed = Bed::new();
    let served = Served { name: "d i".into(), description: String::new(), backend: bed.file("image", Access::Read) };
    let listening =
        Listening::begin(Server::new(vec![served], None), &Where::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let uri: Uri = format!("nbd://{}/d%20i", listening.at()).parse().unwrap();
    let remote = Remote::connect(&uri.place, None, &uri.export, 3).unwrap();
    assert_eq!((remote.session().headers, remote.connections()), (Headers::Extended, 3));
    bed.empty("out");
    copy(&remote, &*bed.file("out", Access::Write), HOW, &Progress::default()).unwrap();
    bed.assert_same("image", "out");
}
