//! The images from which something that arrives may be taken: for as long as it arrives, and only those that lie in the
//! folders in which other hosts may have this one make images.

use std::cmp::Reverse;
use std::path::Path;
use std::sync::Arc;

use vmferry_nbd::backend::File;
use vmferry_nbd::known::{Base, Identity};

use super::indexes::Indexes;
use crate::host::{Host, Images};

/// The most that are looked at, the ones that were written last before others: each takes two descriptors.
const MOST: usize = 64;

/// All of this host's that have an index. Blocks.
pub(crate) fn bases(host: &Host) -> Arc<Vec<Base>> {
    if !host.config.index_images {
        return Arc::default();
    }
    let images = Images::new(&host.config.name, &host.config.image_folders);
    let mut all = Indexes::new(&host.config.state_dir).all();
    all.sort_by_key(|index| Reverse(index.identity().written()));
    let base = |index: vmferry_nbd::known::Index| {
        let file = images.open_to_read(index.path()).ok()?;
        let now = Identity::of(&file.metadata().ok()?);
        // That it was written to since does not matter: what is taken from it is compared.
        let is_it = (now.device, now.inode) == (index.identity().device, index.identity().inode);
        let disk = is_it.then(|| File::beside_others(file, index.path()).ok())??;
        Some(Base::new(Box::new(disk), Some(index)))
    };
    Arc::new(all.into_iter().filter_map(base).take(MOST).collect())
}

/// One that is likely to have much of what arrives, with its index, if there is one.
pub(crate) fn base_of(host: &Host, file: std::fs::File, path: &Path) -> Option<Base> {
    let index = Indexes::new(&host.config.state_dir).of(Identity::of(&file.metadata().ok()?));
    Some(Base::new(Box::new(File::beside_others(file, path).ok()?), index))
}
