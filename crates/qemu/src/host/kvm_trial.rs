//! Does KVM work here? Found out by running a guest in it.
//!
//! `/dev/kvm` can be there and openable and still be of no use: in nested virtualisation and in some clouds QEMU starts
//! and then hangs, or ends over a model-specific register that the host refuses. So a trial guest does what every
//! guest's firmware does first: it switches to protected mode, asks `cpuid`, reads and writes such a register, writes to
//! memory and to a port. Some KVMs emulate all that a guest's kernel does (PVM, which takes no hardware), and no ordinary
//! guest gets anywhere in them: so it also looks how long it takes for some instructions.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use tokio::process::Command;

use super::{Accel, Kvm};
use crate::launch::{in_words, last_lines};
use crate::process::end_with_us;

/// How long the trial guest may take; it needs a tenth of a second.
const PATIENCE: Duration = Duration::from_secs(3);
const ROM_SIZE: usize = 64 << 10;
/// Where the code is in the ROM, which the processor sees at `0xFFFF_0000`.
const CODE_AT: usize = 0xfe00;
/// What the guest writes when all went well, and what `isa-debug-exit` makes of it.
const SUCCESS: u8 = 0x2a;
const SUCCESS_EXIT: i32 = (SUCCESS as i32) << 1 | 1;

/// What it writes when only its speed was not as it should be.
const SLOW: u8 = 0x2b;
const SLOW_EXIT: i32 = (SLOW as i32) << 1 | 1;

/// Runs in real mode at `0xFFFF_FE00`, then in protected mode with flat segments.
#[rustfmt::skip]
const CODE: [u8; 119] = [
    0xfa,                                           // 00  cli
    0x2e, 0x66, 0x0f, 0x01, 0x16, 0x78, 0xff,       // 01  lgdt cs:[0xff78]      (GDT_POINTER)
    0x0f, 0x20, 0xc0,                               // 08  mov eax, cr0
    0x0c, 0x01,                                     // 0b  or al, 1              (protected mode)
    0x0f, 0x22, 0xc0,                               // 0d  mov cr0, eax
    0x66, 0xea, 0x18, 0xfe, 0xff, 0xff, 0x08, 0x00, // 10  jmp 0x08:0xfffffe18
    // From here on in 32 bits.
    0x66, 0xb8, 0x10, 0x00,                         // 18  mov ax, 0x10
    0x8e, 0xd8,                                     // 1c  mov ds, ax
    0x31, 0xc0,                                     // 1e  xor eax, eax
    0x0f, 0xa2,                                     // 20  cpuid
    0xb9, 0x80, 0x00, 0x00, 0xc0,                   // 22  mov ecx, 0xc0000080   (EFER, which every 64-bit guest sets)
    0x0f, 0x32,                                     // 27  rdmsr
    0x80, 0xcc, 0x01,                               // 29  or ah, 1              (long mode enable)
    0x0f, 0x30,                                     // 2c  wrmsr
    0x31, 0xc0,                                     // 2e  xor eax, eax          (so that the next answer is a new one)
    0x0f, 0x32,                                     // 30  rdmsr
    0xa3, 0x00, 0x10, 0x00, 0x00,                   // 32  mov [0x1000], eax
    0xb0, 0x01,                                     // 37  mov al, 1             (failure)
    0xf6, 0x05, 0x01, 0x10, 0x00, 0x00, 0x01,       // 39  test byte [0x1001], 1
    0x74, 0x30,                                     // 40  jz 72
    // Some loops: one of them is not interrupted by whatever else the host does.
    0xbb, 0x08, 0x00, 0x00, 0x00,                   // 42  mov ebx, 8
    0x0f, 0x31,                                     // 47  rdtsc
    0x89, 0xc6,                                     // 49  mov esi, eax
    0xb9, 0x20, 0x4e, 0x00, 0x00,                   // 4b  mov ecx, 20000
    0x49,                                           // 50  dec ecx
    0x75, 0xfd,                                     // 51  jnz 50
    0x0f, 0x31,                                     // 53  rdtsc
    0x29, 0xf0,                                     // 55  sub eax, esi
    0x3d, 0x00, 0x20, 0x4e, 0x00,                   // 57  cmp eax, 5120000      (256 cycles for two instructions)
    0x72, 0x07,                                     // 5c  jb 65
    0x4b,                                           // 5e  dec ebx
    0x75, 0xe6,                                     // 5f  jnz 47
    0xb0, SLOW,                                     // 61  mov al, SLOW
    0xeb, 0x0d,                                     // 63  jmp 72
    0xb0, SUCCESS,                                  // 65  mov al, SUCCESS
    0xeb, 0x09,                                     // 67  jmp 72
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, // 69  nop
    0x90,                                           // 71  nop
    0xe6, 0xf4,                                     // 72  out 0xf4, al
    0xf4,                                           // 74  hlt
    0xeb, 0xfd,                                     // 75  jmp 74
];

