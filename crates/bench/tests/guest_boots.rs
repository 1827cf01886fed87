//! The measuring guest on real QEMUs, emulated: it boots, rewrites, beats, verifies, and finds damage that is done to it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmferry_bench::{Fill, GuestLog, GuestOptions, INITRD, Mode};

/// Generous: an emulated guest boots in 4 s on a machine that has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(120);

const PAGE: usize = 4096;

/// What setup.sh fetches.
fn fetched(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target").join(path);
    assert!(path.exists(), "{} is missing: run scripts/setup.sh --for-tests", path.display());
    path
}

fn system_qemu() -> PathBuf {
    "qemu-system-x86_64".into()
}

fn qemus() -> [PathBuf; 2] {
    [system_qemu(), fetched("qemu-second/bin/qemu-system-x86_64")]
}

fn options(mode: Mode) -> GuestOptions {
    GuestOptions { mem: 64 << 20, threads: 1, mode, rate: None, fill: Fill::Random }
}

/// A running QEMU, which ends with the test.
struct Guest {
    qemu: Child,
    commands: ChildStdin,
    log: Arc<Mutex<GuestLog>>,
    files: TempDir,
}

impl Guest {
    fn boot(qemu: &Path, options: &GuestOptions) -> Guest {
        let files = tempfile::tempdir().unwrap();
        let initrd = files.path().join("initrd.gz");
        fs::write(&initrd, INITRD).unwrap();
        let memory =
            format!("memory-backend-file,id=ram,size=384M,share=on,mem-path={}", files.path().join("ram").display());
        let monitor = format!("unix:{},server,nowait", files.path().join("monitor").display());
        let mut qemu = Command::new(qemu)
            .args(["-machine", "q35,accel=tcg,memory-backend=ram", "-cpu", "max", "-m", "384M", "-object", &memory])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-serial", "stdio", "-monitor", &monitor])
            .arg("-kernel")
            .arg(fetched("guest/vmlinuz"))
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", &options.kernel_command_line()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 is missing: run scripts/setup.sh");
        let (commands, mut console) = (qemu.stdin.take().unwrap(), qemu.stdout.take().unwrap());
        let log = Arc::new(Mutex::new(GuestLog::new()));
        let fed = Arc::clone(&log);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut bytes) {
                fed.lock().unwrap().feed(0, Instant::now(), &bytes[..count]);
            }
        });
        Guest { qemu, commands, log, files }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    /// What `answer` makes of the log, once it makes anything of it.
    fn wait_for<T>(&mut self, what: &str, answer: impl Fn(&GuestLog) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.log.lock().unwrap();
            if let Some(answer) = answer(&log) {
                return answer;
            }
            let ended = self.qemu.try_wait().unwrap();
            let alive = ended.is_none() && Instant::now() < deadline;
            assert!(alive, "no {what}; QEMU ended: {ended:?}; {} beats, {:?}", log.beats().len(), log.error());
            drop(log);
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_until_ready(&mut self) {
        self.wait_for("ready", |log| log.ready().cloned());
    }

    fn wait_for_the_end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.qemu.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "QEMU did not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn ram(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.files.path().join("ram")).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Where in the guest's RAM this page of the rewritten memory lies, and what it holds.
fn find_page(ram: &File, number: u64) -> (u64, Vec<u8>) {
    let mut page = vec![0; PAGE];
    for at in (0..ram.metadata().unwrap().len()).step_by(PAGE) {
        ram.read_exact_at(&mut page, at).unwrap();
        let word = |n: usize| u64::from_le_bytes(page[n * 8..n * 8 + 8].try_into().unwrap());
        // Number, sequence number, then six times the check value.
        if word(0) == number && word(1) != 0 && word(1) < 1 << 32 && word(2) != 0 && (3..8).all(|n| word(n) == word(2))
        {
            return (at, page);
        }
    }
    panic!("page {number} is not in the guest's RAM");
}

/// Boots the guest on every QEMU, lets it work, and has it verified.
fn works(options: &GuestOptions) {
    for qemu in qemus() {
        let mut guest = Guest::boot(&qemu, options);
        let ready = guest.wait_for("ready", |log| log.ready().cloned());
        assert_eq!((ready.mem, ready.threads), (options.mem, options.threads));
        assert_eq!(ready.mode, options.mode.to_string());
        guest.wait_for("200 beats", |log| (log.beats().len() >= 200).then_some(()));
        if options.mode != Mode::Idle {
            guest.wait_for("3 records by each thread", |log| {
                (0..options.threads)
                    .all(|thread| log.written().iter().any(|record| record.thread == thread && record.n >= 3))
                    .then_some(())
            });
        }
        guest.say("verify");
        guest.say("verify");
        let verified = guest.wait_for("verified twice", |log| log.verified().get(1).copied());
        assert_eq!((verified.pages, verified.corrupt, verified.total), (options.mem / PAGE as u64, 0, 0));
        let log = guest.log.lock().unwrap();
        assert!(log.corrupt().is_empty(), "{:?}", log.corrupt());
        assert!(log.beats().is_sorted_by(|one, next| one.n < next.n), "beats count up");
        assert!(options.mode != Mode::Idle || log.written().is_empty(), "an idle guest writes nothing");
    }
}

#[test]
fn an_idle_guest_beats_and_verifies() {
    works(&options(Mode::Idle));
}

#[test]
fn a_guest_that_rewrites_in_order_keeps_its_pages() {
    works(&options(Mode::Write));
}

#[test]
fn two_threads_that_rewrite_text_at_random_keep_their_pages() {
    works(&GuestOptions { threads: 2, fill: Fill::Text, ..options(Mode::Random) });
}

#[test]
fn a_guest_that_rewrites_hot_and_cold_pages_keeps_them() {
    works(&options(Mode::HotCold));
}

#[test]
fn a_paced_guest_is_no_faster_than_it_was_told() {
    let mut guest = Guest::boot(&system_qemu(), &GuestOptions { rate: Some(64 << 20), ..options(Mode::Write) });
    let records = guest.wait_for("3 records", |log| (log.written().len() >= 3).then(|| log.written().to_vec()));
    for record in records {
        assert!(record.ms > 990.0, "64 MiB at 64 MiB/s took {} ms", record.ms);
    }
}

#[test]
fn a_flipped_bit_is_found_by_a_verification() {
    let mut guest = Guest::boot(&system_qemu(), &options(Mode::Idle));
    guest.wait_until_ready();
    let ram = guest.ram();
    let (at, page) = find_page(&ram, 77);
    ram.write_all_at(&[page[3000] ^ 4], at + 3000).unwrap();
    guest.say("verify");
    let verified = guest.wait_for("verified", |log| log.verified().first().copied());
    assert_eq!((verified.corrupt, verified.total), (1, 1));
    assert_eq!(guest.log.lock().unwrap().corrupt(), ["CORRUPT page=77 expected=1 found=torn"]);
}

#[test]
fn a_stale_page_is_found_before_it_is_rewritten() {
    // Half a second for a pass: long enough to put an old page back before the guest comes to it again.
    let mut guest = Guest::boot(&system_qemu(), &GuestOptions { rate: Some(128 << 20), ..options(Mode::Write) });
    guest.wait_until_ready();
    let ram = guest.ram();
    let (at, old) = find_page(&ram, 77);
    let deadline = Instant::now() + PATIENCE;
    let mut now = old.clone();
    while now[8..16] == old[8..16] {
        assert!(Instant::now() < deadline, "the guest does not rewrite page 77");
        thread::sleep(Duration::from_millis(1));
        ram.read_exact_at(&mut now, at).unwrap();
    }
    ram.write_all_at(&old, at).unwrap();
    let line = guest.wait_for("CORRUPT", |log| log.corrupt().first().cloned());
    let sequence = u64::from_le_bytes(old[8..16].try_into().unwrap());
    assert_eq!(line, format!("CORRUPT page=77 expected={} found={sequence}", sequence + 1));
}

#[test]
fn poweroff_ends_the_guest() {
    let mut guest = Guest::boot(&system_qemu(), &options(Mode::Write));
    guest.wait_until_ready();
    guest.say("poweroff");
    assert!(guest.wait_for_the_end().success());
}

#[test]
fn the_power_button_ends_the_guest() {
    for qemu in qemus() {
        let mut guest = Guest::boot(&qemu, &options(Mode::Idle));
        guest.wait_until_ready();
        let mut monitor = UnixStream::connect(guest.files.path().join("monitor")).unwrap();
        monitor.write_all(b"system_powerdown\n").unwrap();
        assert!(guest.wait_for_the_end().success());
    }
}

#[test]
fn a_guest_with_too_little_ram_says_so_and_ends() {
    let mut guest = Guest::boot(&system_qemu(), &GuestOptions { mem: 380 << 20, ..options(Mode::Idle) });
    assert!(guest.wait_for_the_end().success());
    let log = guest.log.lock().unwrap();
    let error = log.error().unwrap_or_default();
    assert!(error.starts_with("vmferry.mem=380M does not fit: "), "{error}");
}
