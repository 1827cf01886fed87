//! Launches as they are planned; `tests/real_qemu.rs` starts them.

use super::*;
use crate::host::Kvm;

const RUN_DIR: &str = "/run/v,m";

fn settings(accel: Accel) -> LaunchSettings<'static> {
    LaunchSettings { name: "web1", run_dir: Path::new(RUN_DIR), accel, shared_ram: None, incoming: None }
}

fn no_kvm() -> Accel {
    Accel::Tcg { why: "there is no /dev/kvm".into() }
}

fn plan_with(line: &str, settings: &LaunchSettings<'_>) -> LaunchPlan {
    let argv: Vec<String> = format!("qemu {line}").split_whitespace().map(str::to_owned).collect();
    plan_launch(&CommandLine::parse(&argv).unwrap(), settings).unwrap()
}

fn plan(line: &str) -> LaunchPlan {
    plan_with(line, &settings(Accel::kvm()))
}

fn text(plan: &LaunchPlan) -> String {
    plan.argv.join(" ")
}

/// What stands between the binary and our own QMP, which always comes last.
fn before_qmp(plan: &LaunchPlan) -> String {
    let text = text(plan);
    let (before, after) = text.split_once(" -chardev socket,id=vmferry-qmp,").unwrap();
    assert_eq!(
        after,
        "path=/run/v,,m/qmp.sock,server=on,wait=off -mon chardev=vmferry-qmp,mode=control -pidfile /run/v,m/qemu.pid"
    );
    before.strip_prefix("qemu").unwrap().trim_start().to_owned()
}

const CONSOLE_SOCKET: &str = "path=/run/v,,m/console.sock,server=on,wait=off";

#[test]
fn a_bare_command_line_gets_what_we_need() {
    let plan = plan("-m 64");
    assert_eq!(
        before_qmp(&plan),
        format!(
            "-m 64 -accel kvm -name guest=web1 -chardev socket,id=vmferry-console,{CONSOLE_SOCKET} \
             -serial chardev:vmferry-console -display none"
        )
    );
    assert!(plan.console);
    assert_eq!(plan.notes, [""; 0]);
}

#[test]
fn what_the_user_chose_stays() {
    let line = "-accel kvm -name mine -nodefaults -vnc :7 -device virtio-net-pci -qmp unix:/x,server";
    let plan = plan(line);
    let rest = before_qmp(&plan);
    assert_eq!(rest, "-name mine -nodefaults -vnc :7 -device virtio-net-pci -qmp unix:/x,server -accel kvm");
    assert!(!plan.console, "-nodefaults gives no serial port");
}

#[test]
fn a_terminal_becomes_a_socket() {
    let socket = format!("-chardev socket,id=vmferry-console,{CONSOLE_SOCKET} -serial chardev:vmferry-console");
    for (line, expected) in [
        ("-serial stdio", socket.clone()),
        ("-serial mon:stdio", socket.clone()),
        ("-serial null -serial stdio", format!("-serial null {socket}")),
        ("-serial stdio -monitor stdio", socket.clone()),
        ("-nodefaults -serial stdio", format!("-nodefaults {socket}")),
        (
            "-chardev stdio,id=c,signal=off,mux=on,logfile=a,,b -serial chardev:c",
            format!("-chardev socket,id=c,{CONSOLE_SOCKET},mux=on,logfile=a,,b -serial chardev:c"),
        ),
        (
            "-nodefaults -chardev stdio,id=c -device virtconsole,chardev=c",
            format!("-nodefaults -chardev socket,id=c,{CONSOLE_SOCKET} -device virtconsole,chardev=c"),
        ),
    ] {
        let plan = plan(&format!("{line} -accel kvm -name a -display none"));
        assert_eq!(before_qmp(&plan), format!("{expected} -name a -display none -accel kvm"), "{line}");
        assert!(plan.console, "{line}");
        assert!(!text(&plan).contains("stdio"), "{line}");
    }
}

#[test]
fn nographic_keeps_what_it_means_to_the_guest() {
    let plan = plan("-nographic -name a");
    assert_eq!(
        before_qmp(&plan),
        format!(
            "-display none -machine graphics=off -name a -accel kvm \
             -chardev socket,id=vmferry-console,{CONSOLE_SOCKET} -serial chardev:vmferry-console"
        )
    );
}

#[test]
fn a_serial_port_that_goes_elsewhere_is_not_ours() {
    for line in ["-serial file:/log", "-serial none", "-device isa-serial,chardev=c -chardev null,id=c", "-nodefaults"]
    {
        let plan = plan(line);
        assert!(!plan.console, "{line}");
        assert!(!text(&plan).contains("console.sock"), "{line}");
    }
}

