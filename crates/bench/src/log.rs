//! Reads what the measuring guest says and tells what a migration cost it.
//!
//! Everything is taken by the host's clock, from when bytes arrived, because the guest's own clock stops while it is
//! paused. The guest says the same things whichever host it runs on; a line may begin on one host's console and end on
//! the other's, or lose its middle. So lines are put together in the order in which bytes came in, and what makes no
//! sense is left out rather than believed.

use std::time::{Duration, Instant};

use serde::Deserialize;

/// The time from one heartbeat to the next.
pub const PERIOD: Duration = Duration::from_millis(5);

/// Longer than any line of the guest's: what comes without an end up to here is no line of it.
const LONGEST_LINE: usize = 4096;

/// Everything a guest said so far.
#[derive(Debug, Default)]
pub struct GuestLog {
    /// The line that has not ended yet.
    unfinished: Vec<u8>,
    ready: Option<Ready>,
    error: Option<String>,
    beats: Vec<Beat>,
    late: Vec<Beat>,
    written: Vec<Written>,
    read: Vec<Written>,
    verified: Vec<Verified>,
    corrupt: Vec<String>,
    disk: Option<(usize, u64)>,
    hardware: Vec<Hardware>,
    restarted: bool,
    unread: u64,
}

/// The guest has filled its memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Ready {
    /// Memory that it rewrites, in bytes.
    pub mem: u64,
    /// Threads that share it.
    pub threads: u32,
    /// Which pages are rewritten: a [`Mode`](crate::Mode) by name.
    pub mode: String,
}

/// What the guest finds itself to be made of.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Hardware {
    /// Processors that run.
    pub cpus: u32,
    /// Memory that it uses, in KiB.
    pub memory_kib: u64,
    /// What is on PCI, such as `1af4:1041 at 0000:01:00.0`.
    pub pci: Vec<String>,
}

/// One heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// When it arrived.
    pub at: Instant,
    /// The host whose console it arrived on.
    pub host: usize,
    /// Its number. The guest leaves out the numbers of beats that it was too late for.
    pub n: u64,
}

/// 64 MiB were rewritten, or read, by one thread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Written {
    /// When the record arrived.
    pub at: Instant,
    /// The host whose console it arrived on.
    pub host: usize,
    /// The thread.
    pub thread: u32,
    /// Counts this thread's records, from 1.
    pub n: u64,
    /// How long it took, in milliseconds by the guest's clock.
    pub ms: f64,
    /// How many times over the thread has rewritten, or read, its memory.
    pub pass: u64,
}

/// The answer to one `verify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Verified {
    /// Pages that were looked at: all of them.
    pub pages: u64,
    /// Those that did not hold what was last written to them.
    pub corrupt: u64,
    /// All damage seen since boot: by this and earlier verifications, and before pages were rewritten.
    pub total: u64,
}

/// A stretch without heartbeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The last beat before it.
    pub start: Instant,
    /// The first beat after it.
    pub end: Instant,
    /// From one to the other; [`PERIOD`] is the least that can be expected.
    pub length: Duration,
    /// Beats that are missing by their numbers: time that the guest's own clock saw pass. A guest that was paused
    /// misses none.
    pub beats_lost: u64,
}

/// The guest went from one host to another, as its beats show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switchover {
    /// The last beat on the host that it left.
    pub last: Beat,
    /// The first beat on the host that it went to.
    pub first: Beat,
}

impl Switchover {
    /// How much longer than usual the guest's users waited for its next beat.
    pub fn downtime_felt(&self) -> Duration {
        (self.first.at - self.last.at).saturating_sub(PERIOD)
    }
}

/// The lines that are JSON.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Ready(Ready),
    Beat(u64),
    Written { thread: u32, n: u64, ms: f64, pass: u64 },
    Read { thread: u32, n: u64, ms: f64, pass: u64 },
    Verified(Verified),
    Disk(u64),
    Hardware(Hardware),
    Error(String),
}

