//! Limits that are changed while a migration runs: `vmferry tune`.

use std::process::Output;
use std::time::{Duration, Instant};

use vmferry_api::{MigrationEvent, Report};
use vmferry_bench::Mode;
use vmferry_bench::testbed::TestbedOptions;

use crate::bed::{self, Bed, VM, external, guest, options, text};

async fn tune(bed: &Bed, more: &[&str]) -> Output {
    let arguments: Vec<&str> = ["tune", VM].iter().chain(more).copied().collect();
    bed.alpha().vmferry(&arguments).await.expect("vmferry runs")
}

/// What the last migration told at its end, asked of the agent.
async fn last_report(bed: &Bed) -> Report {
    let client = bed.alpha().client().expect("a client");
    let all: Vec<vmferry_api::MigrationView> = client.get("/v1/migrations").await.expect("it answers");
    let path = format!("/v1/migrations/{}/events", all.first().expect("there is one").id);
    let ended = client.follow(&path, |event| match event {
        MigrationEvent::Finished(report) => Some(*report),
        MigrationEvent::Failed(problem) => panic!("{problem:?}"),
        _ => None,
    });
    ended.await.expect("it is told")
}

/// A migration that would take a quarter of a minute is let go in its middle, and must keep to a shorter downtime.
async fn goes_faster_when_it_is_let(options: TestbedOptions) {
    let bed = bed::start(options, guest(Mode::Idle)).await;
    let refused = tune(&bed, &["--bandwidth", "none"]).await;
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
    assert!(text(&refused).contains("is not being migrated"), "{}", text(&refused));

    let copies = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.sent > 4 << 20);
    let mut migrate = bed.begin_migration(&["--bandwidth", "10MiB/s"], copies).await;
    let begun = Instant::now();
    for (bad, words) in [
        (&["--downtime", "5m"][..], "a downtime of 300000 ms makes no sense"),
        (&["--downtime", "5s", "--max-time", "2s"], "contradicts a maximum time of 2000 ms"),
    ] {
        let refused = tune(&bed, bad).await;
        assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
        assert!(text(&refused).contains(words), "{}", text(&refused));
    }
    let nothing = tune(&bed, &[]).await;
    assert_eq!(nothing.status.code(), Some(2), "{}", text(&nothing));

    let tuned = tune(&bed, &["--bandwidth", "none", "--downtime", "200ms"]).await;
    assert!(tuned.status.success(), "{}\n{}", text(&tuned), bed.logs());
    let words = "downtime 200 ms instead of 300 ms, bandwidth as much as the link carries instead of 10.0 MiB/s";
    assert!(text(&tuned).contains(words), "{}", text(&tuned));
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(0), "{}", bed.logs());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}: 128 MiB take 13 s at 10 MiB/s", begun.elapsed());
    let report = last_report(&bed).await;
    assert_eq!(report.tuned.len(), 1, "{:?}", report.tuned);
    assert_eq!(report.tuned[0].text, words);
    let late = tune(&bed, &["--downtime", "100ms"]).await;
    assert_eq!(late.status.code(), Some(3), "{}", text(&late));
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_by_the_agents_goes_faster_when_its_user_lets_it() {
    goes_faster_when_it_is_let(external(1, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_by_qemu_goes_faster_when_its_user_lets_it() {
    goes_faster_when_it_is_let(options()).await;
}

/// A guest that would go by post-copy is held back from it in time, and its user hears that it cannot be had again where
/// that is so.
#[tokio::test(flavor = "multi_thread")]
async fn post_copy_that_is_forbidden_in_the_middle_is_not_used() {
    let bed = bed::start(external(1, 1), guest(Mode::Write)).await;
    let begins = |event: &MigrationEvent| matches!(event, MigrationEvent::Progress(it) if it.sent > 1 << 20);
    let mut migrate = bed.begin_migration(&["--bandwidth", "40MiB/s"], begins).await;
    let tuned = tune(&bed, &["--no-post-copy"]).await;
    assert!(tuned.status.success(), "{}\n{}", text(&tuned), bed.logs());
    let refused = bed.alpha().vmferry(&["post-copy", VM]).await.expect("vmferry runs");
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(0), "{}", bed.logs());
    let report = last_report(&bed).await;
    assert!(!report.post_copy, "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_that_was_not_set_up_for_post_copy_cannot_be_allowed_it_later() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let mut migrate = bed.begin_slow_migration_with(&["--no-post-copy"]).await;
    let refused = tune(&bed, &["--post-copy"]).await;
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
    assert!(text(&refused).contains("QEMU was not set up for it"), "{}", text(&refused));
    // A time that is over, and one that it cannot keep.
    let tuned = tune(&bed, &["--max-time", "1h", "--downtime", "2s"]).await;
    assert!(tuned.status.success(), "{}", text(&tuned));
    let cancelled = bed.alpha().vmferry(&["cancel", VM]).await.expect("vmferry runs");
    assert!(cancelled.status.success(), "{}", text(&cancelled));
    assert_eq!(migrate.wait().await.expect("it ends").code(), Some(130), "{}", bed.logs());
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
}
