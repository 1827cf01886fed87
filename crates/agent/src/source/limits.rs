//! What a user allows a migration, and changes of that while it runs: what makes no sense is refused here. Pure.

use std::time::Duration;

use bytesize::ByteSize;
use vmferry_api::{MigrateRequest, Prefer, TuneRequest};
use vmferry_policy::{BytesPerSec, Limits, Preference};

use crate::error::AgentError;

const DOWNTIME_MS: std::ops::RangeInclusive<u64> = 1..=60_000;
const LEAST_BANDWIDTH: u64 = 1 << 20;
const MAX_TIME_MS: std::ops::RangeInclusive<u64> = 1_000..=7 * 24 * 3600 * 1000;

/// As it was said, in the units of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    downtime_ms: u64,
    max_time_ms: Option<u64>,
    /// The most to send, in bytes a second.
    pub(super) bandwidth: Option<u64>,
    pub(super) post_copy: bool,
    prefer: Prefer,
}

impl Asked {
    pub(super) fn of(request: &MigrateRequest) -> Self {
        Self {
            downtime_ms: request.downtime_ms,
            max_time_ms: request.max_time_ms,
            bandwidth: request.bandwidth,
            post_copy: request.post_copy,
            prefer: request.prefer,
        }
    }

    /// For the policy; [`AgentError::BadLimit`] when they make no sense, alone or together.
    pub(super) fn limits(&self) -> Result<Limits, AgentError> {
        let bad = |message: String| Err(AgentError::BadLimit { message });
        if !DOWNTIME_MS.contains(&self.downtime_ms) {
            return bad(format!("a downtime of {} ms makes no sense: give 1 ms to 60 s", self.downtime_ms));
        }
        if let Some(max) = self.max_time_ms.filter(|max| !MAX_TIME_MS.contains(max)) {
            return bad(format!("a maximum time of {max} ms makes no sense: give 1 s to 7 days"));
        }
        if let Some(rate) = self.bandwidth.filter(|rate| *rate < LEAST_BANDWIDTH) {
            return bad(format!("a bandwidth of {rate} bytes a second makes no sense: give at least 1 MiB/s"));
        }
        if let Some(max) = self.max_time_ms.filter(|max| *max < self.downtime_ms) {
            let downtime = self.downtime_ms;
            return bad(format!(
                "a downtime of {downtime} ms contradicts a maximum time of {max} ms: the second is less"
            ));
        }
        let limits = Limits {
            downtime: Duration::from_millis(self.downtime_ms),
            max_time: self.max_time_ms.map(Duration::from_millis),
            bandwidth: self.bandwidth.map(BytesPerSec),
            prefer: match self.prefer {
                Prefer::Short => Preference::Short,
                Prefer::Gentle => Preference::Gentle,
            },
            ..Limits::default()
        };
        Ok(if self.post_copy { limits } else { limits.without_post_copy() })
    }

    /// With this change, `elapsed` after the copy began.
    pub(super) fn tuned(&self, change: &TuneRequest, elapsed: Duration) -> Result<Self, AgentError> {
        let or_none = |new: Option<u64>, old: Option<u64>| new.map_or(old, |it| Some(it).filter(|it| *it > 0));
        let tuned = Self {
            downtime_ms: change.downtime_ms.unwrap_or(self.downtime_ms),
            max_time_ms: or_none(change.max_time_ms, self.max_time_ms),
            bandwidth: or_none(change.bandwidth, self.bandwidth),
            post_copy: change.post_copy.unwrap_or(self.post_copy),
            prefer: change.prefer.unwrap_or(self.prefer),
        };
        let limits = tuned.limits()?;
        if let Some(max) = limits.max_time.filter(|max| change.max_time_ms.is_some() && *max <= elapsed) {
            let message = format!(
                "a maximum time of {} s is over: it has been copied for {:.1} s; cancel it, or have it go on by post-copy",
                max.as_secs_f64(),
                elapsed.as_secs_f64()
            );
            return Err(AgentError::BadLimit { message });
        }
        Ok(tuned)
    }

