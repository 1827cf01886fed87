//! One migration, reckoned in steps of time.
//!
//! Of each part of the guest it is known how much is pending (to be sent in this round) and how much is stale (sent, and
//! written since). In a step of time the link takes from what is pending, the guest makes some of the rest stale, and a
//! look makes what is stale pending. Of a part that is written anywhere, a time in which `w` bytes of pages are written
//! leaves `e^(-w/n)` of its `n` bytes alone; one that is swept over is written page by page.
//!
//! In post-copy each touch of a page that is missing costs a fault: a guest that would touch `f` missing pages a second,
//! each of which takes `c`, goes on at `1 / (1 + f c)` of its speed.

use vmferry_policy::harm::Felt;
use vmferry_policy::{Action, Bytes, BytesPerSec, Costs, Limits, Means, Observation, Percent, Phase, Policy, Scan};

use crate::{Engine, EngineKind, Guest, Link, Random};

const PAGE: f64 = 4096.0;
/// A migration that takes longer than this, and so many times as long as it takes to send all RAM once over what the link
/// carries in the end, has failed.
const LONGEST: (f64, f64) = (3600.0, 4.0);
/// Steps of time: at least and at most.
const STEP: (f64, f64) = (0.002, 0.1);
/// So much must be sent before it is told how much of it is stale (`TELLING` in the external engine).
const TELLING: f64 = 32.0 * 1_048_576.0;
/// The external engine looks again after ten microseconds for each page that was written, from 250 ms to a second
/// (`FAULT` and `LOOK` there).
const LOOK_AGAIN: (f64, f64, f64) = (1e-5, 0.25, 1.0);
/// QEMU's throttle: see `TIMESLICE` in the model of the policy.
const TIMESLICE: f64 = 0.01;
/// A guest that goes from page to page gets them at this share of the link's rate (64 MiB in 571 to 946 ms at 1 Gbit/s).
const AHEAD: f64 = 0.8;
/// How much a measured rate wavers.
const NOISE: f64 = 0.03;

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest runs at the destination, all of it.
    Completed,
    /// The policy gave up.
    GaveUp,
    /// It was not done when it should have been long ago.
    TooLong,
}

/// What it did.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// What the guest felt.
    pub felt: Felt,
    /// Sent, in bytes.
    pub bytes: f64,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// The guest was slowed down by this share at most, and how often a lever was moved.
    pub slowed: f64,
    /// Each decision: when, in which round, and what.
    pub actions: Vec<(f64, u32, Action)>,
    /// The decisions in words, where the policy has some.
    pub words: Vec<String>,
}

struct Migration<'a> {
    guest: &'a Guest,
    link: &'a Link,
    engine: Engine,
    limits: Limits,
    /// When these are others, in seconds; the last one comes first.
    changes: Vec<(f64, Limits)>,
    random: Random,
    /// What its manager limits what is sent to, and that and the user's limit together.
    managed: Option<BytesPerSec>,
    bandwidth: f64,
    at: f64,
    /// It has failed then.
    longest: f64,
    /// Which share of the guest's memory the first round has not come to yet.
    ahead: f64,
    /// Of each part: not sent yet at all, to be sent in this round, of that hot, stale.
    unsent: Vec<f64>,
    pending: Vec<f64>,
    hot: Vec<f64>,
    stale: Vec<f64>,
    /// Which share was written at the last look.
    written: Vec<f64>,
    /// Which parts are sent sooner than others.
    sooner: Vec<f64>,
    round: u32,
    scanned: f64,
    scan: Option<Scan>,
    look_again: f64,
    measured: f64,
    allowed: f64,
    throttle: f64,
    /// To be taken up at the next look.
    next_throttle: f64,
    pace: f64,
    slowed_now: f64,
    paused_at: Option<f64>,
    outcome: Outcome,
}

/// Runs it to its end. `bandwidth` is a limit that the policy's manager sets, if it does.
pub fn run(
    guest: &Guest,
    link: &Link,
    engine: Engine,
    limits: Limits,
    seed: u64,
    bandwidth: Option<BytesPerSec>,
    policy: &mut dyn Policy,
) -> Outcome {
    run_tuned(guest, link, engine, (limits, &[]), seed, bandwidth, policy)
}

