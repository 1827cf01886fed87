//! Builds the measuring guest: compiles guest/ into one static program and packs it as the initrd that the library embeds.
//!
//! rustc is called directly, as the program needs its own target features and is an input of this crate rather than a
//! library that it links. It has no dependencies, so that is one command.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

use flate2::Compression;
use flate2::write::GzEncoder;

#[path = "src/cpio.rs"]
mod cpio;

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let guest = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../../guest");
    println!("cargo:rerun-if-changed={}", guest.join("src").display());
    println!("cargo:rerun-if-changed=src/cpio.rs");
    println!("cargo:rerun-if-changed=build.rs");

    let init = out.join("init");
    compile(&guest, &init);
    pack(&fs::read(&init).expect("rustc has just written it"), &out.join("initrd.gz"));
}

fn compile(guest: &Path, init: &Path) {
    let target = env::var("TARGET").expect("cargo sets it");
    let output = Command::new(env::var_os("RUSTC").expect("cargo sets it"))
        .args(["--edition", "2024", "--crate-name", "vmferry_guest", "--crate-type", "bin", "--target", &target])
        .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "strip=symbols", "-C", "target-feature=+crt-static"])
        // Emulated processors run vector instructions word by word, and slower than the words themselves.
        .args(["-C", "no-vectorize-loops", "-C", "no-vectorize-slp"])
        .arg("-o")
        .arg(init)
        .arg(guest.join("src/main.rs"))
        .output()
        .unwrap_or_else(|error| stop(&format!("rustc cannot be started: {error}")));
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let advice = if errors.contains("-lc") || errors.contains("crt1.o") || errors.contains("libc.a") {
            "the static C library is missing: install libc6-dev (Debian, Ubuntu) or glibc-static (Fedora)"
        } else {
            "see rustc's errors above"
        };
        eprintln!("{errors}");
        stop(&format!("the measuring guest cannot be compiled: {advice}"));
    }
}

fn pack(init: &[u8], initrd: &Path) {
    let mut archive = cpio::Archive::default();
    archive.directory("dev");
    archive.directory("proc");
    archive.directory("sys");
    // The kernel opens the console as init's standard streams before devtmpfs is there.
    archive.character_device("dev/console", 5, 1);
    archive.program("init", init);
    let mut gzip = GzEncoder::new(File::create(initrd).expect("OUT_DIR is writable"), Compression::best());
    std::io::Write::write_all(&mut gzip, &archive.finish()).expect("OUT_DIR is writable");
    gzip.finish().expect("OUT_DIR is writable");
}

fn stop(message: &str) -> ! {
    eprintln!("{message}");
    exit(1)
}
