//! The tables, and what makes them from those of earlier versions.

use std::path::Path;

use rusqlite::{Connection, params};

use super::{FILE, Result, now, unreadable};

/// What makes the tables of each version from those of the version before; `PRAGMA user_version` tells which one a file
/// has.
const SCHEMA: [&str; 8] = [
    "
CREATE TABLE vms (
    name       TEXT PRIMARY KEY,
    spec       TEXT NOT NULL,      -- VmSpec as JSON
    pid        INTEGER NOT NULL,
    start_time INTEGER NOT NULL,   -- of the process, in clock ticks since boot: tells a reused pid
    qmp        TEXT NOT NULL,      -- path of the QMP socket
    accelerator TEXT NOT NULL,
    incoming   TEXT,               -- the migration that brought it, or is to
    must_run   INTEGER NOT NULL,   -- of version 2
    stranded   INTEGER NOT NULL    -- of version 2
);
CREATE TABLE migrations (
    id         TEXT PRIMARY KEY,
    direction  TEXT NOT NULL,      -- 'out' or 'in'
    vm         TEXT NOT NULL,
    peer       TEXT NOT NULL,      -- the other host
    running    INTEGER NOT NULL,   -- the guest is to run
    started    INTEGER NOT NULL,   -- seconds since 1970
    step       TEXT NOT NULL,
    outcome    TEXT                -- how it ended; NULL while it has not
);
",
    "
ALTER TABLE migrations ADD COLUMN address TEXT NOT NULL DEFAULT '';   -- where the destination is
ALTER TABLE migrations ADD COLUMN peer_key TEXT NOT NULL DEFAULT '';  -- fingerprint of the other host
CREATE TABLE peers (
    fingerprint TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,  -- what it calls itself
    address     TEXT NOT NULL,         -- HOST:PORT; empty when it listens nowhere
    paired      INTEGER NOT NULL       -- seconds since 1970
);
CREATE TABLE tokens (
    hash    TEXT PRIMARY KEY,          -- of the secret
    expires INTEGER NOT NULL           -- seconds since 1970
);
",
    "
ALTER TABLE vms ADD COLUMN boot TEXT NOT NULL DEFAULT '';             -- with pid and start_time: the instance
ALTER TABLE vms ADD COLUMN autostart INTEGER NOT NULL DEFAULT 0;      -- started when the host is
ALTER TABLE vms ADD COLUMN ended TEXT;                                -- why its QEMU is gone; NULL while it is not
ALTER TABLE migrations ADD COLUMN boot TEXT NOT NULL DEFAULT '';      -- the instance of the VM that it moves
ALTER TABLE migrations ADD COLUMN pid INTEGER NOT NULL DEFAULT 0;
ALTER TABLE migrations ADD COLUMN start_time INTEGER NOT NULL DEFAULT 0;
ALTER TABLE migrations ADD COLUMN must_run INTEGER NOT NULL DEFAULT 0; -- committed here, and not set running yet
ALTER TABLE migrations ADD COLUMN settled INTEGER NOT NULL DEFAULT 0; -- its source has nothing more to say of it
CREATE TABLE fences (
    id       TEXT PRIMARY KEY,     -- a migration whose guest was kept here: the destination is to let go
    vm       TEXT NOT NULL,
    peer     TEXT NOT NULL,
    peer_key TEXT NOT NULL,
    address  TEXT NOT NULL,
    since    INTEGER NOT NULL      -- seconds since 1970
);
-- What an earlier version left open is found by the name that it has there.
UPDATE migrations SET pid = coalesce((SELECT pid FROM vms WHERE name = vm), 0),
    start_time = coalesce((SELECT start_time FROM vms WHERE name = vm), 0)
    WHERE direction = 'out' AND outcome IS NULL;
UPDATE migrations SET outcome = 'left open by an earlier version', step = 'abandoned'
    WHERE direction = 'out' AND outcome IS NULL AND (peer_key = '' OR pid = 0 OR rowid NOT IN
    (SELECT max(rowid) FROM migrations WHERE direction = 'out' AND outcome IS NULL GROUP BY vm));
UPDATE migrations SET must_run = 1 WHERE direction = 'in' AND step = 'committed'
    AND id IN (SELECT incoming FROM vms WHERE must_run = 1);
-- What it called stranded is one that is open, at a step of that name.
UPDATE migrations SET outcome = NULL, step = 'stranded',
    pid = (SELECT pid FROM vms WHERE name = vm), start_time = (SELECT start_time FROM vms WHERE name = vm)
    WHERE rowid IN (SELECT max(rowid) FROM migrations WHERE direction = 'out' AND peer_key != ''
    AND vm IN (SELECT name FROM vms WHERE stranded = 1) GROUP BY vm);
CREATE UNIQUE INDEX one_open_migration ON migrations (boot, pid, start_time)
    WHERE direction = 'out' AND outcome IS NULL;
CREATE INDEX migrations_by_start ON migrations (direction, started);
CREATE INDEX migrations_by_source ON migrations (peer_key, started) WHERE direction = 'in';
",
    "
ALTER TABLE vms ADD COLUMN changed TEXT;                              -- its Drift as JSON; NULL while it is as it was started
",
    "
-- VMs that do not run and were given to another host. What is not done is asked for until it is.
CREATE TABLE moves_out (
    id       TEXT PRIMARY KEY,
    vm       TEXT NOT NULL,
    boot     TEXT NOT NULL,        -- its instance
    pid      INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    peer     TEXT NOT NULL,
    peer_key TEXT NOT NULL,
    address  TEXT NOT NULL,
    disks    TEXT NOT NULL,        -- the paths of those that it leaves here, as JSON
    since    INTEGER NOT NULL,     -- seconds since 1970
    done     INTEGER NOT NULL      -- the other host has it
);
-- Those that come here. What is not taken is not this host's.
CREATE TABLE moves_in (
    id       TEXT PRIMARY KEY,
    vm       TEXT NOT NULL,
    peer     TEXT NOT NULL,
    peer_key TEXT NOT NULL,
    coming   TEXT NOT NULL,        -- Coming as JSON
    since    INTEGER NOT NULL,
    taken    INTEGER NOT NULL
);
CREATE UNIQUE INDEX one_move_out ON moves_out (vm) WHERE done = 0;
CREATE UNIQUE INDEX one_move_in ON moves_in (vm) WHERE taken = 0;
",
    "
-- Migrations that wait for their turn.
CREATE TABLE queue (
    place    INTEGER PRIMARY KEY,  -- in this order
    id       TEXT NOT NULL UNIQUE, -- the migration's
    vm       TEXT NOT NULL,
    boot     TEXT NOT NULL,        -- its instance
    pid      INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    request  TEXT NOT NULL,        -- MigrateRequest as JSON
    batch    TEXT,                 -- of those that were asked for together
    since    INTEGER NOT NULL      -- seconds since 1970
);
",
    "
-- How far predictions of migrations to a host were off, by its agent's fingerprint, the engine and the figure.
CREATE TABLE lessons (
    peer_key TEXT NOT NULL,
    engine   TEXT NOT NULL,
    figure   TEXT NOT NULL,
    count    INTEGER NOT NULL,     -- outcomes
    mean     REAL NOT NULL,        -- of the logarithm of outcome by prediction
    variance REAL NOT NULL,        -- of the same
    since    INTEGER NOT NULL,     -- of the last, in seconds since 1970
    PRIMARY KEY (peer_key, engine, figure)
);
",
    "
-- Migrations of libvirt's domains. libvirt knows who owns the guest.
CREATE TABLE carries (
    id       TEXT PRIMARY KEY,
    vm       TEXT NOT NULL,        -- the domain's name
    uuid     TEXT NOT NULL,        -- and its UUID
    peer     TEXT NOT NULL,
    peer_key TEXT NOT NULL,
    address  TEXT NOT NULL,
    started  INTEGER NOT NULL,     -- seconds since 1970
    step     TEXT NOT NULL,
    outcome  TEXT                  -- how it ended; NULL while that is not known
);
",
];

