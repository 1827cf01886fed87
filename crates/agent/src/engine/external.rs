//! The `external` engine: the agents move the guest's RAM, over their own link; QEMU moves nothing but the device state.
//!
//! See the `vmferry-ram` crate for how. Here is what has to do with QEMU: it is paused when what is left is little, or
//! when the policy wants post-copy, and then writes the device state to a socket of ours. QEMU never lets go of the
//! guest by itself, so that everything can be undone until the destination is committed to.
//!
//! QEMU's migration begins while the guest still runs: what it takes to set that up, and the memory that is not ours to
//! move (firmware, video), is no downtime then. It pauses the guest itself, and waits for our word before the devices.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio_util::task::AbortOnDropHandle;
use vmferry_api::in_one_line;
use vmferry_link::{Cipher, Fingerprint, Identity, Link, LinkOptions, MOST_STREAMS, TcpDialer};
use vmferry_policy::{Action, Bytes, BytesPerSec, Costs, Limits, Means, Observation, Percent, Phase, Scan};
use vmferry_qemu::migration::{IGNORE_SHARED, PAUSE_BEFORE_SWITCHOVER, reset_capabilities};
use vmferry_qemu::qmp::commands::{self, MigrationParameters};
use vmferry_qemu::{EventStream, MigrationStatus, Qmp, RunState};
use vmferry_ram::{Backend, Drain, GuestRam, Progress, RamError, Source};

use super::budget::Budget;
use super::journey;
use super::lending::{give_state_socket, with_userfaultfd_device};
use super::movable::{Planned, came_up};
use super::qemu::{UNLIMITED, stop_copying};
use super::{Disks, EngineError, NewConnection, NewSession, RamEngine, Seen, Totals, goes_on};

/// What the source's QEMU is set to, for a guest that is paused before QEMU copies anything or not.
pub(crate) fn capabilities(stops_first: bool) -> &'static [&'static str] {
    if stops_first { &[IGNORE_SHARED] } else { &[IGNORE_SHARED, PAUSE_BEFORE_SWITCHOVER] }
}

const TICK: Duration = Duration::from_millis(100);
/// A switchover that takes so much longer than the downtime that was allowed is undone, as nothing is lost by that yet.
const LATE: u32 = 10;
/// But none that takes less than this.
const LEAST_PAUSE: Duration = Duration::from_secs(10);
/// The guest is paused for pacing at most for about this share of the downtime that was allowed, and again after so long
/// if that was not enough.
const TAKE_OVER: u32 = 2;
const BETWEEN: Duration = Duration::from_millis(300);
/// A guest whose writes are paced can be paused too, as each processor's turn comes; but not when that takes so long.
const PACED_PAUSE: Duration = Duration::from_millis(50);
/// How long QEMU may take to begin with the device state, or to be done with it.
const STATE_TIMEOUT: Duration = Duration::from_secs(20);
/// How much may be on its way on each of the link's streams, in bytes: enough for long ways, since no more is sent than the
/// link needs to be busy.
const WINDOW: usize = 32 << 20;
/// How long the guest's disks may take to be drained.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// See the module's text.
pub struct ExternalEngine {
    qmp: Qmp,
    wishes: Wishes,
    /// Of the first link, until that is made.
    session: Option<NewSession>,
    source: Option<Arc<Source>>,
    disks: Option<Arc<dyn Disks>>,
    /// What it shares with its disks.
    budget: Option<Budget>,
    /// Made before there is anything to send over it.
    link: Option<Link>,
    started: Instant,
    paused_at: Option<Instant>,
    /// We have paused it, or are about to.
    paused_by_us: bool,
    /// How long what was left then takes on the link.
    last_pages: Option<Duration>,
    /// The destination was told what it misses.
    post_copy: bool,
    /// The guest's writes are paced.
    paced: bool,
    /// The destination has the device state.
    switched: bool,
    /// Nobody was told of that yet.
    just_switched: bool,
    last: Option<Progress>,
    dirty_rate: u64,
    sent: u64,
    /// Pages that went as differences, and bytes that this saved.
    deltas: (u64, u64),
    drained: Arc<Mutex<Drained>>,
}

/// How often the guest's disks were drained, and how long that took at most.
#[derive(Clone, Copy, Default)]
struct Drained {
    times: u32,
    longest: Duration,
}

