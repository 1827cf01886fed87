//! Our server beside nbdkit and qemu-nbd on the same image: nbdcopy to nowhere, and fio with small random requests.
//!
//! `cargo run --release -p vmferry-nbd --example beside [ROUNDS]`. Servers take turns in each round, so that whatever else the
//! machine does strikes all of them; medians are told, and the ratio to the better of the other two.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_nbd::backend::{Access, File};
use vmferry_nbd::server::{Listening, Served, Server, Where};

const IMAGE: u64 = 1 << 30;
const SERVERS: [&str; 3] = ["vmferry", "nbdkit", "qemu-nbd"];
/// Name, unit, and what is run.
const TRIALS: [(&str, &str); 4] = [
    ("nbdcopy -C 1 to null", "MiB/s"),
    ("nbdcopy -C 4 to null", "MiB/s"),
    ("fio 4 KiB random read, depth 16", "IOPS"),
    ("fio 4 KiB random write, depth 16", "IOPS"),
];

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let rounds = std::env::args().nth(1).map_or(Ok(5), |it| it.parse::<usize>())?;
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("image");
    let mut random = fastrand::Rng::with_seed(1);
    let bytes: Vec<u8> = (0..IMAGE / 8).flat_map(|_| random.u64(..).to_le_bytes()).collect();
    std::fs::write(&image, bytes)?;
    println!("{} MiB of data in the page cache, {rounds} rounds, medians\n", IMAGE >> 20);
    println!("{:<34} {:>12} {:>12} {:>12}  ratio to the better", "", SERVERS[0], SERVERS[1], SERVERS[2]);
    for (trial, (name, unit)) in TRIALS.into_iter().enumerate() {
        let mut figures = [const { Vec::new() }; 3];
        for round in 0..rounds {
            for turn in 0..3 {
                let server = (turn + round) % 3;
                figures[server].push(measure(dir.path(), &image, server, trial)?);
            }
        }
        let [ours, nbdkit, qemu_nbd] = figures.map(median);
        let ratio = ours / nbdkit.max(qemu_nbd);
        println!("{name:<34} {ours:>12.0} {nbdkit:>12.0} {qemu_nbd:>12.0}  {ratio:.2}  ({unit})");
    }
    Ok(())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

enum Running {
    Ours(#[expect(dead_code, reason = "it serves until it is dropped")] Listening),
    Theirs(Child),
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Self::Theirs(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(image: &Path, socket: &Path, server: usize) -> Result<Running, Error> {
    let mut command = match server {
        0 => {
            let backend = Arc::new(File::open(image, Access::Write)?);
            let disk = Served { name: String::new(), description: String::new(), backend };
            return Ok(Running::Ours(Listening::begin(Server::new(vec![disk], None), &Where::Unix(socket.into()))?));
        }
        1 => {
            let mut command = Command::new("nbdkit");
            command.arg("-f").arg("-U").arg(socket).arg("file").arg(image);
            command
        }
        _ => {
            let mut command = Command::new("qemu-nbd");
            command.args(["-t", "-e", "8", "-f", "raw", "-k"]).arg(socket).arg(image);
            command
        }
    };
    let running = Running::Theirs(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?);
    let until = Instant::now() + Duration::from_secs(10);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        if Instant::now() > until {
            return Err(format!("{} takes no connection", SERVERS[server]).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(running)
}

fn measure(dir: &Path, image: &Path, server: usize, trial: usize) -> Result<f64, Error> {
    let socket = dir.join("socket");
    let _ = std::fs::remove_file(&socket);
    let _running = start(image, &socket, server)?;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    if trial < 2 {
        let begun = Instant::now();
        let connections = if trial == 0 { "1" } else { "4" };
        let ended = Command::new("nbdcopy").args(["-C", connections, &uri, "null:"]).status()?;
        return match ended.success() {
            true => Ok((IMAGE >> 20) as f64 / begun.elapsed().as_secs_f64()),
            false => Err("nbdcopy failed".into()),
        };
    }
    let (what, field) = if trial == 2 { ("randread", 7) } else { ("randwrite", 48) };
    let job = dir.join("job");
    let text = format!("[job]\nioengine=nbd\nuri={uri}\nrw={what}\nbs=4k\niodepth=16\ntime_based\nruntime=3\n");
    std::fs::write(&job, text)?;
    let output = Command::new("fio").arg("--output-format=terse").arg(&job).output()?;
    let told = String::from_utf8(output.stdout)?;
    let figures = told.lines().rev().find(|line| line.contains(';')).ok_or("fio tells nothing")?;
    Ok(figures.split(';').nth(field).ok_or("fio tells too little")?.parse()?)
}
