//! The client's side of the handshake.
//!
//! It asks for the best that there is and takes what it gets, except for TLS: who wants it has it, or the handshake
//! fails.

use crate::handshake::{name_of, put_option, put_text};
use crate::limits;
use crate::session::{Abilities, BlockSizes, Export, Headers, Session};
use crate::wire::{self, ALLOCATION, Reader, answer, greeting, info, option};

/// What a client is after.
#[derive(Clone, Debug)]
pub enum Wish {
    /// To use an export.
    Use(String),
    /// To be told about an export, and no more.
    Info(String),
    /// To be told which exports there are.
    List,
}

/// An export that a server lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its name.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
}

/// How far it has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// What was appended is to be sent, and more must arrive.
    Incomplete,
    /// TLS begins now, and [`tls_begins`](Asking::tls_begins) is to be called.
    StartTls,
    /// Requests may be made; or, where only information was asked for, this is it, and what was appended says good-bye.
    Agreed(Box<Session>),
    /// These exports there are; what was appended says good-bye.
    Listed(Vec<Told>),
}

/// A server that said no.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server refuses {what}: {text}")]
pub struct Refused {
    /// What was asked for.
    pub what: &'static str,
    /// Why, in its words, or in ours if it has none.
    pub text: String,
    /// It would talk over TLS.
    pub wants_tls: bool,
}

