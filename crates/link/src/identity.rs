//! Who an agent is: a key, and a certificate that it signed itself.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::BASE32_NOPAD;
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::crypto::aws_lc_rs::sign as aws_lc_rs_sign;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};

/// What an agent is known by: the SHA-256 of its public key (as `SubjectPublicKeyInfo`, in DER), which stays when its
/// certificate is renewed. Written as 52 letters and digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

/// Not a fingerprint.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no fingerprint: it must be 52 letters and digits")]
pub struct InvalidFingerprint {
    text: String,
}

impl Fingerprint {
    /// Of the key that a certificate is for; `None` when it is no certificate.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
        Some(Self::of(&certificate.subject_public_key_info()))
    }

    /// Of a key in DER.
    pub fn of(key: &[u8]) -> Self {
        let hash = digest(&SHA256, key);
        Self(hash.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }

    /// From its 32 bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
    }
}

impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let bytes = BASE32_NOPAD.decode(text.trim().to_ascii_uppercase().as_bytes()).ok();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| InvalidFingerprint { text: text.into() })
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = InvalidFingerprint;

    fn try_from(text: String) -> Result<Self, InvalidFingerprint> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

/// Why an agent has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file cannot be read or written.
    #[error("cannot use the identity in {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others may read the key, so that it is none any more.
    #[error(
        "the key in {path} can be read by others (mode {mode:o}): make it 0600 if you are sure that nobody did, else remove it and pair again"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It holds no key and certificate.
    #[error("{path} does not hold a key and a certificate: restore it, or remove it and pair again")]
    Broken {
        /// The file.
        path: PathBuf,
    },
    /// No key could be made.
    #[error("cannot make a key")]
    Make(#[from] rcgen::Error),
}

/// A key, and a certificate that says so. Kept in one file that only its owner can read.
pub struct Identity {
    /// The certificate, and those between it and an authority's.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key(), fingerprint: self.fingerprint }
    }
}

impl Identity {
    /// What others know it by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The identity in this file; a new one is made, for a host of this name, when there is none.
    pub fn load_or_make(path: &Path, name: &str) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::File { path: path.into(), source };
        match std::fs::File::open(path) {
            Ok(mut file) => {
                refuse_exposed(path)?;
                let mut pem = String::new();
                file.read_to_string(&mut pem).map_err(failed)?;
                Self::from_pem(&pem).ok_or_else(|| IdentityError::Broken { path: path.into() })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let pem = new_pem(name)?;
                write_private(path, &pem).map_err(failed)?;
                Self::from_pem(&pem).ok_or_else(|| IdentityError::Broken { path: path.into() })
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// An identity that an authority gave: a certificate, with those between it and the authority's after it, and its
    /// key, both in PEM.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self, IdentityError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| IdentityError::File { path: path.into(), source })
        };
        refuse_exposed(key)?;
        let pem = format!("{}{}", read(key)?, read(certificate)?);
        Self::from_pem(&pem).ok_or_else(|| IdentityError::Broken { path: certificate.into() })
    }

    fn from_pem(pem: &str) -> Option<Self> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().ok()?;
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).ok()?;
        let fingerprint = Fingerprint::of_certificate(chain.first()?)?;
        let signing = aws_lc_rs_sign::any_supported_type(&key).ok()?;
        CertifiedKey::new(chain.clone(), signing).keys_match().ok()?;
        Some(Self { chain, key, fingerprint })
    }
}

fn refuse_exposed(path: &Path) -> Result<(), IdentityError> {
    let metadata = std::fs::metadata(path).map_err(|source| IdentityError::File { path: path.into(), source })?;
    match metadata.permissions().mode() & 0o777 {
        mode if mode & 0o077 != 0 => Err(IdentityError::Exposed { path: path.into(), mode }),
        _ => Ok(()),
    }
}

/// A new key and its certificate.
fn new_pem(name: &str) -> Result<String, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, format!("vmferry agent {name}"));
    let certificate = params.self_signed(&key)?;
    Ok(format!("{}{}", key.serialize_pem(), certificate.pem()))
}

/// Whole or not at all, also when the host loses power.
fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_kept_where_only_its_owner_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.pem");
        let made = Identity::load_or_make(&path, "alpha").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Identity::load_or_make(&path, "other name").unwrap().fingerprint(), made.fingerprint());
        let other = Identity::load_or_make(&dir.path().join("other.pem"), "alpha").unwrap();
        assert_ne!(other.fingerprint(), made.fingerprint());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn a_key_that_others_can_read_or_that_is_damaged_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity.pem");
        Identity::load_or_make(&path, "alpha").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let error = Identity::load_or_make(&path, "alpha").err().unwrap();
        assert!(matches!(error, IdentityError::Exposed { mode: 0o640, .. }), "{error}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        for damaged in ["", &whole[..whole.len() / 2], "-----BEGIN CERTIFICATE-----\nnonsense"] {
            std::fs::write(&path, damaged).unwrap();
            let error = Identity::load_or_make(&path, "alpha").err().unwrap();
            assert!(matches!(error, IdentityError::Broken { .. }), "{error}");
        }
    }

    #[test]
    fn a_fingerprint_is_read_as_it_is_written() {
        let fingerprint = Fingerprint::of(b"a certificate");
        let text = fingerprint.to_string();
        assert_eq!(text.len(), 52);
        assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
        assert_eq!(text.to_uppercase().parse::<Fingerprint>().unwrap(), fingerprint);
        for bad in ["", "short", &text[1..], &format!("{text}a"), &text.replace(&text[..1], "1")] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
