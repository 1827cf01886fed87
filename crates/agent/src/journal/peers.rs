//! Who this host trusts, and the join tokens that would make it trust somebody.

use rusqlite::{OptionalExtension, Row, params};
use vmferry_link::Fingerprint;

use super::store::{Result, Store, now, parse_key};

/// A paired agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRecord {
    /// What it calls itself.
    pub name: String,
    /// Who it is.
    pub fingerprint: Fingerprint,
    /// HOST:PORT; empty when it listens nowhere.
    pub address: String,
    /// When it was paired, in seconds since 1970.
    pub paired: u64,
}

/// What became of somebody who came with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// It is a peer now; the token is used up.
    Yes,
    /// There is no such token, any more or at all.
    NoToken,
    /// Another peer has that name; the token stays.
    NameTaken,
}

impl Store {
    /// A token with this hash may be used once, for so many seconds.
    pub fn add_token(&self, hash: &str, seconds: u64) -> Result<()> {
        let db = self.db();
        db.execute("DELETE FROM tokens WHERE expires <= ?1", [now()])?;
        db.execute("INSERT INTO tokens VALUES (?1, ?2)", params![hash, now() + seconds as i64])?;
        Ok(())
    }

    /// Takes whoever comes with the token of this hash as a peer.
    pub fn join(&self, hash: &str, peer: &PeerRecord) -> Result<Joined> {
        let mut db = self.db();
        let step = db.transaction()?;
        let used = step.execute("DELETE FROM tokens WHERE hash = ?1 AND expires > ?2", params![hash, now()])?;
        if used == 0 {
            return Ok(Joined::NoToken);
        }
        // Without the commit the token is there again.
        if !put(&step, peer)? {
            return Ok(Joined::NameTaken);
        }
        step.commit()?;
        Ok(Joined::Yes)
    }

    /// Makes somebody a peer, or changes what is known of it. False when another peer has its name.
    pub fn put_peer(&self, peer: &PeerRecord) -> Result<bool> {
        put(&self.db(), peer)
    }

    /// All peers, by name.
    pub fn peers(&self) -> Result<Vec<PeerRecord>> {
        self.db()
            .prepare("SELECT name, fingerprint, address, paired FROM peers ORDER BY name")?
            .query_map([], record)?
            .collect()
    }

    /// The peer with this fingerprint.
    pub fn peer(&self, fingerprint: Fingerprint) -> Result<Option<PeerRecord>> {
        self.db()
            .query_row(
                "SELECT name, fingerprint, address, paired FROM peers WHERE fingerprint = ?1",
                [fingerprint.to_string()],
                record,
            )
            .optional()
    }

    /// Trusts the peer with this fingerprint no more.
    pub fn remove_peer(&self, fingerprint: Fingerprint) -> Result<()> {
        self.db().execute("DELETE FROM peers WHERE fingerprint = ?1", [fingerprint.to_string()])?;
        Ok(())
    }
}

fn put(db: &rusqlite::Connection, peer: &PeerRecord) -> Result<bool> {
    let key = peer.fingerprint.to_string();
    let taken: bool = db.query_row(
        "SELECT EXISTS (SELECT 1 FROM peers WHERE name = ?1 AND fingerprint != ?2)",
        [&peer.name, &key],
        |row| row.get(0),
    )?;
    if !taken {
        db.execute(
            "INSERT OR REPLACE INTO peers (fingerprint, name, address, paired) VALUES (?1, ?2, ?3, ?4)",
            params![key, peer.name, peer.address, now()],
        )?;
    }
    Ok(!taken)
}

fn record(row: &Row<'_>) -> Result<PeerRecord> {
    Ok(PeerRecord {
        name: row.get(0)?,
        fingerprint: parse_key(&row.get::<_, String>(1)?)?,
        address: row.get(2)?,
        paired: row.get::<_, i64>(3)? as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    fn peer(name: &str, key: &[u8]) -> PeerRecord {
        PeerRecord { name: name.into(), fingerprint: Fingerprint::of(key), address: String::new(), paired: 0 }
    }

    #[test]
    fn a_token_is_used_once() {
        let (_dir, store) = store();
        store.add_token("hash", 60).unwrap();
        assert_eq!(store.join("other", &peer("alpha", b"a")).unwrap(), Joined::NoToken);
        assert_eq!(store.join("hash", &peer("alpha", b"a")).unwrap(), Joined::Yes);
        assert_eq!(store.join("hash", &peer("mallory", b"m")).unwrap(), Joined::NoToken);
        let names: Vec<String> = store.peers().unwrap().into_iter().map(|peer| peer.name).collect();
        assert_eq!(names, ["alpha"]);
    }

    #[test]
    fn a_token_that_has_expired_is_worth_nothing() {
        let (_dir, store) = store();
        store.add_token("hash", 0).unwrap();
        assert_eq!(store.join("hash", &peer("alpha", b"a")).unwrap(), Joined::NoToken);
    }

    #[test]
    fn a_name_belongs_to_one_peer_until_it_is_unpaired() {
        let (_dir, store) = store();
        assert!(store.put_peer(&peer("alpha", b"a")).unwrap());
        store.add_token("hash", 60).unwrap();
        assert_eq!(store.join("hash", &peer("alpha", b"m")).unwrap(), Joined::NameTaken);
        assert_eq!(store.peer(Fingerprint::of(b"m")).unwrap(), None);
        store.remove_peer(Fingerprint::of(b"a")).unwrap();
        assert_eq!(store.join("hash", &peer("alpha", b"m")).unwrap(), Joined::Yes, "the token was not used up");
        assert!(store.peer(Fingerprint::of(b"m")).unwrap().is_some());
    }

    #[test]
    fn a_peer_may_change_its_name_and_address() {
        let (_dir, store) = store();
        assert!(store.put_peer(&peer("alpha", b"a")).unwrap());
        let moved = PeerRecord { address: "192.0.2.9:7420".into(), ..peer("gamma", b"a") };
        assert!(store.put_peer(&moved).unwrap());
        let known = store.peers().unwrap();
        assert_eq!((known.len(), known[0].name.as_str(), known[0].address.as_str()), (1, "gamma", "192.0.2.9:7420"));
    }
}