/// Drains the I/O of a guest's disks, from any thread.
fn drain(qmp: Qmp, drained: Arc<Mutex<Drained>>) -> Drain {
    let runtime = tokio::runtime::Handle::current();
    Box::new(move || {
        let begun = Instant::now();
        let asked = qmp.execute_within(commands::Transaction { actions: Vec::new() }, DRAIN_TIMEOUT);
        runtime.block_on(asked).map_err(std::io::Error::other)?;
        let mut drained = drained.lock().expect("no holder of this lock panics");
        *drained = Drained { times: drained.times + 1, longest: drained.longest.max(begun.elapsed()) };
        Ok(())
    })
}

/// What one migration with this engine is started with.
pub struct Wishes {
    /// The process of the guest's QEMU.
    pub pid: u32,
    /// Its RAM.
    pub backends: Vec<Backend>,
    /// A folder of this VM that QEMU can reach.
    pub dir: PathBuf,
    /// The way to the destination.
    pub way: WayThere,
    /// What the user set.
    pub limits: Limits,
    /// What switches of this VM cost, as far as is known.
    pub costs: Costs,
    /// Its writes can be paced.
    pub paces: bool,
    /// The most to send, in bytes a second.
    pub bandwidth: Option<u64>,
    /// How much memory differences of pages may take, in bytes.
    pub delta_cache: u64,
    /// The guest runs, as far as its user is concerned.
    pub runs: bool,
    /// It must be paused before QEMU copies anything, as QEMU would lose what it writes.
    pub stops_first: bool,
    /// Its disks' I/O is drained at each scan.
    pub drains: bool,
    /// QEMU may be lent what it takes to have its writers wait.
    pub lends: bool,
    /// What users change of it while it runs, as it was planned; none of one that has left already.
    pub planned: Option<Planned>,
}

/// Where the destination's agent takes streams, and how they are protected.
#[derive(Clone)]
pub struct WayThere {
    /// HOST:PORT.
    pub address: String,
    /// Who we are.
    pub identity: Arc<Identity>,
    /// Who is there.
    pub peer: Fingerprint,
    /// None when both hosts trust the network; else the cipher, or whichever TLS prefers.
    pub protection: Option<Option<Cipher>>,
}

impl WayThere {
    pub(crate) fn connect(&self, session: NewSession, rate: Option<u64>) -> Result<Link, RamError> {
        let dialer = match self.protection {
            Some(cipher) => TcpDialer::tls(&self.address, &self.identity, self.peer, cipher),
            None => TcpDialer::plain(&self.address),
        };
        Ok(Link::connect(dialer, link_options(session, rate))?)
    }
}

/// Both sides' link.
pub(crate) fn link_options(NewSession { session, key, streams }: NewSession, rate: Option<u64>) -> LinkOptions {
    // Another agent's number is not to be trusted.
    let streams = streams.clamp(1, MOST_STREAMS);
    LinkOptions { rate, streams, window: WINDOW, ..LinkOptions::new(session, key) }
}

impl ExternalEngine {
    /// An engine for this QEMU, not started, whose destination expects a link with this session.
    pub fn new(qmp: Qmp, wishes: Wishes, session: NewSession) -> Self {
        Self { session: Some(session), ..Self::of(qmp, wishes) }
    }

    /// One whose guest runs at the destination already, and waits for a connection.
    pub fn in_post_copy(qmp: Qmp, wishes: Wishes) -> Self {
        Self { post_copy: true, switched: true, ..Self::of(qmp, wishes) }
    }

    fn of(qmp: Qmp, wishes: Wishes) -> Self {
        Self {
            budget: wishes.bandwidth.map(Budget::new),
            qmp,
            wishes,
            session: None,
            source: None,
            disks: None,
            link: None,
            started: Instant::now(),
            paused_at: None,
            paused_by_us: false,
            last_pages: None,
            post_copy: false,
            paced: false,
            switched: false,
            just_switched: false,
            last: None,
            dirty_rate: 0,
            sent: 0,
            deltas: (0, 0),
            drained: Arc::default(),
        }
    }

