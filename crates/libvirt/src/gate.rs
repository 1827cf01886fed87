//! What another host's libvirt may say to ours, for one migration of one domain.
//!
//! A libvirt's socket is as good as root on its host. A source's libvirt needs little of it: to ask what this one can do,
//! to have it prepare one domain, and to tell it how that ended. Everything else is answered with an error, and never
//! reaches our libvirt: no other domain is touched, no volume made, no secret read. What remains is what a peer may do
//! anyhow, which is to have this host start a QEMU for a guest that it sends.

use std::path::PathBuf;

use uuid::Uuid;

use crate::call::number;
use crate::conversation::RemoteError;
use crate::frame::{Frame, KEEPALIVE, Kind, REMOTE};
use crate::param::Params;
use crate::xdr::{Decoder, Malformed};
use crate::xml::{Description, domains_in_cookie};

/// libvirt's `VIR_ERR_ACCESS_DENIED`.
const DENIED: i32 = 88;
/// The longest migration cookie, in bytes; libvirt's own bound is the same.
const LONGEST_COOKIE: usize = 4 << 20;
/// What asks, and changes nothing.
const HARMLESS: [u32; 14] = [
    number::CLOSE,
    number::GET_TYPE,
    number::GET_VERSION,
    number::GET_CAPABILITIES,
    number::LOOKUP_BY_NAME,
    number::LOOKUP_BY_UUID,
    number::GET_HOSTNAME,
    number::SUPPORTS_FEATURE,
    number::AUTH_LIST,
    number::GET_URI,
    number::IS_SECURE,
    number::GET_LIB_VERSION,
    number::REGISTER_CLOSE,
    number::UNREGISTER_CLOSE,
];
/// The driver that it may open.
const DRIVERS: [&str; 1] = ["qemu:///system"];

/// What a migration is told; of more, nobody here knows what it would do.
const TOLD: [&str; 10] = [
    "destination_name",
    "destination_xml",
    "persistent_xml",
    "migrate_uri",
    "graphics_uri",
    "disks_uri",
    "migrate_disks",
    "bandwidth",
    "bandwidth.postcopy",
    "parallel.connections",
];
/// How it may be done (libvirt's `virDomainMigrateFlags`): live, peer to peer, defined there and not here any more, paused,
/// with its disks in either way, protected from changes, vouched for, ended at an error, with auto-converge, by post-copy, over
/// several connections.
const HOW: u32 =
    1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 17;
/// The longest description of a domain, or cookie, in bytes, as they are read while others wait.
const LONGEST_XML: usize = 256 << 10;

/// What was announced: only this may come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The domain's name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// The sockets of its RAM and its disks.
    pub sockets: Vec<PathBuf>,
}

/// What this libvirt would choose by itself when it prepares a domain, as it was not told.
fn would_choose(params: &Params, flags: u32) -> Option<&'static str> {
    const COPIES_DISKS: u32 = 1 << 6 | 1 << 7;
    let has = |name: &str| params.texts(name).next().is_some();
    if !has("destination_xml") {
        return Some("a domain without its description");
    }
    // It would listen on some port, for everybody.
    if !has("migrate_uri") || has("listen_address") {
        return Some("to listen for the RAM where nobody has announced it");
    }
    if (flags & COPIES_DISKS != 0 || has("migrate_disks")) && !has("disks_uri") {
        return Some("to listen for disks where nobody has announced it");
    }
    None
}

/// What of it nobody here knows what it would do.
fn unknown(params: &Params, flags: u32) -> Option<String> {
    if let Some(it) = params.0.iter().find(|it| !TOLD.contains(&it.name.as_str()) && it.name != "listen_address") {
        return Some(format!("the parameter {:?}", it.name));
    }
    (flags & !HOW != 0).then(|| format!("the flags {:#x}", flags & !HOW))
}

/// What is done with a frame of the source's libvirt.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It goes on to ours.
    Pass(Frame),
    /// This is answered instead.
    Refuse {
        /// The answer.
        answer: Frame,
        /// What was wanted, in words.
        what: String,
    },
    /// Nothing that such a libvirt says: the connection ends.
    End(&'static str),
}

/// See the module's text. One for each connection.
#[derive(Clone, Debug)]
pub struct Gate {
    announced: Announced,
    /// The serial of the call that would prepare it, which is not answered yet.
    preparing: Option<u32>,
    /// It was prepared over this connection: it may be told how that ended.
    is_prepared: bool,
}

impl Gate {
    /// For this migration.
    pub fn new(announced: Announced) -> Self {
        Self { announced, preparing: None, is_prepared: false }
    }

    /// What was announced.
    pub fn announced(&self) -> &Announced {
        &self.announced
    }

