//! What the agent sees of a QEMU, and nothing behind it: a process with QEMU's command line, a monitor and a console. The
//! tests start hundreds of them, where a real one each would need a bigger machine.
//!
//! It has 64 MiB of RAM, runs, and says yes to what it is told. It ends with its standard input, so that none is left
//! when whoever started it goes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::{Value, json};

/// As QEMU's: clients beyond it are refused while it does not take any.
const BACKLOG: i32 = 1;

fn main() -> std::io::Result<()> {
    let console = listen("-serial")?;
    // The monitor comes last: whoever finds it finds the console too.
    let monitor = listen("-qmp")?;
    let unread = |mut stream| std::io::copy(&mut stream, &mut std::io::sink()).map(drop);
    std::thread::spawn(move || serve(&console, unread));
    std::thread::spawn(move || serve(&monitor, converse));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Makes the socket of `OPTION unix:PATH,server=on,wait=off`.
fn listen(option: &str) -> std::io::Result<UnixListener> {
    let value = std::env::args().skip_while(|word| word != option).nth(1).unwrap_or_default();
    let path = value.strip_prefix("unix:").and_then(|rest| rest.split(',').next()).unwrap_or_default();
    let listener = UnixListener::bind(path)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// One client at a time, as QEMU.
fn serve(listener: &UnixListener, client: impl Fn(UnixStream) -> std::io::Result<()>) {
    for stream in listener.incoming().flatten() {
        // It has gone; there will be others.
        let _ = client(stream);
    }
}

fn converse(mut stream: UnixStream) -> std::io::Result<()> {
    let version = json!({"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "fake"});
    writeln!(stream, "{}\r", json!({"QMP": {"version": version, "capabilities": ["oob"]}}))?;
    for line in BufReader::new(stream.try_clone()?).lines() {
        let command: Value = serde_json::from_str(&line?)?;
        let name = ["execute", "exec-oob"].iter().find_map(|verb| command[verb].as_str()).unwrap_or_default();
        let mut reply = match name {
            "query-version" => json!({"return": version}),
            "query-status" => json!({"return": {"running": true, "status": "running"}}),
            "query-kvm" => json!({"return": {"enabled": true, "present": true}}),
            "query-memory-size-summary" => json!({"return": {"base-memory": 64 << 20, "plugged-memory": 0}}),
            "qom-get" if command["arguments"]["property"] == "type" => json!({"return": "pc-q35-7.2-machine"}),
            "query-cpus-fast" => json!({"return": [{"cpu-index": 0, "thread-id": std::process::id()}]}),
            "query-chardev" | "query-memdev" | "query-named-block-nodes" | "query-migrate-capabilities" => {
                json!({"return": []})
            }
            "qmp_capabilities" | "query-migrate" | "stop" | "cont" | "quit" => json!({"return": {}}),
            _ => {
                json!({"error": {"class": "CommandNotFound", "desc": format!("The command {name} has not been found")}})
            }
        };
        reply["id"] = command["id"].clone();
        writeln!(stream, "{reply}\r")?;
        if name == "quit" {
            std::process::exit(0);
        }
    }
    Ok(())
}
