//! Our policy: of all ways forward, the one that harms the guest least within the limits.
//!
//! Whenever something new is known (a scan, or in the first round how much of what was sent is stale), it plays each way
//! forward ([`predict`](crate::predict)), leaves out those that would exceed a limit, and takes the one with the least
//! [harm](crate::harm); choices.rs has the order. While the link has just collapsed nothing is done that cannot be taken
//! back.
//!
//! What it is told may be missing, zero, or go backwards: then it waits and says so. It always ends: rounds that lead
//! nowhere are counted, and when there are enough of them only ways are left that end the migration.

use std::collections::VecDeque;
use std::fmt::Write;
use std::time::Duration;

use crate::choices::{Choice, in_order};
use crate::predict::{First, Outlook, Way, predict};
use crate::units::seconds;
use crate::{
    Action, Bytes, BytesPerSec, DirtySet, Limits, LinkRate, Observation, Otherwise, Percent, Phase, Policy, Reason,
};

/// Before this nothing is decided: the link's rate is just being found out.
const SETTLED: f64 = 0.3;
/// A link that is capped anew, or no more, is measured right after so long: engines smooth what they measure.
const SETTLES: f64 = 2.0;
/// In the first round it is decided anew after so long, if more is known.
const AGAIN: f64 = 0.25;
/// So much of the first round must be over before anything is decided.
const EVIDENCE: f64 = 0.05;
/// A link that carries so much more or less is news.
const NEWS: f64 = 0.25;
/// It looks so many rounds ahead.
const AHEAD: u32 = 8;
/// Shares of the link to which writes may be held, and of its time of which the guest may be deprived.
const PACES: [u8; 4] = [70, 50, 25, 12];
const THROTTLES: [u8; 8] = [20, 40, 60, 70, 80, 90, 95, 99];
/// So many scans in a row may fail to leave half of what once was least.
const PATIENCE: u32 = 12;
/// So many scans are enough, whatever they leave.
const MOST_SCANS: u32 = 80;
/// What is predicted to be left may turn out to be so much more.
const SLACK: f64 = 1.3;
/// By so much an engine's own idea of what is left, and of how long it takes, may be another than the policy's.
const MISTAKEN: f64 = 2.0;
/// No engine can tell a pause from one that is shorter than this.
const LEAST_PAUSE: f64 = 0.01;
/// So many scans must agree before it gives up.
const CERTAIN: u32 = 3;
/// A way is left for another only if that is better by this share: what is predicted wavers.
const BETTER: f64 = 0.95;

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct LeastHarm {
    dirty: Option<DirtySet>,
    link: LinkRate,
    round: u32,
    /// When the last scan was, in seconds.
    scanned: f64,
    scans: u32,
    /// The least that a scan has left, and how many scans since it was last halved.
    least: f64,
    idle_scans: u32,
    hopeless: u32,
    /// What was said last to each lever.
    allowed: f64,
    paced: Percent,
    throttled: Percent,
    /// What was seen of the last two when it was looked last.
    slowed: Percent,
    /// What is still to be said.
    queue: VecDeque<Action>,
    decided: Option<Decided>,
    /// Nothing is left to decide.
    over: bool,
    /// What the user has set, as of the last look; nothing is decided before this, in seconds, as the link's rate is about to
    /// be another one.
    limits: Option<Limits>,
    settled: f64,
    words: Option<String>,
    said_wait: bool,
}

/// The last decision, and of what.
#[derive(Clone, Debug)]
struct Decided {
    at: f64,
    rate: f64,
    /// What the first round was expected to leave; -1 while that was not known, and after it.
    leaves: f64,
    limits: Limits,
    way: Way,
}

impl Policy for LeastHarm {
    fn decide(&mut self, seen: &Observation) -> Action {
        if let Some(before) = self.limits.replace(seen.limits).filter(|before| *before != seen.limits) {
            self.limits_are_others(seen, before);
        }
        if seen.phase != Phase::PreCopy || self.over {
            return Action::Continue;
        }
        let scanned = self.take_in(seen);
        if let Some(action) = self.queue.pop_front() {
            return action;
        }
        if self.is_news(seen, scanned) {
            self.choose(seen, scanned);
        }
        self.queue.pop_front().unwrap_or(Action::Continue)
    }

