//! Buffers that payloads arrive in. They are large and used again and again: asking the kernel for fresh pages each
//! time would cost as much as copying. Each begins with a line of the processor's cache: the kernel takes up to four times
//! as long to copy to anywhere else, on processors where it copies by `rep movsb`.

use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;

/// How much is kept for later, at most.
const KEPT: usize = 32 << 20;
/// A line of the processor's cache, in bytes.
pub(crate) const LINE: usize = 64;

/// Buffers that are not in use.
#[derive(Debug, Default)]
pub struct Pool(Mutex<Free>);

#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

impl Pool {
    /// A buffer of this length, aligned to 64 bytes; what it holds is left from before.
    pub fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let mut bytes = {
            let mut free = self.0.lock().expect("no holder of this lock panics");
            let buffer = free.buffers.pop().unwrap_or_default();
            free.bytes -= buffer.capacity();
            buffer
        };
        if bytes.len() < length + LINE {
            bytes.resize(length + LINE, 0);
        }
        let start = bytes.as_ptr().align_offset(LINE).min(LINE);
        Buffer { bytes, used: start..start + length, home: Arc::downgrade(self) }
    }
}

/// A buffer from a pool, to which it returns.
pub struct Buffer {
    bytes: Vec<u8>,
    used: Range<usize>,
    home: Weak<Pool>,
}

impl Buffer {
    /// As what users get; the buffer returns when they let go of it.
    pub fn freeze(self) -> Bytes {
        // A small payload must not keep a large buffer busy for as long as its user likes.
        if self.used.len() < self.bytes.capacity() / 4 {
            return Bytes::copy_from_slice(self.as_ref());
        }
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.used.clone()]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.used.clone()]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        let mut free = home.0.lock().expect("no holder of this lock panics");
        if free.bytes + self.bytes.capacity() <= KEPT {
            free.bytes += self.bytes.capacity();
            free.buffers.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_and_what_is_kept_is_bounded() {
        let pool = Arc::new(Pool::default());
        let first = pool.take(1000);
        let at = first.as_ref().as_ptr();
        let bytes = first.freeze();
        assert_eq!(bytes.as_ptr(), at, "nothing was copied");
        drop(bytes);
        assert_eq!(pool.take(500).as_ref().as_ptr(), at);
        assert!((1..100).all(|length| pool.take(length * 1000).as_ref().as_ptr().addr().is_multiple_of(LINE)));
        let many: Vec<_> = (0..50).map(|_| pool.take(1 << 20)).collect();
        drop(many);
        assert!(pool.0.lock().unwrap().bytes <= KEPT);
    }
}
