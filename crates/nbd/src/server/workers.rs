//! The threads of a connection that do what has to wait, so that the thread that reads requests does not.
//!
//! They are started when they are needed, and end with the connection.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread::{Builder, Scope};

use crate::limits;

/// What they have to do.
pub(crate) struct Queue<J> {
    state: Mutex<State<J>>,
    work: Condvar,
    room: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    workers: usize,
    busy: usize,
    closed: bool,
}

impl<J: Send> Queue<J> {
    pub(crate) fn new() -> Self {
        let state = State { jobs: VecDeque::new(), workers: 0, busy: 0, closed: false };
        Self { state: Mutex::new(state), work: Condvar::new(), room: Condvar::new() }
    }

    /// Has a thread do this, waiting while all have something to do. Gives it back when there can be no thread.
    pub(crate) fn put<'scope>(
        &'scope self,
        job: J,
        scope: &'scope Scope<'scope, '_>,
        work: impl Fn(J) + Clone + Send + 'scope,
    ) -> Result<(), J> {
        let full = |state: &mut State<J>| state.jobs.len() + state.busy >= limits::REQUESTS;
        let mut state = self.room.wait_while(self.lock(), full).expect("nobody panics with this lock");
        if state.workers <= state.jobs.len() + state.busy {
            let run = move || {
                while let Some(job) = self.next() {
                    work(job);
                    self.lock().busy -= 1;
                    self.room.notify_one();
                }
            };
            match Builder::new().name("nbd-worker".into()).spawn_scoped(scope, run) {
                Ok(_) => state.workers += 1,
                Err(_) if state.workers == 0 => return Err(job),
                Err(_) => {}
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// No more comes; what is there is still done.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    fn next(&self) -> Option<J> {
        let idle = |state: &mut State<J>| state.jobs.is_empty() && !state.closed;
        let mut state = self.work.wait_while(self.lock(), idle).expect("nobody panics with this lock");
        let job = state.jobs.pop_front()?;
        state.busy += 1;
        Some(job)
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().expect("nobody panics with this lock")
    }
}
