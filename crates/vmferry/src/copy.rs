//! `copy`: an image that no guest runs from, to another host, as its user sees it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vmferry_api::client::{Client, ClientError};
use vmferry_api::{CopyBegun, CopyEvent, CopyProgress, CopyReport, CopyRequest};

use crate::cli::CopyImageOptions;
use crate::failure::Failure;
use crate::migrate::cancel_on_interrupt;
use crate::pair::over_ssh;
use crate::vms::memory;

/// Between two lines of progress where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(1);

pub(crate) async fn run(client: &Client, options: CopyImageOptions) -> Result<(), Failure> {
    let (to, path) = split(&options.target).ok_or_else(|| Failure::BadTarget(options.target.clone()))?;
    let request = CopyRequest {
        image: std::path::absolute(&options.image).map_err(Failure::NoFolder)?,
        to: over_ssh(client, to.into()).await?,
        path: path.into(),
        bandwidth: options.bandwidth,
        verify: !options.no_verify,
        update: options.update,
    };
    let CopyBegun { id } = client.post("/v1/copies", &request).await?;
    let mut view = match (options.json, std::io::stderr().is_terminal()) {
        (true, _) => View::Json,
        (false, true) => View::Bar(bar()),
        (false, false) => View::Lines(None),
    };
    let path = format!("/v1/copies/{id}");
    let events = format!("{path}/events");
    let follow = client.follow(&events, |event: CopyEvent| {
        view.show(&event);
        match event {
            CopyEvent::Progress(_) => None,
            CopyEvent::Finished(report) => Some(Ok(report)),
            CopyEvent::Failed(problem) => Some(Err(ClientError::Problem(problem))),
        }
    });
    let report = cancel_on_interrupt(client, &path, follow).await.map_err(|failure| match failure {
        Failure::StoppedLooking | Failure::Agent(ClientError::LostSight) => Failure::LostCopy,
        other => other,
    })??;
    if !options.json {
        tell(&report);
    }
    Ok(())
}

/// HOST:PATH, where HOST may have a port, and PATH begins with a slash.
fn split(target: &str) -> Option<(&str, &str)> {
    let skipped = if target.starts_with("ssh://") { "ssh://".len() } else { 0 };
    let at = skipped + target[skipped..].find(":/")?;
    let (host, path) = (&target[..at], &target[at + 1..]);
    (at > skipped && !path.ends_with('/')).then_some((host, path))
}

fn tell(report: &CopyReport) {
    println!("{} is {} on {} now.", report.image.display(), report.path.display(), report.to);
    println!("  size         {}", memory(report.size));
    println!(
        "  sent         {}, as {} on the wire ({})",
        memory(report.sent),
        memory(report.wire_sent),
        report.protection
    );
    if report.same > 0 {
        println!("  there        {} already", memory(report.same));
    }
    println!("  total        {:.1} s", report.total_ms as f64 / 1e3);
    println!(
        "  verified     {}",
        if report.verified { "yes: BLAKE3 of what was read and of what arrived" } else { "no" }
    );
}

/// Shows a copy's events as they come.
enum View {
    /// For programs.
    Json,
    /// For a terminal.
    Bar(ProgressBar),
    /// For a log; when the last line was.
    Lines(Option<Instant>),
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("copy         [{bar:24}] {msg}").expect("the template is valid");
    ProgressBar::new(1).with_style(style.progress_chars("=> "))
}

impl View {
    fn show(&mut self, event: &CopyEvent) {
        match (self, event) {
            (Self::Json, _) => println!("{}", serde_json::to_string(event).expect("an event is plain data")),
            (Self::Bar(bar), CopyEvent::Progress(progress)) => {
                bar.set_length(progress.total.max(1));
                bar.set_position(progress.done);
                bar.set_message(figures(progress));
            }
            (Self::Bar(bar), _) => bar.finish_and_clear(),
            (Self::Lines(last), CopyEvent::Progress(progress)) => {
                if last.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
                    *last = Some(Instant::now());
                    eprintln!("copy         {}", figures(progress));
                }
            }
            (Self::Lines(_), _) => {}
        }
    }
}

fn figures(progress: &CopyProgress) -> String {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let left = progress.total.saturating_sub(progress.done);
    let eta = match left.checked_div(progress.rate) {
        Some(0) if left > 0 => "1s".into(),
        Some(seconds) => humantime::format_duration(Duration::from_secs(seconds)).to_string(),
        None => "?".into(),
    };
    format!(
        "{:.2}/{:.2} GiB  sent {}  link {}/s  ETA {eta}",
        gib(progress.done),
        gib(progress.total),
        memory(progress.sent),
        memory(progress.link_rate)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_host_and_an_absolute_path() {
        for (target, host, path) in [
            ("beta:/srv/a.raw", "beta", "/srv/a.raw"),
            ("192.0.2.1:7421:/a:/b", "192.0.2.1:7421", "/a:/b"),
            ("[fe80::1%eth0]:7:/a", "[fe80::1%eth0]:7", "/a"),
            ("ssh://root@beta:22:/a", "ssh://root@beta:22", "/a"),
        ] {
            assert_eq!(split(target), Some((host, path)));
        }
        for bad in ["beta", "beta:a.raw", ":/a", "/a", "beta:/", "beta:/a/", "ssh://beta", "ssh://:/a", ""] {
            assert_eq!(split(bad), None, "{bad}");
        }
    }

    #[test]
    fn no_time_is_promised_while_nothing_is_done() {
        let mut progress = CopyProgress { total: 4 << 30, done: 1 << 30, ..CopyProgress::default() };
        assert!(figures(&progress).ends_with("ETA ?"), "{}", figures(&progress));
        progress.rate = 128 << 20;
        assert!(figures(&progress).starts_with("1.00/4.00 GiB") && figures(&progress).ends_with("ETA 24s"));
    }
}
