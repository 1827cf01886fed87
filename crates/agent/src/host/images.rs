//! Images that this agent makes and opens for others: only in the folders that its configuration names.
//!
//! The kernel looks after that (`openat2` with `RESOLVE_BENEATH`): whatever a path has in it, `..`, links, other mounts'
//! tricks with `/proc`, what it leads to lies below one of the folders or is not opened.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Mode, OFlags, RenameFlags, ResolveFlags, fstatvfs, fsync, linkat, open, openat, openat2, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::error::ImageError;

/// See the module's text.
#[derive(Clone, Copy)]
pub(crate) struct Images<'a> {
    host: &'a str,
    folders: &'a [PathBuf],
}

impl<'a> Images<'a> {
    pub(crate) fn new(host: &'a str, folders: &'a [PathBuf]) -> Self {
        Self { host, folders }
    }

    /// A new file, empty, open for reading and writing, that only its owner may use; it may not be there.
    pub(crate) fn make(&self, path: &Path) -> Result<File, ImageError> {
        let (folder, name) = self.folder_of(path)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(&folder, name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => Ok(file.into()),
            Err(Errno::EXIST) => Err(ImageError::Exists { host: self.host.into(), path: path.into() }),
            Err(error) => Err(self.failed(path, error.into())),
        }
    }

