//! What must hold after a run. What was seen is a value, and the rules are functions of it.

use vmferry_bench::GuestLog;

use super::monitors::Paused;
use super::plan::{ALPHA, BETA, Engine};

/// What was done to the guest, by faults and by its user.
#[derive(Clone, Debug)]
pub(super) struct Story {
    pub engine: Engine,
    /// QEMUs that were killed.
    pub kills: Vec<Kill>,
    /// The source's journal says in the end that the guest was handed over.
    pub committed: bool,
    /// The guest was told to power off, or to be stopped.
    pub may_have_ended: bool,
    /// `vmferry stop` said that it did.
    pub was_stopped: bool,
    pub paused: Option<Paused>,
    /// How `vmferry migrate` ended.
    pub exit_code: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kill {
    pub host: usize,
    pub when: When,
    /// Post-copy had begun, or did right after, and was not over.
    pub in_post_copy: bool,
}

/// When a QEMU was killed, by the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// The guest ran at the source, and for a moment longer.
    Before,
    /// The guest was paused at the source, which had not been told of a commit.
    Around,
    /// The destination ran the guest, or the source was told that it owns it.
    After,
}

/// Where the guest is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Runs(usize),
    Paused(usize),
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    Moved,
    Stayed,
    EndedByItsUser,
    LostByItsQemusDeath,
}

impl Outcome {
    pub(super) fn in_words(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Stayed => "stayed",
            Self::EndedByItsUser => "ended by its user",
            Self::LostByItsQemusDeath => "lost by its QEMU's death",
        }
    }
}

/// No software could have saved the guest: the only QEMU that had all of it was killed.
///
/// - Before the commit that is the source's, and the guest is lost with it. The destination's can be killed without harm.
/// - After the commit it is the destination's. The source's may be killed, unless QEMU moves the RAM and is in post-copy:
///   then the guest needs both. Agents that move the RAM hold it themselves.
/// - While the guest is paused in between, the source's journal tells in the end which of the two it was.
fn is_lost_by_its_qemus_death(kill: Kill, engine: Engine, committed: bool) -> bool {
    let needs_both = needs_both(kill, engine);
    match (kill.host, kill.when) {
        (ALPHA, When::Before) => true,
        (ALPHA, When::Around) => !committed || needs_both,
        (ALPHA, When::After) => needs_both,
        (_, When::Before) => false,
        (_, When::Around) => committed || needs_both,
        (_, When::After) => true,
    }
}

fn needs_both(kill: Kill, engine: Engine) -> bool {
    engine == Engine::Qemu && kill.in_post_copy
}

/// The source's QEMU was killed in a post-copy of QEMU's: the destination keeps a guest that waits for pages for ever.
pub(super) fn may_wait_for_ever(kills: &[Kill], engine: Engine) -> bool {
    kills.iter().any(|kill| kill.host == ALPHA && needs_both(*kill, engine))
}

/// What it came to, or what is wrong with it.
pub(super) fn judge(story: &Story, found: Found) -> Result<Outcome, String> {
    let lost = story.kills.iter().any(|kill| is_lost_by_its_qemus_death(*kill, story.engine, story.committed));
    let outcome = match found {
        Found::Gone if story.may_have_ended => Outcome::EndedByItsUser,
        Found::Gone if lost => Outcome::LostByItsQemusDeath,
        Found::Gone => return Err(format!("the guest is gone, and need not be: {:?}", story.kills)),
        Found::Runs(_) | Found::Paused(_) if story.was_stopped => {
            return Err("`vmferry stop` said that it was stopped, and it was not".into());
        }
        Found::Runs(host) if story.paused == Some(Paused::Surely) => {
            return Err(format!("its user paused it, and it runs on host {host}"));
        }
        Found::Paused(host) if story.paused.is_none() => {
            return Err(format!("it is paused on host {host}, and its user did not pause it"));
        }
        Found::Runs(ALPHA) | Found::Paused(ALPHA) => Outcome::Stayed,
        Found::Runs(_) | Found::Paused(_) => Outcome::Moved,
    };
    match (story.exit_code, outcome) {
        (Some(0), Outcome::Stayed) => Err("`vmferry migrate` said that it moved, and it did not".into()),
        (Some(code @ (3 | 4 | 5 | 130)), Outcome::Moved) => {
            Err(format!("`vmferry migrate` said that it runs on at the source (exit code {code}), and it moved"))
        }
        _ => Ok(outcome),
    }
}

/// A VM as its agent tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Told {
    NoAnswer,
    NoVm,
    Vm { state: String, detail: String },
}