/// How long what is over is kept, in seconds. Nothing late of a migration comes after that.
const KEPT: i64 = 90 * 24 * 3600;

/// Opens the file in this folder, or makes it.
pub(super) fn open(dir: &Path) -> Result<Connection> {
    let connection = Connection::open(dir.join(FILE))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // The log stays within what is reserved for it.
    connection.pragma_update(None, "wal_autocheckpoint", 16)?;
    let sound: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if sound != "ok" {
        return Err(rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT),
            Some(sound),
        ));
    }
    let version: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let version = version as usize;
    if version > SCHEMA.len() {
        return Err(unreadable(&format!("a journal of version {version}, made by a newer vmferry")));
    }
    for (version, change) in SCHEMA.iter().enumerate().skip(version) {
        connection.execute_batch(&format!("BEGIN; {change} PRAGMA user_version = {}; COMMIT;", version + 1))?;
    }
    forget_what_is_old(&connection);
    Ok(connection)
}

pub(super) fn forget_what_is_old(connection: &Connection) {
    let old = "DELETE FROM migrations WHERE outcome IS NOT NULL AND must_run = 0 AND started < ?1
               AND id NOT IN (SELECT incoming FROM vms WHERE incoming IS NOT NULL) AND id NOT IN (SELECT id FROM fences)";
    let others = [
        "DELETE FROM moves_out WHERE done = 1 AND since < ?1",
        "DELETE FROM moves_in WHERE taken = 1 AND since < ?1",
        "DELETE FROM lessons WHERE since < ?1",
        "DELETE FROM carries WHERE outcome IS NOT NULL AND started < ?1",
    ];
    for old in [old].into_iter().chain(others) {
        if let Err(error) = connection.execute(old, params![now() - KEPT]) {
            tracing::warn!(%error, "cannot forget old migrations");
        }
    }
}

#[cfg(test)]
pub(super) fn make_version_2(dir: &Path) {
    let db = Connection::open(dir.join("agent.db")).unwrap();
    db.execute_batch(SCHEMA[0]).unwrap();
    db.execute_batch(SCHEMA[1]).unwrap();
    let (key, now) = (vmferry_link::Fingerprint::of(b"beta").to_string(), now());
    db.execute_batch(&format!(
        "INSERT INTO vms VALUES ('web1', '{{}}', 41, 5, '/q', 'tcg', NULL, 0, 0);
         INSERT INTO migrations VALUES ('9d7a4c1e-0000-4000-8000-000000000001', 'out', 'web1', 'beta', 1, {now}, 'copy-ram',
         NULL, '192.0.2.2:7420', '{key}');
         INSERT INTO migrations VALUES ('9d7a4c1e-0000-4000-8000-000000000002', 'out', 'web1', 'beta', 1, {now}, 'commit',
         NULL, '192.0.2.2:7420', '{key}');
         INSERT INTO vms VALUES ('lost', '{{}}', 42, 6, '/q', 'tcg', NULL, 0, 1);
         INSERT INTO migrations VALUES ('9d7a4c1e-0000-4000-8000-000000000003', 'out', 'lost', 'beta', 1, {now}, 'done',
         'post-copy could not be finished', '192.0.2.2:7420', '{key}');
         PRAGMA user_version = 2;"
    ))
    .unwrap();
}
