//! The thread that reads a connection: it checks what arrives and puts it where users take it.

use std::io::Read;
use std::time::Duration;

use super::LinkDown;
use super::state::{Shared, URGENT};
use super::stream::StreamError;
use crate::channel::ReadHalf;
use crate::compress::Unpacker;
use crate::frame::{Encoding, HEADER, Header, Type};
use crate::thread_cpu;
use crate::tuning::SILENCE;

/// The reading side of a connection.
pub(super) struct Reading<'a> {
    shared: &'a Shared,
    index: usize,
    reader: ReadHalf,
    protected: bool,
    unpacker: Unpacker,
    cpu: Duration,
}

impl<'a> Reading<'a> {
    pub(super) fn new(shared: &'a Shared, index: usize, mut reader: ReadHalf, protected: bool) -> Self {
        reader.set_longest_silence(SILENCE);
        Self { shared, index, reader, protected, unpacker: Unpacker::new(), cpu: thread_cpu() }
    }

    pub(super) fn run(&mut self) -> Result<(), StreamError> {
        loop {
            let header = Header::read(&mut self.reader)?;
            match header.frame {
                Type::Data => self.data(&header)?,
                Type::End => {
                    self.expect(&header)?;
                    self.shared.end_arrived(self.index);
                }
                Type::Abort => self.shared.fail(LinkDown::PeerGaveUp),
                Type::Ack | Type::Ping | Type::Pong => self.control(&header)?,
            }
        }
    }

    fn expect(&self, header: &Header) -> Result<(), StreamError> {
        let state = self.shared.lock();
        let stream = &state.streams[self.index];
        if stream.ended {
            return Err(StreamError::AfterEnd);
        }
        Ok(stream.incoming.expects(header.sequence, header.raw_length as usize)?)
    }

    fn data(&mut self, header: &Header) -> Result<(), StreamError> {
        self.expect(header)?;
        let pool = &self.shared.pool;
        let mut payload = pool.take(header.length as usize);
        self.reader.read_exact(payload.as_mut())?;
        if !self.protected {
            header.check_payload(payload.as_ref())?;
        }
        if header.encoding != Encoding::Raw {
            let mut raw = pool.take(header.raw_length as usize);
            self.unpacker.unpack(header.encoding, payload.as_ref(), raw.as_mut())?;
            payload = raw;
        }
        self.count_cpu();
        let wire = u64::from(header.length) + HEADER as u64;
        self.shared.arrived(self.index, header.kind, payload.freeze(), wire);
        Ok(())
    }

    fn control(&mut self, header: &Header) -> Result<(), StreamError> {
        let mut state = self.shared.lock();
        let stream = &mut state.streams[self.index];
        match header.frame {
            Type::Ack => {
                stream.outgoing.on_ack(header.sequence)?;
                self.shared.progress.notify_all();
            }
            Type::Ping => {
                stream.pong = Some(header.sequence);
                self.shared.work[self.index].notify_one();
            }
            _ => {
                if let Some((number, sent)) = stream.ping
                    && number == header.sequence
                {
                    let took = sent.elapsed();
                    (stream.ping, stream.round_trip) = (None, Some(took));
                    if self.index == URGENT {
                        state.steer(self.shared.now(), took);
                    }
                }
            }
        }
        Ok(())
    }

    fn count_cpu(&mut self) {
        let now = thread_cpu();
        self.shared.lock().streams[self.index].counters.cpu += now.saturating_sub(self.cpu);
        self.cpu = now;
    }
}
