//! Builds the measuring guests: compiles guest/ into one static program and packs it as the initrd that the library
//! embeds, and guest/bare into a program that needs no kernel.
//!
//! rustc is called directly, as the programs need their own target features and are inputs of this crate rather than
//! libraries that it links. They have no dependencies, so that is one command each.

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
    let bare = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../../guest/bare");
    println!("cargo:rerun-if-changed={}", bare.display());
    compile_bare(&bare, &out.join("bare.elf"));
    pack(&fs::read(&init).expect("rustc has just written it"), &out.join("initrd.gz"));
}

fn compile(guest: &Path, init: &Path) {
    let arguments = [
        "-C",
        "target-feature=+crt-static",
        "-C",
        "strip=symbols",
        // Emulated processors run vector instructions word by word, and slower than the words themselves.
        "-C",
        "no-vectorize-loops",
        "-C",
        "no-vectorize-slp",
    ];
    rustc("vmferry_guest", arguments.map(str::to_owned).to_vec(), &guest.join("src/main.rs"), init);
}

/// The guest that needs no kernel, nor a C library; its own script says where its parts are. For PCs only.
fn compile_bare(guest: &Path, elf: &Path) {
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch != "x86_64") {
        fs::write(elf, "").expect("OUT_DIR is writable");
        return;
    }
    let script = format!("link-arg=-Wl,-T,{}", guest.join("link.ld").display());
    let options = [
        "relocation-model=static",
        "relro-level=off",
        "strip=debuginfo",
        "target-feature=+crt-static",
        "link-arg=-nostartfiles",
        "link-arg=-nostdlib",
        "link-arg=-static",
        "link-arg=-no-pie",
        "link-arg=-Wl,--build-id=none,-z,max-page-size=4096",
        &script,
    ];
    let arguments = options.iter().flat_map(|option| ["-C".to_owned(), (*option).to_owned()]).collect();
    rustc("vmferry_bare_guest", arguments, &guest.join("main.rs"), elf);
}

fn rustc(name: &str, arguments: Vec<String>, source: &Path, into: &Path) {
    let target = env::var("TARGET").expect("cargo sets it");
    let output = Command::new(env::var_os("RUSTC").expect("cargo sets it"))
        .args(["--edition", "2024", "--crate-name", name, "--crate-type", "bin", "--target", &target])
        .args(["-C", "opt-level=3", "-C", "panic=abort"])
        .args(arguments)
        .arg("-o")
        .arg(into)
        .arg(source)
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
        stop(&format!("a measuring guest cannot be compiled: {advice}"));
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
