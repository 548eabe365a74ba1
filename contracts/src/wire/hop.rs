//! Many turns on one WebSocket between gateway and orchestrator: the frames that dispatch and steer turns, and those of their answers.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::{
    Deserialize,
    de::{Deserializer, Error as _, MapAccess, Visitor},
};

use super::{
    Malformed,
    chat::Confirmation,
    frames::{self, MAX_REF_BYTES},
    json,
};
use crate::{Code, Fault, TurnId};

/// The headers of a dispatch: those that mean something to an orchestrator, and the only ones a frame may bring.
pub const HEADERS: [&str; 7] =
    ["policy-verdict", "policy-version", "constitution-hash", "content-digest", "idempotency-key", "traceparent", "tracestate"];

/// The most turns that are open at once on one socket.
pub const MAX_TURNS: usize = 256;

/// How many bytes of a turn's frames a gateway lets be on their way: what a turn that nobody reads holds there at most, besides the
/// one event that took the last of them. At a round trip of 50 ms a turn may still say 640 KB a second.
pub const WINDOW: u32 = 32 << 10;

/// A frame from the gateway.
#[derive(Deserialize, schemars::JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum DispatchFrame {
    /// Dispatches a turn.
    Turn {
        /// Which.
        turn_id: TurnId,
        /// The body that a request would have, as a string: the verdict binds exactly its bytes.
        payload: String,
        /// The headers that a request would have.
        #[schemars(with = "std::collections::BTreeMap<String, String>")]
        headers: Headers,
        /// How many bytes of frames the turn may send before it needs more credit; absent: as many as it likes.
        #[serde(default)]
        credit: Option<u32>,
    },
    /// Stops a turn.
    Stop {
        /// Which.
        turn_id: TurnId,
    },
    /// Lets more of a turn come.
    Credit {
        /// Which.
        turn_id: TurnId,
        /// How many bytes of frames more.
        #[schemars(range(min = 1))]
        bytes: u32,
    },
    /// Answers a question of a turn.
    Confirm {
        /// Which.
        turn_id: TurnId,
        /// Which question.
        #[schemars(length(max = 128))]
        id: String,
        /// The answer.
        accept: bool,
    },
}

/// Headers as they came: a name that comes twice is kept twice, for the verdict's judge to refuse.
pub struct Headers(pub HeaderMap);

impl DispatchFrame {
    /// Reads a text frame.
    ///
    /// Errors: the gateway's fault, which never quotes what was found.
    pub fn parse(text: &str) -> Result<DispatchFrame, Fault> {
        let unfit = || Fault::client(Code::InvalidRequest).saying("expected a frame of type turn, stop, credit or confirm");
        // serde_json's own words may quote what it read.
        let frame = serde_json::from_str(text).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => unfit(),
            serde_json::error::Category::Syntax | serde_json::error::Category::Eof | serde_json::error::Category::Io => {
                Fault::client(Code::MalformedJson)
            }
        })?;
        match &frame {
            DispatchFrame::Credit { bytes: 0, .. } => Err(unfit()),
            DispatchFrame::Confirm { id, .. } if id.len() > MAX_REF_BYTES => Err(unfit()),
            DispatchFrame::Turn { .. } | DispatchFrame::Stop { .. } | DispatchFrame::Credit { .. } | DispatchFrame::Confirm { .. } => {
                Ok(frame)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Headers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Headers, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Headers;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of headers by name")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers, A::Error> {
                let unfit = || A::Error::custom("not a header of a dispatch");
                let mut headers = HeaderMap::new();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    let name = name.parse::<HeaderName>().map_err(|_| unfit())?;
                    if !HEADERS.contains(&name.as_str()) || headers.len() >= 2 * HEADERS.len() {
                        return Err(unfit());
                    }
                    headers.append(name, HeaderValue::from_str(&value).map_err(|_| unfit())?);
                }
                Ok(Headers(headers))
            }
        }
        from.deserialize_map(Fields)
    }
}

/// Appends the frame that dispatches a turn. Of `headers` only [`HEADERS`] are written, and only what is text.
pub fn turn(out: &mut Vec<u8>, turn: &TurnId, payload: &str, headers: &HeaderMap, credit_bytes: u32) {
    begin(out, "turn", turn);
    json::member(out, "credit");
    json::number(out, credit_bytes.into());
    json::member(out, "headers");
    let mut before = b'{';
    for name in HEADERS {
        for value in headers.get_all(name) {
            let Ok(value) = value.to_str() else { continue };
            out.push(before);
            before = b',';
            json::string(out, name);
            out.push(b':');
            json::string(out, value);
        }
    }
    if before == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
    json::member(out, "payload");
    json::string(out, payload);
    out.push(b'}');
}

