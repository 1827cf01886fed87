//! The serial console of a VM, kept open for as long as the agent lives.
//!
//! QEMU's serial port is a Unix socket that takes one client. The agent is that client: it always reads, so that a
//! guest never waits for somebody to look, keeps the last [`SCROLLBACK`] bytes, and shows the stream to any number of
//! viewers. A viewer too slow to follow loses output, never the guest time.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc};
use vmferry_api::witness::monotonic_ns;

/// How much of the past a new viewer is shown, in bytes.
const SCROLLBACK: usize = 64 << 10;
/// How many pieces of output a viewer may be behind.
const VIEWER_LAG: usize = 256;

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Console {
    shared: Arc<Mutex<Shared>>,
    input: mpsc::Sender<Bytes>,
}

struct Shared {
    past: VecDeque<u8>,
    /// None when QEMU has ended.
    output: Option<broadcast::Sender<Printed>>,
}

/// Something that was printed.
#[derive(Clone, Debug)]
pub(crate) struct Printed {
    /// When it came from QEMU, in ns of the monotonic clock.
    pub(crate) at_ns: u64,
    /// What.
    pub(crate) bytes: Bytes,
}

/// One viewer's end.
pub(crate) struct Viewer {
    /// What was printed before.
    pub(crate) past: Bytes,
    /// What is printed from now on; ends with the VM.
    pub(crate) output: broadcast::Receiver<Printed>,
    /// What the viewer types.
    pub(crate) input: mpsc::Sender<Bytes>,
}

impl Console {
    /// Connects to the console's socket; the connection lasts until QEMU ends.
    pub(crate) async fn open(socket: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let shared =
            Arc::new(Mutex::new(Shared { past: VecDeque::new(), output: Some(broadcast::channel(VIEWER_LAG).0) }));
        let (input, typed) = mpsc::channel(16);
        tokio::spawn(pump(stream, Arc::clone(&shared), typed, socket.into()));
        Ok(Self { shared, input })
    }

    /// A new viewer, with the past and without a gap after it.
    pub(crate) fn view(&self) -> Viewer {
        let shared = lock(&self.shared);
        Viewer {
            past: shared.past.iter().copied().collect(),
            output: shared.output.as_ref().map_or_else(|| broadcast::channel(1).1, broadcast::Sender::subscribe),
            input: self.input.clone(),
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().expect("no holder of this lock panics")
}

async fn pump(stream: UnixStream, shared: Arc<Mutex<Shared>>, mut typed: mpsc::Receiver<Bytes>, socket: PathBuf) {
    let (mut output, mut input) = stream.into_split();
    // A guest that does not take what is typed must still be heard.
    let typing = async {
        while let Some(bytes) = typed.recv().await {
            if let Err(error) = input.write_all(&bytes).await {
                tracing::warn!(socket = %socket.display(), %error, "the console takes no input");
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let hearing = async {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match output.read(&mut buffer).await {
                Ok(0) => break,
                Ok(count) => lock(&shared).print(monotonic_ns(), &buffer[..count]),
                Err(error) => {
                    tracing::warn!(socket = %socket.display(), %error, "the console broke");
                    break;
                }
            }
        }
    };
    tokio::select! { () = typing => {}, () = hearing => {} }
    // Whoever still holds the VM, viewers see its end now.
    lock(&shared).output = None;
}

impl Shared {
    // Under one lock with the scrollback, so that a viewer who joins now misses nothing and sees nothing twice.
    fn print(&mut self, at_ns: u64, bytes: &[u8]) {
        self.past.extend(bytes);
        let surplus = self.past.len().saturating_sub(SCROLLBACK);
        self.past.drain(..surplus);
        if let Some(output) = &self.output {
            // An error means that nobody looks.
            let _ = output.send(Printed { at_ns, bytes: Bytes::copy_from_slice(bytes) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn guest_and_console() -> (tempfile::TempDir, UnixStream, Console) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let console = Console::open(&path).await.unwrap();
        let (guest, _) = listener.accept().await.unwrap();
        (dir, guest, console)
    }

    #[tokio::test]
    async fn a_late_viewer_sees_the_past_and_then_the_rest() {
        let (_dir, mut guest, console) = guest_and_console().await;
        let mut early = console.view();
        guest.write_all(b"boot\n").await.unwrap();
        assert_eq!(early.output.recv().await.unwrap().bytes, "boot\n");
        let mut late = console.view();
        assert_eq!(late.past, "boot\n");
        guest.write_all(b"login:").await.unwrap();
        let printed = late.output.recv().await.unwrap();
        assert_eq!(printed.bytes, "login:");
        assert!((1..=monotonic_ns()).contains(&printed.at_ns));
    }

    #[tokio::test]
    async fn viewers_see_the_end_while_somebody_still_holds_the_console() {
        let (_dir, guest, console) = guest_and_console().await;
        let mut viewer = console.view();
        drop(guest);
        for viewer in [&mut viewer, &mut console.view()] {
            let end = tokio::time::timeout(std::time::Duration::from_secs(5), viewer.output.recv());
            assert!(matches!(end.await, Ok(Err(broadcast::error::RecvError::Closed))));
        }
    }

    #[tokio::test]
    async fn a_viewer_that_does_not_read_never_blocks_the_guest() {
        let (_dir, mut guest, console) = guest_and_console().await;
        let _idle = console.view();
        let line = vec![b'x'; 4096];
        for _ in 0..4096 {
            guest.write_all(&line).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_a_viewer_types_reaches_the_guest() {
        let (_dir, mut guest, console) = guest_and_console().await;
        console.view().input.send(Bytes::from_static(b"root\n")).await.unwrap();
        let mut typed = [0; 5];
        guest.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"root\n");
    }
}