    /// Makes a link and sends over it.
    async fn connect(
        &mut self,
        session: Option<NewSession>,
        send: impl FnOnce(GuestRam, Link) -> Result<Source, RamError> + Send + 'static,
    ) -> Result<(), EngineError> {
        let link = match (session, self.link.take()) {
            (Some(session), _) => self.make_link(session).await?,
            (None, Some(link)) => link,
            (None, None) => return Err(EngineError::Failed { reason: "it has begun already".into() }),
        };
        let (pid, backends) = (self.wishes.pid, self.wishes.backends.clone());
        let sending = blocking(move || send(GuestRam::open(pid, &backends)?, link));
        self.source = Some(Arc::new(sending.await?));
        Ok(())
    }

    async fn make_link(&self, session: NewSession) -> Result<Link, EngineError> {
        let (way, rate) = (self.wishes.way.clone(), self.wishes.bandwidth);
        blocking(move || way.connect(session, rate)).await
    }

    fn source(&self) -> Result<Arc<Source>, EngineError> {
        self.source.clone().ok_or_else(|| EngineError::Failed { reason: "it has not begun".into() })
    }

    /// Pauses the guest and gives the destination all that it needs to run it.
    async fn switch_over(&mut self, post_copy: bool) -> Result<(), EngineError> {
        self.as_planned().await?;
        let source = self.source()?;
        let last = self.last.as_ref().filter(|_| !post_copy);
        self.last_pages = match last {
            Some(last) => Bytes(last.remaining).time_at(BytesPerSec(last.link_rate)),
            None => Some(Duration::ZERO),
        };
        if post_copy {
            let source = Arc::clone(&source);
            blocking(move || source.prepare_post_copy()).await?;
        }
        if let Some(disks) = &self.disks {
            disks.settle().await?;
        }
        self.look_whether_it_runs().await?;
        let stops_first = self.wishes.stops_first;
        if stops_first {
            self.pause(&source).await?;
            self.cut_disks_over().await?;
        }
        let is_due = Arc::new(AtomicBool::new(stops_first));
        let events = self.qmp.events();
        let state = self.begin_state(&source, &is_due).await?;
        if !stops_first {
            self.until_paused(&source, events).await?;
        }
        let rest = blocking(move || if post_copy { source.post_copy() } else { source.finish() });
        let state = async {
            if !stops_first {
                self.cut_disks_over().await?;
            }
            self.finish_state(state, &is_due).await
        };
        let given = async { tokio::try_join!(rest, state) };
        let expected = self.last_pages.unwrap_or_default().saturating_mul(2);
        let most = LEAST_PAUSE.max(self.wishes.limits.downtime * LATE).max(expected);
        tokio::time::timeout(most, given).await.unwrap_or_else(|_| {
            let reason =
                format!("switching over took longer than {} s: the link is slower than it was", most.as_secs());
            Err(EngineError::Failed { reason })
        })?;
        self.post_copy = post_copy;
        (self.switched, self.just_switched) = (true, true);
        Ok(())
    }

    /// Has the guest's writes wait so that what becomes stale is this share of what the link carries.
    async fn pace(&mut self, share: Percent) -> Result<(), EngineError> {
        let source = self.source()?;
        let begins = !std::mem::replace(&mut self.paced, true);
        let processors = match begins {
            true => self.qmp.execute(commands::QueryCpusFast {}).await?.iter().map(|cpu| cpu.thread_id).collect(),
            false => Vec::new(),
        };
        let pacing = Arc::clone(&source);
        let begin = blocking(move || pacing.pace(share.0, &processors));
        with_userfaultfd_device(self.wishes.lends, &self.qmp, self.wishes.pid, begin).await?;
        let at_most = self.wishes.limits.downtime / TAKE_OVER;
        let mut all = !begins;
        while !all {
            let source = Arc::clone(&source);
            self.look_whether_it_runs().await?;
            // Also should this be interrupted: then nobody takes it for its user's wish.
            self.pauses(true);
            if self.wishes.runs {
                self.qmp.execute(commands::Stop {}).await?;
            }
            let taken = blocking(move || source.take_over(at_most)).await;
            if self.wishes.runs {
                self.qmp.execute(commands::Cont {}).await?;
            }
            self.pauses(false);
            all = taken?;
            if !all {
                tokio::time::sleep(BETWEEN).await;
            }
        }
        Ok(())
    }

