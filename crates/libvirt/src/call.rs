//! The procedures that are called, by their numbers in libvirt's `remote_protocol.x`, and how their arguments and answers
//! look.

use crate::domain::{DirtyRate, Domain, Info, Job, State};
use crate::param::Params;
use crate::xdr::{Decoder, Encoder, Malformed};

/// What a domain list, or a list of sign-ins, may have.
const MOST: usize = 16384;

/// Numbers of procedures.
#[expect(missing_docs, reason = "libvirt's own names")]
pub mod number {
    pub const OPEN: u32 = 1;
    pub const CLOSE: u32 = 2;
    pub const GET_TYPE: u32 = 3;
    pub const GET_VERSION: u32 = 4;
    pub const GET_CAPABILITIES: u32 = 7;
    pub const GET_XML_DESC: u32 = 14;
    pub const GET_AUTOSTART: u32 = 15;
    pub const GET_INFO: u32 = 16;
    pub const LOOKUP_BY_NAME: u32 = 23;
    pub const LOOKUP_BY_UUID: u32 = 24;
    pub const GET_HOSTNAME: u32 = 59;
    pub const SUPPORTS_FEATURE: u32 = 60;
    pub const AUTH_LIST: u32 = 66;
    pub const AUTH_POLKIT: u32 = 70;
    pub const GET_URI: u32 = 110;
    pub const IS_SECURE: u32 = 149;
    pub const IS_PERSISTENT: u32 = 151;
    pub const GET_LIB_VERSION: u32 = 157;
    pub const ABORT_JOB: u32 = 164;
    pub const SET_MAX_DOWNTIME: u32 = 166;
    pub const SET_MAX_SPEED: u32 = 207;
    pub const GET_STATE: u32 = 212;
    pub const GET_MAX_SPEED: u32 = 242;
    pub const LIST_ALL_DOMAINS: u32 = 273;
    pub const GET_JOB_STATS: u32 = 298;
    pub const PREPARE3_PARAMS: u32 = 303;
    pub const PERFORM3_PARAMS: u32 = 305;
    pub const FINISH3_PARAMS: u32 = 306;
    pub const REGISTER_EVENT: u32 = 316;
    pub const GET_ALL_DOMAIN_STATS: u32 = 344;
    pub const REGISTER_CLOSE: u32 = 360;
    pub const UNREGISTER_CLOSE: u32 = 361;
    pub const START_POST_COPY: u32 = 364;
    pub const START_DIRTY_RATE_CALC: u32 = 427;
}

/// A call: which, and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub procedure: u32,
    /// In XDR.
    pub arguments: Vec<u8>,
}

impl Call {
    fn new(procedure: u32, arguments: impl FnOnce(&mut Encoder)) -> Self {
        let mut encoder = Encoder::new();
        arguments(&mut encoder);
        Self { procedure, arguments: encoder.finish() }
    }

    /// One that has no arguments.
    pub fn bare(procedure: u32) -> Self {
        Self::new(procedure, |_| ())
    }

    /// Opens the driver of this URI.
    pub fn open(uri: &str) -> Self {
        Self::new(number::OPEN, |it| {
            it.optional_string(Some(uri)).u32(0);
        })
    }

    /// All domains, those that do not run among them.
    pub fn list_all_domains() -> Self {
        Self::new(number::LIST_ALL_DOMAINS, |it| {
            it.u32(1).u32(0);
        })
    }

    /// The domain of this name.
    pub fn lookup_by_name(name: &str) -> Self {
        Self::new(number::LOOKUP_BY_NAME, |it| {
            it.string(name);
        })
    }

    /// The domain of this UUID.
    pub fn lookup_by_uuid(uuid: uuid::Uuid) -> Self {
        Self::new(number::LOOKUP_BY_UUID, |it| {
            it.fixed(uuid.as_bytes());
        })
    }

    /// One that is about a domain and has nothing else to say.
    pub fn about(procedure: u32, domain: &Domain) -> Self {
        Self::new(procedure, |it| {
            domain.encode(it);
        })
    }

    /// One that is about a domain and has flags.
    pub fn flagged(procedure: u32, domain: &Domain, flags: u32) -> Self {
        Self::new(procedure, |it| {
            domain.encode(it).u32(flags);
        })
    }