/// A server that is none, or not to be trusted, or not willing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadServer {
    /// It speaks another protocol.
    #[error("what answers there is no NBD server")]
    NoServer,
    /// It is too old.
    #[error("the server speaks only the old protocol, without options: use a newer one")]
    OldStyle,
    /// It answers what was not asked, or in a form that cannot be.
    #[error("the server's handshake makes no sense: {0}")]
    Senseless(&'static str),
    /// It said more than it may before TLS protects it.
    #[error("the server said more before TLS than it may: somebody may be in between")]
    EarlyWords,
    /// It said no.
    #[error(transparent)]
    Refused(#[from] Refused),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Greeting,
    Option(u32),
    /// The answer in the old way, which has no header.
    OldWay,
    Over,
}

/// See the module's text.
pub struct Asking {
    wish: Wish,
    tls: bool,
    stage: Stage,
    no_zeroes: bool,
    headers: Headers,
    allocation: Option<u32>,
    export: Export,
    told_size: bool,
    listed: Vec<Told>,
}

impl Asking {
    /// After this wish; over TLS, or not at all.
    pub fn new(wish: Wish, tls: bool) -> Self {
        let name = match &wish {
            Wish::Use(name) | Wish::Info(name) => name.clone(),
            Wish::List => String::new(),
        };
        Self {
            wish,
            tls,
            stage: Stage::Greeting,
            no_zeroes: false,
            headers: Headers::Simple,
            allocation: None,
            export: Export {
                name,
                description: String::new(),
                size: 0,
                abilities: Abilities(0),
                blocks: BlockSizes::DEFAULT,
            },
            told_size: false,
            listed: Vec::new(),
        }
    }

    /// TLS protects what is said from now on; appends the first of it.
    pub fn tls_begins(&mut self, out: &mut Vec<u8>) {
        self.ask_for_headers(option::EXTENDED_HEADERS, out);
    }

    /// Goes on with what arrived, taking it from `input`, and appends what is to be sent.
    pub fn receive(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Step, BadServer> {
        loop {
            let before = input.len();
            let step = match self.stage {
                Stage::Greeting => self.greeting(input, out)?,
                Stage::Option(option) => self.answer(option, input, out)?,
                Stage::OldWay => self.old_way(input)?,
                Stage::Over => return Err(BadServer::Senseless("it goes on after its end")),
            };
            match step {
                Step::Incomplete if input.len() < before => {}
                Step::StartTls if !input.is_empty() => return Err(BadServer::EarlyWords),
                step => return Ok(step),
            }
        }
    }

    fn greeting(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Step, BadServer> {
        let mut reader = Reader(input);
        // What is no server is known as such before it has said as much as one would.
        let Some(init) = reader.u64() else { return Ok(Step::Incomplete) };
        if init != wire::INIT {
            return Err(BadServer::NoServer);
        }
        let (Some(style), flags) = (reader.u64(), reader.u16()) else { return Ok(Step::Incomplete) };
        match style {
            wire::OPTION => {}
            wire::OLD_STYLE => return Err(BadServer::OldStyle),
            _ => return Err(BadServer::NoServer),
        }
        let Some(flags) = flags else { return Ok(Step::Incomplete) };
        if flags & greeting::FIXED == 0 {
            return Err(BadServer::OldStyle);
        }
        *input = reader.0;
        let ours = flags & (greeting::FIXED | greeting::NO_ZEROES);
        self.no_zeroes = ours & greeting::NO_ZEROES != 0;
        out.extend(u32::from(ours).to_be_bytes());
        if self.tls {
            self.ask(option::STARTTLS, &[], out);
        } else {
            self.ask_for_headers(option::EXTENDED_HEADERS, out);
        }
        Ok(Step::Incomplete)
    }

    fn ask(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        put_option(option, data, out);
        self.stage = Stage::Option(option);
    }

    /// Who only lists needs none.
    fn ask_for_headers(&mut self, option: u32, out: &mut Vec<u8>) {
        match self.wish {
            Wish::List => self.ask(option::LIST, &[], out),
            _ => self.ask(option, &[], out),
        }
    }

    fn ask_for_context(&mut self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        put_text(&self.export.name, &mut data);
        data.extend(1_u32.to_be_bytes());
        put_text(ALLOCATION, &mut data);
        self.ask(option::SET_META_CONTEXT, &data, out);
    }

    fn ask_for_export(&mut self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        put_text(&self.export.name, &mut data);
        let wanted = [info::BLOCK_SIZE, info::DESCRIPTION];
        data.extend((wanted.len() as u16).to_be_bytes());
        data.extend(wanted.map(u16::to_be_bytes).concat());
        let option = if matches!(self.wish, Wish::Info(_)) { option::INFO } else { option::GO };
        self.ask(option, &data, out);
    }

    fn answer(&mut self, option: u32, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Step, BadServer> {
        let mut reader = Reader(input);
        let Some(magic) = reader.u64() else { return Ok(Step::Incomplete) };
        if magic != wire::ANSWER {
            return Err(BadServer::Senseless("there is no answer where one should begin"));
        }
        let (Some(to), Some(kind), Some(length)) = (reader.u32(), reader.u32(), reader.u32()) else {
            return Ok(Step::Incomplete);
        };
        if to != option {
            return Err(BadServer::Senseless("it answers what was not asked"));
        }
        if length as usize > limits::OPTION {
            return Err(BadServer::Senseless("an answer of impossible length"));
        }
        let Some(data) = reader.bytes(length as usize) else { return Ok(Step::Incomplete) };
        *input = reader.0;
        if kind & answer::ERROR != 0 {
            return self.refused(option, kind, data, out);
        }
        match (option, kind) {
            (option::LIST, answer::SERVER) => self.listed(data)?,
            (option::INFO | option::GO, answer::INFO) => self.informed(data)?,
            (option::SET_META_CONTEXT, answer::META_CONTEXT) => {
                let mut data = Reader(data);
                let id = data.u32().ok_or(BadServer::Senseless("a context without a number"))?;
                if data.0 == ALLOCATION.as_bytes() {
                    self.allocation = Some(id);
                }
            }
            (_, answer::ACK) => return self.acknowledged(option, out),
            _ => return Err(BadServer::Senseless("an answer of a kind that does not fit")),
        }
        Ok(Step::Incomplete)
    }

    fn acknowledged(&mut self, option: u32, out: &mut Vec<u8>) -> Result<Step, BadServer> {
        match option {
            option::STARTTLS => return Ok(Step::StartTls),
            option::LIST => {
                put_option(option::ABORT, &[], out);
                self.stage = Stage::Over;
                return Ok(Step::Listed(std::mem::take(&mut self.listed)));
            }
            option::EXTENDED_HEADERS => {
                self.headers = Headers::Extended;
                self.ask_for_context(out);
            }
            option::STRUCTURED_REPLY => {
                self.headers = Headers::Structured;
                self.ask_for_context(out);
            }
            option::SET_META_CONTEXT => self.ask_for_export(out),
            _ if !self.told_size => return Err(BadServer::Senseless("an export without a size")),
            _ => {
                if option == option::INFO {
                    put_option(option::ABORT, &[], out);
                }
                return Ok(self.agreed());
            }
        }
        Ok(Step::Incomplete)
    }

    fn refused(&mut self, option: u32, kind: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Step, BadServer> {
        let what = match option {
            option::EXTENDED_HEADERS => {
                self.ask(option::STRUCTURED_REPLY, &[], out);
                "extended headers"
            }
            option::STRUCTURED_REPLY => {
                self.ask_for_export(out);
                "structured replies"
            }
            option::SET_META_CONTEXT => {
                self.allocation = None;
                self.ask_for_export(out);
                "to tell what is allocated"
            }
            option::GO if kind == answer::UNSUPPORTED => {
                put_option(option::EXPORT_NAME, self.export.name.as_bytes(), out);
                self.stage = Stage::OldWay;
                "information"
            }
            option::STARTTLS => "TLS",
            option::LIST => "to list its exports",
            _ => "the export",
        };
        // Of these a server is free to refuse each; the next one was asked for in its place.
        let optional = matches!(self.stage, Stage::Option(now) if now != option) || self.stage == Stage::OldWay;
        let wants_tls = kind == answer::TLS_REQUIRED;
        if optional && !wants_tls {
            return Ok(Step::Incomplete);
        }
        let text = String::from_utf8_lossy(&data[..data.len().min(limits::NAME)]);
        let text = if data.is_empty() { name_of(kind).into() } else { text.escape_debug().to_string() };
        Err(Refused { what, text, wants_tls }.into())
    }

    fn listed(&mut self, data: &[u8]) -> Result<(), BadServer> {
        let mut data = Reader(data);
        let name = data.text().filter(|name| name.len() <= limits::NAME);
        let name = name.ok_or(BadServer::Senseless("a listed export without a name"))?;
        if self.listed.len() == limits::LISTED {
            return Err(BadServer::Senseless("it lists too many exports"));
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let description = text(&data.0[..data.0.len().min(limits::NAME)]);
        self.listed.push(Told { name: text(name), description });
        Ok(())
    }

    fn informed(&mut self, data: &[u8]) -> Result<(), BadServer> {
        let mut data = Reader(data);
        match data.u16().ok_or(BadServer::Senseless("information of no kind"))? {
            info::EXPORT => {
                let (Some(size), Some(flags), []) = (data.u64(), data.u16(), data.0) else {
                    return Err(BadServer::Senseless("an export of no size"));
                };
                self.take_size(size, flags)?;
            }
            info::BLOCK_SIZE => {
                let (Some(minimum), Some(preferred), Some(maximum)) = (data.u32(), data.u32(), data.u32()) else {
                    return Err(BadServer::Senseless("block sizes that are none"));
                };
                let blocks = BlockSizes { minimum, preferred, maximum };
                if !blocks.is_sensible() {
                    return Err(BadServer::Senseless("block sizes that the protocol forbids"));
                }
                // We never send or ask for more than is portable.
                self.export.blocks = BlockSizes { maximum: maximum.min(limits::PAYLOAD), ..blocks };
            }
            info::DESCRIPTION => {
                let text = &data.0[..data.0.len().min(limits::NAME)];
                self.export.description = String::from_utf8_lossy(text).into_owned();
            }
            _ => {}
        }
        Ok(())
    }

    fn take_size(&mut self, size: u64, flags: u16) -> Result<(), BadServer> {
        // Sizes are signed in every kernel; one that is negative there is no size.
        if size > i64::MAX as u64 {
            return Err(BadServer::Senseless("an export of impossible size"));
        }
        if flags & wire::export::HAS_FLAGS == 0 {
            return Err(BadServer::Senseless("an export without flags"));
        }
        self.export.size = size;
        self.export.abilities = Abilities(flags);
        self.told_size = true;
        Ok(())
    }

    fn old_way(&mut self, input: &mut &[u8]) -> Result<Step, BadServer> {
        let mut reader = Reader(input);
        let (Some(size), Some(flags)) = (reader.u64(), reader.u16()) else { return Ok(Step::Incomplete) };
        if !self.no_zeroes && reader.bytes(124).is_none() {
            return Ok(Step::Incomplete);
        }
        *input = reader.0;
        self.take_size(size, flags)?;
        Ok(self.agreed())
    }

    fn agreed(&mut self) -> Step {
        self.stage = Stage::Over;
        Step::Agreed(Box::new(Session {
            headers: self.headers,
            allocation: self.allocation,
            export: self.export.clone(),
        }))
    }
}
