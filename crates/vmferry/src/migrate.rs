//! `migrate`, `post-copy`, `cancel`, `migrations`: a migration as its user sees it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vmferry_api::client::{Client, ClientError, vm_path};
use vmferry_api::{Begun, MigrationEvent, MigrationView, PlanView, Progress, Report, Step};
use vmferry_bench::record::LiveRecord;

use crate::cli::MigrateOptions;
use crate::failure::Failure;
use crate::vms::{memory, print_json, print_table};
use crate::{predict, request};

/// Whose policy decides unless its user wants another.
const OURS: &str = "vmferry";
/// Between two lines of progress where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(1);

pub(crate) async fn run(client: &Client, options: MigrateOptions) -> Result<(), Failure> {
    let name = options.names.first().cloned().unwrap_or_default();
    let path = format!("{}/migration", vm_path(&name));
    let (file, json, verbose) = (options.record.clone(), options.json, options.verbose);
    let request = request::migration(client, options).await?;
    let mut record = match &file {
        Some(_) => Some(LiveRecord::begin(&client.get(&vm_path(&name)).await?, &request)),
        None => None,
    };
    let begun: Begun = client.post(&path, &request).await?;
    let Some(id) = begun.id else {
        if json {
            print_json(&begun.plan);
        } else {
            tell_plan(&begun.plan, verbose);
        }
        return Ok(());
    };
    let mut view: Box<dyn View> = match (json, std::io::stderr().is_terminal()) {
        (true, _) => Box::new(JsonView),
        (false, true) => Box::new(BarView::new(verbose)),
        (false, false) => Box::new(LineView::new(verbose, "")),
    };
    let events = format!("/v1/migrations/{id}/events");
    if let Some(record) = &mut record {
        record.plan(&begun.plan);
    }
    let follow = client.follow(&events, |event| {
        view.show(&event);
        if let Some(record) = &mut record {
            record.event(&event);
        }
        match event {
            MigrationEvent::Finished(report) => Some(Ok(report)),
            MigrationEvent::Failed(problem) => Some(Err(ClientError::Problem(problem))),
            _ => None,
        }
    });
    let ended = cancel_on_interrupt(client, &path, follow).await;
    if let Some((record, path)) = record.zip(file) {
        // A migration that failed is what a report is wanted of most.
        let text = record.finish().to_json();
        if let Err(source) = std::fs::write(&path, text) {
            let failure = Failure::Report { path, source };
            if let Ok(Ok(_)) = ended {
                return Err(failure);
            }
            // How it ended matters more.
            failure.tell();
        }
    }
    let report = ended??;
    if !json {
        tell_report(&report);
    }
    Ok(())
}

/// Ctrl-C asks the agent to cancel and waits for what comes of it; a second one stops waiting.
pub(crate) async fn cancel_on_interrupt<T>(
    client: &Client,
    path: &str,
    follow: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, Failure> {
    tokio::pin!(follow);
    let mut cancelling = false;
    loop {
        tokio::select! {
            done = &mut follow => return Ok(done?),
            _ = tokio::signal::ctrl_c() => {
                if std::mem::replace(&mut cancelling, true) {
                    return Err(Failure::StoppedLooking);
                }
                eprintln!("\ncancelling; once more to stop looking");
                if let Err(failure) = client.delete(path).await {
                    Failure::from(failure).tell();
                }
            }
        }
    }
}

pub(crate) async fn cancel(client: &Client, name: &str) -> Result<(), Failure> {
    let path = format!("{}/migration", vm_path(name));
    client.delete(&path).await?;
    println!("the migration of {name} was asked to stop; `vmferry migrations` tells how it ended");
    Ok(())
}

pub(crate) async fn post_copy(client: &Client, name: &str) -> Result<(), Failure> {
    client.tell(&format!("{}/migration/post-copy", vm_path(name)), &()).await?;
    println!("{name} was asked to go on at its destination; what of its memory is not there yet follows");
    Ok(())
}

pub(crate) async fn list(client: &Client, json: bool) -> Result<(), Failure> {
    let migrations: Vec<MigrationView> = client.get("/v1/migrations").await?;
    if json {
        print_json(&migrations);
        return Ok(());
    }
    let rows = migrations.into_iter().map(|it| {
        let when = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + Duration::from_secs(it.started));
        let outcome = it.outcome.unwrap_or_else(|| "under way".into());
        [when.to_string(), it.vm, it.to, it.step, outcome]
    });
    print_table(["STARTED", "VM", "TO", "STEP", "OUTCOME"], rows);
    Ok(())
}

