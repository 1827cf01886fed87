//! Where an export is, as text: the NBD project's URIs (uri.md).

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port where no other is said.
const PORT: u16 = 10809;

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Behind a Unix socket.
    Unix(PathBuf),
    /// Behind a TCP port.
    Tcp {
        /// A name or an address, the latter without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// An export and how to get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Where its server is.
    pub place: Place,
    /// What it is called; may be empty.
    pub export: String,
    /// Only over TLS.
    pub tls: bool,
    /// The name that the server's certificate must have, if not its host's.
    pub tls_name: Option<String>,
}

/// What is wrong with a URI.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{uri:?} is no NBD URI: {why}")]
pub struct BadUri {
    uri: String,
    why: String,
}

impl Uri {
    /// Whether it looks like one, and not like a path.
    pub fn is_meant_by(text: &str) -> bool {
        ["nbd:", "nbds:", "nbd+", "nbds+"].iter().any(|begin| text.starts_with(begin))
    }

    fn parse(text: &str) -> Result<Self, String> {
        const EXAMPLES: &str = "give nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, with nbds for TLS";
        let (scheme, rest) = text.split_once("://").ok_or(EXAMPLES)?;
        let (tls, unix) = match scheme {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(EXAMPLES.into()),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (mut socket, mut tls_name) = (None, None);
        for parameter in query.split('&').filter(|it| !it.is_empty()) {
            let (key, value) = parameter.split_once('=').ok_or("a parameter has the form KEY=VALUE")?;
            let value = decode(value)?;
            match key {
                "socket" => socket = Some(value),
                "tls-hostname" => tls_name = Some(value),
                "tls-type" if value == "x509" => {}
                "tls-type" => return Err(format!("only tls-type=x509 is known here, not {value:?}")),
                "tls-verify-peer" if value == "1" => {}
                "tls-verify-peer" => return Err("a server is always verified here".into()),
                _ => return Err(format!("the parameter {key:?} is not known here")),
            }
        }
        let place = match (unix, socket) {
            (true, Some(socket)) if authority.is_empty() => Place::Unix(socket.into()),
            (true, Some(_)) => return Err("a Unix socket has no host".into()),
            (true, None) => return Err("say where the Unix socket is: ?socket=PATH".into()),
            (false, Some(_)) => return Err("a socket goes with nbd+unix://".into()),
            (false, None) => tcp(authority)?,
        };
        Ok(Self { place, export: decode(path)?, tls, tls_name })
    }
}

fn tcp(authority: &str) -> Result<Place, String> {
    let authority = authority.rsplit_once('@').map_or(authority, |it| it.1);
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or("an address in brackets has no end")?,
        None => authority.split_at(authority.rfind(':').unwrap_or(authority.len())),
    };
    if host.is_empty() {
        return Err("it names no host".into());
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => PORT,
        Some("") => PORT,
        port => port.and_then(|port| port.parse().ok()).ok_or("the port is no number up to 65535")?,
    };
    Ok(Place::Tcp { host: host.into(), port })
}

/// Without its %-signs.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = after;
            continue;
        }
        let digits = after.get(..2).and_then(|it| std::str::from_utf8(it).ok());
        let byte = digits.filter(|it| it.bytes().all(|it| it.is_ascii_hexdigit()));
        let byte =
            byte.and_then(|it| u8::from_str_radix(it, 16).ok()).ok_or("a % has two hexadecimal digits after it")?;
        bytes.push(byte);
        rest = &after[2..];
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err("a name is UTF-8 without zero bytes".into()),
    }
}

impl FromStr for Uri {
    type Err = BadUri;

    fn from_str(text: &str) -> Result<Self, BadUri> {
        Self::parse(text).map_err(|why| BadUri { uri: text.into(), why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(uri: &str) -> (String, String) {
        let uri: Uri = uri.parse().unwrap();
        (uri.place.to_string(), uri.export)
    }

    #[test]
    fn places_and_names_are_found() {
        for (uri, place, export) in [
            ("nbd://example.com/disk", "example.com:10809", "disk"),
            ("nbd://example.com", "example.com:10809", ""),
            ("nbd://example.com/", "example.com:10809", ""),
            ("nbd://example.com//disk", "example.com:10809", "/disk"),
            ("nbd://example.com:1/hello%20world", "example.com:1", "hello world"),
            ("nbds://[::1]:10810/x", "[::1]:10810", "x"),
            ("nbd://[::1]", "[::1]:10809", ""),
            ("nbd+unix:///disk?socket=/run/nbd.sock", "unix:/run/nbd.sock", "disk"),
            ("nbd+unix:///?socket=nbd.sock", "unix:nbd.sock", ""),
        ] {
            assert_eq!(at(uri), (place.into(), export.into()), "{uri}");
        }
        let uri: Uri = "nbds+unix:///?socket=s&tls-hostname=alpha".parse().unwrap();
        assert_eq!((uri.tls, uri.tls_name.as_deref()), (true, Some("alpha")));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (uri, why) in [
            ("nbd:localhost:10809", "give nbd://"),
            ("http://x/", "give nbd://"),
            ("nbd+unix:///", "?socket=PATH"),
            ("nbd://h/?socket=s", "nbd+unix"),
            ("nbd://h:66666/", "port"),
            ("nbd:///x", "no host"),
            ("nbd://h/%4", "hexadecimal"),
            ("nbd://h/%00", "zero bytes"),
            ("nbd://h/?colour=red", "colour"),
            ("nbds://h/?tls-verify-peer=0", "verified"),
            ("nbds://h/?tls-type=psk", "x509"),
        ] {
            let error = uri.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
