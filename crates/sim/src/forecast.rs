//! What a migration would do: it is played with the guest as it was seen, by the policy that will decide.
//!
//! Each is played with the luckiest, the likeliest and the unluckiest of what is not known of the guest ([`Luck`]) and of
//! the link, and each of these nine with several seeds. The likeliest of the figures are those of one play, the median by
//! its total of those with the likeliest guest and link; the range is that of all plays.

use vmferry_policy::{Action, BytesPerSec, Limits, Percent, Policy, Range};

use crate::observed::{Luck, Observed};
use crate::{End, Engine, Link, Outcome, run};

/// What a forecast is made from.
#[derive(Clone, Debug)]
pub struct Given {
    /// What was seen of the guest.
    pub observed: Observed,
    /// What the link carries, in bytes a second.
    pub rate: Range,
    /// There and back, in seconds.
    pub round_trip: f64,
    /// What the engine costs.
    pub engine: Engine,
    /// What the user allows.
    pub limits: Limits,
}

/// How the guest would get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// In rounds, while it runs.
    PreCopy,
    /// In rounds, its writes held to this share of what the link carries.
    Paced(Percent),
    /// In rounds, its processors slowed by this share.
    Slowed(Percent),
    /// The rest while it stands still, as nothing else helps.
    Paused,
    /// It runs there before all of its memory is there.
    PostCopy,
    /// It stays, as nothing keeps the limits.
    GivesUp,
    /// It would not be done in any time worth waiting for.
    NotDone,
}

/// What a migration would do, in seconds and bytes, from the beginning of the copy.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// How it would be done.
    pub method: Method,
    /// How else, if things turn out otherwise than is likeliest.
    pub or: Vec<Method>,
    /// From the beginning of the copy to its end.
    pub total: Range,
    /// Nobody runs the guest.
    pub downtime: Range,
    /// The longest wait of the running guest.
    pub stall: Range,
    /// Work that the guest does not do while it runs.
    pub lost: Range,
    /// In post-copy.
    pub at_risk: Range,
    /// Sent.
    pub bytes: Range,
    /// Rounds of pre-copy in the likeliest case.
    pub rounds: u32,
    /// The decisions of that, in words.
    pub words: Vec<String>,
}

/// How often the likeliest is played, and how often each of the others.
const SEEDS: (u64, u64) = (5, 1);

/// What takes longer than this only to be sent once, in seconds, is not played: that would itself take minutes.
const LONGEST: f64 = 4.0 * 3600.0;

impl Forecast {
    /// Nothing is known of it but how long and how much it is to send all once.
    fn not_done(once: f64, used: f64) -> Self {
        let nothing = Range::default();
        Self {
            method: Method::NotDone,
            or: Vec::new(),
            total: Range { low: once, mid: once, high: once },
            downtime: nothing,
            stall: nothing,
            lost: nothing,
            at_risk: nothing,
            bytes: Range { low: used, mid: used, high: used },
            rounds: 0,
            words: Vec::new(),
        }
    }
}

