//! Hears the measuring guest on two machines, by their agents' witnesses, and puts what they tell in one order.
//!
//! Each machine stamps what it hears by its own monotonic clock. How those differ is found out as NTP does it (RFC 5905,
//! section 8): by asking what time it is there, and taking it that the answer was given half way between question and
//! reply; of many answers the fastest is the best, and cannot be wrong by more than half of what it took.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc::Receiver;
use tokio_util::codec::{Framed, LinesCodec};
use tokio_util::task::AbortOnDropHandle;
use vmferry_api::client::Client;
use vmferry_api::witness::{Asked, HostFacts, LONGEST_LINE, Told};
use vmferry_qemu::processors::ProcessorUse;

use crate::GuestLog;
use crate::report::Clocks;
use crate::testbed::GuestWatch;

/// What is heard is held back for so long, as the other machine may have heard something before it.
const HOLD: Duration = Duration::from_secs(1);
const FLUSH: Duration = Duration::from_millis(20);
/// A clock is asked so often at first, and then now and then.
const FIRST: u32 = 20;
const FIRST_EVERY: Duration = Duration::from_millis(5);
const THEN_EVERY: Duration = Duration::from_millis(250);
/// Answers are near a moment up to so many ns: in that time clocks that nobody corrects drift by half a ms.
const NEAR_NS: u64 = 10_000_000_000;
/// How often it is tried whether the other machine can be heard.
const AGAIN: Duration = Duration::from_millis(20);

/// See the module's text.
pub(super) struct Witnesses {
    heard: Arc<Mutex<Heard>>,
    typed: [Option<Receiver<&'static str>>; 2],
    listening: Vec<AbortOnDropHandle<()>>,
}

/// What was heard of both machines.
#[derive(Default)]
struct Heard {
    hosts: [OfHost; 2],
    /// In the order of time.
    held: BTreeMap<(Instant, u64), (usize, String)>,
    count: u64,
    processors: Vec<(Instant, usize, ProcessorUse)>,
}

#[derive(Default)]
struct OfHost {
    facts: HostFacts,
    clock: Clock,
    last: Option<Instant>,
    /// The guest had said something before it was listened to.
    missed: bool,
    /// Pieces of what it said that could not be told.
    lost: u64,
}

impl Witnesses {
    /// Nobody yet; and the guest as it will be heard.
    pub(super) fn new() -> (Self, GuestWatch) {
        let log = Arc::<Mutex<GuestLog>>::default();
        let heard = Arc::<Mutex<Heard>>::default();
        let (watch, typed) = GuestWatch::heard_otherwise(Arc::clone(&log), HOLD + FLUSH);
        let from = Arc::clone(&heard);
        let feeding = tokio::spawn(async move {
            loop {
                tokio::time::sleep(FLUSH).await;
                if let Some(until) = Instant::now().checked_sub(HOLD) {
                    lock(&from).feed(&mut lock(&log), until);
                }
            }
        });
        let listening = vec![AbortOnDropHandle::new(feeding)];
        (Self { heard, typed: typed.map(Some), listening }, watch)
    }

    /// Listens to the source's machine or the destination's, at this path of the local agent's API, as soon as something
    /// is there to be heard.
    pub(super) fn listen(&mut self, host: usize, client: &Client, path: String) {
        let Some(typed) = self.typed[host].take() else { return };
        let (client, heard) = (client.clone(), Arc::clone(&self.heard));
        self.listening.push(AbortOnDropHandle::new(tokio::spawn(async move {
            let connection = loop {
                match client.witness(&path).await {
                    Ok(connection) => break connection,
                    Err(_) => tokio::time::sleep(AGAIN).await,
                }
            };
            // Whoever misses the guest says so.
            let _ = hear(connection, host, &heard, typed).await;
        })));
    }

    /// What a machine is; nothing while it was not heard.
    pub(super) fn facts(&self, host: usize) -> Option<HostFacts> {
        Some(lock(&self.heard).hosts[host].facts.clone()).filter(|facts| !facts.name.is_empty())
    }