    fn words(&mut self) -> Option<String> {
        self.words.take()
    }
}

impl LeastHarm {
    /// Learns from what is seen. True when there was a scan.
    fn take_in(&mut self, seen: &Observation) -> bool {
        let now = seen.elapsed.as_secs_f64();
        self.link.update(now, seen.link_rate.0 as f64);
        let total = seen.total.0 as f64;
        let dirty = self.dirty.get_or_insert_with(|| DirtySet::of(total));
        if dirty.is_unknown() && dirty.total().total_cmp(&total).is_ne() {
            *dirty = DirtySet::of(total);
        }
        let throttled = std::mem::replace(&mut self.slowed, seen.throttle);
        // What a guest writes that is held to a rate tells nothing of what it would.
        let is_free = self.paced.0 == 0;
        if seen.round == 1 && seen.stale.0 > 0 && is_free {
            let done = seen.total.0.saturating_sub(seen.remaining.0) as f64;
            let not_zero = (seen.sent.0 as f64 / done.max(1.0)).clamp(0.0, 1.0);
            // What a round of so long would leave of all.
            dirty.follow(now, seen.stale.0 as f64 / (done * not_zero).max(1.0) * total * not_zero);
        }
        if seen.round <= self.round {
            return false;
        }
        self.round = seen.round;
        let Some(scan) = seen.scan else { return false };
        let left = scan.left.0 as f64;
        if is_free {
            // The throttle is taken up at a scan: until this one it was as it was seen before.
            let wrote = if self.throttled.0 > 0 { 1.0 - throttled.share().min(0.99) } else { 1.0 };
            match seen.round {
                // The scan that ends the first round.
                2 => dirty.follow(scan.interval.as_secs_f64() * wrote, left),
                _ => dirty.learn(scan.interval.as_secs_f64() * wrote, left),
            }
        }
        self.scanned = now;
        self.scans += 1;
        self.idle_scans += 1;
        if self.scans == 1 || left < self.least / 2.0 {
            (self.least, self.idle_scans) = (left, 0);
        }
        true
    }

    /// Its user has changed them: what was allowed within the others the engine has taken back.
    fn limits_are_others(&mut self, seen: &Observation, before: Limits) {
        if seen.limits.bandwidth != before.bandwidth {
            self.settled = seen.elapsed.as_secs_f64() + SETTLES;
            self.link.is_capped(seen.limits.bandwidth.map(|it| it.0 as f64), self.settled);
        }
        self.queue.retain(|it| !matches!(it, Action::Allow(_)));
        // What it said last may not have been done: nobody changes limits after a switch.
        self.over = false;
        (self.allowed, self.hopeless, self.said_wait) = (0.0, 0, false);
    }

    fn is_news(&self, seen: &Observation, scanned: bool) -> bool {
        let now = seen.elapsed.as_secs_f64();
        let is_late = seen.limits.max_time.is_some_and(|most| seen.elapsed >= most);
        if now < self.settled && !is_late {
            return false;
        }
        if scanned {
            return true;
        }
        if now < SETTLED || seen.total.0 == 0 {
            return false;
        }
        if seen.round <= 1 && is_early(seen) {
            return false;
        }
        let Some(last) = &self.decided else { return true };
        if last.limits != seen.limits {
            return true;
        }
        if now - last.at < AGAIN.max(now * EVIDENCE) {
            return false;
        }
        let is_off = |before: f64, now: f64| (now - before).abs() > before.abs() * NEWS;
        is_late || is_off(last.rate, seen.link_rate.0 as f64) || is_off(last.leaves, self.leaves(seen))
    }

