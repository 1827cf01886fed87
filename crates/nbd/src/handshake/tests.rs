use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::limits;
use crate::session::{Abilities, BlockSizes, Export, Headers, Session};
use crate::wire::{greeting, info, option};

fn export(name: &str) -> Export {
    let description = format!("the disk {name}");
    let abilities = Abilities::of_ours(false);
    Export { name: name.into(), description, size: 1 << 30, abilities, blocks: BlockSizes::DEFAULT }
}

fn offer(names: &[&str], tls: bool) -> Arc<Offer> {
    Arc::new(Offer { exports: names.iter().map(|name| export(name)).collect(), tls })
}

/// A server that has been greeted back.
fn begun(offer: &Arc<Offer>) -> Offering {
    let mut out = Vec::new();
    let mut server = Offering::begin(Arc::clone(offer), &mut out);
    let flags = u32::from(greeting::FIXED | greeting::NO_ZEROES).to_be_bytes();
    assert_eq!(server.receive(&mut &flags[..], &mut out), Ok(Outcome::Incomplete));
    server
}

/// What a server does when it is sent this, and the kinds of its answers.
fn say(server: &mut Offering, bytes: &[u8]) -> (Result<Outcome, BadClient>, Vec<u32>) {
    let mut out = Vec::new();
    let outcome = server.receive(&mut &bytes[..], &mut out);
    let (mut kinds, mut reader) = (Vec::new(), wire::Reader(&out));
    while reader.u64() == Some(wire::ANSWER) {
        reader.u32().unwrap();
        kinds.push(reader.u32().unwrap());
        reader.text().unwrap();
    }
    (outcome, kinds)
}

fn raw(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_option(option, data, &mut out);
    out
}

fn go(name: &str) -> Vec<u8> {
    let mut data = Vec::new();
    put_text(name, &mut data);
    data.extend(0_u16.to_be_bytes());
    raw(option::GO, &data)
}

fn context(name: &str, query: &str) -> Vec<u8> {
    let mut data = Vec::new();
    put_text(name, &mut data);
    data.extend(1_u32.to_be_bytes());
    put_text(query, &mut data);
    raw(option::SET_META_CONTEXT, &data)
}

enum Met {
    Agreed(Session),
    Listed(Vec<Told>),
}

/// Lets both sides talk, in pieces of so many bytes, with `refuse` instead of an answer to the options it names.
fn meet(offer: &Arc<Offer>, wish: Wish, tls: bool, piece: usize, refuse: &[u32]) -> Result<Met, BadServer> {
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let mut server = Offering::begin(Arc::clone(offer), &mut to_client);
    let mut client = Asking::new(wish, tls);
    let (mut heard, mut said) = (Vec::new(), Vec::new());
    let (mut gone, mut greeted) = (None, false);
    for _ in 0..100_000 {
        let count = piece.min(to_client.len());
        heard.extend(to_client.drain(..count));
        let mut input = &heard[..];
        let step = client.receive(&mut input, &mut to_server)?;
        heard = input.to_vec();
        match step {
            Step::Incomplete => {}
            Step::StartTls => {
                server.tls_begins();
                client.tls_begins(&mut to_server);
            }
            Step::Agreed(session) => {
                if let Some(there) = gone {
                    let what = |it: &Session| (it.headers, it.allocation, it.export.size, it.export.blocks);
                    assert_eq!(what(&session), what(&there), "both agreed on the same");
                }
                return Ok(Met::Agreed(*session));
            }
            Step::Listed(told) => return Ok(Met::Listed(told)),
        }
        // The client's flags alone, so that what follows begins with an option.
        let count = if greeted { piece.min(to_server.len()) } else { to_server.len().min(4) };
        greeted |= count > 0;
        said.extend(to_server.drain(..count));
        if said.len() >= 16 && refuse.contains(&u32::from_be_bytes(said[8..12].try_into().unwrap())) {
            let length = u32::from_be_bytes(said[12..16].try_into().unwrap()) as usize;
            if said.len() >= 16 + length {
                let option = u32::from_be_bytes(said[8..12].try_into().unwrap());
                said.drain(..16 + length);
                put_answer(option, answer::UNSUPPORTED, &[], &mut to_client);
            }
            continue;
        }
        let mut input = &said[..];
        match server.receive(&mut input, &mut to_client).map_err(|_| BadServer::Senseless("the server ended it"))? {
            Outcome::Go { session, .. } => gone = Some(session),
            Outcome::Incomplete | Outcome::StartTls | Outcome::End => {}
        }
        said = input.to_vec();
    }
    panic!("they talk for ever");
}

