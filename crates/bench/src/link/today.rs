//! What people use today: plain TCP, ssh, and QEMU's own migration with its own TLS.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use vmferry_api::trial::Load;
use vmferry_qemu::qmp::commands::{
    CapabilityState, Migrate, MigrateIncoming, MigrateSetCapabilities, MigrationParameters, QueryMigrate,
};
use vmferry_qemu::{Endpoint, MigrationStatus, Qmp, StreamKey, protect_streams};

use super::cost::{Idle, tree_cpu, with_cpu};
use super::sshd::Sshd;
use super::{BLOCK, LinkBenchError, Measured, Program};

/// As good as no cap for QEMU, in bytes a second.
const UNLIMITED: u64 = 1 << 50;
/// What QEMU moves, in bytes.
const QEMU_RAM: u64 = 1 << 30;
const SOON: Duration = Duration::from_secs(10);
/// A migration that takes longer is not measured.
const QEMU_TIME: Duration = Duration::from_secs(120);

/// As iperf3 does: so many connections, as fast as they go.
pub(super) fn plain_tcp(load: &Load, streams: u8, time: Duration) -> Result<Measured, LinkBenchError> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let idle = Idle::begin();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut receivers = Vec::new();
        for _ in 0..streams {
            let mut to = TcpStream::connect(address)?;
            let (mut from, _) = listener.accept()?;
            senders.push(scope.spawn(move || with_cpu(move || pour(load, &mut to, begun + time))));
            receivers.push(scope.spawn(move || with_cpu(move || drain(&mut from))));
        }
        let mut measured = Measured::default();
        for sender in senders {
            let (sent, cpu) = sender.join().expect("it does not panic");
            measured.bytes += sent?;
            *measured.source_cpu.get_or_insert_default() += cpu;
        }
        for receiver in receivers {
            let (read, cpu) = receiver.join().expect("it does not panic");
            read?;
            *measured.destination_cpu.get_or_insert_default() += cpu;
        }
        measured.took = begun.elapsed();
        measured.idle = idle.share();
        Ok(measured)
    })
}

/// Writes until then; how many bytes that were.
pub(super) fn pour(load: &Load, to: &mut impl Write, until: Instant) -> std::io::Result<u64> {
    let mut written = 0;
    for block in load.blocks() {
        if Instant::now() > until {
            break;
        }
        to.write_all(&block)?;
        written += block.len() as u64;
    }
    Ok(written)
}

/// Reads to the end.
pub(super) fn drain(from: &mut impl Read) -> std::io::Result<()> {
    let mut buffer = vec![0; BLOCK];
    while from.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Through ssh, as `migrate exec:ssh ...` and every script around it do.
pub(super) fn ssh(load: &Load, sshd: &Sshd, cipher: Option<&str>, time: Duration) -> Result<Measured, LinkBenchError> {
    let mut client = sshd
        .client(cipher, "cat >/dev/null")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|_| LinkBenchError::missing("ssh", "install Debian's openssh-client"))?;
    let mut input = client.stdin.take().expect("it was asked for");
    // The login is not what is measured.
    let begun_with = load.blocks().next().map_or(Ok(()), |block| input.write_all(&block));
    std::thread::sleep(Duration::from_millis(500));
    let before = [tree_cpu(client.id()), tree_cpu(sshd.pid())];
    let idle = Idle::begin();
    let begun = Instant::now();
    let written = begun_with.and_then(|()| pour(load, &mut input, begun + time));
    let took = begun.elapsed();
    // While they live: those that ended would be counted at their parents, which end too.
    let cpu = [tree_cpu(client.id()).saturating_sub(before[0]), tree_cpu(sshd.pid()).saturating_sub(before[1])];
    let idle = idle.share();
    drop(input);
    let output = client.wait_with_output()?;
    let Some(bytes) = written.ok().filter(|_| output.status.success()) else {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(LinkBenchError::Failed(format!("ssh ended with {}: {words}", output.status)));
    };
    Ok(Measured { bytes, took, source_cpu: Some(cpu[0]), destination_cpu: Some(cpu[1]), idle, ..Measured::default() })
}

/// A QEMU with a GiB of RAM and no guest that would run.
struct Qemu {
    process: Program,
    qmp: Qmp,
}