/// See the module's text. `policy` makes one that has decided nothing yet.
pub fn forecast(given: &Given, policy: impl Fn() -> Box<dyn Policy>) -> Forecast {
    let once = given.observed.used / given.rate.mid.max(1.0);
    if once > LONGEST {
        return Forecast::not_done(once, given.observed.used);
    }
    let play = |luck: Luck, rate: f64, seed: u64| {
        // The worst of the range is no slower than a tenth of the likeliest.
        let link = Link {
            rate: rate.max(given.rate.mid / 10.0).max(1.0),
            round_trip: given.round_trip.max(0.0),
            changes: Vec::new(),
        };
        let guest = given.observed.guest(luck);
        run(&guest, &link, given.engine, given.limits, seed, None::<BytesPerSec>, &mut *policy())
    };
    let mut likeliest: Vec<Outcome> = (0..SEEDS.0).map(|seed| play(Luck::Usual, given.rate.mid, seed + 1)).collect();
    likeliest.sort_by(|a, b| a.felt.total.total_cmp(&b.felt.total));
    let others = [Luck::Good, Luck::Usual, Luck::Bad].into_iter().flat_map(|luck| {
        let rates = [given.rate.low, given.rate.mid, given.rate.high];
        rates.into_iter().flat_map(move |rate| (0..SEEDS.1).map(move |seed| (luck, rate, seed)))
    });
    let others: Vec<Outcome> = others.map(|(luck, rate, seed)| play(luck, rate, seed + 100)).collect();
    let median = &likeliest[likeliest.len() / 2];
    let method = method(median);
    let mut or = Vec::new();
    for other in likeliest.iter().chain(&others).map(self::method) {
        let is_new = |known: &Method| std::mem::discriminant(known) != std::mem::discriminant(&other);
        if [method].iter().chain(&or).all(is_new) {
            or.push(other);
        }
    }
    let range = |of: fn(&Outcome) -> f64| {
        let all = || likeliest.iter().chain(&others).map(of);
        Range { low: all().fold(f64::INFINITY, f64::min), mid: of(median), high: all().fold(0.0, f64::max) }
    };
    Forecast {
        method,
        or,
        total: range(|it| it.felt.total),
        downtime: range(|it| it.felt.downtime),
        stall: range(|it| it.felt.stall),
        lost: range(|it| it.felt.lost),
        at_risk: range(|it| it.felt.at_risk),
        bytes: range(|it| it.bytes),
        rounds: median.rounds,
        words: median.words.clone(),
    }
}

