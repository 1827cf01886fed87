//! A disk that is written and read back all the time: memory that the hypervisor writes, not this guest's processors.
//!
//! What is read from the disk is put into memory by the hypervisor's threads, and so is the note that a request is done.
//! A migration that misses either shows here: as content that is old, or as a disk that does nothing any more. Requests
//! are kept in flight all the time, so that the guest is never paused between them. What was read is looked at when it is
//! there, and again when its place is needed, which may be on another host.
//!
//! The guest's kernel has no driver for virtio (it would be a module), so there is one here, for virtio's old interface
//! by I/O ports, with one queue that is polled. See "Virtual I/O Device (VIRTIO)", sections on split virtqueues, the block
//! device and legacy interfaces.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::thread;

use crate::console::Console;
use crate::kernel::{self, IoPorts, PinnedMemory};
use crate::pages::mix;

/// What is written and read at once, in bytes.
const BLOCK: u64 = 32 << 10;
const BLOCK_WORDS: usize = (BLOCK / 8) as usize;
const SECTOR: u64 = 512;
/// Requests in flight.
const SLOTS: u64 = 8;
/// Blocks that were read are kept, so many of them.
const KEPT: u64 = 52;
/// So many requests are reported together.
const REPORT: u64 = 500;

// Registers, by their offset, and what is said through them.
const DRIVER_FEATURES: u16 = 4;
const QUEUE_ADDRESS: u16 = 8;
const QUEUE_SIZE: u16 = 12;
const QUEUE_SELECT: u16 = 14;
const QUEUE_NOTIFY: u16 = 16;
const STATUS: u16 = 18;
const REGISTERS: u16 = 20;
/// The driver is there, knows the device, and is ready.
const READY: u8 = 1 | 2 | 4;
/// Writes need not be on the disk when they are done.
const HAS_FLUSH: u32 = 1 << 9;

// What a request is made of.
const IN: u64 = 0;
const OUT: u64 = 1;
const NEXT: u64 = 1 << 32;
const DEVICE_WRITES: u64 = 2 << 32;
const PENDING: u64 = 0xFF;

/// Where in the memory the requests' heads are, and the blocks.
const HEADS: u64 = 0x1_0000;
const BLOCKS: u64 = 0x2_0000;
const PAGE: u64 = 4096;

/// See the module's text.
pub(crate) struct Disk {
    /// What the kernel tells of the device.
    device: PathBuf,
    /// How many blocks of it are used.
    blocks: u64,
}

impl Disk {
    /// The guest's virtio disk, of which so many bytes are used.
    pub(crate) fn find(bytes: u64) -> Result<Self, String> {
        let devices = fs::read_dir("/sys/bus/pci/devices").map_err(|error| format!("there is no PCI bus: {error}"))?;
        let is = |device: &Path, file: &str, id: &str| {
            fs::read_to_string(device.join(file)).is_ok_and(|text| text.trim() == id)
        };
        let mut devices = devices.filter_map(|device| Some(device.ok()?.path()));
        let device = devices.find(|device| is(device, "vendor", "0x1af4") && is(device, "device", "0x1001"));
        let blocks = (bytes / BLOCK).max(SLOTS);
        Ok(Self { device: device.ok_or("there is no virtio disk of the old interface")?, blocks })
    }

    /// Writes and reads in a thread of its own, for ever.
    pub(crate) fn start(self, console: Arc<Console>) {
        thread::spawn(move || {
            let error = match self.connect() {
                Ok(mut queue) => queue.run(self.blocks, &console),
                Err(error) => format!("the disk cannot be used: {error}"),
            };
            console.say(&format!(r#"{{"error":"{error}"}}"#));
        });
    }

    fn connect(&self) -> io::Result<Queue> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        // `0x000000000000c000 0x000000000000c07f 0x0000000000040101` for the first range of addresses.
        let resource = fs::read_to_string(self.device.join("resource"))?;
        let first = resource.split_whitespace().next().and_then(|word| word.strip_prefix("0x"));
        let first = first.and_then(|hex| u16::from_str_radix(hex, 16).ok()).ok_or_else(invalid)?;
        // It may use its ports, and memory by itself.
        let config = OpenOptions::new().read(true).write(true).open(self.device.join("config"))?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, 4)?;
        command[0] |= 1 | 4;
        config.write_all_at(&command, 4)?;

        let (ports, memory) = (IoPorts::allow(first, REGISTERS)?, PinnedMemory::allocate()?);
        ports.write_u8(STATUS, 0);
        ports.write_u8(STATUS, READY & !4);
        ports.write_u32(DRIVER_FEATURES, HAS_FLUSH);
        ports.write_u16(QUEUE_SELECT, 0);
        let size = u64::from(ports.read_u16(QUEUE_SIZE));
        if !(3 * SLOTS..=1024).contains(&size) {
            return Err(invalid());
        }
        let page = u32::try_from(memory.physical / PAGE).map_err(|_| invalid())?;
        ports.write_u32(QUEUE_ADDRESS, page);
        ports.write_u8(STATUS, READY);
        let used = (16 * size + 6 + 2 * size).next_multiple_of(PAGE);
        Ok(Queue { ports, memory, size, used, offered: 0, taken: 0 })
    }
}

/// The queue of requests: descriptors, then what is offered to the device, then what it has done.
struct Queue {
    ports: IoPorts,
    memory: PinnedMemory,
    size: u64,
    /// Where what it has done begins, in bytes.
    used: u64,
    offered: u16,
    taken: u16,
}

/// A block of the disk that is being written or read.
struct Slot {
    content: Content,
    writes: bool,
    /// Where it is read into.
    place: u64,
}

