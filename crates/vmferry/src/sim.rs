//! `vmferry sim`: policies beside each other, on migrations that are only reckoned.

use vmferry_api::Prefer;
use vmferry_policy::{Limits, Percent, Preference};
use vmferry_sim::{Case, Contestant, Table, cases, contestants, play, published};

use crate::cli::SimOptions;
use crate::failure::Failure;
use crate::trace;
use crate::vms::print_json;

pub(crate) fn run(options: &SimOptions) -> Result<(), Failure> {
    let limits = Limits {
        downtime: options.downtime,
        max_time: options.max_time,
        post_copy: !options.no_post_copy,
        slow: Percent(options.slow),
        prefer: match options.prefer {
            Prefer::Short => Preference::Short,
            Prefer::Gentle => Preference::Gentle,
        },
        ..Limits::default()
    };
    let by = wanted(&options.policy)?;
    let count = if options.replay { 1 } else { options.cases };
    let cases: Vec<Case> = match &options.trace {
        Some(path) => trace::cases(path, options.seed, count, limits)?,
        None if options.published => {
            (options.seed..options.seed.saturating_add(count)).map(|seed| published(seed, limits)).collect()
        }
        None => cases(options.seed, count, limits).collect(),
    };
    if options.replay {
        for case in &cases {
            replay(case, &by);
        }
        return Ok(());
    }
    let table = Table::of(&cases, &by, options.hindsight);
    if let Some(path) = &options.page {
        let asked = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        let page = table.page(&format!("vmferry {asked}"));
        std::fs::write(path, page).map_err(|source| Failure::Report { path: path.clone(), source })?;
    }
    if options.json {
        print_json(&table);
        return Ok(());
    }
    print!("{table}");
    println!("\nthe worst of each, {}", if options.hindsight { "beside the best in hindsight" } else { "by harm" });
    for row in &table.rows {
        let worst: Vec<String> = row.worst.iter().map(|(name, how)| format!("{name} ({how:.1})")).collect();
        println!("  {:<26}{}", row.policy, worst.join("; "));
    }
    Ok(())
}

/// Those of these names; all when none is named.
fn wanted(names: &[String]) -> Result<Vec<Contestant>, Failure> {
    let all = contestants();
    let wanted = names.iter().map(|name| {
        let known = || all.iter().map(|it| it.name).collect::<Vec<_>>().join(", ");
        let found = all.iter().find(|it| it.name == name).copied();
        found.ok_or_else(|| Failure::NoPolicy { name: name.clone(), known: known() })
    });
    match names {
        [] => Ok(all.clone()),
        _ => wanted.collect(),
    }
}

fn replay(case: &Case, by: &[Contestant]) {
    println!("{}", case.name);
    for by in by {
        let outcome = play(case, by);
        println!("\n{}: {:?}", by.name, outcome.end);
        for words in &outcome.words {
            println!("  {words}");
        }
        for (at, round, action) in &outcome.actions {
            println!("  {at:.1} s, round {round}: {action:?}");
        }
        let felt = outcome.felt;
        println!(
            "  total {:.1} s, downtime {:.0} ms, stall {:.0} ms, {:.2} s of work lost, {:.1} s at risk; harm {:.2}",
            felt.total,
            felt.downtime * 1e3,
            felt.stall * 1e3,
            felt.lost,
            felt.at_risk,
            felt.harm(case.limits.prefer)
        );
    }
}
