//! Frames: a length, a header of six numbers, and a payload in XDR.

use bytes::{Buf, BytesMut};
use tokio_util::codec;

use crate::xdr::{Decoder, Encoder, Malformed};

/// The program of libvirt's own calls, and of its events.
pub const REMOTE: u32 = 0x2000_8086;
/// The program by which one side finds out whether the other is there.
pub const KEEPALIVE: u32 = 0x6b65_6570;
/// The version of both.
pub const VERSION: u32 = 1;
/// The largest frame, in bytes; libvirt's own bound is the same.
pub const LARGEST: usize = 32 << 20;

/// Length and header, in bytes.
const HEAD: usize = 28;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A call, of a client.
    Call,
    /// Its answer.
    Reply,
    /// An event, or a sign of life.
    Message,
    /// Data of a stream, or a call or an answer with descriptors: what we never use.
    Other(u32),
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::Call => 0,
            Self::Reply => 1,
            Self::Message => 2,
            Self::Other(number) => number,
        }
    }

    fn of(number: u32) -> Self {
        match number {
            0 => Self::Call,
            1 => Self::Reply,
            2 => Self::Message,
            other => Self::Other(other),
        }
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Whose procedures.
    pub program: u32,
    /// Which one.
    pub procedure: u32,
    /// What it is.
    pub kind: Kind,
    /// Of the call; an answer has the same.
    pub serial: u32,
    /// An answer is an error.
    pub is_error: bool,
    /// In XDR.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A call of libvirt's own.
    pub fn call(procedure: u32, serial: u32, payload: Vec<u8>) -> Self {
        Self { program: REMOTE, procedure, kind: Kind::Call, serial, is_error: false, payload }
    }

    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut head = Encoder::new();
        head.u32((HEAD + self.payload.len()) as u32).u32(self.program).u32(VERSION).u32(self.procedure);
        head.u32(self.kind.number()).u32(self.serial).u32(u32::from(self.is_error));
        let mut bytes = head.finish();
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The first frame of these bytes, which it is taken from; none while it is not all there.
    pub fn take(bytes: &mut BytesMut, largest: usize) -> Result<Option<Self>, BadFrame> {
        let Some(length) = bytes.first_chunk().map(|it| u32::from_be_bytes(*it) as usize) else { return Ok(None) };
        if !(HEAD..=largest).contains(&length) {
            return Err(BadFrame::Length(length));
        }
        if bytes.len() < length {
            bytes.reserve(length - bytes.len());
            return Ok(None);
        }
        let mut frame = bytes.split_to(length);
        frame.advance(4);
        let mut head = Decoder::new(&frame);
        let program = head.u32()?;
        let version = head.u32()?;
        if version != VERSION {
            return Err(BadFrame::Version { program, version });
        }
        let (procedure, kind, serial, status) = (head.u32()?, Kind::of(head.u32()?), head.u32()?, head.u32()?);
        frame.advance(HEAD - 4);
        Ok(Some(Self { program, procedure, kind, serial, is_error: status == 1, payload: frame.to_vec() }))
    }
}

/// What comes is no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// One of this length cannot be.
    #[error("a frame of {0} bytes is none of libvirt's")]
    Length(usize),
    /// Another version of the protocol.
    #[error("version {version} of the program {program:#x} is not known here")]
    Version {
        /// The program.
        program: u32,
        /// Its version.
        version: u32,
    },
    /// The header makes no sense.
    #[error("a frame cannot be read: {0}")]
    Malformed(#[from] Malformed),
}

/// Frames of at most so many bytes, for a socket.
#[derive(Clone, Copy, Debug)]
pub struct Frames {
    /// The largest.
    pub largest: usize,
}

impl codec::Decoder for Frames {
    type Item = Frame;
    type Error = std::io::Error;

    fn decode(&mut self, bytes: &mut BytesMut) -> std::io::Result<Option<Frame>> {
        Frame::take(bytes, self.largest).map_err(|bad| std::io::Error::new(std::io::ErrorKind::InvalidData, bad))
    }
}

impl codec::Encoder<Frame> for Frames {
    type Error = std::io::Error;

    fn encode(&mut self, frame: Frame, bytes: &mut BytesMut) -> std::io::Result<()> {
        bytes.extend_from_slice(&frame.encode());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_out_as_it_went_in_whatever_pieces_it_came_in() {
        let frames = [
            Frame::call(23, 7, vec![1, 2, 3, 4]),
            Frame { is_error: true, kind: Kind::Reply, ..Frame::call(1, 8, vec![]) },
        ];
        let sent = frames.each_ref().map(Frame::encode).concat();
        let (mut bytes, mut read) = (BytesMut::new(), Vec::new());
        for byte in sent {
            bytes.extend_from_slice(&[byte]);
            read.extend(Frame::take(&mut bytes, LARGEST).unwrap());
        }
        assert_eq!(read, frames);
    }

    #[test]
    fn a_frame_too_long_too_short_or_of_another_version_is_refused_before_it_is_there() {
        let mut long = BytesMut::from(&(LARGEST as u32 + 1).to_be_bytes()[..]);
        assert_eq!(Frame::take(&mut long, LARGEST), Err(BadFrame::Length(LARGEST + 1)));
        let mut short = BytesMut::from(&27_u32.to_be_bytes()[..]);
        assert_eq!(Frame::take(&mut short, LARGEST), Err(BadFrame::Length(27)));
        let mut other = Frame::call(1, 1, vec![]).encode();
        other[11] = 2;
        let mut other = BytesMut::from(&other[..]);
        assert_eq!(Frame::take(&mut other, LARGEST), Err(BadFrame::Version { program: REMOTE, version: 2 }));
    }
}
