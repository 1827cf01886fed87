//! Our server before the clients that others wrote, and our client before their servers. Whoever is missing is skipped.

mod extended;
mod serving;
mod tls;
mod using;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmferry_nbd::backend::{Access, Backend, File};
use vmferry_nbd::server::{Listening, Served, Server, Where};
use vmferry_nbd::tls::ServerTls;

const MIB: u64 = 1 << 20;

/// Whether these programs are there; says which is not.
fn there(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = Command::new("sh").args(["-c", "command -v \"$0\"", program]).stdout(Stdio::null()).status();
        let found = found.is_ok_and(|it| it.success());
        if !found {
            eprintln!("skipped: {program} is missing (scripts/setup.sh --for-tests installs it)");
        }
        found
    })
}

/// What a program says; it has to succeed, within a minute.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let (succeeded, said) = attempt(program, arguments);
    assert!(succeeded, "{program} {arguments:?}: {said}");
    said
}

/// Whether it succeeds, and what it says.
fn attempt(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// A folder with a raw image of 64 MiB: holes, data, and a pattern that tells blocks apart.
struct Bed {
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        let bed = Self { dir: tempfile::tempdir().unwrap() };
        let mut bytes = vec![0; 64 << 20];
        for (number, block) in bytes.chunks_mut(4096).enumerate() {
            if number % 1000 < 300 {
                block.iter_mut().zip(0..).for_each(|(byte, at)| *byte = (number * 7 + at) as u8 | 1);
            }
        }
        let image = std::fs::File::create(bed.path("image")).unwrap();
        image.set_len(64 << 20).unwrap();
        for (number, part) in bytes.chunks(4096).enumerate().filter(|(number, _)| number % 1000 < 300) {
            std::os::unix::fs::FileExt::write_all_at(&image, part, number as u64 * 4096).unwrap();
        }
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    fn empty(&self, name: &str) -> PathBuf {
        std::fs::File::create(self.path(name)).unwrap().set_len(64 << 20).unwrap();
        self.path(name)
    }

    fn file(&self, name: &str, access: Access) -> Arc<dyn Backend> {
        Arc::new(File::open(&self.path(name), access).unwrap())
    }

    /// Our server, and its URI.
    fn serve(&self, name: &str, access: Access) -> (Listening, String) {
        let listening = self.listen(self.file(name, access), None);
        (listening, format!("nbd+unix:///disk?socket={}", self.text("socket")))
    }

    fn listen(&self, backend: Arc<dyn Backend>, tls: Option<ServerTls>) -> Listening {
        let served = Served { name: "disk".into(), description: "a disk".into(), backend };
        Listening::begin(Server::new(vec![served], tls), &Where::Unix(self.path("socket"))).unwrap()
    }

    #[track_caller]
    fn assert_same(&self, one: &str, other: &str) {
        let read = |name: &str| std::fs::read(self.path(name)).unwrap();
        assert!(read(one) == read(other), "{one} and {other} differ");
    }

    fn allocated(&self, name: &str) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(self.path(name)).unwrap()) * 512
    }

    /// Somebody else's server, which is there when it takes a connection.
    fn start(&self, socket: &str, program: &str, arguments: &[&str]) -> Running {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn().unwrap();
        let running = Running(child);
        let until = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(self.path(socket)).is_err() {
            assert!(Instant::now() < until, "{program} takes no connection");
            std::thread::sleep(Duration::from_millis(10));
        }
        running
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