    /// Whether one could be made there: its folder allows it, and nothing has its name. Tells how much room there is, in
    /// bytes.
    pub(crate) fn may_make(&self, path: &Path) -> Result<u64, ImageError> {
        let (folder, name) = self.folder_of(path)?;
        match statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Err(ImageError::Exists { host: self.host.into(), path: path.into() }),
            Err(error) => return Err(self.failed(path, error.into())),
        }
        let room = fstatvfs(&folder).map_err(|error| self.failed(path, error.into()))?;
        Ok(room.f_bavail.saturating_mul(room.f_frsize))
    }

    /// An image that is there, a file or a block device, for reading and writing.
    pub(crate) fn open(&self, path: &Path) -> Result<File, ImageError> {
        self.open_for(OFlags::RDWR, path)
    }

    /// The same, for reading only.
    pub(crate) fn open_to_read(&self, path: &Path) -> Result<File, ImageError> {
        self.open_for(OFlags::RDONLY, path)
    }

    /// A block device that nothing on this host has for its own: no file system, no volume group, no other agent.
    pub(crate) fn open_device(&self, path: &Path) -> Result<File, ImageError> {
        // Without `CREATE` it is about block devices only.
        let file = self.open_for(OFlags::RDWR | OFlags::EXCL, path)?;
        match file.metadata().map_err(|source| self.failed(path, source))?.file_type().is_block_device() {
            true => Ok(file),
            false => Err(ImageError::OfAnotherKind { host: self.host.into(), path: path.into() }),
        }
    }

    fn open_for(&self, access: OFlags, path: &Path) -> Result<File, ImageError> {
        let (folder, name) = self.folder_of(path)?;
        // Not waiting for whoever has the other end of a pipe.
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = match openat(&folder, name, flags | OFlags::NOFOLLOW, Mode::empty()) {
            // What has a name in a folder of devices is often a link to it.
            Err(Errno::LOOP) if self.folders.iter().any(|it| it.starts_with("/dev") && path.starts_with(it)) => {
                openat(&folder, name, flags, Mode::empty())
            }
            Err(Errno::LOOP) => return Err(self.not_allowed(path)),
            opened => opened,
        };
        let file = File::from(opened.map_err(|error| self.failed(path, error.into()))?);
        let kind = file.metadata().map_err(|source| self.failed(path, source))?.file_type();
        if kind.is_file() || kind.is_block_device() {
            return Ok(file);
        }
        Err(ImageError::OfAnotherKind { host: self.host.into(), path: path.into() })
    }

    /// A file for reading and writing, and whether it is new; otherwise it was there.
    pub(crate) fn open_or_make(&self, path: &Path) -> Result<(File, bool), ImageError> {
        match self.make(path) {
            Ok(file) => Ok((file, true)),
            Err(ImageError::Exists { .. }) => self.open_file(path).map(|file| (file, false)),
            Err(error) => Err(error),
        }
    }

    /// A file that is there.
    pub(crate) fn open_file(&self, path: &Path) -> Result<File, ImageError> {
        let file = self.open(path)?;
        match file.metadata().map_err(|source| self.failed(path, source))?.is_file() {
            true => Ok(file),
            false => Err(ImageError::OfAnotherKind { host: self.host.into(), path: path.into() }),
        }
    }

    /// What is there is still this one, by device and inode.
    pub(crate) fn is_at(&self, path: &Path, it: (u64, u64)) -> bool {
        let there = self.folder_of(path).ok();
        let there = there.and_then(|(folder, name)| statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).ok());
        there.is_some_and(|there| (there.st_dev, there.st_ino) == it)
    }

    /// Gives a file in the same folder this path, in place of this other file, by device and inode, or of none. It is so
    /// after a power failure, too.
    pub(crate) fn put_in_place(&self, from: &Path, to: &Path, of: Option<(u64, u64)>) -> Result<(), ImageError> {
        let ((folder, name), from) = (self.folder_of(to)?, from.file_name().unwrap_or_default());
        let failed = |error: Errno| self.failed(to, error.into());
        let exists = || ImageError::Exists { host: self.host.into(), path: to.into() };
        match of {
            Some(it) => {
                if !self.is_at(to, it) {
                    return Err(exists());
                }
                renameat(&folder, from, &folder, name).map_err(failed)?;
            }
            None => match renameat_with(&folder, from, &folder, name, RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(Errno::EXIST) => return Err(exists()),
                // A file system that cannot do that in one step can do it in two.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    match linkat(&folder, from, &folder, name, AtFlags::empty()) {
                        Err(Errno::EXIST) => return Err(exists()),
                        linked => linked.map_err(failed)?,
                    }
                    unlinkat(&folder, from, AtFlags::empty()).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            },
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(&folder, ".", flags, Mode::empty()).map_err(failed)?;
        fsync(&folder).map_err(failed)
    }

    /// Removes one, if it is still this file, by device and inode.
    pub(crate) fn remove(&self, path: &Path, it: (u64, u64)) -> Result<bool, ImageError> {
        let (folder, name) = self.folder_of(path)?;
        if !self.is_at(path, it) {
            return Ok(false);
        }
        unlinkat(&folder, name, AtFlags::empty()).map_err(|error| self.failed(path, error.into()))?;
        Ok(true)
    }

    /// The folder that this is in, open, and what it is called there.
    fn folder_of<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), ImageError> {
        let way = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let name = path.file_name().filter(|_| path.is_absolute()).ok_or_else(|| self.not_allowed(path))?;
        let parent = path.parent().unwrap_or(path);
        for (allowed, inside) in self.folders.iter().filter_map(|it| Some((it, parent.strip_prefix(it).ok()?))) {
            // One that is not there allows nothing.
            let Ok(allowed) = open(allowed, way, Mode::empty()) else { continue };
            let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
            match openat2(&allowed, inside, way, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS) {
                Ok(folder) => return Ok((folder, name)),
                // It leads out of the folder.
                Err(Errno::XDEV | Errno::LOOP) => {}
                Err(error) => return Err(self.failed(parent, error.into())),
            }
        }
        Err(self.not_allowed(path))
    }

    fn not_allowed(&self, path: &Path) -> ImageError {
        ImageError::NotAllowed { host: self.host.into(), path: path.into(), folders: self.folders.into() }
    }

    fn failed(&self, path: &Path, source: io::Error) -> ImageError {
        ImageError::Io { host: self.host.into(), path: path.into(), source }
    }
}

