//! One guest that comes to this host: the destination's half of the protocol (`vmferry_custody`), and its driver.
//!
//! What is due is done by whoever comes first, a request or the task that watches it, one at a time. What does not come
//! off is due again a second later. A guest that an agent finds in its journal is driven by the same.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use uuid::Uuid;
use vmferry_api::in_one_line;
use vmferry_custody::destination::{Deed, Event, Qemu};
use vmferry_custody::{Answer, Destination, InStep, Start};
use vmferry_qemu::migration::reset_capabilities;
use vmferry_qemu::qmp::commands;
use vmferry_qemu::{MigrationStatus, QmpError, RunState};

use super::arrival::{self, Arrivals};
use super::disks;
use crate::host::{Host, IdleVm, Promise, Stage, Vm};
use crate::journal::{InRow, Source};
use crate::peers::{Commit, InWord, IncomingState};

/// A source that is not heard of for this long has lost its claim: what was prepared for it goes.
const LEASE: Duration = Duration::from_secs(15);
/// How often it is looked whether something is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long QEMU may take to tell how post-copy stands, which it cannot while its main loop waits for a page.
pub(super) const STATUS_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the guest may take to be set running, before it is tried again.
const RUN_TIMEOUT: Duration = Duration::from_secs(2);

/// When a QEMU that has refused that is asked again.
const RUN_AGAIN: Duration = Duration::from_millis(50);

/// See the module's text.
pub(crate) struct Awaited {
    host: Arc<Host>,
    arrivals: Arc<Arrivals>,
    pub(super) id: Uuid,
    pub(super) source: Source,
    /// What the VM is called.
    pub(super) name: String,
    pub(super) vm: OnceLock<Arc<Vm>>,
    state: Mutex<State>,
    begun: Instant,
    /// When the source was last heard of, in ms since `begun`.
    heard_ms: AtomicU64,
    /// Its QEMU is being started and set up: whatever becomes of it, that is seen to its end first.
    preparing: AtomicBool,
    /// The disks that came with it are its own.
    keeps_disks: AtomicBool,
    /// What has arrived of its disks is not to be kept for another try.
    drops_disks: AtomicBool,
    /// So much is, in bytes.
    kept: AtomicU64,
    /// QEMU at the source has let go of the guest, as far as is known: there is nobody to give it back to.
    source_let_go: AtomicBool,
    /// Held while something is done.
    turn: tokio::sync::Mutex<()>,
    changed: Notify,
}

struct State {
    machine: Destination,
    /// Why it is, or is to be, abandoned.
    why: String,
    /// What does not come off was told.
    told: bool,
    /// Memory that is kept for it.
    promise: Option<Promise>,
}

impl Awaited {
    /// One that was just offered to this host, whose RAM comes there.
    pub(super) fn new(
        (host, arrivals): (&Arc<Host>, &Arc<Arrivals>),
        id: Uuid,
        source: Source,
        name: &str,
        promise: Promise,
    ) -> Arc<Self> {
        let row = InRow { step: InStep::Prepared, why: None, source, vm: name.into(), settled: false };
        Self::with((host, arrivals), id, row, Destination::new(), Some(promise))
    }

    /// One that this host's journal knows.
    pub(super) fn found((host, arrivals): (&Arc<Host>, &Arc<Arrivals>), id: Uuid, row: InRow) -> Arc<Self> {
        let machine = Destination::recover(row.step);
        Self::with((host, arrivals), id, row, machine, None)
    }

