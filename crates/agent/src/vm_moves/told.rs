//! What the user of a move is told, and tells: how far it is, and that it is to end.

use std::sync::Mutex;
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use vmferry_api::{Problem, VmMoveDisk, VmMoveState, VmMoveView};

use crate::error::AgentError;

/// See the module's text.
pub(super) struct Told {
    view: Mutex<VmMoveView>,
    begun: Instant,
    /// Its user wants it to end.
    pub(super) cancelled: CancellationToken,
}

impl Told {
    pub(super) fn new(vm: &str, to: &str, state: VmMoveState, disks: Vec<VmMoveDisk>, notes: Vec<String>) -> Self {
        let total = disks.iter().map(|it| it.size).sum();
        let view = VmMoveView {
            vm: vm.into(),
            to: to.into(),
            state,
            disks,
            total,
            done: 0,
            sent: 0,
            elapsed_ms: 0,
            problem: None,
            notes,
        };
        Self { view: Mutex::new(view), begun: Instant::now(), cancelled: CancellationToken::new() }
    }

    fn change(&self, change: impl FnOnce(&mut VmMoveView)) {
        let mut view = self.view.lock().expect("no holder of this lock panics");
        if !view.state.is_last() {
            view.elapsed_ms = self.begun.elapsed().as_millis() as u64;
            change(&mut view);
        }
    }

    pub(super) fn view(&self) -> VmMoveView {
        self.change(|_| ());
        self.view.lock().expect("no holder of this lock panics").clone()
    }

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

    pub(super) fn ends(&self, how: &Result<(), AgentError>) {
        self.change(|view| match how {
            Ok(()) => view.state = VmMoveState::Done,
            Err(error) => {
                view.state = VmMoveState::Failed;
                view.problem = Some(Problem::from(error));
            }
        });
    }
}
