//! The faults: how each strikes, and how it is taken back.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;

use super::monitors::Paused;
use super::plan::{ALPHA, Fault, Moment, ms};
use super::run::{Run, is_root, qemus_of};
use crate::bed::VM;

/// How long a guest that is asked to shut down by `vmferry stop` may take.
const STOP_TIMEOUT: &str = "10s";
/// How long `vmferry stop` and `cancel` may take at most.
const ANSWER: Duration = Duration::from_secs(60);
/// Fills a disk.
const FILLER: &str = "filler";

/// What ends a fault.
#[derive(Clone, Copy)]
pub(super) enum Undo {
    StartAgent(usize),
    ThawAgent(usize, u32),
    ThawQemu(i32),
    MendLink,
    FreeState(usize),
}

/// `vmferry stop` or `cancel`.
pub(super) struct Order {
    /// The guest was to be stopped, by force or not.
    pub stop: Option<bool>,
    begun: Instant,
    child: Child,
    /// How long it took, and its exit code.
    pub ended: Option<(Duration, Option<i32>)>,
}

impl Run {
    pub(super) async fn strike(&mut self, fault: Fault) {
        let ended = self.heard().ended;
        if let Some((_, code)) = ended {
            let code = code.map_or("a signal".into(), |code| code.to_string());
            self.notes.push(format!("the command had ended with {code} before: {}", fault.name()));
        }
        let later = |for_ms: u64| Instant::now() + ms(for_ms);
        match fault {
            Fault::KillAgent { host, back_ms } => {
                self.kill_agent(host).await;
                self.undo.push((later(back_ms), Undo::StartAgent(host)));
            }
            Fault::KillBothAgents { back_ms } => {
                for (host, back_ms) in back_ms.into_iter().enumerate() {
                    self.kill_agent(host).await;
                    self.undo.push((later(back_ms), Undo::StartAgent(host)));
                }
            }
            Fault::FreezeAgent { host, for_ms } => {
                match self.host(host).agent_pid().filter(|pid| signal(*pid as i32, Signal::STOP)) {
                    Some(pid) => self.undo.push((later(for_ms), Undo::ThawAgent(host, pid))),
                    None => self.notes.push("there was no agent to freeze".into()),
                }
            }
            Fault::KillQemu { host } => {
                let qemus = qemus_of(&self.host(host).run_dir);
                if qemus.iter().any(|pid| signal(*pid, Signal::KILL)) {
                    self.kills.push((host, Instant::now()));
                } else {
                    self.notes.push("there was no QEMU to kill".into());
                }
            }
            Fault::FreezeQemu { host, for_ms } => {
                let qemus = qemus_of(&self.host(host).run_dir);
                if qemus.is_empty() {
                    self.notes.push("there was no QEMU to freeze".into());
                }
                for pid in qemus.into_iter().filter(|pid| signal(*pid, Signal::STOP)) {
                    self.undo.push((later(for_ms), Undo::ThawQemu(pid)));
                }
            }
            Fault::CutLink { .. } | Fault::FillState { .. } if !is_root() => {
                self.notes.push(format!("only root can {}: left out", fault.name()));
            }
            Fault::CutLink { for_ms } => {
                self.bed.set_link(false).expect("the link can be cut");
                self.cuts += 1;
                self.undo.push((later(for_ms), Undo::MendLink));
            }
            Fault::FillState { host, for_ms } => {
                self.full[host] = true;
                fill(&self.host(host).state_dir);
                self.undo.push((later(for_ms), Undo::FreeState(host)));
            }
            Fault::Cancel => self.order(ALPHA, &["cancel", VM], None),
            Fault::Stop { host, force: true } => self.order(host, &["stop", VM, "--force"], Some(true)),
            Fault::Stop { host, force: false } => {
                self.order(host, &["stop", VM, "--timeout", STOP_TIMEOUT], Some(false));
            }
            Fault::Reboot => {
                if let Err(error) = self.monitors.order(self.heart(), "system_reset").await {
                    self.notes.push(format!("it was not rebooted: {error}"));
                }
            }
            Fault::PowerOff { button } => {
                self.told_to_power_off = true;
                let host = self.heart();
                let listens = !self.away[host] && !self.undo.iter().any(|(_, it)| matches!(it, Undo::ThawAgent(..)));
                if button || !listens {
                    if let Err(error) = self.monitors.order(host, "system_powerdown").await {
                        self.notes.push(format!("its button was not pressed: {error}"));
                    }
                } else {
                    self.bed.watch.say(host, "poweroff\n").await;
                }
            }
            Fault::Pause => {
                let paused = self.monitors.pause(self.heart()).await;
                // It may have been paused for the migration a moment before: then QEMU does nothing that can be seen.
                let is_about_to_be = self.came(Moment::SwitchOver).is_some();
                let unclear = (self.plan.is_paused_first() || is_about_to_be) && self.monitors.ran_there().is_none();
                self.paused = Some(if unclear { Paused::Perhaps } else { paused });
            }
        }
    }

