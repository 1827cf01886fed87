//! What an agent does with a libvirt.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use uuid::Uuid;

use crate::call::{self, Call, number};
use crate::connection::{Connection, ConnectionError};
use crate::domain::{DirtyRate, Domain, Info, Job, State};
use crate::event::{Event, KINDS};
use crate::param::{Param, Params, Value};
use crate::xdr::Malformed;

type Result<T> = std::result::Result<T, ConnectionError>;

/// How long an ordinary call may take. A domain whose QEMU is busy is waited for by libvirt itself, for 30 s.
const PATIENCE: Duration = Duration::from_secs(40);
/// Ways to sign in.
const NO_SIGN_IN: u32 = 0;
const POLKIT: u32 = 2;
/// Kinds of statistics.
const BALLOON: u32 = 1 << 2;
const DIRTY_RATE: u32 = 1 << 9;
/// The oldest libvirt that migrates over Unix sockets.
const OLDEST: u64 = 6_008_000;

/// What is asked of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Migration {
    /// The URI of the destination's libvirt, as this one reaches it.
    pub to: String,
    /// Where the RAM goes.
    pub ram_uri: String,
    /// Where disks go.
    pub disks_uri: String,
    /// Those that go, by their targets in the domain's XML.
    pub disks: Vec<String>,
    /// It is defined there afterwards, and not here any more.
    pub moves_definition: bool,
    /// It runs while its RAM is copied; otherwise libvirt pauses it first.
    pub live: bool,
    /// It may be turned to post-copy.
    pub post_copy: bool,
    /// Whether disks lie where both hosts see them was found out: libvirt need not guess from their file systems.
    pub vouched_for: bool,
    /// The most that is sent, in MiB a second.
    pub bandwidth_mib: Option<u64>,
    /// Its RAM goes over so many connections, each with a thread of QEMU's; not by post-copy. None: over one.
    pub connections: Option<u8>,
}

impl Migration {
    fn flags(&self) -> u32 {
        const LIVE: u32 = 1;
        const PEER_TO_PEER: u32 = 1 << 1;
        const PERSIST_DESTINATION: u32 = 1 << 3;
        const UNDEFINE_SOURCE: u32 = 1 << 4;
        const NON_SHARED_DISK: u32 = 1 << 6;
        const CHANGE_PROTECTION: u32 = 1 << 8;
        const UNSAFE: u32 = 1 << 9;
        const POST_COPY: u32 = 1 << 15;
        const PARALLEL: u32 = 1 << 17;
        let on = |is: bool, flag: u32| if is { flag } else { 0 };
        PEER_TO_PEER
            | CHANGE_PROTECTION
            | on(self.live, LIVE)
            | on(self.moves_definition, PERSIST_DESTINATION | UNDEFINE_SOURCE)
            | on(!self.disks.is_empty(), NON_SHARED_DISK)
            | on(self.vouched_for, UNSAFE)
            | on(self.post_copy, POST_COPY)
            | on(self.connections.is_some(), PARALLEL)
    }

    fn params(&self) -> Params {
        let mut all = vec![Param::text("migrate_uri", &self.ram_uri)];
        if !self.disks.is_empty() {
            all.push(Param::text("disks_uri", &self.disks_uri));
            all.extend(self.disks.iter().map(|disk| Param::text("migrate_disks", disk)));
        }
        if let Some(connections) = self.connections {
            all.push(Param { name: "parallel.connections".into(), value: Value::Int(connections.into()) });
        }
        if let Some(rate) = self.bandwidth_mib {
            all.push(Param::number("bandwidth", rate));
            all.extend(self.post_copy.then(|| Param::number("bandwidth.postcopy", rate)));
        }
        Params(all)
    }
}

/// The libvirt of this host, as long as one connection to it lasts; cheap to clone.
#[derive(Clone)]
pub struct Libvirt {
    connection: Connection,
    /// Its own version, such as 9.0.0.
    pub version: String,
    number: u64,
}