#[test]
fn what_is_dropped_or_replaced_is_told_when_it_matters() {
    let plan = plan("-daemonize -pidfile /x -monitor stdio -m 64");
    assert!(!text(&plan).contains("daemonize") && !text(&plan).contains("-monitor") && !text(&plan).contains("/x"));
    assert_eq!(plan.notes.len(), 2, "{:?}", plan.notes);
    assert!(plan.notes[0].contains("qemu.pid") && plan.notes[1].contains("-monitor stdio"), "{:?}", plan.notes);
}

#[test]
fn the_accelerator_is_the_best_of_those_that_are_wanted_and_work() {
    for (line, with_kvm, without) in [
        ("", "-accel kvm", "-accel tcg"),
        ("-accel kvm", "-accel kvm", "-accel tcg"),
        ("-enable-kvm", "-accel kvm", "-accel tcg"),
        ("-accel kvm,dirty-ring-size=4096", "-accel kvm,dirty-ring-size=4096", "-accel tcg"),
        ("-accel tcg,thread=single", "-accel tcg,thread=single", "-accel tcg,thread=single"),
        ("-accel kvm -accel tcg,thread=single", "-accel kvm", "-accel tcg,thread=single"),
        ("-M q35,accel=kvm", "-machine type=q35 -accel kvm", "-machine type=q35 -accel tcg"),
        ("-M accel=kvm:tcg", "-accel kvm", "-accel tcg"),
        ("-M q35", "-M q35 -accel kvm", "-M q35 -accel tcg"),
        ("-accel xen", "-accel xen", "-accel xen"),
        ("-accel kvm -cpu host,-avx", "-cpu host,-avx -accel kvm", "-cpu max,-avx -accel tcg"),
        ("-cpu host", "-cpu host -accel kvm", "-cpu max -accel tcg"),
        ("-cpu hostess", "-cpu hostess -accel kvm", "-cpu hostess -accel tcg"),
    ] {
        let rest = "-name a -nodefaults -display none";
        for (accel, expected) in [(Accel::kvm(), with_kvm), (no_kvm(), without)] {
            let plan = plan_with(&format!("{line} {rest}"), &settings(accel));
            let got = before_qmp(&plan).replace(rest, "");
            let got = got.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(got, expected, "{line}");
        }
    }
}

#[test]
fn kvm_that_emulates_kernels_is_for_those_who_want_nothing_else() {
    let accel = Accel::Kvm(Kvm { host_cpu: ",-arch-capabilities".into(), emulates_kernels: true });
    for (line, expected, accelerator, is_told) in [
        ("-M q35", "-M q35 -accel tcg", "tcg", true),
        ("-accel kvm:tcg", "-accel tcg", "tcg", true),
        ("-accel tcg", "-accel tcg", "tcg", false),
        ("-cpu host -accel kvm", "-cpu host,-arch-capabilities -accel kvm", "kvm", false),
        ("-enable-kvm -cpu max,-avx", "-cpu max,-avx,-arch-capabilities -accel kvm", "kvm", false),
        ("-enable-kvm -cpu qemu64", "-cpu qemu64 -accel kvm", "kvm", false),
        ("-cpu host", "-cpu max -accel tcg", "tcg", true),
    ] {
        let rest = "-name a -nodefaults -display none";
        let plan = plan_with(&format!("{line} {rest}"), &settings(accel.clone()));
        let got = before_qmp(&plan).replace(rest, "");
        let got = got.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!((got.as_str(), plan.accelerator.as_str(), !plan.notes.is_empty()), (expected, accelerator, is_told));
    }
}

#[test]
fn the_loss_of_kvm_is_told_once_and_with_its_reason() {
    for line in ["-m 64", "-enable-kvm -cpu host", "-accel kvm -accel tcg"] {
        let plan = plan_with(line, &settings(no_kvm()));
        assert_eq!(
            plan.notes,
            ["KVM does not work here (there is no /dev/kvm): running under TCG, software emulation, much slower."],
            "{line}"
        );
    }
    assert_eq!(plan_with("-accel tcg", &settings(no_kvm())).notes, [""; 0], "TCG is what was asked for");
}

#[test]
fn ram_becomes_shared_where_the_command_line_leaves_it_open() {
    let shared = LaunchSettings { shared_ram: Some(37), ..settings(Accel::kvm()) };
    let with_a_dimm = "-m 64,slots=1,maxmem=1G -object memory-backend-ram,id=m,size=64M -device pc-dimm,memdev=m";
    for line in ["-m 64", "", "-m 4G,slots=2,maxmem=8G -M q35", with_a_dimm] {
        let plan = plan_with(line, &shared);
        let size = CommandLine::parse(&plan.argv).unwrap().memory_size().unwrap();
        let wanted = format!(
            "-object memory-backend-file,id=vmferry-ram,mem-path=/proc/self/fd/37,size={size},share=on -machine memory-backend=vmferry-ram"
        );
        assert!(text(&plan).contains(&wanted), "{line}: {}", text(&plan));
        assert!(!text(&plan_with(line, &settings(Accel::kvm()))).contains("vmferry-ram"));
    }
    for line in ["-mem-path /x", "-numa node,memdev=m", "-M q35,memory-backend=m"] {
        assert!(!text(&plan_with(line, &shared)).contains("vmferry-ram"), "{line}");
    }
}