    pub(super) fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::StartAgent(host) => {
                self.away[host] = false;
                if !self.bed.testbed.host_mut(host).agent_lives() {
                    self.bed.testbed.host_mut(host).spawn_agent().expect("the agent can be started");
                }
            }
            Undo::ThawAgent(host, pid) => {
                if self.host(host).agent_pid() == Some(pid) {
                    signal(pid as i32, Signal::CONT);
                }
            }
            Undo::ThawQemu(pid) => {
                signal(pid, Signal::CONT);
            }
            Undo::MendLink => {
                self.cuts -= 1;
                if self.cuts == 0 {
                    self.bed.set_link(true).expect("the link can be mended");
                }
            }
            Undo::FreeState(host) => {
                self.full[host] = false;
                // Two that overlap have one file.
                let _ = std::fs::remove_file(self.host(host).state_dir.join(FILLER));
            }
        }
    }

    async fn kill_agent(&mut self, host: usize) {
        self.bed.testbed.host_mut(host).kill_agent().await.expect("the agent can be killed");
        self.away[host] = true;
    }

    /// Starts agents again that ended by themselves, as a service manager does. They may do so while their disk is full.
    pub(super) fn keep_agents_alive(&mut self) {
        for host in 0..2 {
            if self.away[host] || self.bed.testbed.host_mut(host).agent_lives() {
                self.again[host] = None;
                continue;
            }
            let now = Instant::now();
            match self.again[host] {
                None => {
                    let name = self.host(host).name;
                    match self.full[host] {
                        true => self.notes.push(format!("the agent of {name} ended with its disk full")),
                        false => self.wrong.push(format!("the agent of {name} ended by itself")),
                    }
                    self.again[host] = Some(now + ms(500));
                }
                Some(due) if due <= now => {
                    self.bed.testbed.host_mut(host).spawn_agent().expect("the agent can be started");
                }
                Some(_) => {}
            }
        }
    }

    /// The host that the guest was heard on last.
    fn heart(&self) -> usize {
        self.bed.watch.log().beats().last().map_or(ALPHA, |beat| beat.host)
    }

    fn order(&mut self, host: usize, words: &[&str], stop: Option<bool>) {
        let mut command = self.host(host).command(words);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let child = command.spawn().expect("vmferry runs");
        self.orders.push(Order { stop, begun: Instant::now(), child, ended: None });
    }

    /// All that was ordered has been answered, or takes far too long.
    pub(super) fn orders_ended(&mut self) -> bool {
        for order in self.orders.iter_mut().filter(|order| order.ended.is_none()) {
            let took = order.begun.elapsed();
            match order.child.try_wait() {
                Ok(None) if took < ANSWER => {}
                Ok(None) => {
                    self.wrong.push("`vmferry stop` or `cancel` is not answered within 60 s".into());
                    order.ended = Some((took, None));
                }
                status => order.ended = Some((took, status.ok().flatten().and_then(|status| status.code()))),
            }
        }
        self.orders.iter().all(|order| order.ended.is_some())
    }
}

fn signal(pid: i32, signal: Signal) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| kill_process(pid, signal).is_ok())
}

/// Leaves no room on the file system of this folder.
fn fill(dir: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(dir.join(FILLER)).expect("there is room for a file");
    for piece in [vec![0; 64 << 10], vec![0; 512]] {
        while file.write_all(&piece).is_ok() {}
    }
}
