//! How `nbd` fails.

use std::io;
use std::path::PathBuf;

use vmferry_link::IdentityError;
use vmferry_nbd::backend::OpenError;
use vmferry_nbd::client::ClientError;
use vmferry_nbd::copy::CopyError;
use vmferry_nbd::tls::TlsError;
use vmferry_nbd::uri::BadUri;

/// Why nothing was served, told or copied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NbdFailure {
    #[error(transparent)]
    Uri(#[from] BadUri),
    #[error("{0:?} is no place to listen at: give unix:PATH, or ADDRESS:PORT")]
    Where(String),
    #[error("{at} can be reached from other hosts, and without TLS whoever does reads and writes the images")]
    Unprotected { at: String },
    #[error("two images are called {0:?}: serve them one by one, or by links with other names")]
    SameName(String),
    #[error(transparent)]
    Image(#[from] OpenError),
    #[error("cannot listen at {at}")]
    Listen { at: String, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("{0} wants TLS, and nothing says whom to trust")]
    NoTls(String),
    #[error("TLS was asked for, and {0} is a URI without it: write nbds:// or nbds+unix://")]
    PlainUri(String),
    #[error(transparent)]
    Server(#[from] ClientError),
    #[error("{path} exists and has {found} bytes, the source {needed}")]
    OtherSize { path: PathBuf, found: u64, needed: u64 },
    #[error("cannot make {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error("the copy is not whole")]
    Copy(#[from] CopyError),
}

impl NbdFailure {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Uri(_) | Self::Where(_) | Self::NoTls(_) | Self::PlainUri(_) => 2,
            Self::Unprotected { .. }
            | Self::SameName(_)
            | Self::Image(_)
            | Self::OtherSize { .. }
            | Self::Copy(CopyError::TooSmall { .. } | CopyError::ReadOnly | CopyError::Crooked { .. }) => 3,
            _ => 1,
        }
    }

    pub(crate) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unprotected { .. } => Some("give --tls-cert and --tls-key, or --plain if the network is yours alone"),
            Self::NoTls(_) => Some("give --tls-ca with the authority's certificate, or --tls-identity and --tls-peer"),
            Self::OtherSize { .. } => Some("remove it, or name another"),
            _ => None,
        }
    }
}
