//! How the measuring guest is told what to do: its kernel command line.
//!
//! The guest's side of this is `guest/src/settings.rs`.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use vmferry_qemu::{Accel, try_kvm};

/// What one measuring guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestOptions {
    /// Memory that it fills and rewrites, in bytes. The guest's RAM must be larger: by 150 MiB for its kernel, and 1 %.
    pub mem: u64,
    /// Threads that share this memory and rewrite it side by side.
    pub threads: u32,
    /// Which pages are rewritten, and in which order.
    pub mode: Mode,
    /// Bytes rewritten in a second, by all threads together; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// What the pages hold.
    pub fill: Fill,
}

/// What the measuring guest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestKind {
    /// Linux with one program (`guest/src`): under KVM where that works for ordinary guests, else under TCG.
    #[default]
    Linux,
    /// No kernel at all (`guest/bare`): for any KVM, and for nothing but KVM. It has one processor.
    Bare,
}

impl GuestKind {
    /// What this QEMU gives such a guest here. Where that is not what it needs: why KVM does not work.
    pub(crate) async fn accelerator(self, qemu: &Path) -> Result<Accel, String> {
        match (self, try_kvm(qemu).await) {
            (Self::Linux, accel) => Ok(accel.for_ordinary_guests()),
            (Self::Bare, Accel::Tcg { why }) => Err(why),
            (Self::Bare, accel) => Ok(accel),
        }
    }
}

/// Which pages are rewritten, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// None: everything is filled once.
    Idle,
    /// All of them in order, again and again.
    Write,
    /// Any, uniformly at random.
    Random,
    /// A tenth of them gets nine tenths of the writes.
    HotCold,
    /// As `Write` by every other thread; those between only read.
    Mixed,
    /// None, and all are read in order, again and again.
    Read,
}

/// What the pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Bytes that no compressor can shrink.
    Random,
    /// Words, which compress two to four times.
    Text,
}

/// A word that names no [`Mode`] or [`Fill`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is none of {allowed}")]
pub struct ParseError {
    given: String,
    allowed: &'static str,
}

impl GuestOptions {
    /// The words of QEMU's command line that make this guest, from these files in its folder; on any machine type of a PC.
    /// `kernel` and `initrd` are of [`GuestKind::Linux`]; the other one is `initrd` alone.
    pub fn boot_words(&self, kind: GuestKind, kernel: &str, initrd: &str) -> Vec<String> {
        let words = match kind {
            GuestKind::Linux => vec!["-kernel", kernel, "-initrd", initrd],
            // The usual firmware would be emulated for seconds.
            GuestKind::Bare => vec!["-bios", "qboot.rom", "-kernel", initrd],
        };
        let line = match kind {
            GuestKind::Linux => self.kernel_command_line(),
            GuestKind::Bare => self.words(),
        };
        words.into_iter().map(str::to_owned).chain(["-append".into(), line]).collect()
    }

    /// For the `-append` of [`GuestKind::Linux`]. Works on the machine types `q35` and `pc`.
    pub fn kernel_command_line(&self) -> String {
        // loglevel=1: the kernel's lines share the serial port with the guest's, so only its last words may be there.
        // no_timer_check to cryptomgr: nothing of use here, and under emulation each costs time.
        // clearcpuid: has the kernel clear memory with plain stores; emulated string instructions go byte by byte.
        format!(
            "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check mitigations=off i8042.nokbd i8042.noaux \
             cryptomgr.notests clearcpuid=erms,rep_good,fsrm {}",
            self.words()
        )
    }

    fn words(&self) -> String {
        let mut line = format!(
            "vmferry.mem={} vmferry.threads={} vmferry.mode={} vmferry.fill={}",
            self.mem, self.threads, self.mode, self.fill
        );
        if let Some(rate) = self.rate {
            line.push_str(" vmferry.rate=");
            line.push_str(&rate.to_string());
        }
        line
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Idle => "idle",
            Mode::Write => "write",
            Mode::Random => "random",
            Mode::HotCold => "hotcold",
            Mode::Mixed => "mixed",
            Mode::Read => "read",
        })
    }
}

impl FromStr for Mode {
    type Err = ParseError;

    fn from_str(given: &str) -> Result<Mode, ParseError> {
        [Mode::Idle, Mode::Write, Mode::Random, Mode::HotCold, Mode::Mixed, Mode::Read]
            .into_iter()
            .find(|mode| mode.to_string() == given)
            .ok_or_else(|| ParseError { given: given.to_owned(), allowed: "idle, write, random, hotcold, mixed, read" })
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fill::Random => "random",
            Fill::Text => "text",
        })
    }
}

impl FromStr for Fill {
    type Err = ParseError;

    fn from_str(given: &str) -> Result<Fill, ParseError> {
        [Fill::Random, Fill::Text]
            .into_iter()
            .find(|fill| fill.to_string() == given)
            .ok_or_else(|| ParseError { given: given.to_owned(), allowed: "random, text" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_command_line_carries_every_option() {
        let mut options =
            GuestOptions { mem: 64 << 20, threads: 2, mode: Mode::HotCold, rate: Some(1000), fill: Fill::Text };
        let line = options.kernel_command_line();
        for word in [
            "console=ttyS0",
            "vmferry.mem=67108864",
            "vmferry.threads=2",
            "vmferry.mode=hotcold",
            "vmferry.rate=1000",
            "vmferry.fill=text",
        ] {
            assert!(line.split(' ').any(|given| given == word), "{word} in {line}");
        }
        options.rate = None;
        assert!(!options.kernel_command_line().contains("rate"));
    }

    #[test]
    fn modes_and_fills_are_read_as_they_are_printed() {
        for mode in [Mode::Idle, Mode::Write, Mode::Random, Mode::HotCold, Mode::Mixed, Mode::Read] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        for fill in [Fill::Random, Fill::Text] {
            assert_eq!(fill.to_string().parse(), Ok(fill));
        }
        assert_eq!(
            "lazy".parse::<Mode>().unwrap_err().to_string(),
            "`lazy` is none of idle, write, random, hotcold, mixed, read"
        );
    }
}
