//! Which networks of the host a command line names.

use super::CommandLine;

/// A network of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// An interface that somebody else has put where it belongs.
    Tap {
        /// What it is called.
        interface: String,
    },
    /// A bridge, into which a helper of QEMU's puts an interface that it makes.
    Bridge {
        /// What it is called.
        bridge: String,
    },
}

impl CommandLine {
    /// The networks of the host that its cards are on. Interfaces that a script of the user's sets up are left to that.
    pub fn networks(&self) -> Vec<Network> {
        let options = ["netdev", "nic", "net"].into_iter().flat_map(|name| self.all(name));
        options
            .filter_map(|option| {
                let words = option.properties();
                let kind = words.get("type").or_else(|| option.value().split(',').next()).unwrap_or_default();
                let is_no = |key: &str| words.get(key) == Some("no");
                match kind {
                    "bridge" => Some(Network::Bridge { bridge: words.get_some("br").unwrap_or("br0").into() }),
                    "tap" if words.get_some("helper").is_some() => {
                        Some(Network::Bridge { bridge: words.get_some("br").unwrap_or("br0").into() })
                    }
                    "tap" if is_no("script") => Some(Network::Tap { interface: words.get_some("ifname")?.into() }),
                    _ => None,
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_the_host_are_found_however_they_are_said() {
        let tap = |name: &str| vec![Network::Tap { interface: name.into() }];
        let bridge = |name: &str| vec![Network::Bridge { bridge: name.into() }];
        for (line, networks) in [
            ("-netdev tap,id=n,ifname=t0,script=no,downscript=no", tap("t0")),
            ("-nic tap,ifname=t0,script=no,model=virtio", tap("t0")),
            (r#"-netdev {"type":"tap","id":"n","ifname":"t0","script":"no"}"#, tap("t0")),
            ("-netdev tap,id=n,ifname=t0,script=/etc/up", vec![]),
            ("-netdev tap,id=n,fd=7", vec![]),
            ("-netdev bridge,id=n", bridge("br0")),
            ("-netdev bridge,id=n,br=lan", bridge("lan")),
            ("-net bridge,br=lan -net nic", bridge("lan")),
            ("-netdev tap,id=n,helper=/usr/lib/qemu/qemu-bridge-helper", bridge("br0")),
            ("-netdev user,id=n -nic none", vec![]),
        ] {
            let words: Vec<String> = ["qemu"].into_iter().chain(line.split(' ')).map(str::to_owned).collect();
            assert_eq!(CommandLine::parse(&words).unwrap().networks(), networks, "{line}");
        }
    }
}
