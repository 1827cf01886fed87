//! Words of a file that is mapped: what is changed in them is there for whoever comes after this process.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// See the module's text. The file is one that nobody else writes to or shortens.
#[derive(Debug)]
pub(crate) struct Words {
    address: NonNull<AtomicU64>,
    count: usize,
}

impl Words {
    /// So many words, at least one, from this place in a file on, which is a multiple of a page and before its end.
    pub(crate) fn map(file: &File, offset: u64, count: usize) -> io::Result<Self> {
        let length = count * size_of::<AtomicU64>();
        if count == 0 || file.metadata()?.len() < offset + length as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (access, how) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping, wherever there is room for it.
        #[expect(unsafe_code)]
        let address = unsafe { mmap(ptr::null_mut(), length, access, how, file, offset)? };
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { address, count })
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped there, aligned to a page, until this is dropped; any bytes are words; and whoever
        // changes them does so atomically.
        #[expect(unsafe_code)]
        unsafe {
            slice::from_raw_parts(self.address.as_ptr(), self.count)
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: it is our mapping, and nothing refers to it any more.
        #[expect(unsafe_code)]
        let unmapped = unsafe { munmap(self.address.as_ptr().cast(), self.count * size_of::<AtomicU64>()) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be taken away");
    }
}

// SAFETY: it is the only one to end the mapping, and threads share only atomic words.
#[expect(unsafe_code)]
unsafe impl Send for Words {}
// SAFETY: as above.
#[expect(unsafe_code)]
unsafe impl Sync for Words {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_is_changed_is_in_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(3 * 4096).unwrap();
        let words = Words::map(&file, 4096, 1000).unwrap();
        words[999].store(u64::from_le_bytes(*b"the last"), Ordering::Relaxed);
        drop(words);
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(&bytes[4096 + 999 * 8..][..8], b"the last");
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * 4096).unwrap();
        assert!(Words::map(&file, 4096, 513).is_err() && Words::map(&file, 0, 0).is_err());
        assert!(Words::map(&file, 4096, 512).is_ok());
    }
}