/// This path, with more behind its name.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn a_file_takes_the_place_of_none_or_of_the_one_that_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let folders = [dir.path().to_owned()];
        let images = Images::new("beta", &folders);
        let at = |name: &str| dir.path().join(name);
        let read = |name: &str| std::fs::read_to_string(at(name)).unwrap();
        std::fs::write(at("part"), "new").unwrap();
        let (_, is_new) = images.open_or_make(&at("part")).unwrap();
        assert!(!is_new && images.open_or_make(&at("other")).unwrap().1);
        images.put_in_place(&at("part"), &at("image"), None).unwrap();
        assert!(!at("part").exists() && read("image") == "new");
        std::fs::write(at("part"), "newer").unwrap();
        let refused = images.put_in_place(&at("part"), &at("image"), None);
        assert!(matches!(refused, Err(ImageError::Exists { .. })) && read("image") == "new" && read("part") == "newer");
        let it = std::fs::metadata(at("image")).map(|it| (it.dev(), it.ino())).unwrap();
        let refused = images.put_in_place(&at("part"), &at("image"), Some((it.0, it.1 + 1)));
        assert!(matches!(refused, Err(ImageError::Exists { .. })) && read("image") == "new");
        images.put_in_place(&at("part"), &at("image"), Some(it)).unwrap();
        assert!(!at("part").exists() && read("image") == "newer");
        symlink(at("image"), at("link")).unwrap();
        assert!(images.open_or_make(&at("link")).is_err());
        std::fs::create_dir(at("sub")).unwrap();
        assert!(images.open_file(&at("sub")).is_err());
    }

    #[test]
    fn nothing_outside_of_the_folders_is_made_or_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("images"), dir.path().join("outside"));
        for folder in [&inside, &outside] {
            std::fs::create_dir(folder).unwrap();
        }
        std::fs::write(outside.join("secret"), "x").unwrap();
        symlink(outside.join("secret"), inside.join("link")).unwrap();
        symlink(&outside, inside.join("folder")).unwrap();
        symlink("../outside/secret", inside.join("relative")).unwrap();
        let folders = [inside.clone(), dir.path().join("absent")];
        let images = Images::new("beta", &folders);
        for bad in ["link", "folder/secret", "relative", "../outside/secret", "folder/new", ".."] {
            let path = inside.join(bad);
            assert!(matches!(images.open(&path), Err(ImageError::NotAllowed { .. })), "{bad}");
            assert!(images.make(&path).is_err(), "{bad}");
        }
        assert!(!outside.join("new").exists());
        for bad in ["/etc/passwd", "images/a", "", "/", "/proc/self/fd/0"] {
            let refused = images.open(Path::new(bad)).unwrap_err();
            assert!(matches!(refused, ImageError::NotAllowed { .. }), "{bad}: {refused}");
        }
        assert!(images.open(&dir.path().join("absent/a")).unwrap_err().to_string().contains("beta"));
        assert!(images.may_make(&inside.join("new")).unwrap() > 0);
        let made = images.make(&inside.join("new")).unwrap().metadata().unwrap();
        assert!(images.may_make(&inside.join("new")).is_err());
        let it = (made.dev(), made.ino());
        assert!(!images.remove(&inside.join("new"), (it.0, it.1 + 1)).unwrap(), "another file is not removed");
        assert!(images.remove(&inside.join("new"), it).unwrap());
        assert!(images.make(&inside.join("new")).is_ok());
        assert!(images.open(&inside.join("new")).is_ok());
        assert!(matches!(images.make(&inside.join("new")), Err(ImageError::Exists { .. })));
        assert!(matches!(images.make(&inside.join("link")), Err(ImageError::Exists { .. })), "a link is not followed");
        std::fs::create_dir(inside.join("sub")).unwrap();
        assert!(images.open(&inside.join("sub")).is_err());
        assert!(images.make(&inside.join("sub/new")).is_ok());
        rustix::fs::mknodat(
            rustix::fs::CWD,
            inside.join("pipe"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(matches!(images.open(&inside.join("pipe")), Err(ImageError::OfAnotherKind { .. })));
    }
}