impl Libvirt {
    /// Connects to the daemon at this socket, and opens this driver there, such as `qemu:///system`.
    pub async fn open(socket: &Path, uri: &str) -> Result<Self> {
        let connection = Connection::connect(socket).await?;
        let ways = patiently(connection.call(Call::bare(number::AUTH_LIST))).await?;
        match call::sign_ins(&ways)?.first() {
            None | Some(&NO_SIGN_IN) => {}
            Some(&POLKIT) => drop(patiently(connection.call(Call::bare(number::AUTH_POLKIT))).await?),
            Some(_) => return Err(ConnectionError::SignIn { path: socket.into() }),
        }
        patiently(connection.call(Call::open(uri))).await?;
        let version = patiently(connection.call(Call::bare(number::GET_LIB_VERSION))).await?;
        let version = call::number64(&version)?;
        Ok(Self { connection, version: version_in_words(version), number: version })
    }

    /// It can migrate over Unix sockets.
    pub fn migrates_over_sockets(&self) -> bool {
        self.number >= OLDEST
    }

    /// The daemon has gone, or was given up.
    pub fn has_ended(&self) -> bool {
        self.connection.has_ended()
    }

    /// Waits until that is so.
    pub async fn ended(&self) {
        self.connection.ended().await;
    }

    /// Follows the events of all domains from now on, with when they came.
    pub async fn follow(&self) -> Result<broadcast::Receiver<(Instant, Event)>> {
        let events = self.connection.events();
        for kind in KINDS {
            self.ask(Call::register_event(kind)).await?;
        }
        Ok(events)
    }

    /// Of those that were registered for before.
    pub fn events(&self) -> broadcast::Receiver<(Instant, Event)> {
        self.connection.events()
    }

    /// All domains, those that do not run among them.
    pub async fn domains(&self) -> Result<Vec<Domain>> {
        self.answer(Call::list_all_domains(), call::domains).await
    }

    /// The domain of this UUID, if there is one.
    pub async fn find(&self, uuid: Uuid) -> Result<Option<Domain>> {
        or_none(self.answer(Call::lookup_by_uuid(uuid), call::domain).await)
    }

    /// How it stands; none when it is gone.
    pub async fn state(&self, domain: &Domain) -> Result<Option<State>> {
        or_none(self.answer(Call::flagged(number::GET_STATE, domain, 0), call::state).await)
    }

    /// What it has.
    pub async fn info(&self, domain: &Domain) -> Result<Info> {
        self.answer(Call::about(number::GET_INFO, domain), call::info).await
    }

    /// How much of the host's memory it has, in bytes, if that is told.
    pub async fn resident(&self, domain: &Domain) -> Result<Option<u64>> {
        self.answer(Call::stats(domain, BALLOON), call::resident).await
    }

    /// Has QEMU look for so many seconds, 1 to 60, how much of it is written; it costs the guest next to nothing.
    pub async fn start_dirty_rate(&self, domain: &Domain, seconds: u32) -> Result<()> {
        self.ask(Call::start_dirty_rate(domain, seconds.min(60).cast_signed())).await.map(drop)
    }

    /// What came of that.
    pub async fn dirty_rate(&self, domain: &Domain) -> Result<DirtyRate> {
        self.answer(Call::stats(domain, DIRTY_RATE), call::dirty_rate).await
    }

    /// Its XML, as it is now.
    pub async fn xml(&self, domain: &Domain) -> Result<String> {
        self.answer(Call::flagged(number::GET_XML_DESC, domain, 0), call::text).await
    }

    /// What this host can do, in XML.
    pub async fn capabilities(&self) -> Result<String> {
        self.answer(Call::bare(number::GET_CAPABILITIES), call::text).await
    }

    /// What this host calls itself.
    pub async fn hostname(&self) -> Result<String> {
        self.answer(Call::bare(number::GET_HOSTNAME), call::text).await
    }

    /// It is defined: it stays when it has ended.
    pub async fn is_persistent(&self, domain: &Domain) -> Result<bool> {
        self.answer(Call::about(number::IS_PERSISTENT, domain), call::yes_or_no).await
    }

