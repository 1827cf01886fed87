//! Join tokens: what a person carries from one host to another so that the two become peers.
//!
//! A token names the host that made it (addresses, fingerprint) and holds a secret that this host accepts once, until
//! it expires. Whoever has the token can become its peer, so it is to be carried like a password.
//!
//! As text it is `vmferry-` and letters and digits: a version byte, when it expires, the fingerprint, the secret, the
//! addresses, and a check of all that, in base 32.

use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::BASE32_NOPAD;

use crate::{Fingerprint, random_bytes};

const PREFIX: &str = "vmferry-";
const VERSION: u8 = 1;
const CHECK: usize = 4;
const FIXED: usize = 1 + 8 + 32 + 16;
/// Addresses of one token, and bytes of one address.
const MOST_ADDRESSES: usize = 8;
const LONGEST_ADDRESS: usize = 255;

/// What a token's host accepts once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret([u8; 16]);

impl Secret {
    /// A new one.
    pub fn random() -> Self {
        Self(random_bytes())
    }

    /// What is kept and compared instead of the secret, in letters and digits.
    pub fn hash(&self) -> String {
        BASE32_NOPAD.encode(digest(&SHA256, &self.0).as_ref())
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl std::fmt::Display for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&BASE32_NOPAD.encode(&self.0))
    }
}

impl FromStr for Secret {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let bytes = BASE32_NOPAD.decode(text.as_bytes()).map_err(|_| InvalidToken::Damaged)?;
        bytes.try_into().map(Self).map_err(|_| InvalidToken::Damaged)
    }
}

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// Where the host can be reached, HOST:PORT, the best first; one to eight.
    pub addresses: Vec<String>,
    /// Who it is.
    pub fingerprint: Fingerprint,
    /// What it accepts once.
    pub secret: Secret,
    /// Until when, in seconds since 1970.
    pub expires: u64,
}

/// Why a text is no join token, or none that can be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// It is something else.
    #[error("that is no join token: one begins with {PREFIX}")]
    NoToken,
    /// Something is missing or was changed.
    #[error("the join token is damaged: copy all of it, or make a new one")]
    Damaged,
    /// From a newer vmferry.
    #[error("the join token was made by a vmferry that writes version {0} of them; this one reads version {VERSION}")]
    OtherVersion(u8),
    /// Too late.
    #[error("the join token has expired: make a new one")]
    Expired,
}

impl JoinToken {
    /// It cannot be used any more at this time.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        now >= UNIX_EPOCH + Duration::from_secs(self.expires)
    }
}

impl std::fmt::Display for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut bytes = vec![VERSION];
        bytes.extend(self.expires.to_be_bytes());
        bytes.extend(self.fingerprint.as_bytes());
        bytes.extend(self.secret.0);
        for address in self.addresses.iter().take(MOST_ADDRESSES) {
            let address = &address.as_bytes()[..address.len().min(LONGEST_ADDRESS)];
            bytes.push(address.len() as u8);
            bytes.extend(address);
        }
        let check = digest(&SHA256, &bytes);
        bytes.extend(&check.as_ref()[..CHECK]);
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let letters = text.trim().strip_prefix(PREFIX).ok_or(InvalidToken::NoToken)?;
        let bytes = BASE32_NOPAD.decode(letters.to_ascii_uppercase().as_bytes()).map_err(|_| InvalidToken::Damaged)?;
        let (body, check) = bytes.split_last_chunk::<CHECK>().ok_or(InvalidToken::Damaged)?;
        if digest(&SHA256, body).as_ref()[..CHECK] != *check {
            return Err(InvalidToken::Damaged);
        }
        match body.first() {
            Some(&VERSION) => {}
            Some(&other) => return Err(InvalidToken::OtherVersion(other)),
            None => return Err(InvalidToken::Damaged),
        }
        let (fixed, addresses) = body.split_first_chunk::<FIXED>().ok_or(InvalidToken::Damaged)?;
        Ok(Self {
            expires: u64::from_be_bytes(part(fixed, 1)),
            fingerprint: Fingerprint::from_bytes(part(fixed, 9)),
            secret: Secret(part(fixed, 41)),
            addresses: read_addresses(addresses)?,
        })
    }
}

fn part<const N: usize>(fixed: &[u8; FIXED], at: usize) -> [u8; N] {
    fixed[at..at + N].try_into().expect("the parts lie within the fixed bytes")
}

fn read_addresses(mut rest: &[u8]) -> Result<Vec<String>, InvalidToken> {
    let mut addresses = Vec::new();
    while let Some((&length, after)) = rest.split_first() {
        let (address, after) = after.split_at_checked(length.into()).ok_or(InvalidToken::Damaged)?;
        addresses.push(String::from_utf8(address.to_vec()).map_err(|_| InvalidToken::Damaged)?);
        rest = after;
    }
    if addresses.is_empty() || addresses.len() > MOST_ADDRESSES {
        return Err(InvalidToken::Damaged);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            addresses: vec!["192.0.2.1:7420".into(), "[2001:db8::1]:7420".into()],
            fingerprint: Fingerprint::of(b"somebody"),
            secret: Secret::random(),
            expires: 2_000_000_000,
        }
    }

    #[test]
    fn a_token_is_read_as_it_is_written_whatever_a_mail_program_does_to_its_case() {
        let token = token();
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token.clone()));
        let letters = text.strip_prefix(PREFIX).unwrap().to_uppercase();
        assert_eq!(format!(" {PREFIX}{letters}\n").parse(), Ok(token));
    }

    #[test]
    fn any_change_and_any_cut_is_noticed() {
        let text = token().to_string();
        for cut in 0..text.len() {
            assert!(text[..cut].parse::<JoinToken>().is_err(), "{cut}");
        }
        for at in PREFIX.len()..text.len() {
            let other = if text.as_bytes()[at] == b'a' { "b" } else { "a" };
            let changed = format!("{}{other}{}", &text[..at], &text[at + 1..]);
            assert!(changed.parse::<JoinToken>().is_err(), "{at}");
        }
        assert_eq!("ssh-ed25519 AAAA".parse::<JoinToken>(), Err(InvalidToken::NoToken));
    }

    #[test]
    fn a_newer_token_is_told_from_a_damaged_one() {
        let mut bytes = vec![9, 1, 2, 3];
        let check = digest(&SHA256, &bytes);
        bytes.extend(&check.as_ref()[..CHECK]);
        let text = format!("{PREFIX}{}", BASE32_NOPAD.encode(&bytes));
        assert_eq!(text.parse::<JoinToken>(), Err(InvalidToken::OtherVersion(9)));
    }

    #[test]
    fn it_expires_and_does_not_show_its_secret_by_accident() {
        let token = token();
        assert!(!token.is_expired(UNIX_EPOCH + Duration::from_secs(1_999_999_999)));
        assert!(token.is_expired(UNIX_EPOCH + Duration::from_secs(2_000_000_000)));
        assert!(!format!("{token:?}").contains(&token.secret.to_string()));
    }
}
