//! A QEMU of 8.2 or later, which knows extended headers: the second one that scripts/setup.sh fetches.

use std::io::{BufRead, BufReader, Write};
use std::process::ChildStdin;

use vmferry_nbd::Headers;
use vmferry_nbd::client::Remote;
use vmferry_nbd::copy::{How, Progress, copy};
use vmferry_nbd::uri::Place;

use super::*;

struct Qemu {
    running: Running,
    says: BufReader<std::process::ChildStdout>,
    hears: ChildStdin,
}

impl Qemu {
    fn start(arguments: &[&str]) -> Option<Self> {
        let binary = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/qemu-second/bin/qemu-system-x86_64");
        if !there(&[binary]) {
            return None;
        }
        let mut child = Command::new(binary)
            .args(["-machine", "none", "-display", "none", "-nodefaults", "-qmp", "stdio"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (says, hears) = (BufReader::new(child.stdout.take().unwrap()), child.stdin.take().unwrap());
        let mut qemu = Self { running: Running(child), says, hears };
        qemu.hear("QMP");
        qemu.say(r#"{"execute":"qmp_capabilities"}"#);
        Some(qemu)
    }

    fn hear(&mut self, what: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.says.read_line(&mut line).unwrap() > 0, "QEMU ended: {:?}", self.running.0.try_wait());
            if line.contains(what) {
                return line;
            }
        }
    }

    fn say(&mut self, what: &str) {
        writeln!(self.hears, "{what}").unwrap();
        let mut line = self.hear("\"");
        while !line.contains("\"return\"") {
            assert!(!line.contains("\"error\""), "{what}: {line}");
            line = self.hear("\"");
        }
        assert!(!line.contains("rror"), "{what}: {line}");
    }
}

#[test]
fn a_qemu_mirrors_a_disk_to_us_with_extended_headers() {
    let bed = Bed::new();
    bed.empty("target");
    let (listening, _) = bed.serve("target", Access::Write);
    let Some(mut qemu) = Qemu::start(&[
        "-blockdev",
        &format!("driver=file,node-name=disk,filename={}", bed.text("image")),
        "-blockdev",
        &format!(
            "driver=nbd,node-name=there,server.type=unix,server.path={},export=disk,discard=unmap,detect-zeroes=unmap",
            bed.text("socket")
        ),
    ]) else {
        return;
    };
    qemu.say(
        r#"{"execute":"blockdev-mirror","arguments":{"job-id":"m","device":"disk","target":"there","sync":"full"}}"#,
    );
    qemu.hear("BLOCK_JOB_READY");
    qemu.say(r#"{"execute":"block-job-cancel","arguments":{"device":"m"}}"#);
    qemu.hear("BLOCK_JOB_COMPLETED");
    drop(qemu);
    drop(listening);
    bed.assert_same("image", "target");
    assert!(bed.allocated("target") <= bed.allocated("image") + MIB, "{}", bed.allocated("target"));
}

#[test]
fn an_export_of_a_qemu_is_copied_with_extended_headers() {
    let bed = Bed::new();
    let image = format!("driver=file,node-name=disk,filename={}", bed.text("image"));
    let Some(mut qemu) = Qemu::start(&["-blockdev", &image]) else { return };
    let path = bed.text("theirs");
    qemu.say(&format!(
        r#"{{"execute":"nbd-server-start","arguments":{{"addr":{{"type":"unix","data":{{"path":"{path}"}}}}}}}}"#
    ));
    qemu.say(r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"disk"}}"#);
    let remote = Remote::connect(&Place::Unix(bed.path("theirs")), None, "disk", 4).unwrap();
    assert_eq!(remote.session().headers, Headers::Extended);
    bed.empty("out");
    let how = How { requests: 8, target_is_zero: true };
    copy(&remote, &*bed.file("out", Access::Write), how, &Progress::default()).unwrap();
    bed.assert_same("image", "out");
}
