//! What the user of a move is told, and tells: how far it is, and that it is to end.

use std::sync::Mutex;
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use vmferry_api::{DiskMoveState, DiskMoveView, Problem};

use crate::error::AgentError;

/// See the module's text.
pub(super) struct Told {
    view: Mutex<DiskMoveView>,
    begun: Instant,
    /// Its user wants it to end.
    pub(super) cancelled: CancellationToken,
}

impl Told {
    pub(super) fn new(vm: &str, disk: &str, from: &str, to: &str, format: &str) -> Self {
        let view = DiskMoveView {
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
        };
        Self { view: Mutex::new(view), begun: Instant::now(), cancelled: CancellationToken::new() }
    }

    fn change(&self, change: impl FnOnce(&mut DiskMoveView)) {
        let mut view = self.view.lock().expect("no holder of this lock panics");
        if matches!(view.state, DiskMoveState::Copying | DiskMoveState::Switching) {
            view.elapsed_ms = self.begun.elapsed().as_millis() as u64;
            change(&mut view);
        }
    }

    pub(super) fn view(&self) -> DiskMoveView {
        self.change(|_| ());
        self.view.lock().expect("no holder of this lock panics").clone()
    }

    /// It is under way.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.view().state, DiskMoveState::Copying | DiskMoveState::Switching)
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

    pub(super) fn ends(&self, how: &Result<(), AgentError>) {
        self.change(|view| match how {
            Ok(()) => view.state = DiskMoveState::Done,
            Err(error) => {
                view.state = DiskMoveState::Failed;
                view.problem = Some(Problem::from(error));
            }
        });
    }
}