    fn with(
        (host, arrivals): (&Arc<Host>, &Arc<Arrivals>),
        id: Uuid,
        row: InRow,
        machine: Destination,
        promise: Option<Promise>,
    ) -> Arc<Self> {
        let why = row.why.unwrap_or_default();
        Arc::new(Self {
            host: Arc::clone(host),
            arrivals: Arc::clone(arrivals),
            id,
            source: row.source,
            name: row.vm,
            vm: OnceLock::new(),
            state: Mutex::new(State { machine, why, told: false, promise }),
            begun: Instant::now(),
            heard_ms: AtomicU64::new(0),
            preparing: AtomicBool::new(false),
            keeps_disks: AtomicBool::new(false),
            drops_disks: AtomicBool::new(false),
            kept: AtomicU64::new(0),
            source_let_go: AtomicBool::new(true),
            turn: tokio::sync::Mutex::default(),
            changed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    pub(super) fn machine(&self) -> Destination {
        self.lock().machine
    }

    /// Its QEMU is this.
    pub(super) fn is_served_by(&self, vm: &Arc<Vm>) {
        if let Some(promise) = &self.lock().promise {
            promise.is_filled_by(vm.pid);
        }
        // A second one there never is.
        let _ = self.vm.set(Arc::clone(vm));
    }

    /// Its QEMU is being started and set up, or is not any more.
    pub(super) fn set_preparing(&self, preparing: bool) {
        self.preparing.store(preparing, Ordering::Release);
    }

    /// There will be no other try: nothing of its disks is kept for one.
    pub(super) fn drop_disks(&self) {
        self.drops_disks.store(true, Ordering::Relaxed);
    }

    /// Nothing is left of it, nor about to be.
    pub(super) fn is_gone(&self) -> bool {
        let machine = self.machine();
        machine.row() == Some(InStep::Abandoned) && machine.is_at_rest() && !self.preparing.load(Ordering::Acquire)
    }

    /// The memory that was kept for it is there, or not needed any more.
    pub(super) fn has_arrived(&self) {
        self.lock().promise = None;
    }

    /// Something happened.
    pub(super) fn apply(&self, event: Event) {
        let mut state = self.lock();
        let before = state.machine;
        state.machine.apply(event);
        if state.machine != before {
            tracing::debug!(migration = %self.id, ?event, row = ?state.machine.row(), "incoming");
            self.changed.notify_one();
        }
    }

    /// It is to be given up, for this reason if it is the first.
    pub(super) fn give_up(&self, event: Event, why: &str) {
        let mut state = self.lock();
        if state.why.is_empty() || event == Event::Fence {
            state.why = why.into();
        }
        drop(state);
        self.apply(event);
    }

    /// Its source wants this host to take it over.
    pub(super) fn is_to_commit(&self, asked: Commit) {
        self.source_let_go.store(asked.let_go, Ordering::Relaxed);
        self.apply(Event::Commit { run: asked.run });
    }

    pub(super) fn heard(&self) {
        self.heard_ms.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn silent_for(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.heard_ms.load(Ordering::Relaxed)))
    }

    /// This VM came with it.
    pub(super) fn brought(&self, vm: &Vm) -> bool {
        self.vm.get().is_some_and(|it| it.pid == vm.pid && it.start_time == vm.start_time)
    }

    /// For the source, when it is known.
    pub(super) async fn view(&self) -> IncomingState {
        while self.machine().is_trying() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.view_now()
    }

    fn view_now(&self) -> IncomingState {
        let state = self.lock();
        let (step, start) = match state.machine.answer() {
            Answer::Prepared => (InWord::Prepared, Start::Due),
            Answer::Committed(start) => (InWord::Committed, start),
            Answer::Abandoned => (InWord::Abandoned, Start::Due),
        };
        let detail = (step == InWord::Abandoned).then(|| state.why.clone());
        let (tried, runs) = (start >= Start::Tried, start == Start::Done);
        let ended = state.machine.qemu() == Qemu::Ended;
        let kept = self.kept.load(Ordering::Relaxed);
        IncomingState {
            step,
            tried,
            runs,
            ended,
            detail,
            listens: false,
            port: None,
            session: None,
            complete: false,
            kept,
        }
    }

    /// Does what is due, until nothing is, or what is left does not come off now.
    pub(super) async fn act(&self) {
        let _turn = self.turn.lock().await;
        loop {
            let before = self.machine();
            for deed in before.due() {
                if self.machine().due().contains(&deed) {
                    self.do_one(deed).await;
                }
            }
            if self.machine() == before {
                break;
            }
        }
        if matches!(self.machine().answer(), Answer::Committed(Start::Tried | Start::Done))
            && !self.keeps_disks.swap(true, Ordering::Relaxed)
        {
            disks::keep(&self.host, self.id);
        }
        // Its QEMU may have ended by itself.
        if self.machine().row() == Some(InStep::Abandoned) && self.machine().qemu() == Qemu::Ended {
            self.forget().await;
        }
    }

    async fn do_one(&self, deed: Deed) {
        match deed {
            Deed::Write(row) => self.write(row).await,
            // Whoever prepares it does that, and tells.
            Deed::Launch => {}
            Deed::Look => self.look().await,
            Deed::Pause => {
                if let Some(vm) = self.vm.get()
                    && vm.qmp.execute_within(commands::Stop {}, RUN_TIMEOUT).await.is_ok()
                {
                    tracing::error!(vm = self.name, "its QEMU set it running although it is its source's: paused");
                    self.apply(Event::Told(Qemu::Loaded));
                }
            }
            Deed::Run => self.set_running().await,
            Deed::End => self.end().await,
        }
    }

    async fn write(&self, row: InStep) {
        let begun = Instant::now();
        let (why, was_committed) = {
            let state = self.lock();
            (state.why.clone(), matches!(state.machine.row(), Some(InStep::Committed { .. })))
        };
        let why = match self.vm.get().and_then(|vm| vm.last_words().filter(|_| vm.qmp.is_closed())) {
            Some(words) => format!("{why} ({words})"),
            None => why,
        };
        let journal = &self.host.journal;
        let written = match journal.write_in(self.id, &self.name, &self.source, row, &why, was_committed).await {
            Ok(true) => Ok(Some(row)),
            // Something else stands there already, for good.
            Ok(false) => journal.row_in(self.id).await.map(|found| found.map(|it| it.step)),
            Err(error) => Err(error),
        };
        match written {
            Ok(Some(now)) => {
                self.lock().told = false;
                self.apply(Event::Wrote(now));
                self.is_written(now, &why, begun);
            }
            Ok(None) => self.apply(Event::NotWritten(row)),
            Err(error) => {
                if !std::mem::replace(&mut self.lock().told, true) {
                    tracing::error!(vm = self.name, migration = %self.id, ?row, %error, "cannot write the journal: it is tried again");
                }
                self.apply(Event::NotWritten(row));
            }
        }
    }

    fn is_written(&self, row: InStep, why: &str, begun: Instant) {
        match row {
            InStep::Prepared => {}
            InStep::Committed { must_run } => {
                let Some(vm) = self.vm.get() else { return };
                if matches!(vm.stage(), Stage::Incoming(_)) {
                    vm.set_stage(Stage::Owned);
                    let took_us = begun.elapsed().as_micros() as u64;
                    tracing::info!(vm = self.name, migration = %self.id, must_run, took_us, "owns the guest now");
                }
            }
            InStep::Abandoned => {
                self.lock().why = why.into();
                if let Some(arrival) = self.arrivals.take(self.id) {
                    arrival.give_up();
                }
                self.arrivals.has_disks(self.id);
                tracing::info!(vm = self.name, migration = %self.id, why, "abandoned");
            }
        }
    }

    /// Its VM, when its QEMU is not at hand.
    fn idle(&self) -> Option<IdleVm> {
        self.host.idle(&self.name).filter(|idle| idle.record.incoming == Some(self.id))
    }

    /// Its process is gone, whether or not an agent ever had hold of it.
    fn has_ended(&self) -> bool {
        if self.preparing.load(Ordering::Acquire) {
            return false;
        }
        if let Some(vm) = self.vm.get() {
            return !vm.is_alive();
        }
        let idle = self.idle();
        let vm = self.host.vm(&self.name).ok().filter(|vm| vm.incoming == Some(self.id));
        vm.is_none() && idle.is_none_or(|idle| !idle.record.instance.is_alive())
    }

    /// Asks QEMU whether it has all that it needs to run the guest.
    async fn look(&self) {
        if self.has_ended() {
            self.end_of_its_qemu();
            return;
        }
        let Some(vm) = self.vm.get() else { return };
        let told = async {
            let info = vm.qmp.execute_within(commands::QueryMigrate {}, STATUS_TIMEOUT).await?;
            let status = vm.qmp.execute_within(commands::QueryStatus {}, STATUS_TIMEOUT).await?;
            Ok::<_, QmpError>((info, status.status))
        };
        let told = match told.await {
            Ok((info, run_state)) => match info.status.unwrap_or(MigrationStatus::None) {
                status
                    if (status == MigrationStatus::Completed || status.is_post_copy())
                        && run_state != RunState::InMigrate =>
                {
                    Qemu::Loaded
                }
                MigrationStatus::Failed => {
                    let why = info.error_desc.unwrap_or_else(|| "see its log".into());
                    self.lock().why = format!("its QEMU could not load the guest: {why}");
                    Qemu::Failed
                }
                _ => Qemu::Waits,
            },
            Err(error) => {
                tracing::debug!(vm = self.name, error = in_one_line(&error), "its QEMU does not answer");
                Qemu::Silent
            }
        };
        self.apply(Event::Told(told));
    }

    fn end_of_its_qemu(&self) {
        if self.machine().qemu() != Qemu::Ended {
            self.lock().why = "its QEMU ended".into();
            self.apply(Event::Told(Qemu::Ended));
        }
    }

    /// Sets the guest running that this host owns, once: its user may pause it afterwards. In post-copy its QEMU may
    /// answer only when the source has made a lost connection anew, and for that the source must hear that it is here.
    async fn set_running(&self) {
        let Some(vm) = self.vm.get() else { return };
        let tried = run(vm, || self.apply(Event::Tries)).await;
        match tried {
            Err(NotRunning::Refused(error)) if vm.is_alive() && !self.source_let_go.load(Ordering::Relaxed) => {
                let why = format!("its QEMU does not set it running: {}", in_one_line(&error));
                tracing::error!(vm = self.name, migration = %self.id, why, "gives the guest back");
                self.lock().why = why;
                self.apply(Event::Refused);
            }
            Ok(()) => {
                self.apply(Event::Told(Qemu::Runs));
                tokio::spawn(announce(Arc::clone(vm)));
                if arrival::is_expected(&vm.dir) {
                    tokio::spawn(let_all_ram_be_saved(Arc::clone(vm)));
                }
            }
            Err(_) if !vm.is_alive() => {
                tracing::error!(vm = self.name, "its QEMU ended before it could be set running");
                self.end_of_its_qemu();
            }
            Err(NotRunning::Refused(error) | NotRunning::Unclear(error)) => {
                // It is tried for as long as it takes, which is for ever when the pages that QEMU waits for are lost.
                if !std::mem::replace(&mut self.lock().told, true) {
                    tracing::error!(
                        vm = self.name,
                        error = in_one_line(&error),
                        "cannot be set running yet: it is tried again"
                    );
                }
                self.apply(Event::Told(Qemu::Silent));
            }
        }
    }

    async fn end(&self) {
        let process = self.vm.get().map(|vm| vm.instance()).or_else(|| self.idle().map(|idle| idle.record.instance));
        if let Some(process) = process {
            process.end(Duration::from_secs(1)).await;
        }
        self.apply(Event::Told(Qemu::Ended));
    }

    /// Of what is abandoned, and has no QEMU any more, nothing is left.
    async fn forget(&self) {
        self.has_arrived();
        let taken = match self.vm.get() {
            Some(vm) => self.host.forget_vm(vm).await,
            None => Ok(()),
        };
        // One that was committed may have been shown as ended already.
        let idle = match self.idle() {
            Some(idle) => self.host.forget_idle(&idle).await,
            None => Ok(()),
        };
        let (host, id) = (Arc::clone(&self.host), self.id);
        let kept = !self.drops_disks.load(Ordering::Relaxed);
        let undone = tokio::task::spawn_blocking(move || disks::undo(&host, id, kept));
        self.kept.fetch_add(undone.await.expect("undoing does not panic"), Ordering::Relaxed);
        if let Err(error) = taken.and(idle) {
            tracing::error!(vm = self.name, error = in_one_line(&error), "cannot forget it");
        }
    }

    /// Sees to it that what is due is done, until nothing will be due any more. What was prepared is given up when its
    /// source falls silent.
    ///
    /// Not in post-copy: there the source's QEMU has let go of the guest and could not take it back, so only the source
    /// may say that it is over.
    pub(super) async fn watch(self: Arc<Self>) {
        loop {
            self.act().await;
            if self.machine().is_at_rest() {
                return;
            }
            let ended = async {
                match self.vm.get() {
                    Some(vm) if !vm.qmp.is_closed() => vm.qmp.closed().await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = self.changed.notified() => continue,
                // The monitor closes a little before the process is gone.
                () = ended => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            if self.has_ended() {
                self.end_of_its_qemu();
                continue;
            }
            if self.machine().row() == Some(InStep::Prepared) && self.silent_for() >= LEASE {
                let why =
                    format!("the source's agent ({}) was not heard of for {} s", self.source.name, LEASE.as_secs());
                // Agents that move the RAM have the guest at the source until the commit.
                let may_be_left = !arrival::is_expected(&self.host.config.vm_dir(&self.name));
                let is_left = match self.vm.get() {
                    Some(vm) => may_be_left && in_post_copy(vm).await,
                    None => may_be_left,
                };
                if !is_left {
                    tracing::warn!(vm = self.name, migration = %self.id, why, "abandons an incoming migration");
                    self.give_up(Event::GiveUp, &why);
                }
            }
        }
    }
}

async fn in_post_copy(vm: &Vm) -> bool {
    match vm.qmp.execute_within(commands::QueryMigrate {}, STATUS_TIMEOUT).await {
        Ok(info) => info.status.is_some_and(|status| status.is_post_copy()),
        // It may wait for a page.
        Err(error) => matches!(error, QmpError::Timeout { .. }),
    }
}

/// Why a guest does not run.
enum NotRunning {
    /// QEMU says that it cannot: the guest has executed nothing.
    Refused(QmpError),
    Unclear(QmpError),
}

/// Sets it running, and says so before it is tried.
async fn run(vm: &Vm, tries: impl Fn()) -> Result<(), NotRunning> {
    let deadline = Instant::now() + RUN_TIMEOUT;
    let mut was_accepted = false;
    loop {
        let state = vm.qmp.execute_within(commands::QueryStatus {}, RUN_TIMEOUT).await;
        // A guest that has shut down or crashed, at its source or in its first moment here, is none of ours to restart.
        match state.map_err(NotRunning::Unclear)?.status {
            RunState::Paused | RunState::InMigrate | RunState::Prelaunch => {}
            _ => return Ok(()),
        }
        let is_late = Instant::now() > deadline;
        if is_late && was_accepted {
            return Err(NotRunning::Unclear(QmpError::Timeout { command: "cont".into(), after: RUN_TIMEOUT }));
        }
        tries();
        match vm.qmp.execute_within(commands::Cont {}, RUN_TIMEOUT).await {
            Ok(_) => was_accepted = true,
            Err(error @ QmpError::Command { .. }) if is_late && !was_accepted => {
                return Err(NotRunning::Refused(error));
            }
            // What keeps it from that may go: a lock that somebody is about to let go of.
            Err(QmpError::Command { .. }) => tokio::time::sleep(RUN_AGAIN).await,
            Err(error) => return Err(NotRunning::Unclear(error)),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What somebody saves to a file later is to have all RAM. It can wait until pages have come.
async fn let_all_ram_be_saved(vm: Arc<Vm>) {
    while let Err(error) = reset_capabilities(&vm.qmp).await {
        if vm.qmp.is_closed() {
            return;
        }
        tracing::debug!(error = in_one_line(&error), "QEMU does not answer yet");
        tokio::time::sleep(RUN_TIMEOUT).await;
    }
}

/// Has the guest's network cards tell the switches where they are now, some times, as QEMU does by itself once.
async fn announce(vm: Arc<Vm>) {
    let rounds = commands::AnnounceSelf { initial: 50, max: 550, rounds: 5, step: 100 };
    if let Err(error) = vm.qmp.execute(rounds).await {
        tracing::warn!(vm = vm.name(), %error, "could not announce the guest's network cards");
    }
}
