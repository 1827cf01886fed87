//! A userfaultfd: what a process's memory does is asked for and answered through it, here from another process.
//!
//! Facts are from Documentation/admin-guide/mm/userfaultfd.rst. All ranges are addresses in the process that it was made
//! in, and consist of whole pages.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::ioctls;
use crate::process::Process;

/// The length of a message, `struct uffd_msg`.
const MESSAGE: usize = 32;
/// How many messages are read at once.
const MESSAGES: usize = 64;
/// `UFFD_EVENT_PAGEFAULT`, the first byte of a message.
const FAULT: u8 = 0x12;
/// Where in a message the address is, and the thread.
const ADDRESS: Range<usize> = 16..24;
const THREAD: Range<usize> = 24..28;

/// What is needed beyond what every userfaultfd can do, by the name that the kernel's documentation gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Feature {
    /// Pages of shared memory can be missing. Linux 4.11.
    MissingShmem,
    /// Faults tell whose they are. Linux 4.14.
    ThreadId,
    /// Shared memory can be write-protected. Linux 5.19.
    WpHugetlbfsShmem,
    /// Pages that are not there yet can be write-protected. Linux 6.4.
    WpUnpopulated,
    /// Whoever writes to a protected page does not wait: the kernel notes it and lifts the protection. Linux 6.7.
    WpAsync,
}

impl Feature {
    fn bit(self) -> u64 {
        match self {
            Feature::MissingShmem => 1 << 5,
            Feature::ThreadId => 1 << 8,
            Feature::WpHugetlbfsShmem => 1 << 12,
            Feature::WpUnpopulated => 1 << 13,
            Feature::WpAsync => 1 << 15,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Feature::MissingShmem => "UFFD_FEATURE_MISSING_SHMEM",
            Feature::ThreadId => "UFFD_FEATURE_THREAD_ID",
            Feature::WpHugetlbfsShmem => "UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
            Feature::WpUnpopulated => "UFFD_FEATURE_WP_UNPOPULATED",
            Feature::WpAsync => "UFFD_FEATURE_WP_ASYNC",
        }
    }
}

/// Why a userfaultfd cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnableError {
    /// The kernel is too old or was built without them.
    #[error("the kernel has no {}", .0.join(", "))]
    Lacks(Vec<&'static str>),
    /// Anything else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What happens at the pages of a range that is registered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    /// Whoever touches a page that is not there waits until it is placed.
    Missing,
    /// Writes to protected pages are noted, or wait.
    WriteProtect,
}

/// How far pages were placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copied {
    /// From the start.
    pub(crate) bytes: u64,
    /// The page after these was there already.
    pub(crate) met_a_page: bool,
}

/// Somebody waits at a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// Which it touched.
    pub(crate) address: u64,
    /// Its thread, as the process knows it; only with [`Feature::ThreadId`].
    pub(crate) thread: u32,
}

/// What a wait for faults ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// There are some to read.
    Faults,
    /// There were none for so long.
    Nothing,
    /// The process has ended.
    Gone,
}

