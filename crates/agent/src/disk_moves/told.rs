//! What the user of a move is told.

use vmferry_api::{DiskMoveState, DiskMoveView, Problem};

use crate::shown::{Shown, View};

/// See the module's text.
pub(super) type Told = Shown<DiskMoveView>;

impl View for DiskMoveView {
    fn is_over(&self) -> bool {
        !matches!(self.state, DiskMoveState::Copying | DiskMoveState::Switching)
    }

    fn set_elapsed_ms(&mut self, elapsed_ms: u64) {
        self.elapsed_ms = elapsed_ms;
    }

    fn end(&mut self, problem: Option<Problem>) {
        self.state = if problem.is_some() { DiskMoveState::Failed } else { DiskMoveState::Done };
        self.problem = problem;
    }
}

/// One that begins.
pub(super) fn told(vm: &str, disk: &str, from: &str, to: &str, format: &str) -> Told {
    Shown::new(DiskMoveView {
        vm: vm.into(),
        disk: disk.into(),
        from: from.into(),
        to: to.into(),
        format: format.into(),
        state: DiskMoveState::Copying,
        total: 0,
        done: 0,
        elapsed_ms: 0,
        problem: None,
        notes: Vec::new(),
    })
}

impl Told {
    /// It is under way.
    pub(super) fn is_open(&self) -> bool {
        !self.view().is_over()
    }

    pub(super) fn progress(&self, done: u64, total: u64) {
        self.change(|view| (view.done, view.total) = (done, total));
    }

    pub(super) fn switches(&self) {
        self.change(|view| view.state = DiskMoveState::Switching);
    }

    pub(super) fn note(&self, note: String) {
        self.change(|view| view.notes.push(note));
    }
}