pub(crate) fn tell_plan(plan: &PlanView, decisions: bool) {
    println!("{} can move to {}; nothing was touched.", plan.vm, plan.to);
    println!("  memory       {}, of which the guest uses {}", memory(plan.ram_bytes), memory(plan.ram_used_bytes));
    println!(
        "  first round  about {} at what the link carries; later rounds depend on how fast the guest writes",
        seconds(plan.first_round_ms as f64)
    );
    println!("  qemu         {} here, {} there", plan.source_qemu, plan.destination_qemu);
    println!("  machine      {}, {}", plan.machine, plan.accelerator);
    println!("  RAM engine   {} ({})", plan.engine, plan.capabilities.join(", "));
    if plan.policy != OURS {
        println!("  policy       {}", plan.policy);
    }
    println!("  protection   {}", plan.protection);
    if let Some(prediction) = &plan.prediction {
        predict::tell(prediction, &plan.to, decisions);
    }
    for note in &plan.notes {
        println!("  note         {note}");
    }
}

pub(crate) fn tell_report(report: &Report) {
    println!("{} runs on {} now.", report.vm, report.to);
    println!("  total        {}", seconds(report.total_ms));
    match report.predicted_downtime_ms {
        Some(predicted) => println!("  downtime     {:.0} ms ({predicted:.0} ms predicted)", report.downtime_ms),
        None => println!("  downtime     {:.0} ms", report.downtime_ms),
    }
    println!("  sent         {}", memory(report.sent));
    if let Some(foretold) = &report.foretold {
        predict::tell_foretold(foretold, &report.to);
    }
    for disk in &report.disks {
        println!("  disk         {}: {} of {}", disk.disk, memory(disk.sent), memory(disk.size));
    }
    if report.deltas > 0 {
        println!("  differences  of {} pages, which saved {}", report.deltas, memory(report.saved_by_deltas));
    }
    if report.drains > 0 {
        println!(
            "  drained      the guest's disks {} times, for {:.0} ms at most",
            report.drains, report.longest_drain_ms
        );
    }
    if let Some(faults) = report.faults.as_ref().filter(|faults| faults.count > 0) {
        println!(
            "  waited       {} times for a page, for {:.1} ms (median), {:.1} ms (p99)",
            faults.count, faults.median_ms, faults.p99_ms
        );
    }
    println!(
        "  how          {}, {} {}",
        report.method(),
        report.rounds,
        if report.rounds == 1 { "round" } else { "rounds" }
    );
    if report.policy != OURS {
        println!("  decided by   {}", report.policy);
    }
    if report.dirty_rate > 0 {
        println!("  dirty rate   {}", rate(report.dirty_rate));
    }
    for how in &report.tuned {
        println!("  changed      after {}: {}", seconds(how.elapsed_ms as f64), how.text);
    }
    if report.throttle > 1 {
        println!("  slowed       the guest, by up to {} %", report.throttle);
    }
}

fn rate(bytes_a_second: u64) -> String {
    format!("{}/s", memory(bytes_a_second))
}

fn seconds(ms: f64) -> String {
    format!("{:.1} s", ms / 1e3)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn step_in_words(step: Step) -> &'static str {
    match step {
        Step::Plan => "plan",
        Step::Prepare => "prepare",
        Step::CopyDisks => "copy disks",
        Step::CopyRam => "copy RAM",
        Step::SwitchOver => "switch over",
        Step::Commit => "commit",
        Step::PostCopy => "post-copy",
        Step::Retire => "retire",
    }
}

/// Time for what is left of this round, or of post-copy.
fn eta(progress: &Progress) -> String {
    match progress.remaining.checked_div(progress.link_rate) {
        Some(seconds) if progress.link_rate > 1 << 20 => {
            format!("{}", humantime::format_duration(Duration::from_secs(seconds)))
        }
        _ => "?".into(),
    }
}

