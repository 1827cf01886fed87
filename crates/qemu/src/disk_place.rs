//! Where a disk may be, as its user says it: a path, or the URL of a server that QEMU's block layer knows; and the same as
//! the options of a block node, which is how QEMU is told.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Value, json};

use crate::command_line::Properties;

/// The port of an NBD server where no other is said.
const NBD_PORT: &str = "10809";

/// See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub enum DiskPlace {
    /// A file or a block device of this host.
    Local(PathBuf),
    /// What a server has: the options of a node.
    Remote(Value),
}

/// What tells a place at a server from others, by the driver of its node, and what holds where that is missing.
const TELLING: [(&str, &[(&str, &str)]); 4] = [
    ("nbd", &[("server.host", ""), ("server.port", NBD_PORT), ("server.path", ""), ("export", "")]),
    ("iscsi", &[("portal", ""), ("target", ""), ("lun", "0")]),
    ("nfs", &[("server.host", ""), ("path", "")]),
    ("rbd", &[("pool", ""), ("namespace", ""), ("image", ""), ("conf", CEPH_CONF)]),
];
/// Ceph's configuration where no other is said.
const CEPH_CONF: &str = "/etc/ceph/ceph.conf";
/// The port of an iSCSI portal where no other is said.
const ISCSI_PORT: &str = "3260";

/// Where an image is, told from others.
#[derive(Debug, PartialEq)]
enum Apart {
    Local(PathBuf),
    /// Its driver, and what of [`TELLING`] its options say.
    Remote(&'static str, Vec<String>),
}

/// Why a text names no place of a disk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} names no place for a disk: {why}")]
pub struct BadPlace {
    text: String,
    why: &'static str,
}

impl DiskPlace {
    /// It is at a server.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Remote(_))
    }

    /// Its path, if it is on this host.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Local(path) => Some(path),
            Self::Remote(_) => None,
        }
    }

    /// The options of a node that has it; a path is taken for that of a file.
    pub fn options(&self) -> Value {
        match self {
            Self::Local(path) => json!({ "driver": "file", "filename": path }),
            Self::Remote(options) => options.clone(),
        }
    }
}

/// Whether QEMU means the same place by both, in any of its words: a path, a URL, or the options of a node after `json:`.
/// Nobody can tell of two names of one server, or of two paths of one file.
pub fn is_same_place(one: &str, other: &str) -> bool {
    one == other || apart(one).is_some_and(|place| apart(other) == Some(place))
}

/// The same place as its user would say it; QEMU has `json:` for some.
pub fn place_in_words(told: &str) -> String {
    let Some(Apart::Remote(driver, parts)) = apart(told).filter(|_| told.starts_with("json:")) else {
        return told.into();
    };
    match (driver, &parts[..]) {
        ("nbd", [_, _, socket, export]) if !socket.is_empty() => format!("nbd+unix:///{export}?socket={socket}"),
        ("nbd", [host, port, _, export]) => format!("nbd://{host}:{port}/{export}"),
        ("iscsi", [portal, target, lun]) => format!("iscsi://{portal}/{target}/{lun}"),
        ("nfs", [host, path]) => format!("nfs://{host}{path}"),
        ("rbd", [pool, namespace, image, conf]) => {
            let within = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
            let conf = if conf == CEPH_CONF { String::new() } else { format!(":conf={conf}") };
            format!("rbd:{pool}/{within}{image}{conf}")
        }
        _ => told.into(),
    }
}