/// Appends the `error` frame of a turn that was not taken: `object` is the event's.
pub fn untaken(out: &mut Vec<u8>, object: &[u8]) {
    out.extend_from_slice(b"{\"type\":\"error\",\"taken\":false");
    frames::splice(out, object);
}

/// Appends the frame that stops a turn.
pub fn stop(out: &mut Vec<u8>, turn: &TurnId) {
    begin(out, "stop", turn);
    out.push(b'}');
}

/// Appends the frame that lets `bytes` more of a turn come.
pub fn credit(out: &mut Vec<u8>, turn: &TurnId, bytes: u32) {
    begin(out, "credit", turn);
    json::member(out, "bytes");
    json::number(out, bytes.into());
    out.push(b'}');
}

/// Appends the frame that answers a question of a turn.
pub fn confirm(out: &mut Vec<u8>, turn: &TurnId, said: &Confirmation) {
    begin(out, "confirm", turn);
    json::member(out, "id");
    json::string(out, &said.id);
    json::member(out, "accept");
    out.extend_from_slice(if said.accept { b"true}" } else { b"false}" });
}

fn begin(out: &mut Vec<u8>, name: &str, turn: &TurnId) {
    out.extend_from_slice(b"{\"type\":");
    json::string(out, name);
    json::member(out, "turn_id");
    out.push(b'"');
    turn.write(out);
    out.push(b'"');
}

/// A frame of an answer, as [`super::frames::frame`] writes it: the event's object with `type`, `turn_id` and `seq` before its own
/// members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerFrame<'a> {
    /// The event's name.
    pub name: &'a str,
    /// Whose; `None`: the frame is about none.
    pub turn: Option<TurnId>,
    /// Which of its frames, counted from 0; `None`: it never became a turn.
    pub seq: Option<u64>,
    /// Whether the turn was taken, where the frame says so: one that was not may be tried elsewhere.
    pub taken: Option<bool>,
    /// What is left of the object behind those members.
    rest: &'a str,
}

impl<'a> AnswerFrame<'a> {
    /// Reads what stands before the event's own members, and leaves those alone.
    ///
    /// `type` comes first, then `turn_id`, `seq` and `taken` in any order, each at most once; what comes later is a member of the
    /// event, whatever its name.
    pub fn parse(text: &'a str) -> Result<AnswerFrame<'a>, Malformed> {
        let malformed = |what| Malformed::new(what, text);
        let mut at = Scan(text.trim_end_matches(BLANK));
        let name = at.byte(b'{').and_then(|()| at.name("type")).and_then(|()| at.word());
        let name = name.ok_or_else(|| malformed("a frame that does not begin with its type"))?;
        let (mut turn, mut seq, mut taken) = (None, None, None);
        loop {
            let mut next = at;
            match next.byte(b',').and_then(|()| next.key()) {
                Some("turn_id") if turn.is_none() => {
                    let id = next.word().and_then(|id| id.parse().ok());
                    turn = Some(id.ok_or_else(|| malformed("a turn id that is none"))?);
                }
                Some("seq") if seq.is_none() => seq = Some(next.number().ok_or_else(|| malformed("a number that is none"))?),
                Some("taken") if taken.is_none() => taken = Some(next.flag().ok_or_else(|| malformed("a yes or no that is neither"))?),
                Some("type" | "turn_id" | "seq" | "taken") => return Err(malformed("a member of the frame that comes twice")),
                Some(_) | None => break,
            }
            at = next;
        }
        let rest = at.blank().0;
        // What stands behind a comma is the event's own, and its decoder's to judge; nothing must not become an empty object.
        let whole =
            rest == "}" || rest.strip_prefix(',').is_some_and(|own| own.len() > 1 && own.ends_with('}') && Scan(own).blank().0 != "}");
        if whole { Ok(AnswerFrame { name, turn, seq, taken, rest }) } else { Err(malformed("a frame that is no object")) }
    }

    /// How long the event's object is, in bytes.
    pub fn object_bytes(&self) -> usize {
        self.rest.len() + usize::from(!self.rest.starts_with(','))
    }

    /// Appends the event's object, byte for byte as it was before it became a frame.
    pub fn object(&self, out: &mut String) {
        out.push('{');
        out.push_str(self.rest.strip_prefix(',').unwrap_or(self.rest));
    }
}

/// RFC 8259 section 2: what may stand between two tokens.
const BLANK: [char; 4] = [' ', '\t', '\n', '\r'];

/// A place in a frame.
#[derive(Clone, Copy)]
struct Scan<'a>(&'a str);

