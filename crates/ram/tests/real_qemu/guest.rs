//! A guest whose only program is its firmware: it waits for a byte on its serial port, touches the page of that number,
//! and answers. It never touches another page of its RAM.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use tempfile::TempDir;
use vmferry_ram::{Backend, GuestRam};

pub(crate) const RAM_BYTES: u64 = 64 << 20;
/// What it is in, as the agent has QEMU make it.
pub(crate) const SHARED: &str = "memory-backend-memfd,id=ram,size=64M,share=on";
/// Firmware comes in these.
const ROM: usize = 64 << 10;
/// Where a processor begins, from the end of the firmware.
const RESET: usize = 16;
/// In a byte that the guest is sent: write to the page rather than read it.
const WRITE: u8 = 0x80;

/// For 16-bit mode. The address of the page is `ds` times 16.
const PROGRAM: [u8; 42] = [
    0xFA, // cli
    0xBA, 0xFD, 0x03, // next: mov dx, 0x3fd
    0xEC, // wait: in al, dx
    0xA8, 0x01, // test al, 1
    0x74, 0xFB, // jz wait
    0xBA, 0xF8, 0x03, // mov dx, 0x3f8
    0xEC, // in al, dx
    0x88, 0xC3, // mov bl, al
    0x24, 0x7F, // and al, 0x7f
    0x88, 0xC4, // mov ah, al
    0x88, 0xC1, // mov cl, al
    0x30, 0xC0, // xor al, al
    0x8E, 0xD8, // mov ds, ax
    0x84, 0xDB, // test bl, bl
    0x78, 0x06, // js write
    0xA0, 0x00, 0x00, // mov al, [0]
    0xEE, // answer: out dx, al
    0xEB, 0xDE, // jmp next
    0x88, 0xC8, // write: mov al, cl
    0xA2, 0x00, 0x00, // mov [0], al
    0xEB, 0xF6, // jmp answer
];
/// To the firmware's beginning.
const JUMP_TO_THE_PROGRAM: [u8; 3] = [0xE9, 0x0D, 0x00];

/// The system's QEMU, and the other one if `scripts/setup.sh --for-tests` has fetched it.
pub(crate) fn qemus() -> Vec<PathBuf> {
    let second = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/qemu-second/bin/qemu-system-x86_64");
    ["qemu-system-x86_64".into()].into_iter().chain(second.exists().then_some(second)).collect()
}

/// A running QEMU, which ends with the test.
pub(crate) struct Guest {
    qemu: Child,
    input: ChildStdin,
    output: ChildStdout,
    _files: TempDir,
}

impl Guest {
    pub(crate) fn start(qemu: &Path, more: &[&str]) -> Self {
        Self::start_with(qemu, SHARED, |command| {
            command.args(more);
        })
    }

    /// With another memory backend or other changes.
    pub(crate) fn start_with(qemu: &Path, memory: &str, change: impl FnOnce(&mut Command)) -> Self {
        let files = tempfile::tempdir().unwrap();
        let rom = files.path().join("rom");
        let mut bytes = PROGRAM.to_vec();
        bytes.resize(ROM, 0);
        bytes[ROM - RESET..][..3].copy_from_slice(&JUMP_TO_THE_PROGRAM);
        fs::write(&rom, bytes).unwrap();
        // QEMU may run as another user.
        fs::set_permissions(files.path(), Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(qemu);
        command
            .args(["-machine", "pc,accel=tcg,memory-backend=ram", "-m", "64M", "-object", memory])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"])
            .arg("-bios")
            .arg(&rom)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        change(&mut command);
        let mut qemu = command.spawn().expect("qemu-system-x86_64 is missing: run scripts/setup.sh");
        let (input, output) = (qemu.stdin.take().unwrap(), qemu.stdout.take().unwrap());
        let mut guest = Self { qemu, input, output, _files: files };
        guest.read(0);
        guest
    }

    pub(crate) fn pid(&self) -> u32 {
        self.qemu.id()
    }

    pub(crate) fn backend() -> Backend {
        Backend { id: "ram".into(), size: RAM_BYTES, address: None }
    }

    pub(crate) fn ram(&self) -> Arc<GuestRam> {
        Arc::new(GuestRam::open(self.pid(), &[Self::backend()]).unwrap())
    }

    /// How many descriptors QEMU has.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// What the kernel notes of the mapping of its RAM: among others `uw` while it is tracked and `um` while it is served.
    pub(crate) fn flags(&self, ram: &GuestRam) -> Vec<String> {
        let text = fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        let start = format!("{:x}-", ram.blocks()[0].address());
        let mut mapping = text.lines().skip_while(|line| !line.starts_with(&start));
        let flags = mapping.find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        flags.split_ascii_whitespace().map(str::to_owned).collect()
    }

    /// The guest writes the page's number to its first byte.
    pub(crate) fn write(&mut self, page: u8) {
        self.begin_write(page);
        assert_eq!(self.answer(), page);
    }

    /// The first byte of a page.
    pub(crate) fn read(&mut self, page: u8) -> u8 {
        self.begin_read(page);
        self.answer()
    }

    pub(crate) fn begin_write(&mut self, page: u8) {
        self.input.write_all(&[page | WRITE]).unwrap();
    }

    pub(crate) fn begin_read(&mut self, page: u8) {
        assert!(page < WRITE);
        self.input.write_all(&[page]).unwrap();
    }

    /// What it says when it has done what it was told to.
    pub(crate) fn answer(&mut self) -> u8 {
        let mut byte = [0];
        self.output.read_exact(&mut byte).unwrap();
        byte[0]
    }

    pub(crate) fn kill(&mut self) {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
