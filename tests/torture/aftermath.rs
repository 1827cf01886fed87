//! After the last fault: everything settles within bounded time, the guest is whole, and nothing is left behind.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use vmferry_bench::testbed::Host;

use super::plan::{Plan, ms};
use super::run::{Ended, Run};
use super::verdict::{Found, Outcome, Told, heart_disease, judge, settled};
use crate::bed::VM;

/// How long it may take from the end of the last fault on.
const SETTLE: Duration = Duration::from_secs(60);
/// How long it must stay as it is to be called settled.
const STEADY: Duration = Duration::from_millis(600);
/// A guest that is told to power off does so later than it is settled.
const POWER_OFF: Duration = Duration::from_secs(8);
/// How long a guest's heart may stand still that may have lost its memory.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How long `vmferry stop --force` may take with a QEMU that waits for a page and answers nothing.
const FORGET: Duration = Duration::from_secs(40);
/// Descriptors that an agent may have more than before: connections that it keeps for their next use.
const MORE_DESCRIPTORS: usize = 12;

/// Does what the plan says. Whatever happens, nothing of it is left when this comes back or panics.
pub(super) async fn run(plan: &Plan) -> Ended {
    let dir = tempfile::tempdir().expect("a folder");
    let mut run = Run::begin(plan, dir.path()).await;
    let before = [descriptors(run.host(0)), descriptors(run.host(1))];
    run.strike_all().await;
    let mut took = None;
    let mut outcome = after(&mut run, dir.path(), &before, &mut took).await;
    if let Some(wrong) = run.wrong.first() {
        outcome = Err(match outcome {
            Ok(_) => wrong.clone(),
            Err(error) => format!("{wrong}; {error}"),
        });
    }
    let logs = if outcome.is_err() { run.logs() } else { String::new() };
    Ended { outcome, settled: took, notes: run.notes, logs }
}

async fn after(
    run: &mut Run,
    dir: &Path,
    before: &[BTreeMap<String, usize>; 2],
    took: &mut Option<Duration>,
) -> Result<Outcome, String> {
    let over = Instant::now();
    let (found, since) = settle(run, over).await?;
    *took = Some(since - over);
    let found = if run.told_to_power_off() { power_off(run, found).await? } else { found };
    let story = run.story().await;
    let waits = matches!(found, Found::Runs(host) if run.may_wait_for_ever() && !beats(run, host, GIVE_UP).await);
    let found = if waits { Found::Gone } else { found };
    let mut outcome = judge(&story, found)?;
    if let Some(failed) = run.failed_unharmed() {
        return Err(failed);
    }
    let mut found = found;
    if let Found::Paused(host) = found {
        run.monitors.order(host, "cont").await?;
        // Its button may have been pressed before it was paused.
        if story.may_have_ended {
            found = power_off(run, Found::Runs(host)).await?;
        }
    }
    if found == Found::Gone && story.may_have_ended {
        outcome = Outcome::EndedByItsUser;
    }
    match found {
        Found::Runs(host) | Found::Paused(host) => is_whole(run, host).await?,
        Found::Gone => forget(run).await?,
    }
    if run.monitors.ran_twice().is_some() {
        return Err("both QEMUs ran the guest at the same time".into());
    }
    if let Some(disease) = heart_disease(&run.bed.watch.log(), run.may_reboot()) {
        return Err(disease);
    }
    nothing_is_left(run, dir, found, before, over).await?;
    Ok(outcome)
}

/// Waits until everything is settled, and stays so for a moment; since when.
async fn settle(run: &mut Run, over: Instant) -> Result<(Found, Instant), String> {
    let mut since = None;
    loop {
        run.keep_agents_alive();
        let at = Instant::now();
        let mut now = settled(&run.look().await, run.may_wait_for_ever());
        if !run.command_ended() {
            now = Err(now
                .err()
                .into_iter()
                .chain(["`vmferry migrate` has not ended".into()])
                .collect::<Vec<_>>()
                .join("; "));
        }
        match now {
            Ok(found) => {
                let (was, from) = *since.get_or_insert((found, at));
                if was != found {
                    since = Some((found, at));
                } else if from.elapsed() > STEADY {
                    return Ok((found, from));
                }
            }
            Err(unsettled) if over.elapsed() > SETTLE => {
                return Err(format!("not settled after {} s: {unsettled}", SETTLE.as_secs()));
            }
            Err(_) => since = None,
        }
        tokio::time::sleep(ms(100)).await;
    }
}

/// Gives a guest time that was told to power off.
async fn power_off(run: &mut Run, mut found: Found) -> Result<Found, String> {
    let from = Instant::now();
    while found != Found::Gone && from.elapsed() < POWER_OFF {
        (found, _) = settle(run, Instant::now()).await?;
    }
    Ok(found)
}

/// The guest's heart begins to beat on this host within this time, or goes on.
async fn beats(run: &Run, host: usize, within: Duration) -> bool {
    let from = Instant::now();
    let beats = |log: &vmferry_bench::GuestLog| log.beats().iter().filter(|it| it.at > from && it.host == host).count();
    run.bed.watch.wait("the guest's heart", within, |log| beats(log) > 20).await.is_ok()
}

