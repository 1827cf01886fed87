//! What two agents agree on over their control connection before streams of a migration connect: a name for the
//! session and a key that only the two of them have.

use std::str::FromStr;

use aws_lc_rs::hmac;
use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::random_bytes;

/// The name of a session: one migration's streams between two agents. A UUID, and written as one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(Uuid);

/// The key of a session: whoever proves to have it may add streams. Written in letters and digits, for the control
/// connection only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionKey([u8; 32]);

/// Not the text of a session's name or key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("that is no {0} of a session")]
pub struct InvalidSession(&'static str);

impl SessionId {
    /// A new one, like no other.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl SessionKey {
    /// A new one, unpredictable.
    pub fn random() -> Self {
        Self(random_bytes())
    }

    /// Proves to have the key and to mean these bytes.
    pub(crate) fn prove(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &self.0));
        for part in parts {
            context.update(part);
        }
        context.sign().as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")
    }

    /// Whether a proof is right; takes as long for a wrong one.
    pub(crate) fn verify(&self, parts: &[&[u8]], proof: &[u8; 32]) -> bool {
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &self.0), &parts.concat(), proof).is_ok()
    }
}

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKey(…)")
    }
}

impl FromStr for SessionId {
    type Err = InvalidSession;

    fn from_str(text: &str) -> Result<Self, InvalidSession> {
        text.parse().map(Self).map_err(|_| InvalidSession("name"))
    }
}

impl FromStr for SessionKey {
    type Err = InvalidSession;

    fn from_str(text: &str) -> Result<Self, InvalidSession> {
        let bytes = BASE32_NOPAD.decode(text.as_bytes()).ok();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or(InvalidSession("key"))
    }
}

impl TryFrom<String> for SessionId {
    type Error = InvalidSession;

    fn try_from(text: String) -> Result<Self, InvalidSession> {
        text.parse()
    }
}

impl TryFrom<String> for SessionKey {
    type Error = InvalidSession;

    fn try_from(text: String) -> Result<Self, InvalidSession> {
        text.parse()
    }
}

impl From<SessionId> for String {
    fn from(id: SessionId) -> Self {
        id.to_string()
    }
}

impl From<SessionKey> for String {
    fn from(key: SessionKey) -> Self {
        BASE32_NOPAD.encode(&key.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_keys_are_read_as_they_are_written_and_a_key_is_not_shown_by_accident() {
        let (id, key) = (SessionId::random(), SessionKey::random());
        assert_eq!(id.to_string().parse(), Ok(id));
        let text = String::from(key.clone());
        assert_eq!(text.parse(), Ok(key.clone()));
        assert!(!format!("{key:?}").contains(&text));
        assert!("".parse::<SessionKey>().is_err() && text[1..].parse::<SessionKey>().is_err());
        assert!("web1".parse::<SessionId>().is_err());
    }
}