    /// What is otherwise than before, in one line.
    pub(super) fn unlike(&self, before: &Self) -> String {
        let mut all = Vec::new();
        let mut differs = |what: &str, now: String, then: String| {
            if now != then {
                all.push(format!("{what} {now} instead of {then}"));
            }
        };
        let ms = |ms: u64| format!("{ms} ms");
        let time =
            |it: &Self| it.max_time_ms.map_or_else(|| "without end".into(), |ms| format!("{} s", ms as f64 / 1e3));
        let rate = |it: &Self| {
            it.bandwidth.map_or_else(|| "as much as the link carries".into(), |rate| format!("{}/s", ByteSize(rate)))
        };
        let post_copy = |it: &Self| if it.post_copy { "allowed" } else { "forbidden" }.to_owned();
        let prefer = |it: &Self| if it.prefer == Prefer::Short { "short" } else { "gentle" }.to_owned();
        differs("downtime", ms(self.downtime_ms), ms(before.downtime_ms));
        differs("maximum time", time(self), time(before));
        differs("bandwidth", rate(self), rate(before));
        differs("post-copy", post_copy(self), post_copy(before));
        differs("preferred", prefer(self), prefer(before));
        all.join(", ")
    }

    /// This change is about more than how much is sent, and how.
    pub(super) fn is_of_decisions(change: &TuneRequest) -> bool {
        change.downtime_ms.is_some() || change.max_time_ms.is_some() || change.prefer.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_policy::Otherwise;

    const ASKED: Asked = Asked {
        downtime_ms: 300,
        max_time_ms: None,
        bandwidth: Some(40 << 20),
        post_copy: true,
        prefer: Prefer::Short,
    };

    #[test]
    fn limits_that_make_no_sense_alone_or_together_are_refused_by_name() {
        for (asked, words) in [
            (Asked { downtime_ms: 0, ..ASKED }, "a downtime of 0 ms"),
            (Asked { max_time_ms: Some(10), ..ASKED }, "a maximum time of 10 ms"),
            (Asked { bandwidth: Some(5), ..ASKED }, "a bandwidth of 5 bytes"),
            (
                Asked { downtime_ms: 5000, max_time_ms: Some(2000), ..ASKED },
                "a downtime of 5000 ms contradicts a maximum time of 2000 ms",
            ),
        ] {
            let refused = asked.limits().unwrap_err().to_string();
            assert!(refused.starts_with(words), "{refused}");
        }
        assert!(ASKED.limits().unwrap().post_copy);
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name_lifts_what_is_zero_and_is_told_in_one_line() {
        let soon = Duration::from_secs(3);
        let change = TuneRequest { bandwidth: Some(0), downtime_ms: Some(50), ..TuneRequest::default() };
        let tuned = ASKED.tuned(&change, soon).unwrap();
        assert_eq!(tuned, Asked { downtime_ms: 50, bandwidth: None, ..ASKED });
        let words = "downtime 50 ms instead of 300 ms, bandwidth as much as the link carries instead of 40.0 MiB/s";
        assert_eq!(tuned.unlike(&ASKED), words);
        let change = TuneRequest { post_copy: Some(false), max_time_ms: Some(9000), ..TuneRequest::default() };
        let tuned = tuned.tuned(&change, soon).unwrap();
        assert_eq!(tuned.limits().unwrap().otherwise, Otherwise::GiveUp, "as when it is said at the beginning");
        assert_eq!(tuned.unlike(&tuned), "");
        let lifted = tuned.tuned(&TuneRequest { max_time_ms: Some(0), ..TuneRequest::default() }, soon).unwrap();
        assert_eq!(lifted.limits().unwrap().max_time, None);
    }

    #[test]
    fn a_time_that_is_over_cannot_be_set_but_one_that_was_set_before_does_not_hinder_another_change() {
        let late = Duration::from_secs(20);
        let change = TuneRequest { max_time_ms: Some(5000), ..TuneRequest::default() };
        let refused = ASKED.tuned(&change, late).unwrap_err().to_string();
        assert!(refused.starts_with("a maximum time of 5 s is over: it has been copied for 20.0 s"), "{refused}");
        let before = Asked { max_time_ms: Some(5000), ..ASKED };
        assert!(before.tuned(&TuneRequest { downtime_ms: Some(9), ..TuneRequest::default() }, late).is_ok());
    }
}
