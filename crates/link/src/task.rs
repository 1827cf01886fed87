//! The face of a channel for tasks: the same bytes, the same layers, but nobody blocks.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::channel::{Channel, ReadHalf, WriteHalf};

/// A [`Channel`] for tasks of tokio.
pub struct AsyncChannel {
    descriptor: AsyncFd<Arc<OwnedFd>>,
    reader: ReadHalf,
    writer: WriteHalf,
}

impl Channel {
    /// For tasks; must be called within a runtime. To connect, do it on a thread for blocking work first.
    pub fn into_async(self) -> io::Result<AsyncChannel> {
        let descriptor = Arc::clone(self.descriptor());
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        let (reader, writer) = self.split();
        // Its successor is unsafe, for descriptors that may not be open any more; this one is for as long as it lives.
        #[expect(deprecated)]
        let descriptor = AsyncFd::new(descriptor)?;
        Ok(AsyncChannel { descriptor, reader, writer })
    }
}

fn would_block<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

impl AsyncRead for AsyncChannel {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Layers may have bytes already, for which the descriptor is never ready.
        let mut read = this.reader.read(into.initialize_unfilled());
        while would_block(&read) {
            let mut ready = ready!(this.descriptor.poll_read_ready(context))?;
            if let Ok(result) = ready.try_io(|_| this.reader.read(into.initialize_unfilled())) {
                read = result;
            }
        }
        into.advance(read?);
        Poll::Ready(Ok(()))
    }
}

impl AsyncChannel {
    fn poll_writing<T>(
        &mut self,
        context: &mut Context<'_>,
        mut write: impl FnMut(&mut WriteHalf) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        loop {
            let mut ready = ready!(self.descriptor.poll_write_ready(context))?;
            if let Ok(result) = ready.try_io(|_| write(&mut self.writer)) {
                return Poll::Ready(result);
            }
        }
    }
}

impl AsyncWrite for AsyncChannel {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_writing(context, |writer| writer.write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_writing(context, |writer| writer.write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_writing(context, Write::flush)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_writing(context, WriteHalf::end)
    }
}