    /// Hears what our libvirt answers.
    pub fn hear(&mut self, answer: &Frame) {
        // A peer may give another call the same serial.
        let is_of_prepare = (answer.kind, answer.procedure) == (Kind::Reply, number::PREPARE3_PARAMS);
        if is_of_prepare && self.preparing == Some(answer.serial) {
            self.preparing = None;
            self.is_prepared |= !answer.is_error;
        }
    }

    /// What is done with this.
    pub fn judge(&mut self, frame: Frame) -> Verdict {
        match (frame.program, frame.kind) {
            (KEEPALIVE, Kind::Message) => return Verdict::Pass(frame),
            (_, Kind::Call) => {}
            // Streams carry volumes and screens; descriptors do not go over a network.
            _ => return Verdict::End("it sent what is no call"),
        }
        let why = match self.obstacle(&frame) {
            Ok(None) => {
                if frame.procedure == number::PREPARE3_PARAMS {
                    self.preparing = Some(frame.serial);
                }
                return Verdict::Pass(frame);
            }
            Ok(Some(why)) => why,
            Err(malformed) => format!("procedure {} with arguments that cannot be read: {malformed}", frame.procedure),
        };
        let message = format!("vmferry lets a migration through and nothing else: refused {why}");
        let payload = RemoteError { code: DENIED, message }.encode();
        let answer = Frame { kind: Kind::Reply, is_error: true, payload, ..frame };
        Verdict::Refuse { answer, what: why }
    }

    /// What of this call is not to be; none when it may.
    fn obstacle(&self, frame: &Frame) -> Result<Option<String>, Malformed> {
        if frame.program != REMOTE {
            return Ok(Some(format!("a call of the program {:#x}", frame.program)));
        }
        let mut from = Decoder::new(&frame.payload);
        match frame.procedure {
            harmless if HARMLESS.contains(&harmless) => Ok(None),
            number::OPEN => {
                let uri = from.optional(Decoder::string)?;
                let known = uri.is_some_and(|uri| DRIVERS.contains(&uri.split('?').next().unwrap_or(uri)));
                Ok((!known).then(|| format!("the driver {:?}", uri.unwrap_or_default())))
            }
            number::PREPARE3_PARAMS | number::FINISH3_PARAMS => {
                let params = Params::decode(&mut from)?;
                let cookie = from.opaque(LONGEST_COOKIE)?;
                let flags = from.u32()?;
                let told = || unknown(&params, flags).or_else(|| self.other_than_announced(&params));
                let told = || told().or_else(|| self.other_in_cookie(cookie));
                Ok(told().or_else(|| match frame.procedure {
                    number::PREPARE3_PARAMS => would_choose(&params, flags).map(str::to_owned),
                    _ => self.is_not_its_end(&params),
                }))
            }
            other => Ok(Some(format!("procedure {other}"))),
        }
    }

    fn is_announced(&self, name: &str, uuid: Uuid) -> bool {
        (name, uuid) == (self.announced.name.as_str(), self.announced.uuid)
    }

    fn other_than_announced(&self, params: &Params) -> Option<String> {
        let Announced { name, sockets, .. } = &self.announced;
        if let Some(other) = params.texts("destination_name").find(|it| it != name) {
            return Some(format!("the domain {other:?}, which was not announced"));
        }
        // The second is what it is to be when it is started again.
        for xml in params.texts("destination_xml").chain(params.texts("persistent_xml")) {
            if xml.len() > LONGEST_XML {
                return Some(format!("a domain's description of {} bytes", xml.len()));
            }
            match Description::parse(xml) {
                Ok(it) if self.is_announced(&it.name, it.uuid) => {}
                Ok(it) => return Some(format!("the domain {:?} ({}), which was not announced", it.name, it.uuid)),
                Err(error) => return Some(format!("a domain: {error}")),
            }
        }
        let is_ours = |uri: &str| {
            let path = uri.strip_prefix("unix://").map(PathBuf::from);
            path.is_some_and(|path| sockets.contains(&path))
        };
        let uris = params.texts("migrate_uri").chain(params.texts("disks_uri"));
        let mut others = uris.filter(|uri| !is_ours(uri));
        others.next().map(|uri| format!("to listen at {uri}, which was not announced"))
    }