fn method(outcome: &Outcome) -> Method {
    match outcome.end {
        End::GaveUp => return Method::GivesUp,
        End::TooLong => return Method::NotDone,
        End::Completed => {}
    }
    let mut method = Method::PreCopy;
    for (_, _, action) in &outcome.actions {
        method = match action {
            Action::PostCopy => return Method::PostCopy,
            Action::Pace(share) => Method::Paced(*share),
            Action::Throttle(share) => match method {
                Method::Slowed(most) if most > *share => method,
                _ => Method::Slowed(*share),
            },
            Action::Pause => Method::Paused,
            Action::Continue | Action::Allow(_) | Action::GiveUp(_) => method,
        };
    }
    method
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PreCopy => write!(f, "pre-copy"),
            Self::Paced(share) => write!(f, "pre-copy, with its writes held to {} % of the link", share.0),
            Self::Slowed(share) => write!(f, "pre-copy, slowed by up to {} %", share.0),
            Self::Paused => write!(f, "pre-copy, then paused until the rest is there"),
            Self::PostCopy => write!(f, "pre-copy, then post-copy"),
            Self::GivesUp => write!(f, "given up"),
            Self::NotDone => write!(f, "not done"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{GIB, MIB};
    use crate::observed::{Since, Written};
    use std::time::Duration;
    use vmferry_policy::{LeastHarm, Otherwise};

    fn given(curve: impl Fn(f64) -> f64) -> Given {
        let times = (1..=12).map(|step| f64::from(step * step) / 144.0 * 3.0);
        let since = Since::Beginning;
        let written = times.map(|after| Written { after, bytes: curve(after), since }).collect();
        Given {
            observed: Observed { ram: 2.0 * GIB, used: 1.0 * GIB, written, processors: 1.0 },
            rate: Range { low: 108.0 * MIB, mid: 114.0 * MIB, high: 120.0 * MIB },
            round_trip: 0.0005,
            engine: Engine::external(),
            limits: Limits::default(),
        }
    }

    fn ours(given: &Given) -> Forecast {
        forecast(given, || Box::<LeastHarm>::default())
    }

    #[test]
    fn an_idle_guest_takes_as_long_as_its_memory_and_is_hardly_felt() {
        let forecast = ours(&given(|_| MIB));
        assert_eq!((forecast.method, forecast.or.as_slice()), (Method::PreCopy, &[][..]));
        assert!((8.5..10.0).contains(&forecast.total.mid), "1 GiB at 114 MiB/s: {forecast:?}");
        assert!(forecast.total.low < forecast.total.mid && forecast.total.mid < forecast.total.high);
        assert!(forecast.downtime.high < 0.1 && forecast.at_risk.high == 0.0, "{forecast:?}");
        assert!((1.0..1.1).contains(&(forecast.bytes.mid / GIB)), "{forecast:?}");
    }

    #[test]
    fn a_guest_that_outruns_the_link_goes_by_what_is_allowed_and_that_is_said() {
        let wild = given(|t| (600.0 * MIB * t).min(900.0 * MIB));
        let forecast = ours(&wild);
        assert_eq!(forecast.method, Method::PostCopy);
        assert!(forecast.at_risk.mid > 1.0 && forecast.downtime.mid < 0.1, "{forecast:?}");
        let limits = Limits { post_copy: false, ..Limits::default() };
        let paced = ours(&Given { limits, ..wild.clone() });
        assert!(matches!(paced.method, Method::Paced(_)), "{paced:?}");
        let limits = Limits { slow: Percent(0), otherwise: Otherwise::GiveUp, ..limits };
        assert_eq!(ours(&Given { limits, ..wild }).method, Method::GivesUp);
    }

    #[test]
    fn what_was_not_seen_makes_the_range_wider() {
        let sure = ours(&given(|t| (30.0 * MIB * t).min(30.0 * MIB)));
        let unsure = ours(&given(|t| 30.0 * MIB * t));
        let unknown = Given { observed: Observed { written: vec![], ..given(|_| 0.0).observed }, ..given(|_| 0.0) };
        let width = |it: &Forecast| it.total.high / it.total.low;
        let unknown = ours(&unknown);
        assert!(width(&sure) < width(&unsure) && width(&unsure) < width(&unknown), "{sure:?} {unsure:?} {unknown:?}");
        assert!(unknown.or.contains(&Method::PostCopy), "{unknown:?}");
    }

    #[test]
    fn the_range_holds_what_becomes_of_a_guest_that_is_played_as_it_is() {
        for rate in [20.0, 60.0, 100.0, 200.0] {
            let set = 300.0 * MIB;
            let truth = crate::Guest::uniform(2.0 * GIB, 1.0 * GIB, set, rate * MIB);
            let forecast = ours(&given(|t| set * (1.0 - (-t * rate * MIB / set).exp())));
            let link = Link { rate: 114.0 * MIB, round_trip: 0.0005, changes: Vec::new() };
            let (engine, limits) = (Engine::external(), Limits::default());
            let is = run(&truth, &link, engine, limits, 7, None, &mut LeastHarm::default());
            let holds = |range: Range, is: f64| range.low * 0.9 <= is && is <= range.high * 1.1;
            assert!(holds(forecast.total, is.felt.total), "{rate}: {forecast:?}, {is:?}");
            assert!((forecast.total.mid / is.felt.total - 1.0).abs() < 0.2, "{rate}: {forecast:?}, {is:?}");
        }
    }

    #[test]
    fn a_time_that_is_allowed_is_taken_into_account() {
        let limits = Limits { max_time: Some(Duration::from_secs(4)), ..Limits::default() };
        let forecast = ours(&Given { limits, ..given(|_| MIB) });
        assert_eq!(forecast.method, Method::PostCopy, "9 s of copying: {forecast:?}");
    }

    #[test]
    fn what_would_take_days_is_said_to_be_so_and_is_not_played_for_minutes() {
        let begun = std::time::Instant::now();
        for mid in [0.0, 1.0, 30_000.0] {
            let slow = Given { rate: Range { low: 0.0, mid, high: 120.0 * MIB }, ..given(|t| 600.0 * MIB * t) };
            let forecast = ours(&slow);
            assert_eq!((forecast.method, forecast.rounds), (Method::NotDone, 0));
            assert!(forecast.total.mid > LONGEST && forecast.bytes.mid == GIB, "{forecast:?}");
        }
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
}
