//! Messages of a stream's handshake: whatever is read can be written, and is then read as the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_link::hello::{LONGEST, Message};

fuzz_target!(|bytes: &[u8]| {
    for first in [true, false] {
        let mut rest = bytes;
        let Ok(message) = Message::read(&mut rest, first) else { continue };
        assert!(bytes.len() - rest.len() <= LONGEST + 11);
        let again = message.encode();
        // What a newer version adds is dropped, and long words are cut.
        let Ok(read) = Message::read(&mut &again[..], first) else { panic!("{message:?} cannot be read again") };
        assert_eq!(read.encode(), again);
        if !matches!(message, Message::Refused(_)) {
            assert_eq!(read, message);
        }
    }
});
