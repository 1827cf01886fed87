//! Before requests: who may do what with which export.
//!
//! Both sides are state machines. They are given bytes that have arrived and append bytes that are to be sent; whoever
//! drives them has the socket, the clock, and TLS.

mod asking;
mod offering;
#[cfg(test)]
mod tests;

pub use asking::{Asking, BadServer, Refused, Step, Told, Wish};
pub use offering::{BadClient, Offer, Offering, Outcome};

use crate::wire::{self, answer};

/// Appends an option.
fn put_option(option: u32, data: &[u8], out: &mut Vec<u8>) {
    out.extend(wire::OPTION.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

/// Appends an answer to one.
fn put_answer(option: u32, kind: u32, data: &[u8], out: &mut Vec<u8>) {
    out.extend(wire::ANSWER.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

/// Appends a text and its length.
fn put_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
}

/// What a refusal is called when there is no better text.
fn name_of(kind: u32) -> &'static str {
    match kind {
        answer::UNSUPPORTED => "it does not know that",
        answer::POLICY => "its policy forbids it",
        answer::INVALID => "it finds that invalid",
        answer::TLS_REQUIRED => "it wants TLS first",
        answer::UNKNOWN => "it has no such export",
        answer::TOO_BIG => "that is too big for it",
        _ => "it says no",
    }
}
