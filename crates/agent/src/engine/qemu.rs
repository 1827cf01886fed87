//! The `qemu` engine: QEMU copies its RAM itself, steered by our policy.
//!
//! Which of QEMU's means are used is decided before the start; see `means.rs`. One QEMU cannot copy a guest that runs at
//! all; see [`vmferry_qemu::migration::loses_writes`].
//!
//! QEMU switches over by itself once what is left fits its downtime limit: that is how the policy says when.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use vmferry_policy::{Action, Costs, Limits, Means, Percent, Phase};
use vmferry_qemu::qmp::commands::{self, MigrationInfo, MigrationParameters};
use vmferry_qemu::{Event, EventStream, Features, MigrationStatus, Qmp, QmpError, RunState};

use super::budget::Budget;
use super::meters::{Meters, Standing};
use super::{Disks, EngineError, NewConnection, RamEngine, Seen, Setup, Totals, goes_on};

/// QEMU's own default is 128 MiB/s; this is as good as none and fits its signed arithmetic.
pub(super) const UNLIMITED: u64 = 1 << 50;
/// As good as never, while QEMU cannot tell what switching over would cost: zero would mean without a last look.
const NO_SWITCHOVER_MS: u64 = 1;
/// `MAX_MIGRATE_DOWNTIME` in QEMU's `migration/options.c`.
const LONGEST_PAUSE: Duration = Duration::from_secs(2000);
const TICK: Duration = Duration::from_millis(250);
/// A pause at switchover is not an end: QEMU gets this long to be done with a cancelled migration.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);
/// A copy that sends nothing for this long will not go on by itself.
const STALLED: Duration = Duration::from_secs(30);

/// See the module's text.
pub struct QemuEngine {
    qmp: Qmp,
    events: EventStream,
    features: Features,
    uri: String,
    limits: Limits,
    bandwidth: Option<u64>,
    /// They go before the devices.
    disks: Option<Arc<dyn Disks>>,
    /// What it shares with its disks.
    budget: Option<Budget>,
    setup: Setup,
    post_copy_first: bool,
    scripted: bool,
    zeroes_by_multifd: bool,
    /// The guest runs, as far as its user is concerned.
    runs: bool,
    /// We have paused it.
    paused_by_us: bool,
    /// The policy has allowed a switchover.
    permitted: bool,
    started: Instant,
    paused_at: Option<Instant>,
    post_copy: bool,
    meters: Meters,
    last: MigrationInfo,
    last_sent: Instant,
}

/// What one migration with this engine is started with.
pub struct Wishes {
    /// Where the destination's QEMU waits.
    pub uri: String,
    /// What the user set; post-copy only if the setup has it.
    pub limits: Limits,
    /// What switches of this VM cost, as far as is known.
    pub costs: Costs,
    /// The most to send, in bytes a second.
    pub bandwidth: Option<u64>,
    /// As chosen before (`means.rs`) and taken by the destination.
    pub setup: Setup,
    /// Pause the guest and switch to post-copy at once.
    pub post_copy_first: bool,
    /// A measurement says what is done: QEMU's throttle is its own.
    pub scripted: bool,
    /// The threads of multifd look for pages of zeroes. QEMU has them do so by itself, but not with the machine types of
    /// before 9.0.
    pub zeroes_by_multifd: bool,
}

impl QemuEngine {
    /// An engine for this QEMU, not started.
    pub fn new(qmp: Qmp, features: Features, runs: bool, wishes: Wishes) -> Self {
        Self {
            events: qmp.events(),
            qmp,
            features,
            uri: wishes.uri,
            limits: wishes.limits,
            bandwidth: wishes.bandwidth,
            setup: wishes.setup,
            post_copy_first: wishes.post_copy_first,
            scripted: wishes.scripted,
            zeroes_by_multifd: wishes.zeroes_by_multifd,
            disks: None,
            budget: wishes.bandwidth.map(Budget::new),
            runs,
            paused_by_us: false,
            // One that does not run may be switched over whenever it comes to that.
            permitted: !runs || wishes.post_copy_first,
            started: Instant::now(),
            paused_at: None,
            post_copy: false,
            meters: Meters::new(wishes.costs),
            last: MigrationInfo::default(),
            last_sent: Instant::now(),
        }
    }

