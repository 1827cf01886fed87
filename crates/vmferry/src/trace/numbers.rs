//! The numbers of a recorded guest that the model takes: what is missing, no number, or makes no sense is refused by its name,
//! as a file may have been written by anybody.

use std::ops::RangeInclusive;

use serde_json::Value;

/// More memory than this no machine has, in bytes.
const MEMORY: f64 = (1u64 << 48) as f64;
/// Faster than this is no link, in bytes a second.
const FASTEST: f64 = 1e12;
/// A round or a watch of ten days, and a way there and back of ten minutes, in ms.
const LONGEST: f64 = 10.0 * 86_400_000.0;
const FARTHEST: f64 = 600_000.0;
/// Less is nothing, in ms.
const SHORTEST: f64 = 1e-3;

type Number = (&'static str, RangeInclusive<f64>);

/// Of what `vmferry predict --json` says. `[]` is each of a list.
const OF_A_PLAN: [Number; 7] = [
    ("ram_bytes", 4096.0..=MEMORY),
    ("ram_used_bytes", 4096.0..=MEMORY),
    ("prediction.link_rate", 1.0..=FASTEST),
    // 0 is for what nobody has measured.
    ("prediction.round_trip_ms", 0.0..=FARTHEST),
    ("prediction.watched.in_use", 0.0..=MEMORY),
    ("prediction.watched.written[].ms", SHORTEST..=LONGEST),
    ("prediction.watched.written[].bytes", 0.0..=MEMORY),
];
/// Of what `vmferry migrate --record` writes. The last round has no end, and what was sent in none has no rate.
const OF_A_REPORT: [Number; 6] = [
    ("settings.ram", 0.0..=MEMORY),
    ("settings.vcpus", 0.0..=4096.0),
    ("rounds[].ms", 0.0..=LONGEST),
    ("rounds[].remaining", 0.0..=MEMORY),
    ("rounds[].link_rate", 0.0..=FASTEST),
    ("rounds[].throttle", 0.0..=100.0),
];

/// What is wrong with the first of these numbers that is wrong.
pub(super) fn of_a_plan(plan: &Value) -> Result<(), String> {
    // One that does not watch tells nothing of its own, and is refused for that.
    let is_there = |path: &&Number| !path.0.starts_with("prediction") || !plan["prediction"].is_null();
    OF_A_PLAN.iter().filter(is_there).try_for_each(|(path, sane)| check(plan, path, path, sane))
}

/// The same of a report.
pub(super) fn of_a_report(report: &Value) -> Result<(), String> {
    OF_A_REPORT.iter().try_for_each(|(path, sane)| check(report, path, path, sane))
}

/// `rest` leads from here; `path` is what it is called.
fn check(here: &Value, rest: &str, path: &str, sane: &RangeInclusive<f64>) -> Result<(), String> {
    let (step, rest) = rest.split_once('.').unwrap_or((rest, ""));
    let (key, is_list) = step.strip_suffix("[]").map_or((step, false), |key| (key, true));
    let there = here.get(key).ok_or_else(|| format!("{path} is missing"))?;
    match there.as_array() {
        Some(all) if is_list => {
            let each = |(at, it): (usize, &Value)| check(it, rest, &path.replacen("[]", &format!("[{at}]"), 1), sane);
            all.iter().enumerate().try_for_each(each)
        }
        None if is_list => Err(format!("{} is no list", path.split("[]").next().unwrap_or(path))),
        _ if rest.is_empty() => match there.as_f64() {
            Some(number) if sane.contains(&number) => Ok(()),
            Some(number) => {
                Err(format!("{path} is {number}, and makes sense from {} to {:e}", sane.start(), sane.end()))
            }
            None => Err(format!("{path} is no number: {there}")),
        },
        _ => check(there, rest, path, sane),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan() -> Value {
        let written = json!([{"ms": 100.0, "bytes": 4096}, {"ms": 3000.0, "bytes": 8192}]);
        let watched = json!({"in_use": 1 << 29, "written": written});
        let prediction = json!({"link_rate": 1 << 27, "round_trip_ms": 0.4, "watched": watched});
        json!({"ram_bytes": 1u64 << 30, "ram_used_bytes": 1u64 << 29, "prediction": prediction})
    }

    fn report() -> Value {
        let round = json!({"ms": 500.0, "remaining": 1 << 28, "link_rate": 1 << 27, "throttle": 0});
        json!({"settings": {"ram": 1u64 << 30, "vcpus": 2}, "rounds": [round.clone(), round]})
    }

    /// How a sound one is made, what looks at it, and at which numbers.
    type Whole = (fn() -> Value, fn(&Value) -> Result<(), String>, &'static [Number]);

    /// The place of the last of what this leads to.
    fn at<'a>(value: &'a mut Value, path: &str) -> &'a mut Value {
        path.split('.').fold(value, |here, step| match step.strip_suffix("[]") {
            Some(key) => &mut here[key][1],
            None => &mut here[step],
        })
    }

    #[test]
    fn each_number_that_is_missing_or_makes_no_sense_is_refused_by_its_name() {
        assert_eq!((of_a_plan(&plan()), of_a_report(&report())), (Ok(()), Ok(())));
        let wholes: [Whole; 2] = [(plan, of_a_plan, &OF_A_PLAN), (report, of_a_report, &OF_A_REPORT)];
        for (make, check, numbers) in wholes {
            for (path, sane) in numbers {
                let name = path.replace("[]", "[1]");
                let mut bad = vec![json!(-1.0), json!(-1e300), json!(1e300), json!(null), json!("7"), json!([7])];
                if *sane.start() > 0.0 {
                    bad.push(json!(0));
                }
                for value in bad {
                    let mut whole = make();
                    *at(&mut whole, path) = value.clone();
                    let refused = check(&whole).expect_err(path);
                    assert!(refused.starts_with(&name), "{path}, {value}: {refused}");
                }
                let mut whole = make();
                let (parent, key) = path.rsplit_once('.').unwrap_or(("", path));
                let parent = if parent.is_empty() { &mut whole } else { at(&mut whole, parent) };
                parent.as_object_mut().expect("an object").remove(key);
                assert_eq!(check(&whole), Err(format!("{name} is missing")), "{path}");
            }
        }
    }

    #[test]
    fn a_plan_that_predicts_nothing_is_refused_for_nothing_but_that() {
        let mut plan = plan();
        plan["prediction"] = Value::Null;
        assert_eq!(of_a_plan(&plan), Ok(()));
    }
}