    /// It is started with its host.
    pub async fn autostarts(&self, domain: &Domain) -> Result<bool> {
        self.answer(Call::about(number::GET_AUTOSTART, domain), call::yes_or_no).await
    }

    /// Its job, if it has one.
    pub async fn job(&self, domain: &Domain) -> Result<Job> {
        self.answer(Call::flagged(number::GET_JOB_STATS, domain, 0), call::job).await
    }

    /// Ends its job.
    pub async fn abort_job(&self, domain: &Domain) -> Result<()> {
        self.ask(Call::about(number::ABORT_JOB, domain)).await.map(drop)
    }

    /// For how long QEMU may have it stand at the switchover, in ms. Only within a migration: libvirt then restores what it
    /// was before.
    pub async fn set_max_downtime(&self, domain: &Domain, ms: u64) -> Result<()> {
        self.ask(Call::sets(number::SET_MAX_DOWNTIME, domain, ms)).await.map(drop)
    }

    /// The most that its migrations send, in MiB a second. It stays when the migration is over.
    pub async fn set_max_speed(&self, domain: &Domain, mib: u64) -> Result<()> {
        self.ask(Call::sets(number::SET_MAX_SPEED, domain, mib)).await.map(drop)
    }

    /// What that is now.
    pub async fn max_speed(&self, domain: &Domain) -> Result<u64> {
        self.answer(Call::flagged(number::GET_MAX_SPEED, domain, 0), call::number64).await
    }

    /// Turns its migration to post-copy.
    pub async fn start_post_copy(&self, domain: &Domain) -> Result<()> {
        self.ask(Call::flagged(number::START_POST_COPY, domain, 0)).await.map(drop)
    }

    /// Migrates it, peer to peer, and waits until that is over, however long it takes. When the connection ends before, it
    /// may go on.
    pub async fn migrate(&self, domain: &Domain, how: &Migration) -> Result<()> {
        let call = Call::migrate(domain, &how.to, &how.params(), how.flags());
        self.connection.call(call).await.map(drop)
    }

    async fn ask(&self, call: Call) -> Result<Vec<u8>> {
        patiently(self.connection.call(call)).await
    }

    async fn answer<T>(&self, call: Call, read: fn(&[u8]) -> std::result::Result<T, Malformed>) -> Result<T> {
        Ok(read(&self.ask(call).await?)?)
    }
}

async fn patiently(answer: impl Future<Output = Result<Vec<u8>>>) -> Result<Vec<u8>> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or(Err(ConnectionError::Silent(PATIENCE)))
}

fn or_none<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(ConnectionError::Refused(error)) if error.is_no_domain() => Ok(None),
        Err(error) => Err(error),
    }
}

/// libvirt counts a thousand to each part.
fn version_in_words(version: u64) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_post_copy_and_a_definition_are_asked_for_only_where_they_are_wanted() {
        let plain = Migration { ram_uri: "unix:///r".into(), live: true, ..Migration::default() };
        assert_eq!(plain.flags(), 1 | 2 | 256);
        assert_eq!(plain.params(), Params(vec![Param::text("migrate_uri", "unix:///r")]));
        let all = Migration {
            disks: vec!["vda".into()],
            disks_uri: "unix:///d".into(),
            moves_definition: true,
            post_copy: true,
            bandwidth_mib: Some(40),
            ..plain
        };
        assert_eq!(all.flags(), 1 | 2 | 256 | 8 | 16 | 64 | 32768);
        let params = all.params();
        assert_eq!(params.texts("migrate_disks").collect::<Vec<_>>(), ["vda"]);
        assert_eq!((params.number("bandwidth"), params.number("bandwidth.postcopy")), (Some(40), Some(40)));
        let parallel = Migration { connections: Some(4), ..Migration::default() };
        assert_eq!((parallel.flags() & 1 << 17, parallel.params().number("parallel.connections")), (1 << 17, Some(4)));
        assert_eq!(version_in_words(9_000_000), "9.0.0");
    }
}
