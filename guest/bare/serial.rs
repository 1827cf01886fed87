//! The serial port. Each access costs some microseconds, so bytes go sixteen at a time, when its buffer is empty.

use core::fmt;

use crate::cpu::{out, out_all, read_in};

const COM1: u16 = 0x3f8;
const STATUS: u16 = COM1 + 5;
/// Bytes of the port's own buffer.
const BUFFER: usize = 16;
/// What is to be said and does not fit is dropped.
const SIZE: usize = 1 << 16;
const LONGEST_COMMAND: usize = 16;

/// What lines on it asked for.
#[derive(Default)]
pub(crate) struct Wants {
    pub(crate) verify: bool,
    pub(crate) off: bool,
}

pub(crate) struct Serial {
    to_say: &'static mut [u8; SIZE],
    head: usize,
    tail: usize,
    command: [u8; LONGEST_COMMAND],
    length: usize,
    pub(crate) wants: Wants,
}

impl Serial {
    pub(crate) fn open() -> Self {
        static mut TO_SAY: [u8; SIZE] = [0; SIZE];
        // 8 bits; buffers on, empty.
        out(COM1 + 3, 3);
        out(COM1 + 2, 7);
        // SAFETY: there is one at a time: another is opened only when the first will not be used any more.
        let to_say = unsafe { &mut *(&raw mut TO_SAY) };
        Self { to_say, head: 0, tail: 0, command: [0; LONGEST_COMMAND], length: 0, wants: Wants::default() }
    }

    pub(crate) fn has_more(&self) -> bool {
        self.head != self.tail
    }

    /// Sends and hears what can be without waiting.
    pub(crate) fn talk(&mut self) {
        let mut status = read_in(STATUS);
        while status & 1 != 0 {
            self.hear(read_in(COM1));
            status = read_in(STATUS);
        }
        if status & 0x20 != 0 && self.has_more() {
            let at = self.tail % SIZE;
            let count = (self.head - self.tail).min(BUFFER).min(SIZE - at);
            out_all(COM1, &self.to_say[at..at + count]);
            self.tail += count;
        }
    }

    /// Waits until everything is sent.
    pub(crate) fn drain(&mut self) {
        while self.has_more() {
            self.talk();
        }
        while read_in(STATUS) & 0x40 == 0 {}
    }

    fn hear(&mut self, byte: u8) {
        if byte != b'\n' && byte != b'\r' {
            if self.length < LONGEST_COMMAND {
                self.command[self.length] = byte;
                self.length += 1;
            }
            return;
        }
        match &self.command[..self.length] {
            b"verify" => self.wants.verify = true,
            b"poweroff" => self.wants.off = true,
            _ => {}
        }
        self.length = 0;
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.head - self.tail == SIZE {
                return Err(fmt::Error);
            }
            self.to_say[self.head % SIZE] = byte;
            self.head += 1;
        }
        Ok(())
    }
}
