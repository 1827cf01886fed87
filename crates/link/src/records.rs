//! The records of TLS 1.3 (RFC 8446, section 5), sealed from where bytes lie and opened to where they are wanted.
//!
//! rustls makes the handshake and hands over the keys, as it would to a kernel that does TLS. What it would do with
//! bulk data copies each byte twice before it is sent and three times after it arrived, which costs about as much as
//! the cipher. Here the cipher's pass is the copy. On the wire nothing differs, and either side may do without.
//!
//! Keys are not updated: one that has protected as much as it may (section 5.5) ends its connection, and the stream
//! makes another.

use std::io::{self, ErrorKind, IoSlice};
use std::ops::Range;

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use crate::link::buffers::LINE;

/// The most that a record carries.
const MOST: usize = 16 << 10;
/// What precedes a record: type, version, length.
const HEADER: usize = 5;
const TAG: usize = 16;
/// How much longer a record may be than what it carries.
const MOST_OVERHEAD: usize = 256;
/// The bytes of a record that are authenticated and not secret, but for its length.
const VERSION: [u8; 2] = [3, 3];
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
/// How many records are made at once, and how many may be read at once.
const AT_ONCE: usize = 16;
/// AES-GCM may protect 2^24.5 full records with one key.
const MOST_BY_AES: u64 = 1 << 24;

/// One direction's key, and how often it was used.
struct Key {
    aead: LessSafeKey,
    iv: [u8; NONCE_LEN],
    used: u64,
    most: u64,
}

impl Key {
    fn new((used, secrets): (u64, ConnectionTrafficSecrets)) -> io::Result<Self> {
        type Parts<'a> = (&'static Algorithm, &'a [u8], &'a [u8], u64);
        let (algorithm, key, iv, most): Parts<'_> = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key.as_ref(), iv.as_ref(), MOST_BY_AES),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key.as_ref(), iv.as_ref(), MOST_BY_AES),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (&CHACHA20_POLY1305, key.as_ref(), iv.as_ref(), u64::MAX)
            }
            _ => return Err(io::Error::new(ErrorKind::Unsupported, "TLS chose a cipher that is not known here")),
        };
        let unfit = || io::Error::new(ErrorKind::InvalidData, "TLS gave a key that does not fit its cipher");
        let key = UnboundKey::new(algorithm, key).map_err(|_| unfit())?;
        let iv = iv.try_into().map_err(|_| unfit())?;
        Ok(Self { aead: LessSafeKey::new(key), iv, used, most })
    }

    /// The number of the next record, mixed into the key's own.
    fn nonce(&mut self) -> io::Result<Nonce> {
        if self.used >= self.most {
            return Err(io::Error::other("the key of this connection has protected as much as it may"));
        }
        let mut nonce = self.iv;
        for (byte, number) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.used.to_be_bytes()) {
            *byte ^= number;
        }
        self.used += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Both directions of a connection whose handshake is over, with nothing on its way to or from rustls.
pub(crate) fn records(secrets: ExtractedSecrets) -> io::Result<(Sealer, Opener)> {
    Ok((Sealer::new(Key::new(secrets.tx)?), Opener::new(Key::new(secrets.rx)?)))
}

/// Makes records.
pub(crate) struct Sealer {
    key: Key,
    sealed: Vec<u8>,
    /// What of them has not been sent.
    unsent: Range<usize>,
    /// For records of several small pieces.
    gathered: Vec<u8>,
}

impl Sealer {
    fn new(key: Key) -> Self {
        let sealed = vec![0; AT_ONCE * (HEADER + MOST + 1 + TAG)];
        Self { key, sealed, unsent: 0..0, gathered: Vec::with_capacity(MOST) }
    }

    /// What is to be sent.
    pub(crate) fn unsent(&self) -> &[u8] {
        &self.sealed[self.unsent.clone()]
    }

    /// So much of it was.
    pub(crate) fn sent(&mut self, length: usize) {
        self.unsent.start += length;
    }

