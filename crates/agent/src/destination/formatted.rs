//! Images of formats that only QEMU knows, by a QEMU of their own: it ends when this is dropped.

use std::io;
use std::path::Path;

use vmferry_api::in_one_line;
use vmferry_nbd::backend::{Backend, Zeroing};
use vmferry_nbd::client::Remote;
use vmferry_nbd::transmission::Extent;
use vmferry_nbd::uri::Place;
use vmferry_qemu::{EXPORT, ImageServer, NewImage, Qcow2};

use crate::error::AgentError;
use crate::peers::OwnImage;

/// See the module's text.
pub(super) struct Formatted {
    // In the order in which they must end.
    image: Remote,
    _server: ImageServer,
}

impl Formatted {
    /// A new one, in a file that is there and empty.
    pub(super) async fn make(qemu: &Path, within: &Path, image: OwnImage) -> Result<Self, AgentError> {
        let OwnImage { path, format, size, backing, .. } = image;
        Self::over(ImageServer::make(qemu, within, &NewImage { path, format, size, backing }).await?).await
    }

    /// One that is there, to be read: what is in it, not what is behind it.
    pub(super) async fn read(qemu: &Path, within: &Path, path: &Path, format: &str) -> Result<Self, AgentError> {
        let header = Qcow2::of(path).map_err(AgentError::io(path))?;
        if format != "qcow2" || header.is_none_or(|it| it.has_data_elsewhere) {
            let message = format!("{} is not a {format} image with all of it in one file", path.display());
            return Err(AgentError::Conflict { message, hint: None });
        }
        Self::over(ImageServer::read(qemu, within, path, format).await?).await
    }

    async fn over(server: ImageServer) -> Result<Self, AgentError> {
        let place = Place::Unix(server.socket().into());
        let connect = move || Remote::connect(&place, None, EXPORT, 1);
        let connected = tokio::task::spawn_blocking(connect).await.expect("connecting does not panic");
        let image = connected.map_err(|error| AgentError::Conflict {
            message: format!("its disk: {}", in_one_line(&error)),
            hint: None,
        })?;
        Ok(Self { image, _server: server })
    }
}

impl Backend for Formatted {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        self.image.read_only()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.image.write(offset, bytes)
    }

    fn write_zeroes(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        self.image.write_zeroes(offset, length, how)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.image.trim(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>> {
        self.image.status(offset, length, most)
    }
}
