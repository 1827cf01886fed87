//! The line itself: who is in it, who has begun, and who is next. Without I/O.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use vmferry_link::Fingerprint;
use vmferry_policy::BytesPerSec;
use vmferry_policy::queue::{UnderWay, Why, may_begin};

use super::entry::{Begun, Entry};

/// What the link was seen to carry longer ago than that is forgotten when it carries less.
const LATELY: Duration = Duration::from_secs(60);

/// See the module's text.
#[derive(Default)]
pub(super) struct Line {
    pub(super) waiting: Vec<Entry>,
    pub(super) begun: Vec<Begun>,
    /// VMs that are asked for just now.
    pub(super) coming: Vec<String>,
    /// The most that the link to each destination was seen to carry lately, and since when.
    carried: HashMap<Fingerprint, (BytesPerSec, Instant)>,
    /// The agent ends: nothing begins any more.
    pub(super) is_closed: bool,
}

impl Line {
    /// Nobody is in anybody's way.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.begun.is_empty()
    }

    /// Those that have ended are in nobody's way, also when nobody has noted that yet.
    pub(super) fn forget_what_is_over(&mut self) {
        self.begun.retain(|it| !it.migration.told.is_over());
    }

    pub(super) fn has(&self, vm: &str) -> bool {
        self.waiting.iter().any(|it| it.migration().vm == vm)
            || self.coming.iter().any(|it| it == vm)
            || self.begun.iter().any(|it| it.migration.vm == vm && !it.migration.told.is_over())
    }

    /// The most that the link to this destination was seen to carry lately.
    pub(super) fn carried(&self, there: Fingerprint) -> Option<BytesPerSec> {
        self.carried.get(&there).map(|(rate, _)| *rate)
    }

    /// The link to this destination was seen to carry so much.
    pub(super) fn learn(&mut self, there: Fingerprint, rate: BytesPerSec) {
        let known = self.carried.entry(there).or_insert((rate, Instant::now()));
        if rate >= known.0 || known.1.elapsed() > LATELY {
            *known = (rate, Instant::now());
        }
    }

    /// The one that is to begin now, when these guests wait for pages. Tells the others of their places.
    pub(super) fn next(&mut self, in_post_copy: &[(Fingerprint, String)]) -> Option<Entry> {
        if self.is_closed {
            return None;
        }
        self.forget_what_is_over();
        let seen: Vec<(Fingerprint, BytesPerSec)> = self
            .begun
            .iter()
            .filter_map(|it| {
                let seen = it.seen_by(None);
                Some((it.there?, seen.rate.filter(|_| !seen.is_held())?))
            })
            .collect();
        for (there, rate) in seen {
            self.learn(there, rate);
        }
        // Of each destination: how many wait there so far, and the name of the last of them.
        let mut so_far: BTreeMap<String, (u32, String)> = BTreeMap::new();
        for index in 0..self.waiting.len() {
            let Some(there) = self.waiting[index].there else { continue };
            if self.waiting[index].is_put_off() {
                continue;
            }
            let (place, before) = so_far.remove(&there.to_string()).unwrap_or_default();
            let text = match place {
                0 => match self.may_begin(index, there, in_post_copy) {
                    Ok(()) => return Some(self.waiting.remove(index)),
                    Err(text) => text,
                },
                _ => format!("behind {before}"),
            };
            let entry = &mut self.waiting[index];
            so_far.insert(there.to_string(), (place + 1, entry.migration().vm.clone()));
            entry.tell((place + 1, text));
        }
        None
    }

    /// Whether it may, or why not, in words.
    fn may_begin(
        &self,
        index: usize,
        there: Fingerprint,
        in_post_copy: &[(Fingerprint, String)],
    ) -> Result<(), String> {
        let entry = &self.waiting[index];
        if let Some((_, vm)) = in_post_copy.iter().find(|(key, _)| *key == there) {
            return Err(format!("{} ({vm})", Why::PostCopy));
        }
        // One that begins may go anywhere.
        let beside: Vec<&Begun> = self.begun.iter().filter(|it| it.there.is_none_or(|it| it == there)).collect();
        let seen: Vec<UnderWay> = beside.iter().map(|it| it.seen_by(entry.batch)).collect();
        let budget = entry.request.bandwidth.filter(|_| entry.batch.is_some()).map(BytesPerSec);
        let link = [self.carried(there), budget].into_iter().flatten().min();
        may_begin(&entry.guest, &seen, link).map_err(|why| {
            let names: Vec<&str> = beside.iter().map(|it| it.migration.vm.as_str()).collect();
            format!("{why} ({})", names.join(", "))
        })
    }

    /// Tells those that have begun with how many others they share one budget.
    pub(super) fn share(&self) {
        for it in &self.begun {
            let among = self.begun.iter().filter(|other| it.batch.is_some() && other.batch == it.batch).count();
            it.migration.shares_with(among.max(1) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::entry::PATIENCE;
    use super::*;
    use crate::journal::Instance;
    use crate::source::Seat;

    fn entry(vm: &str, to: &str) -> Entry {
        let request = serde_json::json!({
            "to": to, "downtime_ms": 300, "max_time_ms": null, "bandwidth": null, "post_copy": true
        });
        Entry {
            seat: Seat::new(vm),
            instance: Instance::now(1, 1),
            request: serde_json::from_value(request).unwrap(),
            batch: None,
            there: Some(Fingerprint::of(to.as_bytes())),
            guest: vmferry_policy::queue::Waiting::default(),
            since: 0,
            tried: None,
            told: None,
        }
    }

    fn begins(line: &mut Line, there: Option<&str>) -> Option<String> {
        let entry = line.next(&[])?;
        let there = there.map(|it| Fingerprint::of(it.as_bytes()));
        line.begun.push(Begun { migration: Arc::clone(entry.migration()), batch: None, there, cap: None });
        Some(entry.migration().vm.clone())
    }

    fn places(line: &Line) -> Vec<String> {
        line.waiting.iter().map(|it| it.view().outcome.unwrap()).collect()
    }

    #[test]
    fn those_for_one_host_wait_for_each_other_and_know_their_places_and_those_for_another_do_not() {
        let mut line = Line::default();
        line.waiting.extend([entry("a", "beta"), entry("b", "beta"), entry("c", "gamma"), entry("d", "beta")]);
        assert_eq!(begins(&mut line, Some("beta")).as_deref(), Some("a"));
        assert_eq!(begins(&mut line, Some("gamma")).as_deref(), Some("c"));
        assert_eq!(begins(&mut line, None), None);
        assert_eq!(places(&line), ["place 1: the link is taken (a)", "place 2: behind b"]);
        assert!(line.has("b") && line.has("a") && !line.has("e"));
        line.begun.retain(|it| it.migration.vm != "a");
        line.is_closed = true;
        assert_eq!(begins(&mut line, None), None, "the agent ends");
        line.is_closed = false;
        assert_eq!(begins(&mut line, Some("beta")).as_deref(), Some("b"));
        assert_eq!(begins(&mut line, None), None);
        assert_eq!(places(&line), ["place 1: the link is taken (b)"]);
    }

    #[test]
    fn beside_one_that_begins_and_may_go_anywhere_nothing_begins_and_what_is_looked_at_waits() {
        let mut line = Line::default();
        line.waiting.push(entry("a", "beta"));
        assert_eq!(begins(&mut line, None).as_deref(), Some("a"));
        line.waiting.extend([Entry { there: None, ..entry("b", "beta") }, entry("c", "gamma")]);
        assert_eq!(begins(&mut line, None), None);
        assert_eq!(places(&line), ["it is being looked at", "place 1: the link is taken (a)"]);
        line.begun.clear();
        let waits = [(Fingerprint::of(b"gamma"), "z".to_owned())];
        assert!(line.next(&waits).is_none());
        assert_eq!(places(&line)[1], "place 1: a guest waits for its pages over the same link (z)");
        assert_eq!(begins(&mut line, Some("gamma")).as_deref(), Some("c"));
        assert_eq!(begins(&mut line, None), None);
    }

    #[test]
    fn who_cannot_begin_now_is_tried_again_and_keeps_nobody_else_and_a_name_is_in_the_line_once() {
        let mut line = Line::default();
        line.waiting.extend([entry("a", "beta"), entry("b", "beta")]);
        let now = Instant::now();
        assert!(line.waiting[0].waits_on(now) && line.waiting[0].is_put_off());
        assert_eq!(begins(&mut line, Some("beta")).as_deref(), Some("b"), "others go meanwhile");
        assert!(line.has("a") && line.has("b") && !line.has("c"), "who begins is in it too");
        line.coming.push("c".into());
        assert!(line.has("c"), "and who is asked for just now");
        assert!(line.waiting[0].waits_on(now + Duration::from_secs(60)));
        assert!(!line.waiting[0].waits_on(now + PATIENCE), "not for ever");
    }
}