/// The same where the user changes the limits at these times, in seconds.
pub fn run_tuned(
    guest: &Guest,
    link: &Link,
    engine: Engine,
    (limits, changes): (Limits, &[(f64, Limits)]),
    seed: u64,
    managed: Option<BytesPerSec>,
    policy: &mut dyn Policy,
) -> Outcome {
    let parts = guest.parts.len();
    let outcome = Outcome {
        end: End::TooLong,
        felt: Felt::default(),
        bytes: 0.0,
        rounds: 1,
        slowed: 0.0,
        actions: Vec::new(),
        words: Vec::new(),
    };
    let mut changes = changes.to_vec();
    changes.sort_by(|a, b| b.0.total_cmp(&a.0));
    let bandwidth = least(engine, managed, limits);
    let slowest = changes.iter().map(|(_, limits)| least(engine, managed, *limits)).fold(bandwidth, f64::min);
    let once = guest.parts.iter().map(|part| part.bytes).sum::<f64>() / link.in_the_end().min(slowest).max(1.0);
    let mut migration = Migration {
        guest,
        link,
        engine,
        limits,
        changes,
        random: Random::new(seed),
        managed,
        bandwidth,
        at: 0.0,
        longest: LONGEST.0.max(once * LONGEST.1),
        ahead: 1.0,
        unsent: guest.parts.iter().map(|part| if part.zero { 0.0 } else { part.bytes }).collect(),
        pending: vec![0.0; parts],
        hot: vec![0.0; parts],
        stale: vec![0.0; parts],
        written: vec![0.0; parts],
        sooner: Vec::new(),
        round: 1,
        scanned: 0.0,
        scan: None,
        look_again: 0.0,
        measured: 0.0,
        allowed: 0.0,
        throttle: 0.0,
        next_throttle: 0.0,
        pace: 0.0,
        slowed_now: 0.0,
        paused_at: None,
        outcome,
    };
    migration.sooner = (0..parts).map(|_| migration.random.between(0.6, 1.6)).collect();
    migration.play(policy);
    migration.outcome
}

/// The most that is sent, in bytes a second.
fn least(engine: Engine, managed: Option<BytesPerSec>, limits: Limits) -> f64 {
    let caps = [managed, limits.bandwidth].into_iter().flatten().map(|it| it.0 as f64);
    caps.fold(engine.most_rate, f64::min)
}

/// What a step came to.
enum Now {
    GoesOn,
    Ended,
}

