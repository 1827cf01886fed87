//! `vmferry migrate --record`: the same report of a real VM's migration, with what can be known without the measuring
//! guest: what the agents tell, and what the processors of this host did.

use std::time::Instant;

use vmferry_api::{MigrateRequest, MigrationEvent, PlanView, Step, VmView};

use crate::report::{MarkKind, Origin, Outcome, PageCheck, Recorder, RunReport, Settings, Summary, Versions, ms_since};
use crate::run::new_report;
use crate::run::processors::Sampler;

/// See the module's text. It begins with the wish to migrate.
pub struct LiveRecord {
    report: RunReport,
    recorder: Recorder,
    sampler: Sampler,
    ended: Instant,
}

impl LiveRecord {
    /// Of this VM, as it is before.
    pub fn begin(vm: &VmView, request: &MigrateRequest) -> Self {
        let settings = Settings {
            scenario: vm.name.clone(),
            about: "A real VM, moved by `vmferry migrate`.".into(),
            driver: "vmferry".into(),
            ram: vm.ram_bytes,
            transport: "link".into(),
            bandwidth: request.bandwidth,
            downtime_limit_ms: request.downtime_ms,
            most_time_ms: request.max_time_ms,
            ..Settings::default()
        };
        let mut report = new_report(Origin::Migrate, settings);
        if let Some(hardware) = &mut report.hardware {
            hardware.one_machine = false;
        }
        report.versions = Versions::of_source(vm);
        report.outcome = Outcome::NotCompleted { reason: "its end was not heard of here".into() };
        report.page_check = PageCheck::NotChecked { reason: "only the measuring guest can look at its pages".into() };
        let sampler = Sampler::start();
        sampler.watch(|watched| watched.qemus[0] = Some(vm.pid));
        Self { report, recorder: Recorder::begin(), sampler, ended: Instant::now() }
    }

    /// This is how it will be done.
    pub fn plan(&mut self, plan: &PlanView) {
        let settings = &mut self.report.settings;
        settings.engine.clone_from(&plan.engine);
        settings.capabilities.clone_from(&plan.capabilities);
        settings.encrypted = Some(!plan.protection.starts_with("none"));
        self.report.versions.destination_qemu = Some(plan.destination_qemu.clone());
        self.report.notes.extend(plan.notes.iter().cloned());
    }

    /// This is told now.
    pub fn event(&mut self, event: &MigrationEvent) {
        self.recorder.event(event);
        self.ended = Instant::now();
        match event {
            MigrationEvent::Note { text } => self.report.notes.push(text.clone()),
            MigrationEvent::Tuned(how) => self.report.notes.push(format!("Its limits were changed: {}.", how.text)),
            MigrationEvent::Decision { text } => self.report.decisions.push(text.clone()),
            // The agents know when the guest changed hands to within what they need to tell it.
            MigrationEvent::Step { step: Step::Commit } => self.recorder.mark(MarkKind::Left),
            MigrationEvent::Finished(theirs) => {
                self.report.outcome = Outcome::Completed;
                self.report.summary = Summary::of(theirs);
            }
            MigrationEvent::Failed(problem) => {
                self.report.outcome = Outcome::NotCompleted { reason: problem.message.clone() };
                let summary = &mut self.report.summary;
                (summary.rounds, summary.sent) = (Some(self.recorder.round()), self.recorder.sent());
            }
            _ => {}
        }
    }

    /// The report.
    pub fn finish(mut self) -> RunReport {
        let begun = self.recorder.begun();
        let end = self.recorder.ms_at(self.ended);
        self.sampler.finish(&mut self.report, |at| ms_since(begun, at), 0.0, end);
        self.recorder.finish(&mut self.report);
        self.report
    }
}