/// See the module's text. Ending it ends all that was registered: the kernel lifts protections and wakes who waits.
#[derive(Debug)]
pub(crate) struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// One on which [`Userfaultfd::enable`] was or will be called, in non-blocking mode.
    pub(crate) fn over(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Must be called first and once.
    pub(crate) fn enable(&self, features: &[Feature]) -> Result<(), EnableError> {
        let wanted = features.iter().fold(0, |bits, feature| bits | feature.bit());
        match ioctls::api(self, wanted) {
            Ok(_) => Ok(()),
            Err(Errno::INVAL) => {
                // Asked for nothing, the kernel tells what it has.
                let has = ioctls::api(self, 0).map_err(io::Error::from)?;
                let lacks = features.iter().filter(|feature| has & feature.bit() == 0).map(|feature| feature.name());
                Err(EnableError::Lacks(lacks.collect()))
            }
            Err(error) => Err(EnableError::Io(error.into())),
        }
    }

    pub(crate) fn register(&self, range: Range<u64>, mode: Mode) -> io::Result<()> {
        let mode = match mode {
            Mode::Missing => ioctls::REGISTER_MISSING,
            Mode::WriteProtect => ioctls::REGISTER_WRITE_PROTECT,
        };
        Ok(ioctls::register(self, range, mode)?)
    }

    /// Lifts protections, and wakes who waits.
    pub(crate) fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        Ok(ioctls::unregister(self, range)?)
    }

    pub(crate) fn write_protect(&self, range: Range<u64>) -> io::Result<()> {
        self.set_write_protection(range, true)
    }

    /// Lifts the protection, and wakes who waits.
    pub(crate) fn let_write(&self, range: Range<u64>) -> io::Result<()> {
        self.set_write_protection(range, false)
    }

    fn set_write_protection(&self, range: Range<u64>, protect: bool) -> io::Result<()> {
        while let Err(error) = ioctls::write_protect(self, range.clone(), protect) {
            wait_for_mappings(error)?;
        }
        Ok(())
    }

    /// Places pages and wakes who waits for them, up to the first that is there already. `bytes` needs no alignment.
    pub(crate) fn copy(&self, destination: u64, bytes: &[u8]) -> io::Result<Copied> {
        place(bytes.len() as u64, |placed| ioctls::copy(self, destination + placed, &bytes[placed as usize..]))
    }

    /// As [`Userfaultfd::copy`], with zeros. They take up memory as other pages do.
    pub(crate) fn zero(&self, range: Range<u64>) -> io::Result<Copied> {
        place(range.end - range.start, |placed| ioctls::zero(self, range.start + placed..range.end))
    }

    /// Has whoever waits look again, and wait again if the page is still missing.
    pub(crate) fn wake(&self, range: Range<u64>) -> io::Result<()> {
        Ok(ioctls::wake(self, range)?)
    }

    /// Waits so long for somebody to wait at a page.
    pub(crate) fn wait(&self, process: &Process, timeout: Duration) -> io::Result<Waited> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut ready = [PollFd::new(self, PollFlags::IN), PollFd::new(process, PollFlags::IN)];
            match poll(&mut ready, Some(&left)) {
                Ok(_) if !ready[1].revents().is_empty() => return Ok(Waited::Gone),
                Ok(0) => return Ok(Waited::Nothing),
                Ok(_) => return Ok(Waited::Faults),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Who began to wait. Does not wait itself.
    pub(crate) fn read_faults(&self, faults: &mut Vec<Fault>) -> io::Result<()> {
        let mut messages = [0; MESSAGE * MESSAGES];
        loop {
            let length = match rustix::io::read(self, &mut messages) {
                Ok(length) => length,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for message in messages[..length].chunks_exact(MESSAGE).filter(|message| message[0] == FAULT) {
                let address = message[ADDRESS].try_into().expect("an address has 8 bytes");
                let thread = message[THREAD].try_into().expect("a thread's id has 4 bytes");
                faults.push(Fault { address: u64::from_ne_bytes(address), thread: u32::from_ne_bytes(thread) });
            }
            if length < messages.len() {
                return Ok(());
            }
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The kernel stops where a page is there already, and also when it is disturbed. `attempt` goes on after so many bytes.
fn place(length: u64, mut attempt: impl FnMut(u64) -> (u64, rustix::io::Result<()>)) -> io::Result<Copied> {
    let mut bytes = 0;
    while bytes < length {
        let (more, result) = attempt(bytes);
        bytes += more;
        match result {
            Err(Errno::EXIST) => return Ok(Copied { bytes, met_a_page: true }),
            // What stopped it is told at the next attempt.
            Err(Errno::AGAIN) if more > 0 => {}
            Err(error) => wait_for_mappings(error)?,
            Ok(()) => {}
        }
    }
    Ok(Copied { bytes, met_a_page: false })
}

/// Calls fail with `EAGAIN` while the process changes its mappings, which is a matter of microseconds.
fn wait_for_mappings(error: Errno) -> io::Result<()> {
    let error = io::Error::from(error);
    if error.kind() != ErrorKind::WouldBlock {
        return Err(error);
    }
    thread::yield_now();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placing_goes_on_after_a_disturbance_and_ends_at_a_page_that_is_there() {
        let mut answers = vec![(8192, Err(Errno::AGAIN)), (0, Err(Errno::AGAIN)), (4096, Ok(()))].into_iter();
        let mut asked = Vec::new();
        let copied = place(12288, |placed| {
            asked.push(placed);
            answers.next().unwrap()
        });
        assert_eq!(copied.unwrap(), Copied { bytes: 12288, met_a_page: false });
        assert_eq!(asked, [0, 8192, 8192]);

        let mut answers = vec![(4096, Err(Errno::AGAIN)), (0, Err(Errno::EXIST))].into_iter();
        let copied = place(12288, |_| answers.next().unwrap());
        assert_eq!(copied.unwrap(), Copied { bytes: 4096, met_a_page: true });

        let error = place(4096, |_| (0, Err(Errno::SRCH))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::SRCH.raw_os_error()));
    }
}
