//! Migrations are asked for here, and taken out of the line.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::trial::{Data, Trial};
use vmferry_api::{
    Begun, ManyBegun, MigrateManyRequest, MigrateRequest, MigrationView, Problem, RefusedVm, Security, in_one_line,
};
use vmferry_link::usual_streams;
use vmferry_policy::queue::{Waiting, order};
use vmferry_policy::{Bytes, BytesPerSec};

use super::dirty_rate::dirty_rate;
use super::entry::{Begun as InHand, Entry};
use super::line::Line;
use crate::error::AgentError;
use crate::journal::QueuedRecord;
use crate::peers::link_trial;
use crate::source::{self, Checked, Outgoing, Seat};

/// How long the link is tried, in ms.
const TRIAL_MS: u64 = 250;
/// So many may be asked for at once.
const MOST: usize = 1000;

/// See the folder's text.
pub(crate) struct Queue {
    pub(super) outgoing: Arc<Outgoing>,
    line: Mutex<Line>,
    /// Something may be next.
    pub(super) news: Notify,
}

impl Queue {
    /// Of this host: nothing waits yet.
    pub(crate) fn new(outgoing: Arc<Outgoing>) -> Arc<Self> {
        Arc::new(Self { outgoing, line: Mutex::default(), news: Notify::new() })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().expect("no holder of this lock panics")
    }