impl<'a> Scan<'a> {
    fn blank(self) -> Scan<'a> {
        Scan(self.0.trim_start_matches(BLANK))
    }

    fn byte(&mut self, byte: u8) -> Option<()> {
        let rest = self.blank().0;
        self.0 = rest.strip_prefix(char::from(byte))?;
        Some(())
    }

    /// A string without escapes.
    fn word(&mut self) -> Option<&'a str> {
        self.byte(b'"')?;
        let (word, rest) = self.0.split_once('"')?;
        self.0 = rest;
        (!word.contains('\\')).then_some(word)
    }

    /// A member's name, and the colon behind it.
    fn key(&mut self) -> Option<&'a str> {
        let key = self.word()?;
        self.byte(b':')?;
        Some(key)
    }

    fn name(&mut self, name: &str) -> Option<()> {
        (self.key()? == name).then_some(())
    }

    fn flag(&mut self) -> Option<bool> {
        let rest = self.blank().0;
        let (flag, rest) = rest.strip_prefix("true").map(|rest| (true, rest)).or_else(|| Some((false, rest.strip_prefix("false")?)))?;
        self.0 = rest;
        Some(flag)
    }

    fn number(&mut self) -> Option<u64> {
        let rest = self.blank().0;
        let end = rest.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(rest.len());
        let (digits, rest) = rest.split_at_checked(end)?;
        self.0 = rest;
        digits.parse().ok()
    }
}

