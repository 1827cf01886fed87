//! What an agent does, when it starts, with what its predecessor left: VMs that run on, and migrations in any step.
//!
//! Nobody waits for it: the agent serves meanwhile, each VM is looked for by a task of its own, and one whose QEMU does
//! not answer is shown as silent until it does.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmferry_api::{VmSpec, in_one_line};
use vmferry_custody::InStep;
use vmferry_qemu::{CommandLine, Qmp, without_ours};

use crate::agent::Agent;
use crate::error::AgentError;
use crate::host::{self, Host, Idle, IdleVm, PID_FILE, Stage, pid_from_file, remove_dir};
use crate::journal::{Instance, VmRecord};
use crate::{destination, disk_moves, peers, source};

/// How long the monitor of a QEMU that lives may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two tries to find one.
const FIND_AGAIN: Duration = Duration::from_secs(1);
/// Between two tries to tell whether a VM that has ended is this host's.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// Goes on with what had begun, and has the VMs found; `journal_is_new` where there was none, or it could not be read.
pub(crate) async fn recover(agent: &Arc<Agent>, journal_is_new: bool) -> Result<(), AgentError> {
    let journal = &agent.host.journal;
    for record in journal.open_out().await? {
        source::take_up(&agent.outgoing, record);
    }
    peers::carried::sweep();
    source::carry::take_up(&agent.outgoing).await?;
    disk_moves::sweep(&agent.host).await?;
    let vms = journal.vms().await?;
    let (specs, signature): (Vec<_>, _) =
        (vms.iter().map(|it| it.spec.clone()).collect(), agent.host.signature.clone());
    // The disks may lie on storage that does not answer.
    tokio::task::spawn_blocking(move || host::sweep(specs.iter(), &signature));
    for record in vms {
        let agent = Arc::clone(agent);
        if let Some(record) = alive(&agent.host, record).await {
            agent.host.rest(record.clone(), Idle::Silent);
            tokio::spawn(find(agent, record));
        }
    }
    agent.vm_moves.take_up().await?;
    agent.queue.take_up().await?;
    find_by_process(agent);
    if !journal_is_new {
        sweep_folders(agent).await?;
    }
    destination::sweep_disks(&agent.host).await
}

/// QEMUs of ours that are not on record, as after the journal was lost, are found by their processes, and their users
/// asked whose their guests are.
fn find_by_process(agent: &Arc<Agent>) {
    let dirs = std::fs::read_dir(agent.host.config.run_dir.join("vms")).into_iter().flatten();
    for dir in dirs.flatten() {
        let name = dir.file_name().to_string_lossy().into_owned();
        if agent.host.has_vm(&name) {
            continue;
        }
        let socket = dir.path().join("qmp.sock").to_string_lossy().into_owned();
        let Some(pid) = pid_from_file(&dir.path()) else { continue };
        let Some(start_time) = vmferry_qemu::process_start_time(pid) else { continue };
        let words = vmferry_qemu::process_command_line(pid);
        // The pid may be somebody else's by now.
        if !words.iter().any(|word| word.contains(&socket)) {
            continue;
        }
        let Ok(command) = CommandLine::parse(&words) else { continue };
        let (argv, shared_ram) = without_ours(&command);
        let cwd = vmferry_qemu::process_cwd(pid).unwrap_or_else(|| "/".into());
        let spec =
            VmSpec { name: name.clone(), argv, cwd, shared_ram, adopted: false, measuring: false, io_limits: None };
        let record = VmRecord {
            spec,
            instance: Instance::now(pid, start_time),
            qmp: socket,
            accelerator: "tcg".into(),
            incoming: None,
            autostart: false,
            ended: None,
            changed: None,
        };
        tracing::warn!(vm = name, pid, "found by its process: `vmferry resolve` says whether its guest is this host's");
        agent.host.rest(record.clone(), Idle::Unclear);
        tokio::spawn(take_unclear(Arc::clone(agent), record));
    }
}