    /// What the first round is going to leave, as far as that is known.
    fn leaves(&self, seen: &Observation) -> f64 {
        let dirty = self.dirty.as_ref().filter(|dirty| seen.round <= 1 && !dirty.is_unknown());
        let takes = seen.total.time_at(seen.link_rate).unwrap_or_default();
        dirty.map_or(-1.0, |dirty| dirty.after(takes.as_secs_f64() / 2.0).mid)
    }

    fn outlook(&self, seen: &Observation) -> Outlook {
        let elapsed = seen.elapsed.as_secs_f64();
        let (total, left) = (seen.total.0 as f64, seen.remaining.0 as f64);
        let done = (total - left).max(0.0);
        let first = seen.round <= 1;
        let not_zero = (seen.sent.0 as f64 / done.max(1.0)).clamp(0.0, 1.0);
        Outlook {
            elapsed,
            left: if first && done > 0.0 && seen.sent.0 > 0 { left * not_zero.max(0.01) } else { left },
            age: if first { elapsed } else { (elapsed - self.scanned).max(0.0) },
            first: first.then(|| First { share: done / total.max(1.0), stale: seen.stale.0 as f64 }),
            rest_of_round: (first && done > 0.0).then(|| elapsed * left / done),
            dirty: self.dirty.clone().unwrap_or_default(),
            link: self.link.range(),
            costs: seen.costs,
            round_trip: seen.round_trip.as_secs_f64(),
            means: seen.means,
            paced: self.paced.share(),
            throttled: self.throttled.share(),
            slowed: if self.paced.0 > 0 || self.throttled.0 > 0 { seen.throttle.share() } else { 0.0 },
        }
    }

    /// All ways that the limits and the engine leave.
    fn ways(&self, seen: &Observation, outlook: &Outlook) -> Vec<Way> {
        let mut ways = Vec::new();
        let is_first = seen.round <= 1;
        let leads_nowhere = self.idle_scans >= PATIENCE || self.scans >= MOST_SCANS;
        if !is_first {
            ways.push(Way::Rounds(0));
        }
        if !leads_nowhere {
            ways.extend((1..=AHEAD).map(Way::Rounds));
        }
        if seen.limits.post_copy {
            ways.push(Way::PostCopy);
            // Not one round after another.
            let has_waited = self.decided.as_ref().is_some_and(|it| it.way == Way::PostCopyAfter) && !is_first;
            if !leads_nowhere && !has_waited {
                ways.push(Way::PostCopyAfter);
            }
        }
        // The first of those that were not tried is worth its while also when rounds lead nowhere.
        let is_known = !outlook.dirty.is_unknown();
        if seen.limits.slow.0 > 0 && is_known && self.scans < MOST_SCANS {
            if seen.means.pace {
                let now = self.paced.0;
                let stricter = PACES.iter().filter(|it| now == 0 || **it < now).map(|it| Percent(*it));
                ways.extend(stricter.clone().map(Way::Pace));
                if is_first && now == 0 {
                    ways.extend(stricter.map(Way::PaceAfter));
                }
            }
            // QEMU takes a throttle up at a scan, and there is none in the first round.
            if seen.means.throttle && !is_first {
                let most = THROTTLES.iter().filter(|it| **it <= seen.limits.slow.0);
                let others = most.filter(|it| **it > self.throttled.0);
                ways.extend(others.map(|it| Way::Throttle(Percent(*it))));
            }
        }
        ways
    }

