//! An sshd of our own, on loopback, with keys and a configuration that go with it: what people tunnel through today.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{LinkBenchError, Program};

const START: Duration = Duration::from_secs(5);

/// See the module's text. Ends when dropped.
pub(super) struct Sshd {
    dir: tempfile::TempDir,
    address: SocketAddr,
    server: Program,
}

impl Sshd {
    /// Starts one.
    pub(super) fn start() -> Result<Self, LinkBenchError> {
        let binary = find_sshd().ok_or_else(|| LinkBenchError::missing("sshd", "install Debian's openssh-server"))?;
        let dir = tempfile::Builder::new().prefix("vmferry-sshd-").tempdir()?;
        for key in ["host", "user"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.path().join(key))
                .status()
                .map_err(|_| LinkBenchError::missing("ssh-keygen", "install Debian's openssh-client"))?;
            if !made.success() {
                return Err(LinkBenchError::Failed(format!("ssh-keygen ended with {made}")));
            }
        }
        // The port is free until somebody takes it: sshd, within the next second.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let here = dir.path().display();
        let config = format!(
            "ListenAddress {address}\nHostKey {here}/host\nAuthorizedKeysFile {here}/user.pub\nUsePAM no\n\
             StrictModes no\nPidFile none\nPermitRootLogin prohibit-password\nLogLevel ERROR\n"
        );
        std::fs::write(dir.path().join("config"), config)?;
        let server = server(&binary, dir.path())?
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log"))?)
            .spawn()?;
        let mut sshd = Self { dir, address, server: Program(server) };
        let deadline = Instant::now() + START;
        while TcpStream::connect(address).is_err() {
            if Instant::now() > deadline || sshd.server.0.try_wait()?.is_some() {
                let log = std::fs::read_to_string(sshd.dir.path().join("log")).unwrap_or_default();
                return Err(LinkBenchError::Failed(format!("sshd does not start: {}", log.trim())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(sshd)
    }

    /// `ssh` to it, with a cipher if it is not to choose one itself, running this.
    pub(super) fn client(&self, cipher: Option<&str>, remote_command: &str) -> Command {
        let mut command = Command::new("ssh");
        // Nobody's own configuration.
        command.args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        command.args(["-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-i"]);
        command.arg(self.dir.path().join("user")).args(["-p", &self.address.port().to_string()]);
        if let Some(cipher) = cipher {
            command.args(["-c", cipher]);
        }
        command.args(["127.0.0.1", remote_command]);
        command
    }

    /// The server's process; those of its connections are its children.
    pub(super) fn pid(&self) -> u32 {
        self.server.0.id()
    }
}

/// The system's, or the one that `scripts/setup.sh --for-tests` unpacks.
fn find_sshd() -> Option<PathBuf> {
    let unpacked = unpacked_dir().join("usr/sbin/sshd");
    [PathBuf::from("/usr/sbin/sshd"), unpacked].into_iter().find(|path| path.exists())
}

fn unpacked_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/sshd")
}

/// As root, sshd wants a user of its own, which a machine without openssh-server lacks: then it is shown one, in a mount
/// namespace.
fn server(binary: &Path, dir: &Path) -> Result<Command, LinkBenchError> {
    let config = dir.join("config");
    let passwd = std::fs::read_to_string("/etc/passwd")?;
    let has_user = passwd.lines().any(|line| line.starts_with("sshd:"));
    let mut command = if has_user || !rustix::process::geteuid().is_root() {
        Command::new(binary)
    } else {
        let shown = dir.join("passwd");
        std::fs::write(&shown, format!("{passwd}sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"))?;
        let mut command = Command::new("unshare");
        let script = "mount --bind \"$0\" /etc/passwd && mkdir -p /run/sshd && exec \"$@\"";
        command.args(["--mount", "sh", "-c", script]).arg(shown).arg(binary);
        command
    };
    let libraries = unpacked_dir().join("usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH));
    command.env("LD_LIBRARY_PATH", libraries).args(["-D", "-e", "-f"]).arg(config);
    Ok(command)
}
