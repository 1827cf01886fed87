//! Several migrations from one host: in which order they begin, and which of them side by side.
//!
//! Over a link of rate `b` a guest of `S` bytes that makes pages stale at rate `d` takes about `S / (b - d)`. Of `n` that
//! share the link each takes about `S / (b - n d)`: the last one is done no sooner than in turn, and all others later. So
//! they go one after the other, unless one alone cannot fill the link.
//!
//! Pure: whoever drives them says what is seen.

use std::time::Duration;

use crate::{Bytes, BytesPerSec};

/// A guest that makes less than this share of the link stale is quiet.
const QUIET: f64 = 0.1;
/// Those under way fill their link when they take this share of it.
const FULL: f64 = 0.6;
/// One is held by its cap, and not by the link, when it sends this share of it.
const AT_CAP: f64 = 0.8;

/// So many side by side fill any link, or never will.
const MOST_BESIDE: usize = 4;

/// A migration that has not begun.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Waiting {
    /// The RAM that its guest uses.
    pub ram: Bytes,
    /// How fast the guest makes pages stale, where that is known.
    pub dirty_rate: Option<BytesPerSec>,
}

/// One that has begun, over the same link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UnderWay {
    /// What its engine measures the link to carry for it; none until that is known.
    pub rate: Option<BytesPerSec>,
    /// What its user lets it send.
    pub cap: Option<BytesPerSec>,
    /// Its guest runs at the destination, and waits for pages.
    pub post_copy: bool,
}

impl UnderWay {
    /// It sends what its user lets it: nothing is known of the link but that it carries that.
    pub fn is_held(&self) -> bool {
        let (Some(rate), Some(cap)) = (self.rate, self.cap) else { return false };
        (cap.0 as f64 * AT_CAP..=cap.0 as f64 / AT_CAP).contains(&(rate.0 as f64))
    }
}

/// Why one has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Those under way fill the link, or it is not known that they do not.
    LinkIsTaken,
    /// What they leave of the link is less than this guest makes stale.
    TooLittleIsLeft,
    /// A guest waits for its pages over the same link.
    PostCopy,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LinkIsTaken => "the link is taken",
            Self::TooLittleIsLeft => "what is left of the link is less than its guest writes",
            Self::PostCopy => "a guest waits for its pages over the same link",
        })
    }
}

impl Waiting {
    /// How long it takes on a link of this rate that it has to itself; none when it would not end by rounds alone.
    pub fn takes(&self, link: BytesPerSec) -> Option<Duration> {
        let dirty = self.dirty_rate.unwrap_or_default();
        self.ram.time_at(BytesPerSec(link.0.saturating_sub(dirty.0)))
    }

    /// Quiet ones first; of those that are alike, what takes least.
    fn rank(&self, link: Option<BytesPerSec>) -> (u8, Duration) {
        let loudness = match (self.dirty_rate, link) {
            (None, _) => 1,
            (Some(dirty), Some(link)) if dirty.0 as f64 >= link.0 as f64 * QUIET => 2,
            (Some(dirty), None) if dirty.0 > 0 => 1,
            (Some(_), _) => 0,
        };
        // Any rate sorts them by size where the link's is not known.
        (loudness, self.takes(link.unwrap_or(BytesPerSec(1 << 40))).unwrap_or(Duration::MAX))
    }
}

/// Their indices in the order in which they are to begin, over a link that carries so much, if that is known. Those that
/// are alike keep their order.
pub fn order(waiting: &[Waiting], link: Option<BytesPerSec>) -> Vec<usize> {
    let mut all: Vec<usize> = (0..waiting.len()).collect();
    all.sort_by_key(|index| waiting[*index].rank(link));
    all
}

/// Whether it may begin beside those; the link has been seen to carry so much, if it was seen.
pub fn may_begin(it: &Waiting, beside: &[UnderWay], link: Option<BytesPerSec>) -> Result<(), Why> {
    if beside.iter().any(|it| it.post_copy) {
        return Err(Why::PostCopy);
    }
    if beside.is_empty() {
        return Ok(());
    }
    if beside.len() >= MOST_BESIDE {
        return Err(Why::LinkIsTaken);
    }
    let Some(rates) = beside.iter().map(|it| it.rate).collect::<Option<Vec<_>>>() else {
        return Err(Why::LinkIsTaken);
    };
    let all_held = beside.iter().all(UnderWay::is_held);
    let taken: u64 = rates.iter().map(|rate| rate.0).fold(0, u64::saturating_add);
    let Some(link) = link else {
        return if all_held { Ok(()) } else { Err(Why::LinkIsTaken) };
    };
    if taken as f64 > link.0 as f64 * FULL {
        return Err(Why::LinkIsTaken);
    }
    let left = link.0.saturating_sub(taken);
    match it.dirty_rate {
        Some(dirty) if dirty.0 >= left => Err(Why::TooLittleIsLeft),
        _ => Ok(()),
    }
}

