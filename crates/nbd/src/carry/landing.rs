//! The end that has the disks.

use std::io;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vmferry_link::{Link, LinkDown};

use super::words::{Body, DO, DONE, Request, What, encode_answer};
use crate::backend::{Backend, Zeroing};
use crate::blocks::{BLOCK, GRAINS, Grains, has, runs};
use crate::known::Bases;

/// Nothing is lacking.
const NONE: Grains = [0; GRAINS];
const PUNCH: Zeroing = Zeroing { may_punch: true, fast: false };

/// What was written to a target goes to its disk when it is so much, so that a flush never has more to wait for.
const UNFLUSHED: u64 = 64 << 20;
/// Threads that do what arrives.
const WORKERS: usize = 4;
/// Why disks do not arrive any more.
#[derive(Debug, thiserror::Error)]
pub enum LandError {
    /// The link is down.
    #[error(transparent)]
    Link(#[from] LinkDown),
    /// Something arrived that is no request.
    #[error("the other agent sent what is no request about a disk")]
    NoRequest,
    /// No thread could be started.
    #[error("cannot start a thread for disks")]
    Thread(#[source] io::Error),
}

/// A disk that arrives.
pub struct Landing {
    /// What is written.
    pub disk: Box<dyn Backend>,
    /// What need not be sent for it.
    pub bases: Bases,
}

struct Target {
    /// None once it was let go of.
    disk: RwLock<Option<Box<dyn Backend>>>,
    bases: Bases,
    unflushed: AtomicU64,
}

impl Target {
    /// Tells what is lacking of what was offered. The buffer is one for a block.
    fn serve(&self, request: Request, body: &Body<'_>, buffer: &mut [u8]) -> io::Result<Grains> {
        if request.what == What::LetGo {
            let mut disk = self.disk.write().expect("no holder of this lock panics");
            // It is let go of when all of it is safe, and not otherwise.
            return disk.as_ref().map_or(Ok(()), |it| it.flush()).map(|()| {
                *disk = None;
                NONE
            });
        }
        let disk = self.disk.read().expect("no holder of this lock panics");
        let gone = || io::Error::new(io::ErrorKind::InvalidInput, "this disk was let go of");
        let disk = disk.as_deref().ok_or_else(gone)?;
        let Request { what, offset, length, .. } = request;
        if offset.checked_add(length).is_none_or(|end| end > disk.size()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "that is beyond the end of the disk"));
        }
        match body {
            Body::Offer(offered) => {
                let bytes = &mut buffer[..offered.length];
                let lacking = self.bases.fill(None, offset, offered, bytes);
                for (run, kind) in runs(bytes.len(), |grain| (has(&offered.full, grain), has(&lacking, grain))) {
                    let at = offset + run.start as u64;
                    match kind {
                        (_, true) => {}
                        (true, false) => self.write(disk, at, &bytes[run])?,
                        (false, false) => disk.write_zeroes(at, run.len() as u64, PUNCH)?,
                    }
                }
                return Ok(lacking);
            }
            Body::Rest(grains, packed) => {
                let mut packed = *packed;
                for (run, is_new) in runs(length as usize, |grain| has(grains, grain)) {
                    if is_new {
                        let (bytes, rest) = packed.split_at(run.len());
                        self.write(disk, offset + run.start as u64, bytes)?;
                        packed = rest;
                    }
                }
            }
            Body::Data(data) => match what {
                What::Write => self.write(disk, offset, data)?,
                What::Zero(how) => disk.write_zeroes(offset, length, how)?,
                What::Trim => disk.trim(offset, length)?,
                What::Flush => disk.flush()?,
                What::LetGo | What::Offer | What::Rest => unreachable!("these have other bodies, or were served"),
            },
        }
        Ok(NONE)
    }

    fn write(&self, disk: &dyn Backend, offset: u64, data: &[u8]) -> io::Result<()> {
        disk.write(offset, data)?;
        let length = data.len() as u64;
        if self.unflushed.fetch_add(length, Relaxed) + length >= UNFLUSHED {
            self.unflushed.store(0, Relaxed);
            disk.flush()?;
        }
        Ok(())
    }
}

/// Does to these disks what comes over the link, until that is closed or breaks. Disks that the other end has let go of are
/// dropped then, and the others when this returns.
pub fn land(link: &Link, disks: Vec<Landing>) -> Result<(), LandError> {
    let target =
        |Landing { disk, bases }| Target { disk: RwLock::new(Some(disk)), bases, unflushed: AtomicU64::new(0) };
    let targets: Vec<Target> = disks.into_iter().map(target).collect();
    let work = || -> Result<(), LandError> {
        let mut buffer = vec![0; BLOCK as usize];
        while let Some(frame) = link.recv()? {
            let request = Request::decode(&frame.payload).filter(|_| frame.kind == DO);
            let known =
                request.and_then(|(request, body)| Some((request, body, targets.get(usize::from(request.disk))?)));
            let Some((request, body, target)) = known else {
                link.give_up();
                return Err(LandError::NoRequest);
            };
            let result = target.serve(request, &body, &mut buffer);
            link.send_urgent(DONE, encode_answer(request.number, &result))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let start = |_| std::thread::Builder::new().name("disks-arrive".into()).spawn_scoped(scope, work);
        let threads: Vec<_> = (0..WORKERS).map(start).collect();
        let mut worst = Ok(());
        for thread in threads {
            let ended = match thread {
                Ok(thread) => thread.join().expect("no disk panics"),
                Err(error) => {
                    link.give_up();
                    Err(LandError::Thread(error))
                }
            };
            // That the link is down may only be what came of something else.
            if matches!(worst, Ok(()) | Err(LandError::Link(_))) && ended.is_err() {
                worst = ended;
            }
        }
        worst
    })?;
    // In order on this side, too, so that the other need not wait.
    Ok(link.close()?)
}