/// What a block of the disk holds.
#[derive(Clone, Copy)]
struct Content {
    block: u64,
    sequence: u64,
}

impl Queue {
    /// Comes back with what went wrong.
    fn run(&mut self, blocks: u64, console: &Console) -> String {
        let first = |block| Slot { content: Content { block, sequence: 1 }, writes: true, place: 0 };
        let mut slots: Vec<Slot> = (0..SLOTS).map(first).collect();
        let mut kept = [None::<Content>; KEPT as usize];
        for (index, slot) in (0..).zip(&slots) {
            self.submit(index, slot);
        }
        let (mut checked, mut place) = (0, 0);
        loop {
            let Some(index) = self.take_done() else {
                kernel::sleep_until(kernel::monotonic_ns() + 500_000);
                continue;
            };
            let Some(slot) = slots.get_mut(index as usize) else { return "the disk did what nobody asked for".into() };
            let status = self.word(HEADS + index * 64 + 16).load(Ordering::Acquire) & 0xFF;
            if status != 0 {
                return format!("the disk failed with status {status}");
            }
            if slot.writes {
                // What is written is read next, into the place that was left alone for longest.
                loop {
                    place = (place + 1) % KEPT;
                    if !slots.iter().any(|slot| !slot.writes && slot.place == place) {
                        break;
                    }
                }
                if let Some(content) = kept[place as usize].take() {
                    self.check(place, content, "kept", console);
                }
                slots[index as usize].place = place;
            } else {
                self.check(slot.place, slot.content, "read", console);
                kept[slot.place as usize] = Some(slot.content);
                checked += 1;
                if checked % REPORT == 0 {
                    console.say(&format!(r#"{{"disk":{checked}}}"#));
                }
                slot.content.block = (slot.content.block + SLOTS) % (blocks - blocks % SLOTS);
                slot.content.sequence += 1;
            }
            let slot = &mut slots[index as usize];
            slot.writes = !slot.writes;
            self.submit(index, &slots[index as usize]);
        }
    }

    fn check(&self, place: u64, content: Content, how: &str, console: &Console) {
        let words = &self.memory.words[(read_into(place) / 8) as usize..][..BLOCK_WORDS];
        let wrong = (0..).zip(words).find(|(at, word)| word.load(Ordering::Relaxed) != content.word(*at));
        if let Some((at, _)) = wrong {
            let Content { block, sequence } = content;
            console.say(&format!("CORRUPT disk block={block} sequence={sequence} word={at} {how}"));
        }
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        &self.memory.words[(offset / 8) as usize]
    }

    fn submit(&mut self, index: u64, slot: &Slot) {
        let data = if slot.writes { written_from(index) } else { read_into(slot.place) };
        if slot.writes {
            let words = &self.memory.words[(data / 8) as usize..][..BLOCK_WORDS];
            (0..).zip(words).for_each(|(at, word)| word.store(slot.content.word(at), Ordering::Relaxed));
        }
        let head = HEADS + index * 64;
        self.word(head).store(if slot.writes { OUT } else { IN }, Ordering::Relaxed);
        self.word(head + 8).store(slot.content.block * (BLOCK / SECTOR), Ordering::Relaxed);
        self.word(head + 16).store(PENDING, Ordering::Relaxed);
        let parts = [
            (head, 16, NEXT),
            (data, BLOCK, NEXT | if slot.writes { 0 } else { DEVICE_WRITES }),
            (head + 16, 1, DEVICE_WRITES),
        ];
        for ((at, length, flags), descriptor) in parts.into_iter().zip(3 * index..) {
            self.word(16 * descriptor).store(self.memory.physical + at, Ordering::Relaxed);
            self.word(16 * descriptor + 8).store(length | flags | (descriptor + 1) << 48, Ordering::Relaxed);
        }
        self.offer(3 * index);
        self.ports.write_u16(QUEUE_NOTIFY, 0);
    }

    /// The device may take the request that begins with this descriptor.
    fn offer(&mut self, descriptor: u64) {
        // Two bytes each: flags, of which the first says not to interrupt, how many were offered, and then which.
        let place = 16 * self.size + 4 + 2 * (u64::from(self.offered) % self.size);
        self.put_u16(place, descriptor as u16);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.put_u16(16 * self.size, 1);
        self.put_u16(16 * self.size + 2, self.offered);
        fence(Ordering::SeqCst);
    }

    /// Only where nobody else writes.
    fn put_u16(&self, offset: u64, value: u16) {
        let (word, shift) = (self.word(offset), offset % 8 * 8);
        let others = word.load(Ordering::Relaxed) & !(0xFFFF << shift);
        word.store(others | u64::from(value) << shift, Ordering::Release);
    }

    /// The slot of a request that the device has done.
    fn take_done(&mut self) -> Option<u64> {
        let done = (self.word(self.used).load(Ordering::Acquire) >> 16) as u16;
        if done == self.taken {
            return None;
        }
        // Eight bytes each, after four: which descriptor it began with, and how much was written.
        let place = u64::from(self.taken) % self.size;
        self.taken = self.taken.wrapping_add(1);
        Some((self.word(self.used + 8 * place).load(Ordering::Acquire) >> 32) / 3)
    }
}

/// Each slot has a block to write from.
fn written_from(index: u64) -> u64 {
    BLOCKS + index * BLOCK
}

fn read_into(place: u64) -> u64 {
    BLOCKS + (SLOTS + place) * BLOCK
}

impl Content {
    /// Different in each word, block and turn.
    fn word(self, word: u64) -> u64 {
        mix(self.block << 40 ^ self.sequence << 16 ^ word)
    }
}
