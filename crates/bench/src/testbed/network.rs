//! The network between two hosts of a testbed: two namespaces and a veth pair, or the loopback address.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Result, TestbedError};

/// Addresses reserved for documentation: they exist only inside our namespaces.
const ADDRESSES: [[u8; 4]; 2] = [[192, 0, 2, 1], [192, 0, 2, 2]];
/// Those that mean something on their link only.
const LINK_LOCAL: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1), Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2)];
const PORT: u16 = 7420;
/// The number of `link0` in either namespace, which tells on which link a link-local address is.
const LINK: u32 = 7;

/// Testbeds of one process, told apart.
static COUNT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Network {
    /// Empty on the loopback address.
    namespaces: Vec<String>,
    /// The hosts have no other addresses than link-local ones of IPv6.
    link_local: bool,
}

impl Network {
    pub(crate) fn set_up(namespaces: bool, link_local: bool, bits: Option<u64>) -> Result<Self> {
        if !namespaces {
            return Ok(Self { namespaces: Vec::new(), link_local: false });
        }
        remove_orphans();
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // Kept from the first namespace on, so that a failure half-way removes what there is.
        let mut network = Self { namespaces: Vec::new(), link_local };
        for host in ["a", "b"] {
            let name = format!("vmferry-{id}-{host}");
            ip(&format!("netns add {name}"))?;
            network.namespaces.push(name);
        }
        let [a, b] = [&network.namespaces[0], &network.namespaces[1]];
        ip(&format!("-n {a} link add link0 index {LINK} type veth peer name link0 index {LINK} netns {b}"))?;
        for (index, name) in network.namespaces.iter().enumerate() {
            let address = match link_local {
                true => format!("{}/64 dev link0 nodad", LINK_LOCAL[index]),
                false => format!("{}/24 dev link0", IpAddr::from(ADDRESSES[index])),
            };
            ip(&format!("-n {name} address add {address}"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set link0 up"))?;
            if let Some(bits) = bits {
                run("tc", &format!("-n {name} qdisc add dev link0 root tbf rate {bits}bit burst 256kb latency 50ms"))?;
            }
        }
        Ok(network)
    }

    pub(crate) fn address(&self, index: usize) -> Result<SocketAddr> {
        if self.link_local {
            return Ok(SocketAddrV6::new(LINK_LOCAL[index], PORT, 0, LINK).into());
        }
        if !self.namespaces.is_empty() {
            return Ok(SocketAddr::from((ADDRESSES[index], PORT)));
        }
        // The port is free until somebody takes it: the agent, within the next second.
        Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
    }

    pub(crate) fn enter(&self, index: usize) -> Vec<String> {
        match self.namespaces.get(index) {
            Some(name) => ["ip", "netns", "exec", name].map(str::to_owned).to_vec(),
            None => Vec::new(),
        }
    }

    /// Where a namespace is entered; none on the loopback address.
    pub(crate) fn namespace(&self, index: usize) -> Option<PathBuf> {
        self.namespaces.get(index).map(|name| Path::new("/run/netns").join(name))
    }

    pub(crate) fn set_link(&self, up: bool) -> Result<()> {
        let name = self.namespaces.first().ok_or(TestbedError::Missing {
            what: "a link between namespaces".into(),
            hint: "set the testbed up with namespaces",
        })?;
        ip(&format!("-n {name} link set link0 {}", if up { "up" } else { "down" }))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.namespaces {
            if let Err(error) = ip(&format!("netns delete {name}")) {
                eprintln!("{error}");
            }
        }
    }
}

/// Removes what testbeds left whose process was killed, with what still runs in there: agents, and the QEMUs of those.
fn remove_orphans() {
    let Ok(known) = std::fs::read_dir("/run/netns") else { return };
    for name in known.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let Some(owner) = owner(&name).filter(|pid| !Path::new(&format!("/proc/{pid}")).exists()) else { continue };
        eprintln!("removing what process {owner}, which was killed, left: the network namespace {name}");
        let inside = Command::new("ip").args(["netns", "pids", &name]).output();
        let inside = inside.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for pid in inside.split_whitespace().filter_map(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?)) {
            // An error means that it has ended already.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        if let Err(error) = ip(&format!("netns delete {name}")) {
            eprintln!("{error}");
        }
    }
}

/// The process that made a namespace of this name; none when no testbed did.
fn owner(name: &str) -> Option<u32> {
    match name.strip_prefix("vmferry-")?.split('-').collect::<Vec<_>>()[..] {
        [pid, count, "a" | "b"] => count.parse::<u32>().ok().and(pid.parse().ok()),
        _ => None,
    }
}

fn ip(arguments: &str) -> Result<()> {
    run("ip", arguments)
}

pub(super) fn run(program: &str, arguments: &str) -> Result<()> {
    let output = Command::new(program).args(arguments.split(' ')).output()?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(TestbedError::Command { command: format!("{program} {arguments}"), stderr })
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn only_what_a_testbed_made_is_its() {
        assert_eq!(owner("vmferry-4711-0-a"), Some(4711));
        for other in ["vmferry-2024-lab", "vmferry-4711-0-c", "vmferry-4711-0-a-b", "vmferry--0-a", "web"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
