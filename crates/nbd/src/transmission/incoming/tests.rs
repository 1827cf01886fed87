use super::*;
use crate::session::{Abilities, BlockSizes, Export};
use crate::transmission::Tag;

const SIZE: u64 = 1 << 40;

fn session(headers: Headers) -> Session {
    let export = Export {
        name: String::new(),
        description: String::new(),
        size: SIZE,
        abilities: Abilities::of_ours(false),
        blocks: BlockSizes::DEFAULT,
    };
    Session { headers, allocation: Some(5), export }
}

const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];
const READ: Command = Command::Read { offset: 4096, length: 100 };

fn raw_chunk(last: bool, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::CHUNK.to_be_bytes().to_vec();
    bytes.extend(u16::from(last).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn data(last: bool, cookie: u64, offset: u64, length: usize) -> Vec<u8> {
    let payload: Vec<u8> = offset.to_be_bytes().into_iter().chain(vec![7; length]).collect();
    raw_chunk(last, chunk::DATA, cookie, &payload)
}

/// All events of these bytes, with the data taken as a driver would.
fn hear(replies: &mut Replies, mut bytes: &[u8]) -> Result<Vec<Event>, BadReply> {
    let mut events = Vec::new();
    loop {
        match replies.next(&mut bytes)? {
            Event::Incomplete => return Ok(events),
            Event::Heard => {}
            event => {
                if let Event::Data { length, .. } = event {
                    bytes = &bytes[length..];
                }
                events.push(event);
            }
        }
    }
}

#[test]
fn what_our_server_answers_is_understood() {
    for headers in ALL {
        let session = session(headers);
        let (mut replies, says) = (session.replies(), session.replier());
        let (mut out, mut bytes) = (Vec::new(), Vec::new());
        let cookies = [READ, Command::Flush, READ].map(|command| replies.ask(command, &mut out));
        let tags = [4096, 0, 4096].map(|offset| Tag { cookie: 0, offset });
        let [read, flush, failing]: [Tag; 3] = std::array::from_fn(|at| Tag { cookie: cookies[at], ..tags[at] });
        says.failed(failing, ErrorCode::Io, "the disk broke", &mut bytes);
        says.data(read, 100, &mut bytes);
        bytes.extend([7; 100]);
        says.done(flush, &mut bytes);
        let text = if headers == Headers::Simple { "" } else { "the disk broke" }.to_owned();
        let expected = [
            Event::Finished { cookie: failing.cookie, answer: Err(Failed { error: ErrorCode::Io, text }) },
            Event::Data { cookie: read.cookie, at: 0, length: 100 },
            Event::Finished { cookie: read.cookie, answer: Ok(Answer::Done) },
            Event::Finished { cookie: flush.cookie, answer: Ok(Answer::Done) },
        ];
        assert_eq!(hear(&mut replies, &bytes).unwrap(), expected, "{headers:?}");
        assert!(replies.asked.is_empty());
    }
}

#[test]
fn a_status_is_understood_and_cut_at_the_end_of_the_export() {
    for headers in [Headers::Structured, Headers::Extended] {
        let session = session(headers);
        let (mut replies, mut bytes, mut out) = (session.replies(), Vec::new(), Vec::new());
        let offset = SIZE - 8192;
        let cookie = replies.ask(Command::BlockStatus { offset, length: 4096, one: false }, &mut out);
        let extents = [Extent::data(4096), Extent::hole(1 << 20)];
        session.replier().status(Tag { cookie, offset }, &extents, &mut bytes);
        let answer = Ok(Answer::Status(vec![Extent::data(4096), Extent::hole(4096)]));
        assert_eq!(hear(&mut replies, &bytes).unwrap(), [Event::Finished { cookie, answer }]);
    }
}

#[test]
fn a_read_in_parts_holes_and_any_order_is_put_together() {
    let mut replies = session(Headers::Structured).replies();
    let cookie = replies.ask(READ, &mut Vec::new());
    let mut bytes = data(false, cookie, 4096 + 60, 40);
    let hole: Vec<u8> = 4096_u64.to_be_bytes().into_iter().chain(50_u32.to_be_bytes()).collect();
    bytes.extend(raw_chunk(false, chunk::HOLE, cookie, &hole));
    bytes.extend(data(false, cookie, 4096 + 50, 10));
    bytes.extend(raw_chunk(true, chunk::NONE, cookie, &[]));
    let expected = [
        Event::Data { cookie, at: 60, length: 40 },
        Event::Zeroes { cookie, at: 0, length: 50 },
        Event::Data { cookie, at: 50, length: 10 },
        Event::Finished { cookie, answer: Ok(Answer::Done) },
    ];
    assert_eq!(hear(&mut replies, &bytes).unwrap(), expected);
}

#[test]
fn an_error_makes_the_whole_read_fail_also_when_data_came() {
    let mut replies = session(Headers::Structured).replies();
    let cookie = replies.ask(READ, &mut Vec::new());
    let mut bytes = data(false, cookie, 4096, 100);
    let error: Vec<u8> = 0_u32.to_be_bytes().into_iter().chain(2_u16.to_be_bytes()).chain(*b"no").collect();
    bytes.extend(raw_chunk(true, chunk::ERROR, cookie, &error));
    let answer = Err(Failed { error: ErrorCode::Invalid, text: "no".into() });
    assert_eq!(hear(&mut replies, &bytes).unwrap()[1..], [Event::Finished { cookie, answer }]);
}

#[test]
fn a_lying_server_is_not_believed() {
    type Lie = (&'static str, fn(u64) -> Vec<u8>);
    let lies: [Lie; 12] = [
        ("a part is missing", |it| data(true, it, 4096, 99)),
        ("nothing came", |it| raw_chunk(true, chunk::NONE, it, &[])),
        ("too much", |it| data(true, it, 4096, 101)),
        ("before the begin", |it| data(true, it, 4095, 100)),
        ("far away", |it| data(true, it, u64::MAX, 100)),
        ("twice", |it| [data(false, it, 4096, 60), data(true, it, 4096 + 59, 40)].concat()),
        ("nothing, as data", |it| data(false, it, 4096, 0)),
        ("of somebody else", |it| data(true, it + 1, 4096, 100)),
        ("a short chunk", |it| raw_chunk(true, chunk::DATA, it, &[0; 8])),
        ("a status", |it| raw_chunk(true, chunk::STATUS, it, &[0; 12])),
        ("an unknown kind", |it| raw_chunk(true, 4711, it, &[0; 4])),
        ("a simple reply", |it| [&wire::SIMPLE_REPLY.to_be_bytes()[..], &[0; 4], &it.to_be_bytes()].concat()),
    ];
    for (lie, tell) in lies {
        let mut replies = session(Headers::Structured).replies();
        let cookie = replies.ask(READ, &mut Vec::new());
        assert!(hear(&mut replies, &tell(cookie)).is_err(), "{lie}");
    }
    let mut replies = session(Headers::Extended).replies();
    let command = Command::BlockStatus { offset: 0, length: 4096, one: false };
    let cookie = replies.ask(command, &mut Vec::new());
    let mut bytes = Vec::new();
    session(Headers::Structured).replier().status(Tag { cookie, offset: 0 }, &[Extent::data(1)], &mut bytes);
    assert!(hear(&mut replies, &bytes).is_err(), "a compact chunk where extended ones were agreed upon");
}

#[test]
fn a_status_that_says_nothing_or_of_something_else_is_not_believed() {
    let descriptor =
        |context: u32, length: u32| [context.to_be_bytes(), length.to_be_bytes(), 0_u32.to_be_bytes()].concat();
    for (payload, good) in [
        (descriptor(5, 1), true),
        (descriptor(5, 0), false),
        (descriptor(6, 1), false),
        (5_u32.to_be_bytes().to_vec(), false),
        (descriptor(5, 1)[..11].to_vec(), false),
        (vec![], false),
    ] {
        let mut replies = session(Headers::Structured).replies();
        let command = Command::BlockStatus { offset: 0, length: 4096, one: false };
        let cookie = replies.ask(command, &mut Vec::new());
        let heard = hear(&mut replies, &raw_chunk(true, chunk::STATUS, cookie, &payload));
        assert_eq!(heard.is_ok(), good, "{payload:?}");
    }
}
