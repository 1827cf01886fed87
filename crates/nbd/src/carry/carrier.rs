//! The end that has something to be done to disks.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};

use vmferry_link::{Link, LinkDown, LinkStats};

use super::words::{DO, DONE, Refused, Request, What, decode_answer};
use crate::backend::{Backend, Zeroing};
use crate::blocks::{GRAIN, Grains, count, gather, has, which};
use crate::known::{Offered, Pays};
use crate::transmission::Extent;

/// The most that one frame writes, in bytes.
const PIECE: usize = 1 << 20;
/// Less than this is written without asking whether it is there.
const LEAST_OFFERED: u64 = 64 << 10;
/// So many bytes together count as written once one of them was.
pub(super) const GRANULE: u64 = 64 << 10;
/// The near end of a link that carries disks.
pub struct Carrier {
    link: Arc<Link>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    /// Whoever waits, by the number of the request.
    answers: HashMap<u64, SyncSender<Result<Grains, Refused>>>,
    /// Nothing is answered any more.
    over: Option<Arc<str>>,
}

impl Carrier {
    /// Over this link, whose other end [`land`]s.
    pub fn begin(link: Link) -> io::Result<Arc<Self>> {
        let link = Arc::new(link);
        let carrier = Arc::new(Self { link: Arc::clone(&link), waiting: Mutex::default() });
        let weak = Arc::downgrade(&carrier);
        let listen = move || {
            let why = loop {
                let answer = match link.recv_urgent() {
                    Ok(Some(frame)) if frame.kind == DONE => decode_answer(&frame.payload),
                    Ok(Some(_)) => None,
                    Ok(None) => break "the other end has closed the link".into(),
                    Err(down) => break words_of(&down),
                };
                let (Some((number, result)), Some(carrier)) = (answer, weak.upgrade()) else {
                    break "the other end does not say what is expected".into();
                };
                // Whoever waited may have given up.
                if let Some(waits) = carrier.lock().answers.remove(&number) {
                    let _ = waits.send(result);
                }
            };
            if let Some(carrier) = weak.upgrade() {
                carrier.is_over(why);
            }
        };
        std::thread::Builder::new().name("disks-answers".into()).spawn(listen)?;
        Ok(carrier)
    }

    /// The disk that is the one of this number at the other end, of so many bytes; new, and all zero, or not.
    pub fn disk(self: &Arc<Self>, number: u16, size: u64, is_zero: bool) -> Carried {
        let granules = if is_zero { size.div_ceil(GRANULE) } else { 0 };
        let written = Mutex::new(vec![0; granules.div_ceil(64) as usize]);
        Carried {
            carrier: Arc::clone(self),
            disk: number,
            size,
            written: is_zero.then_some(written),
            sent: AtomicU64::new(0),
            pays: Pays::default(),
        }
    }

    /// Has the other end put on the disk what was written, and let go of it: nothing is done to it after this.
    pub fn let_go(&self, disk: u16) -> io::Result<()> {
        self.ask(disk, What::LetGo, 0, 0)
    }

    /// Nothing is sent any more, and whoever waits is told so.
    pub fn give_up(&self) {
        self.link.give_up();
        self.is_over("it was given up".into());
    }

    /// Ends the link in order.
    pub fn close(&self) -> Result<(), LinkDown> {
        self.link.close()
    }

    /// Caps what it sends, in bytes a second.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.link.set_rate(rate);
    }

    /// What the link did until now.
    pub fn stats(&self) -> LinkStats {
        self.link.stats()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no holder of this lock panics")
    }

    fn is_over(&self, why: String) {
        let mut waiting = self.lock();
        waiting.over.get_or_insert_with(|| why.into());
        waiting.answers.clear();
    }

    /// Sends this; whoever waits for the answer is given it.
    fn send(&self, disk: u16, what: What, offset: u64, length: u64, data: &[u8]) -> io::Result<Asked<'_>> {
        let (answers, answer) = sync_channel(1);
        let number = {
            let mut waiting = self.lock();
            if let Some(why) = &waiting.over {
                return Err(is_down(why));
            }
            waiting.next += 1;
            let number = waiting.next;
            waiting.answers.insert(number, answers);
            number
        };
        let request = Request { disk, number, what, offset, length };
        if let Err(down) = self.link.send(DO, request.encode(data)) {
            self.is_over(words_of(&down));
        }
        Ok(Asked { carrier: self, answer })
    }

    fn ask(&self, disk: u16, what: What, offset: u64, length: u64) -> io::Result<()> {
        self.send(disk, what, offset, length, &[])?.answer().map(drop)
    }
}

/// Something that the other end was asked.
struct Asked<'a> {
    carrier: &'a Carrier,
    answer: Receiver<Result<Grains, Refused>>,
}

impl Asked<'_> {
    /// Waits for it: what is lacking there.
    fn answer(self) -> io::Result<Grains> {
        match self.answer.recv() {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(is_down(self.carrier.lock().over.as_deref().unwrap_or("nobody answers"))),
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.link.give_up();
    }
}