/// One host, looked at once.
#[derive(Clone, Debug)]
pub(super) struct Sight {
    pub told: Told,
    /// Processes.
    pub qemus: usize,
    /// The VM's folder, with its sockets.
    pub folder: bool,
}

impl Told {
    fn state(&self) -> Option<&str> {
        match self {
            Self::Vm { state, .. } => Some(state),
            _ => None,
        }
    }

    fn is_alive(&self) -> bool {
        self.state().is_some_and(|state| !matches!(state, "ended" | "stranded" | "shutdown"))
    }
}

/// Where the guest is; or what is not settled yet. What is left at the source of a guest that waits for ever may be told
/// there.
pub(super) fn settled(sights: &[Sight; 2], may_wait_for_ever: bool) -> Result<Found, String> {
    const HOSTS: [&str; 2] = ["alpha", "beta"];
    let mut unsettled = Vec::new();
    for (sight, host) in sights.iter().zip(HOSTS) {
        match &sight.told {
            Told::NoAnswer => unsettled.push(format!("the agent of {host} does not answer")),
            Told::NoVm if sight.qemus > 0 => unsettled.push(format!("{host} has no VM, but a QEMU")),
            // Its main loop may be what waits, so that it tells nothing any more.
            Told::Vm { state, .. } if may_wait_for_ever && host == HOSTS[BETA] && state == "unknown" => {}
            Told::Vm { state, detail } if !is_final(state) => {
                unsettled.push(format!("it is {state} on {host} ({detail})"));
            }
            Told::Vm { state, .. } if state == "ended" && sight.qemus > 0 => {
                unsettled.push(format!("it is {state} on {host}, but its QEMU is there"));
            }
            _ => {}
        }
    }
    let owner = sights.iter().position(|sight| sight.told.is_alive());
    if let Some(owner) = owner
        && sights[1 - owner].told != Told::NoVm
        && sights[1 - owner].told != Told::NoAnswer
        && !(may_wait_for_ever && owner == BETA && !sights[ALPHA].told.is_alive())
    {
        unsettled.push(format!("both hosts have it: {:?} and {:?}", sights[0].told, sights[1].told));
    }
    match (unsettled.is_empty(), owner) {
        (false, _) => Err(unsettled.join("; ")),
        (true, None) => Ok(Found::Gone),
        (true, Some(owner)) if sights[owner].told.state() == Some("paused") => Ok(Found::Paused(owner)),
        (true, Some(owner)) => Ok(Found::Runs(owner)),
    }
}

fn is_final(state: &str) -> bool {
    matches!(state, "running" | "paused" | "ended" | "stranded" | "shutdown")
}

