//! Headers: whatever is taken for one is written as it was read and within its limits, though its check was right by
//! chance. The check is put right here, or hardly anything would get past it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_link::frame::{HEADER, Header, MAX_PAYLOAD};

fuzz_target!(|bytes: &[u8]| {
    let _ = Header::read(&mut &bytes[..]);
    let Some((header, payload)) = bytes.split_first_chunk::<HEADER>() else { return };
    let mut header = *header;
    let check = crc32(&header[..HEADER - 4]);
    header[HEADER - 4..].copy_from_slice(&check.to_be_bytes());
    if let Ok(read) = Header::decode(&header) {
        assert_eq!(read.encode(), header);
        assert!(read.length as usize <= MAX_PAYLOAD && read.raw_length as usize <= MAX_PAYLOAD);
        assert!(read.length <= read.raw_length);
        let _ = read.check_payload(payload);
    }
});

/// By the book, so that the library's is held against another one.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |check, byte| {
        (0..8).fold(check ^ u32::from(*byte), |check, _| (check >> 1) ^ (0xedb8_8320 & 0_u32.wrapping_sub(check & 1)))
    })
}
