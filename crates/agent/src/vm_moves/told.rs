//! What the user of a move is told.

use vmferry_api::{Problem, VmMoveDisk, VmMoveState, VmMoveView};

use crate::shown::{Shown, View};

/// See the module's text.
pub(super) type Told = Shown<VmMoveView>;

impl View for VmMoveView {
    fn is_over(&self) -> bool {
        self.state.is_last()
    }

    fn set_elapsed_ms(&mut self, elapsed_ms: u64) {
        self.elapsed_ms = elapsed_ms;
    }

    fn end(&mut self, problem: Option<Problem>) {
        self.state = if problem.is_some() { VmMoveState::Failed } else { VmMoveState::Done };
        self.problem = problem;
    }
}

/// One in this state, of which nothing is done yet.
pub(super) fn told(vm: &str, to: &str, state: VmMoveState, disks: Vec<VmMoveDisk>, notes: Vec<String>) -> Told {
    Shown::new(VmMoveView {
        vm: vm.into(),
        to: to.into(),
        state,
        total: disks.iter().map(|it| it.size).sum(),
        disks,
        done: 0,
        sent: 0,
        elapsed_ms: 0,
        problem: None,
        notes,
    })
}

impl Told {
    pub(super) fn state(&self) -> VmMoveState {
        self.view().state
    }

    pub(super) fn progress(&self, done: u64, sent: u64) {
        self.change(|view| (view.done, view.sent) = (done, sent));
    }

    pub(super) fn hands_over(&self) {
        self.change(|view| {
            view.state = VmMoveState::HandingOver;
            view.done = view.total;
        });
    }

    pub(super) fn note(&self, note: String) {
        self.change(|view| view.notes.push(note));
    }
}
