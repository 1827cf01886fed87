//! `migrate` of several VMs: all are asked for at once, and looked at while the agent has them begin in their turn.

use std::sync::{Arc, Mutex};

use futures_util::future::join_all;
use vmferry_api::client::{Client, ClientError};
use vmferry_api::{Begun, ManyBegun, MigrateManyRequest, MigrationEvent, Problem};

use crate::cli::MigrateOptions;
use crate::failure::{Failure, exit_code, worst};
use crate::migrate::{LineView, View, tell_plan, tell_report};
use crate::request;
use crate::vms::print_json;

pub(crate) async fn run(client: &Client, options: MigrateOptions) -> Result<(), Failure> {
    if options.record.is_some() {
        return Err(Failure::OnlyForOne("--record"));
    }
    if !options.how.disks.is_empty() {
        return Err(Failure::OnlyForOne("--disk"));
    }
    let (vms, json, verbose, dry_run) = (options.names.clone(), options.json, options.verbose, options.dry_run);
    let of = vms.len();
    let wanted = MigrateManyRequest { vms, how: request::migration(client, options).await? };
    let asked: ManyBegun = client.post("/v1/migrations", &wanted).await?;
    let mut codes = Vec::new();
    for refused in &asked.refused {
        codes.push(exit_code(refused.problem.code));
        match json {
            true => print_event(&refused.vm, &MigrationEvent::Failed(refused.problem.clone())),
            false => tell_problem(&refused.vm, &refused.problem),
        }
    }
    if dry_run {
        match json {
            true => print_json(&asked),
            false => asked.begun.iter().for_each(|it| tell_plan(&it.plan, verbose)),
        }
    } else {
        codes.extend(follow_all(client, asked.begun, json, verbose).await?);
    }
    match codes.len() {
        0 => Ok(()),
        failed => Err(Failure::SomeFailed { failed, of, code: worst(codes.into_iter()) }),
    }
}

/// To the end of all; the exit codes of those that failed.
async fn follow_all(client: &Client, begun: Vec<Begun>, json: bool, verbose: bool) -> Result<Vec<u8>, Failure> {
    let under_way = Arc::new(Mutex::new(begun.iter().map(|it| it.plan.vm.clone()).collect::<Vec<_>>()));
    let all = begun.into_iter().filter_map(|it| Some((it.plan.vm, it.id?))).map(|(vm, id)| {
        let under_way = Arc::clone(&under_way);
        async move {
            let mut view = LineView::new(verbose, &vm);
            let path = format!("/v1/migrations/{id}/events");
            let ended = client.follow(&path, |event| {
                match json {
                    true => print_event(&vm, &event),
                    false => view.show(&event),
                }
                match event {
                    MigrationEvent::Finished(report) => Some(Ok(report)),
                    MigrationEvent::Failed(problem) => Some(Err(ClientError::Problem(problem))),
                    _ => None,
                }
            });
            let ended = ended.await.flatten();
            under_way.lock().expect("no holder of this lock panics").retain(|it| *it != vm);
            match ended {
                Ok(report) => {
                    if !json {
                        tell_report(&report);
                    }
                    None
                }
                Err(ClientError::Problem(problem)) => {
                    if !json {
                        tell_problem(&vm, &problem);
                    }
                    Some(exit_code(problem.code))
                }
                Err(other) => {
                    let failure = Failure::Agent(other);
                    failure.tell();
                    Some(failure.exit_code())
                }
            }
        }
    });
    tokio::select! {
        codes = join_all(all) => Ok(codes.into_iter().flatten().collect()),
        _ = tokio::signal::ctrl_c() => {
            let names = under_way.lock().expect("no holder of this lock panics").join(", ");
            Err(Failure::LeftToTheAgent(names))
        }
    }
}

fn tell_problem(vm: &str, problem: &Problem) {
    eprintln!("{vm}: {}", problem.message);
    if let Some(hint) = &problem.hint {
        eprintln!("  hint: {hint}");
    }
}

/// As of one VM, with whose it is.
fn print_event(vm: &str, event: &MigrationEvent) {
    let mut event = serde_json::to_value(event).expect("an event is plain data");
    event["vm"] = vm.into();
    println!("{event}");
}