    /// Seals as much as fits; all that was sealed before must have been sent. Gives back how much that is.
    pub(crate) fn seal(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        assert!(self.unsent.is_empty(), "a record must not be lost");
        self.unsent = 0..0;
        let mut taken = 0;
        let (mut slices, mut offset) = (slices.iter().peekable(), 0);
        for _ in 0..AT_ONCE {
            // Large pieces are sealed from where they are, small ones are gathered.
            self.gathered.clear();
            while let Some(slice) = slices.peek() {
                let rest = &slice[offset..];
                if rest.len() >= MOST || self.gathered.len() + rest.len() > MOST {
                    break;
                }
                self.gathered.extend_from_slice(rest);
                slices.next();
                offset = 0;
            }
            if self.gathered.is_empty() {
                let Some(slice) = slices.peek() else { break };
                let piece = &slice[offset..][..MOST];
                self.record(piece, DATA)?;
                offset += MOST;
                taken += MOST;
            } else {
                let gathered = std::mem::take(&mut self.gathered);
                let sealed = self.record(&gathered, DATA);
                taken += gathered.len();
                self.gathered = gathered;
                sealed?;
            }
        }
        Ok(taken)
    }

    /// Says that nothing follows.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        assert!(self.unsent.is_empty(), "a record must not be lost");
        self.unsent = 0..0;
        self.record(&CLOSE_NOTIFY, ALERT)
    }

    fn record(&mut self, plain: &[u8], content: u8) -> io::Result<()> {
        let nonce = self.key.nonce()?;
        let header = header(plain.len() + 1 + TAG);
        let room = &mut self.sealed[self.unsent.end..];
        room[..HEADER].copy_from_slice(&header);
        let (body, last) = room[HEADER..].split_at_mut(plain.len());
        let last = &mut last[..=TAG];
        let sealed = self.key.aead.seal_out_of_place_scatter(nonce, Aad::from(header), plain, body, &[content], last);
        sealed.map_err(|_| io::Error::other("the cipher failed"))?;
        self.unsent.end += HEADER + plain.len() + 1 + TAG;
        Ok(())
    }
}

/// What comes before a record of this length.
fn header(length: usize) -> [u8; HEADER] {
    let [high, low] = u16::try_from(length).expect("a record is short").to_be_bytes();
    [DATA, VERSION[0], VERSION[1], high, low]
}

/// Opens records.
pub(crate) struct Opener {
    key: Key,
    arrived: Vec<u8>,
    /// What of it was not opened.
    unopened: Range<usize>,
    /// What was opened in place, as nobody had room for it.
    plain: Range<usize>,
    ended: bool,
}

/// What opening came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// So many bytes are there.
    Bytes(usize),
    /// More must arrive first.
    Nothing,
    /// The other side said that nothing follows.
    End,
}

impl Opener {
    fn new(key: Key) -> Self {
        let arrived = vec![0; AT_ONCE * (HEADER + MOST + MOST_OVERHEAD) + LINE];
        Self { key, arrived, unopened: 0..0, plain: 0..0, ended: false }
    }

    /// Where what arrives is put; to be asked for when [`Opened::Nothing`] was the answer. It begins with a line of the
    /// processor's cache, see [`buffers`](crate::link::buffers).
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let rest = self.unopened.len();
        let start = self.arrived[rest..].as_ptr().align_offset(LINE).min(LINE);
        self.arrived.copy_within(self.unopened.clone(), start);
        self.unopened = start..start + rest;
        &mut self.arrived[start + rest..]
    }

    /// So much arrived there.
    pub(crate) fn arrived(&mut self, length: usize) {
        self.unopened.end += length;
    }

    /// Opens as much as there is and fits.
    pub(crate) fn open(&mut self, into: &mut [u8]) -> io::Result<Opened> {
        let mut filled = 0;
        loop {
            let length = self.plain.len().min(into.len() - filled);
            into[filled..filled + length].copy_from_slice(&self.arrived[self.plain.start..self.plain.start + length]);
            self.plain.start += length;
            filled += length;
            if filled == into.len() {
                return Ok(Opened::Bytes(filled));
            }
            let record = if self.ended { None } else { self.next_record()? };
            let Some(record) = record else {
                return Ok(match filled {
                    0 if self.ended => Opened::End,
                    0 => Opened::Nothing,
                    filled => Opened::Bytes(filled),
                });
            };
            filled += self.open_record(record, &mut into[filled..])?;
        }
    }

    /// Where the next whole record lies, header and all.
    fn next_record(&mut self) -> io::Result<Option<Range<usize>>> {
        let unopened = &self.arrived[self.unopened.clone()];
        let Some(header) = unopened.first_chunk::<HEADER>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[..3] != [DATA, VERSION[0], VERSION[1]] || !(1 + TAG..=MOST + MOST_OVERHEAD).contains(&length) {
            return Err(invalid("what arrived is no record of TLS 1.3"));
        }
        if unopened.len() < HEADER + length {
            return Ok(None);
        }
        let record = self.unopened.start..self.unopened.start + HEADER + length;
        self.unopened.start = record.end;
        Ok(Some(record))
    }

    /// Opens a record, into there if it fits; gives back how much of that is filled.
    fn open_record(&mut self, record: Range<usize>, into: &mut [u8]) -> io::Result<usize> {
        let nonce = self.key.nonce()?;
        let (header, body) = self.arrived[record.clone()].split_at_mut(HEADER);
        let (sealed, tag) = body.split_at_mut(body.len() - TAG);
        let aad = Aad::from(&*header);
        let fits = sealed.len() <= into.len();
        let opened = if fits {
            let into = &mut into[..sealed.len()];
            self.key.aead.open_separate_gather(nonce, aad, sealed, tag, into).map(|()| &*into)
        } else {
            self.key.aead.open_in_place_separate_tag(nonce, aad, tag, sealed).map(|plain| &*plain)
        };
        let opened = opened.map_err(|_| invalid("a record was changed on its way"))?;
        // The type comes last, but for zeros that hide how much there is.
        let length = opened.iter().rposition(|&byte| byte != 0).ok_or_else(|| invalid("a record has no type"))?;
        match opened[length] {
            DATA if fits => return Ok(length),
            DATA => {
                let start = record.start + HEADER;
                self.plain = start..start + length;
            }
            ALERT if opened[..length] == CLOSE_NOTIFY => self.ended = true,
            ALERT => return Err(io::Error::new(ErrorKind::ConnectionAborted, "the other side's TLS gave up")),
            HANDSHAKE => return Err(invalid("the other side wants new keys, which a new connection brings")),
            _ => return Err(invalid("a record of an unknown type")),
        }
        Ok(0)
    }
}

