//! Real runs beside the same migrations in the simulator: a test fails when they drift apart.

use vmferry_policy::{LeastHarm, Limits};
use vmferry_sim::{End, Engine, Guest, Link, run};

const MIB: f64 = 1_048_576.0;
/// What planning, the destination's QEMU, and retiring the source's take of what was measured, in seconds.
const AROUND: f64 = 0.5;
/// How far the simulator may be off.
const OFF: f64 = 0.15;
/// In seconds of downtime: runs of one set-up differ by more than that (paced under TCG: 35, 60, 63 and 72 ms).
const UNSURE: f64 = 0.015;
/// A guest under TCG feels its code being translated anew at the destination, in seconds: with the agents, whose idle guests
/// feel 48 ms under it and 17 under KVM, and with QEMU.
const EMULATED: [f64; 2] = [0.035, 0.18];

/// A row of docs/FIGURES.md: a guest of 1 GiB over 1 Gbit/s; what it wrote, MiB that are not zero and written MiB/s.
struct Real {
    what: &'static str,
    guest: fn(f64, f64, f64, f64) -> Guest,
    used: f64,
    rate: f64,
    engine: Engine,
    post_copy: bool,
    under_tcg: bool,
    /// Seconds.
    total: f64,
    /// Seconds as the guest felt it; none where the policy of that day allowed another.
    downtime: Option<f64>,
}

/// "The engines side by side, later" and, of the writing guest by the agents under TCG, "Where the time of a fault goes".
fn measured() -> Vec<Real> {
    let [agents, qemu] = [Engine::external(), Engine::qemu()];
    let row = |what, guest, engine, under_tcg, total, downtime| {
        let (used, rate) = match (what, under_tcg) {
            ("hot and cold", true) => (600.0, 48.0),
            ("hot and cold", false) => (513.0, 48.0),
            (_, true) => (600.0, 660.0),
            (_, false) => (513.0, 3000.0),
        };
        Real { what, guest, used, rate, engine, post_copy: what != "paced", under_tcg, total, downtime }
    };
    vec![
        row("writing", Guest::sweep, agents, true, 6.12, Some(0.068)),
        row("writing", Guest::sweep, agents, false, 5.45, Some(0.032)),
        row("hot and cold", Guest::hot_cold, agents, true, 6.67, Some(0.075)),
        row("hot and cold", Guest::hot_cold, agents, false, 5.81, Some(0.034)),
        row("paced", Guest::sweep, agents, true, 6.39, Some(0.062)),
        row("paced", Guest::sweep, agents, false, 5.79, Some(0.037)),
        row("writing", Guest::sweep, qemu, true, 11.37, Some(0.395)),
        row("writing", Guest::sweep, qemu, false, 11.58, Some(0.212)),
        row("hot and cold", Guest::hot_cold, qemu, true, 7.45, None),
        row("hot and cold", Guest::hot_cold, qemu, false, 6.60, None),
    ]
}

#[test]
fn what_was_measured_comes_out_of_the_simulator_too() {
    let mut off = Vec::new();
    for real in measured() {
        let guest =
            Guest { processors: 1.0, ..(real.guest)(1024.0 * MIB, real.used * MIB, 512.0 * MIB, real.rate * MIB) };
        let link = Link { round_trip: 0.0002, ..Link::steady(1000.0) };
        let usual = Limits::default();
        let limits = if real.post_copy { usual } else { usual.without_post_copy() };
        let outcome = run(&guest, &link, real.engine, limits, 1, None, &mut LeastHarm::default());
        assert_eq!(outcome.end, End::Completed);
        let emulated = if real.under_tcg { EMULATED[usize::from(real.engine == Engine::qemu())] } else { 0.0 };
        let (total, downtime) = (outcome.felt.total + AROUND, outcome.felt.downtime + emulated);
        let wrong = |simulated: f64, real: f64, least: f64| (simulated - real).abs() > (real * OFF).max(least);
        let told = format!(
            "{} by {:?}, TCG {}: {total:.2} s, measured {:.2}; {:.0} ms, measured {:?}",
            real.what,
            real.engine.kind,
            real.under_tcg,
            real.total,
            downtime * 1e3,
            real.downtime.map(|it| it * 1e3)
        );
        println!("{told}");
        if wrong(total, real.total, 0.0) || real.downtime.is_some_and(|real| wrong(downtime, real, UNSURE)) {
            off.push(told);
        }
    }
    assert!(off.is_empty(), "further off than 15 %:\n{}", off.join("\n"));
}
