//! TLS for QEMU's own migration streams, with a key for one migration that both QEMUs are given beforehand (TLS-PSK).
//!
//! QEMU reads the key from a file in a folder of its `tls-creds-psk` object; the server's end reads it anew for every
//! connection, so the file stays for as long as the migration may reconnect. See QEMU's docs/system/tls.rst.

use std::fmt::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use vmferry_link::Cipher;

use crate::qmp::commands::{MigrationParameters, ObjectAdd, ObjectDel};
use crate::qmp::{Qmp, QmpError};

/// What the object is called in QEMU.
const ID: &str = "vmferry-streams";
const USER: &str = "vmferry";
/// The group ffdhe3072 of RFC 7919. Without a group of ours the server's end makes its own, which takes it a second.
const DH_GROUP: &str = include_str!("stream_tls/ffdhe3072.pem");

/// The key of one migration. It does not show itself in logs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StreamKey(String);

impl StreamKey {
    /// From unpredictable bytes.
    pub fn new(random: &[u8; 32]) -> Self {
        let mut hex = String::with_capacity(64);
        for byte in random {
            write!(hex, "{byte:02x}").expect("a String takes everything");
        }
        Self(hex)
    }

    /// It is what [`StreamKey::new`] makes; what came over a network may be anything.
    pub fn is_valid(&self) -> bool {
        self.0.len() == 64 && self.0.bytes().all(|byte| byte.is_ascii_hexdigit())
    }
}

impl std::fmt::Debug for StreamKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StreamKey(…)")
    }
}

/// Which end of the connections a QEMU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The destination's.
    Server,
    /// The source's.
    Client,
}

/// Why QEMU's streams cannot be protected.
#[derive(Debug, thiserror::Error)]
pub enum StreamTlsError {
    /// The key cannot be written where QEMU reads it.
    #[error("cannot write the key of the migration's streams")]
    File(#[from] std::io::Error),
    /// QEMU does not take it.
    #[error("QEMU cannot encrypt its streams")]
    Qmp(#[from] QmpError),
}

/// Has QEMU take or make migration connections only with this key. `dir` is made if need be, for nobody but us; the
/// `priority` says which ciphers, in `GnuTLS`'s words.
pub async fn protect_streams(
    qmp: &Qmp,
    dir: &Path,
    key: &StreamKey,
    endpoint: Endpoint,
    priority: &str,
) -> Result<(), StreamTlsError> {
    write_files(dir, key)?;
    unprotect_streams(qmp).await?;
    let credentials = ObjectAdd {
        qom_type: "tls-creds-psk".into(),
        id: ID.into(),
        endpoint: match endpoint {
            Endpoint::Server => "server",
            Endpoint::Client => "client",
        },
        dir: dir.display().to_string(),
        username: (endpoint == Endpoint::Client).then(|| USER.into()),
        priority: priority.into(),
    };
    qmp.execute(credentials).await?;
    set_credentials(qmp, ID).await?;
    Ok(())
}

/// Takes back what an earlier migration left: QEMU's streams are plain then.
pub async fn unprotect_streams(qmp: &Qmp) -> Result<(), QmpError> {
    set_credentials(qmp, "").await?;
    match qmp.execute(ObjectDel { id: ID.into() }).await {
        // There was none.
        Ok(_) | Err(QmpError::Command { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

async fn set_credentials(qmp: &Qmp, id: &str) -> Result<(), QmpError> {
    let parameters = MigrationParameters { tls_creds: Some(id.into()), ..MigrationParameters::default() };
    qmp.execute(parameters).await?;
    Ok(())
}

fn write_files(dir: &Path, key: &StreamKey) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    write_private(&dir.join("keys.psk"), &format!("{USER}:{}\n", key.0))?;
    write_private(&dir.join("dh-params.pem"), DH_GROUP)
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}

/// `GnuTLS`'s words for a cipher that is to encrypt QEMU's streams.
///
/// With a key that was exchanged beforehand, TLS 1.3 has only ciphers with SHA-256. `GnuTLS`'s own choice among those
/// is `ChaCha20`, half as fast as AES on most processors; AES-256 is there in TLS 1.2.
pub fn tls_priority(cipher: Cipher) -> &'static str {
    match cipher {
        Cipher::Aes128Gcm => "NORMAL:-CIPHER-ALL:+AES-128-GCM",
        Cipher::Aes256Gcm => "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+AES-256-GCM",
        Cipher::ChaCha20Poly1305 => "NORMAL:-CIPHER-ALL:+CHACHA20-POLY1305",
    }
}

/// A guest with more RAM may send more than 256 GiB over one connection, in bytes.
const MOST_RAM_WITH_TLS: u64 = 96 << 30;

/// Whether QEMU's own TLS holds for a guest with so much RAM. `GnuTLS` gives a connection a new key after 16 M records,
/// 256 GiB, of AES-GCM, and QEMU before 10.1 does not survive that on one with a return path (QEMU issue 1937).
pub fn tls_carries(ram_bytes: u64) -> bool {
    ram_bytes <= MOST_RAM_WITH_TLS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_hexadecimal_and_not_shown() {
        let key = StreamKey::new(&[0xA5; 32]);
        assert!(key.is_valid());
        assert_eq!(serde_json::to_string(&key).unwrap(), format!("{:?}", "a5".repeat(32)));
        assert!(!format!("{key:?}").contains("a5"));
        for bad in ["", "a5", "a5\nother:00", &"g".repeat(64)] {
            assert!(!StreamKey(bad.into()).is_valid(), "{bad:?}");
        }
    }

    #[test]
    fn the_key_is_in_a_file_that_only_we_can_read() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("tls");
        write_files(&dir, &StreamKey::new(&[1; 32])).unwrap();
        write_files(&dir, &StreamKey::new(&[2; 32])).unwrap();
        assert_eq!(std::fs::read_to_string(dir.join("keys.psk")).unwrap(), format!("vmferry:{}\n", "02".repeat(32)));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join("keys.psk"))), (0o700, 0o600));
    }
}