    async fn pause(&mut self) -> Result<(), QmpError> {
        self.look_whether_it_runs().await?;
        self.paused_by_us = true;
        self.qmp.execute(commands::Stop {}).await?;
        Ok(())
    }

    /// Its user may pause it, and have it go on, while it is copied. What QEMU pauses for the migration it calls
    /// otherwise.
    async fn look_whether_it_runs(&mut self) -> Result<Option<RunState>, QmpError> {
        if self.paused_by_us || self.post_copy {
            return Ok(None);
        }
        let state = self.qmp.execute(commands::QueryStatus {}).await?.status;
        match state {
            RunState::Running => self.runs = true,
            RunState::Paused | RunState::IoError => (self.runs, self.paused_at) = (false, None),
            _ => {}
        }
        Ok(Some(state))
    }

    fn downtime_ms(&self) -> u64 {
        self.limits.downtime.as_millis() as u64
    }

    /// QEMU switches over as soon as the pages that are left take no longer than this. In its first round it takes its rate
    /// for pages of zeroes, which cost it almost nothing, for the rate of all, and would then pause the guest for as long
    /// as the rest of its RAM takes: a policy that knows that waits for the second.
    async fn permit_switchover(&mut self, pause: Duration) -> Result<(), EngineError> {
        if !std::mem::replace(&mut self.permitted, true)
            && let Some(disks) = &self.disks
        {
            disks.settle().await?;
        }
        let downtime_limit = Some((pause.as_millis() as u64).max(NO_SWITCHOVER_MS));
        self.qmp.execute(MigrationParameters { downtime_limit, ..MigrationParameters::default() }).await?;
        Ok(())
    }

    /// In bytes a second.
    fn sends_at_most(&self, rate: Option<u64>) -> MigrationParameters {
        let after_switchover = self.features.has_parameter("max-postcopy-bandwidth");
        MigrationParameters {
            max_bandwidth: Some(rate.unwrap_or(UNLIMITED)),
            max_postcopy_bandwidth: after_switchover.then_some(rate.unwrap_or(0)),
            ..MigrationParameters::default()
        }
    }

    async fn set_parameters(&self) -> Result<(), QmpError> {
        let mut parameters = MigrationParameters {
            downtime_limit: Some(if self.permitted { self.downtime_ms() } else { NO_SWITCHOVER_MS }),
            ..self.sends_at_most(self.bandwidth)
        };
        if self.setup.channels > 0 {
            parameters.multifd_channels = Some(self.setup.channels);
            parameters.zero_page_detection = self.zeroes_by_multifd.then(|| "multifd".into());
        }
        if self.setup.has("auto-converge") && !self.scripted {
            parameters.set_throttle(Percent(1));
        }
        self.qmp.execute(parameters).await?;
        self.setup.set_parameters(&self.qmp).await
    }

    /// Takes in the events that have come and waits for the next one until the tick.
    async fn next_news(&mut self) {
        let tick = tokio::time::sleep(TICK);
        tokio::pin!(tick);
        loop {
            tokio::select! {
                event = self.events.next() => match event {
                    Some(event) => {
                        if self.note(&event) {
                            return;
                        }
                    }
                    // QEMU is gone; the query that follows says so.
                    None => return,
                },
                () = &mut tick => return,
            }
        }
    }

    /// True when the event may change what is to be done.
    fn note(&mut self, event: &Event) -> bool {
        match event.name.as_str() {
            "STOP" => self.paused_at = Some(event.at),
            "RESUME" => self.paused_at = None,
            "MIGRATION" | "MIGRATION_PASS" => {}
            _ => return false,
        }
        true
    }

