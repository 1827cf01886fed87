//! Packing and unpacking payloads, and what a user may ask for.

use std::io;

use zstd::bulk::{Compressor, Decompressor};

use crate::frame::Encoding;

/// What a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compression {
    /// Always this.
    Fixed(Method),
    /// Whatever makes the transfer the fastest, found out while it runs.
    #[default]
    Adaptive,
}

/// A way to pack a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// As it is.
    None,
    /// LZ4: fast.
    Lz4,
    /// zstd at this level, -3 (fast) to 3 (dense).
    Zstd(i8),
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// Packs payloads; keeps what the compressors need.
pub(crate) struct Packer {
    zstd: Option<(i8, Compressor<'static>)>,
    packed: Vec<u8>,
}

impl Packer {
    pub(crate) fn new() -> Self {
        Self { zstd: None, packed: Vec::new() }
    }

    /// The payload packed, if that makes it shorter.
    pub(crate) fn pack(&mut self, method: Method, raw: &[u8]) -> io::Result<Option<(Encoding, &[u8])>> {
        let (encoding, length) = match method {
            Method::None => return Ok(None),
            Method::Lz4 => {
                self.make_room(lz4_flex::block::get_maximum_output_size(raw.len()));
                let packed = lz4_flex::block::compress_into(raw, &mut self.packed).map_err(io::Error::other)?;
                (Encoding::Lz4, packed)
            }
            Method::Zstd(level) => {
                self.make_room(zstd::zstd_safe::compress_bound(raw.len()));
                let compressor = match &mut self.zstd {
                    Some((_, compressor)) => compressor,
                    none => &mut none.insert((level, Compressor::new(level.into())?)).1,
                };
                compressor.set_compression_level(level.into())?;
                (Encoding::Zstd, compressor.compress_to_buffer(raw, self.packed.as_mut_slice())?)
            }
        };
        Ok((length < raw.len()).then(|| (encoding, &self.packed[..length])))
    }

    fn make_room(&mut self, length: usize) {
        if self.packed.len() < length {
            self.packed.resize(length, 0);
        }
    }
}

/// Unpacks payloads.
pub(crate) struct Unpacker(Option<Decompressor<'static>>);

impl Unpacker {
    pub(crate) fn new() -> Self {
        Self(None)
    }

    /// Unpacks; whatever does not fill `raw` exactly is an error.
    pub(crate) fn unpack(&mut self, encoding: Encoding, packed: &[u8], raw: &mut [u8]) -> io::Result<()> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a payload cannot be unpacked");
        let length = match encoding {
            Encoding::Raw => return Err(damaged()),
            Encoding::Lz4 => lz4_flex::block::decompress_into(packed, raw).map_err(|_| damaged())?,
            Encoding::Zstd => {
                let decompressor = match &mut self.0 {
                    Some(decompressor) => decompressor,
                    none => none.insert(Decompressor::new()?),
                };
                decompressor.decompress_to_buffer(packed, raw).map_err(|_| damaged())?
            }
        };
        if length == raw.len() { Ok(()) } else { Err(damaged()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_packed_is_unpacked_to_the_same_and_nothing_else_fits() {
        let raw = b"a page of a guest looks like another page of a guest ".repeat(80);
        for method in [Method::Lz4, Method::Zstd(-3), Method::Zstd(1), Method::Zstd(3)] {
            let mut with = Packer::new();
            let (encoding, packed) = with.pack(method, &raw).unwrap().unwrap();
            let mut unpacked = vec![0; raw.len()];
            Unpacker::new().unpack(encoding, packed, &mut unpacked).unwrap();
            assert_eq!(unpacked, raw);
            for wrong in [raw.len() - 1, raw.len() + 1] {
                assert!(Unpacker::new().unpack(encoding, packed, &mut vec![0; wrong]).is_err(), "{method} {wrong}");
            }
        }
    }

    #[test]
    fn what_does_not_get_shorter_stays_as_it_is() {
        let raw: [u8; 4096] = crate::random_bytes();
        for method in [Method::None, Method::Lz4, Method::Zstd(3)] {
            assert!(Packer::new().pack(method, &raw).unwrap().is_none());
        }
    }

    proptest! {
        #[test]
        fn random_bytes_unpack_to_an_error_or_to_the_right_length(
            packed in proptest::collection::vec(any::<u8>(), 0..500), length in 0..4096_usize,
        ) {
            let mut raw = vec![0; length];
            let _ = Unpacker::new().unpack(Encoding::Lz4, &packed, &mut raw);
            let _ = Unpacker::new().unpack(Encoding::Zstd, &packed, &mut raw);
        }
    }
}
