//! The serial port: whole lines out, from any thread, and commands in.
//!
//! Each line is one write(2). The kernel's terminal layer holds a lock over a whole write, so lines never mix; a lock of
//! our own would only let a slow thread stand in the way of the heartbeat.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};

use crate::kernel;

/// The way out.
pub(crate) struct Console {
    port: File,
}

/// The way in: one line after the other, without their ends.
pub(crate) struct Commands {
    lines: BufReader<File>,
}

impl Console {
    /// Opens the port and makes it raw: bytes as they are, no echo.
    pub(crate) fn open(path: &str) -> io::Result<(Console, Commands)> {
        let port = OpenOptions::new().read(true).write(true).open(path)?;
        kernel::make_terminal_raw(&port)?;
        let lines = BufReader::new(port.try_clone()?);
        Ok((Console { port }, Commands { lines }))
    }

    /// Prints a line.
    pub(crate) fn say(&self, line: &str) {
        let line = format!("{line}\n");
        // A port that fails leaves nobody to tell.
        let _ = (&self.port).write_all(line.as_bytes());
    }

    /// Waits until the last line has left the machine.
    pub(crate) fn drain(&self) {
        kernel::drain_terminal(&self.port);
    }
}

impl Iterator for Commands {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let mut line = Vec::new();
            match self.lines.read_until(b'\n', &mut line) {
                Ok(0) => kernel::sleep_until(kernel::monotonic_ns() + 100_000_000), // Hung up; may come back.
                Ok(_) => return Some(String::from_utf8_lossy(&line).trim().to_owned()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }
}