fn words_of(down: &LinkDown) -> String {
    let mut words = down.to_string();
    let mut source = std::error::Error::source(down);
    while let Some(cause) = source {
        words.extend([": ", &cause.to_string()]);
        source = cause.source();
    }
    words
}

fn is_down(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, format!("the other host is not reached: {why}"))
}

/// A disk at the other end of a link. It can be written, and not read.
pub struct Carried {
    carrier: Arc<Carrier>,
    disk: u16,
    size: u64,
    /// What is not zero any more, a bit a granule; of a target that was not new nothing is known.
    written: Option<Mutex<Vec<u64>>>,
    sent: AtomicU64,
    pays: Pays,
}

impl Carried {
    /// Bytes that were sent because they were written to it.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    fn send(&self, what: What, offset: u64, length: usize, data: &[u8]) -> io::Result<Asked<'_>> {
        self.carrier.send(self.disk, what, offset, length as u64, data)
    }

    /// Whether it is asked first what of this is there: not for little, and not while nothing came of it.
    fn is_to_be_offered(&self, offset: u64, piece: &[u8]) -> bool {
        let fits = offset.is_multiple_of(GRAIN as u64) && piece.len() as u64 >= LEAST_OFFERED;
        fits && self.pays.offer(piece.len().div_ceil(GRAIN) as u64)
    }

    fn is_written(&self, bytes: Range<u64>) {
        let Some(written) = &self.written else { return };
        let mut written = written.lock().expect("no holder of this lock panics");
        for granule in bytes.start / GRANULE..bytes.end.div_ceil(GRANULE) {
            written[granule as usize / 64] |= 1 << (granule % 64);
        }
    }

    /// Of these bytes, the first that all are written or all are not, and whether they are.
    fn first_of_a_kind(&self, bytes: &Range<u64>) -> (bool, Range<u64>) {
        let Some(written) = &self.written else { return (true, bytes.clone()) };
        let written = written.lock().expect("no holder of this lock panics");
        let is_written = |granule: u64| written[granule as usize / 64] >> (granule % 64) & 1 != 0;
        let first = bytes.start / GRANULE;
        let kind = is_written(first);
        let other = (first + 1..bytes.end.div_ceil(GRANULE)).find(|granule| is_written(*granule) != kind);
        (kind, bytes.start..other.map_or(bytes.end, |granule| granule * GRANULE))
    }

    /// Does this to what was written of these bytes: the rest is zero.
    fn to_written(&self, offset: u64, length: u64, what: What) -> io::Result<()> {
        let mut left = offset..offset + length;
        while !left.is_empty() {
            let (written, part) = self.first_of_a_kind(&left);
            left.start = part.end;
            if written {
                self.carrier.ask(self.disk, what, part.start, part.end - part.start)?;
            }
        }
        Ok(())
    }
}

impl Backend for Carried {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a disk that is on its way elsewhere is not read from there"))
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.is_written(offset..offset + bytes.len() as u64);
        let (mut offers, mut writes, mut at) = (Vec::new(), Vec::new(), offset);
        for piece in bytes.chunks(PIECE) {
            if self.is_to_be_offered(at, piece) {
                let offered = Offered::of(piece);
                let mut words = Vec::new();
                offered.write(&mut words);
                offers.push((at, piece, offered.full, self.send(What::Offer, at, piece.len(), &words)?));
            } else {
                self.sent.fetch_add(piece.len() as u64, Relaxed);
                writes.push(self.send(What::Write, at, piece.len(), piece)?);
            }
            at += piece.len() as u64;
        }
        for (at, piece, full, offer) in offers {
            let lacking = offer.answer()?;
            if which(&lacking).any(|number| !has(&full, number)) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the other end lacks what it was not offered"));
            }
            let (all, some) = (count(&full) as u64, count(&lacking) as u64);
            self.pays.came_of_it(all, all - some);
            if some > 0 {
                let packed = gather(piece, &lacking);
                self.sent.fetch_add(packed.len() as u64, Relaxed);
                writes.push(self.send(What::Rest, at, piece.len(), &[&lacking[..], &packed].concat())?);
            }
        }
        // All are waited for, also when one has failed: whoever has been told of the end may write there again.
        let answers: Vec<_> = writes.into_iter().map(Asked::answer).collect();
        answers.into_iter().try_for_each(|answer| answer.map(drop))
    }

    fn write_zeroes(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        self.to_written(offset, length, What::Zero(how))
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.to_written(offset, length, What::Trim)
    }

    fn flush(&self) -> io::Result<()> {
        self.carrier.ask(self.disk, What::Flush, 0, 0)
    }

    fn status(&self, offset: u64, length: u64, most: usize) -> io::Result<Vec<Extent>> {
        let (mut extents, mut left) = (Vec::new(), offset..offset + length);
        while !left.is_empty() && extents.len() < most {
            let (written, part) = self.first_of_a_kind(&left);
            left.start = part.end;
            let length = part.end - part.start;
            extents.push(if written { Extent::data(length) } else { Extent::hole(length) });
        }
        Ok(extents)
    }
}
