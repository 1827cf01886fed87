//! `disk list`, `disk move`, `disk cancel`.

use std::time::Duration;

use vmferry_api::client::{Client, ClientError, disk_move_path, vm_path};
use vmferry_api::{DiskMoveRequest, DiskMoveState, DiskMoveView, DiskView};

use crate::cli::{Disk, DiskMoveOptions};
use crate::failure::Failure;
use crate::vms::{memory, print_json, print_table};
use crate::watched::Watched;

pub(crate) async fn run(client: &Client, what: Disk) -> Result<(), Failure> {
    match what {
        Disk::List { name, json } => list(client, &name, json).await,
        Disk::Move(options) => move_disk(client, options).await,
        Disk::Cancel { name, disk } => {
            client.delete(&disk_move_path(&name, &disk)).await?;
            println!("the move of {disk} was asked to stop; `vmferry disk list {name}` tells where it is");
            Ok(())
        }
    }
}

async fn list(client: &Client, name: &str, json: bool) -> Result<(), Failure> {
    let disks: Vec<DiskView> = client.get(&format!("{}/disks", vm_path(name))).await?;
    if json {
        print_json(&disks);
        return Ok(());
    }
    let rows = disks.into_iter().map(|disk| {
        let bytes = |it: Option<u64>| it.map_or_else(|| "-".into(), memory);
        let access = if disk.read_only { "read-only" } else { "writable" };
        let backing = disk.backing.unwrap_or_default();
        let format = disk.format.unwrap_or_else(|| "-".into());
        [disk.name, format, bytes(disk.size), bytes(disk.allocated), access.into(), disk.file, backing]
    });
    print_table(["DISK", "FORMAT", "SIZE", "ALLOCATED", "ACCESS", "WHERE", "BEHIND IT"], rows);
    Ok(())
}

async fn move_disk(client: &Client, options: DiskMoveOptions) -> Result<(), Failure> {
    let request = DiskMoveRequest {
        to: options.to,
        format: options.format,
        bandwidth: options.bandwidth,
        delete_source: options.delete_source,
    };
    let begun: DiskMoveView = client.post(&disk_move_path(&options.name, &options.disk), &request).await?;
    let path = disk_move_path(&options.name, &begun.disk);
    let mut watched = Watched::new(options.json);
    let ended = loop {
        let view: DiskMoveView = client.get(&path).await?;
        if !matches!(view.state, DiskMoveState::Copying | DiskMoveState::Switching) {
            break view;
        }
        watched.show(&view, (view.done, view.total), pace(&view));
        watched.wait(client, &path).await?;
    };
    if watched.end(&ended) {
        tell(&ended);
    }
    match ended.problem {
        Some(problem) => Err(ClientError::Problem(problem).into()),
        None => Ok(()),
    }
}

fn tell(view: &DiskMoveView) {
    view.notes.iter().for_each(|note| eprintln!("note: {note}"));
    if view.problem.is_none() {
        println!("{} of {} is at {} ({}) now; it was at {}", view.disk, view.vm, view.to, view.format, view.from);
    }
}

/// How fast it is, and how long it will take if it goes on so.
fn pace(view: &DiskMoveView) -> String {
    if view.state == DiskMoveState::Switching {
        return "(all is there; switching over)".into();
    }
    let rate = (view.done as f64 / (view.elapsed_ms.max(1) as f64 / 1000.0)) as u64;
    match view.total.saturating_sub(view.done).checked_div(rate) {
        Some(left) => format!("({}/s, {} left)", memory(rate), humantime::format_duration(Duration::from_secs(left))),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_it_will_take_follows_from_how_far_it_is() {
        let mut view = DiskMoveView {
            vm: "web1".into(),
            disk: "virtio0".into(),
            from: "/a".into(),
            to: "/b".into(),
            format: "raw".into(),
            state: DiskMoveState::Copying,
            total: 300 << 20,
            done: 100 << 20,
            elapsed_ms: 10_000,
            problem: None,
            notes: Vec::new(),
        };
        assert_eq!(pace(&view), "(10.0 MiB/s, 20s left)");
        view.done = 0;
        assert_eq!(pace(&view), "");
    }
}
