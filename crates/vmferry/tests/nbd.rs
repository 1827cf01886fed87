//! `vmferry nbd`, as its user sees it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn vmferry(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmferry")).arg("nbd").args(arguments).current_dir(folder).output().unwrap()
}

/// What it prints; it has to succeed.
#[track_caller]
fn done(arguments: &[&str], folder: &Path) -> String {
    let output = vmferry(arguments, folder);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Its exit code and what it says.
fn refused(arguments: &[&str], folder: &Path) -> (i32, String) {
    let output = vmferry(arguments, folder);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

struct Serving {
    child: Child,
    uris: Vec<String>,
}

impl Serving {
    fn start(arguments: &[&str], uris: usize, folder: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmferry"))
            .args(["nbd", "serve"])
            .args(arguments)
            .current_dir(folder)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let uris = lines.take(uris).map(Result::unwrap).collect();
        Self { child, uris }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn image(path: &Path) {
    let mut bytes = vec![0; 8 << 20];
    bytes[1 << 20..3 << 20].fill(7);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_is_served_is_told_and_copied_with_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    image(&path("a disk.raw"));
    image(&path("other"));
    let serving = Serving::start(&["--listen", "127.0.0.1:0", "--read-only", "a disk.raw", "other"], 2, dir.path());
    assert!(serving.uris[0].ends_with("/a%20disk.raw"), "{:?}", serving.uris);
    let told = done(&["info", &serving.uris[0]], dir.path());
    assert!(told.contains("8388608 bytes") && told.contains("read-only"), "{told}");
    let told = done(&["info", "--list", &serving.uris[0]], dir.path());
    assert!(told.contains("\"a disk.raw\"") && told.contains("\"other\""), "{told}");
    done(&["copy", &serving.uris[0], "copy"], dir.path());
    assert!(std::fs::read(path("copy")).unwrap() == std::fs::read(path("a disk.raw")).unwrap());
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path("copy")).unwrap()) * 512;
    assert!(allocated <= 3 << 20, "{allocated}");
    drop(serving);

    std::fs::File::create(path("target")).unwrap().set_len(8 << 20).unwrap();
    let serving = Serving::start(&["--listen", "unix:s", "target"], 1, dir.path());
    done(&["copy", "copy", &serving.uris[0]], dir.path());
    drop(serving);
    assert!(std::fs::read(path("target")).unwrap() == std::fs::read(path("copy")).unwrap());
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    image(&dir.path().join("image"));
    std::fs::write(dir.path().join("small"), [0; 512]).unwrap();
    let serving = Serving::start(&["--listen", "unix:s", "image"], 1, dir.path());
    let uri = serving.uris[0].as_str();
    for (arguments, code, words) in [
        (&["serve", "--listen", "0.0.0.0:0", "small"][..], 3, "--tls-cert"),
        (&["serve", "--listen", "everywhere", "small"], 2, "unix:PATH"),
        (&["serve", "--listen", "unix:t", "none"], 3, "cannot open none"),
        (&["serve", "--listen", "unix:t", "image"], 3, "another process"),
        (&["info", "nbd:here"], 2, "give nbd://"),
        (&["info", "nbds+unix:///?socket=s"], 2, "--tls-ca"),
        (&["info", "nbd+unix:///none?socket=s"], 1, "no export of this name"),
        (&["info", "nbd+unix:///?socket=none"], 1, "cannot connect"),
        (&["copy", uri, "small"], 3, "remove it"),
        (&["copy", "small", "image"], 3, "another process"),
    ] {
        let (found, said) = refused(arguments, dir.path());
        assert!(found == code && said.contains(words), "{arguments:?}: {found}: {said}");
    }
}