#[test]
fn both_sides_agree_on_the_best_there_is_in_pieces_of_any_size() {
    for piece in [1, 2, 7, 100, 10_000] {
        for tls in [false, true] {
            let offer = offer(&["vda", "vdb"], tls);
            let Ok(Met::Agreed(session)) = meet(&offer, Wish::Use("vdb".into()), tls, piece, &[]) else { panic!() };
            assert_eq!((session.headers, session.export.size), (Headers::Extended, 1 << 30));
            assert_eq!(session.export.description, "the disk vdb");
            assert!(session.allocation.is_some());
        }
    }
}

#[test]
fn a_client_takes_less_from_a_server_that_has_less() {
    let offer = offer(&["vda"], false);
    let refused = |options: &[u32]| match meet(&offer, Wish::Use("vda".into()), false, 100, options) {
        Ok(Met::Agreed(session)) => session,
        _ => panic!(),
    };
    assert_eq!(refused(&[option::EXTENDED_HEADERS]).headers, Headers::Structured);
    let simple = refused(&[option::EXTENDED_HEADERS, option::STRUCTURED_REPLY]);
    assert_eq!((simple.headers, simple.allocation), (Headers::Simple, None));
    assert_eq!(refused(&[option::SET_META_CONTEXT]).allocation, None);
    let old = refused(&[option::EXTENDED_HEADERS, option::STRUCTURED_REPLY, option::GO]);
    assert_eq!((old.headers, old.export.size), (Headers::Simple, 1 << 30));
}

#[test]
fn exports_are_listed_and_told_about_and_an_unknown_one_is_refused_in_words() {
    let offer = offer(&["vda", "vdb"], false);
    let Ok(Met::Listed(told)) = meet(&offer, Wish::List, false, 100, &[]) else { panic!() };
    assert_eq!(told.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["vda", "vdb"]);
    assert!(matches!(meet(&offer, Wish::Info("vda".into()), false, 100, &[]), Ok(Met::Agreed(_))));
    for name in ["nothing", ""] {
        let refused = meet(&offer, Wish::Use(name.into()), false, 100, &[]).err().unwrap().to_string();
        assert!(refused.contains("no export of this name"), "{refused}");
    }
}

#[test]
fn the_empty_name_is_the_only_exports() {
    let offer = offer(&["vda"], false);
    assert!(matches!(meet(&offer, Wish::Use(String::new()), false, 100, &[]), Ok(Met::Agreed(_))));
}

#[test]
fn a_client_that_wants_tls_takes_nothing_less_and_one_without_hears_that_it_is_wanted() {
    let refused = meet(&offer(&["vda"], false), Wish::Use("vda".into()), true, 100, &[]).err().unwrap();
    assert!(refused.to_string().contains("this server has no TLS"), "{refused}");
    let refused = meet(&offer(&["vda"], true), Wish::Use("vda".into()), false, 100, &[]).err().unwrap();
    assert!(matches!(&refused, BadServer::Refused(it) if it.wants_tls), "{refused}");
}