    /// libvirt takes a domain's description from it, too, and writes it down.
    fn other_in_cookie(&self, cookie: &[u8]) -> Option<String> {
        if cookie.len() > LONGEST_XML {
            return Some(format!("a cookie of {} bytes", cookie.len()));
        }
        // It is a text in C, with its end.
        let cookie = cookie.strip_suffix(b"\0").unwrap_or(cookie);
        if cookie.is_empty() {
            return None;
        }
        let told = std::str::from_utf8(cookie).map_err(|error| error.to_string());
        match told.and_then(|cookie| domains_in_cookie(cookie).map_err(|error| error.to_string())) {
            Ok(all) => {
                let other = all.into_iter().find(|(name, uuid)| !self.is_announced(name, *uuid));
                other.map(|(name, uuid)| format!("a cookie of the domain {name:?} ({uuid}), which was not announced"))
            }
            Err(error) => Some(format!("a cookie: {error}")),
        }
    }

    /// Only who has had it prepared may say how that ended: others' domains may have its name.
    fn is_not_its_end(&self, params: &Params) -> Option<String> {
        if !self.is_prepared {
            return Some("to end what was not prepared over this connection".into());
        }
        (params.texts("destination_name").count() != 1).then(|| "to end what it does not name".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;
    use crate::param::Param;
    use crate::xdr::Encoder;

    const UUID: &str = "9d7a4c1e-0000-4000-8000-000000000001";

    fn gate() -> Gate {
        Gate::new(Announced {
            name: "web1".into(),
            uuid: UUID.parse().unwrap(),
            sockets: vec!["/run/x/ram".into(), "/run/x/disks".into()],
        })
    }

    fn xml(name: &str, uuid: &str) -> String {
        format!("<domain type='kvm'><name>{name}</name><uuid>{uuid}</uuid></domain>")
    }

    fn cookie(name: &str, uuid: &str) -> String {
        format!(
            "<qemu-migration><name>{name}</name><uuid>{uuid}</uuid><feature name='persistent'/>{}</qemu-migration>\0",
            xml(name, uuid)
        )
    }

    fn with(procedure: u32, params: Vec<Param>) -> Frame {
        let mut to = Encoder::new();
        Params(params).encode(&mut to);
        to.opaque(cookie("web1", UUID).as_bytes()).u32(3);
        Frame::call(procedure, 5, to.finish())
    }

    fn refused(frame: Frame) -> String {
        match gate().judge(frame) {
            Verdict::Refuse { answer, what } => {
                assert!(answer.is_error && answer.kind == Kind::Reply && answer.serial == 5, "{answer:?}");
                what
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_migration_of_the_announced_domain_needs_passes() {
        let open = Call::open("qemu:///system");
        for frame in [
            Frame::call(number::AUTH_LIST, 5, vec![]),
            Frame::call(open.procedure, 5, open.arguments),
            with(
                number::PREPARE3_PARAMS,
                vec![
                    Param::text("destination_name", "web1"),
                    Param::text("destination_xml", xml("web1", UUID)),
                    Param::text("migrate_uri", "unix:///run/x/ram"),
                    Param::text("disks_uri", "unix:///run/x/disks"),
                    Param::text("migrate_disks", "vda"),
                ],
            ),
            Frame { program: KEEPALIVE, kind: Kind::Message, ..Frame::call(1, 0, vec![]) },
        ] {
            assert_eq!(gate().judge(frame.clone()), Verdict::Pass(frame));
        }
    }

    #[test]
    fn an_end_passes_only_after_our_libvirt_has_prepared_it_over_the_same_connection() {
        let params =
            vec![Param::text("destination_xml", xml("web1", UUID)), Param::text("migrate_uri", "unix:///run/x/ram")];
        let (prepare, finish) = (
            with(number::PREPARE3_PARAMS, params),
            with(number::FINISH3_PARAMS, vec![Param::text("destination_name", "web1")]),
        );
        let reply = |is_error| Frame { kind: Kind::Reply, is_error, ..prepare.clone() };
        assert!(refused(finish.clone()).contains("not prepared"));
        for (answer, passes) in [(None, false), (Some(true), false), (Some(false), true)] {
            let mut gate = gate();
            assert!(matches!(gate.judge(prepare.clone()), Verdict::Pass(_)));
            if let Some(is_error) = answer {
                gate.hear(&Frame { serial: 6, ..reply(false) });
                gate.hear(&Frame { procedure: number::GET_VERSION, ..reply(false) });
                gate.hear(&reply(is_error));
            }
            assert_eq!(matches!(gate.judge(finish.clone()), Verdict::Pass(_)), passes, "{answer:?}");
            if passes {
                let nameless = gate.judge(with(number::FINISH3_PARAMS, vec![]));
                assert!(matches!(nameless, Verdict::Refuse { .. }), "{nameless:?}");
            }
        }
    }

    #[test]
    fn what_another_reader_would_take_for_another_domain_is_refused() {
        let prepare = |xml: String| {
            let params = vec![Param::text("destination_xml", xml), Param::text("migrate_uri", "unix:///run/x/ram")];
            refused(with(number::PREPARE3_PARAMS, params))
        };
        let plain = xml("web1", UUID);
        for (from, to) in [
            ("<name>", "<x:name xmlns:x='y'>web1</x:name><name>"),
            ("<name>web1</name>", "<x:name xmlns:x='y'>web1</x:name>"),
            ("web1</name>", "web1<!-- -->-evil</name>"),
            ("</uuid>", "</uuid><uuid>9d7b4c1e-0000-4000-8000-000000000001</uuid>"),
        ] {
            let said = prepare(plain.replacen(from, to, 1));
            assert!(said.contains("has not one") || said.contains("no plain text"), "{said}");
        }
        let hidden = Param::text("destination_name\0", "db1");
        assert!(refused(with(number::FINISH3_PARAMS, vec![hidden])).contains("NUL"));
        let port = Param::number("disks_port", 10809);
        assert!(refused(with(number::PREPARE3_PARAMS, vec![port])).contains("disks_port"));
        let cookies = |cookie: &[u8], flags: u32| {
            let mut to = Encoder::new();
            Params(vec![Param::text("destination_name", "web1")]).encode(&mut to);
            to.opaque(cookie).u32(flags);
            refused(Frame::call(number::FINISH3_PARAMS, 5, to.finish()))
        };
        let nested = cookie("web1", UUID).replace(&plain, &xml("db1", UUID));
        assert!(cookies(nested.as_bytes(), 3).contains("a cookie of the domain \"db1\""));
        assert!(cookies(cookie("db1", UUID).as_bytes(), 3).contains("db1"));
        assert!(cookies(b"<secret/>", 3).contains("it is a <secret>"));
        // Without a QEMU (OFFLINE), and of a post-copy that broke.
        for flag in [1 << 10, 1 << 19] {
            assert!(cookies(b"", flag).contains("the flags"));
        }
    }

    #[test]
    fn another_domain_another_socket_another_driver_and_every_other_call_is_refused() {
        let open = Call::open("lxc:///system");
        assert!(refused(Frame::call(open.procedure, 5, open.arguments)).contains("lxc"));
        let prepare = |param| refused(with(number::PREPARE3_PARAMS, vec![param]));
        let told = || vec![Param::text("destination_xml", xml("web1", UUID))];
        let ram = || Param::text("migrate_uri", "unix:///run/x/ram");
        for (more, what) in [
            (vec![], "to listen for the RAM"),
            (vec![ram(), Param::text("listen_address", "0.0.0.0")], "to listen for the RAM"),
            (vec![ram(), Param::text("migrate_disks", "vda")], "to listen for disks"),
        ] {
            assert!(refused(with(number::PREPARE3_PARAMS, [told(), more].concat())).contains(what));
        }
        assert!(refused(with(number::PREPARE3_PARAMS, vec![ram()])).contains("without its description"));
        assert!(prepare(Param::text("destination_name", "db1")).contains("\"db1\", which was not announced"));
        assert!(prepare(Param::text("destination_xml", xml("db1", UUID))).contains("db1"));
        let other = UUID.replace("9d7a", "9d7b");
        assert!(prepare(Param::text("destination_xml", xml("web1", &other))).contains("9d7b"));
        assert!(prepare(Param::text("persistent_xml", "<secret/>")).contains("it is a <secret>"));
        for uri in ["tcp:0.0.0.0:49152", "unix:///run/x/../y", "unix:///run/other", "exec:id"] {
            assert!(prepare(Param::text("migrate_uri", uri)).contains(uri));
        }
        // DOMAIN_DESTROY, SECRET_GET_VALUE, DOMAIN_CREATE_XML; the program of QEMU's monitor.
        for procedure in [12, 145, 10] {
            assert_eq!(refused(Frame::call(procedure, 5, vec![])), format!("procedure {procedure}"));
        }
        assert!(refused(Frame { program: 0x2000_8087, ..Frame::call(1, 5, vec![]) }).contains("program"));
        assert!(refused(Frame::call(number::PREPARE3_PARAMS, 5, vec![0, 0, 0, 9])).contains("cannot be read"));
    }

    #[test]
    fn streams_and_descriptors_end_it() {
        for kind in [Kind::Other(3), Kind::Other(4), Kind::Reply] {
            let frame = Frame { kind, ..Frame::call(1, 5, vec![]) };
            assert!(matches!(gate().judge(frame), Verdict::End(_)));
        }
        let not_a_sign_of_life = Frame { kind: Kind::Message, ..Frame::call(1, 5, vec![]) };
        assert!(matches!(gate().judge(not_a_sign_of_life), Verdict::End(_)));
    }
}