    /// Plans a migration and, unless it is a dry run, has it begin, at once or in its turn. A dry run that becomes `unwanted`
    /// meanwhile ends.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        name: &str,
        request: MigrateRequest,
        unwanted: &CancellationToken,
    ) -> Result<Begun, AgentError> {
        self.outgoing.host.found(name).await?;
        if request.dry_run {
            let plan = source::dry_run(&self.outgoing, name, &request, unwanted).await?;
            return Ok(Begun { plan, id: None });
        }
        let seat = Seat::new(name);
        let id = Some(seat.migration.id);
        if self.takes_the_line(&seat, &request)? {
            let plan = self.begin(seat, request).await?;
            return Ok(Begun { plan, id });
        }
        let checked = source::check(&self.outgoing, name, &request).await?;
        let entry = self.entry(seat, request, None, &checked).await;
        self.put(vec![entry]).await?;
        Ok(Begun { plan: checked.view, id })
    }

    /// Plans all of them, before the first one begins, and has those that can go wait for their turn.
    pub(crate) async fn ask_for_many(
        self: &Arc<Self>,
        wanted: MigrateManyRequest,
        unwanted: &CancellationToken,
    ) -> Result<ManyBegun, AgentError> {
        let MigrateManyRequest { vms, how } = wanted;
        let bad = |message: String| Err(AgentError::BadRequest { message, hint: None });
        if vms.is_empty() || vms.len() > MOST {
            return bad(format!("{} VMs cannot be asked for at once: name 1 to {MOST}", vms.len()));
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = vms.iter().find(|name| !names.insert(name.as_str())) {
            return bad(format!("{twice} is named twice"));
        }
        if vms.len() > 1 && !how.disks.is_empty() {
            return bad("the place of a disk is for one VM: migrate that one by itself".into());
        }
        let (batch, mut refused, mut entries) = (Uuid::new_v4(), Vec::new(), Vec::new());
        if how.dry_run {
            let mut begun = Vec::new();
            for vm in vms {
                match self.ask(&vm, how.clone(), unwanted).await {
                    Ok(plan) => begun.push(plan),
                    Err(error) => refused.push(RefusedVm { vm, problem: Problem::from(&error) }),
                }
            }
            return Ok(ManyBegun { begun, refused });
        }
        for vm in vms {
            match self.look_at(&vm, &how).await {
                Ok(checked) => entries.push((vm, checked)),
                Err(error) => refused.push(RefusedVm { vm, problem: Problem::from(&error) }),
            }
        }
        if let Some((_, first)) = entries.first()
            && self.lock().is_empty()
        {
            // Nothing is in its way: a moment to see what the link carries.
            let trial = Trial {
                security: Security::Tls,
                streams: usual_streams(),
                packing: "none".into(),
                data: Data::Random,
                time_ms: TRIAL_MS,
                rate: None,
            };
            match link_trial::run(&self.outgoing.host, &how.to, trial).await {
                Ok(tried) => self.lock().learn(first.key, BytesPerSec(tried.rate() as u64)),
                Err(error) => tracing::debug!(error = in_one_line(&error), "the link could not be tried"),
            }
        }
        let link = entries.first().and_then(|(_, first)| self.lock().carried.get(&first.key).copied());
        let made = entries.iter().map(|(vm, checked)| self.entry(Seat::new(vm), how.clone(), Some(batch), checked));
        let made = join_all(made).await;
        let places = order(&made.iter().map(|it| it.guest).collect::<Vec<_>>(), link);
        let mut made: Vec<Option<(Entry, _)>> =
            made.into_iter().zip(entries).map(|(entry, (_, checked))| Some((entry, checked.view))).collect();
        let (mut sorted, mut begun) = (Vec::new(), Vec::new());
        for place in places {
            let (entry, plan) = made[place].take().expect("each has one place");
            begun.push(Begun { plan, id: Some(entry.migration().id) });
            sorted.push(entry);
        }
        self.put(sorted).await?;
        Ok(ManyBegun { begun, refused })
    }

    async fn look_at(&self, vm: &str, how: &MigrateRequest) -> Result<Checked, AgentError> {
        self.outgoing.host.found(vm).await?;
        if self.lock().has(vm) {
            return Err(AgentError::MigrationRuns { name: vm.into() });
        }
        source::check(&self.outgoing, vm, how).await
    }

    /// Takes the one that waits for this VM out of the line, or stops one that just begins. False when there is none.
    pub(crate) async fn cancel(&self, vm: &str) -> Result<bool, AgentError> {
        let entry = {
            let mut line = self.lock();
            let place = line.waiting.iter().position(|it| it.migration().vm == vm);
            place.map(|place| line.waiting.remove(place))
        };
        if let Some(entry) = entry {
            self.ends(&entry, &AgentError::Cancelled { name: vm.into() }).await;
            self.news.notify_one();
            return Ok(true);
        }
        let line = self.lock();
        let begins = line.begun.iter().find(|it| it.there.is_none() && it.migration.vm == vm);
        if let Some(begins) = begins {
            begins.migration.cancel();
        }
        Ok(begins.is_some())
    }

    /// Those that wait, in their order.
    pub(crate) fn views(&self) -> Vec<MigrationView> {
        self.lock().waiting.iter().map(Entry::view).collect()
    }

    /// The agent ends: what waits stays in the journal for the next one.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
    }

    /// True when it is to begin at once: then it is counted as one that begins.
    fn takes_the_line(&self, seat: &Seat, request: &MigrateRequest) -> Result<bool, AgentError> {
        let in_post_copy = self.outgoing.in_post_copy();
        let mut line = self.lock();
        if line.has(&seat.migration.vm) {
            return Err(AgentError::MigrationRuns { name: seat.migration.vm.clone() });
        }
        line.forget_what_is_over();
        // Nothing begins unseen beside one that an earlier agent began.
        let is_free = line.is_empty() && in_post_copy.is_empty();
        if is_free {
            let cap = request.bandwidth.map(BytesPerSec);
            line.begun.push(InHand { migration: Arc::clone(&seat.migration), batch: None, there: None, cap });
        }
        Ok(is_free)
    }

    /// As it waits in the line.
    async fn entry(&self, seat: Seat, request: MigrateRequest, batch: Option<Uuid>, checked: &Checked) -> Entry {
        let dirty = match self.outgoing.host.vm(&seat.migration.vm) {
            Ok(vm) => dirty_rate(&vm.qmp).await,
            // What became of it is told when it is its turn.
            Err(_) => None,
        };
        let guest = Waiting { ram: Bytes(checked.view.ram_used_bytes), dirty_rate: dirty.map(BytesPerSec) };
        tracing::debug!(vm = seat.migration.vm, ?guest, "waits for its turn");
        let (instance, there) = (checked.instance.clone(), Some(checked.key));
        Entry { seat, instance, request, batch, there, guest, since: now(), told: None }
    }

    /// They wait from now on, in this order.
    async fn put(&self, entries: Vec<Entry>) -> Result<(), AgentError> {
        let host = &self.outgoing.host;
        for entry in &entries {
            let record = QueuedRecord {
                id: entry.migration().id,
                vm: entry.migration().vm.clone(),
                instance: entry.instance.clone(),
                request: entry.request.clone(),
                batch: entry.batch,
                since: entry.since,
            };
            host.journal.put_queued(&record).await?;
        }
        for entry in &entries {
            self.outgoing.add(Arc::clone(entry.migration()));
        }
        self.lock().waiting.extend(entries);
        self.news.notify_one();
        Ok(())
    }

    /// It does not begin: who waits for it is told why, and so is the list of migrations.
    pub(super) async fn ends(&self, entry: &Entry, why: &AgentError) {
        self.does_not_begin(entry.migration().id, in_one_line(why)).await;
        entry.migration().does_not_begin(why);
    }

    pub(super) async fn does_not_begin(&self, id: Uuid, why: String) {
        tracing::warn!(migration = %id, why, "a migration that waited did not begin");
        if let Err(error) = self.outgoing.host.journal.end_queued(id, Some(format!("not begun: {why}"))).await {
            tracing::error!(migration = %id, error = in_one_line(&error), "cannot note that it did not begin");
        }
    }
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