/// The guest's heart beats on this host, and its memory and disk are right.
async fn is_whole(run: &Run, host: usize) -> Result<(), String> {
    let (watch, from) = (&run.bed.watch, Instant::now());
    // One that is booted anew has to fill its memory first.
    if !beats(run, host, Duration::from_secs(40)).await {
        return Err(format!("it is said to run on host {host}, and its heart does not beat there"));
    }
    let (pages, corrupt) = watch.verify(host).await.map_err(say)?;
    let damage = watch.log().corrupt().to_vec();
    if corrupt > 0 || !damage.is_empty() || pages < 32_000 {
        return Err(format!("{corrupt} of {pages} pages are corrupt: {:?}", damage.first()));
    }
    let before = watch.log().disk().filter(|(on, _)| *on == host);
    let disk = |log: &vmferry_bench::GuestLog| log.disk().is_some_and(|disk| disk.0 == host && Some(disk) != before);
    watch.wait("the guest's disk", Duration::from_secs(20), disk).await.map_err(say)?;
    let elsewhere = watch.log().beats().iter().filter(|beat| beat.at > from && beat.host != host).count();
    match (elsewhere, watch.log().corrupt().first()) {
        (0, None) => Ok(()),
        (0, Some(damage)) => Err(damage.clone()),
        (beats, _) => Err(format!("it beats on the other host as well: {beats} times")),
    }
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// What is left of a guest that is gone can be forgotten.
async fn forget(run: &Run) -> Result<(), String> {
    for (host, sight) in run.look().await.iter().enumerate() {
        if let Told::Vm { state, .. } = &sight.told {
            let stop = run.host(host).vmferry(&["stop", VM, "--force"]);
            let late = |_| format!("`vmferry stop --force` of what is {state} takes more than {} s", FORGET.as_secs());
            let output = tokio::time::timeout(FORGET, stop).await.map_err(late)?.map_err(say)?;
            if !output.status.success() {
                return Err(format!("what is {state} cannot be forgotten: {}", crate::bed::text(&output)));
            }
        }
    }
    match settled(&run.look().await, false) {
        Ok(Found::Gone) => Ok(()),
        other => Err(format!("it was forgotten, but: {other:?}")),
    }
}

/// Neither process, socket, file nor descriptor is left where the guest is not.
async fn nothing_is_left(
    run: &Run,
    dir: &Path,
    found: Found,
    before: &[BTreeMap<String, usize>; 2],
    over: Instant,
) -> Result<(), String> {
    let owner = match found {
        Found::Runs(host) | Found::Paused(host) => Some(host),
        Found::Gone => None,
    };
    let files = std::fs::read_dir(dir).map_err(say)?.flatten().map(|file| file.file_name());
    let ours = ["alpha", "beta", "disk.raw"];
    if let Some(left) = files.into_iter().find(|file| !ours.iter().any(|ours| file.as_os_str() == *ours)) {
        return Err(format!("a file is left beside the disk: {}", left.display()));
    }
    for host in (0..2).filter(|host| Some(*host) != owner) {
        let from = Instant::now();
        loop {
            let sight = &run.look().await[host];
            if sight.told == Told::NoVm && sight.qemus == 0 && !sight.folder {
                break;
            }
            if from.elapsed() > Duration::from_secs(5) {
                let folder = if sight.folder { "the VM's folder is there" } else { "no folder" };
                let (name, told, qemus) = (run.host(host).name, &sight.told, sight.qemus);
                return Err(format!("{name} has not forgotten it: {told:?}, {qemus} QEMUs, {folder}"));
            }
            tokio::time::sleep(ms(200)).await;
        }
    }
    // The agent of a host is compared with the one that had, or had not, the guest before.
    let like = |host: usize| &before[usize::from(Some(host) != owner)];
    let deadline = (over + SETTLE).max(Instant::now() + Duration::from_secs(10));
    for host in 0..2 {
        loop {
            let now = descriptors(run.host(host));
            let count = |all: &BTreeMap<String, usize>| all.values().sum::<usize>();
            let none_of =
                ["userfaultfd", "vmferry-ram"].iter().all(|kind| now.get(*kind).is_none_or(|left| *left == 0));
            if count(&now) <= count(like(host)) + MORE_DESCRIPTORS && (none_of || Some(host) == owner) {
                break;
            }
            if Instant::now() > deadline {
                let name = run.host(host).name;
                return Err(format!("the agent of {name} keeps descriptors: {now:?}, before {:?}", like(host)));
            }
            tokio::time::sleep(ms(200)).await;
        }
    }
    Ok(())
}

/// The descriptors of a host's agent, counted by what they are.
fn descriptors(host: &Host) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    let Some(pid) = host.agent_pid() else { return kinds };
    for file in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let target = std::fs::read_link(file.path()).unwrap_or_default().display().to_string();
        let kind = ["userfaultfd", "vmferry-ram", "pidfd", "socket", "pipe", "eventpoll", "eventfd"]
            .into_iter()
            .find(|kind| target.contains(kind))
            .unwrap_or("file");
        *kinds.entry(kind.to_owned()).or_default() += 1;
    }
    kinds
}

/// What the source's journal tells of the last migration.
pub(super) async fn was_handed_over(alpha: &Host) -> bool {
    let output = tokio::time::timeout(Duration::from_secs(5), alpha.vmferry(&["migrations", "--json"])).await;
    let Ok(Ok(output)) = output else { return false };
    let migrations: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    migrations[0]["step"] == "done"
}
