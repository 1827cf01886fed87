//! Where a channel goes, as it is written: `tcp:HOST:PORT`, `unix:PATH`, `vsock:CID:PORT`, `fd:N`.

use std::path::PathBuf;
use std::str::FromStr;

/// Where a channel goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A name or IP address and a port; IPv6 addresses in brackets.
    Tcp(String),
    /// A socket in the file system.
    Unix(PathBuf),
    /// A port of the host (CID 2) or of a guest.
    Vsock {
        /// Which machine.
        cid: u32,
        /// Which port.
        port: u32,
    },
    /// What this process has been given open.
    Descriptor(u32),
}

/// Not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address: write tcp:HOST:PORT, unix:PATH, vsock:CID:PORT or fd:N")]
pub struct InvalidAddress(String);

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let read = || match text.split_once(':')? {
            ("tcp", rest) => {
                let (host, port) = rest.rsplit_once(':')?;
                port.parse::<u16>().ok()?;
                let in_brackets = host.starts_with('[') && host.ends_with(']');
                (!host.is_empty() && (in_brackets || !host.contains(':'))).then(|| Self::Tcp(rest.into()))
            }
            ("unix", path) if !path.is_empty() => Some(Self::Unix(path.into())),
            ("vsock", rest) => {
                let (cid, port) = rest.split_once(':')?;
                Some(Self::Vsock { cid: cid.parse().ok()?, port: port.parse().ok()? })
            }
            ("fd", number) => Some(Self::Descriptor(number.parse().ok().filter(|&number: &u32| number <= 1 << 30)?)),
            _ => None,
        };
        read().ok_or_else(|| InvalidAddress(text.into()))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Descriptor(number) => write!(f, "fd:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["tcp:alpha:7420", "tcp:[2001:db8::1]:7420", "unix:/run/vmferry/web1.sock", "vsock:2:7420", "fd:7"]
        {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "alpha:7420", "tcp:alpha", "tcp::1", "tcp:::1:7420", "unix:", "vsock:2", "fd:-1", "fd:x"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