    /// What processors did on both, so far.
    pub(super) fn processors(&self) -> Vec<(Instant, usize, ProcessorUse)> {
        lock(&self.heard).processors.clone()
    }

    /// How far the other machine's clock can be compared with this one's.
    pub(super) fn clocks(&self) -> Option<Clocks> {
        lock(&self.heard).hosts[1].clock.compared()
    }

    /// Pieces of what the guest said that were not heard here.
    pub(super) fn lost(&self) -> u64 {
        lock(&self.heard).hosts.iter().map(|host| host.lost).sum()
    }

    /// The guest had begun to speak on the other machine before it was listened to there.
    pub(super) fn missed_its_arrival(&self) -> bool {
        lock(&self.heard).hosts[1].missed
    }
}

async fn hear(
    connection: reqwest::Upgraded,
    host: usize,
    heard: &Mutex<Heard>,
    mut typed: Receiver<&'static str>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (mut asking, mut telling) = Framed::new(connection, LinesCodec::new_with_max_length(LONGEST_LINE)).split();
    let origin = Instant::now();
    let line = |asked: Asked| serde_json::to_string(&asked).expect("a question is plain data");
    let mut asked = 0;
    let mut next = tokio::time::Instant::now();
    loop {
        tokio::select! {
            biased;
            line = telling.next() => {
                let Some(line) = line else { return Ok(()) };
                lock(heard).take(host, origin, serde_json::from_str(&line?)?);
            }
            Some(text) = typed.recv() => asking.send(line(Asked::Type(text.into()))).await?,
            () = tokio::time::sleep_until(next) => {
                asking.send(line(Asked::Clock(origin.elapsed().as_nanos() as u64))).await?;
                asked += 1;
                next += if asked < FIRST { FIRST_EVERY } else { THEN_EVERY };
            }
        }
    }
}

impl Heard {
    fn take(&mut self, host: usize, origin: Instant, told: Told) {
        let of = &mut self.hosts[host];
        match told {
            Told::Host(facts) => of.facts = facts,
            Told::Lost { pieces } => of.lost += pieces,
            Told::Clock { asked, at_ns } => {
                let sent = origin + Duration::from_nanos(asked);
                of.clock.answers.push(Answer { sent, took: sent.elapsed(), at_ns });
            }
            Told::Processors { at_ns, used } => {
                let at = of.clock.here(at_ns);
                self.processors.push((at, host, used));
            }
            Told::Said { at_ns, text, before } => {
                of.missed |= before && host == 1;
                // A better answer may come in between, which must not turn words around.
                let at = of.clock.here(at_ns).max(of.last.unwrap_or(origin));
                of.last = Some(at);
                self.count += 1;
                self.held.insert((at, self.count), (host, text));
            }
        }
    }