impl GuestLog {
    /// A log of nothing.
    pub fn new() -> GuestLog {
        GuestLog::default()
    }

    /// Takes what arrived on the console of a host, at once, in the order in which it arrived on all of them.
    pub fn feed(&mut self, host: usize, at: Instant, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.unfinished.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.unfinished);
                self.take(host, at, &String::from_utf8_lossy(&line));
            } else if self.unfinished.len() > LONGEST_LINE {
                self.unfinished.clear();
                self.unread += 1;
            }
        }
    }

    fn take(&mut self, host: usize, at: Instant, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        if let Some(start) = line.find("CORRUPT ") {
            self.corrupt.push(line[start..].to_owned());
            return;
        }
        // A line may come after the remains of one that was cut off, so each start of an object is tried.
        let read = line.match_indices("{\"").find_map(|(start, _)| serde_json::from_str(&line[start..]).ok());
        match read {
            Some(Line::Beat(n)) => {
                let beat = Beat { at, host, n };
                if let Some(last) = self.beats.last().filter(|last| n < last.n) {
                    // What goes on where this host's own beats ended was only read late, be it by seconds: its agent may
                    // have stood still. A kernel that rebooted does not.
                    let goes_on = |own: &Beat| own.host == host && own.n < n;
                    if last.host != host && self.beats.iter().any(goes_on) {
                        self.late.push(beat);
                        return;
                    }
                    self.restarted = true;
                }
                self.beats.push(beat);
            }
            Some(Line::Written { thread, n, ms, pass }) => {
                self.written.push(Written { at, host, thread, n, ms, pass });
            }
            Some(Line::Read { thread, n, ms, pass }) => self.read.push(Written { at, host, thread, n, ms, pass }),
            Some(Line::Ready(ready)) => self.ready = Some(ready),
            Some(Line::Verified(verified)) => self.verified.push(verified),
            Some(Line::Disk(blocks)) => self.disk = Some((host, blocks)),
            Some(Line::Hardware(hardware)) => self.hardware.push(hardware),
            Some(Line::Error(error)) => self.error = Some(error),
            None => self.unread += 1,
        }
    }

    /// What the guest said when it had filled its memory.
    pub fn ready(&self) -> Option<&Ready> {
        self.ready.as_ref()
    }

    /// What the guest complained of last: a bad option, or an unknown command.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// The guest's lines about damaged pages. It prints the first 64 only; [`Verified::total`] counts on.
    pub fn corrupt(&self) -> &[String] {
        &self.corrupt
    }

    /// The host on which the guest said last how many blocks of its disk it has read back, and how many that were.
    pub fn disk(&self) -> Option<(usize, u64)> {
        self.disk
    }

    /// What the guest found itself to be made of, each time when it was asked.
    pub fn hardware(&self) -> &[Hardware] {
        &self.hardware
    }

    /// The heartbeats began anew: the guest's kernel crashed, as it does when its memory is damaged, and it rebooted.
    /// Nothing that it says of its pages afterwards tells anything about those it had before.
    pub fn restarted(&self) -> bool {
        self.restarted
    }

    /// The answers to `verify`, oldest first.
    pub fn verified(&self) -> &[Verified] {
        &self.verified
    }

    /// Every heartbeat, in the order of arrival.
    pub fn beats(&self) -> &[Beat] {
        &self.beats
    }

    /// Beats of the host that the guest had left, by what was heard from the other one, when they were read. A guest that
    /// runs on both hosts is seen here as well.
    pub fn late(&self) -> &[Beat] {
        &self.late
    }

    /// Every record of 64 MiB rewritten, in the order of arrival.
    pub fn written(&self) -> &[Written] {
        &self.written
    }

    /// Bytes a second read in this window, by all threads together that do nothing else; 0 in modes without such.
    pub fn read_per_second(&self, from: Instant, to: Instant) -> f64 {
        per_second(&self.read, from, to)
    }

    /// Lines that made no sense: the kernel's, or cut ones.
    pub fn unread(&self) -> u64 {
        self.unread
    }

    /// The longest stretch between two beats, of those that lie in this window at least in part.
    ///
    /// `None` when fewer than two beats arrived around it. A guest that is silent to the end of the window is not seen
    /// here; ask [`silent_for`](Self::silent_for).
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Option<Gap> {
        self.gaps(from, to).max_by_key(|gap| gap.length)
    }

    /// How long ago the last beat was. `None` when there was none.
    pub fn silent_for(&self, now: Instant) -> Option<Duration> {
        self.beats.last().map(|beat| now.saturating_duration_since(beat.at))
    }

    /// Every time the guest went from one host to another, oldest first.
    pub fn switchovers(&self) -> impl DoubleEndedIterator<Item = Switchover> {
        self.beats
            .windows(2)
            .filter(|pair| pair[0].host != pair[1].host)
            .map(|pair| Switchover { last: pair[0], first: pair[1] })
    }

    /// The downtime of the last switchover as the guest's users felt it: how much longer than usual they waited for the
    /// first beat from the new host.
    pub fn downtime_felt(&self) -> Option<Duration> {
        self.switchovers().next_back().map(|switchover| switchover.downtime_felt())
    }

    /// The longest that the guest stalled while it ran on one host: the longest gap in this window that is no
    /// switchover, beyond the period of a beat.
    pub fn worst_stall(&self, from: Instant, to: Instant) -> Option<Duration> {
        self.pairs(from, to)
            .filter(|pair| pair[0].host == pair[1].host)
            .map(|pair| (pair[1].at - pair[0].at).saturating_sub(PERIOD))
            .max()
    }

    /// The longest that any thread took, on the host's clock, for 64 MiB that it finished in this window.
    pub fn worst_64_mib(&self, from: Instant, to: Instant) -> Option<Duration> {
        self.record_times(from, to).into_iter().max()
    }

    /// How long a thread usually takes, on the host's clock, for 64 MiB: the median of those finished in this window.
    pub fn median_64_mib(&self, from: Instant, to: Instant) -> Option<Duration> {
        let mut times = self.record_times(from, to);
        times.sort_unstable();
        times.get(times.len() / 2).copied()
    }

    /// Bytes a second rewritten in this window, by all threads together.
    pub fn rewritten_per_second(&self, from: Instant, to: Instant) -> f64 {
        per_second(&self.written, from, to)
    }

    fn gaps(&self, from: Instant, to: Instant) -> impl Iterator<Item = Gap> {
        self.pairs(from, to).map(|pair| Gap {
            start: pair[0].at,
            end: pair[1].at,
            length: pair[1].at - pair[0].at,
            beats_lost: pair[1].n.saturating_sub(pair[0].n + 1),
        })
    }

    fn pairs(&self, from: Instant, to: Instant) -> impl Iterator<Item = &[Beat]> {
        self.beats.windows(2).filter(move |pair| pair[1].at > from && pair[0].at < to)
    }

    /// Each record with how long it took on the host's clock: since the one before of the same thread.
    pub fn timed_records(&self) -> impl Iterator<Item = (&Written, Duration)> {
        self.written.iter().enumerate().filter_map(|(index, record)| {
            let before = self.written[..index].iter().rev().find(|before| before.thread == record.thread)?;
            // A record lost at the switchover must not make two look like a slow one.
            (before.n + 1 == record.n).then(|| (record, record.at - before.at))
        })
    }

    /// The times of the records that ended in this window.
    fn record_times(&self, from: Instant, to: Instant) -> Vec<Duration> {
        let ended = self.timed_records().filter(|(record, _)| (from..=to).contains(&record.at));
        ended.map(|(_, took)| took).collect()
    }
}

