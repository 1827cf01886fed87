//! What can go wrong with images that are made or opened for others.

use std::io;
use std::path::PathBuf;

/// Why an image is not opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is not where images may be.
    #[error("{path} is in none of the folders where {host} keeps images ({})", in_words(folders))]
    NotAllowed {
        /// The host.
        host: String,
        /// The image.
        path: PathBuf,
        /// Where they may be.
        folders: Vec<PathBuf>,
    },
    /// Something is there, and it was to be made.
    #[error("there is something at {path} on {host} already, and nothing tells that it may go")]
    Exists {
        /// The host.
        host: String,
        /// The image.
        path: PathBuf,
    },
    /// It is a folder, a pipe, a character device.
    #[error("{path} on {host} is neither a file nor a block device")]
    OfAnotherKind {
        /// The host.
        host: String,
        /// The image.
        path: PathBuf,
    },
    /// The kernel says so.
    #[error("cannot open {path} on {host}")]
    Io {
        /// The host.
        host: String,
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// What its user may do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotAllowed { .. } => {
                Some("name another place, or add the folder to image_folders in that agent's configuration")
            }
            Self::Exists { .. } => Some("remove it, or name another place"),
            Self::OfAnotherKind { .. } | Self::Io { .. } => None,
        }
    }
}

fn in_words(folders: &[PathBuf]) -> String {
    match folders {
        [] => "image_folders names none".into(),
        some => some.iter().map(|it| it.display().to_string()).collect::<Vec<_>>().join(", "),
    }
}
