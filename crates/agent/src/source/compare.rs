//! What was predicted of a migration, beside what it did: the report has both, and the next predictions of migrations to
//! this host are the better for it.

use vmferry_api::{Foretold, Made, Step, in_one_line};
use vmferry_link::Fingerprint;

use super::expect::Expecting;
use super::forecast::Lessons;
use super::teller::Book;
use crate::host::Host;
use crate::journal::Taught;

/// How long planning and preparing took, the copy with its switch, and what came after it, in seconds; disks not counted.
fn parts(book: &Book) -> [f64; 3] {
    let mut parts = [0.0; 3];
    for it in book.times() {
        let part = match it.step {
            Step::Plan | Step::Prepare => 0,
            Step::CopyDisks => continue,
            Step::CopyRam | Step::SwitchOver | Step::Commit | Step::PostCopy => 1,
            Step::Retire => 2,
        };
        parts[part] += it.ms / 1e3;
    }
    parts
}

/// A migration that is done, as far as predictions go.
pub(super) struct Done<'a> {
    pub(super) peer: Fingerprint,
    /// Its engine's name.
    pub(super) engine: &'a str,
    pub(super) book: &'a Book,
    /// Bytes.
    pub(super) sent: u64,
}

/// What was predicted of a migration, as it is to be shown beside what it did; learns from that.
pub(super) async fn compare(host: &Host, mut expecting: Expecting, done: Done<'_>) -> Option<Foretold> {
    let at_start = expecting.at_start().await;
    let Done { peer, engine, book, sent } = done;
    let lessons = Lessons::of(host, peer, engine).await;
    let foretold = match (&expecting.before, &at_start) {
        (Some(raw), _) => Some(raw.foretold(&lessons, Made::Before, None)),
        (None, Some(raw)) => Some(raw.foretold(&lessons, Made::AtStart, book.before_copy())),
        (None, None) => None,
    };
    if expecting.disturbed {
        return foretold;
    }
    let (outcome, downtime, sent) = (parts(book), book.downtime.as_secs_f64(), sent as f64);
    let mut taught = Vec::new();
    for (made, raw) in [(Made::Before, &expecting.before), (Made::AtStart, &at_start)] {
        for new in raw.iter().flat_map(|raw| raw.taught(made, outcome, downtime, sent)) {
            // What both have predicted counts once.
            if taught.iter().all(|known: &Taught| known.figure != new.figure) {
                taught.push(new);
            }
        }
    }
    if let Err(error) = host.journal.teach(peer, engine, taught).await {
        tracing::warn!(error = in_one_line(&error), "cannot write down how far the prediction was off");
    }
    foretold
}
