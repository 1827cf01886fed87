//! Migrations in which the agents move the guest's RAM.

use vmferry_bench::Mode;

use crate::bed::{self, guest};
use crate::migrate::report;

/// Migrates such a guest between two hosts with this QEMU (0 is the older one); whether it took post-copy.
async fn moves_whole(qemu: usize, mode: Mode, arguments: &[&str]) -> bool {
    let bed = bed::start(bed::external(qemu, qemu), guest(mode)).await;
    let report = report(&bed, arguments).await;
    assert_eq!(report.engine, "external", "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
    report.post_copy
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_guest_moves_without_post_copy_whatever_qemu_it_has() {
    for qemu in [0, 1] {
        assert!(!moves_whole(qemu, Mode::Idle, &[]).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_faster_than_the_link_moves_by_post_copy_whatever_qemu_it_has() {
    for qemu in [0, 1] {
        assert!(moves_whole(qemu, Mode::Write, &["--bandwidth", "60MiB/s"]).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_to_random_pages_moves_whole() {
    moves_whole(1, Mode::Random, &["--bandwidth", "80MiB/s"]).await;
}
