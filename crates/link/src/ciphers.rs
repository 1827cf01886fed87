//! Which cipher of TLS 1.3 is the fastest between two hosts. Most processors have instructions for AES and not for
//! `ChaCha20`; some have none for either. So each side measures, and the slower side of the two counts.

use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::CipherSuite;
use serde::{Deserialize, Serialize};

/// How long each cipher is measured.
const MEASURE: Duration = Duration::from_millis(4);
/// Bytes of a full TLS record.
const RECORD: usize = 16 << 10;

/// A cipher that streams may use. All three are safe; they differ in speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cipher {
    /// AES-128 in Galois/counter mode.
    #[serde(rename = "aes-128-gcm")]
    Aes128Gcm,
    /// AES-256 in Galois/counter mode.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// `ChaCha20` with Poly1305.
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

/// A cipher and how fast one core encrypts with it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CipherSpeed {
    /// Which.
    pub cipher: Cipher,
    /// Bytes a second.
    pub bytes_per_second: u64,
}

impl Cipher {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::ChaCha20Poly1305];

    pub(crate) fn suite(self) -> CipherSuite {
        match self {
            Self::Aes128Gcm => CipherSuite::TLS13_AES_128_GCM_SHA256,
            Self::Aes256Gcm => CipherSuite::TLS13_AES_256_GCM_SHA384,
            Self::ChaCha20Poly1305 => CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
        }
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm => &AES_128_GCM,
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }
}

impl std::fmt::Display for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Aes128Gcm => "aes-128-gcm",
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        })
    }
}

/// How fast each cipher is on this host; takes about 12 ms of one core.
pub fn measure_ciphers() -> Vec<CipherSpeed> {
    Cipher::ALL.map(|cipher| CipherSpeed { cipher, bytes_per_second: measure(cipher.algorithm()) }).to_vec()
}

fn measure(algorithm: &'static Algorithm) -> u64 {
    let key = UnboundKey::new(algorithm, &vec![7; algorithm.key_len()]).expect("the key has the right length");
    let key = LessSafeKey::new(key);
    let mut record = vec![0; RECORD];
    let mut seal = |number: u32| {
        // Only time is taken here, but a nonce is used once all the same.
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&number.to_be_bytes());
        let nonce = Nonce::assume_unique_for_key(nonce);
        let _tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut record).expect("a record is short");
    };
    // The first one finds caches and clocks cold.
    seal(0);
    let begun = Instant::now();
    let mut sealed = 0;
    while begun.elapsed() < MEASURE {
        sealed += 1;
        seal(sealed);
    }
    (f64::from(sealed) * RECORD as f64 / begun.elapsed().as_secs_f64()) as u64
}

/// The cipher that goes fastest between two hosts: the slower one of them counts. `None` when they share none.
pub fn fastest_cipher(ours: &[CipherSpeed], theirs: &[CipherSpeed]) -> Option<Cipher> {
    let between = |ours: &CipherSpeed| {
        let theirs = theirs.iter().find(|theirs| theirs.cipher == ours.cipher)?;
        Some((ours.bytes_per_second.min(theirs.bytes_per_second), ours.cipher))
    };
    ours.iter().filter_map(between).max_by_key(|(speed, _)| *speed).map(|(_, cipher)| cipher)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speeds(figures: [u64; 3]) -> Vec<CipherSpeed> {
        let speed = |(cipher, bytes_per_second)| CipherSpeed { cipher, bytes_per_second };
        Cipher::ALL.into_iter().zip(figures).map(speed).collect()
    }

    #[test]
    fn all_ciphers_are_measured_within_a_fraction_of_a_second() {
        let begun = Instant::now();
        let measured = measure_ciphers();
        assert_eq!(measured.iter().map(|speed| speed.cipher).collect::<Vec<_>>(), Cipher::ALL);
        assert!(measured.iter().all(|speed| speed.bytes_per_second > 1_000_000), "{measured:?}");
        assert!(begun.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn the_slower_side_counts_and_only_what_both_have_is_taken() {
        let with_aes = speeds([9, 7, 2]);
        assert_eq!(fastest_cipher(&with_aes, &with_aes), Some(Cipher::Aes128Gcm));
        assert_eq!(fastest_cipher(&with_aes, &speeds([1, 1, 2])), Some(Cipher::ChaCha20Poly1305));
        assert_eq!(fastest_cipher(&with_aes, &with_aes[2..]), Some(Cipher::ChaCha20Poly1305));
        assert_eq!(fastest_cipher(&with_aes, &[]), None);
    }
}