fn apart(told: &str) -> Option<Apart> {
    let options = match (told.strip_prefix("json:"), told.strip_prefix("rbd:")) {
        (Some(json), _) => Properties::from_json(&serde_json::from_str(json).ok()?),
        // QEMU takes more words than a user may say here.
        (None, Some(rest)) => {
            let mut parts = rest.split(':');
            let place = parts.next().unwrap_or_default();
            let conf = parts.find(|it| it.starts_with("conf=")).map_or_else(String::new, |it| format!(":{it}"));
            Properties::from_json(&rbd(&format!("{place}{conf}")).ok()?)
        }
        (None, None) => match told.parse().ok()? {
            DiskPlace::Local(path) => return Some(Apart::Local(path)),
            DiskPlace::Remote(options) => Properties::from_json(&options),
        },
    };
    // What is around the node that has it: a format, a limit.
    let mut within = String::new();
    loop {
        let of = |key: &str| options.get(&format!("{within}{key}"));
        let driver = of("driver");
        if let Some(path) = of("filename").filter(|_| matches!(driver, None | Some("file" | "host_device"))) {
            return Some(Apart::Local(path.into()));
        }
        let Some((driver, telling)) = TELLING.iter().find(|(name, _)| driver == Some(name)) else {
            within.push_str("file.");
            if options.iter().any(|(key, _)| key.starts_with(&within)) {
                continue;
            }
            return None;
        };
        let said = |(key, usual): &(&str, &str)| {
            // Older words have no `server` around them.
            let said = of(key).or_else(|| of(key.strip_prefix("server.")?)).filter(|it| !it.is_empty());
            match (*key, said.unwrap_or(usual)) {
                ("portal", portal) if host_and_port(portal).is_ok_and(|it| it.1.is_none()) => {
                    format!("{portal}:{ISCSI_PORT}")
                }
                (_, said) => said.to_owned(),
            }
        };
        return Some(Apart::Remote(driver, telling.iter().map(said).collect()));
    }
}

impl FromStr for DiskPlace {
    type Err = BadPlace;

    fn from_str(text: &str) -> Result<Self, BadPlace> {
        let of = |parsed: Result<Value, &'static str>| match parsed {
            Ok(options) => Ok(Self::Remote(options)),
            Err(why) => Err(BadPlace { text: text.into(), why }),
        };
        if let Some(rest) = text.strip_prefix("rbd:") {
            return of(rbd(rest));
        }
        let protocol = text.find([':', '/']).filter(|at| text[*at..].starts_with(':')).map(|at| &text[..at]);
        let rest = || text.split_once("://").map(|(_, rest)| rest).ok_or("a URL has :// after its protocol");
        match protocol {
            None if text.is_empty() => of(Err("it is empty")),
            None => Ok(Self::Local(text.into())),
            Some("file") => Ok(Self::Local(text["file:".len()..].into())),
            Some("nbd") => of(rest().and_then(nbd)),
            Some("nbd+unix") => of(rest().and_then(nbd_unix)),
            Some("iscsi") => of(rest().and_then(iscsi)),
            Some("nfs") => of(rest().and_then(nfs)),
            Some(_) => of(Err("give a path, nbd://, nbd+unix://, iscsi://, nfs:// or rbd:POOL/IMAGE")),
        }
    }
}

fn nbd(rest: &str) -> Result<Value, &'static str> {
    let (at, export) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = host_and_port(at)?;
    let server = json!({ "type": "inet", "host": host, "port": port.unwrap_or(NBD_PORT) });
    Ok(json!({ "driver": "nbd", "server": server, "export": decoded(export)? }))
}

fn nbd_unix(rest: &str) -> Result<Value, &'static str> {
    const EXAMPLE: &str = "give nbd+unix:///EXPORT?socket=PATH";
    let (export, socket) = rest.strip_prefix('/').and_then(|it| it.split_once("?socket=")).ok_or(EXAMPLE)?;
    let socket = decoded(socket)?;
    if !socket.starts_with('/') {
        return Err("the socket's path begins with /");
    }
    Ok(json!({ "driver": "nbd", "server": { "type": "unix", "path": socket }, "export": decoded(export)? }))
}

/// `HOST[:PORT]/TARGET/LUN`. A password in a URL would be seen by whoever lists processes.
fn iscsi(rest: &str) -> Result<Value, &'static str> {
    const EXAMPLE: &str = "give iscsi://HOST[:PORT]/TARGET/LUN";
    let mut parts = rest.splitn(3, '/');
    let (portal, target, lun) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    if portal.contains(['@', '%']) {
        return Err("names and passwords do not belong into it: use the initiator's ACL at the server");
    }
    host_and_port(portal)?;
    let target = decoded(target.filter(|it| !it.is_empty()).ok_or(EXAMPLE)?)?;
    let lun: u64 = lun.and_then(|it| it.parse().ok()).ok_or(EXAMPLE)?;
    Ok(json!({ "driver": "iscsi", "transport": "tcp", "portal": portal, "target": target, "lun": lun }))
}

