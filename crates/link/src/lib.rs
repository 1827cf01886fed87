//! The link between two agents: who they are, how they came to trust each other, and what protects what they say.
//!
//! There is no certificate authority. Each agent has an [`Identity`], a key with a certificate that it signed itself,
//! and knows its peers by the [`Fingerprint`] of theirs. Two agents become peers once, by a [`JoinToken`] that a person
//! carries from one to the other. From then on every connection is TLS 1.3 in which both sides prove who they are.

mod identity;
mod incoming;
mod tls;
mod token;

pub use identity::{Fingerprint, Identity, IdentityError, InvalidFingerprint};
pub use incoming::Incoming;
pub use tls::{Acceptor, LinkError, Stream, connect};
pub use token::{InvalidToken, JoinToken, Secret};

/// So many unpredictable bytes.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the kernel's random numbers are there from boot on");
    bytes
}
