//! Whatever comes out of a socket is an error or an answer, and never more than was sent.

use bytes::BytesMut;
use proptest::prelude::*;
use vmferry_libvirt::call;
use vmferry_libvirt::frame::{Frame, Kind, LARGEST, REMOTE};
use vmferry_libvirt::{Announced, Conversation, Description, Event, Gate};

fn gate() -> Gate {
    Gate::new(Announced { name: "web1".into(), uuid: uuid::Uuid::nil(), sockets: vec![] })
}

/// Calls and answers that libvirt might send, more often than chance would have them.
fn procedures() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0_u32..400, Just(303), Just(306), Just(318), Just(363)]
}

proptest! {
    #[test]
    fn any_bytes_are_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = BytesMut::from(&bytes[..]);
        let (mut conversation, before) = (Conversation::new(), bytes.len());
        while let Ok(Some(frame)) = Frame::take(&mut bytes, LARGEST) {
            prop_assert!(frame.payload.len() < before);
            let _ = conversation.hear(frame);
        }
    }

    #[test]
    fn any_payload_is_read_or_an_error(payload in prop::collection::vec(any::<u8>(), 0..300), procedure in procedures(), kind in 0_u32..6) {
        let kinds = [Kind::Call, Kind::Reply, Kind::Message, Kind::Other(3), Kind::Other(4), Kind::Other(5)];
        let frame = Frame { kind: kinds[kind as usize], ..Frame::call(procedure, 1, payload.clone()) };
        let _ = Event::of(&frame);
        let _ = gate().judge(frame.clone());
        let mut conversation = Conversation::new();
        conversation.ask(call::Call::bare(procedure));
        let _ = conversation.hear(Frame { kind: Kind::Reply, is_error: true, ..frame });
        let _ = (call::domains(&payload), call::job(&payload), call::state(&payload), call::info(&payload));
        let _ = (call::text(&payload), call::sign_ins(&payload), call::domain(&payload));
    }

    #[test]
    fn a_frame_comes_back_as_it_was(program in any::<u32>(), procedure in any::<u32>(), serial in any::<u32>(), is_error in any::<bool>(), payload in prop::collection::vec(any::<u8>(), 0..100)) {
        let frame = Frame { program, procedure, kind: Kind::Reply, serial, is_error, payload };
        let mut bytes = BytesMut::from(&frame.encode()[..]);
        prop_assert_eq!(Frame::take(&mut bytes, LARGEST), Ok(Some(frame)));
        prop_assert!(bytes.is_empty());
    }

    #[test]
    fn any_text_is_a_description_or_an_error(text in "<domain( type='[a-z]*')?>(<(uuid|name|devices|disk|source)( [a-z]*='.*')?/?>)*.*") {
        let _ = Description::parse(&text);
    }

    #[test]
    fn only_calls_that_are_allowed_pass(procedure in procedures(), payload in prop::collection::vec(any::<u8>(), 0..64)) {
        let frame = Frame::call(procedure, 1, payload);
        if let vmferry_libvirt::Verdict::Pass(frame) = gate().judge(frame) {
            prop_assert_eq!(frame.program, REMOTE);
            prop_assert!([1, 2, 3, 4, 7, 23, 24, 59, 60, 66, 110, 149, 157, 303, 306, 360, 361].contains(&frame.procedure));
        }
    }
}
