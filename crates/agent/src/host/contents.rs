//! What is in a file: to see that two hosts have the same one where they do not share it.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Two files with the same are the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Content {
    /// In bytes.
    pub size: u64,
    /// BLAKE3 of all of it, in hexadecimal.
    pub blake3: String,
}

/// A file as long as nobody writes it: where it is, its size, and when it was last changed, in seconds and nanoseconds.
type AsItWas = (u64, u64, u64, [(i64, i64); 2]);

/// What was read once is not read again while the file stays as it was.
#[derive(Default)]
pub(crate) struct Contents(Mutex<HashMap<AsItWas, String>>);

/// What was an ordinary file a moment ago must not be waited for.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

/// How many files are remembered.
const KEPT: usize = 4096;

impl Contents {
    /// Of an ordinary file. Blocks for as long as it takes to read it.
    pub(crate) fn of(&self, path: &Path) -> io::Result<Content> {
        // Nothing of the other kinds is even opened: that may take for ever, or do something.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no ordinary file"));
        }
        let file = File::options().read(true).custom_flags(NONBLOCK).open(path)?;
        let before = file.metadata()?;
        if !before.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no ordinary file"));
        }
        let as_it_was = as_it_was(&before);
        if let Some(blake3) = self.lock().get(&as_it_was).cloned() {
            return Ok(Content { size: before.len(), blake3 });
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file)?;
        if self::as_it_was(&file.metadata()?) != as_it_was {
            return Err(io::Error::other("it is being written"));
        }
        let blake3 = hasher.finalize().to_hex().to_string();
        let mut known = self.lock();
        if known.len() >= KEPT {
            known.clear();
        }
        known.insert(as_it_was, blake3.clone());
        Ok(Content { size: before.len(), blake3 })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<AsItWas, String>> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

fn as_it_was(it: &Metadata) -> AsItWas {
    (it.dev(), it.ino(), it.len(), [(it.mtime(), it.mtime_nsec()), (it.ctime(), it.ctime_nsec())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_again_only_when_it_was_changed() {
        let dir = tempfile::tempdir().unwrap();
        let [one, same] = ["one", "same"].map(|name| dir.path().join(name));
        let contents = Contents::default();
        for file in [&one, &same] {
            std::fs::write(file, "x".repeat(100_000)).unwrap();
        }
        let read = contents.of(&one).unwrap();
        assert_eq!((read.size, &read), (100_000, &contents.of(&same).unwrap()));
        assert_eq!(contents.lock().len(), 2);
        // What is remembered is taken.
        contents.lock().values_mut().for_each(|blake3| *blake3 = "remembered".into());
        assert_eq!(contents.of(&one).unwrap().blake3, "remembered");
        std::fs::write(&one, "y".repeat(100_000)).unwrap();
        let changed = contents.of(&one).unwrap();
        assert!(changed.size == 100_000 && changed.blake3 != read.blake3 && changed.blake3 != "remembered");
        assert!(contents.of(dir.path()).is_err());
    }
}