    /// Its disks are there before the devices that use them.
    async fn cut_disks_over(&self) -> Result<(), EngineError> {
        match &self.disks {
            Some(disks) => disks.cut_over().await,
            None => Ok(()),
        }
    }

    fn pauses(&mut self, pauses: bool) {
        self.paused_by_us = pauses;
        journey::say_pauses(&self.wishes.dir, pauses);
    }

    /// Nothing has come up since the plan: to be asked while the guest still runs.
    async fn as_planned(&self) -> Result<(), EngineError> {
        let Some(planned) = &self.wishes.planned else { return Ok(()) };
        match came_up(&self.qmp, planned, true).await? {
            None => Ok(()),
            Some(reason) => Err(EngineError::Failed { reason }),
        }
    }

    /// Its user may pause it, and have it go on, while it is copied.
    async fn look_whether_it_runs(&mut self) -> Result<Option<RunState>, EngineError> {
        if self.paused_by_us || self.switched {
            return Ok(None);
        }
        let state = self.qmp.execute(commands::QueryStatus {}).await?.status;
        match state {
            RunState::Running => self.wishes.runs = true,
            RunState::Paused | RunState::IoError => self.wishes.runs = false,
            _ => {}
        }
        Ok(Some(state))
    }

    async fn pause(&mut self, source: &Source) -> Result<(), EngineError> {
        self.look_whether_it_runs().await?;
        self.pauses(true);
        // A processor that waits to write cannot be stopped.
        source.lift_pacing();
        self.qmp.execute(commands::Stop {}).await?;
        self.paused_at.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Has QEMU begin its migration, to us, and passes on what it writes. What it writes when that `is_due` is devices'.
    async fn begin_state(
        &self,
        source: &Arc<Source>,
        is_due: &Arc<AtomicBool>,
    ) -> Result<AbortOnDropHandle<Result<u64, EngineError>>, EngineError> {
        let refused = |error: std::io::Error| EngineError::Failed { reason: format!("a socket: {error}") };
        let (ours, theirs) = UnixStream::pair().map_err(refused)?;
        let uri = give_state_socket(&self.qmp, theirs).await?;
        self.qmp.execute(commands::Migrate { uri, resume: None }).await?;
        let (source, is_due) = (Arc::clone(source), Arc::clone(is_due));
        Ok(AbortOnDropHandle::new(tokio::spawn(blocking(move || source.send_state(ours, &is_due)))))
    }

    /// Waits until QEMU has paused the guest.
    async fn until_paused(&mut self, source: &Source, mut events: EventStream) -> Result<(), EngineError> {
        let begun = Instant::now();
        let mut stopped_at = None;
        loop {
            let is_paused = self.reaches(&MigrationStatus::PreSwitchover, begun + STATE_TIMEOUT).await?;
            while let Ok(Some(event)) = tokio::time::timeout(Duration::ZERO, events.next()).await {
                match event.name.as_str() {
                    "STOP" => stopped_at = Some(event.at),
                    "RESUME" => stopped_at = None,
                    _ => {}
                }
            }
            if is_paused {
                break;
            }
            if stopped_at.is_some() {
                // It may have been its user, a moment before QEMU does.
                self.look_whether_it_runs().await?;
            }
            if begun.elapsed() > PACED_PAUSE {
                source.lift_pacing();
            }
        }
        source.lift_pacing();
        self.paused_at.get_or_insert_with(|| stopped_at.unwrap_or_else(Instant::now));
        Ok(())
    }

    /// Has QEMU write the devices' state, and waits until all of it is passed on.
    async fn finish_state(
        &self,
        state: AbortOnDropHandle<Result<u64, EngineError>>,
        is_due: &AtomicBool,
    ) -> Result<(), EngineError> {
        if !is_due.swap(true, Ordering::Release) {
            let state = MigrationStatus::PreSwitchover.to_string();
            self.qmp.execute(commands::MigrateContinue { state }).await?;
        }
        state.await.expect("passing on what QEMU writes does not panic")?;
        let deadline = Instant::now() + STATE_TIMEOUT;
        while !self.reaches(&MigrationStatus::Completed, deadline).await? {}
        Ok(())
    }

    /// Looks whether QEMU's migration has come so far, and waits a moment if not.
    async fn reaches(&self, wanted: &MigrationStatus, deadline: Instant) -> Result<bool, EngineError> {
        let info = self.qmp.execute(commands::QueryMigrate {}).await?;
        let status = info.status.unwrap_or(MigrationStatus::None);
        if *wanted == status {
            return Ok(true);
        }
        let reason = match status {
            MigrationStatus::Failed | MigrationStatus::Cancelled | MigrationStatus::Completed => {
                info.error_desc.unwrap_or_else(|| "QEMU gives no reason".into())
            }
            _ if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_micros(300)).await;
                return Ok(false);
            }
            _ => format!("QEMU gave none for {} s", STATE_TIMEOUT.as_secs()),
        };
        Err(EngineError::Failed { reason: format!("the device state: {reason}") })
    }

    fn see(&mut self, progress: Progress) -> Seen {
        let phase = match () {
            () if self.post_copy => Phase::PostCopy,
            () if self.switched || progress.converged => Phase::SwitchOver,
            () => Phase::PreCopy,
        };
        self.dirty_rate = self.dirty_rate.max(progress.dirty_rate);
        // A source that goes on with post-copy sends none.
        self.deltas = self.deltas.max((progress.deltas, progress.saved));
        let mut round_trip = Duration::ZERO;
        if let Some(source) = &self.source {
            let stats = source.link_stats();
            (self.sent, round_trip) = (stats.wire_sent, stats.round_trip.unwrap_or_default());
        }
        let observation = Observation {
            elapsed: self.started.elapsed(),
            phase,
            round: progress.round,
            remaining: Bytes(progress.remaining),
            total: Bytes(progress.total),
            scan: progress.look.map(|look| Scan { interval: look.interval, left: Bytes(look.left) }),
            stale: Bytes(progress.stale),
            sent: Bytes(self.sent),
            dirty_rate: BytesPerSec(progress.dirty_rate),
            link_rate: BytesPerSec(progress.link_rate),
            round_trip,
            throttle: Percent(progress.slowed),
            means: Means { pace: self.wishes.paces, throttle: false },
            costs: self.wishes.costs,
            limits: self.wishes.limits,
        };
        let complete = progress.complete;
        self.last = Some(progress);
        Seen {
            observation,
            ready_to_commit: self.switched,
            complete,
            let_go: false,
            paused_at: self.paused_at,
            last_pages: self.last_pages,
            broken: None,
        }
    }

    /// The guest is at the destination and its link is not there.
    async fn see_broken(&mut self, why: String) -> Seen {
        tokio::time::sleep(TICK).await;
        let total = self.wishes.backends.iter().map(|backend| backend.size).sum();
        let progress = self.last.clone().unwrap_or(Progress { total, ..Progress::default() });
        Seen { broken: Some(why), ..self.see(progress) }
    }
}

