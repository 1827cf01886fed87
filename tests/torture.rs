//! The torture: migrations in which agents and QEMUs are killed and stand still, links are cut, disks are full, and users
//! do what they like, all at random moments. Whatever happens, the guest ends up once, whole, and where its agent says.
//!
//! Each run follows from a seed ([`plan`]). `make test` has ten of them; `make torture` goes on with others, and
//! `make torture SEED=…` repeats one. What strikes when is the seed's; what the machine does at that moment is not.

mod aftermath;
mod monitors;
mod plan;
mod run;
mod strikes;
mod table;
mod verdict;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use plan::Plan;
use run::Ended;
use table::Table;

/// No run may take longer, whatever hangs.
const LONGEST: Duration = Duration::from_secs(170);

/// One run in a task of its own, so that what panics there is one more way to fail. None when the user interrupts it.
async fn run_of(plan: &Plan) -> Option<Ended> {
    let failed = |why: String| Ended { outcome: Err(why), settled: None, notes: Vec::new(), logs: String::new() };
    let of = plan.clone();
    let mut task = tokio::spawn(async move { aftermath::run(&of).await });
    let interrupted = tokio::select! {
        ended = &mut task => {
            return Some(ended.unwrap_or_else(|panic| failed(match panic.into_panic().downcast::<String>() {
                Ok(message) => *message,
                Err(_) => "it panicked".into(),
            })));
        }
        () = tokio::time::sleep(LONGEST) => false,
        _ = tokio::signal::ctrl_c() => true,
    };
    // Its hosts end with it, before this goes on; that it was aborted is known.
    task.abort();
    let _ = task.await;
    (!interrupted).then(|| failed(format!("it was not over after {} s", LONGEST.as_secs())))
}

/// The run in one line; if it failed, with the means to find out why.
fn in_words(plan: &Plan, ended: &Ended) -> String {
    let settled =
        ended.settled.map_or("not settled".into(), |took| format!("settled after {:.1} s", took.as_secs_f64()));
    let notes = match ended.notes.as_slice() {
        [] => String::new(),
        notes => format!(" ({})", notes.join("; ")),
    };
    match &ended.outcome {
        Ok(outcome) => format!("seed {}: {plan} -> {}, {settled}{notes}", plan.seed, outcome.in_words()),
        Err(why) => format!(
            "seed {}: {plan} -> FAILED, {settled}{notes}: {why}\n{}\nagain: make torture SEED={}",
            plan.seed, ended.logs, plan.seed
        ),
    }
}

/// Printed and written to a file.
struct Record {
    file: std::fs::File,
}

impl Record {
    fn begin() -> (Self, PathBuf) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/torture");
        std::fs::create_dir_all(&folder).expect("target/ can be written to");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_secs();
        let date = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(now)).to_string();
        let path = folder.join(format!("{}.txt", date.replace(':', "-")));
        (Self { file: std::fs::File::create(&path).expect("target/ can be written to") }, path)
    }

    fn say(&mut self, text: &str) {
        println!("{text}");
        writeln!(self.file, "{text}").expect("target/ can be written to");
    }
}

/// Those of `make test`: each party dies, the link is cut and disks are full, with both engines.
mod the_guest_ends_up_once {
    use super::{Plan, in_words, run_of};

    macro_rules! seeds {
        ($($name:ident: $seed:literal;)*) => {
            const SEEDS: &[u64] = &[$($seed),*];
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    let plan = Plan::draw($seed);
                    let ended = run_of(&plan).await.expect("nobody interrupts it");
                    let said = in_words(&plan, &ended);
                    println!("{said}");
                    assert!(ended.outcome.is_ok(), "{said}");
                }
            )*
        };
    }

    seeds! {
        with_seed_21: 21;
        with_seed_39: 39;
        with_seed_123: 123;
        with_seed_166: 166;
        with_seed_265: 265;
        with_seed_266: 266;
        with_seed_310: 310;
        with_seed_334: 334;
        with_seed_627: 627;
        with_seed_701: 701;
    }

    #[test]
    fn with_seeds_that_differ_in_what_matters() {
        let plans: Vec<Plan> = SEEDS.iter().map(|seed| Plan::draw(*seed)).collect();
        let faults = plans.iter().flat_map(|plan| &plan.strikes).map(|strike| strike.fault.name());
        let faults: std::collections::BTreeSet<_> = faults.collect();
        for fault in [
            "kill source's agent",
            "kill destination's agent",
            "kill both agents",
            "kill source's QEMU",
            "kill destination's QEMU",
            "freeze destination's agent",
            "cut the link",
            "fill source's disk",
            "fill destination's disk",
        ] {
            assert!(faults.contains(fault), "{fault}");
        }
        let engines: std::collections::BTreeSet<_> = plans.iter().map(|plan| plan.engine).collect();
        assert_eq!(engines.len(), 2);
    }
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok().filter(|value| !value.is_empty())?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is a number, not {value:?}")))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes as long as it is told to: make torture"]
async fn whatever_strikes_the_guest_ends_up_once() {
    let (first, count) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (number("FIRST").unwrap_or(1000), number("SEEDS").unwrap_or(300)),
    };
    let minutes = number("MINUTES").unwrap_or(u64::MAX);
    let (mut record, path) = Record::begin();
    let (mut table, begun) = (Table::default(), Instant::now());
    for seed in (first..).take(count as usize) {
        if begun.elapsed().as_secs() / 60 >= minutes {
            break;
        }
        let plan = Plan::draw(seed);
        let Some(ended) = run_of(&plan).await else { break };
        record.say(&in_words(&plan, &ended));
        table.add(&plan, &ended);
    }
    record.say(&format!("\n{}", table.in_words()));
    println!("all of it is in {}", path.display());
    assert!(table.failed.is_empty(), "{} of {} runs failed", table.failed.len(), table.runs);
}
