//! `move`: a VM that does not run, to another host, as its user sees it.

use vmferry_api::client::{Client, ClientError, vm_path};
use vmferry_api::{VmMoveRequest, VmMoveState, VmMoveView};

use crate::cli::MoveOptions;
use crate::failure::Failure;
use crate::pair::over_ssh;
use crate::vms::{memory, places};
use crate::watched::Watched;

pub(crate) async fn run(client: &Client, options: MoveOptions) -> Result<(), Failure> {
    let path = format!("{}/move", vm_path(&options.name));
    let request = VmMoveRequest {
        to: over_ssh(client, options.to).await?,
        dry_run: options.dry_run,
        bandwidth: options.bandwidth,
        disks_are_shared: options.disks_are_shared,
        disks: places(options.disks)?,
    };
    let mut view: VmMoveView = client.post(&path, &request).await?;
    let mut watched = Watched::new(options.json);
    if !options.json && !options.dry_run {
        view.notes.iter().for_each(|note| eprintln!("note: {note}"));
    }
    let mut noted = view.notes.len();
    while !view.state.is_last() {
        watched.show(&view, (view.done, view.total), pace(&view));
        watched.wait(client, &path).await?;
        view = client.get(&path).await.map_err(|error| match error {
            ClientError::NoAgent { .. } | ClientError::Lost(_) => Failure::LostMove,
            other => other.into(),
        })?;
        if !options.json {
            view.notes.iter().skip(noted).for_each(|note| eprintln!("note: {note}"));
        }
        noted = noted.max(view.notes.len());
    }
    let in_words = watched.end(&view);
    if let Some(problem) = view.problem {
        return Err(ClientError::Problem(problem).into());
    }
    if in_words {
        tell(&view);
    }
    Ok(())
}

fn tell(view: &VmMoveView) {
    if view.state == VmMoveState::Planned {
        println!("{} can move to {}; nothing was touched.", view.vm, view.to);
        view.notes.iter().for_each(|note| println!("  note         {note}"));
        return;
    }
    println!("{} is on {} now; `vmferry start {}` there starts it.", view.vm, view.to, view.vm);
    for disk in &view.disks {
        println!("  disk         {}: {}; {} stays here", disk.to.display(), memory(disk.size), disk.from.display());
    }
    if !view.disks.is_empty() {
        println!("  sent         {}", memory(view.sent));
        println!("  total        {:.1} s", view.elapsed_ms as f64 / 1e3);
    }
}

fn pace(view: &VmMoveView) -> String {
    match view.state {
        VmMoveState::HandingOver => format!("(all is there; {} is asked to take it)", view.to),
        _ => format!("(sent {})", memory(view.sent)),
    }
}
