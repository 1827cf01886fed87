//! When a guest writes to its disks faster than they are copied, its writes are slowed until the copies get in step.
//! Without a clock and without I/O.

use std::time::Duration;

/// What is left is compared after so long.
const WINDOW: Duration = Duration::from_secs(4);
/// Of what was carried meanwhile, so much must have brought the copy forward, in percent; otherwise most of it is what the
/// guest writes again and again.
const FORWARD: u64 = 25;
/// The guest may never write less than this, in bytes a second.
const LEAST: u64 = 256 << 10;
/// A link on which nothing moves for so long is down, and no measure of the guest.
const STALL: Duration = Duration::from_secs(1);

/// How far the copies are, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) remaining: u64,
    /// Of the disks.
    pub(crate) carried: u64,
    /// As the link sends it.
    pub(crate) on_wire: u64,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct DiskPacing {
    /// When this window began, and how far they were.
    window: Option<(Duration, Seen)>,
    /// When something was last seen to move on the link, and what had been sent then.
    moved: Option<(Duration, u64)>,
    limit: Option<u64>,
}

impl DiskPacing {
    /// `elapsed` after the start they are so far: what the guest may write from now on, in bytes a second, if that changes.
    pub(crate) fn see(&mut self, elapsed: Duration, now: Seen) -> Option<u64> {
        let (moved, on_wire) = *self.moved.get_or_insert((elapsed, now.on_wire));
        if now.on_wire != on_wire {
            self.moved = Some((elapsed, now.on_wire));
        }
        // What the guest wrote meanwhile is not held against it.
        if elapsed.saturating_sub(moved) > STALL {
            self.window = None;
        }
        let (began, before) = *self.window.get_or_insert((elapsed, now));
        let took = elapsed.saturating_sub(began);
        if took < WINDOW {
            return None;
        }
        self.window = Some((elapsed, now));
        let carried = now.carried.saturating_sub(before.carried);
        let forward = before.remaining.saturating_sub(now.remaining);
        if carried == 0 || forward * 100 >= carried * FORWARD {
            return None;
        }
        let rate = (carried as f64 / took.as_secs_f64()) as u64;
        let limit = self.limit.map_or(rate, |limit| limit.min(rate)) / 2;
        self.limit = Some(limit.max(LEAST));
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A guest that writes so fast to a disk that is copied so fast, in MiB/s: when the copy is in step, and how fast it may
    /// write then.
    fn play(writes: u64, link: u64) -> (Option<u64>, Option<u64>) {
        let (mut pacing, mut remaining, mut carried, mut limit) = (DiskPacing::default(), 1024 * MIB, 0, None);
        for tick in 0..6000_u64 {
            let written = limit.map_or(writes * MIB, |limit: u64| limit.min(writes * MIB)) / 10;
            carried += link * MIB / 10;
            remaining = (remaining + written).saturating_sub(link * MIB / 10);
            if remaining < MIB {
                return (Some(tick / 10), limit);
            }
            let now = Seen { remaining, carried, on_wire: carried };
            limit = pacing.see(Duration::from_millis(tick * 100), now).or(limit);
        }
        (None, limit)
    }

    #[test]
    fn a_guest_that_writes_less_than_is_copied_is_left_alone() {
        assert_eq!(play(0, 100), (Some(10), None));
        assert_eq!(play(60, 100).1, None);
    }

    #[test]
    fn one_that_writes_more_is_slowed_until_the_copy_is_in_step() {
        for writes in [90, 100, 400] {
            let (in_step, limit) = play(writes, 100);
            assert!(in_step.is_some_and(|seconds| seconds < 60), "{writes}: {in_step:?}");
            assert!(limit.is_some_and(|limit| limit >= 25 * MIB), "{writes}: {limit:?}");
        }
    }

    #[test]
    fn a_link_that_is_cut_for_a_while_is_no_reason_to_slow_anybody() {
        let (mut pacing, mut remaining, mut carried) = (DiskPacing::default(), 1024 * MIB, 0);
        for tick in 0..1000_u64 {
            // It copies 10 MiB a second, of which the guest writes 5; twice it is down for longer than a window.
            let is_down = matches!(tick, 50..100 | 300..360);
            carried += if is_down { 0 } else { MIB };
            remaining = remaining + MIB / 2 - if is_down { 0 } else { MIB };
            let now = Seen { remaining, carried, on_wire: carried };
            assert_eq!(pacing.see(Duration::from_millis(tick * 100), now), None, "{tick}");
        }
    }
}
