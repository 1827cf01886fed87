//! A second monitor on each QEMU, beside the agent's: the guest's user gives orders there, and what QEMU says there of
//! its guest does not come through the agents.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::{Value, json};
use vmferry_qemu::Qmp;

use super::plan::{ALPHA, BETA, ms};

pub(super) struct Monitors {
    hosts: [Arc<Monitor>; 2],
    ran_twice: Arc<Mutex<Option<Instant>>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

struct Monitor {
    socket: PathBuf,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    qmp: Option<Qmp>,
    /// As QEMU told it last; false without a QEMU.
    runs: bool,
    /// The next pause is the user's.
    user_pauses: bool,
    /// When the guest was set running first here, and when it was paused, but not by its user.
    first_run: Option<Instant>,
    pauses: Vec<Instant>,
}

/// What the user's order came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Paused {
    /// The guest ran and was paused by this order.
    Surely,
    /// It was paused already, or QEMU did not answer: nobody can know what the user wanted.
    Perhaps,
}

/// Has every QEMU in this folder make the monitor's socket under the name of its host.
const RENAMES: &str = "for word do shift; case $word in unix:user.sock,*) word=unix:HOST.user.sock,${word#*,};; esac; \
                       set -- \"$@\" \"$word\"; done";

/// The words of the guest's command line that ask for the monitor.
pub(super) const WORDS: [&str; 2] = ["-qmp", "unix:user.sock,server=on,wait=off"];

/// A folder for a host's QEMU, which is the one in `real`, or the system's.
pub(super) fn qemu_of_host(dir: &Path, host: &str, real: Option<&Path>) -> PathBuf {
    const NAME: &str = "qemu-system-x86_64";
    let (folder, real) = (dir.join(host), real.map_or(Path::new("/usr/bin").join(NAME), |real| real.join(NAME)));
    let script = format!("#!/bin/sh\n{}\nexec {} \"$@\"\n", RENAMES.replace("HOST", host), real.display());
    std::fs::create_dir_all(&folder).expect("made");
    std::fs::write(folder.join(NAME), script).expect("written");
    std::fs::set_permissions(folder.join(NAME), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("set");
    folder
}

impl Monitors {
    /// Of the QEMUs that run in this folder.
    pub(super) fn follow(dir: &Path) -> Self {
        let hosts = ["alpha", "beta"]
            .map(|host| Arc::new(Monitor { socket: dir.join(format!("{host}.user.sock")), now: Mutex::default() }));
        let ran_twice = Arc::default();
        let mut tasks: Vec<_> = hosts.iter().map(|monitor| tokio::spawn(Arc::clone(monitor).follow())).collect();
        tasks.push(tokio::spawn(look_for_two(hosts.clone(), Arc::clone(&ran_twice))));
        Self { hosts, ran_twice, tasks }
    }

    /// Both QEMUs said at one time that they run the guest.
    pub(super) fn ran_twice(&self) -> Option<Instant> {
        *self.ran_twice.lock().expect("no holder of this lock panics")
    }

    /// When the destination ran the guest first.
    pub(super) fn ran_there(&self) -> Option<Instant> {
        self.hosts[BETA].now().first_run
    }

    /// When the source was paused first, but not by its user.
    pub(super) fn paused_here(&self) -> Option<Instant> {
        self.hosts[ALPHA].now().pauses.first().copied()
    }

    /// The source was paused at this moment or soon after, but not by its user.
    pub(super) fn paused_around(&self, moment: Instant) -> bool {
        let now = self.hosts[ALPHA].now();
        let window = moment.checked_sub(ms(2000)).unwrap_or(moment)..moment + ms(300);
        now.pauses.iter().any(|pause| window.contains(pause))
    }

    pub(super) async fn order(&self, host: usize, command: &str) -> Result<Value, String> {
        self.hosts[host].order(command).await
    }

    /// Pauses the guest as its user.
    pub(super) async fn pause(&self, host: usize) -> Paused {
        let monitor = &self.hosts[host];
        let ran = monitor.runs().await;
        monitor.now().user_pauses = ran;
        match (ran, monitor.order("stop").await) {
            (true, Ok(_)) => Paused::Surely,
            _ => Paused::Perhaps,
        }
    }
}

impl Drop for Monitors {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl Monitor {
    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().expect("no holder of this lock panics")
    }

    async fn follow(self: Arc<Self>) {
        loop {
            let Ok(qmp) = Qmp::connect(&self.socket, ms(2000)).await else {
                tokio::time::sleep(ms(5)).await;
                continue;
            };
            let mut events = qmp.events();
            self.now().qmp = Some(qmp);
            if self.runs().await {
                self.set(true);
            }
            while let Some(event) = events.next().await {
                match event.name.as_str() {
                    "RESUME" => self.set(true),
                    "STOP" => self.set(false),
                    _ => {}
                }
            }
            let mut now = self.now();
            (now.qmp, now.runs) = (None, false);
        }
    }

    fn set(&self, runs: bool) {
        let mut now = self.now();
        now.runs = runs;
        if runs {
            now.first_run.get_or_insert_with(Instant::now);
        } else if !std::mem::take(&mut now.user_pauses) {
            now.pauses.push(Instant::now());
        }
    }

    async fn order(&self, command: &str) -> Result<Value, String> {
        let qmp = self.now().qmp.clone().ok_or("there is no QEMU")?;
        let answer = tokio::time::timeout(ms(1000), qmp.execute_raw(command, json!({}))).await;
        answer.map_err(|_| "QEMU does not answer".to_owned())?.map_err(|error| error.to_string())
    }

    async fn runs(&self) -> bool {
        self.order("query-status").await.is_ok_and(|status| status["status"] == "running")
    }
}

async fn look_for_two(hosts: [Arc<Monitor>; 2], ran_twice: Arc<Mutex<Option<Instant>>>) {
    loop {
        tokio::time::sleep(ms(20)).await;
        // The same one again, for it may have stopped before the other began.
        if hosts.iter().all(|host| host.now().runs)
            && hosts[ALPHA].runs().await
            && hosts[BETA].runs().await
            && hosts[ALPHA].runs().await
        {
            ran_twice.lock().expect("no holder of this lock panics").get_or_insert_with(Instant::now);
        }
    }
}
