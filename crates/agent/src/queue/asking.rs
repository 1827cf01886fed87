//! Migrations are asked for here, and taken out of the line.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmferry_api::{
    Begun, ManyBegun, MigrateManyRequest, MigrateRequest, MigrationView, Problem, RefusedVm, in_one_line,
};
use vmferry_link::usual_streams;
use vmferry_policy::queue::{Waiting, order};
use vmferry_policy::{Bytes, BytesPerSec};

use super::entry::{Begun as InHand, Entry};
use super::line::Line;
use crate::error::AgentError;
use crate::journal::{QueuedRecord, now};
use crate::peers::link_trial;
use crate::source::{Checked, Migration, Outgoing, Seat, guest};

/// So many may be asked for at once.
const MOST: usize = 1000;

/// See the folder's text.
pub(crate) struct Queue {
    pub(super) outgoing: Arc<Outgoing>,
    line: Mutex<Line>,
    /// Something may be next.
    pub(super) news: Notify,
}

/// A VM that is asked for just now.
struct Comes {
    queue: Arc<Queue>,
    vm: String,
}

impl Drop for Comes {
    fn drop(&mut self) {
        self.queue.lock().coming.retain(|it| *it != self.vm);
    }
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
        let name = &guest::called(&self.outgoing.host, name);
        guest::instance(&self.outgoing.host, name, None).await?;
        if request.dry_run {
            let plan = guest::dry_run(&self.outgoing, name, &request, unwanted).await?;
            return Ok(Begun { plan, id: None });
        }
        let mut seat = Seat::new(name);
        let id = Some(seat.migration.id);
        let _comes = self.comes(name)?;
        if self.takes_the_line(&seat, &request) {
            let plan = self.begin(&mut seat, request).await?;
            return Ok(Begun { plan, id });
        }
        let checked = guest::check(&self.outgoing, name, &request).await?;
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
        let vms: Vec<String> = vms.iter().map(|vm| guest::called(&self.outgoing.host, vm)).collect();
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
                if unwanted.is_cancelled() {
                    break;
                }
                match self.ask(&vm, how.clone(), unwanted).await {
                    Ok(plan) => begun.push(plan),
                    Err(error) => refused.push(RefusedVm { vm, problem: Problem::from(&error) }),
                }
            }
            return Ok(ManyBegun { begun, refused });
        }
        let mut coming = Vec::new();
        for vm in vms {
            match self.look_at(&vm, &how).await {
                Ok((comes, checked)) => {
                    coming.push(comes);
                    entries.push((vm, checked));
                }
                Err(error) => refused.push(RefusedVm { vm, problem: Problem::from(&error) }),
            }
        }
        if let Some((_, first)) = entries.first()
            && self.lock().is_empty()
        {
            // Nothing is in its way: a moment to see what the link carries.
            if let Some(rate) = link_trial::rate(&self.outgoing.host, &how.to, usual_streams(), first.rate).await {
                self.lock().learn(first.key, BytesPerSec(rate));
            }
        }
        let link = entries.first().and_then(|(_, first)| self.lock().carried(first.key));
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

    async fn look_at(self: &Arc<Self>, vm: &str, how: &MigrateRequest) -> Result<(Comes, Checked), AgentError> {
        guest::instance(&self.outgoing.host, vm, None).await?;
        let comes = self.comes(vm)?;
        Ok((comes, guest::check(&self.outgoing, vm, how).await?))
    }

    /// Nobody else asks for this VM until what this gives is dropped.
    fn comes(self: &Arc<Self>, vm: &str) -> Result<Comes, AgentError> {
        let mut line = self.lock();
        if line.has(vm) {
            return Err(AgentError::MigrationRuns { name: vm.into() });
        }
        line.coming.push(vm.into());
        Ok(Comes { queue: Arc::clone(self), vm: vm.into() })
    }

    /// Takes the one that waits for this VM out of the line, or stops one that just begins. False when there is none.
    pub(crate) async fn cancel(&self, vm: &str) -> Result<bool, AgentError> {
        let entry = {
            let mut line = self.lock();
            let place = line.waiting.iter().position(|it| it.migration().vm == vm);
            place.map(|place| (place, line.waiting.remove(place)))
        };
        if let Some((place, entry)) = entry {
            let why = AgentError::Cancelled { name: vm.into() };
            if let Err(error) = self.does_not_begin(entry.migration().id, in_one_line(&why)).await {
                // It would begin when the agent is started again.
                let mut line = self.lock();
                let place = place.min(line.waiting.len());
                line.waiting.insert(place, entry);
                return Err(error);
            }
            entry.migration().does_not_begin(&why);
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
    fn takes_the_line(&self, seat: &Seat, request: &MigrateRequest) -> bool {
        let in_post_copy = self.outgoing.in_post_copy();
        let mut line = self.lock();
        line.forget_what_is_over();
        // Nothing begins unseen beside one that an earlier agent began.
        let is_free = line.is_empty() && in_post_copy.is_empty();
        if is_free {
            let cap = request.bandwidth.map(BytesPerSec);
            line.begun.push(InHand { migration: Arc::clone(&seat.migration), batch: None, there: None, cap });
        }
        is_free
    }

    /// As it waits in the line.
    async fn entry(&self, seat: Seat, request: MigrateRequest, batch: Option<Uuid>, checked: &Checked) -> Entry {
        let dirty = guest::dirty_rate(&self.outgoing.host, &seat.migration.vm).await;
        let guest = Waiting { ram: Bytes(checked.view.ram_used_bytes), dirty_rate: dirty.map(BytesPerSec) };
        tracing::debug!(vm = seat.migration.vm, ?guest, "waits for its turn");
        let (instance, there) = (checked.instance.clone(), Some(checked.key));
        Entry { seat, instance, request, batch, there, guest, since: now() as u64, tried: None, told: None }
    }

    /// They wait from now on, in this order.
    async fn put(&self, entries: Vec<Entry>) -> Result<(), AgentError> {
        let host = &self.outgoing.host;
        let records = entries.iter().map(|entry| QueuedRecord {
            id: entry.migration().id,
            vm: entry.migration().vm.clone(),
            instance: entry.instance.clone(),
            request: entry.request.clone(),
            batch: entry.batch,
            since: entry.since,
        });
        host.journal.put_queued(records.collect()).await?;
        for entry in &entries {
            self.outgoing.add(Arc::clone(entry.migration()));
        }
        self.lock().waiting.extend(entries);
        self.news.notify_one();
        Ok(())
    }

    /// It does not begin: who waits for it is told why, and so is the list of migrations.
    pub(super) async fn ends(&self, migration: &Migration, why: &AgentError) {
        if let Err(error) = self.does_not_begin(migration.id, in_one_line(why)).await {
            tracing::error!(vm = migration.vm, error = in_one_line(&error), "cannot note that it did not begin");
        }
        migration.does_not_begin(why);
    }

    async fn does_not_begin(&self, id: Uuid, why: String) -> Result<(), AgentError> {
        tracing::warn!(migration = %id, why, "a migration that waited did not begin");
        Ok(self.outgoing.host.journal.end_queued(id, Some(format!("not begun: {why}"))).await?)
    }
}
