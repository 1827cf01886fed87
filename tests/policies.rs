//! What other managers decide, steering real migrations: `vmferry migrate --engine qemu --policy NAME`.

use vmferry_bench::Mode;

use crate::bed::{self, external, guest, options, text};
use crate::migrate::report;

#[tokio::test(flavor = "multi_thread")]
async fn plain_qemu_and_nova_move_a_guest_and_the_report_names_them() {
    let mut bed = bed::start(options(), guest(Mode::Idle)).await;
    for (policy, allowed) in [("qemu", "300 ms"), ("nova", "50 ms")] {
        let report = report(&bed, &["--engine", "qemu", "--policy", policy]).await;
        assert_eq!((report.policy.as_str(), report.engine.as_str(), report.post_copy), (policy, "qemu", false));
        let first = report.decisions.first().unwrap_or_else(|| panic!("{report:?}"));
        assert!(first.contains(&format!(": {policy}: switch over when what is left takes {allowed}")), "{first}");
        bed.assert_runs_only_on(1).await;
        bed.assert_intact(1).await;
        bed = bed::start(options(), guest(Mode::Idle)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_too_fast_is_moved_as_virsh_would_by_post_copy_after_the_first_pass() {
    let bed = bed::start(options(), guest(Mode::Write)).await;
    let more = ["--policy", "libvirt-post-copy", "--bandwidth", "60MiB/s"];
    let report = report(&bed, &more).await;
    assert!(report.post_copy && report.policy == "libvirt-post-copy", "{report:?}");
    bed.assert_runs_only_on(1).await;
    bed.assert_intact(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_cannot_decide_here_is_refused_by_name_and_nothing_is_touched() {
    let bed = bed::start(external(1, 1), guest(Mode::Write)).await;
    for (more, code, words) in [
        (&["--policy", "nova"][..], 3, "nova steers QEMU's own migration, and here the agents move the RAM"),
        (&["--policy", "nobody", "--engine", "qemu"], 3, "there are vmferry, qemu, libvirt"),
        (&["--policy", "nova", "--engine", "qemu", "--max-time", "1m"], 2, "cannot be used with"),
    ] {
        let output = bed.migrate(more).await;
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        assert!(text(&output).contains(words), "{}", text(&output));
    }
    let plan = bed.migrate(&["--policy", "nova", "--engine", "qemu", "--dry-run"]).await;
    assert!(plan.status.success() && text(&plan).contains("policy       nova"), "{}", text(&plan));
    bed.assert_never_stopped().await;
    bed.assert_runs_only_on(0).await;
}