/// `HOST/PATH[?uid=N&gid=N]`, of which the path is that of the export and the file in it.
fn nfs(rest: &str) -> Result<Value, &'static str> {
    const EXAMPLE: &str = "give nfs://HOST/EXPORTED/FOLDER/FILE";
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (host, path) = rest.split_once('/').ok_or(EXAMPLE)?;
    if host.is_empty() || path.is_empty() || path.ends_with('/') {
        return Err(EXAMPLE);
    }
    let mut options = json!({
        "driver": "nfs",
        "server": { "type": "inet", "host": host },
        "path": format!("/{}", decoded(path)?),
    });
    for parameter in query.split('&').filter(|it| !it.is_empty()) {
        let (key, value) = parameter.split_once('=').ok_or("a parameter has the form KEY=VALUE")?;
        let name = match key {
            "uid" => "user",
            "gid" => "group",
            _ => return Err("of an NFS URL's parameters only uid and gid are known here"),
        };
        options[name] = json!(value.parse::<u32>().map_err(|_| "uid and gid are numbers")?);
    }
    Ok(options)
}

/// `POOL[/NAMESPACE]/IMAGE[:id=USER][:conf=PATH]`, as QEMU has it. A key in it would be seen by whoever lists processes.
fn rbd(rest: &str) -> Result<Value, &'static str> {
    const EXAMPLE: &str = "give rbd:POOL[/NAMESPACE]/IMAGE[:id=USER][:conf=PATH]; all else is taken from Ceph's configuration, \
        which is /etc/ceph/ceph.conf unless conf= says so, and the user is admin unless id= says so";
    let mut parts = rest.split(':');
    let place: Vec<&str> = parts.next().unwrap_or_default().split('/').collect();
    let mut options = match place[..] {
        [pool, image] => json!({ "driver": "rbd", "pool": pool, "image": image }),
        [pool, namespace, image] => json!({ "driver": "rbd", "pool": pool, "namespace": namespace, "image": image }),
        _ => return Err(EXAMPLE),
    };
    if place.iter().any(|it| it.is_empty() || it.contains('@')) {
        return Err(EXAMPLE);
    }
    for part in parts {
        match part.split_once('=') {
            Some(("id", user)) if !user.is_empty() => options["user"] = json!(user),
            Some(("conf", path)) if path.starts_with('/') => options["conf"] = json!(path),
            Some(("conf", _)) => return Err("the path after conf= begins with /"),
            _ => return Err(EXAMPLE),
        }
    }
    Ok(options)
}

fn host_and_port(text: &str) -> Result<(&str, Option<&str>), &'static str> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or("an address in brackets has no end")?,
        None => text.split_at(text.rfind(':').unwrap_or(text.len())),
    };
    if host.is_empty() {
        return Err("it names no host");
    }
    match port.strip_prefix(':') {
        None if port.is_empty() => Ok((host, None)),
        Some(port) if port.parse::<u16>().is_ok() => Ok((host, Some(port))),
        _ => Err("the port is no number up to 65535"),
    }
}