fn figures(progress: &Progress) -> String {
    format!(
        "{:.2}/{:.2} GiB  link {}  dirty {}  round {}  ETA {}",
        gib(progress.total.saturating_sub(progress.remaining)),
        gib(progress.total),
        rate(progress.link_rate),
        rate(progress.dirty_rate),
        progress.round,
        eta(progress)
    )
}

/// Shows a migration's events as they come.
pub(crate) trait View {
    fn show(&mut self, event: &MigrationEvent);
}

/// For programs.
struct JsonView;

impl View for JsonView {
    fn show(&mut self, event: &MigrationEvent) {
        println!("{}", serde_json::to_string(event).expect("an event is plain data"));
    }
}

/// For a terminal.
struct BarView {
    bar: ProgressBar,
    /// Decisions are shown too.
    decisions: bool,
}

impl BarView {
    fn new(decisions: bool) -> Self {
        let style = ProgressStyle::with_template("{prefix:<12} [{bar:24}] {msg}").expect("the template is valid");
        Self { bar: ProgressBar::new(1).with_style(style.progress_chars("=> ")), decisions }
    }
}

impl View for BarView {
    fn show(&mut self, event: &MigrationEvent) {
        match event {
            MigrationEvent::Queued { place, text } => {
                self.bar.set_prefix("queued");
                self.bar.set_message(format!("place {place}: {text}"));
            }
            MigrationEvent::Step { step } => self.bar.set_prefix(step_in_words(*step)),
            MigrationEvent::Note { text } => self.bar.println(format!("note: {text}")),
            MigrationEvent::Decision { text } if self.decisions => self.bar.println(format!("decided: {text}")),
            MigrationEvent::Decision { .. } => {}
            MigrationEvent::Tuned(how) => self.bar.println(format!("limits: {}", how.text)),
            MigrationEvent::Progress(progress) => {
                self.bar.set_prefix(step_in_words(progress.step));
                self.bar.set_length(progress.total.max(1));
                self.bar.set_position(progress.total.saturating_sub(progress.remaining));
                self.bar.set_message(figures(progress));
            }
            MigrationEvent::Finished(_) | MigrationEvent::Failed(_) => self.bar.finish_and_clear(),
        }
    }
}

/// For a log.
pub(crate) struct LineView {
    last_line: Option<Instant>,
    /// Whose line it is, where that is not clear.
    whose: String,
    /// Decisions are shown too.
    decisions: bool,
}

impl LineView {
    pub(crate) fn new(decisions: bool, whose: &str) -> Self {
        let whose = if whose.is_empty() { String::new() } else { format!("{whose}: ") };
        Self { last_line: None, whose, decisions }
    }
}

impl View for LineView {
    fn show(&mut self, event: &MigrationEvent) {
        let whose = &self.whose;
        match event {
            MigrationEvent::Queued { place, text } => eprintln!("{whose}queued, place {place}: {text}"),
            MigrationEvent::Step { step } => eprintln!("{whose}{}", step_in_words(*step)),
            MigrationEvent::Note { text } => eprintln!("{whose}note: {text}"),
            MigrationEvent::Decision { text } if self.decisions => eprintln!("{whose}decided: {text}"),
            MigrationEvent::Tuned(how) => eprintln!("{whose}limits: {}", how.text),
            MigrationEvent::Progress(progress) => {
                // Before QEMU has counted its RAM there is nothing to tell.
                if progress.total > 0 && self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
                    self.last_line = Some(Instant::now());
                    eprintln!("{whose}{:<12} {}", step_in_words(progress.step), figures(progress));
                }
            }
            MigrationEvent::Decision { .. } | MigrationEvent::Finished(_) | MigrationEvent::Failed(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_promised_while_the_link_carries_nothing() {
        let mut progress = Progress {
            step: Step::CopyRam,
            elapsed_ms: 0,
            round: 1,
            total: 4 << 30,
            remaining: 1 << 30,
            sent: 0,
            dirty_rate: 0,
            link_rate: 0,
            throttle: 0,
        };
        assert_eq!(eta(&progress), "?");
        progress.link_rate = 128 << 20;
        assert_eq!(eta(&progress), "8s");
        assert!(figures(&progress).starts_with("3.00/4.00 GiB"), "{}", figures(&progress));
    }
}
