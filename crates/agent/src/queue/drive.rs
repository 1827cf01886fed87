//! Has those that wait begin, each in its turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmferry_api::{Code, MigrateRequest, PlanView, in_one_line};
use vmferry_policy::queue::Waiting;
use vmferry_policy::{Bytes, BytesPerSec};

use super::asking::Queue;
use super::entry::{Begun, Entry, PATIENCE};
use crate::error::AgentError;
use crate::journal::{Instance, QueuedRecord};
use crate::source::{Migration, Seat, guest};

/// Between two looks at what those under way send.
const LOOK: Duration = Duration::from_millis(500);

/// Later it may be different, without anybody's doing.
fn passes(error: &AgentError) -> bool {
    let is_unreachable = matches!(error, AgentError::Peer(error) if error.code() == Code::Unreachable);
    is_unreachable || matches!(error, AgentError::Busy { .. } | AgentError::MigrationRuns { .. })
}

impl Queue {
    /// For as long as the agent lives.
    pub(crate) async fn drive(self: Arc<Self>) {
        loop {
            let in_post_copy = self.outgoing.in_post_copy();
            let next = {
                let mut line = self.lock();
                let next = line.next(&in_post_copy);
                if let Some(entry) = &next {
                    let (migration, batch) = (Arc::clone(entry.migration()), entry.batch);
                    let cap = entry.request.bandwidth.map(BytesPerSec);
                    line.begun.push(Begun { migration, batch, there: None, cap });
                    line.share();
                }
                next
            };
            if let Some(entry) = next {
                tokio::spawn(Arc::clone(&self).takes_its_turn(entry));
                continue;
            }
            let looks = !self.lock().waiting.is_empty();
            tokio::select! {
                () = self.news.notified() => {}
                () = tokio::time::sleep(LOOK), if looks => {}
            }
        }
    }

    async fn takes_its_turn(self: Arc<Self>, mut entry: Entry) {
        let migration = Arc::clone(entry.migration());
        let begun = match self.is_still(&migration.vm, &entry.instance).await {
            Ok(()) => self.begin(&mut entry.seat, entry.request.clone()).await,
            Err(error) => {
                self.is_over(&migration);
                Err(error)
            }
        };
        match begun {
            Ok(_) => {
                if let Err(error) = self.outgoing.host.journal.end_queued(migration.id, None).await {
                    tracing::error!(vm = migration.vm, error = in_one_line(&error), "cannot note that it has begun");
                }
            }
            // Others go meanwhile.
            Err(error) if passes(&error) && !migration.was_cancelled() && entry.waits_on(Instant::now()) => {
                tracing::info!(vm = migration.vm, error = in_one_line(&error), "cannot begin yet");
                entry.tell((1, format!("tried again soon: {}", in_one_line(&error))));
                self.lock().waiting.insert(0, entry);
            }
            Err(error) => {
                self.ends(&migration, &error).await;
            }
        }
    }

    /// This VM is the one that it was when it was asked for.
    async fn is_still(&self, vm: &str, instance: &Instance) -> Result<(), AgentError> {
        if guest::instance(&self.outgoing.host, vm, Some(instance)).await? == *instance {
            return Ok(());
        }
        Err(AgentError::Conflict { message: format!("{vm} was started anew since it was asked for"), hint: None })
    }

    /// Begins one that is counted as such already.
    pub(super) async fn begin(
        self: &Arc<Self>,
        seat: &mut Seat,
        request: MigrateRequest,
    ) -> Result<PlanView, AgentError> {
        let migration = Arc::clone(&seat.migration);
        let begun = guest::begin(&self.outgoing, seat, request).await;
        if begun.is_err() {
            self.is_over(&migration);
            return begun;
        }
        let there = migration.key();
        let is_it = |it: &&mut Begun| it.migration.id == migration.id;
        self.lock().begun.iter_mut().filter(is_it).for_each(|it| it.there = there);
        self.news.notify_one();
        let queue = Arc::clone(self);
        tokio::spawn(async move {
            migration.told.end().await;
            queue.is_over(&migration);
        });
        begun
    }

    fn is_over(&self, migration: &Migration) {
        let mut line = self.lock();
        line.begun.retain(|it| it.migration.id != migration.id);
        line.share();
        drop(line);
        self.news.notify_one();
    }

    /// Goes on with what waited when the last agent ended.
    pub(crate) async fn take_up(self: &Arc<Self>) -> Result<(), AgentError> {
        for record in self.outgoing.host.journal.queued().await? {
            tracing::info!(vm = record.vm, migration = %record.id, "waits for its turn again");
            let entry = Entry {
                seat: Seat::again(record.id, &record.vm),
                instance: record.instance.clone(),
                request: record.request.clone(),
                batch: record.batch,
                there: None,
                guest: Waiting::default(),
                since: record.since,
                tried: None,
                told: None,
            };
            self.outgoing.add(Arc::clone(entry.migration()));
            self.lock().waiting.push(entry);
            tokio::spawn(Arc::clone(self).look_again(record));
        }
        Ok(())
    }

    /// Whether it can still go, and where.
    async fn look_again(self: Arc<Self>, record: QueuedRecord) {
        let look = async || {
            self.is_still(&record.vm, &record.instance).await?;
            guest::check(&self.outgoing, &record.vm, &record.request).await
        };
        let begun = Instant::now();
        let looked = loop {
            match look().await {
                // Its QEMU does not answer yet, or its destination is not up again.
                Err(error) if passes(&error) && begun.elapsed() < PATIENCE && self.waits(record.id) => {
                    tokio::time::sleep(LOOK).await;
                }
                looked => break looked,
            }
        };
        let refused = {
            let mut line = self.lock();
            let place = line.waiting.iter().position(|it| it.migration().id == record.id);
            match (place, looked) {
                // Its user has cancelled it.
                (None, _) => None,
                (Some(place), Ok(checked)) => {
                    line.waiting[place].guest.ram = Bytes(checked.view.ram_used_bytes);
                    line.waiting[place].there = Some(checked.key);
                    None
                }
                (Some(place), Err(error)) => Some((line.waiting.remove(place), error)),
            }
        };
        if let Some((entry, error)) = refused {
            self.ends(entry.migration(), &error).await;
        }
        self.news.notify_one();
    }

    /// It is in the line.
    fn waits(&self, id: Uuid) -> bool {
        self.lock().waiting.iter().any(|it| it.migration().id == id)
    }
}