    fn see(&mut self, info: MigrationInfo) -> Result<Seen, EngineError> {
        let status = info.status.clone().unwrap_or(MigrationStatus::None);
        let (mut ready_to_commit, mut complete, mut broken) = (false, false, None);
        match &status {
            MigrationStatus::Failed => return Err(EngineError::Failed { reason: reason(&info) }),
            MigrationStatus::Cancelled => {
                return Err(EngineError::Failed { reason: "QEMU's migration was cancelled from outside".into() });
            }
            status if status.is_post_copy() => {
                self.post_copy = true;
                ready_to_commit = true;
                if *status == MigrationStatus::PostcopyPaused {
                    broken = Some(reason(&info));
                }
            }
            MigrationStatus::Completed => {
                ready_to_commit = true;
                complete = true;
            }
            _ => {}
        }
        let phase = match &status {
            _ if self.post_copy => Phase::PostCopy,
            MigrationStatus::Device | MigrationStatus::PreSwitchover | MigrationStatus::Completed => Phase::SwitchOver,
            _ => Phase::PreCopy,
        };
        let ram = info.ram.clone().unwrap_or_default();
        // Nothing is told of the RAM while QEMU makes its connections, over which it may hang, too.
        let sent = |info: &MigrationInfo| info.ram.as_ref().map(|ram| ram.transferred);
        if phase == Phase::PostCopy || sent(&self.last) != sent(&info) {
            self.last_sent = Instant::now();
        }
        if self.last_sent.elapsed() > STALLED {
            let reason = format!("nothing could be sent for {} s (QEMU's migration is {status})", STALLED.as_secs());
            return Err(EngineError::Failed { reason });
        }
        let standing = Standing {
            started: self.started,
            phase,
            throttle: info.cpu_throttle_percentage,
            means: Means { pace: false, throttle: self.setup.has("auto-converge") },
            limits: self.limits,
        };
        let observation = self.meters.observe(&ram, &standing, Instant::now());
        self.last = info;
        let let_go = status.is_post_copy();
        Ok(Seen { observation, ready_to_commit, complete, let_go, paused_at: self.paused_at, last_pages: None, broken })
    }
}

#[async_trait]
impl RamEngine for QemuEngine {
    async fn start(&mut self) -> Result<(), EngineError> {
        self.set_parameters().await?;
        if self.post_copy_first {
            self.pause().await?;
        }
        self.started = Instant::now();
        self.last_sent = self.started;
        self.meters.begin();
        self.qmp.execute(commands::Migrate { uri: self.uri.clone(), resume: None }).await?;
        if self.post_copy_first {
            self.qmp.execute(commands::MigrateStartPostcopy {}).await?;
        }
        Ok(())
    }

    async fn observe(&mut self) -> Result<Seen, EngineError> {
        self.next_news().await;
        if let Some(state) = self.look_whether_it_runs().await? {
            goes_on(&state)?;
        }
        let info = self.qmp.execute(commands::QueryMigrate {}).await?;
        if let Some(ram) = &info.ram {
            self.meters.count(ram);
        }
        if let (Some(budget), Some(disks)) = (&mut self.budget, &self.disks)
            && let Some(rate) = budget.for_ram(self.started.elapsed(), disks.sent())
        {
            self.qmp.execute(self.sends_at_most(Some(rate))).await?;
        }
        if info.status == Some(MigrationStatus::PreSwitchover)
            && let Some(disks) = self.disks.take()
        {
            disks.cut_over().await?;
            let state = MigrationStatus::PreSwitchover.to_string();
            self.qmp.execute(commands::MigrateContinue { state }).await?;
        }
        self.see(info)
    }

    async fn apply(&mut self, action: &Action) -> Result<(), EngineError> {
        match action {
            Action::PostCopy => {
                self.qmp.execute(commands::MigrateStartPostcopy {}).await?;
            }
            Action::Throttle(share) => {
                let mut parameters = MigrationParameters::default();
                parameters.set_throttle(*share);
                self.qmp.execute(parameters).await?;
            }
            Action::Allow(pause) => self.permit_switchover(*pause).await?,
            Action::Pause => {
                self.pause().await?;
                // QEMU's longest: nothing is written any more, and whatever is left is to be sent.
                self.permit_switchover(LONGEST_PAUSE).await?;
            }
            Action::Continue | Action::Pace(_) | Action::GiveUp(_) => {}
        }
        Ok(())
    }

