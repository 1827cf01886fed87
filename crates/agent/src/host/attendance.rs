//! Who is there for a measuring guest: it lives for its witnesses.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How many witnesses a guest has, and whether it ever had one.
#[derive(Debug, Default)]
pub(crate) struct Attendance {
    present: AtomicUsize,
    ever: AtomicBool,
}

impl Attendance {
    /// Somebody witnesses it now.
    pub(crate) fn is_witnessed(&self) -> bool {
        self.present.load(Ordering::SeqCst) > 0
    }

    /// Somebody has, once.
    pub(crate) fn ever(&self) -> bool {
        self.ever.load(Ordering::SeqCst)
    }
}

/// A witness, while it lives.
pub(crate) struct Present<'a>(&'a Attendance);

impl<'a> Present<'a> {
    /// One more.
    pub(crate) fn of(attendance: &'a Attendance) -> Self {
        attendance.present.fetch_add(1, Ordering::SeqCst);
        attendance.ever.store(true, Ordering::SeqCst);
        Self(attendance)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.present.fetch_sub(1, Ordering::SeqCst);
    }
}