#[test]
fn before_tls_nothing_but_tls_is_to_be_had() {
    let mut server = begun(&offer(&["vda"], true));
    for bytes in [
        raw(option::LIST, &[]),
        raw(option::STRUCTURED_REPLY, &[]),
        raw(option::EXTENDED_HEADERS, &[]),
        context("vda", "base:allocation"),
        go("vda"),
        go("nothing"),
        raw(4711, &[]),
    ] {
        assert_eq!(say(&mut server, &bytes), (Ok(Outcome::Incomplete), vec![answer::TLS_REQUIRED]));
    }
    let error = say(&mut begun(&offer(&["vda"], true)), &raw(option::EXPORT_NAME, b"vda")).0;
    assert!(matches!(error, Err(BadClient::CannotRefuse(_))));
    assert_eq!(say(&mut server, &raw(option::ABORT, &[])).0, Ok(Outcome::End));
}

#[test]
fn what_was_agreed_before_tls_is_forgotten() {
    // A server of which TLS is asked half-way, as if somebody in between had spoken first.
    let mut server = begun(&offer(&["vda"], true));
    assert_eq!(say(&mut server, &raw(option::STRUCTURED_REPLY, &[])).1, [answer::TLS_REQUIRED]);
    assert_eq!(say(&mut server, &raw(option::STARTTLS, &[])).0, Ok(Outcome::StartTls));
    server.tls_begins();
    assert_eq!(say(&mut server, &context("vda", "base:allocation")).1, [answer::INVALID], "no structured replies");
    match say(&mut server, &go("vda")).0 {
        Ok(Outcome::Go { session, .. }) => assert_eq!((session.headers, session.allocation), (Headers::Simple, None)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_server_that_says_more_before_tls_is_not_believed() {
    let mut client = Asking::new(Wish::List, true);
    let (mut bytes, mut out) = (Vec::new(), Vec::new());
    Offering::begin(offer(&[], true), &mut bytes);
    put_answer(option::STARTTLS, answer::ACK, &[], &mut bytes);
    put_answer(option::EXTENDED_HEADERS, answer::ACK, &[], &mut bytes);
    assert_eq!(client.receive(&mut &bytes[..], &mut out), Err(BadServer::EarlyWords));
}

#[test]
fn a_context_belongs_to_the_export_that_it_was_asked_for() {
    let mut server = begun(&offer(&["vda", "vdb"], false));
    let _ = say(&mut server, &raw(option::STRUCTURED_REPLY, &[]));
    assert_eq!(say(&mut server, &context("vda", "base:allocation")).1, [answer::META_CONTEXT, answer::ACK]);
    match say(&mut server, &go("vdb")).0 {
        Ok(Outcome::Go { export: 1, session }) => assert_eq!(session.allocation, None),
        other => panic!("{other:?}"),
    }
    let mut server = begun(&offer(&["vda"], false));
    let _ = say(&mut server, &raw(option::STRUCTURED_REPLY, &[]));
    let _ = say(&mut server, &context("vda", "base:allocation"));
    assert_eq!(say(&mut server, &context("vda", "qemu:dirty-bitmap:x")).1, [answer::ACK], "replaced by nothing");
    assert!(matches!(say(&mut server, &go("vda")).0, Ok(Outcome::Go { session, .. }) if session.allocation.is_none()));
}

#[test]
fn lengths_that_contradict_each_other_are_refused_and_the_talk_goes_on() {
    let mut server = begun(&offer(&["vda"], false));
    let _ = say(&mut server, &raw(option::STRUCTURED_REPLY, &[]));
    let huge = [&u32::MAX.to_be_bytes()[..], b"vda"].concat();
    let name = |length: usize| [&(length as u32).to_be_bytes()[..], &vec![b'x'; length], &[0; 2]].concat();
    let many_queries = [&[0; 4][..], &u32::MAX.to_be_bytes()].concat();
    for (option, data) in [
        (option::GO, huge.clone()),
        (option::INFO, vec![]),
        (option::GO, name(limits::NAME + 1)),
        (option::GO, [&name(3)[..], &[0]].concat()),
        (option::SET_META_CONTEXT, huge),
        (option::SET_META_CONTEXT, many_queries),
        (option::LIST, vec![1]),
        (option::STRUCTURED_REPLY, vec![1]),
        (option::EXTENDED_HEADERS, vec![1]),
    ] {
        let told = say(&mut server, &raw(option, &data));
        assert_eq!(told, (Ok(Outcome::Incomplete), vec![answer::INVALID]), "{option}");
    }
    assert_eq!(say(&mut server, &raw(4711, &[1; 100])).1, [answer::UNSUPPORTED]);
    assert!(matches!(say(&mut server, &go("vda")).0, Ok(Outcome::Go { .. })));
}

#[test]
fn long_options_many_options_and_garbage_end_the_talk() {
    let mut server = begun(&offer(&["vda"], false));
    let header = [&wire::OPTION.to_be_bytes()[..], &7_u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    assert_eq!(say(&mut server, &header).0, Err(BadClient::LongOption(u32::MAX)));
    let mut server = begun(&offer(&["vda"], false));
    let ended = (0..=limits::OPTIONS).map(|_| say(&mut server, &raw(4711, &[])).0).find(Result::is_err);
    assert_eq!(ended, Some(Err(BadClient::ManyOptions)));
    assert!(matches!(say(&mut begun(&offer(&[], false)), &[7; 20]).0, Err(BadClient::Magic(_))));
    let mut server = Offering::begin(offer(&[], false), &mut Vec::new());
    assert_eq!(say(&mut server, &[0, 0, 0, 4]).0, Err(BadClient::Flags(4)));
}

#[test]
fn what_is_no_server_and_what_is_an_old_one_are_told_apart() {
    let hear = |bytes: &[u8]| Asking::new(Wish::List, false).receive(&mut &bytes[..], &mut Vec::new());
    assert_eq!(hear(b"SSH-2.0-OpenSSH"), Err(BadServer::NoServer));
    let old = [wire::INIT.to_be_bytes(), wire::OLD_STYLE.to_be_bytes()].concat();
    assert_eq!(hear(&old), Err(BadServer::OldStyle));
    assert_eq!(hear(&[wire::INIT.to_be_bytes(), wire::OPTION.to_be_bytes()].concat()), Ok(Step::Incomplete));
}

#[test]
fn a_negative_size_and_impossible_block_sizes_are_not_believed() {
    let tell = |parts: &[&[u8]]| {
        let mut client = Asking::new(Wish::Use(String::new()), false);
        let (mut bytes, mut out) = (Vec::new(), Vec::new());
        Offering::begin(offer(&[], false), &mut bytes);
        for refused in [option::EXTENDED_HEADERS, option::STRUCTURED_REPLY] {
            put_answer(refused, answer::UNSUPPORTED, &[], &mut bytes);
        }
        put_answer(option::GO, answer::INFO, &parts.concat(), &mut bytes);
        client.receive(&mut &bytes[..], &mut out)
    };
    let flags = 1_u16.to_be_bytes();
    assert_eq!(tell(&[&info::EXPORT.to_be_bytes(), &(1_u64 << 40).to_be_bytes(), &flags]), Ok(Step::Incomplete));
    assert!(tell(&[&info::EXPORT.to_be_bytes(), &u64::MAX.to_be_bytes(), &flags]).is_err());
    assert!(tell(&[&info::EXPORT.to_be_bytes(), &[0; 9]]).is_err());
    for sizes in [[3, 4096, 1 << 20], [0, 4096, 1 << 20], [1, 4096, 512], [1 << 20, 1 << 20, 1 << 20]] {
        let sizes = sizes.map(u32::to_be_bytes).concat();
        assert!(tell(&[&info::BLOCK_SIZE.to_be_bytes(), &sizes]).is_err(), "{sizes:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_taken_by_both_sides_without_a_panic(bytes: Vec<u8>, tls: bool) {
        let mut out = Vec::new();
        let _ = begun(&offer(&["vda"], tls)).receive(&mut &bytes[..], &mut out);
        let _ = Asking::new(Wish::List, tls).receive(&mut &bytes[..], &mut out);
    }
}
