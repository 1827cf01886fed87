//! Everything that depends on what QEMU really does, against every QEMU that is here: the system's and one of another
//! major version.

#[path = "real_qemu/ram.rs"]
mod ram;

use std::ffi::OsString;
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use vmferry_qemu::qmp::commands::*;
use vmferry_qemu::*;

const SOON: Duration = Duration::from_secs(10);

/// All QEMUs to test with.
fn qemus() -> Vec<PathBuf> {
    let first = find_binary("qemu-system-x86_64", &[], &path()).expect("no qemu-system-x86_64: run scripts/setup.sh");
    let second = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join("target/qemu-second/bin/qemu-system-x86_64");
    if second.exists() {
        vec![first, second.canonicalize().unwrap()]
    } else if std::env::var_os("VMFERRY_ONE_QEMU").is_some() {
        vec![first]
    } else {
        panic!("no second QEMU: run scripts/setup.sh --for-tests, or set VMFERRY_ONE_QEMU to do without");
    }
}

fn path() -> OsString {
    std::env::var_os("PATH").unwrap()
}

async fn with_each_qemu<F: Future<Output = ()>>(test: impl Fn(PathBuf) -> F) {
    for qemu in qemus() {
        eprintln!("with {}", qemu.display());
        test(qemu).await;
    }
}

fn tcg() -> Accel {
    Accel::Tcg { why: "this test does not need more".into() }
}

/// A launched QEMU that ends with the test, however that ends.
struct Vm {
    dir: TempDir,
    plan: LaunchPlan,
    launched: Launched,
}

