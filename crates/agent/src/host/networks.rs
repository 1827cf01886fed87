//! The host's networks that a VM is on: what its destination must have, too.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmferry_qemu::CommandLine;

/// Where the kernel tells of network interfaces.
const INTERFACES: &str = "/sys/class/net";

/// A network interface of the host that a VM is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plug {
    /// What it is called; none of one that is made when the VM starts.
    pub interface: Option<String>,
    /// The bridge that it is in.
    pub bridge: Option<String>,
}

/// Those that this command line names, as they are on this host.
pub(crate) fn plugs(command: &CommandLine) -> Vec<Plug> {
    let of = |network: vmferry_qemu::Network| match network {
        vmferry_qemu::Network::Tap { interface } => {
            let bridge = bridge_of(Path::new(INTERFACES), &interface);
            Plug { interface: Some(interface), bridge }
        }
        vmferry_qemu::Network::Bridge { bridge } => Plug { interface: None, bridge: Some(bridge) },
    };
    command.networks().into_iter().map(of).collect()
}

/// Why a VM would not be on the same networks here as there.
pub(crate) fn obstacle(plugs: &[Plug]) -> Option<String> {
    obstacle_among(Path::new(INTERFACES), plugs)
}

fn obstacle_among(interfaces: &Path, plugs: &[Plug]) -> Option<String> {
    plugs.iter().find_map(|plug| {
        let is_there = |name: &str| interfaces.join(name).exists();
        match (&plug.interface, &plug.bridge) {
            (Some(interface), _) if !is_there(interface) => {
                Some(format!("it lacks the network interface {interface}, and QEMU would make one that leads nowhere"))
            }
            (Some(interface), bridge) => {
                let ours = bridge_of(interfaces, interface);
                let in_words = |bridge: &Option<String>| match bridge {
                    Some(bridge) => format!("in the bridge {bridge}"),
                    None => "in no bridge".into(),
                };
                (ours != *bridge)
                    .then(|| format!("{interface} is {} there, and {} here", in_words(&ours), in_words(bridge)))
            }
            (None, Some(bridge)) if !interfaces.join(bridge).join("bridge").exists() => {
                Some(format!("it lacks the bridge {bridge}"))
            }
            (None, _) => None,
        }
    })
}

fn bridge_of(interfaces: &Path, interface: &str) -> Option<String> {
    let master: PathBuf = std::fs::read_link(interfaces.join(interface).join("master")).ok()?;
    Some(master.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_is_another_one_is_named() {
        let here = tempfile::tempdir().unwrap();
        for folder in ["t0", "t1", "br0/bridge"] {
            std::fs::create_dir_all(here.path().join(folder)).unwrap();
        }
        std::os::unix::fs::symlink("../br0", here.path().join("t0/master")).unwrap();
        let tap =
            |name: &str, bridge: Option<&str>| Plug { interface: Some(name.into()), bridge: bridge.map(str::to_owned) };
        let bridge = |name: &str| Plug { interface: None, bridge: Some(name.into()) };
        for good in [tap("t0", Some("br0")), tap("t1", None), bridge("br0")] {
            assert_eq!(obstacle_among(here.path(), &[good]), None);
        }
        for (bad, words) in [
            (tap("t2", None), "lacks the network interface t2"),
            (tap("t1", Some("br0")), "t1 is in no bridge there, and in the bridge br0 here"),
            (tap("t0", None), "t0 is in the bridge br0 there, and in no bridge here"),
            (bridge("br1"), "lacks the bridge br1"),
            // An interface that is no bridge.
            (bridge("t1"), "lacks the bridge t1"),
        ] {
            assert!(obstacle_among(here.path(), &[bad]).is_some_and(|why| why.contains(words)), "{words}");
        }
    }
}