    fn feed(&mut self, log: &mut GuestLog, until: Instant) {
        while let Some(first) = self.held.first_entry().filter(|it| it.key().0 <= until) {
            let at = first.key().0;
            let (host, text) = first.remove();
            log.feed(host, at, text.as_bytes());
        }
    }
}

/// A machine's clock, as it was asked.
#[derive(Default)]
struct Clock {
    answers: Vec<Answer>,
}

#[derive(Clone, Copy)]
struct Answer {
    sent: Instant,
    took: Duration,
    /// There.
    at_ns: u64,
}

impl Answer {
    /// A moment there, here.
    fn here(&self, at_ns: u64) -> Instant {
        let known = self.sent + self.took / 2;
        let apart = Duration::from_nanos(at_ns.abs_diff(self.at_ns));
        match at_ns >= self.at_ns {
            true => known + apart,
            // No machine was heard of before this one started.
            false => known.checked_sub(apart).unwrap_or(known),
        }
    }
}

impl Clock {
    fn best<'a>(answers: impl Iterator<Item = &'a Answer>) -> Option<&'a Answer> {
        answers.min_by_key(|answer| answer.took)
    }

    /// By the fastest answer of those near it. Before the first one, a moment there is taken for now.
    fn here(&self, at_ns: u64) -> Instant {
        let near = Self::best(self.answers.iter().filter(|answer| answer.at_ns.abs_diff(at_ns) < NEAR_NS));
        near.or_else(|| Self::best(self.answers.iter())).map_or_else(Instant::now, |best| best.here(at_ns))
    }

    fn compared(&self) -> Option<Clocks> {
        let begun = self.answers.first()?.at_ns;
        let stretches = self.answers.chunk_by(|a, b| {
            let of = |answer: &Answer| answer.at_ns.saturating_sub(begun) / NEAR_NS;
            of(a) == of(b)
        });
        let bests: Vec<&Answer> = stretches.filter_map(|stretch| Self::best(stretch.iter())).collect();
        let (first, last) = (bests.first()?, bests.last()?);
        let here = (last.sent + last.took / 2).saturating_duration_since(first.sent + first.took / 2);
        let there_ns = i128::from(last.at_ns) - i128::from(first.at_ns);
        let slowest = bests.iter().map(|best| best.took).max()?;
        Some(Clocks {
            error_ms: slowest.as_secs_f64() * 1e3 / 2.0,
            drift_ms: (there_ns - here.as_nanos() as i128) as f64 / 1e6,
            answers: self.answers.len() as u64,
        })
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().expect("no holder of this lock panics")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_fastest_answer_tells_how_clocks_differ_and_by_how_much_that_may_be_wrong() {
        let sent = Instant::now();
        let mut clock = Clock::default();
        // It is 1000 s later there; the slow answer would be wrong by 4 ms.
        clock.answers.push(Answer { sent, took: ms(10), at_ns: 1_000_009_000_000 });
        clock.answers.push(Answer { sent: sent + ms(50), took: ms(2), at_ns: 1_000_051_000_000 });
        let here = clock.here(1_000_100_000_000);
        assert_eq!(here - sent, ms(100));
        assert_eq!(clock.here(1_000_020_000_000) - sent, ms(20));
        let compared = clock.compared().unwrap();
        assert!((compared.error_ms - 1.0).abs() < 1e-9 && compared.drift_ms.abs() < 1e-6, "{compared:?}");
        // Later its clock is 3 ms ahead of that.
        clock.answers.push(Answer { sent: sent + ms(60_000), took: ms(4), at_ns: 1_060_005_000_000 });
        assert_eq!(clock.here(1_060_005_000_000) - sent, ms(60_002));
        let compared = clock.compared().unwrap();
        assert!((compared.error_ms - 2.0).abs() < 1e-9 && (compared.drift_ms - 3.0).abs() < 1e-6, "{compared:?}");
    }

    #[test]
    fn what_two_machines_heard_is_put_in_the_order_of_time() {
        let origin = Instant::now();
        let mut heard = Heard::default();
        for (host, later) in [(0, 0), (1, 500_000_000)] {
            heard.hosts[host].clock.answers.push(Answer { sent: origin, took: Duration::ZERO, at_ns: later });
        }
        let said = |at_ns, text: &str| Told::Said { at_ns, text: text.into(), before: false };
        // The end of a line is heard there before its beginning here.
        heard.take(1, origin, said(540_000_000, "at\":2}\n"));
        heard.take(1, origin, said(545_000_000, "{\"beat\":3}\n"));
        heard.take(0, origin, said(1_000_000, "{\"beat\":1}\n{\"be"));
        let mut log = GuestLog::new();
        heard.feed(&mut log, origin + ms(41));
        assert_eq!(log.beats().len(), 2, "what may not be in order yet is held back");
        heard.feed(&mut log, origin + ms(60));
        let switchover = log.switchovers().next().unwrap();
        assert_eq!((switchover.last.n, switchover.first.n), (1, 2));
        assert_eq!(switchover.downtime_felt(), ms(34));
    }
}