    async fn set_limits(&mut self, limits: Limits, bandwidth: Option<u64>) -> Result<(), EngineError> {
        // QEMU knows within a tenth of a second what it can send, and so when a pause takes as long as it may.
        let downtime_limit = match limits.downtime != self.limits.downtime {
            true if self.runs => Some(NO_SWITCHOVER_MS),
            true if self.permitted => Some(limits.downtime.as_millis() as u64),
            _ => None,
        };
        let parameters = MigrationParameters { downtime_limit, ..self.sends_at_most(bandwidth) };
        self.qmp.execute(parameters).await?;
        (self.limits, self.bandwidth, self.budget) = (limits, bandwidth, bandwidth.map(Budget::new));
        Ok(())
    }

    fn post_copy_obstacle(&self) -> Option<String> {
        let has = self.setup.has("postcopy-ram");
        (!has).then(|| "QEMU was not set up for it when the migration began".into())
    }

    async fn reconnect(&mut self, to: &NewConnection) -> Result<(), EngineError> {
        let NewConnection::Uri(uri) = to else {
            return Err(EngineError::Failed { reason: "the destination's QEMU waits nowhere".into() });
        };
        self.qmp.execute(commands::Migrate { uri: uri.into(), resume: Some(true) }).await?;
        Ok(())
    }

    async fn stop_copying(&mut self) -> Result<(), EngineError> {
        self.look_whether_it_runs().await?;
        stop_copying(&self.qmp).await
    }

    fn brings_disks(&mut self, disks: Arc<dyn Disks>) {
        self.disks = Some(disks);
    }

    fn guest_runs(&self) -> bool {
        self.runs
    }

    fn totals(&self) -> Totals {
        let ram = self.last.ram.clone().unwrap_or_default();
        Totals {
            sent: ram.transferred,
            rounds: self.meters.rounds(),
            dirty_rate: self.meters.dirty_rate(),
            downtime_ms: self.last.downtime,
            ..Totals::default()
        }
    }
}

/// Ends whatever migration this QEMU is doing. Also for an agent that starts again and finds a migration that its
/// predecessor left behind. QEMU may set the guest running that it had paused, or leave it paused.
pub async fn stop_copying(qmp: &Qmp) -> Result<(), EngineError> {
    let deadline = Instant::now() + CANCEL_TIMEOUT;
    loop {
        let status = qmp.execute(commands::QueryMigrate {}).await?.status.unwrap_or(MigrationStatus::None);
        match status {
            MigrationStatus::None
            | MigrationStatus::Completed
            | MigrationStatus::Failed
            | MigrationStatus::Cancelled => return Ok(()),
            MigrationStatus::Cancelling => {}
            status if status.is_post_copy() => return Err(EngineError::TooLate),
            _ => {
                qmp.execute(commands::MigrateCancel {}).await?;
            }
        }
        if Instant::now() > deadline {
            return Err(EngineError::Failed { reason: format!("QEMU does not end its migration (it is {status})") });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// As QEMU's `migrate` and `migrate-incoming` want it.
pub(crate) fn tcp_uri(address: IpAddr, port: u16) -> String {
    format!("tcp:{}", std::net::SocketAddr::new(address, port))
}

fn reason(info: &MigrationInfo) -> String {
    info.error_desc.clone().unwrap_or_else(|| "QEMU gives no reason".into())
}

trait Throttled {
    fn set_throttle(&mut self, share: Percent);
}

impl Throttled for MigrationParameters {
    /// Auto-converge starts at `initial`, grows by `increment` and stops at `max`: all the same makes it one step.
    fn set_throttle(&mut self, share: Percent) {
        self.cpu_throttle_initial = Some(share.0);
        self.cpu_throttle_increment = Some(share.0);
        self.max_cpu_throttle = Some(share.0);
    }
}