impl Migration<'_> {
    fn play(&mut self, policy: &mut dyn Policy) {
        let mut polled = 0.0;
        while self.at < self.longest {
            let scanned = self.step();
            self.tune();
            if scanned || self.at >= polled + self.engine.poll {
                polled = self.at;
                self.measure();
                // QEMU does not wait to be told, and by then may have switched over.
                if self.engine.kind == EngineKind::Qemu && scanned && self.switches() {
                    return self.complete();
                }
                if matches!(self.ask(policy), Now::Ended) {
                    return;
                }
            }
            if scanned && self.switches() {
                return self.complete();
            }
        }
        self.outcome.felt.total = self.at;
    }

    /// The user's limits are others from now on. Engines take back what was allowed within those before.
    fn tune(&mut self) {
        while let Some((_, limits)) = self.changes.pop_if(|(at, _)| *at <= self.at) {
            if self.paused_at.is_none() {
                self.allowed = 0.0;
                self.limits = limits;
                self.bandwidth = least(self.engine, self.managed, limits);
            }
        }
    }

    fn rate(&self) -> f64 {
        self.link.at(self.at).0.min(self.bandwidth)
    }

    fn left(&self) -> f64 {
        self.unsent.iter().chain(&self.pending).sum()
    }

    /// Time goes on a little. True when all pages were looked at.
    fn step(&mut self) -> bool {
        let (rate, until) = (self.rate(), self.link.at(self.at).1);
        let (guest_pace, phase) = self.guest.pace_at(self.at);
        let cold: f64 = self.left() - self.hot.iter().sum::<f64>();
        let rest = if rate > 1.0 { cold.max(self.left() * 0.05) / rate } else { STEP.1 };
        let most = if self.at > 30.0 { STEP.1 * 3.0 } else { STEP.1 };
        let step = (rest / 5.0).clamp(STEP.0, most).min(until).min(phase);
        self.write(guest_pace, step, rate);
        self.send(rate * step);
        self.at += step;
        self.looks().then(|| self.look()).is_some()
    }

    /// The guest writes for so long.
    fn write(&mut self, guest_pace: f64, step: f64, rate: f64) {
        if self.paused_at.is_some() {
            return;
        }
        let speed = (1.0 - self.throttle) * guest_pace;
        let mut new = [0.0; 16];
        let mut wanted = 0.0;
        let ahead = self.ahead;
        for (index, part) in self.guest.parts.iter().enumerate() {
            // What is to be sent anyway costs nothing more; QEMU notes it all the same. What was zero is where the first
            // round has come to, or is not.
            let open = match self.engine.kind {
                _ if part.zero && self.round == 1 => part.bytes * (1.0 - ahead),
                EngineKind::External => part.bytes - self.unsent[index] - self.pending[index],
                EngineKind::Qemu => part.bytes - if self.round == 1 { self.unsent[index] } else { 0.0 },
            };
            let free = (open - self.stale[index]).max(0.0);
            let writes = part.rate * speed * step;
            if part.zero && self.round == 1 {
                self.unsent[index] += (writes * ahead).min((part.bytes * ahead - self.unsent[index]).max(0.0));
            }
            if free <= 0.0 || part.rate <= 0.0 {
                continue;
            }
            new[index] = match part.sweeps {
                true => (writes * open / part.bytes).min(free),
                false => free * (1.0 - (-writes / part.bytes).exp()),
            };
            wanted += new[index];
        }
        let mut goes = 1.0;
        if self.pace > 0.0 && wanted > 0.0 {
            goes = (self.pace * rate * step / wanted).min(1.0);
        }
        for (stale, new) in self.stale.iter_mut().zip(new) {
            *stale += new * goes;
        }
        let slowed = 1.0 - (1.0 - self.throttle) * goes;
        self.slowed_now = slowed;
        self.outcome.slowed = self.outcome.slowed.max(slowed);
        let faults = wanted * goes / PAGE * self.engine.write_fault / self.guest.processors;
        self.outcome.felt.lost += step * slowed + faults.min(step);
    }

    /// From everywhere a bit, as what is written is everywhere in a guest's memory; of some parts sooner than of others.
    fn send(&mut self, mut bytes: f64) {
        // What is hot comes last.
        for keeps_hot in [true, false] {
            let from = if self.round == 1 { &mut self.unsent } else { &mut self.pending };
            let kept = |hot: f64| if keeps_hot { hot } else { 0.0 };
            let there = from.iter().zip(&self.hot).map(|(left, hot)| (left - kept(*hot).min(*left)).max(0.0));
            let there: Vec<f64> = there.collect();
            let all: f64 = there.iter().sum();
            let goes_all = bytes.min(all);
            let weighed: f64 = there.iter().zip(&self.sooner).map(|(there, sooner)| there * sooner).sum();
            if weighed <= 0.0 {
                continue;
            }
            let mut gone = 0.0;
            for (index, there) in there.iter().enumerate() {
                let share = if goes_all >= all { *there } else { goes_all * there * self.sooner[index] / weighed };
                let goes = share.min(*there);
                from[index] -= goes;
                self.hot[index] = self.hot[index].min(from[index]);
                gone += goes;
            }
            bytes -= gone;
            self.outcome.bytes += gone;
        }
        let first = self.guest.parts.iter().zip(&self.unsent).filter(|(part, _)| !part.zero);
        let (used, left) = first.fold((0.0, 0.0), |(used, left), (part, unsent)| (used + part.bytes, left + unsent));
        self.ahead = if self.round == 1 && used > 0.0 { left / used } else { 0.0 };
    }

    /// It is time to look at all pages.
    fn looks(&self) -> bool {
        let left = self.left();
        match self.engine.kind {
            EngineKind::Qemu if self.paused_at.is_none() => left <= (self.allowed * self.measured).max(PAGE),
            EngineKind::External if self.round > 1 => {
                let cold = left - self.hot.iter().sum::<f64>();
                left < PAGE || cold < PAGE && self.at >= self.scanned + self.look_again
            }
            _ => left < PAGE,
        }
    }

    fn look(&mut self) {
        let took = self.engine.scan * self.guest.ram() / crate::guest::GIB;
        self.write(self.guest.pace_at(self.at).0, took, self.rate());
        self.at += took;
        let (mut written, left_over) = match self.engine.kind {
            EngineKind::External => (0.0, 0.0),
            EngineKind::Qemu => (0.0, self.left()),
        };
        for (index, part) in self.guest.parts.iter().enumerate() {
            let (stale, before) = (self.stale[index], self.pending[index] + self.unsent[index]);
            // QEMU notes again what is still to be sent.
            let twice = if self.engine.kind == EngineKind::Qemu { stale * before / part.bytes.max(1.0) } else { 0.0 };
            let share = stale / part.bytes.max(1.0);
            self.pending[index] = (before + stale - twice).min(part.bytes);
            self.hot[index] = match self.engine.kind {
                EngineKind::External => {
                    self.pending[index] * (share + before / part.bytes.max(1.0)).min(1.0) * self.written[index]
                }
                EngineKind::Qemu => 0.0,
            };
            self.written[index] = (share + before / part.bytes.max(1.0)).min(1.0);
            (self.stale[index], self.unsent[index]) = (0.0, 0.0);
            written += stale;
        }
        let interval = self.at - self.scanned;
        self.scanned = self.at;
        self.round += 1;
        self.throttle = self.next_throttle;
        self.look_again = (written / PAGE * LOOK_AGAIN.0).clamp(LOOK_AGAIN.1, LOOK_AGAIN.2);
        // QEMU begins anew while some of the round before is left; that was written before.
        let left = Bytes((self.left() - left_over).max(0.0) as u64);
        self.scan = Some(Scan { interval: std::time::Duration::from_secs_f64(interval), left });
    }

    /// As engines do: smoothed, and never exact.
    fn measure(&mut self) {
        let noise = 1.0 + (self.random.share() * 2.0 - 1.0) * NOISE;
        let sample = self.rate() * noise;
        self.measured = if self.measured == 0.0 { sample } else { self.measured + 0.3 * (sample - self.measured) };
    }

    fn switches(&self) -> bool {
        self.left() < PAGE && self.allowed > 0.0 || self.left() / self.measured.max(1.0) <= self.allowed
    }

    fn observation(&self) -> Observation {
        let ram = self.guest.ram();
        // Zeroes are everywhere, and count until it is known that they are.
        let remaining = if self.round == 1 { self.ahead * ram } else { self.left() };
        let stale: f64 = self.stale.iter().sum();
        let tells = self.engine.kind == EngineKind::External && self.round == 1 && self.outcome.bytes >= TELLING;
        let stale = Bytes(if tells { stale as u64 } else { 0 });
        let duration = std::time::Duration::from_secs_f64;
        let slowed = if self.paused_at.is_some() { 0.0 } else { self.slowed_now };
        Observation {
            elapsed: duration(self.at),
            phase: Phase::PreCopy,
            round: self.round,
            remaining: Bytes(remaining as u64),
            total: Bytes(ram as u64),
            scan: self.scan,
            stale,
            sent: Bytes(self.outcome.bytes as u64),
            dirty_rate: BytesPerSec(self.scan.map_or(0.0, |it| it.left.0 as f64 / it.interval.as_secs_f64()) as u64),
            link_rate: BytesPerSec(self.measured as u64),
            round_trip: duration(self.link.round_trip),
            throttle: Percent((slowed * 100.0) as u8),
            means: Means {
                pace: self.engine.kind == EngineKind::External,
                throttle: self.engine.kind == EngineKind::Qemu,
            },
            costs: Costs {
                switchover: duration(self.engine.switchover),
                post_copy: duration(self.engine.post_copy),
                fault: duration(self.engine.fault + self.link.round_trip),
            },
            limits: self.limits,
        }
    }

    /// Does what the policy says until it says no more.
    fn ask(&mut self, policy: &mut dyn Policy) -> Now {
        // Two levers and a switch at most; whoever says more is asked again.
        for _ in 0..4 {
            let action = policy.decide(&self.observation());
            self.outcome.words.extend(policy.words());
            if action != Action::Continue {
                self.outcome.actions.push((self.at, self.round, action.clone()));
            }
            match action {
                Action::Continue => break,
                Action::Allow(pause) => self.allowed = pause.as_secs_f64(),
                Action::Throttle(share) if self.engine.kind == EngineKind::Qemu => {
                    self.next_throttle = share.share().min(0.99);
                    let sleeps = TIMESLICE * self.next_throttle / (1.0 - self.next_throttle);
                    self.outcome.felt.stall = self.outcome.felt.stall.max(sleeps);
                }
                Action::Pace(share) if self.engine.kind == EngineKind::External => {
                    self.outcome.felt.stall = self.outcome.felt.stall.max(self.engine.paced_stall);
                    self.pace = share.share();
                }
                Action::Throttle(_) | Action::Pace(_) => {}
                Action::Pause => {
                    self.paused_at.get_or_insert(self.at);
                    self.allowed = self.allowed.max(1e-3);
                }
                Action::PostCopy => {
                    self.post_copy();
                    return Now::Ended;
                }
                Action::GiveUp(_) => {
                    self.outcome.end = End::GaveUp;
                    self.outcome.felt.total = self.at;
                    self.outcome.rounds = self.round;
                    return Now::Ended;
                }
            }
        }
        Now::GoesOn
    }

    /// The guest is paused and what is left is sent.
    fn complete(&mut self) {
        let pace = self.guest.pace_at(self.at).0;
        if self.paused_at.is_none() {
            self.write(pace, self.engine.pause, self.rate());
            self.at += self.engine.pause;
        }
        let begun = self.paused_at.unwrap_or(self.at);
        let mut left = self.left() + self.stale.iter().sum::<f64>();
        self.outcome.bytes += left;
        left = self.over_the_link(left);
        self.at += self.engine.switchover + self.link.round_trip;
        self.outcome.end = if left < 1.0 { End::Completed } else { End::TooLong };
        self.outcome.felt.downtime = self.at - begun;
        self.outcome.felt.total = self.at;
        self.outcome.rounds = self.round;
    }

    /// So much is sent while nothing else happens; what could not be within the time there is.
    fn over_the_link(&mut self, mut left: f64) -> f64 {
        while left >= 1.0 && self.at < self.longest {
            let (rate, until) = (self.rate(), self.link.at(self.at).1);
            let step = if rate > 1.0 { (left / rate).min(until) } else { until.min(self.longest) };
            left -= rate * step;
            self.at += step;
        }
        left
    }

    fn post_copy(&mut self) {
        let mut missing: Vec<f64> = (self.unsent.iter().zip(&self.pending).zip(&self.stale))
            .zip(&self.guest.parts)
            .map(|(((unsent, pending), stale), part)| (unsent + pending + stale).min(part.bytes))
            .collect();
        self.outcome.felt.downtime = self.engine.post_copy + self.link.round_trip;
        self.at += self.outcome.felt.downtime;
        let begun = self.at;
        let fault = (self.engine.fault + self.link.round_trip) / self.guest.processors;
        let (mut stands, mut longest) = (0.0_f64, self.engine.fault * 4.0 + self.link.round_trip);
        loop {
            let left: f64 = missing.iter().sum();
            if left < PAGE || self.at >= self.longest {
                break;
            }
            let (rate, until) = (self.rate() * self.engine.in_post_copy, self.link.at(self.at).1);
            let (pace, phase) = self.guest.pace_at(self.at);
            let step = if rate > 1.0 { (left / rate / 5.0).clamp(STEP.0, STEP.1) } else { STEP.1 };
            let step = step.min(until).min(phase);
            // How long the guest waits for what it would touch in a second: each page for itself, but where it goes from
            // page to page they come ahead of it, as fast as the link goes.
            let slow = if rate > 1.0 { fault.max(PAGE / rate) } else { f64::INFINITY };
            let waits: f64 = (self.guest.parts.iter().zip(&missing))
                .filter(|(part, missing)| part.rate > 0.0 && **missing > 0.0)
                .map(|(part, missing)| {
                    let touches = part.rate * pace * missing / part.bytes.max(1.0);
                    if part.sweeps { touches / (AHEAD * rate).max(1.0) } else { touches / PAGE * slow }
                })
                .sum();
            let speed = 1.0 / (1.0 + waits);
            stands = if speed < 0.01 && rate <= 1.0 { stands + step } else { 0.0 };
            longest = longest.max(stands);
            self.outcome.felt.lost += step * (1.0 - speed);
            // What the guest faults on comes first, the rest in order.
            let goes = (rate * step / left).min(1.0);
            for missing in &mut missing {
                *missing *= 1.0 - goes;
            }
            self.outcome.bytes += goes * left;
            self.at += step;
            if goes >= 1.0 {
                break;
            }
        }
        self.outcome.end = if self.at < self.longest { End::Completed } else { End::TooLong };
        self.outcome.felt.at_risk = self.at - begun;
        self.outcome.felt.stall = self.outcome.felt.stall.max(longest);
        self.outcome.felt.total = self.at;
        self.outcome.rounds = self.round;
    }
}
