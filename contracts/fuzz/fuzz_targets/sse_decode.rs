//! Frames are the same however the bytes are cut; what was read can be written and read again.
#![no_main]

use headgate_contracts::wire::sse::{Decoder, Limits, SseError, encode};
use libfuzzer_sys::fuzz_target;

type Read = (Vec<(String, String, Option<String>)>, Option<SseError>);

fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Read {
    let mut decoder = Decoder::new(Limits { max_line: 64, max_event: 128 });
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(Some(frame)) => frames.push((frame.event.to_owned(), frame.data.to_owned(), frame.id.map(str::to_owned))),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

fuzz_target!(|input: (u8, Vec<u8>)| {
    let (size, stream) = input;
    let whole = read([&stream[..]].into_iter());
    assert_eq!(read(stream.chunks(usize::from(size).max(1))), whole);
    assert_eq!(read(stream.chunks(1)), whole);
    for (event, data, _) in &whole.0 {
        let mut out = Vec::new();
        encode(&mut out, None, Some(event), data.as_bytes());
        let mut decoder = Decoder::new(Limits::default());
        decoder.push(&out);
        let frame = decoder.next().expect("within the limits").expect("a whole frame");
        assert_eq!(frame.data, data);
        assert!(decoder.next().expect("within the limits").is_none());
    }
});