#[async_trait]
impl RamEngine for ExternalEngine {
    async fn start(&mut self) -> Result<(), EngineError> {
        let session = self.session.take();
        let parameters = MigrationParameters { max_bandwidth: Some(UNLIMITED), ..MigrationParameters::default() };
        self.qmp.execute(parameters).await?;
        self.started = Instant::now();
        let delta_cache = self.wishes.delta_cache;
        let drain = self.wishes.drains.then(|| drain(self.qmp.clone(), Arc::clone(&self.drained)));
        // Whoever decides has not allowed anything yet.
        let nothing = Duration::ZERO;
        self.connect(session, move |ram, link| Source::begin(ram, link, nothing, delta_cache, drain)).await?;
        self.source()?.ask_within(self.wishes.limits.for_pages(&self.wishes.costs));
        Ok(())
    }

    async fn observe(&mut self) -> Result<Seen, EngineError> {
        let Some(source) = self.source.clone() else { return Ok(self.see_broken("it has not begun".into()).await) };
        if let (Some(budget), Some(disks)) = (&mut self.budget, &self.disks)
            && let Some(rate) = budget.for_ram(self.started.elapsed(), disks.sent())
        {
            source.set_rate(Some(rate));
        }
        if let Some(state) = self.look_whether_it_runs().await? {
            goes_on(&state)?;
        }
        // Once the guest is paused, every moment counts.
        let at_most = if std::mem::take(&mut self.just_switched) { Duration::ZERO } else { TICK };
        let progress = match blocking(move || source.wait(at_most)).await {
            Ok(progress) => progress,
            Err(error) if self.post_copy && self.switched => {
                return Ok(self.see_broken(in_one_line(&error)).await);
            }
            Err(error) => return Err(error),
        };
        if progress.converged && !self.switched {
            self.last = Some(progress.clone());
            self.switch_over(false).await?;
            let progress = Progress { complete: true, remaining: 0, ..self.source()?.wait(Duration::ZERO)? };
            return Ok(self.see(progress));
        }
        Ok(self.see(progress))
    }

