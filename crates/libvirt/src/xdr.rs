//! XDR (RFC 4506), as far as libvirt's protocol uses it: everything is a multiple of four bytes, big-endian.

use uuid::Uuid;

/// The longest string, in bytes; libvirt's own bound is the same.
pub const LONGEST_STRING: usize = 4 << 20;

/// Bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// They end too soon.
    #[error("it ends too soon")]
    TooShort,
    /// More than may be.
    #[error("it has a list, or a text, of {0} parts")]
    TooMany(usize),
    /// A text is not UTF-8, or has a NUL in it.
    #[error("a text is not UTF-8, or has a NUL in it")]
    NotText,
    /// A value that has no meaning.
    #[error("a {what} is {value}")]
    Unknown {
        /// Of what.
        what: &'static str,
        /// The value.
        value: u32,
    },
}

/// Puts values together.
#[derive(Clone, Debug, Default)]
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// All of it.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }

    /// An unsigned integer, or a boolean, or the tag of a union.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// An integer.
    pub fn i32(&mut self, value: i32) -> &mut Self {
        self.u32(value.cast_unsigned())
    }

    /// An unsigned hyper.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// Opaque bytes of a length that both sides know.
    pub fn fixed(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Opaque bytes with their length.
    pub fn opaque(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32).fixed(bytes)
    }

    /// A text.
    pub fn string(&mut self, text: &str) -> &mut Self {
        self.opaque(text.as_bytes())
    }

    /// A text that may be missing.
    pub fn optional_string(&mut self, text: Option<&str>) -> &mut Self {
        match text {
            Some(text) => self.u32(1).string(text),
            None => self.u32(0),
        }
    }
}

/// Takes values apart.
#[derive(Clone, Debug)]
pub struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    /// Of these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What was not taken yet, in bytes.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed::TooShort)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed::TooShort)?;
        self.0 = rest;
        Ok(*taken)
    }

    /// An unsigned integer.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    /// An integer.
    pub fn i32(&mut self) -> Result<i32, Malformed> {
        self.array().map(i32::from_be_bytes)
    }

    /// An unsigned hyper.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// A boolean. libvirt takes anything that is not zero for true where it says `int`; in a pointer it is 0 or 1.
    pub fn bool(&mut self) -> Result<bool, Malformed> {
        Ok(self.u32()? != 0)
    }

    /// Opaque bytes of a length that both sides know.
    pub fn fixed(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let bytes = self.take(length)?;
        self.take(length.next_multiple_of(4) - length)?;
        Ok(bytes)
    }

    /// Opaque bytes with their length.
    pub fn opaque(&mut self, most: usize) -> Result<&'a [u8], Malformed> {
        let length = self.u32()? as usize;
        if length > most {
            return Err(Malformed::TooMany(length));
        }
        self.fixed(length)
    }

    /// A text, without NUL, at which it would end for C.
    pub fn string(&mut self) -> Result<&'a str, Malformed> {
        let text = std::str::from_utf8(self.opaque(LONGEST_STRING)?).map_err(|_| Malformed::NotText)?;
        if text.contains('\0') { Err(Malformed::NotText) } else { Ok(text) }
    }

    /// Something that may be missing.
    pub fn optional<T>(
        &mut self,
        take: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        match self.u32()? {
            0 => Ok(None),
            1 => take(self).map(Some),
            value => Err(Malformed::Unknown { what: "pointer", value }),
        }
    }

    /// A list of at most so many.
    pub fn list<T>(
        &mut self,
        most: usize,
        mut take: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        let count = self.u32()? as usize;
        // Each takes four bytes at least: nobody makes us reserve more than was sent.
        if count > most || count > self.left() / 4 {
            return Err(Malformed::TooMany(count));
        }
        (0..count).map(|_| take(self)).collect()
    }

    /// A UUID.
    pub fn uuid(&mut self) -> Result<Uuid, Malformed> {
        self.array().map(Uuid::from_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_out_as_they_were_put_in() {
        let mut made = Encoder::new();
        made.i32(-2).u64(1 << 40).string("web1").optional_string(None).optional_string(Some("")).opaque(&[1, 2, 3]);
        let made = made.finish();
        assert_eq!(made.len() % 4, 0);
        let mut read = Decoder::new(&made);
        assert_eq!(read.i32(), Ok(-2));
        assert_eq!(read.u64(), Ok(1 << 40));
        assert_eq!(read.string(), Ok("web1"));
        assert_eq!(read.optional(Decoder::string), Ok(None));
        assert_eq!(read.optional(Decoder::string), Ok(Some("")));
        assert_eq!(read.opaque(3), Ok(&[1, 2, 3][..]));
        assert_eq!((read.left(), read.u32()), (0, Err(Malformed::TooShort)));
    }

    #[test]
    fn a_length_that_is_not_there_reserves_nothing() {
        let huge = u32::MAX.to_be_bytes();
        let count = u32::MAX as usize;
        assert_eq!(Decoder::new(&huge).list(usize::MAX, Decoder::u32), Err(Malformed::TooMany(count)));
        assert_eq!(Decoder::new(&huge).string(), Err(Malformed::TooMany(count)));
        assert_eq!(Decoder::new(&[0, 0, 0, 9, b'a']).string(), Err(Malformed::TooShort));
        assert_eq!(
            Decoder::new(&[0, 0, 0, 2]).optional(Decoder::u32),
            Err(Malformed::Unknown { what: "pointer", value: 2 })
        );
    }
}
