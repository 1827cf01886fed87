//! What a migration tells while it runs, for whoever looks, then or later.

use std::sync::{Mutex, MutexGuard};

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use vmferry_api::{MigrationEvent, Progress};

/// See the module's text.
pub(crate) struct Told(Mutex<State>);

struct State {
    /// All but progress; with the last progress this is what somebody needs who looks later.
    history: Vec<MigrationEvent>,
    progress: Option<Progress>,
    live: broadcast::Sender<MigrationEvent>,
}

impl Told {
    pub(super) fn nothing() -> Self {
        Self(Mutex::new(State { history: Vec::new(), progress: None, live: broadcast::channel(256).0 }))
    }

    pub(super) fn tell(&self, event: MigrationEvent) {
        let mut told = self.lock();
        match &event {
            MigrationEvent::Progress(progress) => told.progress = Some(*progress),
            // One place after another: the last is the one.
            MigrationEvent::Queued { .. } if matches!(told.history.last(), Some(MigrationEvent::Queued { .. })) => {
                told.history.pop();
                told.history.push(event.clone());
            }
            other => told.history.push(other.clone()),
        }
        // An error means that nobody looks.
        let _ = told.live.send(event);
    }

    /// What was told so far, and a stream of what follows, without a gap between them.
    pub(crate) fn watch(&self) -> (Vec<MigrationEvent>, broadcast::Receiver<MigrationEvent>) {
        let told = self.lock();
        let mut past = told.history.clone();
        let is_over = past.last().is_some_and(MigrationEvent::is_last);
        past.extend(told.progress.filter(|_| !is_over).map(MigrationEvent::Progress));
        (past, told.live.subscribe())
    }

    /// The last was told: it has ended, one way or the other.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().history.last().is_some_and(MigrationEvent::is_last)
    }

    /// How far it was last.
    pub(crate) fn progress(&self) -> Option<Progress> {
        self.lock().progress
    }

    /// Waits until it has ended, one way or the other.
    pub(crate) async fn end(&self) {
        let mut live = self.watch().1;
        while !self.is_over() {
            if let Err(RecvError::Closed) = live.recv().await {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder of this lock panics")
    }
}