/// What each may send of one budget for so many.
pub fn share(budget: BytesPerSec, among: u32) -> BytesPerSec {
    BytesPerSec(budget.0 / u64::from(among.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const LINK: Option<BytesPerSec> = Some(BytesPerSec(100 * MIB));

    fn guest(ram_mib: u64, dirty_mib: Option<u64>) -> Waiting {
        Waiting { ram: Bytes(ram_mib * MIB), dirty_rate: dirty_mib.map(|it| BytesPerSec(it * MIB)) }
    }

    fn sends(rate_mib: u64, cap_mib: Option<u64>) -> UnderWay {
        let rate = |mib: u64| BytesPerSec(mib * MIB);
        UnderWay { rate: Some(rate(rate_mib)), cap: cap_mib.map(rate), post_copy: false }
    }

    #[test]
    fn quiet_guests_go_first_then_what_takes_least_and_what_never_ends_by_rounds_last() {
        let loud = [guest(100, Some(500)), guest(4000, Some(50)), guest(1000, None)];
        let all = [&loud[..], &[guest(8000, Some(0)), guest(2000, Some(5))]].concat();
        assert_eq!(order(&all, LINK), [4, 3, 2, 1, 0]);
        assert_eq!(order(&[guest(5, None), guest(3, None), guest(5, None)], None), [1, 0, 2]);
        assert_eq!(order(&[], LINK), [] as [usize; 0]);
    }

    #[test]
    fn in_turn_is_never_slower_than_together_and_a_guest_alone_takes_what_the_formula_says() {
        assert_eq!(guest(1000, Some(50)).takes(BytesPerSec(100 * MIB)), Some(Duration::from_secs(20)));
        assert_eq!(guest(1000, Some(100)).takes(BytesPerSec(100 * MIB)), None);
        for (n, dirty) in [(2, 0), (2, 30), (3, 30), (5, 19)] {
            let in_turn = f64::from(n) * 1000.0 / (100.0 - f64::from(dirty));
            let together = f64::from(n) * 1000.0 / (100.0 - f64::from(n * dirty));
            assert!(in_turn <= together, "{n} of {dirty}");
        }
    }

    #[test]
    fn one_begins_beside_others_only_when_they_cannot_fill_the_link() {
        let it = guest(1000, Some(5));
        assert_eq!(may_begin(&it, &[], None), Ok(()));
        assert_eq!(may_begin(&it, &[UnderWay::default()], LINK), Err(Why::LinkIsTaken), "not measured yet");
        assert_eq!(may_begin(&it, &[sends(95, None)], LINK), Err(Why::LinkIsTaken));
        assert_eq!(may_begin(&it, &[sends(40, None)], LINK), Ok(()));
        assert_eq!(may_begin(&it, &[sends(40, None), sends(40, None)], LINK), Err(Why::LinkIsTaken));
        assert_eq!(may_begin(&it, &[sends(1, None); MOST_BESIDE], LINK), Err(Why::LinkIsTaken), "and so on for ever");
        assert_eq!(may_begin(&it, &[sends(40, None)], None), Err(Why::LinkIsTaken), "nobody knows the link");
        assert_eq!(may_begin(&guest(1000, Some(70)), &[sends(40, None)], LINK), Err(Why::TooLittleIsLeft));
    }

    #[test]
    fn what_a_user_holds_back_does_not_fill_a_link_that_nobody_has_seen() {
        let it = guest(1000, None);
        assert_eq!(may_begin(&it, &[sends(10, Some(10))], None), Ok(()));
        assert!(sends(9, Some(10)).is_held() && !sends(95, None).is_held() && !sends(5, Some(10)).is_held());
        assert_eq!(may_begin(&it, &[sends(5, Some(10))], None), Err(Why::LinkIsTaken), "something else holds it");
        assert_eq!(may_begin(&it, &[sends(90, Some(95))], LINK), Err(Why::LinkIsTaken));
    }

    #[test]
    fn nothing_begins_beside_a_guest_that_waits_for_its_pages() {
        let waits = UnderWay { post_copy: true, ..sends(10, Some(10)) };
        assert_eq!(may_begin(&guest(10, Some(0)), &[waits], LINK), Err(Why::PostCopy));
    }

    #[test]
    fn one_budget_is_shared_by_those_under_way() {
        assert_eq!(share(BytesPerSec(90 * MIB), 3), BytesPerSec(30 * MIB));
        assert_eq!(share(BytesPerSec(90 * MIB), 0), BytesPerSec(90 * MIB));
    }
}
