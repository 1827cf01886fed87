//! VMs on one host: run, list, show, console, stop, adopt, and agents that come and go.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmferry_bench::Mode;
use vmferry_bench::testbed::Testbed;

use crate::bed::{self, Bed, VM, guest, options, text};

async fn vmferry(bed: &Testbed, arguments: &[&str]) -> (Option<i32>, String) {
    let output = bed.alpha().vmferry(arguments).await.expect("vmferry runs");
    (output.status.code(), text(&output))
}

async fn busy_guest() -> Bed {
    bed::start(options(), guest(Mode::Write)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_is_listed_and_shown_with_what_the_agent_made_of_it() {
    let bed = busy_guest().await;
    let (_, list) = vmferry(&bed, &["list"]).await;
    let row = list.lines().find(|line| line.starts_with(VM)).expect("it is listed");
    assert!(row.contains("running") && row.contains("384.0 MiB") && row.contains("pc-q35-"), "{row}");
    let (_, shown) = vmferry(&bed, &["show", VM]).await;
    for word in ["running", "RAM engine", "qemu-system-x86_64 -machine q35", "console       yes"] {
        assert!(shown.contains(word), "{word:?} is not in {shown}");
    }
    let (_, json) = vmferry(&bed, &["show", VM, "--json"]).await;
    let view: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", view["pid"])).expect("its QEMU runs");
    assert!(maps.contains("vmferry-ram"), "its RAM is a shared file although only -m was given");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accelerator_that_does_not_work_is_replaced_and_said_in_one_line() {
    let bed = Testbed::start(options()).await.expect("starts");
    let run =
        ["run", VM, "--", "qemu-system-x86_64", "-machine", "q35", "-enable-kvm", "-cpu", "host", "-m", "64", "-S"];
    let (code, said) = vmferry(&bed, &run).await;
    assert_eq!(code, Some(0), "{said}");
    let accelerator = bed.alpha().show(VM).await.expect("answers").expect("is there").accelerator;
    match accelerator.as_deref() {
        Some("kvm") => assert!(!said.contains("TCG"), "{said}"),
        _ => assert_eq!(said.lines().filter(|line| line.contains("TCG")).count(), 1, "{said}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_power_button_shuts_a_guest_down_and_nothing_is_left_of_it() {
    let bed = busy_guest().await;
    let pid = bed.view(0).await.pid;
    let (code, said) = vmferry(&bed, &["stop", VM, "--timeout", "30s"]).await;
    assert_eq!(code, Some(0), "{said}\n{}", bed.logs());
    assert!(bed.alpha().show(VM).await.expect("answers").is_none());
    let process = std::path::PathBuf::from(format!("/proc/{pid}"));
    bed.eventually("its QEMU is gone", async || !process.exists()).await;
    assert!(!bed.alpha().run_dir.join("vms").join(VM).exists(), "its folder is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_ignores_its_power_button_can_be_forced() {
    let bed = Testbed::start(options()).await.expect("starts");
    let (code, said) = vmferry(&bed, &["run", VM, "--", "qemu-system-x86_64", "-machine", "q35", "-m", "64"]).await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = vmferry(&bed, &["stop", VM, "--timeout", "1s"]).await;
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("did not shut down within 1 s") && said.contains("--force"), "{said}");
    let (code, said) = vmferry(&bed, &["stop", VM, "--force"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(bed.alpha().show(VM).await.expect("answers").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_qemu_does_not_answer_is_shown_all_the_same() {
    let bed = Testbed::start(options()).await.expect("starts");
    let (code, said) = vmferry(&bed, &["run", VM, "--", "qemu-system-x86_64", "-m", "64", "-S"]).await;
    assert_eq!(code, Some(0), "{said}");
    let view = bed.alpha().show(VM).await.expect("answers").expect("is there");
    let pid = rustix::process::Pid::from_raw(view.pid as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    let begun = std::time::Instant::now();
    let (code, said) = vmferry(&bed, &["show", VM]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(begun.elapsed() < std::time::Duration::from_secs(6), "it took {:?}", begun.elapsed());
    assert!(said.contains("unknown") && said.contains("its QEMU does not answer"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_itself_off_leaves_the_list() {
    let bed = busy_guest().await;
    bed.watch.say(0, "poweroff\n").await;
    bed.eventually("it left the list", async || bed.alpha().show(VM).await.expect("answers").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_was_killed_is_shown_as_ended_and_its_name_can_be_used_again() {
    let bed = busy_guest().await;
    let view = bed.view(0).await;
    let pid = rustix::process::Pid::from_raw(view.pid as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
    bed.eventually("it is shown as ended", async || bed.view(0).await.state == "ended").await;
    let (code, said) = vmferry(&bed, &["migrate", VM, "--to", &bed.to()]).await;
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("does not run any more"), "{said}");
    let (code, said) =
        vmferry(&bed, &["run", VM, "--", "qemu-system-x86_64", "-machine", "q35", "-m", "64", "-S"]).await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = vmferry(&bed, &["stop", VM, "--force"]).await;
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn command_lines_that_cannot_run_are_refused_in_qemus_words_and_leave_nothing() {
    let bed = Testbed::start(options()).await.expect("starts");
    for (argv, words) in [
        (&["qemu-system-x86_64", "-machine", "no-such-machine"][..], "no-such-machine"),
        (&["qemu-system-x86_64", "-incoming", "tcp:0:1"], "-incoming"),
        (&["qemu-system-nonsense", "-m", "64"], "qemu-system-nonsense was not found"),
        (&["qemu-system-x86_64", "-drive", "file=/no/such/disk.raw,format=raw"], "/no/such/disk.raw"),
        (&["/bin/true"], "true"),
    ] {
        let arguments: Vec<&str> = ["run", VM, "--"].iter().chain(argv).copied().collect();
        let (code, said) = vmferry(&bed, &arguments).await;
        assert!(matches!(code, Some(1 | 3)), "{argv:?}: {code:?} {said}");
        assert!(said.contains(words), "{argv:?}: {words:?} is not in {said}");
        assert!(bed.alpha().show(VM).await.expect("answers").is_none());
    }
    for name in ["../web1", "-web1", "we b"] {
        let (code, said) = vmferry(&bed, &["run", "--", name, "qemu-system-x86_64"]).await;
        assert_ne!(code, Some(0), "{name}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_given_once() {
    let bed = busy_guest().await;
    let (code, said) = vmferry(&bed, &["run", VM, "--", "qemu-system-x86_64", "-m", "64"]).await;
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("a VM named web1 exists on alpha"), "{said}");
    bed.assert_runs_only_on(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_shows_what_was_printed_and_takes_what_is_typed() {
    let bed = busy_guest().await;
    let mut console = bed
        .alpha()
        .command(&["console", VM])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("vmferry runs");
    let (mut input, mut output) = (console.stdin.take().expect("piped"), console.stdout.take().expect("piped"));
    input.write_all(b"verify\n").await.expect("typed");
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    let answered = tokio::time::timeout(Duration::from_secs(20), async {
        while !seen.contains("\"verified\"") {
            let count = output.read(&mut buffer).await.expect("readable");
            assert!(count > 0, "it ended: {seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    });
    answered.await.expect("the guest answers");
    assert!(seen.contains("\"beat\""), "it shows what was printed");
    console.kill().await.expect("it ends");
    bed.assert_never_stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_outlives_its_agent_and_the_next_agent_finds_it_and_says_so() {
    let mut bed = busy_guest().await;
    let before = bed.view(0).await;
    bed.testbed.host_mut(0).kill_agent().await.expect("killed");
    tokio::time::sleep(Duration::from_millis(500)).await;
    bed.testbed.host_mut(0).start_agent().await.expect("starts");
    let after = bed.view(0).await;
    assert_eq!((after.pid, after.state.as_str()), (before.pid, "running"), "{}", bed.logs());
    assert!(bed.alpha().agent_log().contains("found again"), "{}", bed.logs());
    assert!(!bed.alpha().agent_log().contains('\u{1b}'), "a log in a file has no colours");
    bed.assert_runs_only_on(0).await;
    bed.assert_intact(0).await;
    // It is a VM like any other: it can be moved.
    crate::bed::assert_success(&bed.migrate(&[]).await, &bed);
    bed.assert_runs_only_on(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_left_that_was_killed_while_it_forgot_a_vm_goes_and_what_is_on_record_stays() {
    let mut bed = Testbed::start(options()).await.expect("starts");
    let (code, said) = vmferry(&bed, &["run", VM, "--", "qemu-system-x86_64", "-m", "64", "-S"]).await;
    assert_eq!(code, Some(0), "{said}");
    let vms = bed.alpha().run_dir.join("vms");
    bed.host_mut(0).kill_agent().await.expect("killed");
    // Of a QEMU that has ended, of no process, of somebody else's, of who knows which, and with a monitor that answers.
    let pids = [
        ("ended", None),
        ("killed", Some("4194304".into())),
        ("another", Some(std::process::id().to_string())),
        ("unclear", Some(String::new())),
        ("listens", None),
    ];
    for (name, pid) in pids {
        std::fs::create_dir(vms.join(name)).expect("made");
        if let Some(pid) = pid {
            std::fs::write(vms.join(name).join("qemu.pid"), pid).expect("written");
        }
    }
    let _monitor = std::os::unix::net::UnixListener::bind(vms.join("listens").join("qmp.sock")).expect("bound");
    bed.host_mut(0).start_agent().await.expect("starts");
    let mut left: Vec<_> = std::fs::read_dir(&vms).expect("it is there").flatten().map(|it| it.file_name()).collect();
    left.sort();
    assert_eq!(left, ["listens", "unclear", VM], "{}", bed.alpha().agent_log());
    assert!(bed.alpha().show(VM).await.expect("answers").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_on_the_same_folders_is_refused() {
    let bed = Testbed::start(options()).await.expect("starts");
    let config = bed.dir().join("alpha.toml").display().to_string();
    let (code, said) = vmferry(&bed, &["agent", "--config", &config]).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("another agent is running"), "{said}");
    assert!(bed.alpha().show("anything").await.expect("the first one still answers").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_when_the_agent_is_ready() {
    let dir = tempfile::tempdir().expect("a folder");
    let socket = dir.path().join("notify.sock");
    let systemd = std::os::unix::net::UnixDatagram::bind(&socket).expect("bound");
    systemd.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
    let config = dir.path().join("agent.toml");
    let folders = format!("run_dir = {:?}\nstate_dir = {:?}\n", dir.path().join("run"), dir.path().join("state"));
    std::fs::write(&config, folders).expect("written");
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_vmferry"))
        .args(["agent", "--config"])
        .arg(&config)
        .env("NOTIFY_SOCKET", &socket)
        .env("TMPDIR", dir.path())
        .spawn()
        .expect("starts");
    let mut message = [0; 256];
    let length = systemd.recv(&mut message).expect("it tells");
    assert!(String::from_utf8_lossy(&message[..length]).contains("READY=1"));
    let pid = rustix::process::Pid::from_raw(agent.id() as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("told to end");
    let length = systemd.recv(&mut message).expect("it tells");
    assert!(String::from_utf8_lossy(&message[..length]).contains("STOPPING=1"));
    assert!(agent.wait().expect("it ends").success());
    // What it had just begun to ask QEMU ends with it.
    let dir = dir.path().display().to_string();
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !vmferry_bench::testbed::processes_naming(&dir).is_empty() {
        assert!(std::time::Instant::now() < deadline, "a QEMU is left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_agent_the_command_line_says_what_to_start() {
    let bed = Testbed::start(options()).await.expect("starts");
    let (code, said) = vmferry(&bed, &["--socket", "/nowhere/agent.sock", "list"]).await;
    assert_eq!(code, Some(7), "{said}");
    assert!(said.contains("/nowhere/agent.sock") && said.contains("vmferry agent"), "{said}");
}
