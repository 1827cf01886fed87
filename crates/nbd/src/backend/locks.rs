//! The locks by which QEMUs keep out of each other's images, and we out of theirs.
//!
//! QEMU locks single bytes of an image (block/file-posix.c): from 100 on one for each thing that it does with it, from
//! 200 on one for each that nobody else may do meanwhile. It only ever takes shared locks, and asks whether it could
//! have an exclusive one on the other's byte to see who is there. The locks belong to the open file (OFD), so that
//! closing another descriptor of the same image does not lose them.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Bytes that say what somebody does.
const DOES: i64 = 100;
/// Bytes that say what nobody else may do.
const FORBIDS: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
/// What QEMU tells apart.
const ALL: [(i64, &str); 4] = [(READ, "reads"), (WRITE, "writes"), (2, "rewrites"), (RESIZE, "resizes")];

/// Somebody else uses the image in a way that does not go together with ours.
#[derive(Debug, thiserror::Error)]
pub enum Taken {
    /// Somebody does what would spoil ours.
    #[error("another process {0} it: shut down the guest or tool that has it open")]
    InUse(&'static str),
    /// Somebody forbids what we want to do.
    #[error("another process forbids that anybody else {0} it: shut down the guest or tool that has it open")]
    Forbidden(&'static str),
    /// The kernel or the file system has no such locks.
    #[error("it cannot be locked")]
    Kernel(#[from] nix::Error),
}

/// Says to QEMUs what we do with an image, and makes sure that none minds. The locks last as long as the open file.
pub(crate) fn take(file: impl AsFd, writes: bool) -> Result<(), Taken> {
    let file = file.as_fd();
    let does: &[i64] = if writes { &[READ, WRITE] } else { &[READ] };
    let forbids = [WRITE, RESIZE];
    let each = does.iter().map(|it| DOES + it).chain(forbids.iter().map(|it| FORBIDS + it));
    for byte in each {
        fcntl(file, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte)))?;
    }
    let held = |byte| held(file, byte);
    let told = || -> Result<(), Taken> {
        for (it, what) in ALL {
            if forbids.contains(&it) && held(DOES + it)? {
                return Err(Taken::InUse(what));
            }
            if does.contains(&it) && held(FORBIDS + it)? {
                return Err(Taken::Forbidden(what));
            }
        }
        Ok(())
    };
    told().inspect_err(|_| {
        let _: Result<_, Errno> = fcntl(file, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK)));
    })
}

/// Somebody else says that he writes to it.
pub(crate) fn is_written(file: impl AsFd) -> nix::Result<bool> {
    held(file.as_fd(), DOES + WRITE)
}

/// Somebody else has this byte.
fn held(file: BorrowedFd<'_>, byte: i64) -> nix::Result<bool> {
    let mut asked = lock(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked))?;
    Ok(i32::from(asked.l_type) != libc::F_UNLCK)
}

fn lock(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock { l_len: 1, l_start: byte, ..whole(kind) }
}

fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use super::*;

    #[test]
    fn readers_share_an_image_and_a_writer_has_it_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
        let held = |writes: bool| -> Result<File, Taken> {
            let file = open();
            take(&file, writes).map(|()| file)
        };
        let readers = (held(false).unwrap(), held(false).unwrap());
        assert!(matches!(held(true), Err(Taken::Forbidden("writes"))), "a writer beside readers");
        drop(readers);
        assert!(!is_written(open()).unwrap());
        let writer = held(true).unwrap();
        assert!(is_written(open()).unwrap());
        assert!(matches!(held(false), Err(Taken::InUse("writes"))), "a reader beside a writer");
        assert!(held(true).is_err(), "two writers");
        drop(writer);
        held(true).unwrap();
    }
}
