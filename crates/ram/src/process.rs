//! Another process as `/proc` shows it (`proc(5)`): its mappings, its threads, and its descriptors.

use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::str::SplitAsciiWhitespace;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// What the link of a userfaultfd in `/proc/PID/fd` says.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";
/// The device that makes them for whoever may open it.
pub const USERFAULTFD_DEVICE: &str = "/dev/userfaultfd";
/// `CAP_SYS_PTRACE`, a bit of `CapEff`.
const CAP_SYS_PTRACE: u64 = 1 << 19;

/// Whether this process has `CAP_SYS_PTRACE`: it may trace others, and make userfaultfds that wait for the kernel too. A
/// process that cannot be read counts as one without.
pub fn has_cap_sys_ptrace(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    field.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0) & CAP_SYS_PTRACE != 0
}

/// Holds on to a process: its pid may be given to another one, its descriptor never is.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    descriptor: OwnedFd,
}

impl Process {
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let invalid = || io::Error::from(ErrorKind::InvalidInput);
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(invalid)?;
        Ok(Self { pid, descriptor: pidfd_open(raw, PidfdFlags::empty())? })
    }

    /// It has ended.
    pub(crate) fn is_gone(&self) -> bool {
        // A process's descriptor becomes readable when the process ends.
        let mut ended = [PollFd::new(&self.descriptor, PollFlags::IN)];
        poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|count| count > 0)
    }

    /// A descriptor of the process becomes one of ours too.
    pub(crate) fn take(&self, number: RawFd) -> io::Result<OwnedFd> {
        Ok(pidfd_getfd(&self.descriptor, number, PidfdGetfdFlags::empty())?)
    }

    /// This descriptor of the process is a userfaultfd.
    pub(crate) fn has_userfaultfd(&self, number: RawFd) -> bool {
        fs::read_link(format!("/proc/{}/fd/{number}", self.pid)).is_ok_and(|link| link.as_os_str() == USERFAULTFD)
    }

    /// A descriptor of the process for the device that makes userfaultfds.
    pub(crate) fn userfaultfd_device(&self) -> Option<RawFd> {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?.flatten();
        let is_it = |path: &Path| fs::read_link(path).is_ok_and(|link| link.as_os_str() == USERFAULTFD_DEVICE);
        let found = descriptors.map(|it| it.path()).find(|path| is_it(path))?;
        found.file_name()?.to_str()?.parse().ok()
    }

    /// In the order of their addresses.
    pub(crate) fn mappings(&self) -> io::Result<Vec<Mapping>> {
        let text = fs::read(format!("/proc/{}/maps", self.pid))?;
        Ok(String::from_utf8_lossy(&text).lines().filter_map(Mapping::parse).collect())
    }

    /// It is one of its threads, by the number that it has for itself; of one in another namespace that cannot be told, and
    /// counts as one.
    pub(crate) fn has_thread(&self, thread: u32) -> bool {
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/pid")).ok();
        if namespace("self") != namespace(&self.pid.to_string()) {
            return true;
        }
        Path::new(&format!("/proc/{}/task/{thread}", self.pid)).exists()
    }

    /// The threads by their ids, the main thread first.
    pub(crate) fn threads(&self) -> io::Result<Vec<u32>> {
        let entries = fs::read_dir(format!("/proc/{}/task", self.pid))?;
        let mut threads: Vec<u32> =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        threads.sort_unstable_by_key(|thread| (*thread != self.pid, *thread));
        Ok(threads)
    }

    /// None when it has ended.
    pub(crate) fn thread_status(&self, thread: u32) -> Option<ThreadStatus> {
        ThreadStatus::parse(&fs::read_to_string(format!("/proc/{}/task/{thread}/status", self.pid)).ok()?)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) range: Range<u64>,
    /// As in `rw-s`.
    pub(crate) permissions: String,
    /// Where in the file it begins.
    pub(crate) offset: u64,
    /// Of the file: major and minor number of its device, and its inode.
    pub(crate) file: (u32, u32, u64),
    pub(crate) path: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let range = hexadecimal(&mut fields, '-')?;
        let permissions = fields.next()?.to_owned();
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let device = hexadecimal(&mut fields, ':')?;
        let inode = fields.next()?;
        // The rest is the path, with its blanks.
        let path = fields.next().and_then(|word| Some(line[line.find(word)?..].to_owned())).unwrap_or_default();
        Some(Self {
            range: range.0..range.1,
            permissions,
            offset,
            file: (device.0 as u32, device.1 as u32, inode.parse().ok()?),
            path,
        })
    }
}

fn hexadecimal(fields: &mut SplitAsciiWhitespace<'_>, between: char) -> Option<(u64, u64)> {
    let (first, second) = fields.next()?.split_once(between)?;
    Some((u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(second, 16).ok()?))
}

/// What is read of `/proc/PID/task/TID/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadStatus {
    /// It ended, though it may still be listed.
    pub(crate) ended: bool,
    /// The id of the thread that traces it.
    pub(crate) tracer: Option<u32>,
    /// It may not make every system call.
    pub(crate) sandboxed: bool,
}

impl ThreadStatus {
    fn parse(text: &str) -> Option<Self> {
        let field = |name| status_field(text, name);
        Some(Self {
            ended: field("State")?.starts_with(['Z', 'X']),
            tracer: field("TracerPid")?.parse().ok().filter(|pid| *pid != 0),
            // A kernel without seccomp has no such line.
            sandboxed: field("Seccomp").is_some_and(|mode| mode != "0"),
        })
    }
}

/// The pid of the process that a thread is of; the thread's own id when it has ended.
pub(crate) fn process_of(thread: u32) -> u32 {
    let text = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    status_field(&text, "Tgid").and_then(|pid| pid.parse().ok()).unwrap_or(thread)
}

fn status_field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_read_with_blanks_in_its_path() {
        let line =
            "7f31c0000000-7f3200000000 rw-s 00001000 00:1b 4711                       /dev/shm/my guest.ram (deleted)";
        let expected = Mapping {
            range: 0x7f31_c000_0000..0x7f32_0000_0000,
            permissions: "rw-s".into(),
            offset: 4096,
            file: (0, 0x1b, 4711),
            path: "/dev/shm/my guest.ram (deleted)".into(),
        };
        assert_eq!(Mapping::parse(line), Some(expected));
        let anonymous = Mapping::parse("7f31c0000000-7f31c0001000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((anonymous.path.as_str(), anonymous.file), ("", (0, 0, 0)));
        assert_eq!(Mapping::parse("nonsense"), None);
    }

    #[test]
    fn a_thread_that_is_traced_in_a_sandbox_says_so() {
        let status = ThreadStatus::parse("Name:\tState: Z\nState:\tS (sleeping)\nTracerPid:\t12\nSeccomp:\t2\n");
        assert_eq!(status, Some(ThreadStatus { ended: false, tracer: Some(12), sandboxed: true }));
        let status = ThreadStatus::parse("State:\tZ (zombie)\nTracerPid:\t0\n");
        assert_eq!(status, Some(ThreadStatus { ended: true, tracer: None, sandboxed: false }));
    }

    #[test]
    fn we_have_mappings_and_threads_and_are_not_gone() {
        let us = Process::open(std::process::id()).unwrap();
        assert!(us.mappings().unwrap().iter().any(|mapping| mapping.path == "[vdso]"));
        assert_eq!(us.threads().unwrap()[0], us.pid);
        assert!(!us.thread_status(us.pid).unwrap().ended);
        assert!(!us.is_gone());
    }
}