    /// One that sets a number of a domain.
    pub fn sets(procedure: u32, domain: &Domain, value: u64) -> Self {
        Self::new(procedure, |it| {
            domain.encode(it).u64(value).u32(0);
        })
    }

    /// Has QEMU look for so many seconds how much of a sample of the domain's pages is written.
    pub fn start_dirty_rate(domain: &Domain, seconds: i32) -> Self {
        Self::new(number::START_DIRTY_RATE_CALC, |it| {
            domain.encode(it).i32(seconds).u32(0);
        })
    }

    /// What libvirt tells of one domain, of these kinds.
    pub fn stats(domain: &Domain, kinds: u32) -> Self {
        Self::new(number::GET_ALL_DOMAIN_STATS, |it| {
            it.u32(1);
            domain.encode(it).u32(kinds).u32(0);
        })
    }

    /// Events of this kind of all domains.
    pub fn register_event(kind: i32) -> Self {
        Self::new(number::REGISTER_EVENT, |it| {
            it.i32(kind).u32(0);
        })
    }

    /// Migrates a domain to the libvirt of this URI, without its caller: peer to peer.
    pub fn migrate(domain: &Domain, to: &str, how: &Params, flags: u32) -> Self {
        Self::new(number::PERFORM3_PARAMS, |it| {
            domain.encode(it).optional_string(Some(to));
            how.encode(it);
            it.opaque(&[]).u32(flags);
        })
    }
}

/// An answer that is a domain.
pub fn domain(answer: &[u8]) -> Result<Domain, Malformed> {
    Domain::decode(&mut Decoder::new(answer))
}

/// An answer that is a list of them.
pub fn domains(answer: &[u8]) -> Result<Vec<Domain>, Malformed> {
    Decoder::new(answer).list(MOST, Domain::decode)
}

/// An answer that is a text.
pub fn text(answer: &[u8]) -> Result<String, Malformed> {
    Decoder::new(answer).string().map(str::to_owned)
}

/// An answer that is a number of 64 bits.
pub fn number64(answer: &[u8]) -> Result<u64, Malformed> {
    Decoder::new(answer).u64()
}

/// An answer that is a yes or a no.
pub fn yes_or_no(answer: &[u8]) -> Result<bool, Malformed> {
    Decoder::new(answer).bool()
}

/// The ways to sign in that a daemon offers.
pub fn sign_ins(answer: &[u8]) -> Result<Vec<u32>, Malformed> {
    Decoder::new(answer).list(MOST, Decoder::u32)
}

/// How a domain stands.
pub fn state(answer: &[u8]) -> Result<State, Malformed> {
    let mut from = Decoder::new(answer);
    Ok(State::of(from.i32()?, from.i32()?))
}

/// What a domain has.
pub fn info(answer: &[u8]) -> Result<Info, Malformed> {
    let mut from = Decoder::new(answer);
    let _state = from.u32()?;
    let kib = from.u64()?;
    let _now = from.u64()?;
    Ok(Info { max_memory: kib.saturating_mul(1024), vcpus: from.u32()? })
}

/// What the first domain of an answer is said to be like; nothing when there is none.
fn stats(answer: &[u8]) -> Result<Params, Malformed> {
    let one = |from: &mut Decoder<'_>| {
        Domain::decode(from)?;
        Params::decode(from)
    };
    Ok(Decoder::new(answer).list(MOST, one)?.into_iter().next().unwrap_or_default())
}

/// How much of the host's memory a domain has, in bytes, if that is told.
pub fn resident(answer: &[u8]) -> Result<Option<u64>, Malformed> {
    Ok(stats(answer)?.number("balloon.rss").map(|kib| kib.saturating_mul(1024)))
}

/// How far a look at what a domain writes is.
pub fn dirty_rate(answer: &[u8]) -> Result<DirtyRate, Malformed> {
    Ok(DirtyRate::of(&stats(answer)?))
}

/// A domain's job.
pub fn job(answer: &[u8]) -> Result<Job, Malformed> {
    Job::decode(&mut Decoder::new(answer))
}