    fn choose(&mut self, seen: &Observation, scanned: bool) {
        let now = seen.elapsed.as_secs_f64();
        let limits = seen.limits;
        let too_late = limits.max_time.filter(|most| seen.elapsed >= *most);
        if self.link.is_unknown() || seen.total.0 == 0 {
            // Little was sent so far, or nothing: an engine that finds that what is left is little, or nothing, may end it.
            if self.scans > 0 {
                self.allow(limits.for_pages(&seen.costs).as_secs_f64());
            }
            return self.wait_or_end(seen, too_late, "how fast the link is, is not known");
        }
        if let Some(allowed) = too_late.filter(|_| !limits.post_copy && limits.otherwise == Otherwise::GiveUp) {
            return self.end(Action::GiveUp(Reason::OutOfTime { allowed }), format!("{now:.1} s: out of time"));
        }
        let outlook = self.outlook(seen);
        let mut choices = in_order(self.ways(seen, &outlook), seen, &outlook);
        // Nobody has seen what it writes: no reason for anything else but what time is left.
        if outlook.dirty.is_unknown() {
            let next = choices.iter().position(|it| it.way == Way::Rounds(1));
            let in_time =
                |it: &Choice| limits.max_time.is_none_or(|most| it.prediction.total.high < most.as_secs_f64());
            if let Some(next) = next.filter(|at| in_time(&choices[*at])) {
                choices.swap(0, next);
                choices[0].exceeds = 0.0;
                choices.truncate(1);
            }
        }
        let Some(mut best) = choices.first().copied() else {
            return self.without_a_way(seen, &outlook);
        };
        // What was decided before stays unless another way is clearly better.
        let before = self.decided.as_ref().map(|it| it.way).filter(|_| !scanned);
        if let Some(same) = choices.iter().find(|it| Some(it.way) == before)
            && same.exceeds <= best.exceeds
            && best.harm > same.harm * BETTER
        {
            best = *same;
        }
        if best.exceeds > 0.0 && limits.otherwise == Otherwise::GiveUp {
            if self.gives_up(seen, scanned, &best) {
                return;
            }
            // Nobody is to stand for longer than is allowed only because it is not certain yet that it cannot be otherwise.
            if best.way == Way::Rounds(0) {
                return self.wait_or_end(seen, None, "no way keeps the limits, which is not certain yet");
            }
        }
        let is_final = match best.way {
            Way::PostCopy => true,
            // Once it was slowed down, it is not let go again.
            Way::Pace(share) => self.paced.0 == 0 || share < self.paced,
            Way::Rounds(0) => best.exceeds > 0.0,
            _ => false,
        };
        if is_final && self.link.has_collapsed() && too_late.is_none() {
            return self.wait_or_end(seen, None, "the link carries much less than it did and may come back");
        }
        self.said_wait = false;
        let other = choices.iter().find(|it| std::mem::discriminant(&it.way) != std::mem::discriminant(&best.way));
        let is_new = self.decided.as_ref().is_none_or(|it| it.way != best.way);
        if scanned || is_new {
            self.say(seen, &best, other);
        }
        self.decided =
            Some(Decided { at: now, rate: seen.link_rate.0 as f64, leaves: self.leaves(seen), limits, way: best.way });
        self.enact(&best, seen, &outlook);
    }

    /// Sets the levers to what the way takes.
    fn enact(&mut self, choice: &Choice, seen: &Observation, outlook: &Outlook) {
        // The link may be slower by then than it was measured, if not by much.
        let most = seen.limits.for_pages(&seen.costs).as_secs_f64() * outlook.link.low / outlook.link.mid.max(1.0);
        let pages = choice.prediction.left.mid / outlook.link.mid.max(1.0) * SLACK;
        match choice.way {
            Way::PostCopy => {
                self.over = true;
                self.queue.push_back(Action::PostCopy);
            }
            Way::PostCopyAfter | Way::PaceAfter(_) => {}
            Way::Pace(share) => {
                if self.paced.0 == 0 || share < self.paced {
                    self.paced = share;
                    (self.idle_scans, self.least) = (0, f64::MAX);
                    self.queue.push_back(Action::Pace(share));
                }
                self.allow(pages.min(most));
            }
            Way::Throttle(share) => {
                if share > self.throttled {
                    self.throttled = share;
                    (self.idle_scans, self.least) = (0, f64::MAX);
                    self.queue.push_back(Action::Throttle(share));
                }
                self.allow(pages.min(most));
            }
            // In the first round there is nothing to switch over to.
            Way::Rounds(_) if seen.round <= 1 => {}
            Way::Rounds(0) if choice.exceeds > 0.0 => self.allow(pages),
            // It was judged by the slowest that the link may be. The engine may reckon otherwise, and have more to send by
            // the time it hears of it: what is little enough must not be sent again for that.
            Way::Rounds(0) => {
                let pages = choice.prediction.left.high / outlook.link.low.max(1.0);
                self.allow((pages * MISTAKEN).min(most.max(pages)));
            }
            Way::Rounds(_) => self.allow(pages.min(most)),
        }
    }

