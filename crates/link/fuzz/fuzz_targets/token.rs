//! Join tokens: whatever is taken for one is written so that it reads as the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_link::{Fingerprint, JoinToken};

fuzz_target!(|text: &str| {
    if let Ok(token) = text.parse::<JoinToken>() {
        assert_eq!(token.to_string().parse::<JoinToken>(), Ok(token));
    }
    if let Ok(fingerprint) = text.parse::<Fingerprint>() {
        assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
    }
});