    async fn apply(&mut self, action: &Action) -> Result<(), EngineError> {
        if self.switched {
            return Ok(());
        }
        let source = self.source()?;
        match action {
            Action::PostCopy => self.switch_over(true).await?,
            Action::Pace(share) => self.pace(*share).await?,
            Action::Allow(pause) => source.allow(*pause),
            Action::Pause => {
                self.as_planned().await?;
                self.pause(&source).await?;
                // Nothing is written any more: whatever is left next is the end.
                source.allow(self.wishes.limits.downtime);
            }
            Action::Continue | Action::Throttle(_) | Action::GiveUp(_) => {}
        }
        source.answer(self.last.as_ref().map_or(0, |last| last.round));
        Ok(())
    }

    async fn set_limits(&mut self, limits: Limits, bandwidth: Option<u64>) -> Result<(), EngineError> {
        if bandwidth != self.wishes.bandwidth {
            match (&self.source, &self.link) {
                (Some(source), _) => source.set_rate(bandwidth),
                (None, Some(link)) => link.set_rate(bandwidth),
                (None, None) => {}
            }
            self.budget = bandwidth.map(Budget::new);
        }
        if let Some(source) = &self.source {
            // How fast the link is now is known in a second or two.
            source.allow(Duration::ZERO);
            source.ask_within(limits.for_pages(&self.wishes.costs));
        }
        (self.wishes.limits, self.wishes.bandwidth) = (limits, bandwidth);
        Ok(())
    }

    async fn reconnect(&mut self, to: &NewConnection) -> Result<(), EngineError> {
        let NewConnection::Session(session) = to else {
            return Err(EngineError::Failed { reason: "the destination gives no session for its memory".into() });
        };
        if let Some(old) = self.source.take() {
            tokio::task::spawn_blocking(move || old.abandon());
        }
        self.connect(Some(session.clone()), Source::resume).await
    }

    async fn stop_copying(&mut self) -> Result<(), EngineError> {
        self.look_whether_it_runs().await?;
        if let Some(source) = self.source.take() {
            let ended = tokio::task::spawn_blocking(move || source.abandon()).await;
            ended.expect("abandoning does not panic");
        }
        stop_copying(&self.qmp).await?;
        // What somebody saves to a file later is to have all RAM.
        reset_capabilities(&self.qmp).await?;
        (self.switched, self.paused_by_us) = (false, false);
        Ok(())
    }

    async fn reserve(&mut self) -> Result<(), EngineError> {
        if let Some(session) = self.session.take() {
            self.link = Some(self.make_link(session).await?);
        }
        Ok(())
    }

    fn brings_disks(&mut self, disks: Arc<dyn Disks>) {
        self.disks = Some(disks);
    }

    fn guest_runs(&self) -> bool {
        self.wishes.runs
    }

    async fn close(&mut self) {
        if let Some(source) = self.source.take() {
            let closed = blocking(move || source.close()).await;
            if let Err(error) = closed {
                tracing::debug!(error = in_one_line(&error), "the link did not end in order");
            }
        }
    }

    fn totals(&self) -> Totals {
        let (deltas, saved_by_deltas) = self.deltas;
        let drained = *self.drained.lock().expect("no holder of this lock panics");
        Totals {
            drains: drained.times,
            longest_drain: drained.longest,
            sent: self.sent,
            deltas,
            saved_by_deltas,
            fault_times: self.last.as_ref().and_then(|last| last.fault_times),
            rounds: self.last.as_ref().map_or(0, |last| last.round),
            dirty_rate: self.dirty_rate,
            downtime_ms: None,
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RamError> + Send + 'static,
) -> Result<T, EngineError> {
    Ok(tokio::task::spawn_blocking(work).await.expect("moving RAM does not panic")?)
}