    fn allow(&mut self, pause: f64) {
        let pause = pause.max(LEAST_PAUSE);
        // More is never withheld: what is decided to be little enough would be sent again and again.
        if pause > self.allowed || pause < self.allowed * 0.9 {
            self.allowed = pause;
            self.queue.push_back(Action::Allow(seconds(pause)));
        }
    }

    /// Rounds lead nowhere and nothing else is allowed.
    fn without_a_way(&mut self, seen: &Observation, outlook: &Outlook) {
        let now = predict(outlook, Way::Rounds(0), &seen.limits);
        match seen.limits.otherwise {
            Otherwise::Finish => {
                let words = format!("{:.1} s: nothing else leads anywhere: pause, {now}", outlook.elapsed);
                self.end(Action::Pause, words);
            }
            Otherwise::GiveUp => self.give_up(seen, now.to_string()),
        }
    }

    /// No way keeps the limits and the user would rather have it stay: true once that is certain.
    fn gives_up(&mut self, seen: &Observation, scanned: bool, best: &Choice) -> bool {
        if seen.limits.post_copy && best.way == Way::PostCopy {
            return false;
        }
        if scanned && best.prediction.at_best().exceeds(&seen.limits) > 0.0 {
            self.hopeless += 1;
        }
        if self.hopeless < CERTAIN {
            return false;
        }
        self.give_up(seen, format!("{}: {}", best.way, best.prediction));
        true
    }

    fn give_up(&mut self, seen: &Observation, instead: String) {
        let dirty_rate = BytesPerSec(self.dirty.as_ref().map_or(0.0, DirtySet::rate) as u64);
        let reason = Reason::NotConverging { dirty_rate, link_rate: seen.link_rate, instead };
        let words = format!("{:.1} s: give up: {reason}", seen.elapsed.as_secs_f64());
        self.end(Action::GiveUp(reason), words);
    }

    /// The cautious way while something is not known.
    fn wait_or_end(&mut self, seen: &Observation, too_late: Option<Duration>, why: &str) {
        let now = seen.elapsed.as_secs_f64();
        if let Some(allowed) = too_late {
            return self.end(
                Action::GiveUp(Reason::OutOfTime { allowed }),
                format!("{now:.1} s: {why}, and the time allowed is over: give up"),
            );
        }
        if !std::mem::replace(&mut self.said_wait, true) {
            self.words = Some(format!("{now:.1} s: {why}: wait"));
        }
    }

    fn end(&mut self, action: Action, words: String) {
        self.over = true;
        self.words = Some(words);
        self.queue.push_back(action);
    }

    fn say(&mut self, seen: &Observation, best: &Choice, other: Option<&Choice>) {
        let mut words = format!(
            "{:.1} s, round {}: {} left, link {}, dirty {}: {}: {}",
            seen.elapsed.as_secs_f64(),
            seen.round,
            Bytes(seen.remaining.0),
            seen.link_rate,
            BytesPerSec(self.dirty.as_ref().map_or(0.0, DirtySet::rate) as u64),
            best.way,
            best.prediction
        );
        if best.exceeds > 0.0 {
            words.push_str(" (no way keeps the limits)");
        }
        if let Some(other) = other {
            let _ = write!(words, "; rather than {}: {}", other.way, other.prediction);
        }
        self.words = Some(words);
    }
}

