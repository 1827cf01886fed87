//! Who this host trusts, and the join tokens that would make it trust somebody.

use rusqlite::{OptionalExtension, Row, params};
use vmferry_link::Fingerprint;

use super::{Journal, Result, now, parse_key};

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

impl Journal {
    /// A token with this hash may be used once, for so many seconds.
    pub async fn add_token(&self, hash: &str, seconds: u64) -> Result<()> {
        let hash = hash.to_owned();
        self.call(move |db| {
            db.execute("DELETE FROM tokens WHERE expires <= ?1", [now()])?;
            db.execute("INSERT INTO tokens VALUES (?1, ?2)", params![hash, now() + seconds as i64])?;
            Ok(())
        })
        .await
    }

    /// Takes whoever comes with the token of this hash as a peer.
    pub async fn join(&self, hash: &str, peer: &PeerRecord) -> Result<Joined> {
        let (hash, peer) = (hash.to_owned(), peer.clone());
        self.call(move |db| {
            let step = db.transaction()?;
            let used = step.execute("DELETE FROM tokens WHERE hash = ?1 AND expires > ?2", params![hash, now()])?;
            if used == 0 {
                return Ok(Joined::NoToken);
            }
            // Without the commit the token is there again.
            if !put(&step, &peer)? {
                return Ok(Joined::NameTaken);
            }
            step.commit()?;
            Ok(Joined::Yes)
        })
        .await
    }

    /// Makes somebody a peer, or changes what is known of it. False when another peer has its name.
    pub async fn put_peer(&self, peer: &PeerRecord) -> Result<bool> {
        let peer = peer.clone();
        self.call(move |db| put(db, &peer)).await
    }

    /// All peers, by name.
    pub async fn peers(&self) -> Result<Vec<PeerRecord>> {
        self.call(|db| {
            db.prepare("SELECT name, fingerprint, address, paired FROM peers ORDER BY name")?
                .query_map([], record)?
                .collect()
        })
        .await
    }

    /// The peer with this fingerprint.
    pub async fn peer(&self, fingerprint: Fingerprint) -> Result<Option<PeerRecord>> {
        self.call(move |db| {
            db.query_row(
                "SELECT name, fingerprint, address, paired FROM peers WHERE fingerprint = ?1",
                [fingerprint.to_string()],
                record,
            )
            .optional()
        })
        .await
    }

    /// Trusts the peer with this fingerprint no more.
    pub async fn remove_peer(&self, fingerprint: Fingerprint) -> Result<()> {
        self.call(move |db| {
            db.execute("DELETE FROM peers WHERE fingerprint = ?1", [fingerprint.to_string()])?;
            Ok(())
        })
        .await
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
