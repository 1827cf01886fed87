//! Drives the source's half of the protocol (`vmferry_custody`) for one migration: does what is due, tells the machine
//! what came of it, and again, until it is at rest. A migration under way and one that an agent finds in its journal are
//! driven alike; only what its user is told differs.
//!
//! What does not come off is due again a second later, and QEMU is asked then what it does: so no event that was missed,
//! and no order that failed, leaves a guest other than the machine wants it.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_custody::source::{Deed, Event, OutEnd, OutStep, Phase, Qemu, Refused, Row};
use vmferry_custody::{Answer, Source, Start};
use vmferry_qemu::EventStream;
use vmferry_qemu::qmp::commands;

use super::look::{GLANCE, look};
use super::post_copy::{RETRY, Serving};
use super::teller::Audience;
use crate::engine::qemu::stop_copying;
use crate::engine::{EngineError, RamEngine};
use crate::error::AgentError;
use crate::host::{GRACE, Host, Stage, Vm};
use crate::journal::OutRecord;
use crate::peers::{Abandon, Commit, InWord, IncomingState, Peer};

/// How long the guest waits for its destination to let go before it runs again without that.
const LET_GO: Duration = Duration::from_secs(1);
/// How long it is waited until nothing is left there, while the guest runs.
const CLEAN: Duration = Duration::from_secs(12);
/// How long the destination may take to have the guest as it is to be, before its user is told otherwise.
const RUNS: Duration = Duration::from_secs(5);

/// See the module's text.
pub(crate) struct Custody {
    pub(super) host: Arc<Host>,
    /// As it began, or was found.
    pub(super) record: OutRecord,
    pub(super) peer: Peer,
    state: Mutex<State>,
    changed: Notify,
    /// Its user has decided something.
    decided: Notify,
}

pub(super) struct State {
    machine: Source,
    /// Why it is undone, or what became of it, in words.
    pub(super) why: String,
    /// What the destination says of its own side.
    detail: Option<String>,
    /// Since when the destination is asked in this phase.
    asked: Option<Instant>,
    /// The destination has said that it let go.
    let_go: bool,
    /// Its user has kept the guest here.
    kept: bool,
    /// Its user does not want it moved any more.
    unwanted: bool,
    /// What the destination keeps of its disks for another try, in bytes.
    kept_there: u64,
    /// What its user was told and need not be told again.
    told: Vec<&'static str>,
}

/// Whom its driver works with and for.
pub(super) struct Hands<'a> {
    /// What copies the RAM, while there is one.
    pub(super) engine: Option<Box<dyn RamEngine>>,
    /// How post-copy goes on.
    pub(super) serving: Option<Serving>,
    /// Hears how it goes on.
    pub(super) audience: &'a dyn Audience,
}

impl Custody {
    /// Of a migration that is about to begin.
    pub(super) fn begin(host: &Arc<Host>, record: OutRecord, peer: Peer) -> Arc<Self> {
        let mut machine = Source::new(record.running);
        machine.apply(Event::Begin).expect("nothing is open yet");
        Self::with(host, record, peer, machine, String::new())
    }

    /// Of one that the journal holds.
    pub(super) fn found(host: &Arc<Host>, record: OutRecord, peer: Peer) -> Arc<Self> {
        let machine = Source::recover(record.step, record.running);
        Self::with(host, record, peer, machine, "the agent ended while it was under way".into())
    }