impl Qemu {
    async fn start(dir: &Path, name: &str, backend: &str, more: &[&str]) -> Result<Self, LinkBenchError> {
        let socket = dir.join(format!("{name}.sock"));
        let process = std::process::Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-S", "-m", &(QEMU_RAM >> 20).to_string()])
            .args(["-machine", "q35,accel=tcg,memory-backend=ram", "-object", backend, "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|_| LinkBenchError::missing("qemu-system-x86_64", "install Debian's qemu-system-x86"))?;
        let process = Program(process);
        Ok(Self { qmp: Qmp::connect(&socket, SOON).await?, process })
    }
}

/// QEMU moves a GiB of this, by itself; with multifd when there is more than one stream, and with TLS of these
/// ciphers, in `GnuTLS`'s words.
pub(super) async fn qemu(load: &Load, tls: Option<&str>, streams: u8) -> Result<Measured, LinkBenchError> {
    let dir = tempfile::Builder::new().prefix("vmferry-bench-").tempdir_in(memory_dir())?;
    let ram = dir.path().join("ram");
    write_ram(&ram, load)?;
    let file = format!("memory-backend-file,id=ram,share=on,size={QEMU_RAM},mem-path={}", ram.display());
    let source = Qemu::start(dir.path(), "source", &file, &[]).await?;
    let anonymous = format!("memory-backend-ram,id=ram,size={QEMU_RAM}");
    let destination = Qemu::start(dir.path(), "destination", &anonymous, &["-incoming", "defer"]).await?;
    let key = StreamKey::new(&vmferry_link::random_bytes());
    for (qemu, endpoint, name) in [(&source, Endpoint::Client, "client"), (&destination, Endpoint::Server, "server")] {
        if let Some(priority) = tls {
            protect_streams(&qemu.qmp, &dir.path().join(name), &key, endpoint, priority).await?;
        }
        let mut parameters = MigrationParameters { max_bandwidth: Some(UNLIMITED), ..MigrationParameters::default() };
        if streams > 1 {
            parameters.multifd_channels = Some(streams);
            let multifd = CapabilityState { capability: "multifd".into(), state: true };
            qemu.qmp.execute(MigrateSetCapabilities { capabilities: vec![multifd] }).await?;
        }
        qemu.qmp.execute(parameters).await?;
    }
    destination.qmp.execute(MigrateIncoming { uri: "tcp:127.0.0.1:0".into() }).await?;
    let mut listens = destination.qmp.execute(QueryMigrate {}).await?.socket_address.into_iter().flatten();
    let port = listens.find_map(|address| address.tcp_port());
    let port = port.ok_or_else(|| LinkBenchError::Failed("QEMU does not tell where it listens".into()))?;
    let pids = [source.process.0.id(), destination.process.0.id()];
    let before = pids.map(tree_cpu);
    let idle = Idle::begin();
    let begun = Instant::now();
    source.qmp.execute(Migrate { uri: format!("tcp:127.0.0.1:{port}"), resume: None }).await?;
    loop {
        let info = source.qmp.execute(QueryMigrate {}).await?;
        match info.status {
            Some(MigrationStatus::Completed) => break,
            Some(MigrationStatus::Failed) => {
                let why = info.error_desc.unwrap_or_else(|| "no reason is given".into());
                return Err(LinkBenchError::Failed(format!("QEMU's migration failed: {why}")));
            }
            _ if begun.elapsed() > QEMU_TIME => {
                return Err(LinkBenchError::Failed(format!("QEMU's migration takes more than {QEMU_TIME:?}")));
            }
            _ => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
    let took = begun.elapsed();
    let cpu = [0, 1].map(|side| tree_cpu(pids[side]).saturating_sub(before[side]));
    Ok(Measured {
        bytes: QEMU_RAM,
        took,
        source_cpu: Some(cpu[0]),
        destination_cpu: Some(cpu[1]),
        idle: idle.share(),
        ..Measured::default()
    })
}

/// A folder whose files are in memory, if there is one.
fn memory_dir() -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    if shared.is_dir() { shared } else { std::env::temp_dir() }
}

fn write_ram(path: &Path, load: &Load) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    let mut left = QEMU_RAM;
    for block in load.blocks() {
        let count = left.min(block.len() as u64);
        file.write_all(&block[..count as usize])?;
        left -= count;
        if left == 0 {
            break;
        }
    }
    Ok(())
}
