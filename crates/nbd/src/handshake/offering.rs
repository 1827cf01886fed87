//! The server's side of the handshake.
//!
//! Where TLS is wanted it is wanted first: until then nothing is told but that, and nothing that was said before it is
//! remembered after. So whoever sits between the two can neither learn what there is nor choose for the client.

use std::sync::Arc;

use crate::handshake::{put_answer, put_text};
use crate::limits;
use crate::session::{Export, Headers, Session};
use crate::wire::{self, ALLOCATION, Reader, answer, greeting, info, option};

/// The number that `base:allocation` has with us.
const ALLOCATION_ID: u32 = 1;

/// What a server has for its clients.
#[derive(Debug)]
pub struct Offer {
    /// In the order in which they are listed. If there is only one, the empty name means it too.
    pub exports: Vec<Export>,
    /// Nothing is told without TLS. Otherwise there is none.
    pub tls: bool,
}

impl Offer {
    fn find(&self, name: &[u8]) -> Option<usize> {
        let named = self.exports.iter().position(|export| export.name.as_bytes() == name);
        named.or((name.is_empty() && self.exports.len() == 1).then_some(0))
    }
}

/// How far a client has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// More must arrive first.
    Incomplete,
    /// What was appended is to be sent, then TLS begins, and [`tls_begins`](Offering::tls_begins) is to be called.
    StartTls,
    /// What was appended is to be sent, then requests follow.
    Go {
        /// Which export, by its place in the offer.
        export: usize,
        /// What was agreed upon.
        session: Session,
    },
    /// What was appended is to be sent, and nothing follows.
    End,
}

/// A client with which there is no talking. It is told nothing more.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadClient {
    /// It sets flags that nobody offered.
    #[error("the client sets flags of a handshake that nobody offered ({0:#x})")]
    Flags(u32),
    /// There is no option where one should begin.
    #[error("there is no option where one should begin ({0:#018x})")]
    Magic(u64),
    /// An option that is too long to be one.
    #[error("an option of {0} bytes")]
    LongOption(u32),
    /// It goes on and on.
    #[error("more than {max} options", max = limits::OPTIONS)]
    ManyOptions,
    /// It asked, in the old way that cannot be refused, for what it cannot have.
    #[error("the client asked in the old way for {0}")]
    CannotRefuse(&'static str),
}

/// See the module's text.
pub struct Offering {
    offer: Arc<Offer>,
    greeted: bool,
    zeroes: bool,
    options: u32,
    tls: bool,
    headers: Headers,
    /// Of which export the allocation was asked for last.
    context: Option<usize>,
}

impl Offering {
    /// Appends the greeting.
    pub fn begin(offer: Arc<Offer>, out: &mut Vec<u8>) -> Self {
        out.extend(wire::INIT.to_be_bytes());
        out.extend(wire::OPTION.to_be_bytes());
        out.extend((greeting::FIXED | greeting::NO_ZEROES).to_be_bytes());
        Self { offer, greeted: false, zeroes: true, options: 0, tls: false, headers: Headers::Simple, context: None }
    }

    /// TLS protects what comes from now on.
    pub fn tls_begins(&mut self) {
        assert!(self.offer.tls && !self.tls, "TLS begins once, where it was offered");
        self.tls = true;
        (self.headers, self.context) = (Headers::Simple, None);
    }

    /// Goes on with what arrived, taking it from `input`, and appends what is to be sent.
    pub fn receive(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Outcome, BadClient> {
        loop {
            let mut reader = Reader(input);
            if !self.greeted {
                let Some(flags) = reader.u32() else { return Ok(Outcome::Incomplete) };
                if flags & !u32::from(greeting::FIXED | greeting::NO_ZEROES) != 0 {
                    return Err(BadClient::Flags(flags));
                }
                self.zeroes = flags & u32::from(greeting::NO_ZEROES) == 0;
                self.greeted = true;
                *input = reader.0;
                continue;
            }
            let (Some(magic), option, length) = (reader.u64(), reader.u32(), reader.u32()) else {
                return Ok(Outcome::Incomplete);
            };
            if magic != wire::OPTION {
                return Err(BadClient::Magic(magic));
            }
            let (Some(option), Some(length)) = (option, length) else { return Ok(Outcome::Incomplete) };
            if length as usize > limits::OPTION {
                return Err(BadClient::LongOption(length));
            }
            let Some(data) = reader.bytes(length as usize) else { return Ok(Outcome::Incomplete) };
            *input = reader.0;
            self.options += 1;
            if self.options > limits::OPTIONS {
                return Err(BadClient::ManyOptions);
            }
            match self.take(option, data, out)? {
                Outcome::Incomplete => {}
                outcome => return Ok(outcome),
            }
        }
    }

    fn take(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Outcome, BadClient> {
        let mut say = |kind: u32, text: &str| {
            put_answer(option, kind, text.as_bytes(), out);
            Ok(Outcome::Incomplete)
        };
        match option {
            option::ABORT => {
                say(answer::ACK, "")?;
                return Ok(Outcome::End);
            }
            option::STARTTLS if !self.offer.tls => return say(answer::POLICY, "this server has no TLS"),
            option::STARTTLS if self.tls => return say(answer::INVALID, "TLS is on already"),
            option::STARTTLS if !data.is_empty() => return say(answer::INVALID, "this option has no data"),
            option::STARTTLS => {
                say(answer::ACK, "")?;
                return Ok(Outcome::StartTls);
            }
            option::EXPORT_NAME if self.offer.tls && !self.tls => {
                return Err(BadClient::CannotRefuse("an export without TLS"));
            }
            _ if self.offer.tls && !self.tls => {
                return say(answer::TLS_REQUIRED, "this server talks over TLS only: use STARTTLS first");
            }
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                return say(answer::INVALID, "this option has no data");
            }
            option::STRUCTURED_REPLY if self.headers == Headers::Extended => {
                return say(answer::EXTENDED_REQUIRED, "extended headers are on already");
            }
            option::STRUCTURED_REPLY => {
                self.headers = Headers::Structured;
                return say(answer::ACK, "");
            }
            option::EXTENDED_HEADERS => {
                self.headers = Headers::Extended;
                return say(answer::ACK, "");
            }
            option::LIST => {
                for export in &self.offer.exports {
                    let mut data = Vec::new();
                    put_text(&export.name, &mut data);
                    data.extend(export.description.as_bytes());
                    put_answer(option, answer::SERVER, &data, out);
                }
                put_answer(option, answer::ACK, &[], out);
            }
            option::EXPORT_NAME => return self.export_name(data, out),
            option::INFO | option::GO => return Ok(self.go(option, data, out)),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data, out),
            _ => return say(answer::UNSUPPORTED, "this server does not know that option"),
        }
        Ok(Outcome::Incomplete)
    }

