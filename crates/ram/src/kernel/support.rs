//! Whether this host can do what is done here, found out by doing it on two pages of our own.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap, munmap, userfaultfd};
use rustix::param::page_size;

use super::{EnableError, Feature, Mode, Pagemap, Userfaultfd};
use crate::PAGE;
use crate::process::{Process, has_cap_sys_ptrace};

/// `UFFD_USER_MODE_ONLY`, which anybody may have.
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);

/// Why the agents cannot move RAM on this host, and what would help.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// Pages have another size than [`PAGE`](crate::PAGE).
    #[error("this kernel has pages of {bytes} bytes; RAM is moved in pages of 4096")]
    PageSize {
        /// Which.
        bytes: usize,
    },
    /// There is no userfaultfd.
    #[error("this kernel has no userfaultfd: it takes CONFIG_USERFAULTFD=y")]
    NoUserfaultfd,
    /// Something forbids a system call, such as a container's filter.
    #[error("{call} is forbidden here: a container needs a seccomp profile that allows it")]
    Forbidden {
        /// Which one.
        call: &'static str,
    },
    /// The kernel is too old, or was built without it.
    #[error("this kernel has no {}: it takes Linux 6.7 with CONFIG_USERFAULTFD=y and CONFIG_PTE_MARKER_UFFD_WP=y", .0.join(", "))]
    Lacks(Vec<&'static str>),
    /// Yama keeps processes from tracing others.
    #[error("tracing QEMU is forbidden by kernel.yama.ptrace_scope={scope}: {}", if scope == "3" { "set it to 2 at boot" } else { "the agent needs CAP_SYS_PTRACE" })]
    Yama {
        /// The sysctl's value.
        scope: String,
    },
    /// Another error.
    #[error("cannot {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The agents can move the RAM of a QEMU on this host, unless that QEMU forbids it (see [`InjectError`]).
///
/// [`InjectError`]: crate::InjectError
pub fn support() -> Result<(), Unsupported> {
    if page_size() as u64 != PAGE {
        return Err(Unsupported::PageSize { bytes: page_size() });
    }
    if let Some(scope) = forbidding_yama() {
        return Err(Unsupported::Yama { scope });
    }
    let userfaultfd = Userfaultfd::over(make_userfaultfd()?);
    let features = [Feature::MissingShmem, Feature::WpHugetlbfsShmem, Feature::WpUnpopulated, Feature::WpAsync];
    userfaultfd.enable(&features).map_err(|error| match error {
        EnableError::Lacks(features) => Unsupported::Lacks(features),
        EnableError::Io(source) => Unsupported::Io { doing: "enable a userfaultfd", source },
    })?;
    let pages = Pages::map().map_err(|source| Unsupported::Io { doing: "map memory", source })?;
    let tracking = |source| Unsupported::Io { doing: "track memory", source };
    userfaultfd.register(pages.range(), Mode::WriteProtect).map_err(tracking)?;
    userfaultfd.write_protect(pages.range()).map_err(tracking)?;
    let mut written = Vec::new();
    let us = std::process::id();
    let pagemap = Pagemap::open(us).map_err(tracking)?;
    pagemap.take_written(pages.range(), &mut written).map_err(|source| match Errno::from_io_error(&source) {
        Some(Errno::NOTTY | Errno::INVAL) => Unsupported::Lacks(vec!["PAGEMAP_SCAN"]),
        _ => tracking(source),
    })?;
    may_take_descriptors(us, &userfaultfd)
}

fn make_userfaultfd() -> Result<OwnedFd, Unsupported> {
    // SAFETY: nothing but the two pages below is registered with it.
    #[expect(unsafe_code)]
    let made = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | USER_MODE_ONLY) };
    made.map_err(|errno| match errno {
        Errno::NOSYS => Unsupported::NoUserfaultfd,
        Errno::PERM => Unsupported::Forbidden { call: "userfaultfd" },
        errno => Unsupported::Io { doing: "make a userfaultfd", source: errno.into() },
    })
}

/// Any process may do this to itself, if it may at all.
fn may_take_descriptors(us: u32, ours: &Userfaultfd) -> Result<(), Unsupported> {
    use std::os::fd::AsFd;
    let taken = Process::open(us).and_then(|process| process.take(ours.as_fd().as_raw_fd()));
    taken.map(drop).map_err(|source| match Errno::from_io_error(&source) {
        Some(Errno::NOSYS) => Unsupported::Lacks(vec!["pidfd_getfd"]),
        Some(Errno::PERM) => Unsupported::Forbidden { call: "pidfd_getfd" },
        _ => Unsupported::Io { doing: "take a descriptor", source },
    })
}

/// `kernel.yama.ptrace_scope`, if that forbids us to trace a process that is not our child.
/// See Documentation/admin-guide/LSM/Yama.rst.
fn forbidding_yama() -> Option<String> {
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()?.trim().to_owned();
    let allowed = match scope.as_str() {
        "0" => true,
        "3" => false,
        _ => has_cap_sys_ptrace(std::process::id()),
    };
    (!allowed).then_some(scope)
}

