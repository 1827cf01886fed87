//! Takes down what a migration tells while it runs, and makes rounds and samples of it.

use std::time::Instant;

use vmferry_api::{MigrationEvent, Report, Step, VmView};

use super::{MarkKind, ProgressSample, Round, RunReport, Summary, Versions};

/// Samples are kept this far apart, in ms, but for the first of a round.
const APART_MS: f64 = 90.0;

/// See the module's text.
#[derive(Debug)]
pub struct Recorder {
    begun: Instant,
    progress: Vec<ProgressSample>,
    marks: Vec<(MarkKind, f64)>,
}

impl Recorder {
    /// Of a migration that begins now.
    pub fn begin() -> Self {
        Self { begun: Instant::now(), progress: Vec::new(), marks: Vec::new() }
    }

    /// When it began.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// A moment, in ms since it began.
    pub fn ms_at(&self, at: Instant) -> f64 {
        ms_since(self.begun, at)
    }

    /// Something happens now.
    pub fn mark(&mut self, what: MarkKind) {
        let now = self.ms_at(Instant::now());
        if !self.marks.iter().any(|(known, _)| *known == what) {
            self.marks.push((what, now));
        }
    }

    /// It is so far now; the sample's own time is set here.
    pub fn progress(&mut self, mut sample: ProgressSample) {
        sample.at_ms = self.ms_at(Instant::now());
        let is_new = |last: &ProgressSample| sample.round != last.round || sample.at_ms - last.at_ms >= APART_MS;
        if self.progress.last().is_none_or(is_new) {
            self.progress.push(sample);
        }
    }

    /// An agent tells this now.
    pub fn event(&mut self, event: &MigrationEvent) {
        match event {
            MigrationEvent::Step { step: Step::CopyRam } => self.mark(MarkKind::Copy),
            MigrationEvent::Step { step: Step::PostCopy } => self.mark(MarkKind::PostCopy),
            MigrationEvent::Progress(it) if it.total > 0 => self.progress(ProgressSample {
                at_ms: 0.0,
                round: it.round,
                remaining: it.remaining,
                sent: it.sent,
                dirty_rate: it.dirty_rate,
                link_rate: it.link_rate,
                throttle: it.throttle,
            }),
            MigrationEvent::Finished(_) | MigrationEvent::Failed(_) => self.mark(MarkKind::End),
            _ => {}
        }
    }

    /// The highest round that was seen.
    pub fn round(&self) -> u32 {
        self.progress.iter().map(|it| it.round).max().unwrap_or(0)
    }

    /// What was sent, as far as it was seen, in bytes.
    pub fn sent(&self) -> Option<u64> {
        self.progress.iter().map(|it| it.sent).max()
    }

    /// The most that the guest was slowed down, in percent.
    pub fn throttle(&self) -> u8 {
        self.progress.iter().map(|it| it.throttle).max().unwrap_or(0)
    }

    /// Puts all of it into the report.
    pub fn finish(self, report: &mut RunReport) {
        for (what, at_ms) in &self.marks {
            report.add_mark(*what, *at_ms);
        }
        let ends = [MarkKind::PostCopy, MarkKind::Left, MarkKind::Cancelled, MarkKind::End];
        let end = ends.iter().filter_map(|it| report.mark(*it)).reduce(f64::min);
        report.rounds = rounds(&self.progress, end);
        report.samples.progress = self.progress;
    }
}

impl Summary {
    /// What an agent's own report says, in the words of this one.
    pub fn of(theirs: &Report) -> Self {
        let beside = [Step::Plan, Step::Prepare, Step::Retire];
        let ram_ms: f64 = theirs.steps.iter().filter(|it| !beside.contains(&it.step)).map(|it| it.ms).sum();
        Self {
            total_ms: Some(theirs.total_ms),
            ram_ms: Some(ram_ms),
            downtime_told_ms: Some(theirs.downtime_ms),
            sent: Some(theirs.sent),
            rounds: Some(theirs.rounds),
            post_copy: Some(theirs.post_copy),
            throttle: Some(theirs.throttle),
            ..Self::default()
        }
    }
}

