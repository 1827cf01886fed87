//! Where the indexes of images are: with what this agent has of its own, not among the images. Each is called by its image's
//! device and inode, so that it is found whatever the image is called.

use std::fs;
use std::path::{Path, PathBuf};

use vmferry_nbd::known::{Identity, Index};

const SUFFIX: &str = "known";

/// See the module's text.
#[derive(Clone)]
pub(super) struct Indexes(PathBuf);

impl Indexes {
    /// In this state folder.
    pub(super) fn new(state_dir: &Path) -> Self {
        Self(state_dir.join("known"))
    }

    /// Where they are.
    pub(super) fn folder(&self) -> &Path {
        &self.0
    }

    /// Where the one of this image is to be.
    pub(super) fn place_of(&self, image: Identity) -> PathBuf {
        self.0.join(format!("{:x}-{:x}.{SUFFIX}", image.device, image.inode))
    }

    /// The one of this image, as it is or was.
    pub(super) fn of(&self, image: Identity) -> Option<Index> {
        Index::open(&self.place_of(image)).ok()
    }

    /// All that can be used; the others are removed.
    pub(super) fn all(&self) -> Vec<Index> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let index = |entry: fs::DirEntry| {
            let path = entry.path();
            let index = Index::open(&path).ok();
            // One that is being made is not whole yet.
            let is_one = path.extension().is_some_and(|it| it == SUFFIX);
            if is_one && index.as_ref().is_none_or(|index| self.place_of(index.identity()) != path) {
                let _ = fs::remove_file(&path);
                return None;
            }
            index.filter(|_| is_one)
        };
        entries.filter_map(index).collect()
    }

    /// Removes what was not finished. Whoever makes them must not be at it.
    pub(super) fn sweep(&self) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if entry.path().extension().is_none_or(|it| it != SUFFIX) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// This image is not there any more.
    pub(super) fn remove(&self, image: Identity) {
        let _ = fs::remove_file(self.place_of(image));
    }
}

#[cfg(test)]
mod tests {
    use vmferry_nbd::backend::Memory;
    use vmferry_nbd::known::index;

    use super::*;

    #[test]
    fn only_whole_ones_of_the_images_that_they_are_called_by_are_used_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let indexes = Indexes::new(dir.path());
        assert!(indexes.all().is_empty());
        fs::create_dir(indexes.folder()).unwrap();
        let image = dir.path().join("image");
        fs::write(&image, "guest").unwrap();
        let it = Identity::of(&fs::metadata(&image).unwrap());
        let disk = Memory::holding(vec![7; 1 << 20]);
        assert!(index(&disk, &image, it, &indexes.place_of(it), &mut || true).unwrap());
        for other in ["1-2.known", "1-3.new"] {
            fs::copy(indexes.place_of(it), indexes.folder().join(other)).unwrap();
        }
        fs::write(indexes.folder().join("1-4.known"), "nothing").unwrap();
        let all = indexes.all();
        assert!(all.len() == 1 && all[0].path() == image && all[0].identity() == it);
        assert_eq!(fs::read_dir(indexes.folder()).unwrap().count(), 2, "one may be being made");
        indexes.sweep();
        assert_eq!(fs::read_dir(indexes.folder()).unwrap().count(), 1);
        assert!(indexes.of(it).is_some());
        indexes.remove(it);
        assert!(indexes.of(it).is_none());
    }
}