/// An agent that was killed while it forgot a VM has left its folder: it goes, if its QEMU is known to be gone and nobody
/// has the VM on record.
async fn sweep_folders(agent: &Arc<Agent>) -> Result<(), AgentError> {
    let recorded = agent.host.journal.vm_names().await?;
    let dirs = std::fs::read_dir(agent.host.config.run_dir.join("vms")).into_iter().flatten();
    for dir in dirs.flatten() {
        let name = dir.file_name().to_string_lossy().into_owned();
        let is_known = recorded.contains(&name) || agent.host.idle(&name).is_some();
        if is_known || may_run(&dir.path(), &name).await {
            continue;
        }
        if let Ok(_nobody_takes_it) = agent.host.reserve_name(&name) {
            tracing::info!(vm = name, "removes the folder of a VM that is not there any more");
            remove_dir(dir.path()).await;
        }
    }
    Ok(())
}

/// There may be a QEMU that has this folder. One that ends by itself takes the file along that says which process it is.
async fn may_run(dir: &Path, name: &str) -> bool {
    let is_named = match pid_from_file(dir) {
        // However the folder was called when it was started.
        Some(pid) => {
            let monitor = format!("/{name}/qmp.sock");
            vmferry_qemu::process_command_line(pid).iter().any(|word| word.contains(&monitor))
        }
        None => dir.join(PID_FILE).exists(),
    };
    let nobody = [ErrorKind::NotFound, ErrorKind::ConnectionRefused];
    let answered = tokio::net::UnixStream::connect(dir.join("qmp.sock")).await;
    is_named || !answered.is_err_and(|error| nobody.contains(&error.kind()))
}

async fn take_unclear(agent: Arc<Agent>, record: VmRecord) {
    let is_there = || agent.host.idle(&record.spec.name).is_some_and(|idle| idle.record.instance == record.instance);
    while is_there() && record.instance.is_alive() {
        let found = async {
            let qmp = Qmp::connect(Path::new(&record.qmp), CONNECT_TIMEOUT).await?;
            let kvm = qmp.execute(vmferry_qemu::qmp::commands::QueryKvm {}).await?.enabled;
            let accelerator = if kvm { "kvm" } else { "tcg" }.into();
            agent.host.take(&VmRecord { accelerator, ..record.clone() }, qmp, Stage::Unclear).await
        };
        match found.await {
            Ok(_) => return,
            Err(error) => tracing::debug!(vm = record.spec.name, error = in_one_line(&error), "does not answer yet"),
        }
        tokio::time::sleep(FIND_AGAIN).await;
    }
}

/// The VM's record, if its QEMU lives; otherwise it is noted that it does not, and started if it is to be.
async fn alive(host: &Arc<Host>, mut record: VmRecord) -> Option<VmRecord> {
    let name = record.spec.name.clone();
    let is_of_this_boot = record.instance.boot == Instance::now(0, 0).boot;
    if record.instance.pid == 0 && is_of_this_boot {
        // The agent ended between writing the record and learning the process.
        let pid = pid_from_file(&host.config.vm_dir(&name)).unwrap_or(0);
        record.instance = Instance::now(pid, vmferry_qemu::process_start_time(pid).unwrap_or(0));
        if let Err(error) = host.journal.put_vm(&record).await {
            tracing::error!(vm = name, %error, "cannot record its process");
        }
    }
    if record.instance.is_alive() {
        return Some(record);
    }
    let why = match &record.ended {
        Some(why) => why.clone(),
        None if is_of_this_boot => "its QEMU ended while no agent was there".into(),
        None => "its host was restarted".into(),
    };
    tracing::warn!(vm = name, pid = record.instance.pid, why, "does not run");
    host.rest(record, Idle::Ended(why));
    None
}

