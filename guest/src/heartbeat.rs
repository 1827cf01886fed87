//! The heartbeat: a numbered line every 5 ms, whatever the writers do.
//!
//! The numbers count the slots of a fixed schedule. A guest that is late says nothing for the slots it missed and goes
//! on with the next one, so a jump in the numbers is time that the guest's own clock saw pass (it ran, but waited),
//! while a gap on the host's clock without a jump is time in which the guest did not run.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use crate::console::Console;
use crate::kernel;

const PERIOD_NS: u64 = 5_000_000;

/// Starts the beats, ahead of all other threads.
pub(crate) fn start(console: Arc<Console>) -> Result<(), String> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let realtime = kernel::run_ahead_of_others();
        let works = realtime.is_ok();
        // Nobody listens only if main is gone, and the guest with it.
        let _ = tell.send(realtime);
        if works {
            beat(&console);
        }
    });
    told.recv()
        .expect("the thread sends before it does anything else")
        .map_err(|error| format!("the heartbeat cannot have real-time priority: {error}"))
}

fn beat(console: &Console) -> ! {
    let start = kernel::monotonic_ns();
    let mut slot = 0;
    loop {
        console.say(&format!(r#"{{"beat":{slot}}}"#));
        slot = next_slot(slot, kernel::monotonic_ns() - start);
        kernel::sleep_until(start + slot * PERIOD_NS);
    }
}

/// The first slot after the last one that has not begun yet.
fn next_slot(last: u64, elapsed_ns: u64) -> u64 {
    (last + 1).max(elapsed_ns.div_ceil(PERIOD_NS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_follow_each_other_and_missed_ones_are_left_out() {
        assert_eq!(next_slot(0, 100), 1);
        assert_eq!(next_slot(1, PERIOD_NS + 100), 2);
        assert_eq!(next_slot(2, 7 * PERIOD_NS + 100), 8);
    }
}