    fn with(host: &Arc<Host>, record: OutRecord, peer: Peer, machine: Source, why: String) -> Arc<Self> {
        let state = State {
            machine,
            why,
            detail: None,
            asked: None,
            let_go: false,
            kept: false,
            unwanted: false,
            kept_there: 0,
            told: Vec::new(),
        };
        let it = Self {
            host: Arc::clone(host),
            record,
            peer,
            state: Mutex::new(state),
            changed: Notify::new(),
            decided: Notify::new(),
        };
        it.show();
        Arc::new(it)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    pub(crate) fn phase(&self) -> Phase {
        self.lock().machine.phase()
    }

    pub(super) fn machine(&self) -> Source {
        self.lock().machine
    }

    /// Why it was undone, or what became of it.
    pub(super) fn why(&self) -> String {
        self.lock().why.clone()
    }

    /// What the destination said of its own side.
    pub(super) fn detail(&self) -> Option<String> {
        self.lock().detail.clone().filter(|detail| !detail.is_empty())
    }

    /// Its user has kept the guest here, whatever the destination thinks.
    pub(super) fn was_kept(&self) -> bool {
        self.lock().kept
    }

    /// The VM, if its QEMU answers.
    pub(super) fn vm(&self) -> Option<Arc<Vm>> {
        self.host.vm_of(&self.record.vm, &self.record.instance)
    }

    /// Its user does not want it moved any more.
    pub(super) fn is_unwanted(&self) {
        self.lock().unwanted = true;
    }

    /// With what the destination is asked to let go.
    pub(super) fn abandonment(&self) -> Abandon {
        Abandon { drop_disks: self.lock().unwanted }
    }

    /// What the destination keeps of its disks for another try, in bytes.
    pub(super) fn kept_there(&self) -> u64 {
        self.lock().kept_there
    }

    /// The destination is known to own the guest.
    pub(super) fn is_there(&self) -> bool {
        matches!(self.phase(), Phase::Away { .. } | Phase::Over { .. } | Phase::Stranded { theirs: Some(_) })
    }

    /// The destination has said that it let go.
    pub(super) fn let_go(&self) -> bool {
        self.lock().let_go
    }

    /// Something happened; a user's wish may be refused.
    pub(crate) fn apply(&self, event: Event) -> Result<(), Refused> {
        {
            let mut state = self.lock();
            let before = state.machine;
            state.machine.apply(event)?;
            let after = state.machine;
            if before == after {
                return Ok(());
            }
            if event == Event::RunsThere {
                // It is asked once more, and given its time.
                state.asked = None;
            }
            if std::mem::discriminant(&before.phase()) != std::mem::discriminant(&after.phase()) {
                state.asked = None;
                tracing::debug!(vm = self.record.vm, migration = %self.record.id, ?event, phase = ?after.phase(), "custody");
            }
            state.kept |= matches!(after.phase(), Phase::Undoing { kept: true, .. });
            // Under the lock, so that the last stage that is shown is the last one that there was.
            if let Some(vm) = self.vm() {
                vm.set_stage(stage_of(after.phase(), self.record.id));
            }
        }
        self.changed.notify_one();
        if matches!(event, Event::KeepHere | Event::RunsThere | Event::Discard) {
            self.decided.notify_waiters();
        }
        Ok(())
    }

    /// What is no user's wish is never refused.
    pub(super) fn tell(&self, event: Event) {
        if let Err(refused) = self.apply(event) {
            unreachable!("{event:?} is no wish, and was refused: {refused:?}");
        }
    }

    /// It is undone, or given up, for this reason; the first one counts.
    pub(super) fn because(&self, why: impl Into<String>) {
        let mut state = self.lock();
        if state.why.is_empty() {
            state.why = why.into();
        }
    }

    /// Everybody sees how its VM stands.
    fn show(&self) {
        if let Some(vm) = self.vm() {
            vm.set_stage(self.stage());
        }
    }

    /// How its VM stands.
    pub(crate) fn stage(&self) -> Stage {
        stage_of(self.phase(), self.record.id)
    }

    /// Its user has paused it, or had it go on: so it is to be undone, also by another agent.
    pub(crate) async fn wants(&self, running: bool) {
        if self.machine().wants_running() == running {
            return;
        }
        self.tell(Event::Wants { running });
        if let Err(error) = self.host.journal.set_running(self.record.id, running).await {
            tracing::error!(vm = self.record.vm, %error, "cannot write that its user wants it otherwise");
        }
    }

    /// Writes that it begins, or says why that cannot be.
    pub(super) async fn open(&self, audience: &dyn Audience) -> Result<(), AgentError> {
        for deed in self.machine().due() {
            if let Deed::Write(row) = deed {
                self.write(row, audience).await;
            }
        }
        match self.machine().row() {
            Some(_) => Ok(()),
            None => Err(AgentError::Conflict {
                message: format!("{}, so that nobody could tell who owns the guest", self.why()),
                hint: Some("is its disk full?".into()),
            }),
        }
    }

    /// Does what is due until nothing is, or, the first time, until only its user can say how it goes on, who is to know.
    pub(super) async fn drive(&self, hands: &mut Hands<'_>) {
        let was_told = self.machine().needs_its_user();
        let mut events = self.vm().map(|vm| vm.qmp.events());
        loop {
            let before = self.machine();
            if before.is_at_rest() || !was_told && before.needs_its_user() {
                return;
            }
            for deed in before.due() {
                if self.machine().due().contains(&deed) {
                    self.act(deed, hands).await;
                    hands.audience.phase(self.phase());
                }
            }
            if self.machine() == before {
                self.pause(&mut events).await;
                self.look().await;
            }
        }
    }

    /// Until something happens, or a second has passed.
    pub(super) async fn pause(&self, events: &mut Option<EventStream>) {
        let event = async {
            match events {
                Some(events) => loop {
                    match events.next().await {
                        Some(event) if !matches!(event.name.as_str(), "RESUME" | "STOP") => {}
                        Some(_) => return,
                        None => std::future::pending().await,
                    }
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = self.changed.notified() => {}
            () = event => {}
        }
        if events.is_none() {
            *events = self.vm().map(|vm| vm.qmp.events());
        }
    }

    async fn act(&self, deed: Deed, hands: &mut Hands<'_>) {
        match deed {
            Deed::Write(row) => self.write(row, hands.audience).await,
            Deed::AskCommit => self.ask_commit(hands.audience).await,
            Deed::AskAbandon => self.ask_abandon().await,
            // Whoever keeps the fences asks; it matters to nobody here how long that takes.
            Deed::AskFence => {}
            Deed::StopCopying => self.stop_copying(hands).await,
            Deed::Run => self.run(hands.audience).await,
            Deed::Pause => self.stand().await,
            Deed::Serve => self.serve(hands).await,
            Deed::End => self.end(hands).await,
        }
    }

    /// Once is enough.
    fn note_once(&self, what: &'static str, audience: &dyn Audience, text: impl FnOnce() -> String) {
        {
            let mut state = self.lock();
            if state.told.contains(&what) {
                return;
            }
            state.told.push(what);
        }
        audience.note(text());
    }

    pub(super) async fn write(&self, row: Row, audience: &dyn Audience) {
        let record = OutRecord { running: self.machine().wants_running(), ..self.record.clone() };
        let outcome = match (row, self.phase()) {
            (Row::Ended(OutEnd::Done), Phase::Away { start: Start::Done, .. }) => {
                "the guest runs on the destination".into()
            }
            (Row::Ended(OutEnd::Done), _) => "the guest is the destination's, which has not said that it runs".into(),
            (_, Phase::Undoing { kept: true, .. }) => "kept here by its user's word".into(),
            (_, Phase::Undoing { let_go: false, .. }) => {
                format!("{}; the destination does not answer, but drops what it had by itself", self.why())
            }
            _ => self.why(),
        };
        match self.host.journal.write_out(&record, row, &outcome).await {
            Ok(()) => {
                if let Row::Ended(end) = row {
                    tracing::info!(vm = record.vm, migration = %record.id, ?end, outcome, "the migration is over");
                }
                self.tell(Event::Wrote(row));
            }
            Err(error) => {
                self.because(format!("the agent's journal cannot be written: {error}"));
                tracing::error!(vm = record.vm, migration = %record.id, ?row, %error, "cannot write the journal");
                if row != Row::Open(OutStep::CopyRam) {
                    self.note_once("journal", audience, || {
                        format!("The journal cannot be written ({error}); the guest goes on, and it is tried again.")
                    });
                }
                self.tell(Event::NotWritten(row));
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// The destination's answer, whatever it was asked.
    pub(super) fn hear(&self, state: &IncomingState) {
        if state.detail.is_some() {
            self.lock().detail.clone_from(&state.detail);
        }
        self.lock().kept_there = state.kept;
        let answer = match state.step {
            InWord::Prepared => Answer::Prepared,
            InWord::Committed if state.runs => Answer::Committed(Start::Done),
            InWord::Committed if state.tried => Answer::Committed(Start::Tried),
            InWord::Committed => Answer::Committed(Start::Due),
            InWord::Abandoned => Answer::Abandoned,
        };
        let it = match self.phase() {
            Phase::InDoubt { .. } => Some("did not take the guest over"),
            Phase::Away { .. } | Phase::Stranded { .. } => Some("has given the guest back, which never ran there"),
            _ => None,
        };
        if let (Answer::Abandoned, Some(it)) = (answer, it) {
            let why = state.detail.clone().unwrap_or_else(|| "it gives no reason".into());
            self.lock().why = format!("the destination {it}: {why}");
        }
        self.lock().let_go |= answer == Answer::Abandoned;
        self.tell(Event::Answered(answer));
    }

    /// It was asked for so long in this phase that its answer is not waited for any more.
    fn was_asked_for(&self, long_enough: Duration) -> bool {
        self.lock().asked.get_or_insert_with(Instant::now).elapsed() >= long_enough
    }

    async fn ask_commit(&self, audience: &dyn Audience) {
        let is_away = matches!(self.phase(), Phase::Away { .. } | Phase::Stranded { .. });
        let machine = self.machine();
        // One that does not answer may have let go.
        let let_go = matches!(machine.qemu(), Qemu::LetGo | Qemu::Silent);
        let commit = Commit { run: machine.wants_running(), let_go };
        self.was_asked_for(RUNS);
        let asked = tokio::select! {
            asked = self.peer.commit(self.record.id, &commit) => asked,
            // What it answers may not matter any more.
            () = self.decided.notified() => return,
        };
        match asked {
            Ok(state) => self.hear(&state),
            Err(error) if is_away => tracing::debug!(error = in_one_line(&error), "does not say whether it runs"),
            Err(error) => self.note_once("doubt", audience, || {
                format!(
                    "Whether {} took the guest over is not known ({}). It stays paused here until that host answers; \
                     `vmferry resolve {} --help` tells what can be done if it never does.",
                    self.peer.address(),
                    in_one_line(&error),
                    self.record.vm
                )
            }),
        }
        let waits = is_away || matches!(self.phase(), Phase::InDoubt { theirs: true, .. });
        if waits && self.was_asked_for(RUNS) {
            self.tell(Event::Waited);
        }
    }

    async fn ask_abandon(&self) {
        // A guest that runs does not mind how long it takes until nothing is left there; one that stands does.
        let patience = if self.machine().qemu() == Qemu::Stands { LET_GO } else { CLEAN };
        match tokio::time::timeout(patience, self.peer.abandon(self.record.id, self.abandonment())).await {
            Ok(Ok(state)) => self.hear(&state),
            Ok(Err(error)) => {
                tracing::debug!(error = in_one_line(&error), "the destination does not let go yet");
                self.tell(Event::Waited);
            }
            Err(_) => self.tell(Event::Waited),
        }
    }

    /// What its QEMU does.
    pub(super) async fn look(&self) {
        let told = match self.vm() {
            Some(vm) => look(&vm).await,
            None if self.record.instance.is_alive() => Qemu::Silent,
            None => Qemu::Ended,
        };
        // The engine knows better what it does while it copies.
        if self.phase() != Phase::Moving || told == Qemu::Ended {
            self.tell(Event::Told(told));
        }
    }

    async fn stop_copying(&self, hands: &mut Hands<'_>) {
        let Some(vm) = self.vm() else { return self.look().await };
        let stopped = match &mut hands.engine {
            Some(engine) => engine.stop_copying().await,
            None => stop_copying(&vm.qmp).await,
        };
        if let Some(engine) = &hands.engine {
            // Its user may have paused it a moment ago.
            let running = engine.guest_runs();
            self.tell(Event::Wants { running });
        }
        match stopped {
            Ok(()) => self.look().await,
            Err(EngineError::TooLate) => {
                self.note_once("late", hands.audience, || {
                    format!("Too late to undo it ({}): the guest is on its way and goes on by post-copy.", self.why())
                });
                self.tell(Event::Told(Qemu::LetGo));
            }
            Err(error) => {
                self.note_once("stuck", hands.audience, || {
                    format!("Its QEMU does not stop copying ({}); it is tried again.", in_one_line(&error))
                });
                let told = if vm.is_alive() { Qemu::Copying } else { Qemu::Ended };
                self.tell(Event::Told(told));
            }
        }
    }

    async fn run(&self, audience: &dyn Audience) {
        let Some(vm) = self.vm() else { return self.look().await };
        if let Err(error) = vm.qmp.execute(commands::Cont {}).await {
            self.note_once("cont", audience, || {
                format!("The guest cannot be set running here yet ({error}); it is tried again.")
            });
        }
        self.look().await;
    }

    pub(super) async fn stand(&self) {
        let Some(vm) = self.vm() else { return self.look().await };
        let theirs = matches!(self.phase(), Phase::Away { .. } | Phase::Stranded { theirs: Some(_) });
        tracing::error!(
            vm = vm.name(),
            pid = vm.pid,
            theirs,
            "its QEMU set it running although it was handed over: paused"
        );
        if vm.qmp.execute_within(commands::Stop {}, GLANCE).await.is_err() && theirs {
            vm.instance().end(Duration::ZERO).await;
        }
        self.look().await;
    }

    /// What is left of it here goes.
    async fn end(&self, hands: &mut Hands<'_>) {
        if let Some(engine) = &mut hands.engine {
            engine.close().await;
        }
        if let Some(vm) = self.vm() {
            vm.quit().await;
        } else {
            self.record.instance.end(GRACE).await;
        }
        self.look().await;
    }
}

/// How a VM stands whose migration is so far.
fn stage_of(phase: Phase, id: Uuid) -> Stage {
    match phase {
        Phase::Owned => Stage::Owned,
        Phase::Moving | Phase::Sealed { .. } | Phase::Undoing { .. } => Stage::Migrating(id),
        Phase::InDoubt { .. } => Stage::InDoubt(id),
        Phase::Away { .. } | Phase::Over { .. } => Stage::Left(id),
        Phase::Stranded { .. } => Stage::Stranded(id),
    }
}