    fn export_name(&self, name: &[u8], out: &mut Vec<u8>) -> Result<Outcome, BadClient> {
        if self.headers == Headers::Extended {
            return Err(BadClient::CannotRefuse("an export with extended headers"));
        }
        let export = self.offer.find(name).ok_or(BadClient::CannotRefuse("an export that there is not"))?;
        let session = self.session(export);
        out.extend(session.export.size.to_be_bytes());
        out.extend(session.export.abilities.0.to_be_bytes());
        if self.zeroes {
            out.extend([0; 124]);
        }
        Ok(Outcome::Go { export, session })
    }

    fn session(&self, index: usize) -> Session {
        let mut export = self.offer.exports[index].clone();
        export.abilities = export.abilities.over(self.headers);
        let allocation = (self.context == Some(index)).then_some(ALLOCATION_ID);
        Session { headers: self.headers, allocation, export }
    }

    fn go(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Outcome {
        let mut reader = Reader(data);
        let parsed = (|| {
            let name = reader.text()?;
            let count = reader.u16()?;
            let wanted: Vec<u16> = (0..count).map_while(|_| reader.u16()).collect();
            (wanted.len() == count.into() && reader.0.is_empty()).then_some((name, wanted))
        })();
        let Some((name, wanted)) = parsed.filter(|(name, _)| name.len() <= limits::NAME) else {
            put_answer(
                option,
                answer::INVALID,
                b"the option's lengths contradict each other, or its name is too long",
                out,
            );
            return Outcome::Incomplete;
        };
        let Some(index) = self.offer.find(name) else {
            put_answer(option, answer::UNKNOWN, b"there is no export of this name: LIST tells which there are", out);
            return Outcome::Incomplete;
        };
        let session = self.session(index);
        let export = &session.export;
        let mut tell = |kind: u16, parts: &[&[u8]]| {
            put_answer(option, answer::INFO, &[&[&kind.to_be_bytes()[..]], parts].concat().concat(), out);
        };
        tell(info::EXPORT, &[&export.size.to_be_bytes(), &export.abilities.0.to_be_bytes()]);
        if wanted.contains(&info::NAME) {
            tell(info::NAME, &[export.name.as_bytes()]);
        }
        if wanted.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            tell(info::DESCRIPTION, &[export.description.as_bytes()]);
        }
        // Told without being asked too: whoever does not keep to them is refused request by request.
        let blocks = export.blocks;
        let sizes = [blocks.minimum, blocks.preferred, blocks.maximum].map(u32::to_be_bytes);
        tell(info::BLOCK_SIZE, &[&sizes.concat()]);
        put_answer(option, answer::ACK, &[], out);
        if option == option::GO { Outcome::Go { export: index, session } } else { Outcome::Incomplete }
    }

    /// Which metadata contexts there are, or shall be told.
    fn contexts(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Also when the new ones cannot be had.
            self.context = None;
        }
        let mut reader = Reader(data);
        let parsed = (|| {
            let name = reader.text()?;
            let count = reader.u32()?;
            let queries: Vec<&[u8]> = (0..count).map_while(|_| reader.text()).collect();
            (queries.len() == count as usize && reader.0.is_empty()).then_some((name, queries))
        })();
        let Some((name, queries)) = parsed.filter(|(name, _)| name.len() <= limits::NAME) else {
            put_answer(
                option,
                answer::INVALID,
                b"the option's lengths contradict each other, or its name is too long",
                out,
            );
            return;
        };
        if self.headers == Headers::Simple {
            put_answer(option, answer::INVALID, b"contexts need structured replies or extended headers first", out);
            return;
        }
        let Some(index) = self.offer.find(name) else {
            put_answer(option, answer::UNKNOWN, b"there is no export of this name: LIST tells which there are", out);
            return;
        };
        let wanted = |query: &&[u8]| *query == ALLOCATION.as_bytes() || !set && *query == b"base:";
        if queries.iter().any(wanted) || !set && queries.is_empty() {
            let mut data = if set { ALLOCATION_ID } else { 0 }.to_be_bytes().to_vec();
            data.extend(ALLOCATION.as_bytes());
            put_answer(option, answer::META_CONTEXT, &data, out);
            if set {
                self.context = Some(index);
            }
        }
        put_answer(option, answer::ACK, &[], out);
    }
}