/// What ended with its QEMU is settled; then it is started if it is to be whenever its host is. One of which only its
/// source knows whether it is this host's is asked about until that answers.
pub(crate) async fn see_to_the_ended(agent: Arc<Agent>) {
    let mut told = false;
    loop {
        let mut undecided = false;
        for idle in agent.host.idle_vms() {
            let Idle::Ended(_) = &idle.why else { continue };
            if let Err(error) = see_to(&agent, &idle).await {
                undecided = true;
                if !told {
                    let vm = &idle.record.spec.name;
                    tracing::error!(
                        vm,
                        error = in_one_line(&error),
                        "cannot tell whether it is this host's, or not start it"
                    );
                }
            }
        }
        if !undecided {
            return;
        }
        told = true;
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

async fn see_to(agent: &Arc<Agent>, idle: &IdleVm) -> Result<(), AgentError> {
    let restarted = idle.record.instance.boot != Instance::now(0, 0).boot;
    match came_whole(agent, &idle.record).await? {
        // It never was this host's, or is not any more.
        false => agent.host.forget_idle(idle).await,
        true if idle.record.autostart && restarted => {
            host::start(&agent.host, &idle.record.spec.name).await?;
            Ok(())
        }
        true => Ok(()),
    }
}

/// Whether a VM whose QEMU is gone was this host's: one that was to come here, and had not, is not.
pub(crate) async fn came_whole(agent: &Arc<Agent>, record: &VmRecord) -> Result<bool, AgentError> {
    let Some(id) = record.incoming else { return Ok(true) };
    let Some(row) = agent.host.journal.row_in(id).await? else { return Ok(true) };
    let step = row.step;
    // With its QEMU gone what was prepared is abandoned.
    agent.incoming.take_up(id, row);
    match step {
        InStep::Prepared | InStep::Abandoned => Ok(false),
        InStep::Committed { .. } => destination::is_undisputed(&agent.incoming, id).await,
    }
}

/// Until its QEMU answers: a migration that stands still may keep it from that for long.
async fn find(agent: Arc<Agent>, record: VmRecord) {
    let name = record.spec.name.clone();
    let mut told = false;
    while agent.host.idle(&name).is_some_and(|idle| idle.record.instance == record.instance) {
        match find_once(&agent, &record).await {
            Ok(()) => return,
            Err(_) if !record.instance.is_alive() => {
                agent.host.rest(record.clone(), Idle::Ended("its QEMU ended".into()));
                return;
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(vm = name, error = in_one_line(&error), "runs, but does not answer yet");
                }
            }
        }
        tokio::time::sleep(FIND_AGAIN).await;
    }
}

async fn find_once(agent: &Arc<Agent>, record: &VmRecord) -> Result<(), AgentError> {
    let (host, name) = (&agent.host, &record.spec.name);
    let row = match record.incoming {
        Some(id) => host.journal.row_in(id).await?.map(|row| (id, row)),
        None => None,
    };
    let step = row.as_ref().map(|(_, row)| row.step);
    if let Some((id, row)) = row.clone()
        && !matches!(step, Some(InStep::Committed { must_run: false }))
    {
        // Before QEMU is asked anything, as it may wait for what will not come.
        let lost = destination::is_expected(&host.config.vm_dir(name)) && step == Some(InStep::Prepared);
        agent.incoming.take_up_again(id, row, lost);
        if lost || step == Some(InStep::Abandoned) {
            // Its driver ends it.
            return Ok(());
        }
        tracing::warn!(vm = name, pid = record.instance.pid, migration = %id, ?step, "came, or was to come");
    }
    let stage = match (step, record.incoming) {
        (Some(InStep::Prepared), Some(id)) => Stage::Incoming(id),
        _ => agent.outgoing.stage_of(&record.instance).unwrap_or(Stage::Owned),
    };
    let qmp = Qmp::connect(Path::new(&record.qmp), CONNECT_TIMEOUT).await?;
    let vm = host.take(record, qmp, stage).await?;
    agent.incoming.is_found(&vm);
    let seen = vm.view(host.config.engine).await;
    tracing::info!(vm = name, pid = vm.pid, state = seen.state, "found again");
    Ok(())
}