/// Two pages of shared memory, as guest RAM is.
struct Pages(*mut std::ffi::c_void);

impl Pages {
    const SIZE: usize = 2 * PAGE as usize;

    fn map() -> io::Result<Self> {
        let file = memfd_create("vmferry-support", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, Self::SIZE as u64)?;
        let writable = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, wherever there is room for it.
        #[expect(unsafe_code)]
        let address = unsafe { mmap(ptr::null_mut(), Self::SIZE, writable, MapFlags::SHARED, &file, 0)? };
        Ok(Self(address))
    }

    fn range(&self) -> Range<u64> {
        let start = self.0.addr() as u64;
        start..start + Self::SIZE as u64
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: it is our mapping, and nothing refers to it.
        #[expect(unsafe_code)]
        let unmapped = unsafe { munmap(self.0, Self::SIZE) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be taken away");
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one range is what is expected")]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_runs_these_tests_is_supported() {
        support().unwrap();
    }

    #[test]
    fn a_write_is_found_once_and_only_where_it_was_made() {
        let userfaultfd = Userfaultfd::over(make_userfaultfd().unwrap());
        userfaultfd.enable(&[Feature::WpHugetlbfsShmem, Feature::WpUnpopulated, Feature::WpAsync]).unwrap();
        let pages = Pages::map().unwrap();
        let pagemap = Pagemap::open(std::process::id()).unwrap();
        userfaultfd.register(pages.range(), Mode::WriteProtect).unwrap();
        let written = || {
            let mut found = Vec::new();
            pagemap.written(pages.range(), &mut found).unwrap();
            found
        };
        let take_written = || {
            let mut found = Vec::new();
            pagemap.take_written(pages.range(), &mut found).unwrap();
            found
        };
        assert_eq!(written(), [pages.range()], "what was never protected counts as written");
        userfaultfd.write_protect(pages.range()).unwrap();
        assert_eq!(written(), []);

        let second = pages.0.cast::<u8>().wrapping_add(PAGE as usize);
        // SAFETY: inside the mapping, and nothing else refers to it.
        #[expect(unsafe_code)]
        unsafe {
            second.write_volatile(7);
        }
        let expected = [pages.range().start + PAGE..pages.range().end];
        assert_eq!(written(), expected);
        assert_eq!(take_written(), expected);
        assert_eq!(written(), [], "it was protected again");

        // Also when the kernel writes for us, although this userfaultfd is for our own accesses only.
        let (end, other) = std::io::pipe().unwrap();
        rustix::io::write(&other, b"x").unwrap();
        // SAFETY: as above.
        #[expect(unsafe_code)]
        let into = unsafe { std::slice::from_raw_parts_mut(pages.0.cast::<u8>(), 1) };
        assert_eq!(rustix::io::read(&end, into).unwrap(), 1);
        assert_eq!(take_written(), [pages.range().start..pages.range().start + PAGE]);
        drop(userfaultfd);
        let mut found = Vec::new();
        assert!(pagemap.take_written(pages.range(), &mut found).is_err(), "nothing is registered any more");
    }

    #[test]
    fn a_scan_merges_neighbours_and_does_not_end_at_a_full_vector() {
        // More separate pages than regions are asked for at once.
        let count = 10_001;
        let file = memfd_create("scan", MemfdFlags::CLOEXEC).unwrap();
        let size = count * 2 * PAGE;
        ftruncate(&file, size).unwrap();
        // SAFETY: a new mapping, which stays until this process ends.
        #[expect(unsafe_code)]
        let address = unsafe {
            mmap(ptr::null_mut(), size as usize, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        };
        let address = address.unwrap();
        let start = address.addr() as u64;
        let userfaultfd = Userfaultfd::over(make_userfaultfd().unwrap());
        userfaultfd.enable(&[Feature::WpHugetlbfsShmem, Feature::WpUnpopulated, Feature::WpAsync]).unwrap();
        userfaultfd.register(start..start + size, Mode::WriteProtect).unwrap();
        userfaultfd.write_protect(start..start + size).unwrap();
        for page in 0..count {
            let at = address.cast::<u8>().wrapping_add((page * 2 * PAGE) as usize);
            // SAFETY: inside the mapping, and nothing else refers to it.
            #[expect(unsafe_code)]
            unsafe {
                at.write_volatile(1);
            }
        }
        let pagemap = Pagemap::open(std::process::id()).unwrap();
        let mut found = Vec::new();
        pagemap.take_written(start..start + size, &mut found).unwrap();
        assert_eq!(found.len() as u64, count);
        assert!(
            found
                .iter()
                .enumerate()
                .all(|(page, range)| range.start == start + page as u64 * 2 * PAGE && range.end == range.start + PAGE)
        );

        // All of them, at which the vector is full once and neighbours meet there.
        let before = found.len();
        userfaultfd.unregister(start..start + size).unwrap();
        userfaultfd.register(start..start + size, Mode::WriteProtect).unwrap();
        pagemap.written(start..start + size, &mut found).unwrap();
        assert_eq!(found.split_off(before), [start..start + size]);
    }
}
