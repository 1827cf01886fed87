//! `run`, `adopt`, `list`, `show`, `start`, `stop`, `pause`, `resume`, `autostart`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use vmferry_api::client::{Client, vm_path};
use vmferry_api::{AdoptRequest, Autostart, RunRequest, StartRequest, Started, StopRequest, VmView};

use crate::failure::Failure;

pub(crate) async fn run(client: &Client, name: String, autostart: bool, argv: Vec<String>) -> Result<(), Failure> {
    let cwd = std::env::current_dir().map_err(Failure::NoFolder)?;
    let request = RunRequest { name, argv, cwd, measuring: false, autostart };
    let started: Started = client.post("/v1/vms", &request).await?;
    tell_started(&started);
    Ok(())
}

pub(crate) async fn adopt(client: &Client, name: String, qmp: PathBuf) -> Result<(), Failure> {
    let qmp = std::path::absolute(qmp).map_err(Failure::NoFolder)?;
    let started: Started = client.post("/v1/adopt", &AdoptRequest { name, qmp }).await?;
    tell_started(&started);
    Ok(())
}

fn tell_started(started: &Started) {
    for note in &started.notes {
        eprintln!("note: {note}");
    }
    println!("{} is {} (pid {})", started.vm.name, started.vm.state, started.vm.pid);
}

pub(crate) async fn list(client: &Client, json: bool) -> Result<(), Failure> {
    let vms: Vec<VmView> = client.get("/v1/vms").await?;
    if json {
        print_json(&vms);
        return Ok(());
    }
    let cells = |vm: &VmView| {
        let machine = vm.machine.clone().unwrap_or_default();
        let accelerator = vm.accelerator.clone().unwrap_or_default();
        [vm.name.clone(), vm.state.clone(), memory(vm.ram_bytes), process(vm), machine, accelerator]
    };
    let head = ["NAME", "STATE", "MEMORY", "PID", "MACHINE", "ACCEL"];
    if vms.iter().all(|vm| vm.manager.is_none()) {
        print_table(head, vms.iter().map(cells));
        return Ok(());
    }
    // Whose each is matters only where some are not vmferry's.
    let [name, state, ram, pid, machine, accel] = head;
    let rows = vms.iter().map(|vm| {
        let [name, state, ram, pid, machine, accel] = cells(vm);
        [name, state, ram, pid, machine, accel, vm.manager.clone().unwrap_or_else(|| "vmferry".into())]
    });
    print_table([name, state, ram, pid, machine, accel, "MANAGER"], rows);
    Ok(())
}

/// The process of its QEMU, if it has one.
fn process(vm: &VmView) -> String {
    if vm.pid == 0 { "-".into() } else { vm.pid.to_string() }
}

pub(crate) async fn show(client: &Client, name: &str, json: bool) -> Result<(), Failure> {
    let vm: VmView = client.get(&vm_path(name)).await?;
    if json {
        print_json(&vm);
        return Ok(());
    }
    let yes_no = |it: bool| if it { "yes" } else { "no" }.to_owned();
    let state = match &vm.detail {
        Some(detail) => format!("{} ({detail})", vm.state),
        None => vm.state.clone(),
    };
    let engine = match &vm.external_obstacle {
        _ if vm.engine.is_empty() => "-".into(),
        _ if vm.manager.is_some() => format!("{} moves it itself, steered by vmferry", vm.engine),
        Some(why) => format!("{} (external cannot be used: {why})", vm.engine),
        None => format!("{} (external can be used)", vm.engine),
    };
    let ours = vm.manager.is_none();
    let rows = [
        ("name", Some(vm.name.clone())),
        ("state", Some(state)),
        ("migration", vm.migration.map(|id| id.to_string())),
        ("memory", Some(memory(vm.ram_bytes))),
        ("manager", vm.manager.clone()),
        ("pid", Some(process(&vm))),
        ("qemu", vm.qemu_version.clone()),
        ("machine", vm.machine.clone()),
        ("accelerator", vm.accelerator.clone()),
        ("RAM engine", Some(engine)),
        ("console", ours.then(|| yes_no(vm.console))),
        ("adopted", ours.then(|| yes_no(vm.adopted))),
        ("autostart", ours.then(|| yes_no(vm.autostart))),
        ("command line", ours.then(|| vm.argv.join(" "))),
    ];
    let changes = vm.changes.iter().map(|change| ("changed", Some(change.clone())));
    for (key, value) in rows.into_iter().chain(changes) {
        if let Some(value) = value {
            println!("{key:<13} {value}");
        }
    }
    Ok(())
}

pub(crate) async fn stop(
    client: &Client,
    name: &str,
    force: bool,
    keep: bool,
    timeout: Duration,
) -> Result<(), Failure> {
    let request = StopRequest { force, keep, timeout_ms: timeout.as_millis() as u64 };
    client.tell(&format!("{}/stop", vm_path(name)), &request).await?;
    println!("{name} is stopped");
    Ok(())
}

pub(crate) async fn start(client: &Client, name: &str, undisputed: bool) -> Result<(), Failure> {
    let request = StartRequest { undisputed };
    let started: Started = client.post(&format!("{}/start", vm_path(name)), &request).await?;
    tell_started(&started);
    Ok(())
}

pub(crate) async fn pause(client: &Client, name: &str) -> Result<(), Failure> {
    client.tell(&format!("{}/pause", vm_path(name)), &()).await?;
    println!("{name} is paused");
    Ok(())
}

pub(crate) async fn resume(client: &Client, name: &str) -> Result<(), Failure> {
    client.tell(&format!("{}/resume", vm_path(name)), &()).await?;
    println!("{name} goes on");
    Ok(())
}

pub(crate) async fn autostart(client: &Client, name: &str, on: bool) -> Result<(), Failure> {
    client.put(&format!("{}/autostart", vm_path(name)), &Autostart { on }).await?;
    println!("{name} is {} when this host is", if on { "started" } else { "not started" });
    Ok(())
}

/// Where disks are to be, by their names; each of them once.
pub(crate) fn places(disks: Vec<(String, PathBuf)>) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let mut places = BTreeMap::new();
    for (name, path) in disks {
        if places.insert(name.clone(), path).is_some() {
            return Err(Failure::TwoPlaces(name));
        }
    }
    Ok(places)
}

/// Bytes as people say them.
pub(crate) fn memory(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

pub(crate) fn print_json<T: serde::Serialize>(value: &T) {
    println!("{}", serde_json::to_string_pretty(value).expect("the API's types are plain data"));
}

/// Columns as wide as they need to be.
pub(crate) fn print_table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) {
    let rows: Vec<[String; N]> = rows.collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).chain([head[column].len()]).max().unwrap_or(0);
    let print = |row: [&str; N]| {
        let cells: Vec<String> = row.iter().enumerate().map(|(i, cell)| format!("{cell:<w$}", w = width(i))).collect();
        println!("{}", cells.join("  ").trim_end());
    };
    print(head);
    for row in &rows {
        print(row.each_ref().map(String::as_str));
    }
}