/// In a first round that takes minutes, what is seen in its first second tells little of it, and to wait costs little
/// beside it; unless time is short.
fn is_early(seen: &Observation) -> bool {
    let takes = seen.total.time_at(seen.link_rate).unwrap_or_default();
    let evidence = takes.mul_f64(EVIDENCE);
    seen.elapsed < evidence && seen.limits.max_time.is_none_or(|most| most > takes.saturating_mul(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::tests::seen;
    use crate::{Means, Scan};

    /// A round after one of so many ms that has left so many MiB, on a link of 100 MiB/s.
    fn after(round: u32, elapsed: f64, ms: u64, left: u64) -> Observation {
        let scan = Scan { interval: Duration::from_millis(ms), left: Bytes(left << 20) };
        Observation { scan: Some(scan), means: Means { pace: true, throttle: true }, ..seen(elapsed, round, left) }
    }

    /// All it says to this, one after another.
    fn said(policy: &mut LeastHarm, seen: &Observation) -> Vec<Action> {
        std::iter::from_fn(|| Some(policy.decide(seen)).filter(|it| *it != Action::Continue)).take(5).collect()
    }

    #[test]
    fn what_fits_and_gets_less_is_not_switched_over_at_once_and_what_does_not_get_less_is() {
        let mut policy = LeastHarm::default();
        said(&mut policy, &after(2, 80.0, 80_000, 400));
        let shrinks = said(&mut policy, &after(3, 84.0, 4000, 20));
        let [Action::Allow(pause)] = shrinks[..] else { panic!("{shrinks:?}") };
        assert!(pause < Duration::from_millis(150), "20 MiB take 200 ms, and a round of those leaves less: {pause:?}");
        let mut policy = LeastHarm::default();
        for (round, elapsed) in [(2, 80.0), (3, 80.1), (4, 80.2), (5, 80.3)] {
            said(&mut policy, &after(round, elapsed, 100, 10));
        }
        assert!(policy.allowed >= 0.1, "10 MiB for ever: {policy:?}");
    }

    #[test]
    fn a_guest_faster_than_the_link_goes_by_what_is_allowed() {
        let wild = |post_copy, slow, otherwise| {
            let limits = Limits { post_copy, slow: Percent(slow), otherwise, ..Limits::default() };
            let mut policy = LeastHarm::default();
            let rounds = (2..100).map(|round| after(round, f64::from(round) * 40.0, 40_000, 4000));
            let all: Vec<Action> = rounds.flat_map(|seen| said(&mut policy, &Observation { limits, ..seen })).collect();
            (all, policy.words())
        };
        assert_eq!(wild(true, 0, Otherwise::Finish).0.last(), Some(&Action::PostCopy));
        let (paced, _) = wild(false, 100, Otherwise::Finish);
        assert!(paced.iter().any(|it| matches!(it, Action::Pace(_) | Action::Throttle(_))), "{paced:?}");
        let (finished, _) = wild(false, 0, Otherwise::Finish);
        assert!(
            matches!(finished.last(), Some(Action::Allow(pause)) if *pause > Duration::from_secs(30)),
            "{finished:?}"
        );
        let (given_up, words) = wild(false, 0, Otherwise::GiveUp);
        let Some(Action::GiveUp(reason)) = given_up.last() else { panic!("{given_up:?}") };
        assert!(reason.to_string().contains("the least that it takes: switch over"), "{reason}");
        assert!(words.is_some_and(|it| it.contains("give up")));
    }

    #[test]
    fn time_that_runs_out_brings_post_copy_or_the_end_and_a_dead_link_never_post_copy() {
        let limits = Limits { max_time: Some(Duration::from_secs(5)), ..Limits::default() };
        let first = Observation { limits, ..seen(0.5, 1, 8000) };
        assert_eq!(said(&mut LeastHarm::default(), &first), [Action::PostCopy], "80 s of sending");
        let dead = Observation { link_rate: BytesPerSec(0), ..first };
        let mut policy = LeastHarm::default();
        assert_eq!(said(&mut policy, &dead), []);
        assert!(policy.words().is_some_and(|it| it.ends_with("is not known: wait")));
        let late = Observation { elapsed: Duration::from_secs(6), ..dead };
        assert!(matches!(said(&mut policy, &late)[..], [Action::GiveUp(Reason::OutOfTime { .. })]));
        let stays = Limits { post_copy: false, otherwise: Otherwise::GiveUp, ..limits };
        let late = Observation { limits: stays, elapsed: Duration::from_secs(6), ..first };
        assert!(matches!(said(&mut LeastHarm::default(), &late)[..], [Action::GiveUp(Reason::OutOfTime { .. })]));
    }

    #[test]
    fn a_guest_of_which_nothing_was_to_be_sent_moves_though_the_link_is_not_known() {
        let mut policy = LeastHarm::default();
        let seen = Observation { link_rate: BytesPerSec(0), sent: Bytes(0), ..after(2, 0.05, 50, 0) };
        assert_eq!(said(&mut policy, &seen), [Action::Allow(Duration::from_millis(260))]);
        assert_eq!(said(&mut policy, &seen), [], "once");
    }

    #[test]
    fn while_the_link_has_just_collapsed_nothing_is_done_that_cannot_be_taken_back() {
        let mut policy = LeastHarm::default();
        for tick in 1..100 {
            policy.decide(&seen(f64::from(tick) / 10.0, 1, 8000));
        }
        let collapsed = Observation { link_rate: BytesPerSec(5 << 20), ..after(2, 10.0, 10_000, 4000) };
        let no_slowing = Observation { limits: Limits { slow: Percent(0), ..collapsed.limits }, ..collapsed };
        assert_eq!(said(&mut policy, &no_slowing), []);
        assert!(policy.words().is_some_and(|it| it.contains("may come back: wait")));
        let mut got_used_to_it = Vec::new();
        for tick in 0..400 {
            let at = 10.0 + f64::from(tick) / 10.0;
            got_used_to_it.extend(said(&mut policy, &Observation { elapsed: seconds(at), ..no_slowing }));
        }
        assert_eq!(got_used_to_it, [Action::PostCopy]);
    }

    #[test]
    fn limits_that_change_have_what_is_allowed_said_anew_and_a_lower_cap_is_no_collapse() {
        let mut policy = LeastHarm::default();
        for (round, elapsed) in [(2, 80.0), (3, 80.1), (4, 80.2), (5, 80.3)] {
            said(&mut policy, &after(round, elapsed, 100, 10));
        }
        assert!(policy.allowed >= 0.1, "{policy:?}");
        let less = Limits { downtime: Duration::from_millis(60), ..Limits::default() };
        let again = said(&mut policy, &Observation { limits: less, ..after(5, 80.4, 100, 10) });
        let allowed = again.iter().filter_map(|it| if let Action::Allow(pause) = it { Some(*pause) } else { None });
        assert!(allowed.clone().all(|pause| pause <= less.downtime), "{again:?}");
        let capped = Limits { bandwidth: Some(BytesPerSec(10 << 20)), ..less };
        let lags = Observation { limits: capped, ..after(6, 80.5, 100, 10) };
        assert_eq!(said(&mut policy, &lags), [], "it is not known yet what the link is");
        let known = Observation { elapsed: seconds(83.0), link_rate: BytesPerSec(10 << 20), ..lags };
        said(&mut policy, &known);
        assert!(policy.decided.as_ref().is_some_and(|it| it.limits == capped), "{policy:?}");
        assert!(policy.words().is_some_and(|it| !it.contains("may come back")));
    }

    #[test]
    fn each_decision_is_said_in_one_line_with_what_it_was_weighed_against() {
        let mut policy = LeastHarm::default();
        said(&mut policy, &after(2, 80.0, 80_000, 400));
        let words = policy.words().expect("it has decided");
        assert!(words.starts_with("80.0 s, round 2: 400 MiB left, link 100 MiB/s, dirty 10 MiB/s: "), "{words}");
        assert!(words.contains("downtime") && words.contains("; rather than ") && !words.contains('\n'), "{words}");
        assert_eq!(policy.words(), None, "once");
    }
}
