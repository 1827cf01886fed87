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
use crate::xml::Description;

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

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Gate(Announced);

impl Gate {
    /// For this migration.
    pub fn new(announced: Announced) -> Self {
        Self(announced)
    }

    /// What is done with this.
    pub fn judge(&self, frame: Frame) -> Verdict {
        match (frame.program, frame.kind) {
            (KEEPALIVE, Kind::Message) => return Verdict::Pass(frame),
            (_, Kind::Call) => {}
            // Streams carry volumes and screens; descriptors do not go over a network.
            _ => return Verdict::End("it sent what is no call"),
        }
        let why = match self.obstacle(&frame) {
            Ok(None) => return Verdict::Pass(frame),
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
                let _cookie = from.opaque(LONGEST_COOKIE)?;
                let flags = from.u32()?;
                let would_choose = match frame.procedure {
                    number::PREPARE3_PARAMS => would_choose(&params, flags),
                    _ => None,
                };
                Ok(self.other_than_announced(&params).or_else(|| would_choose.map(str::to_owned)))
            }
            other => Ok(Some(format!("procedure {other}"))),
        }
    }

    fn other_than_announced(&self, params: &Params) -> Option<String> {
        let Announced { name, uuid, sockets } = &self.0;
        if let Some(other) = params.texts("destination_name").find(|it| it != name) {
            return Some(format!("the domain {other:?}, which was not announced"));
        }
        // The second is what it is to be when it is started again.
        for xml in params.texts("destination_xml").chain(params.texts("persistent_xml")) {
            match Description::parse(xml) {
                Ok(it) if it.uuid == *uuid && it.name == *name => {}
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

    fn with(procedure: u32, params: Vec<Param>) -> Frame {
        let mut to = Encoder::new();
        Params(params).encode(&mut to);
        to.opaque(b"cookie").u32(3);
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
            with(number::FINISH3_PARAMS, vec![Param::text("destination_name", "web1")]),
            Frame { program: KEEPALIVE, kind: Kind::Message, ..Frame::call(1, 0, vec![]) },
        ] {
            assert_eq!(gate().judge(frame.clone()), Verdict::Pass(frame));
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
