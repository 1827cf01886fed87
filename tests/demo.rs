//! `make demo`, as its user may end it: at any moment, with Ctrl-C.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use vmferry_bench::testbed::processes_naming;

/// Built beside the binary, as every example is when tests are built.
fn demo_binary() -> PathBuf {
    let binary = Path::new(env!("CARGO_BIN_EXE_vmferry")).with_file_name("examples").join("demo");
    assert!(binary.exists(), "{} is not built", binary.display());
    binary
}

/// The demo in a process group of its own, as a shell starts it, with all its files under `dir`.
fn start_demo(dir: &Path) -> Child {
    Command::new(demo_binary())
        .env("TMPDIR", dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("it starts")
}

fn interrupted_after(words: &str, more: Duration) {
    let dir = tempfile::tempdir().expect("a folder");
    let mut demo = start_demo(dir.path());
    let mut lines = BufReader::new(demo.stdout.take().expect("piped")).lines();
    let reached = lines.by_ref().map_while(Result::ok).any(|line| line.contains(words));
    assert!(reached, "it ended before it said {words:?}");
    std::thread::sleep(more);
    let dir_name = dir.path().display().to_string();
    assert!(!processes_naming(&dir_name).is_empty(), "it runs something");

    let group = Pid::from_raw(demo.id() as i32).expect("a pid");
    rustix::process::kill_process_group(group, Signal::INT).expect("interrupted");
    let status = demo.wait().expect("it ends");
    assert!(!status.success());
    assert_eq!(processes_naming(&dir_name), [0; 0], "processes are left");
    assert_eq!(std::fs::read_dir(dir.path()).expect("it is there").count(), 0, "files are left");
    let namespaces = Command::new("ip").args(["netns", "list"]).output().expect("ip runs");
    let ours = format!("vmferry-{}-", demo.id());
    assert!(!String::from_utf8_lossy(&namespaces.stdout).contains(&ours), "a namespace is left");
}

#[test]
fn a_demo_that_is_interrupted_while_its_guest_boots_leaves_nothing() {
    interrupted_after("Booting a guest", Duration::from_millis(300));
}

#[test]
fn a_demo_that_is_interrupted_while_it_migrates_leaves_nothing() {
    interrupted_after("$ vmferry migrate", Duration::from_secs(2));
}
