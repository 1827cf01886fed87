//! QEMU's log: what it and its libraries write to their standard output and error, for as long as the guest lives.
//!
//! It lies where it takes memory (`/run` is one), and a guest lives for months, so it is kept short. QEMU holds it open and
//! cannot be told to open another one: it is cut where it is. That works because QEMU's descriptor appends
//! ([`launch`](crate::launch()) opens it so), and whatever appends goes on at the new end, wherever that is.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Result, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How much is moved at once, in bytes.
const PIECE: usize = 64 << 10;
/// How many lines are the last words.
const LAST_LINES: usize = 3;

/// Cuts a log that is longer than `most` bytes to its last lines, at most half as many, and tells by how many bytes. One
/// that is not there is short enough.
///
/// What is kept is copied to the front, what comes meanwhile too, and then the rest is cut off: a reader never finds the
/// file empty, and an agent that ends in between has lost nothing. What QEMU writes in the microseconds between the last
/// look and the cut is lost, as the kernel has nothing that does both at once on a tmpfs. So is what it writes faster
/// than it can be copied.
pub fn cut(path: &Path, most: u64) -> Result<u64> {
    // Not to append: the kernel would ignore where this is to be written.
    let log = match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        log => log?,
    };
    let length = log.metadata()?.len();
    if length <= most {
        return Ok(0);
    }
    // A byte more than what is kept: if it ends a line, all the rest is whole lines. A line whose beginning goes, goes,
    // unless it is endless.
    let start = length - most / 2 - 1;
    let mut buffer = vec![0; PIECE];
    let first = log.read_at(&mut buffer, start)?;
    let torn = buffer[..first].iter().position(|byte| *byte == b'\n').map_or(1, |end| end as u64 + 1);
    let (mut from, mut kept) = (start + torn, 0);
    while kept < most {
        let count = log.read_at(&mut buffer, from)?;
        if count == 0 {
            break;
        }
        // It never reaches what is still to be copied: that lies ahead by what is cut off.
        log.write_all_at(&buffer[..count], kept)?;
        (from, kept) = (from + count as u64, kept + count as u64);
    }
    log.set_len(kept)?;
    Ok(from - kept)
}

/// The last lines of a log, in one: three at most, of its last so many bytes. What is no text is replaced. None when it
/// says nothing, or is not there.
pub fn tail(path: &Path, bytes: u64) -> Option<String> {
    let mut log = File::open(path).ok()?;
    let start = log.metadata().ok()?.len().saturating_sub(bytes);
    log.seek(SeekFrom::Start(start)).ok()?;
    let mut end = Vec::new();
    // It may grow meanwhile, faster than we read.
    log.take(bytes).read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end);
    let lines: Vec<&str> = end.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    (!lines.is_empty()).then(|| lines[lines.len().saturating_sub(LAST_LINES)..].join("; "))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn log_with(text: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu.log");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    /// Lines of 16 bytes: they divide a page, so that the kernel shows each of them whole or not at all.
    fn numbered(number: u64) -> String {
        format!("line {number:010}\n")
    }

    fn numbers(text: &str) -> Vec<u64> {
        text.lines().map(|line| line.strip_prefix("line ").and_then(|it| it.parse().ok()).expect(line)).collect()
    }

    #[test]
    fn a_short_log_and_one_that_is_not_there_stay_as_they_are() {
        let (dir, path) = log_with(b"0123456789");
        assert_eq!(cut(&path, 10).unwrap(), 0);
        assert_eq!(std::fs::read(&path).unwrap(), b"0123456789");
        assert_eq!(cut(&dir.path().join("none"), 10).unwrap(), 0);
    }

    #[test]
    fn a_long_log_keeps_its_last_whole_lines() {
        let text: String = (0..20_000).map(numbered).collect();
        let (_dir, path) = log_with(text.as_bytes());
        let most = 200_001;
        let gone = cut(&path, most).unwrap();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(gone as usize + kept.len(), text.len());
        assert!(text.ends_with(&kept) && kept.starts_with("line "), "{kept}");
        assert!((most / 2 - 16..=most / 2).contains(&(kept.len() as u64)), "{}", kept.len());
        assert_eq!(cut(&path, most).unwrap(), 0, "it is short now");
    }

    #[test]
    fn one_endless_line_is_cut_as_well() {
        let (_dir, path) = log_with(&b"x".repeat(300_000));
        assert_eq!(cut(&path, 100_000).unwrap(), 250_000);
        assert_eq!(std::fs::read(&path).unwrap(), b"x".repeat(50_000));
    }

    #[test]
    fn whoever_appends_goes_on_at_the_new_end() {
        let (_dir, path) = log_with(b"");
        let mut writer = OpenOptions::new().append(true).open(&path).unwrap();
        for number in 0..1000 {
            writer.write_all(numbered(number).as_bytes()).unwrap();
        }
        cut(&path, 1600).unwrap();
        writer.write_all(numbered(1000).as_bytes()).unwrap();
        let lines = numbers(&std::fs::read_to_string(&path).unwrap());
        assert_eq!(lines, (950..=1000).collect::<Vec<_>>());
    }

    #[test]
    fn a_log_that_is_cut_while_it_is_written_keeps_its_order_and_has_no_holes() {
        const MOST: u64 = 64 << 10;
        let (_dir, path) = log_with(b"");
        let end = AtomicBool::new(false);
        let (mut cuts, mut last) = (0, 0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut writer = OpenOptions::new().append(true).open(&path).unwrap();
                let mut number = 0;
                while !end.load(Ordering::Relaxed) {
                    writer.write_all(numbered(number).as_bytes()).unwrap();
                    number += 1;
                }
                writer.write_all(numbered(number).as_bytes()).unwrap();
                number
            });
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while cuts < 50 && std::time::Instant::now() < deadline {
                cuts += u32::from(cut(&path, MOST).unwrap() > 0);
            }
            end.store(true, Ordering::Relaxed);
            last = writer.join().unwrap();
        });
        assert_eq!(cuts, 50);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = numbers(&text);
        assert!(lines.is_sorted_by(|one, next| one < next), "{lines:?}");
        assert_eq!(lines.last(), Some(&last), "what is written after the last cut is there");
    }

    #[test]
    fn a_tail_is_three_lines_in_one_of_which_only_the_end_is_read() {
        let (dir, path) = log_with(b"first\n\n  second \nthird\r\nfourth");
        assert_eq!(tail(&path, 600).unwrap(), "second; third; fourth");
        assert_eq!(tail(&path, 9).unwrap(), "d; fourth");
        assert_eq!(tail(&dir.path().join("none"), 600), None);
        std::fs::write(&path, b" \n\n").unwrap();
        assert_eq!(tail(&path, 600), None);
        // The last two bytes of three, and what is no text at all.
        std::fs::write(&path, "\u{20ac}uro\nb\u{e4}d ").unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"\xff!").unwrap();
        let length = std::fs::metadata(&path).unwrap().len();
        assert!(tail(&path, length - 1).unwrap().ends_with("uro; b\u{e4}d \u{fffd}!"));
        // Of a file that no memory can hold, were it read as a whole.
        let huge = OpenOptions::new().write(true).open(&path).unwrap();
        huge.write_all_at(b"\nlast words", 1 << 42).unwrap();
        assert!(tail(&path, 600).unwrap().ends_with("last words"));
    }
}