/// No segment; code and data from 0 to 4 GiB, in 32 bits. They have been accessed already, as nothing can be noted in a
/// ROM: who emulates that would try for ever.
const GDT_AT: usize = 0xff80;
const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Its size less one, and where it is.
const GDT_POINTER_AT: usize = 0xff78;
const GDT_POINTER: [u8; 6] = [0x17, 0x00, 0x80, 0xff, 0xff, 0xff];
/// Where the processor starts: `jmp CODE_AT`, in 16 bits.
const RESET_AT: usize = 0xfff0;
const RESET: [u8; 3] = [0xe9, 0x0d, 0xfe];

/// What `-cpu host` may have to do without: in some nested virtualisation QEMU aborts over the register behind it.
const HOST_CPUS: [&str; 2] = ["", ",-arch-capabilities"];

/// What the host can run guests with, found out by trying. Takes a fraction of a second, at most six.
pub async fn try_kvm(binary: &Path) -> Accel {
    let tcg = |why: String| Accel::Tcg { why };
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        return tcg(match error.kind() {
            std::io::ErrorKind::NotFound => "there is no /dev/kvm".into(),
            _ => format!("/dev/kvm cannot be used: {error}"),
        });
    }
    let mut failures = Vec::new();
    for host_cpu in HOST_CPUS {
        match run_trial(binary, "kvm", &format!("host{host_cpu}")).await {
            Ok(speed) => {
                return Accel::Kvm(Kvm { host_cpu: host_cpu.into(), emulates_kernels: speed == Speed::Emulated });
            }
            Err(why) => failures.push(why),
        }
    }
    tcg(failures.swap_remove(0))
}

/// How fast a guest's kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speed {
    Usual,
    Emulated,
}

/// Runs the trial guest with this accelerator and CPU model, or tells why it could not.
async fn run_trial(binary: &Path, accel: &str, cpu: &str) -> Result<Speed, String> {
    let cannot = |error: std::io::Error| format!("{} cannot be tried: {error}", binary.display());
    // In no folder: whoever ends in the middle of this leaves nothing.
    let mut rom = tempfile::tempfile().map_err(cannot)?;
    rom.write_all(&rom_image()).map_err(cannot)?;
    let mut command = Command::new(binary);
    end_with_us(&mut command);
    let trial = command
        .args(["-accel", accel, "-cpu", cpu, "-machine", "pc", "-m", "16", "-bios", "/proc/self/fd/0"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .stdin(rom)
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(PATIENCE, trial).await {
        Ok(output) => judge(&output.map_err(cannot)?),
        Err(_) => Err(format!("a trial guest hung in it for {} s", PATIENCE.as_secs())),
    }
}

fn judge(output: &Output) -> Result<Speed, String> {
    match output.status.code() {
        Some(SUCCESS_EXIT) => return Ok(Speed::Usual),
        Some(SLOW_EXIT) => return Ok(Speed::Emulated),
        _ => {}
    }
    let said = last_lines(&String::from_utf8_lossy(&output.stderr));
    Err(match (said.lines().last(), output.status.signal()) {
        (Some(line), _) => format!("a trial guest failed in it: {line}"),
        (None, _) => format!("a trial guest failed in it: {}", in_words(output.status)),
    })
}

fn rom_image() -> Vec<u8> {
    let mut rom = vec![0xf4; ROM_SIZE];
    let mut put = |at: usize, bytes: &[u8]| rom[at..at + bytes.len()].copy_from_slice(bytes);
    put(CODE_AT, &CODE);
    for (number, descriptor) in GDT.iter().enumerate() {
        put(GDT_AT + number * 8, &descriptor.to_le_bytes());
    }
    put(GDT_POINTER_AT, &GDT_POINTER);
    put(RESET_AT, &RESET);
    rom
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::path::PathBuf;

    pub(in crate::host) fn qemus() -> Vec<PathBuf> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let second = workspace.join("target/qemu-second/bin/qemu-system-x86_64");
        let first = crate::find_binary("qemu-system-x86_64", &[], &std::env::var_os("PATH").unwrap());
        first.into_iter().chain(second.exists().then_some(second)).collect()
    }

    #[tokio::test]
    async fn the_trial_guest_says_success_where_guests_can_run() {
        assert!(!qemus().is_empty(), "no QEMU: run scripts/setup.sh");
        for qemu in qemus() {
            assert_eq!(run_trial(&qemu, "tcg", "max").await, Ok(Speed::Usual), "{}", qemu.display());
        }
    }

    #[tokio::test]
    async fn the_trial_guest_notices_a_register_that_does_not_work() {
        for qemu in qemus() {
            // A 32-bit CPU has no EFER.LME, so what was written does not come back.
            let why = run_trial(&qemu, "tcg", "qemu32").await.unwrap_err();
            assert!(why.contains("exit code"), "{}: {why}", qemu.display());
        }
    }

    #[tokio::test]
    async fn a_trial_that_cannot_begin_tells_qemus_words() {
        for qemu in qemus() {
            let why = run_trial(&qemu, "no-such", "max").await.unwrap_err();
            assert!(why.contains("no-such"), "{}: {why}", qemu.display());
        }
    }
}