// A payload is the client's text, and a verdict is good for one use.
impl fmt::Debug for DispatchFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, turn) = match self {
            DispatchFrame::Turn { turn_id, .. } => ("Turn", turn_id),
            DispatchFrame::Stop { turn_id } => ("Stop", turn_id),
            DispatchFrame::Credit { turn_id, .. } => ("Credit", turn_id),
            DispatchFrame::Confirm { turn_id, .. } => ("Confirm", turn_id),
        };
        f.debug_struct(name).field("turn_id", turn).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TURN: &str = "0193a5f0-7e1c-7000-8000-000000000000";

    fn id() -> TurnId {
        TURN.parse().unwrap()
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn a_dispatch_arrives_byte_for_byte_with_the_headers_of_a_dispatch_alone() {
        let payload = "{\"messages\":\"Grüße \\\"\\u0001 \u{1F980}\"}";
        let sent = headers(&[("traceparent", "00-a-b-01"), ("policy-verdict", "a.b.c"), ("authorization", "Bearer hunter2")]);
        let mut out = Vec::new();
        turn(&mut out, &id(), payload, &sent, 32768);
        let text = String::from_utf8(out).unwrap();
        let frame = DispatchFrame::parse(&text).unwrap();
        assert!(!text.contains("hunter2") && !format!("{frame:?}").contains("Grüße"));
        let DispatchFrame::Turn { turn_id, payload: read, headers: Headers(read_headers), credit } = frame else { panic!("a turn") };
        assert_eq!((turn_id, read.as_str(), credit), (id(), payload, Some(32768)));
        assert_eq!(read_headers, headers(&[("traceparent", "00-a-b-01"), ("policy-verdict", "a.b.c")]));
        let mut out = Vec::new();
        turn(&mut out, &id(), "{}", &HeaderMap::new(), 1);
        assert!(DispatchFrame::parse(std::str::from_utf8(&out).unwrap()).is_ok());
    }

    #[test]
    fn frames_that_steer_a_turn_arrive() {
        let parsed = |write: &dyn Fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            write(&mut out);
            DispatchFrame::parse(std::str::from_utf8(&out).unwrap()).unwrap()
        };
        assert!(matches!(parsed(&|out| stop(out, &id())), DispatchFrame::Stop { turn_id } if turn_id == id()));
        assert!(matches!(parsed(&|out| credit(out, &id(), 7)), DispatchFrame::Credit { turn_id, bytes: 7 } if turn_id == id()));
        let confirm = format!(r#"{{"type":"confirm","turn_id":"{TURN}","id":"q","accept":false}}"#);
        assert!(matches!(DispatchFrame::parse(&confirm).unwrap(), DispatchFrame::Confirm { accept: false, id, .. } if id == "q"));
    }

    #[test]
    fn what_is_no_dispatch_is_refused_and_never_quoted() {
        for text in [
            "secret".to_owned(),
            r#"{"type":"secret"}"#.into(),
            r#"{"type":"stop"}"#.into(),
            format!(r#"{{"type":"stop","turn_id":"{TURN}","turn_id":"{TURN}"}}"#),
            format!(r#"{{"type":"stop","turn_id":"{TURN}","secret":1}}"#),
            format!(r#"{{"type":"credit","turn_id":"{TURN}","bytes":0}}"#),
            format!(r#"{{"type":"credit","turn_id":"{TURN}","bytes":-1}}"#),
            format!(r#"{{"type":"turn","turn_id":"{TURN}","payload":"{{}}","headers":{{"cookie":"secret"}}}}"#),
            format!(r#"{{"type":"turn","turn_id":"{TURN}","payload":"{{}}"}}"#),
            format!(r#"{{"type":"confirm","turn_id":"{TURN}","id":"{}","accept":true}}"#, "secret".repeat(30)),
        ] {
            let fault = DispatchFrame::parse(&text).unwrap_err();
            assert!(matches!(fault.code, Code::InvalidRequest | Code::MalformedJson), "{text}");
            assert!(!fault.chain().contains("secret"), "{}", fault.chain());
        }
    }

    #[test]
    fn a_header_that_comes_twice_is_kept_twice() {
        let text = format!(r#"{{"type":"turn","turn_id":"{TURN}","payload":"","headers":{{"traceparent":"a","Traceparent":"b"}}}}"#);
        let DispatchFrame::Turn { headers: Headers(headers), .. } = DispatchFrame::parse(&text).unwrap() else { panic!("a turn") };
        assert_eq!(headers.get_all("traceparent").iter().count(), 2);
    }

    #[test]
    fn an_object_is_the_same_behind_the_frame_as_before_it() {
        for object in
            ["{\"text\":\"a \\u00e9, }\"}", "{}", "{\"text\":\"x\",\"turn_id\":\"other\"}", "{\"finish\":\"stop\",\"usage\":{\"a\":1}}"]
        {
            let mut out = Vec::new();
            frames::frame(&mut out, "text", &id(), 7, object.as_bytes());
            let text = String::from_utf8(out).unwrap();
            let frame = AnswerFrame::parse(&text).unwrap();
            let mut found = String::new();
            frame.object(&mut found);
            assert_eq!((frame.name, frame.turn, frame.seq, found.as_str()), ("text", Some(id()), Some(7), object));
            assert_eq!(frame.object_bytes(), object.len());
        }
    }

    #[test]
    fn the_members_of_a_frame_may_come_in_either_order_and_with_blanks() {
        let spaced = format!(" {{ \"type\" : \"text\" ,\n\"seq\": 3, \"turn_id\": \"{TURN}\" , \"text\": \"x\" }} \n");
        let frame = AnswerFrame::parse(&spaced).unwrap();
        let mut object = String::new();
        frame.object(&mut object);
        assert_eq!((frame.turn, frame.seq, object.as_str()), (Some(id()), Some(3), "{ \"text\": \"x\" }"));
        let bare = AnswerFrame::parse(r#"{"type":"error","code":"overloaded"}"#).unwrap();
        assert_eq!((bare.name, bare.turn, bare.seq, bare.taken), ("error", None, None, None));
        let mut out = Vec::new();
        untaken(&mut out, format!("{{\"turn_id\":\"{TURN}\",\"code\":\"draining\"}}").as_bytes());
        let text = String::from_utf8(out).unwrap();
        let refused = AnswerFrame::parse(&text).unwrap();
        assert_eq!((refused.name, refused.turn, refused.seq, refused.taken), ("error", Some(id()), None, Some(false)));
    }

    #[test]
    fn a_frame_that_could_be_read_in_two_ways_is_none() {
        for text in [
            "".to_owned(),
            "[]".into(),
            "{".into(),
            "{}".into(),
            r#"{"turn_id":"x","type":"text"}"#.into(),
            r#"{"type":7}"#.into(),
            r#"{"type":"te\u0078t"}"#.into(),
            r#"{"type":"text","turn_id":"secret"}"#.into(),
            r#"{"type":"text","seq":-1}"#.into(),
            r#"{"type":"text","seq":99999999999999999999}"#.into(),
            r#"{"type":"text","seq":1"#.into(),
            format!(r#"{{"type":"text","turn_id":"{TURN}","turn_id":"{TURN}"}}"#),
            r#"{"type":"text","type":"done"}"#.into(),
            r#"{"type":"text","seq":1,"seq":2}"#.into(),
            r#"{"type":"text"}{"type":"text""#.into(),
            r#"{"type":"text", }"#.into(),
        ] {
            let malformed = AnswerFrame::parse(&text).unwrap_err();
            assert!(!malformed.to_string().contains("secret"), "{malformed}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd_for_a_reader_of_frames(text in "[\\{\\}\\[\\]\":,\\\\a-z0-9 é]{0,60}") {
            if let Ok(frame) = AnswerFrame::parse(&text) {
                let mut object = String::new();
                frame.object(&mut object);
                prop_assert_eq!(object.len(), frame.object_bytes());
            }
        }
    }
}
