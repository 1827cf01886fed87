//! Two interfaces of the kernel that are ioctls, with safe faces: userfaultfd (`linux/userfaultfd.h`,
//! Documentation/admin-guide/mm/userfaultfd.rst) and the scan of a page map (`linux/fs.h`,
//! Documentation/admin-guide/mm/pagemap.rst). Names and layouts are the kernel's.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr;

use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

const USERFAULTFD: u8 = 0xAA;
const API: u64 = 0xAA;

pub(super) const REGISTER_MISSING: u64 = 1;
pub(super) const REGISTER_WRITE_PROTECT: u64 = 1 << 1;

/// `PAGE_IS_WRITTEN`: written since it was protected, or never protected.
const WRITTEN: u64 = 1 << 1;
/// `PM_SCAN_WP_MATCHING`: what matches is protected in the same pass.
const SCAN_PROTECTS: u64 = 1;
/// `PM_SCAN_CHECK_WPASYNC`: fails where nobody tracks.
const SCAN_CHECKS: u64 = 1 << 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

impl From<Range<u64>> for UffdioRange {
    fn from(range: Range<u64>) -> Self {
        Self { start: range.start, len: range.end - range.start }
    }
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    destination: u64,
    source: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// A run of pages that a scan found.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    categories: u64,
}

#[repr(C)]
struct PmScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// An ioctl whose argument the kernel may read and write.
struct Request<'a, T> {
    code: Opcode,
    argument: &'a mut T,
}

// SAFETY: the argument is one of the structures above, of the layout that the kernel's header gives for the code, and
// the reference to it is valid and exclusive for as long as the call takes.
#[expect(unsafe_code)]
unsafe impl<T> Ioctl for Request<'_, T> {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.code
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self.argument).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<i32> {
        Ok(output)
    }
}

/// Enables features and gives back which the kernel has. Done once for each descriptor.
pub(super) fn api(userfaultfd: impl AsFd, features: u64) -> Result<u64> {
    let mut argument = UffdioApi { api: API, features, ioctls: 0 };
    let code = opcode::read_write::<UffdioApi>(USERFAULTFD, 0x3F);
    // SAFETY: the kernel writes nothing but the argument.
    #[expect(unsafe_code)]
    unsafe {
        ioctl(userfaultfd, Request { code, argument: &mut argument })?;
    }
    Ok(argument.features)
}

pub(super) fn register(userfaultfd: impl AsFd, range: Range<u64>, mode: u64) -> Result<()> {
    let mut argument = UffdioRegister { range: range.into(), mode, ioctls: 0 };
    let code = opcode::read_write::<UffdioRegister>(USERFAULTFD, 0);
    // SAFETY: the kernel writes nothing but the argument; memory keeps what it holds.
    #[expect(unsafe_code)]
    unsafe {
        ioctl(userfaultfd, Request { code, argument: &mut argument })?;
    }
    Ok(())
}

pub(super) fn unregister(userfaultfd: impl AsFd, range: Range<u64>) -> Result<()> {
    // The kernel calls these two "read" although it reads them.
    on_range(userfaultfd, opcode::read::<UffdioRange>(USERFAULTFD, 1), range)
}

pub(super) fn wake(userfaultfd: impl AsFd, range: Range<u64>) -> Result<()> {
    on_range(userfaultfd, opcode::read::<UffdioRange>(USERFAULTFD, 2), range)
}

fn on_range(userfaultfd: impl AsFd, code: Opcode, range: Range<u64>) -> Result<()> {
    let mut argument = UffdioRange::from(range);
    // SAFETY: the kernel only reads the argument.
    #[expect(unsafe_code)]
    unsafe {
        ioctl(userfaultfd, Request { code, argument: &mut argument })?;
    }
    Ok(())
}

/// Places pages, up to the first that is there already. Gives back how many bytes were placed even when it failed.
pub(super) fn copy(userfaultfd: impl AsFd, destination: u64, bytes: &[u8]) -> (u64, Result<()>) {
    let source = bytes.as_ptr().expose_provenance() as u64;
    let mut argument = UffdioCopy { destination, source, len: bytes.len() as u64, mode: 0, copied: 0 };
    let code = opcode::read_write::<UffdioCopy>(USERFAULTFD, 3);
    // SAFETY: the kernel reads `bytes`, which are valid for that, and writes to pages of the process whose userfaultfd
    // this is that were missing, which no reference can point to.
    #[expect(unsafe_code)]
    let result = unsafe { ioctl(userfaultfd, Request { code, argument: &mut argument }) };
    // A negative number is the error once more.
    (u64::try_from(argument.copied).unwrap_or(0), result.map(drop))
}

/// As [`copy`], with zeros.
pub(super) fn zero(userfaultfd: impl AsFd, range: Range<u64>) -> (u64, Result<()>) {
    let mut argument = UffdioZeropage { range: range.into(), mode: 0, zeroed: 0 };
    let code = opcode::read_write::<UffdioZeropage>(USERFAULTFD, 4);
    // SAFETY: as above, and nothing is read.
    #[expect(unsafe_code)]
    let result = unsafe { ioctl(userfaultfd, Request { code, argument: &mut argument }) };
    (u64::try_from(argument.zeroed).unwrap_or(0), result.map(drop))
}

pub(super) fn write_protect(userfaultfd: impl AsFd, range: Range<u64>, protect: bool) -> Result<()> {
    let mut argument = UffdioWriteprotect { range: range.into(), mode: u64::from(protect) };
    let code = opcode::read_write::<UffdioWriteprotect>(USERFAULTFD, 6);
    // SAFETY: the kernel writes nothing but the argument; memory keeps what it holds.
    #[expect(unsafe_code)]
    unsafe {
        ioctl(userfaultfd, Request { code, argument: &mut argument })?;
    }
    Ok(())
}

/// What a scan is to do beside finding written pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// Nothing.
    Find,
    /// Fail where nothing is tracked.
    Check,
    /// The same, and protect what it finds.
    Protect,
}

/// Finds written pages until the range ends or there is no room for more. Gives back how many regions were found and
/// the address at which it stopped.
pub(super) fn scan(
    pagemap: impl AsFd,
    range: Range<u64>,
    scan: Scan,
    regions: &mut [PageRegion],
) -> Result<(usize, u64)> {
    let mut argument = PmScan {
        size: size_of::<PmScan>() as u64,
        flags: match scan {
            Scan::Find => 0,
            Scan::Check => SCAN_CHECKS,
            Scan::Protect => SCAN_PROTECTS | SCAN_CHECKS,
        },
        start: range.start,
        end: range.end,
        walk_end: 0,
        regions: regions.as_mut_ptr().expose_provenance() as u64,
        regions_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: WRITTEN,
        category_anyof_mask: 0,
        return_mask: WRITTEN,
    };
    let code = opcode::read_write::<PmScan>(b'f', 16);
    // SAFETY: the kernel writes the argument and at most as many regions as it is told there is room for.
    #[expect(unsafe_code)]
    let found = unsafe { ioctl(pagemap, Request { code, argument: &mut argument })? };
    Ok((usize::try_from(found).unwrap_or(0), argument.walk_end))
}
