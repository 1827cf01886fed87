//! At most so many of a host's guests are in post-copy at a time, in which each needs two hosts. Others that would turn to
//! it are decided about as if post-copy was not allowed until one is out of it. Their users' word is not held up.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vmferry_policy::Action;

/// Of one migration.
pub(super) struct Turn {
    seats: Arc<Semaphore>,
    seat: Option<OwnedSemaphorePermit>,
    /// It would be in post-copy, and waits.
    is_held: bool,
}

impl Turn {
    /// Nobody wants post-copy yet.
    pub(super) fn new(seats: Arc<Semaphore>) -> Self {
        Self { seats, seat: None, is_held: false }
    }

    /// What is done of what was `decided`, or `asked` for by its user, where post-copy is `allowed`; and whether post-copy
    /// is held up from now on.
    pub(super) fn take(&mut self, decided: Action, asked: bool, allowed: bool) -> (Action, bool) {
        self.is_held &= allowed && matches!(decided, Action::PostCopy | Action::Continue);
        let wants = decided == Action::PostCopy || self.is_held && decided == Action::Continue;
        if !wants {
            return (decided, false);
        }
        self.try_seat();
        if self.seat.is_some() || asked {
            self.is_held = false;
            return (Action::PostCopy, false);
        }
        (Action::Continue, !std::mem::replace(&mut self.is_held, true))
    }

    /// It could turn to post-copy now: whoever decides is to know that before.
    pub(super) fn is_free(&self) -> bool {
        self.seat.is_some() || self.seats.available_permits() > 0
    }

    /// True when it is its turn.
    pub(super) fn try_seat(&mut self) -> bool {
        if self.seat.is_none() {
            self.seat = Arc::clone(&self.seats).try_acquire_owned().ok();
        }
        self.seat.is_some()
    }

    /// Waits until it is.
    pub(super) async fn wait(&mut self) {
        if self.seat.is_none() {
            self.seat = Arc::clone(&self.seats).acquire_owned().await.ok();
        }
    }

    /// It is out of post-copy, or will never be.
    pub(super) fn give_back(&mut self) {
        self.seat = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn post_copy_waits_for_its_turn_and_other_decisions_do_not() {
        let seats = Arc::new(Semaphore::new(1));
        let (mut first, mut second) = (Turn::new(Arc::clone(&seats)), Turn::new(seats));
        assert!(first.is_free() && second.is_free());
        assert_eq!(first.take(Action::PostCopy, false, true), (Action::PostCopy, false));
        assert!(first.is_free() && !second.is_free(), "who is in it may be");
        assert_eq!(second.take(Action::PostCopy, false, true), (Action::Continue, true), "held up, and told once");
        assert_eq!(second.take(Action::Continue, false, true), (Action::Continue, false));
        let pace = Action::Pace(vmferry_policy::Percent(50));
        assert_eq!(second.take(pace.clone(), false, true), (pace, false));
        first.give_back();
        assert_eq!(second.take(Action::Continue, false, true), (Action::Continue, false), "it was decided otherwise");
        let again = Arc::clone(&second.seats).try_acquire_owned().unwrap();
        assert_eq!(second.take(Action::PostCopy, false, true), (Action::Continue, true));
        drop(again);
        assert_eq!(second.take(Action::Continue, false, true), (Action::PostCopy, false));
        assert_eq!(second.take(Action::Continue, false, true), (Action::Continue, false), "once");
    }

    #[test]
    fn who_is_held_up_goes_by_its_users_word_and_not_where_post_copy_was_forbidden_meanwhile() {
        let seats = Arc::new(Semaphore::new(1));
        let taken = Arc::clone(&seats).try_acquire_owned().unwrap();
        let mut turn = Turn::new(Arc::clone(&seats));
        assert_eq!(turn.take(Action::PostCopy, false, true).0, Action::Continue);
        assert_eq!(turn.take(Action::PostCopy, true, true).0, Action::PostCopy);
        assert_eq!(turn.take(Action::Continue, false, true).0, Action::Continue, "it was done");
        let mut turn = Turn::new(Arc::clone(&seats));
        assert_eq!(turn.take(Action::PostCopy, false, true).0, Action::Continue);
        assert_eq!(turn.take(Action::Continue, false, false).0, Action::Continue);
        drop(taken);
        assert_eq!(turn.take(Action::Continue, false, true).0, Action::Continue, "it is decided anew");
        assert!(turn.try_seat() && turn.try_seat());
    }
}