fn invalid(words: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::connect_stream;
    use crate::{Acceptor, Cipher, Identity};
    use rustls::{Connection, ServerConnection};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// Both ends after the handshake, the connecting one first.
    fn pair(cipher: Cipher) -> (Connection, Connection) {
        let dir = tempfile::tempdir().unwrap();
        let identity = |name: &str| Identity::load_or_make(&dir.path().join(name), name).unwrap();
        let (alpha, beta) = (identity("alpha"), identity("beta"));
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let mut server = ServerConnection::new(Acceptor::new(&beta, None).config()).unwrap();
        let client = std::thread::scope(|scope| {
            scope.spawn(|| while server.is_handshaking() && server.complete_io(&mut there).is_ok() {});
            connect_stream(&mut here, "beta", &alpha, beta.fingerprint(), Some(cipher)).unwrap()
        });
        (client.into(), server.into())
    }

    fn taken(connection: Connection) -> (Sealer, Opener) {
        records(connection.dangerous_extract_secrets().unwrap()).unwrap()
    }

    fn text(length: usize) -> Vec<u8> {
        (0..length).map(|number| (number * 7 / 3) as u8).collect()
    }

    /// All bytes as records.
    fn seal(sealer: &mut Sealer, mut slices: &mut [IoSlice<'_>]) -> Vec<u8> {
        let mut wire = Vec::new();
        while slices.iter().any(|slice| !slice.is_empty()) {
            let length = sealer.seal(slices).unwrap();
            IoSlice::advance_slices(&mut slices, length);
            wire.extend(sealer.unsent());
            sealer.sent(sealer.unsent().len());
        }
        wire
    }

    /// What comes out, read in pieces of this length, when so much arrives at a time.
    fn open(opener: &mut Opener, wire: &[u8], piece: usize, at_a_time: usize) -> io::Result<Vec<u8>> {
        let (mut plain, mut wire) = (Vec::new(), wire);
        let mut into = vec![0; piece];
        loop {
            match opener.open(&mut into)? {
                Opened::Bytes(length) => plain.extend(&into[..length]),
                Opened::End => return Ok(plain),
                Opened::Nothing if wire.is_empty() => return Ok(plain),
                Opened::Nothing => {
                    let room = opener.room();
                    let length = at_a_time.min(wire.len()).min(room.len());
                    room[..length].copy_from_slice(&wire[..length]);
                    opener.arrived(length);
                    wire = &wire[length..];
                }
            }
        }
    }

    #[test]
    fn rustls_reads_what_is_sealed_here_with_every_cipher() {
        for cipher in Cipher::ALL {
            let (client, mut server) = pair(cipher);
            let (mut sealer, _) = taken(client);
            let (header, small, large) = (text(32), text(100), text(300_000));
            let mut slices = [&header[..], &small, &header, &large, &[], &header, &large[..MOST], &small];
            let expected = slices.concat();
            let mut wire = seal(&mut sealer, &mut slices.map(IoSlice::new));
            sealer.end().unwrap();
            wire.extend(sealer.unsent());
            slices.reverse();
            let (mut plain, mut wire) = (Vec::<u8>::new(), &wire[..]);
            while !wire.is_empty() {
                server.read_tls(&mut wire).unwrap();
                server.process_new_packets().unwrap();
                let mut chunk = vec![0; 50_000];
                while let Ok(length @ 1..) = server.reader().read(&mut chunk) {
                    plain.extend(&chunk[..length]);
                }
            }
            assert_eq!(plain, expected);
            assert_eq!(server.reader().read(&mut [0; 1]).unwrap(), 0, "it was ended in order");
        }
    }

    #[test]
    fn what_rustls_seals_is_opened_here_however_it_arrives_and_is_read() {
        for (piece, at_a_time) in [(1 << 20, 1 << 20), (1 << 20, 1000), (100, 1 << 20), (MOST, 77), (20_000, 5)] {
            let (mut client, server) = pair(Cipher::Aes128Gcm);
            let (_, mut opener) = taken(server);
            client.set_buffer_limit(None);
            let mut wire = Vec::new();
            for length in [1, 5, 16_383, 16_384, 16_385, 200_000, 0, 3] {
                client.writer().write_all(&text(length)).unwrap();
                while client.wants_write() {
                    client.write_tls(&mut wire).unwrap();
                }
            }
            client.send_close_notify();
            client.write_tls(&mut wire).unwrap();
            let expected = [1, 5, 16_383, 16_384, 16_385, 200_000, 0, 3].map(text).concat();
            assert_eq!(open(&mut opener, &wire, piece, at_a_time).unwrap(), expected);
            assert_eq!(opener.open(&mut [0; 1]).unwrap(), Opened::End);
        }
    }

    #[test]
    fn both_directions_work_after_some_was_said_by_rustls() {
        let (mut client, mut server) = pair(Cipher::ChaCha20Poly1305);
        let mut wire = Vec::new();
        client.writer().write_all(b"hello").unwrap();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut &wire[..]).unwrap();
        server.process_new_packets().unwrap();
        server.reader().read_exact(&mut [0; 5]).unwrap();
        let ((mut alpha, mut alpha_hears), (mut beta, mut beta_hears)) = (taken(client), taken(server));
        let wire = seal(&mut alpha, &mut [IoSlice::new(b"there")]);
        assert_eq!(open(&mut beta_hears, &wire, 100, 100).unwrap(), b"there");
        let wire = seal(&mut beta, &mut [IoSlice::new(b"here")]);
        assert_eq!(open(&mut alpha_hears, &wire, 100, 100).unwrap(), b"here");
    }

    #[test]
    fn a_record_that_was_changed_repeated_left_out_or_is_none_is_refused() {
        let (client, server) = pair(Cipher::Aes256Gcm);
        let ((mut sealer, _), (_, mut opener)) = (taken(client), taken(server));
        let mut record = || seal(&mut sealer, &mut [IoSlice::new(&text(1000))]);
        let (first, second) = (record(), record());
        for byte in [0, 1, 4, HEADER, 500, first.len() - 1] {
            let mut changed = first.clone();
            changed[byte] ^= 1;
            // A longer record would only be waited for.
            changed.resize(changed.len() + 1, 0);
            let (used, result) = (opener.key.used, open(&mut opener, &changed, 2000, 2000));
            assert_eq!(result.expect_err("it was changed").kind(), ErrorKind::InvalidData, "byte {byte}");
            (opener.key.used, opener.unopened) = (used, 0..0);
        }
        assert!(open(&mut opener, &second, 2000, 2000).is_err(), "the first was left out");
        opener.key.used = 0;
        assert_eq!(open(&mut opener, &first, 2000, 2000).unwrap(), text(1000));
        assert!(open(&mut opener, &first, 2000, 2000).is_err(), "it was repeated");
    }

    #[test]
    fn a_key_that_has_protected_as_much_as_it_may_is_used_no_more() {
        let (client, _server) = pair(Cipher::Aes128Gcm);
        let (mut sealer, _) = taken(client);
        sealer.key.used = MOST_BY_AES - 1;
        seal(&mut sealer, &mut [IoSlice::new(b"last")]);
        assert!(sealer.seal(&[IoSlice::new(b"one too many")]).is_err());
    }
}