fn per_second(records: &[Written], from: Instant, to: Instant) -> f64 {
    let records = records.iter().filter(|record| (from..=to).contains(&record.at)).count();
    records as f64 * f64::from(64 << 20) / (to - from).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A log fed with (milliseconds, host, text).
    fn log(start: Instant, said: &[(u64, usize, &str)]) -> GuestLog {
        let mut log = GuestLog::new();
        for &(at, host, text) in said {
            log.feed(host, start + ms(at), text.as_bytes());
        }
        log
    }

    #[test]
    fn a_kernel_that_reboots_is_told_from_a_beat_that_is_read_late() {
        let start = Instant::now();
        let late = log(start, &[(0, 0, "{\"beat\":7}\n"), (5, 1, "{\"beat\":9}\n"), (6, 0, "{\"beat\":8}\n")]);
        assert!(!late.restarted());
        assert_eq!(late.late().iter().map(|beat| (beat.host, beat.n)).collect::<Vec<_>>(), [(0, 8)]);
        let by_seconds = log(start, &[(0, 0, "{\"beat\":7}\n"), (5, 1, "{\"beat\":900}\n"), (6, 0, "{\"beat\":8}\n")]);
        assert!(!by_seconds.restarted());
        assert_eq!(late.switchovers().count(), 1);
        let same_host = log(start, &[(0, 0, "{\"beat\":7}\n"), (5, 0, "{\"beat\":1}\n")]);
        let other_host = log(start, &[(0, 0, "{\"beat\":500}\n"), (5, 1, "{\"beat\":1}\n")]);
        assert!(same_host.restarted() && other_host.restarted());
    }

    #[test]
    fn every_kind_of_line_is_read() {
        let start = Instant::now();
        let log = log(
            start,
            &[(
                0,
                0,
                "{\"ready\":{\"mem\":1048576,\"threads\":2,\"mode\":\"write\"}}\r\n{\"beat\":7}\n\
                 {\"written\":{\"thread\":1,\"n\":17,\"ms\":48.1,\"pass\":3}}\nCORRUPT page=3 expected=2 found=torn\n\
                 {\"verified\":{\"pages\":256,\"corrupt\":1,\"total\":2}}\n{\"disk\":500}\n{\"error\":\"unknown command x\"}\n",
            )],
        );
        assert_eq!(log.ready(), Some(&Ready { mem: 1 << 20, threads: 2, mode: "write".into() }));
        assert_eq!(log.beats(), [Beat { at: start, host: 0, n: 7 }]);
        assert_eq!(log.written(), [Written { at: start, host: 0, thread: 1, n: 17, ms: 48.1, pass: 3 }]);
        assert_eq!(log.corrupt(), ["CORRUPT page=3 expected=2 found=torn"]);
        assert_eq!(log.verified(), [Verified { pages: 256, corrupt: 1, total: 2 }]);
        assert_eq!(log.disk(), Some((0, 500)));
        assert_eq!(log.error(), Some("unknown command x"));
        assert_eq!(log.unread(), 0);
    }

    #[test]
    fn garbage_is_left_out() {
        let log = log(Instant::now(), &[(0, 0, "\u{1b}c[    0.1] kernel: hello {\n\n{\"beat\":\n{\"beat\":1}\nx{}\n")]);
        assert_eq!(log.beats().len(), 1);
        assert_eq!(log.unread(), 3);
    }

    #[test]
    fn garbage_without_an_end_does_not_fill_the_memory() {
        let mut log = GuestLog::new();
        for _ in 0..1000 {
            log.feed(0, Instant::now(), &[0xff; 1000]);
        }
        assert!(log.unfinished.len() <= LONGEST_LINE + 1000);
    }

    #[test]
    fn a_line_cut_at_the_switchover_is_put_together_and_counts_for_the_host_that_ended_it() {
        let log =
            log(Instant::now(), &[(0, 0, "{\"beat\":1}\n{\"be"), (40, 1, "at\":2}\n"), (45, 1, "{\"beat\":3}\n")]);
        let beats: Vec<_> = log.beats().iter().map(|beat| (beat.host, beat.n)).collect();
        assert_eq!(beats, [(0, 1), (1, 2), (1, 3)]);
        assert_eq!(log.downtime_felt(), Some(ms(35)));
    }

    #[test]
    fn a_line_that_lost_its_end_does_not_take_the_next_one_with_it() {
        let log =
            log(Instant::now(), &[(0, 0, "{\"beat\":1}\n{\"written\":{\"thr"), (9, 1, "{\"beat\":2}\n{\"beat\":3}\n")]);
        assert_eq!(log.beats().len(), 3);
        let log = self::log(Instant::now(), &[(0, 0, "{\"beat\":1"), (9, 1, "CORRUPT page=1 expected=1 found=0\n")]);
        assert_eq!(log.corrupt(), ["CORRUPT page=1 expected=1 found=0"]);
    }

    #[test]
    fn the_longest_gap_tells_paused_from_late() {
        let start = Instant::now();
        let said =
            [(0, 0, "{\"beat\":0}\n"), (5, 0, "{\"beat\":1}\n"), (55, 0, "{\"beat\":2}\n"), (90, 0, "{\"beat\":9}\n")];
        let log = log(start, &said);
        let paused = log.longest_gap(start, start + ms(100)).unwrap();
        assert_eq!((paused.start, paused.end), (start + ms(5), start + ms(55)));
        assert_eq!((paused.length, paused.beats_lost), (ms(50), 0));
        let late = log.longest_gap(start + ms(60), start + ms(100)).unwrap();
        assert_eq!((late.length, late.beats_lost), (ms(35), 6));
        assert_eq!(log.longest_gap(start + ms(91), start + ms(100)), None);
        assert_eq!(log.silent_for(start + ms(100)), Some(ms(10)));
    }

    #[test]
    fn a_switchover_is_downtime_and_never_a_stall() {
        let start = Instant::now();
        let said = [
            (0, 0, "{\"beat\":0}\n"),
            (80, 1, "{\"beat\":1}\n"),
            (100, 1, "{\"beat\":4}\n"),
            (105, 1, "{\"beat\":5}\n"),
        ];
        let log = log(start, &said);
        assert_eq!(log.downtime_felt(), Some(ms(75)));
        assert_eq!(log.worst_stall(start, start + ms(200)), Some(ms(15)));
        assert_eq!(log.switchovers().count(), 1);
    }

    #[test]
    fn downtime_is_never_negative_and_unknown_without_a_switchover() {
        let log = log(Instant::now(), &[(0, 0, "{\"beat\":0}\n")]);
        assert_eq!(log.downtime_felt(), None);
        let log = self::log(Instant::now(), &[(0, 0, "{\"beat\":0}\n"), (3, 1, "{\"beat\":1}\n")]);
        assert_eq!(log.downtime_felt(), Some(Duration::ZERO));
    }

    #[test]
    fn rewriting_is_timed_by_thread_on_the_hosts_clock() {
        let start = Instant::now();
        let record = |thread, n| format!("{{\"written\":{{\"thread\":{thread},\"n\":{n},\"ms\":1.0,\"pass\":0}}}}\n");
        let mut log = GuestLog::new();
        // Thread 1's third record is lost.
        for (at, thread, n) in [(0, 0, 1), (10, 1, 1), (50, 0, 2), (55, 1, 2), (90, 0, 3), (200, 0, 4), (300, 1, 4)] {
            log.feed(0, start + ms(at), record(thread, n).as_bytes());
        }
        assert_eq!(log.median_64_mib(start, start + ms(100)), Some(ms(45)));
        assert_eq!(log.worst_64_mib(start, start + ms(100)), Some(ms(50)));
        assert_eq!(log.worst_64_mib(start + ms(100), start + ms(400)), Some(ms(110)));
        assert_eq!(log.worst_64_mib(start + ms(301), start + ms(400)), None);
        let rate = log.rewritten_per_second(start, start + ms(100));
        assert!((rate / (5.0 * f64::from(64 << 20) * 10.0) - 1.0).abs() < 1e-9);
    }
}
