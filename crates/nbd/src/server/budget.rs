//! How many bytes the requests of a server's clients hold, so that many of them cannot fill the memory.

use std::sync::{Condvar, Mutex, MutexGuard};

/// See the module's text.
pub(crate) struct Budget {
    all: u64,
    left: Mutex<u64>,
    more: Condvar,
}

impl Budget {
    pub(crate) fn new(bytes: u64) -> Self {
        Self { all: bytes, left: Mutex::new(bytes), more: Condvar::new() }
    }

    /// Waits until there are so many. Whoever asks holds none that others wait for at the same time as they wait for it.
    pub(crate) fn take(&self, bytes: u64) -> Taken<'_> {
        let enough = |left: &mut u64| *left < bytes;
        let mut left = self.more.wait_while(self.lock(), enough).expect("nobody panics with this lock");
        *left -= bytes;
        Taken { of: self, bytes }
    }

    /// Nobody holds any.
    pub(crate) fn is_whole(&self) -> bool {
        *self.lock() == self.all
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.left.lock().expect("nobody panics with this lock")
    }
}

/// Bytes that are given back when this is dropped.
pub(crate) struct Taken<'a> {
    of: &'a Budget,
    bytes: u64,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.of.lock() += self.bytes;
        self.of.more.notify_all();
    }
}
