//! What its user sees of something that takes a while, and that he wants it to end.

use std::sync::Mutex;
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use vmferry_api::Problem;

use crate::error::AgentError;

/// How it looks.
pub(crate) trait View: Clone {
    /// It has come to an end: nothing changes any more.
    fn is_over(&self) -> bool;

    /// So long it takes so far.
    fn set_elapsed_ms(&mut self, elapsed_ms: u64);

    /// This is its end.
    fn end(&mut self, problem: Option<Problem>);
}

/// See the module's text.
pub(crate) struct Shown<V> {
    view: Mutex<V>,
    begun: Instant,
    /// Its user wants it to end.
    pub(crate) cancelled: CancellationToken,
}

impl<V: View> Shown<V> {
    /// It begins, and looks like this.
    pub(crate) fn new(view: V) -> Self {
        Self { view: Mutex::new(view), begun: Instant::now(), cancelled: CancellationToken::new() }
    }

    /// It looks different now, unless it is over.
    pub(crate) fn change(&self, change: impl FnOnce(&mut V)) {
        let mut view = self.view.lock().expect("no holder of this lock panics");
        if !view.is_over() {
            view.set_elapsed_ms(self.begun.elapsed().as_millis() as u64);
            change(&mut view);
        }
    }

    pub(crate) fn view(&self) -> V {
        self.change(|_| ());
        self.view.lock().expect("no holder of this lock panics").clone()
    }

    pub(crate) fn ends(&self, how: &Result<(), AgentError>) {
        self.change(|view| view.end(how.as_ref().err().map(Problem::from)));
    }
}
