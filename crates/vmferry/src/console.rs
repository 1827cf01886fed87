//! `vmferry console`: a VM's serial port on this terminal.

use std::io::{IsTerminal, Read};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use vmferry_api::client::Client;

use crate::failure::Failure;

/// Ctrl-]
const DETACH: u8 = 0x1d;

pub(crate) async fn run(client: &Client, name: &str) -> Result<(), Failure> {
    let connection = client.console(name).await?;
    let interactive = std::io::stdin().is_terminal();
    let raw = if interactive { Some(RawTerminal::enter().map_err(Failure::Terminal)?) } else { None };
    if interactive {
        eprint!("connected to {name}; Ctrl-] detaches\r\n");
    }
    let end = relay(connection, interactive).await.map_err(Failure::Terminal)?;
    drop(raw);
    if interactive {
        eprintln!("\n{end}");
    }
    Ok(())
}

/// Copies both ways; tells how it ended.
async fn relay(connection: impl AsyncRead + AsyncWrite, interactive: bool) -> std::io::Result<&'static str> {
    let (mut output, mut input) = tokio::io::split(connection);
    let mut typed = read_stdin();
    let mut stdout = tokio::io::stdout();
    let mut buffer = vec![0; 16 << 10];
    loop {
        tokio::select! {
            read = output.read(&mut buffer) => match read? {
                0 => return Ok("the console ended"),
                count => {
                    stdout.write_all(&buffer[..count]).await?;
                    stdout.flush().await?;
                }
            },
            Some(bytes) = typed.recv() => {
                let detach = bytes.iter().position(|byte| interactive && *byte == DETACH);
                input.write_all(&bytes[..detach.unwrap_or(bytes.len())]).await?;
                if detach.is_some() {
                    return Ok("detached");
                }
            }
        }
    }
}

/// Standard input from a thread of its own, since a terminal cannot be waited for otherwise.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        let mut stdin = std::io::stdin();
        while let Ok(count @ 1..) = stdin.read(&mut buffer) {
            if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The terminal passes on every key; it is set back when this is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> std::io::Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}