impl Drop for Vm {
    fn drop(&mut self) {
        if is_same_process(self.launched.pid, self.launched.start_time)
            && let Some(pid) = rustix::process::Pid::from_raw(self.launched.pid as i32)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

struct Wish<'a> {
    line: &'a str,
    shared_ram: bool,
    machine: Option<&'a str>,
}

impl<'a> Wish<'a> {
    fn new(line: &'a str) -> Self {
        Self { line, shared_ram: false, machine: None }
    }
}

async fn try_start(qemu: &Path, wish: Wish<'_>) -> Result<Vm, LaunchError> {
    let dir = tempfile::tempdir().unwrap();
    let argv: Vec<String> = format!("qemu-system-x86_64 {}", wish.line).split_whitespace().map(str::to_owned).collect();
    let ram = wish.shared_ram.then(|| guest_ram().unwrap());
    let settings = LaunchSettings {
        name: "web1",
        run_dir: dir.path(),
        accel: tcg(),
        shared_ram: ram.as_ref().map(AsRawFd::as_raw_fd),
        incoming: wish.machine.map(|machine| Incoming { machine_type: machine.into() }),
    };
    let plan = plan_launch(&CommandLine::parse(&argv).unwrap(), &settings).unwrap();
    let launched = launch(qemu, &plan, ram, Path::new("/"), dir.path(), SOON).await?;
    Ok(Vm { dir, plan, launched })
}

async fn start(qemu: &Path, line: &str) -> Vm {
    try_start(qemu, Wish::new(line)).await.unwrap()
}

const SMALL: &str = "-m 16 -nodefaults -S";

async fn property(qmp: &Qmp, path: &str, property: &str) -> serde_json::Value {
    qmp.execute(QomGet { path: path.into(), property: property.into() }).await.unwrap()
}

#[tokio::test]
async fn every_command_of_ours_is_understood_and_its_answer_too() {
    with_each_qemu(|qemu| async move {
        let vm = start(&qemu, "-m 16 -nodefaults -S -smp 2 -M q35").await;
        let qmp = &vm.launched.qmp;
        assert_eq!(qmp.execute(QueryStatus {}).await.unwrap().status, RunState::Prelaunch);
        let version = qmp.execute(QueryVersion {}).await.unwrap().to_string();
        assert!(["7.", "8.", "9.", "10.", "11."].iter().any(|major| version.starts_with(major)), "{version}");
        assert!(!qmp.execute(QueryKvm {}).await.unwrap().enabled);
        assert_eq!(qmp.execute(QueryMemorySizeSummary {}).await.unwrap().base_memory, 16 << 20);
        let backends = qmp.execute(QueryMemdev {}).await.unwrap();
        assert!(backends.iter().all(|it| it.id.as_deref() != Some("vmferry-ram")), "{backends:?}");
        assert!(
            qmp.execute(QueryMachines { compat_props: None }).await.unwrap().iter().any(|machine| machine.is_default)
        );
        assert!(qmp.execute(QueryCpuDefinitions {}).await.unwrap().iter().any(|cpu| cpu.name == "qemu64"));
        assert!(qmp.execute(QueryChardev {}).await.unwrap().iter().any(|chardev| chardev.label == "vmferry-qmp"));

        let parameters = MigrationParameters {
            max_bandwidth: Some(1 << 50),
            downtime_limit: Some(123),
            max_postcopy_bandwidth: Some(0),
            multifd_channels: Some(3),
            multifd_compression: Some("none".into()),
            cpu_throttle_initial: Some(1),
            cpu_throttle_increment: Some(1),
            max_cpu_throttle: Some(99),
            throttle_trigger_threshold: Some(50),
            announce_rounds: Some(5),
            ..MigrationParameters::default()
        };
        qmp.execute(parameters.clone()).await.unwrap();
        let set = qmp.execute(QueryMigrateParameters {}).await.unwrap();
        assert_eq!((set.downtime_limit, set.max_bandwidth), (parameters.downtime_limit, parameters.max_bandwidth));
        let events = CapabilityState { capability: "events".into(), state: true };
        qmp.execute(MigrateSetCapabilities { capabilities: vec![events.clone()] }).await.unwrap();
        assert!(qmp.execute(QueryMigrateCapabilities {}).await.unwrap().contains(&events));
        assert!(qmp.execute(QueryMigrate {}).await.unwrap().status.is_none());
        qmp.execute(AnnounceSelf { initial: 50, max: 550, rounds: 1, step: 100 }).await.unwrap();
        qmp.execute(MigrateCancel {}).await.unwrap();
        // These have nothing to do here, and say so: the command and its arguments are right.
        for error in [
            qmp.execute(MigrateStartPostcopy {}).await.unwrap_err(),
            qmp.execute(MigrateIncoming { uri: "tcp:127.0.0.1:0".into() }).await.unwrap_err(),
            qmp.execute(MigrateRecover { uri: "tcp:127.0.0.1:0".into() }).await.unwrap_err(),
            qmp.execute(MigratePause {}).await.unwrap_err(),
        ] {
            let QmpError::Command { class, desc, .. } = &error else { panic!("{error}") };
            assert_eq!(class, "GenericError", "{desc}");
            assert!(!desc.contains("arameter"), "{desc}");
        }
        qmp.execute(SystemPowerdown {}).await.unwrap();
        qmp.execute(Quit {}).await.unwrap();
        tokio::time::timeout(SOON, qmp.closed()).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_schema_tells_what_a_qemu_can_do() {
    with_each_qemu(|qemu| async move {
        let vm = start(&qemu, SMALL).await;
        let features = Features::probe(&vm.launched.qmp).await.unwrap();
        assert!(features.has_command("migrate") && !features.has_command("migrate-by-pigeon"));
        assert!(features.has_argument("migrate", "uri") && features.has_argument("migrate", "resume"));
        assert!(features.has_parameter("max-bandwidth") && !features.has_parameter("max-pigeons"));
        assert!(features.has_capability("postcopy-ram") && !features.has_capability("pigeons"));
        let version = vm.launched.qmp.execute(QueryVersion {}).await.unwrap();
        // What differs between the two that are tested with.
        let is_8_2 = (version.qemu.major, version.qemu.minor) >= (8, 2);
        assert_eq!(features.has_parameter("avail-switchover-bandwidth"), is_8_2);
        assert_eq!(features.has_argument("migrate", "channels"), is_8_2);
    })
    .await;
}

#[tokio::test]
async fn events_arrive_in_order() {
    with_each_qemu(|qemu| async move {
        let vm = start(&qemu, SMALL).await;
        let qmp = &vm.launched.qmp;
        let (mut one, mut other) = (qmp.events(), qmp.events());
        qmp.execute(Cont {}).await.unwrap();
        qmp.execute(Stop {}).await.unwrap();
        for events in [&mut one, &mut other] {
            assert_eq!(events.next().await.unwrap().name, "RESUME");
            assert_eq!(events.next().await.unwrap().name, "STOP");
        }
        qmp.execute(Quit {}).await.unwrap();
        assert_eq!(one.next().await.unwrap().name, "SHUTDOWN");
        assert!(one.next().await.is_none());
    })
    .await;
}

#[tokio::test]
async fn commands_in_flight_together_get_their_own_answers() {
    with_each_qemu(|qemu| async move {
        let vm = start(&qemu, SMALL).await;
        let qmp = &vm.launched.qmp;
        let (status, version, schema, kvm, refused) = tokio::join!(
            qmp.execute(QueryStatus {}),
            qmp.execute(QueryVersion {}),
            qmp.execute(QueryQmpSchema {}),
            qmp.execute(QueryKvm {}),
            qmp.execute_raw("no-such-command", serde_json::json!({ "a": 1 })),
        );
        assert!(!status.unwrap().running);
        assert!(version.unwrap().qemu.major >= 7);
        assert!(schema.unwrap().len() > 500);
        assert!(!kvm.unwrap().enabled);
        assert!(matches!(refused.unwrap_err(), QmpError::Command { class, .. } if class == "CommandNotFound"));
    })
    .await;
}

#[tokio::test]
async fn descriptors_go_with_their_command() {
    with_each_qemu(|qemu| async move {
        let vm = start(&qemu, SMALL).await;
        let qmp = &vm.launched.qmp;
        let file = tempfile::tempfile().unwrap();
        qmp.execute_with_fds(Getfd { fdname: "ours".into() }, &[file.as_fd()]).await.unwrap();
        qmp.execute(Closefd { fdname: "ours".into() }).await.unwrap();
        let error = qmp.execute(Closefd { fdname: "ours".into() }).await.unwrap_err();
        assert!(matches!(error, QmpError::Command { .. }), "closed once, it is gone: {error}");

        let add = AddFd { fdset_id: None, opaque: Some("a word".into()) };
        let added = qmp.execute_with_fds(add, &[file.as_fd()]).await.unwrap();
        let theirs = std::fs::read_link(format!("/proc/{}/fd/{}", vm.launched.pid, added.fd)).unwrap();
        let ours = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
        assert_eq!(theirs, ours, "it is the same file");
        qmp.execute(RemoveFd { fdset_id: added.fdset_id, fd: Some(added.fd) }).await.unwrap();

        let error = qmp.execute(Getfd { fdname: "none".into() }).await.unwrap_err();
        assert!(error.to_string().contains("getfd"), "{error}");
        let many = vec![file.as_fd(); 17];
        let error = qmp.execute_with_fds(Getfd { fdname: "many".into() }, &many).await.unwrap_err();
        assert!(matches!(error, QmpError::Unsendable { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_launched_qemu_stands_on_its_own() {
    with_each_qemu(|qemu| async move {
        // A descriptor that anything we start would inherit.
        let leak = tempfile::tempfile().unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let vm = start(&qemu, SMALL).await;
        let Launched { pid, start_time, qmp } = &vm.launched;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        assert_eq!(fields[3], pid.to_string(), "it leads a session of its own");
        let link = |fd: &str| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(link("0"), Path::new("/dev/null"));
        for output in ["1", "2"] {
            assert_eq!(link(output), vm.dir.path().join("qemu.log"));
        }
        let ours = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&leak))).unwrap();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            assert_ne!(std::fs::read_link(entry.unwrap().path()).unwrap(), ours, "it has a descriptor of ours");
        }
        assert_eq!(process_cwd(*pid).unwrap(), Path::new("/"));
        let written = std::fs::read_to_string(vm.dir.path().join("qemu.pid")).unwrap();
        assert_eq!(written.trim(), pid.to_string());
        assert_eq!(pid_of_socket_peer(qmp), Some(*pid));
        assert!(process_command_line(*pid).ends_with(&vm.plan.argv[1..]));
        assert!(is_same_process(*pid, *start_time));

        kill_process(*pid, *start_time, SOON).await;
        assert!(!is_same_process(*pid, *start_time));
        tokio::time::timeout(SOON, qmp.closed()).await.unwrap();
        // It is waited for: no zombie stays.
        let gone = async {
            while process_start_time(*pid).is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(SOON, gone).await.expect("nobody waited for it");
    })
    .await;
}

#[test]
fn a_launched_qemu_outlives_the_runtime_that_launched_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let qemu = qemus().remove(0);
    let vm = runtime.block_on(start(&qemu, SMALL));
    drop(runtime);
    assert!(is_same_process(vm.launched.pid, vm.launched.start_time));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let qmp = Qmp::connect(&vm.dir.path().join("qmp.sock"), SOON).await.unwrap();
        assert_eq!(pid_of_socket_peer(&qmp), Some(vm.launched.pid));
        qmp.execute(Quit {}).await.unwrap();
    });
}

#[tokio::test]
async fn a_qemu_that_ends_at_once_is_reported_in_its_own_words() {
    with_each_qemu(|qemu| async move {
        for (line, words) in [
            ("-device no-such-device", "no-such-device"),
            ("-drive file=/no/such/disk.img", "/no/such/disk.img"),
            ("-no-such-option x", "-no-such-option"),
        ] {
            let error = try_start(&qemu, Wish::new(line)).await.err().unwrap();
            let LaunchError::Exited { status, .. } = &error else { panic!("{error}") };
            assert_eq!(status.code(), Some(1));
            assert!(error.to_string().contains(words), "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn old_words_in_the_log_are_not_quoted() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("qemu.log"), "old words\n").unwrap();
    std::fs::write(dir.path().join("qmp.sock"), "no socket at all").unwrap();
    let plan =
        LaunchPlan { argv: vec!["x".into(), "-bad".into()], notes: vec![], console: false, accelerator: "tcg".into() };
    let error = launch(&qemus()[0], &plan, None, Path::new("/"), dir.path(), SOON).await.unwrap_err();
    assert!(!error.to_string().contains("old words") && error.to_string().contains("-bad"), "{error}");
    assert!(std::fs::read_to_string(dir.path().join("qemu.log")).unwrap().starts_with("old words\n"));

    let error = launch(Path::new("/no/qemu"), &plan, None, Path::new("/"), dir.path(), SOON).await.unwrap_err();
    assert!(matches!(error, LaunchError::Start { .. }), "{error}");
}

/// A program that starts, stays and never answers. Its child must go with it.
fn deaf_program(dir: &Path) -> PathBuf {
    let program = dir.join("deaf");
    std::fs::write(&program, "#!/bin/sh\necho deaf and $$\nsleep 77 &\necho $! >child\nwait\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    program
}

async fn ends(pid: u32, what: &str) {
    // An orphan is waited for by whoever adopts it, and that may never be: ended is enough.
    let ended = async {
        while process_start_time(pid).is_some_and(|start| is_same_process(pid, start)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, ended).await.unwrap_or_else(|_| panic!("{what} lives on"));
}

#[tokio::test]
async fn a_qemu_that_does_not_answer_is_killed_whether_we_wait_or_not() {
    let plan = LaunchPlan { argv: vec!["deaf".into()], notes: vec![], console: false, accelerator: "tcg".into() };
    for patience in [Duration::from_millis(300), SOON] {
        let dir = tempfile::tempdir().unwrap();
        let program = deaf_program(dir.path());
        let launching = launch(&program, &plan, None, dir.path(), dir.path(), patience);
        match tokio::time::timeout(Duration::from_secs(1), launching).await {
            Ok(result) => {
                let error = result.unwrap_err();
                assert!(matches!(error, LaunchError::NotAnswering { .. }), "{error}");
                assert!(error.to_string().contains("deaf and"), "{error}");
            }
            Err(_dropped) => assert_eq!(patience, SOON),
        }
        let log = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap();
        ends(log.trim().rsplit(' ').next().unwrap().parse().unwrap(), "the program").await;
        let child = std::fs::read_to_string(dir.path().join("child")).unwrap();
        ends(child.trim().parse().unwrap(), "its child").await;
    }
}

#[tokio::test]
async fn ordinary_command_lines_start_as_planned() {
    with_each_qemu(|qemu| async move {
        for line in [
            "",
            "-M q35 -m 64 -nographic",
            "-machine pc,accel=kvm:tcg -cpu host -m 64 -serial mon:stdio -monitor stdio -daemonize",
            "-M q35 -m 64 -chardev stdio,id=c,mux=on,signal=off -serial chardev:c -mon chardev=c -display none",
            "-m 64 -nodefaults -device isa-serial,chardev=s -chardev stdio,id=s",
        ] {
            let vm = try_start(&qemu, Wish::new(&format!("{line} -S {NO_SOUND}")))
                .await
                .unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(vm.plan.console, "{line}");
            let chardevs = vm.launched.qmp.execute(QueryChardev {}).await.unwrap();
            assert!(chardevs.iter().any(|chardev| chardev.filename.contains("console.sock")), "{line}: {chardevs:?}");
            tokio::net::UnixStream::connect(vm.dir.path().join("console.sock")).await.unwrap();
            let graphics = property(&vm.launched.qmp, "/machine", "graphics").await;
            assert_eq!(graphics, !line.contains("nographic"), "{line}");
        }
    })
    .await;
}

/// QEMU looks for sound on the host otherwise, which is slow and none of our concern.
const NO_SOUND: &str = "-audiodev none,id=nosound";

#[tokio::test]
async fn shared_ram_is_ours_and_everything_else_stays() {
    with_each_qemu(|qemu| async move {
        for line in ["-m 64 -M q35,smm=off", "-m 64", "-M pc -m 32,slots=2,maxmem=128M", ""] {
            let full = format!("{line} -S {NO_SOUND}");
            let vm = try_start(&qemu, Wish { shared_ram: true, ..Wish::new(&full) }).await.unwrap();
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.launched.pid)).unwrap();
            let ram = maps.lines().find(|map| map.contains("vmferry-ram")).unwrap_or_else(|| panic!("{line}: {maps}"));
            assert!(ram.contains(" rw-s "), "{line}: {ram}");
            let qmp = &vm.launched.qmp;
            let memdev = &qmp.execute(QueryMemdev {}).await.unwrap()[0];
            assert_eq!((memdev.id.as_deref(), memdev.share), (Some("vmferry-ram"), Some(true)));
            let memory = qmp.execute(QueryMemorySizeSummary {}).await.unwrap();
            assert_eq!(memory.base_memory, memdev.size, "{line}");
            let machine = property(qmp, "/machine", "type").await;
            assert_eq!(machine.as_str().unwrap().starts_with("pc-q35"), line.contains("q35"), "{line}: {machine}");
            if line.contains("smm=off") {
                assert_eq!(property(qmp, "/machine", "smm").await, "off");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_waiting_qemu_has_exactly_the_machine_of_the_source() {
    with_each_qemu(|qemu| async move {
        for (line, machine) in [
            ("-M q35,smm=off -m 64", "pc-q35-6.2"),
            ("-m 64", "pc-i440fx-7.1"),
            ("-machine type=pc,accel=tcg -machine smm=off -m 64", "pc-i440fx-7.2"),
        ] {
            let full = format!("{line} {NO_SOUND}");
            let wish = Wish { shared_ram: true, machine: Some(machine), ..Wish::new(&full) };
            let vm = try_start(&qemu, wish).await.unwrap();
            let qmp = &vm.launched.qmp;
            assert_eq!(property(qmp, "/machine", "type").await, format!("{machine}-machine"), "{line}");
            assert_eq!(qmp.execute(QueryStatus {}).await.unwrap().status, RunState::InMigrate);
            if line.contains("smm=off") {
                assert_eq!(property(qmp, "/machine", "smm").await, "off", "{line}");
            }
            qmp.execute(MigrateIncoming { uri: "tcp:127.0.0.1:0".into() }).await.unwrap();
            let info = qmp.execute(QueryMigrate {}).await.unwrap();
            assert!(info.socket_address.unwrap()[0].tcp_port().is_some_and(|port| port > 0));
        }
    })
    .await;
}

#[tokio::test]
async fn a_guest_moves_between_any_two_qemus_of_its_machine_type() {
    let qemus = qemus();
    for (from, to) in [(&qemus[0], qemus.last().unwrap()), (qemus.last().unwrap(), &qemus[0])] {
        let line = "-M pc-q35-7.2 -m 32 -nodefaults";
        let source = try_start(from, Wish { shared_ram: true, ..Wish::new(line) }).await.unwrap();
        let machine = property(&source.launched.qmp, "/machine", "type").await;
        let machine = machine.as_str().unwrap().trim_end_matches("-machine");
        let wish = Wish { shared_ram: true, machine: Some(machine), ..Wish::new(line) };
        let destination = try_start(to, wish).await.unwrap();
        let (here, there) = (&source.launched.qmp, &destination.launched.qmp);
        let events = CapabilityState { capability: "events".into(), state: true };
        here.execute(MigrateSetCapabilities { capabilities: vec![events] }).await.unwrap();
        there.execute(MigrateIncoming { uri: "tcp:127.0.0.1:0".into() }).await.unwrap();
        let port = there.execute(QueryMigrate {}).await.unwrap().socket_address.unwrap()[0].tcp_port().unwrap();

        let mut events = here.events();
        here.execute(Migrate { uri: format!("tcp:127.0.0.1:{port}"), resume: None }).await.unwrap();
        let mut seen = Vec::new();
        let end = async {
            while let Some(event) = events.next().await {
                if let Some(status) = event.as_migration_status() {
                    seen.push(status.clone());
                    if matches!(status, MigrationStatus::Completed | MigrationStatus::Failed) {
                        return;
                    }
                }
            }
        };
        tokio::time::timeout(SOON, end).await.unwrap();
        let info = here.execute(QueryMigrate {}).await.unwrap();
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{seen:?} {:?}", info.error_desc);
        assert!(seen.contains(&MigrationStatus::Active), "{seen:?}");
        let ram = info.ram.unwrap();
        assert!(ram.transferred > 0 && ram.total >= 32 << 20 && ram.page_size == Some(4096), "{ram:?}");
        assert!(info.downtime.is_some() && info.total_time.is_some());
        there.execute(Cont {}).await.unwrap();
        assert_eq!(there.execute(QueryStatus {}).await.unwrap().status, RunState::Running);
    }
}

/// Forwards one connection to this port and keeps what it carried there.
async fn listen_in(port: u16) -> (u16, tokio::task::JoinHandle<Vec<u8>>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap().port();
    let heard = tokio::spawn(async move {
        let (mut from_source, mut to_source) = listener.accept().await.unwrap().0.into_split();
        let (mut back, mut there) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap().into_split();
        let back = tokio::spawn(async move { tokio::io::copy(&mut back, &mut to_source).await });
        let mut heard = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count) = from_source.read(&mut buffer).await
            && count > 0
        {
            heard.extend_from_slice(&buffer[..count]);
            if there.write_all(&buffer[..count]).await.is_err() {
                break;
            }
        }
        drop(there);
        back.abort();
        heard
    });
    (here, heard)
}

/// Migrates between two new QEMUs whose streams have these keys; how it ended, and what could be heard on the way.
async fn migrate_overheard(
    from: &Path,
    to: &Path,
    keys: [Option<[u8; 32]>; 2],
    priority: &str,
) -> (MigrationStatus, Vec<u8>, RunState) {
    let line = "-M pc-q35-7.2 -m 32 -nodefaults";
    let source = try_start(from, Wish::new(line)).await.unwrap();
    let destination = try_start(to, Wish { machine: Some("pc-q35-7.2"), ..Wish::new(line) }).await.unwrap();
    let (here, there) = (&source.launched.qmp, &destination.launched.qmp);
    for (vm, key, endpoint) in [(&source, keys[0], Endpoint::Client), (&destination, keys[1], Endpoint::Server)] {
        if let Some(key) = key {
            let dir = vm.dir.path().join("tls");
            // Twice: what an earlier migration left is in nobody's way.
            for _ in 0..2 {
                protect_streams(&vm.launched.qmp, &dir, &StreamKey::new(&key), endpoint, priority).await.unwrap();
            }
        }
    }
    there.execute(MigrateIncoming { uri: "tcp:127.0.0.1:0".into() }).await.unwrap();
    let port = there.execute(QueryMigrate {}).await.unwrap().socket_address.unwrap()[0].tcp_port().unwrap();
    let (port, heard) = listen_in(port).await;
    here.execute(Cont {}).await.unwrap();
    here.execute(Migrate { uri: format!("tcp:127.0.0.1:{port}"), resume: None }).await.unwrap();
    let end = async {
        loop {
            match here.execute(QueryMigrate {}).await.unwrap().status {
                Some(status @ (MigrationStatus::Completed | MigrationStatus::Failed)) => return status,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let status = tokio::time::timeout(SOON, end).await.unwrap();
    let state = here.execute(QueryStatus {}).await.unwrap().status;
    drop((source, destination));
    (status, tokio::time::timeout(SOON, heard).await.unwrap().unwrap(), state)
}

#[tokio::test]
async fn what_qemus_with_a_key_say_is_understood_by_nobody_else() {
    let is_there = |heard: &[u8], word: &str| heard.windows(word.len()).any(|it| it == word.as_bytes());
    let qemus = qemus();
    for (from, to) in [(&qemus[0], qemus.last().unwrap()), (qemus.last().unwrap(), &qemus[0])] {
        let (status, heard, _) = migrate_overheard(from, to, [None, None], "").await;
        assert_eq!(status, MigrationStatus::Completed);
        assert!(heard.starts_with(b"QEVM") && is_there(&heard, "pc.ram"), "a plain stream can be read");
        for priority in [
            "NORMAL",
            "NORMAL:-CIPHER-ALL:+AES-128-GCM",
            "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+AES-256-GCM",
            "NORMAL:-CIPHER-ALL:+CHACHA20-POLY1305",
        ] {
            let (status, heard, _) = migrate_overheard(from, to, [Some([7; 32]), Some([7; 32])], priority).await;
            assert_eq!(status, MigrationStatus::Completed, "{priority:?}");
            assert!(heard.len() > 10_000 && !is_there(&heard, "QEVM") && !is_there(&heard, "pc.ram"), "{priority:?}");
        }
        let (status, _, state) = migrate_overheard(from, to, [Some([7; 32]), Some([8; 32])], "NORMAL").await;
        assert_eq!((status, state), (MigrationStatus::Failed, RunState::Running), "with another key");
    }
}

#[tokio::test]
async fn a_qemu_that_does_not_answer_is_followed_by_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let (script, was_asked) = (dir.path().join("qemu"), dir.path().join("was-asked"));
    let real = qemus()[0].display().to_string();
    let text = format!("#!/bin/sh\n[ -e {0} ] && exec {real} \"$@\"\n: >{0}\nexec sleep 60\n", was_asked.display());
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let info = probe_qemu(&script, &tcg(), dir.path()).await.unwrap();
    assert!(was_asked.exists() && !info.machines.is_empty());
}

#[tokio::test]
async fn a_probe_tells_machines_cpus_and_means_of_migration() {
    with_each_qemu(|qemu| async move {
        let info = probe_qemu(&qemu, &tcg(), &std::env::temp_dir()).await.unwrap();
        let q35 = info.machines.iter().find(|machine| machine.alias.as_deref() == Some("q35")).unwrap();
        assert!(q35.name.starts_with("pc-q35-") && q35.cpu_max >= 255);
        assert_eq!(info.machines.iter().filter(|machine| machine.is_default).count(), 1);
        let model = |name: &str| info.cpus.iter().find(|cpu| cpu.name == name).unwrap();
        assert!(model("max").unavailable.is_empty());
        assert!(!model("host").unavailable.is_empty(), "TCG has no host model");
        assert!(info.features.has_capability("postcopy-ram") && info.features.has_parameter("downtime-limit"));
        assert!(info.tls, "Debian's QEMU has TLS");
    })
    .await;
}

#[tokio::test]
async fn a_probe_that_fails_names_the_binary_and_the_reason() {
    let error = probe_qemu(Path::new("/no/such/qemu"), &tcg(), &std::env::temp_dir()).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/qemu"), "{error}");
    let error = probe_qemu(Path::new("/bin/false"), &tcg(), &std::env::temp_dir()).await.unwrap_err();
    assert!(error.to_string().contains("/bin/false") && error.to_string().contains("exit code 1"), "{error}");
    // A QEMU that is only asked does well with a KVM in which no guest runs.
    if let Err(error) = probe_qemu(&qemus()[0], &Accel::kvm(), &std::env::temp_dir()).await {
        assert!(error.to_string().contains("/dev/kvm") || error.to_string().contains("KVM"), "{error}");
    }
}

#[tokio::test]
async fn kvm_is_only_believed_in_when_a_guest_ran_in_it() {
    with_each_qemu(|qemu| async move {
        let begun = std::time::Instant::now();
        let accel = try_kvm(&qemu).await;
        assert!(begun.elapsed() < Duration::from_secs(5));
        match accel {
            Accel::Kvm(_) => assert!(Path::new("/dev/kvm").exists()),
            Accel::Tcg { why } => assert!(!why.is_empty()),
        }
    })
    .await;
}