/// What the guest's heart tells that must not be.
pub(super) fn heart_disease(log: &GuestLog, may_reboot: bool) -> Option<String> {
    let beats = log.beats();
    // Two in a row: the end of a line that was cut off can look like a smaller number.
    let rebooted = beats.windows(3).any(|beats| beats[1].n < beats[0].n && beats[2].n < beats[0].n);
    if rebooted && !may_reboot {
        return Some("the guest's kernel rebooted".into());
    }
    if rebooted {
        return None;
    }
    let first_there = beats.iter().find(|beat| beat.host == BETA)?;
    // What came after it on the source was emitted before it, however late it was read, if its number is smaller.
    let also_here = beats.iter().chain(log.late()).filter(|beat| beat.host == ALPHA && beat.n >= first_there.n);
    match also_here.count() {
        0..3 => None,
        beats => Some(format!("it went on to beat at the source after it ran at the destination: {beats} times")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kill(host: usize, when: When, in_post_copy: bool) -> Kill {
        Kill { host, when, in_post_copy }
    }

    fn story(kills: &[Kill]) -> Story {
        let (may_have_ended, was_stopped, paused, exit_code) = (false, false, None, None);
        let engine = Engine::External;
        Story { engine, kills: kills.into(), committed: false, may_have_ended, was_stopped, paused, exit_code }
    }

    #[test]
    fn a_guest_is_lost_only_with_the_qemu_that_has_it() {
        use Engine::{External, Qemu};
        use When::{After, Around, Before};
        for (host, when, engine, post_copy, committed, lost) in [
            (ALPHA, Before, External, false, false, true),
            (ALPHA, Around, Qemu, false, false, true),
            (ALPHA, Around, Qemu, false, true, false),
            (ALPHA, After, Qemu, false, true, false),
            (ALPHA, After, Qemu, true, true, true),
            (ALPHA, After, External, true, true, false),
            (BETA, Before, Qemu, true, true, false),
            (BETA, Around, External, true, false, false),
            (BETA, Around, External, false, true, true),
            (BETA, After, External, false, true, true),
        ] {
            let kill = kill(host, when, post_copy);
            assert_eq!(is_lost_by_its_qemus_death(kill, engine, committed), lost, "{kill:?} {engine:?} {committed}");
        }
    }

    #[test]
    fn a_guest_that_is_gone_without_reason_is_a_failure() {
        assert!(judge(&story(&[]), Found::Gone).is_err());
        assert!(judge(&story(&[kill(BETA, When::Before, false)]), Found::Gone).is_err());
        let lost = story(&[kill(ALPHA, When::Before, false)]);
        assert_eq!(judge(&lost, Found::Gone), Ok(Outcome::LostByItsQemusDeath));
        let ended = Story { may_have_ended: true, ..story(&[]) };
        assert_eq!(judge(&ended, Found::Gone), Ok(Outcome::EndedByItsUser));
    }

    #[test]
    fn what_its_user_did_and_was_told_must_be_true() {
        let told = |exit_code| Story { exit_code: Some(exit_code), ..story(&[]) };
        assert_eq!(judge(&told(0), Found::Runs(BETA)), Ok(Outcome::Moved));
        assert!(judge(&told(0), Found::Runs(ALPHA)).is_err());
        assert_eq!(judge(&told(4), Found::Runs(ALPHA)), Ok(Outcome::Stayed));
        assert!(judge(&told(4), Found::Runs(BETA)).is_err());
        assert!(judge(&story(&[]), Found::Paused(ALPHA)).is_err());
        let paused = |paused| Story { paused: Some(paused), ..story(&[]) };
        assert!(judge(&paused(Paused::Surely), Found::Runs(BETA)).is_err());
        assert_eq!(judge(&paused(Paused::Perhaps), Found::Runs(BETA)), Ok(Outcome::Moved));
        assert_eq!(judge(&paused(Paused::Surely), Found::Paused(BETA)), Ok(Outcome::Moved));
        assert!(judge(&Story { was_stopped: true, ..story(&[]) }, Found::Runs(ALPHA)).is_err());
    }

    #[test]
    fn it_is_settled_when_one_host_has_it_and_the_other_nothing() {
        let vm = |state: &str| {
            let told = Told::Vm { state: state.into(), detail: String::new() };
            Sight { told, qemus: usize::from(state != "ended"), folder: true }
        };
        let none = || Sight { told: Told::NoVm, qemus: 0, folder: false };
        assert_eq!(settled(&[vm("running"), none()], false), Ok(Found::Runs(ALPHA)));
        assert_eq!(settled(&[none(), vm("paused")], false), Ok(Found::Paused(BETA)));
        assert_eq!(settled(&[none(), none()], false), Ok(Found::Gone));
        assert_eq!(settled(&[vm("stranded"), vm("ended")], false), Ok(Found::Gone));
        assert_eq!(settled(&[vm("ended"), vm("running")], true), Ok(Found::Runs(BETA)));
        for (alpha, beta) in [
            (vm("running"), vm("running")),
            (vm("stranded"), vm("running")),
            (vm("ended"), vm("running")),
            (vm("running"), vm("incoming")),
            (vm("in-doubt"), none()),
            (vm("running"), Sight { qemus: 1, ..none() }),
            (vm("running"), Sight { told: Told::NoAnswer, ..none() }),
        ] {
            assert!(settled(&[alpha.clone(), beta.clone()], false).is_err(), "{alpha:?} {beta:?}");
        }
    }

    #[test]
    fn a_heart_that_beats_on_both_hosts_is_told_from_one_that_is_heard_late() {
        let at = std::time::Instant::now();
        let log = |said: &[(usize, u64)]| {
            let mut log = GuestLog::new();
            for (host, n) in said {
                log.feed(*host, at, format!("{{\"beat\":{n}}}\n").as_bytes());
            }
            log
        };
        let late = [(0, 1), (0, 2), (1, 9), (1, 10), (0, 3), (0, 4), (0, 5), (1, 11)];
        assert_eq!(heart_disease(&log(&late), false), None);
        let twice = [(0, 1), (0, 2), (1, 3), (0, 3), (1, 4), (0, 4), (1, 5), (0, 5), (1, 6)];
        assert!(heart_disease(&log(&twice), false).is_some_and(|disease| disease.contains("3 times")));
        let rebooted = [(0, 700), (0, 701), (0, 0), (0, 1), (1, 2)];
        assert!(heart_disease(&log(&rebooted), false).is_some());
        assert_eq!(heart_disease(&log(&rebooted), true), None);
    }
}
