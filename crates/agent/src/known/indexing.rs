//! Has an index of every image in the folders for images that rests: one image after the other, in a thread that the kernel
//! lets run, and read, when nobody else wants to.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use vmferry_nbd::backend::File;
use vmferry_nbd::known::{Identity, index, run_only_when_idle};

use super::indexes::Indexes;
use crate::error::AgentError;
use crate::host::{Host, Images};

/// How often it is looked for what has changed.
const LOOK: Duration = Duration::from_secs(60);
/// An image that was written to within this time does not rest.
const REST: Duration = Duration::from_secs(60);
/// What takes less room than this is sent in no time.
const LEAST: u64 = 1 << 20;
/// How deep below a folder for images there are some.
const DEPTH: u32 = 3;
/// The longest pause between two blocks. There is one as long as the block took, so that disks which know no priorities
/// are read half of the time at most.
const PAUSE: Duration = Duration::from_millis(50);
/// File systems whose images other hosts have too, and would read as well: NFS, CIFS, SMB, Ceph, FUSE, 9p, GFS2 and OCFS2.
const OF_OTHERS: [u32; 8] =
    [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400, 0x6573_5546, 0x0102_1997, 0x0116_1970, 0x7461_636f];

/// Begins to, for as long as the host is there.
pub(crate) fn keep_indexes(host: &Arc<Host>) -> Result<(), AgentError> {
    let (host, indexes) = (Arc::downgrade(host), Indexes::new(&host.config.state_dir));
    let work = move || {
        if let Err(error) = run_only_when_idle() {
            tracing::warn!(%error, "images are not indexed: it would not be done only when nobody needs the disk");
            return;
        }
        while let Some(here) = host.upgrade() {
            look(&here, &indexes);
            drop(here);
            std::thread::sleep(LOOK);
        }
    };
    std::thread::Builder::new().name("indexing".into()).spawn(work).map(drop).map_err(AgentError::io("a thread"))
}

/// Makes what is missing, and removes what is of no use any more.
fn look(host: &Host, indexes: &Indexes) {
    indexes.sweep();
    let mut found = HashMap::new();
    if host.config.index_images {
        for folder in &host.config.image_folders {
            find(folder, DEPTH, &mut found);
        }
    }
    let mut made = HashMap::new();
    for index in indexes.all() {
        let (image, path) = (index.identity(), index.path().to_owned());
        match found.get(&path) {
            Some(now) if (now.device, now.inode) == (image.device, image.inode) => {
                made.insert(path, image);
            }
            _ => indexes.remove(image),
        }
    }
    for (path, now) in found {
        if made.get(&path) != Some(&now) {
            make(host, indexes, &path);
        }
    }
}

/// The images that are in a folder, and below it.
fn find(folder: &Path, depth: u32, found: &mut HashMap<PathBuf, Identity>) {
    let is_of_others = |kind: u64| OF_OTHERS.contains(&(kind as u32));
    if rustix::fs::statfs(folder).map_or(true, |it| is_of_others(it.f_type as u64)) {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, Ok(known)) = (entry.path(), entry.metadata()) else { continue };
        if known.is_dir() && depth > 0 {
            find(&path, depth - 1, found);
        } else if known.is_file() && known.blocks() * 512 >= LEAST {
            found.insert(path, Identity::of(&known));
        }
    }
}

/// Of one that rests.
fn make(host: &Host, indexes: &Indexes, path: &Path) {
    let images = Images::new(&host.config.name, &host.config.image_folders);
    let Ok(file) = images.open_to_read(path) else { return };
    let rests = |file: &fs::File| {
        let known = file.metadata().ok()?;
        let written = known.modified().ok()?;
        let rests = SystemTime::now().duration_since(written).is_ok_and(|since| since >= REST);
        rests.then(|| Identity::of(&known))
    };
    let Some((image, kept)) = rests(&file).zip(file.try_clone().ok()) else { return };
    let Ok(disk) = File::beside_others(file, path) else { return };
    if disk.is_written_by_others() {
        return;
    }
    let _ = fs::create_dir_all(indexes.folder());
    let (begun, mut last) = (Instant::now(), Instant::now());
    let mut goes_on = || {
        std::thread::sleep(last.elapsed().min(PAUSE));
        last = Instant::now();
        !disk.is_written_by_others() && rests(&kept) == Some(image)
    };
    match index(&disk, path, image, &indexes.place_of(image), &mut goes_on) {
        Ok(true) => tracing::info!(image = %path.display(), seconds = begun.elapsed().as_secs(), "indexed"),
        Ok(false) => tracing::debug!(image = %path.display(), "somebody writes to it: it is indexed later"),
        Err(error) => tracing::warn!(image = %path.display(), %error, "cannot be indexed"),
    }
}