#[test]
fn a_waiting_qemu_has_the_sources_machine_and_nothing_of_its_past() {
    for (line, expected) in [
        ("-M q35", ""),
        ("-machine q35,smm=off,accel=kvm", "-machine smm=off "),
        ("", ""),
        ("-M type=pc -machine smm=off", "-machine smm=off "),
        ("-incoming tcp:0:4444 -loadvm a -S", ""),
    ] {
        let incoming = Some(Incoming { machine_type: "pc-q35-7.2".into() });
        let plan = plan_with(
            &format!("{line} -nodefaults -name a -display none"),
            &LaunchSettings { incoming, ..settings(Accel::kvm()) },
        );
        let all = text(&plan);
        assert!(all.starts_with(&format!("qemu {expected}-nodefaults")), "{line}: {all}");
        assert!(all.ends_with(" -machine type=pc-q35-7.2 -S -incoming defer"), "{line}: {all}");
        assert_eq!(all.matches("-incoming").count() + all.matches("-S").count() + all.matches("-loadvm").count(), 2);
    }
}

#[test]
fn a_waiting_qemu_goes_on_with_the_guests_logs() {
    let incoming = Some(Incoming { machine_type: "pc-q35-7.2".into() });
    let waiting = LaunchSettings { incoming, ..settings(Accel::kvm()) };
    let line = "-nodefaults -serial file:/l,1 -parallel file:/p -chardev file,id=o,path=/o,append=off -serial null";
    let planned = plan_with(line, &waiting);
    let expected = "qemu -nodefaults -chardev file,id=vmferry-log-0,path=/l,,1,append=on -serial chardev:vmferry-log-0 \
                    -chardev file,id=vmferry-log-1,path=/p,append=on -parallel chardev:vmferry-log-1 \
                    -chardev backend=file,id=o,path=/o,append=on -serial null ";
    assert!(text(&planned).starts_with(expected), "{}", text(&planned));
    let (argv, _) = without_ours(&CommandLine::parse(&planned.argv).unwrap());
    let argv = argv.join(" ");
    assert!(argv.starts_with("qemu -nodefaults -serial file:/l,1 -parallel file:/p -chardev backend=file,"), "{argv}");
    assert!(text(&plan(line)).contains("-serial file:/l,1 -parallel file:/p -chardev file,id=o,path=/o,append=off"));
}

#[test]
fn a_planned_command_line_can_be_planned_again() {
    let first = plan("-nographic -m 64 -M q35,accel=kvm");
    let again = plan_launch(&CommandLine::parse(&first.argv).unwrap(), &settings(Accel::kvm()));
    assert!(again.is_ok());
}

#[test]
fn what_a_plan_added_is_taken_out_again_and_planned_anew() {
    let taken_out = |argv: &[String]| without_ours(&CommandLine::parse(argv).unwrap());
    let shared = LaunchSettings { shared_ram: Some(37), ..settings(Accel::kvm()) };
    for line in ["-m 64 -vnc :7", "-m 64 -serial stdio", "-m 64 -chardev stdio,id=c,mux=on -serial chardev:c"] {
        let planned = plan_with(line, &shared);
        let (argv, shared_ram) = taken_out(&planned.argv);
        assert!(shared_ram);
        let again = argv.join(" ");
        assert!(
            !again.contains("vmferry-") && !again.contains("/proc/self/fd") && !again.contains("/run/v"),
            "{again}"
        );
        let elsewhere = LaunchSettings { run_dir: Path::new("/elsewhere"), ..shared.clone() };
        let planned = plan_launch(&CommandLine::parse(&argv).unwrap(), &elsewhere).unwrap();
        let text = planned.argv.join(" ");
        assert!(planned.console && text.contains("mem-path=/proc/self/fd/37,size=67108864"), "{text}");
        assert_eq!(text.matches("console.sock").count(), 1, "{text}");
    }
    let theirs = plan("-m 64").argv;
    assert!(!taken_out(&theirs).1, "its RAM was its user's to choose");
    let theirs: Vec<String> = "qemu -m 64 -pidfile p -serial stdio".split(' ').map(str::to_owned).collect();
    assert_eq!(taken_out(&theirs), (theirs, false));
}