impl Versions {
    /// Of a VM before it is moved; the destination's QEMU is not known yet.
    pub fn of_source(vm: &VmView) -> Self {
        Self {
            source_qemu: vm.qemu_version.clone(),
            destination_qemu: None,
            accelerator: vm.accelerator.clone(),
            machine: vm.machine.clone(),
        }
    }
}

/// From one moment to another, in ms; negative when the other one lies before.
pub(crate) fn ms_since(begun: Instant, at: Instant) -> f64 {
    match at.checked_duration_since(begun) {
        Some(since) => since.as_secs_f64() * 1e3,
        None => -((begun - at).as_secs_f64() * 1e3),
    }
}

/// A round is what lies between its first sample and that of the next one, or the end of pre-copy.
fn rounds(progress: &[ProgressSample], end: Option<f64>) -> Vec<Round> {
    let before_the_end: Vec<&ProgressSample> =
        progress.iter().filter(|it| it.round > 0 && end.is_none_or(|end| it.at_ms <= end)).collect();
    let of_a_round: Vec<&[&ProgressSample]> = before_the_end.chunk_by(|a, b| a.round == b.round).collect();
    let mut rounds = Vec::new();
    for (index, samples) in of_a_round.iter().enumerate() {
        let first = samples[0];
        let next = of_a_round.get(index + 1).map(|next| next[0]);
        let last = next.unwrap_or(samples[samples.len() - 1]);
        let until = next.map(|it| it.at_ms).or(end).unwrap_or(last.at_ms);
        let seconds = (last.at_ms - first.at_ms) / 1e3;
        rounds.push(Round {
            round: first.round,
            at_ms: first.at_ms,
            ms: until - first.at_ms,
            remaining: first.remaining,
            dirty_rate: first.dirty_rate,
            link_rate: if seconds > 0.0 { (last.sent.saturating_sub(first.sent) as f64 / seconds) as u64 } else { 0 },
            throttle: samples.iter().map(|it| it.throttle).max().unwrap_or(0),
        });
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: f64, round: u32, remaining: u64, sent: u64) -> ProgressSample {
        ProgressSample { at_ms, round, remaining, sent, throttle: round as u8, ..ProgressSample::default() }
    }

    #[test]
    fn rounds_are_what_lies_between_the_first_samples_of_each() {
        let seen = [
            sample(0.0, 1, 1000, 0),
            sample(500.0, 1, 500, 500),
            sample(1000.0, 2, 400, 1000),
            sample(1500.0, 2, 100, 1300),
            sample(1700.0, 2, 0, 1400),
        ];
        let rounds = rounds(&seen, Some(1600.0));
        assert_eq!(rounds.len(), 2);
        assert_eq!((rounds[0].ms, rounds[0].remaining, rounds[0].link_rate), (1000.0, 1000, 1000));
        assert_eq!((rounds[1].ms, rounds[1].remaining, rounds[1].link_rate), (600.0, 400, 600));
        assert!(super::rounds(&[], None).is_empty());
    }

    #[test]
    fn of_many_samples_some_are_kept_and_the_first_of_each_round() {
        let mut recorder = Recorder::begin();
        for round in [1, 1, 1, 1, 2, 2, 3] {
            recorder.progress(sample(0.0, round, 0, 0));
        }
        assert_eq!(recorder.round(), 3);
        assert!(recorder.progress.len() < 7 && recorder.progress.len() >= 3);
    }

    #[test]
    fn a_moment_before_the_beginning_is_negative() {
        let recorder = Recorder::begin();
        let before = recorder.begun().checked_sub(std::time::Duration::from_millis(5)).unwrap();
        assert!((recorder.ms_at(before) + 5.0).abs() < 1e-6);
    }
}