/// Without its percent signs.
fn decoded(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).and_then(|it| std::str::from_utf8(it).ok());
        let byte = digits.and_then(|it| u8::from_str_radix(it, 16).ok());
        bytes.push(byte.ok_or("after % come two hexadecimal digits")?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Value {
        text.parse::<DiskPlace>().unwrap().options()
    }

    #[test]
    fn urls_become_options_of_nodes_and_all_else_is_a_path() {
        let nbd = |server: Value, export: &str| json!({ "driver": "nbd", "server": server, "export": export });
        let inet = |host: &str, port: &str| json!({ "type": "inet", "host": host, "port": port });
        for (text, expected) in [
            ("/srv/a:b.raw", json!({ "driver": "file", "filename": "/srv/a:b.raw" })),
            ("file:/srv/a", json!({ "driver": "file", "filename": "/srv/a" })),
            ("nbd://h/a%20b", nbd(inet("h", "10809"), "a b")),
            ("nbd://[::1]:1/", nbd(inet("::1", "1"), "")),
            ("nbd+unix:///e?socket=/run/s", nbd(json!({ "type": "unix", "path": "/run/s" }), "e")),
            (
                "iscsi://h:3261/iqn.2026-11.org.example:a/1",
                json!({
                    "driver": "iscsi", "transport": "tcp", "portal": "h:3261",
                    "target": "iqn.2026-11.org.example:a", "lun": 1
                }),
            ),
            (
                "nfs://h/srv/a.raw?uid=0&gid=1",
                json!({
                    "driver": "nfs", "server": { "type": "inet", "host": "h" }, "path": "/srv/a.raw",
                    "user": 0, "group": 1
                }),
            ),
            ("rbd:pool/image", json!({ "driver": "rbd", "pool": "pool", "image": "image" })),
            (
                "rbd:pool/of/image:id=vms:conf=/etc/ceph/b.conf",
                json!({
                    "driver": "rbd", "pool": "pool", "namespace": "of", "image": "image", "user": "vms",
                    "conf": "/etc/ceph/b.conf"
                }),
            ),
        ] {
            assert_eq!(options(text), expected, "{text}");
        }
    }

    #[test]
    fn a_place_is_the_same_in_all_words_that_qemu_has_for_it_and_is_shown_in_its_users() {
        for (one, other) in [
            ("/srv/a", "file:/srv/a"),
            ("/srv/a", r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/srv/a"}}"#),
            (
                "rbd:p/i",
                r#"json:{"driver": "raw", "file": {"pool": "p", "image": "i", "driver": "rbd", "namespace": ""}}"#,
            ),
            ("rbd:p/i:id=vms", r#"json:{"driver":"raw","file.driver":"rbd","file.pool":"p","file.image":"i"}"#),
            ("rbd:p/n/i:conf=/c", r#"json:{"driver":"rbd","pool":"p","namespace":"n","image":"i","conf":"/c"}"#),
            ("rbd:p/i:key=secret", "rbd:p/i:id=a:conf=/etc/ceph/ceph.conf"),
            ("nbd://h/e", r#"json:{"driver":"raw","size":1,"file":{"driver":"nbd","server.host":"h","export":"e"}}"#),
            ("nbd://h:10809/e", "nbd://h/e"),
            ("nbd+unix:///e?socket=/s", r#"json:{"driver":"nbd","server":{"type":"unix","path":"/s"},"export":"e"}"#),
            ("iscsi://h/t/1", r#"json:{"driver":"iscsi","portal":"h:3260","target":"t","lun":1,"transport":"tcp"}"#),
            ("nfs://h/a/b?uid=0", "nfs://h/a/b"),
        ] {
            assert!(is_same_place(one, other) && is_same_place(other, one), "{one} and {other}");
            let shown = place_in_words(other);
            assert!(is_same_place(one, &shown), "{one} and {shown}");
            assert!(!shown.starts_with("json:") || shown.contains("/srv/a"), "{shown}");
        }
        for (one, other) in [
            ("/srv/a", "/srv/b"),
            ("rbd:p/i", "rbd:p/n/i"),
            ("rbd:p/i", "rbd:p/i:conf=/etc/ceph/other.conf"),
            ("rbd:p/i", "rbd:q/i"),
            ("nbd://h/e", "nbd://h/f"),
            ("nbd://h/e", "nbd://h:1/e"),
            ("iscsi://h/t/1", "iscsi://h/t/2"),
            ("nfs://h/a", "nfs://i/a"),
            ("nfs://h/a", "/a"),
        ] {
            assert!(!is_same_place(one, other), "{one} and {other}");
        }
        for unknown in [r#"json:{"driver":"null-co"}"#, "json:{", "http://h/a"] {
            assert!(!is_same_place(unknown, "/srv/a"));
            assert_eq!(place_in_words(unknown), unknown);
        }
    }

    #[test]
    fn what_is_no_place_is_refused_by_its_text() {
        let bad = [
            "",
            "nbd:h",
            "nbd:///e",
            "nbd://h:99999/e",
            "nbd://h/%zz",
            "nbd+unix:///e",
            "nbd+unix:///e?socket=s",
            "iscsi://h/t",
            "iscsi://h/t/x",
            "iscsi://u%p@h/t/1",
            "nfs://h",
            "nfs://h/a/",
            "nfs://h/a?x=1",
            "rbd:pool",
            "rbd:pool/a@snap",
            "rbd:pool/a:conf=b",
            "rbd:pool/a:key=secret",
            "rbd:a/b/c/d",
            "http://h/a",
            "json:{}",
        ];
        for text in bad {
            let refused = text.parse::<DiskPlace>().unwrap_err().to_string();
            assert!(refused.contains(&format!("{text:?}")), "{refused}");
        }
    }
}
