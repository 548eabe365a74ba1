//! Walks a JSON document once and writes what it says straight into a batch; no tree and no string is built on the way.

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{MAX_INDEX, Malformed};
use crate::{Batch, Span};

/// Walks one document, which must be an object.
pub(super) fn walk<'de, T: Shape<'de>>(data: &'de str, shape: T) -> Result<T, Malformed> {
    if !data.trim_ascii_start().starts_with('{') {
        return Err(Malformed::new("expected an object", data));
    }
    let mut json = serde_json::Deserializer::from_str(data);
    Object(shape).deserialize(&mut json).and_then(|shape| json.end().map(|()| shape)).map_err(|error| Malformed::from_json(&error, data))
}

/// Whether a payload can stand in one line as it is. A control character in JSON is white space between members, or in a
/// string where it must not be.
pub(super) fn is_one_line(data: &str) -> bool {
    // A fold without a way out early: so it is eight instructions per 32 bytes, where `any` looks at each byte alone.
    !data.bytes().fold(false, |control, byte| control | (byte < b' '))
}

/// An id or a model's name: at most 256 printable characters that need no escape.
pub(super) fn is_label(text: &str) -> bool {
    text.len() <= 256 && text.bytes().all(|b| matches!(b, b' '..=b'~') && !matches!(b, b'"' | b'\\'))
}

/// A kind of JSON object: its known members, and what is done with each.
pub(super) trait Shape<'de> {
    /// The names that are known, at most 32.
    const NAMES: &'static [&'static str];
    /// What to clear when something is not plain.
    fn plain(&mut self) -> &mut bool;
    /// Takes the value of the member of this name.
    fn member<A: MapAccess<'de>>(&mut self, name: &'static str, map: &mut A) -> Result<(), A::Error>;
}

/// Reads an object (or null) by its known members. Unknown and repeated ones are not plain: readers disagree on which of
/// two members of one name counts.
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Shape<'de>> DeserializeSeed<'de> for Object<T> {
    type Value = T;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<T, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de, T: Shape<'de>> Visitor<'de> for Object<T> {
    type Value = T;
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }
    fn visit_unit<E>(self) -> Result<T, E> {
        Ok(self.0)
    }
    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<T, A::Error> {
        let mut seen = 0u32;
        while let Some(known) = map.next_key_seed(Name(T::NAMES))? {
            match known {
                Some((at, name)) => {
                    if seen & (1 << at) != 0 {
                        *self.0.plain() = false;
                    }
                    seen |= 1 << at;
                    self.0.member(name, &mut map)?;
                }
                None => {
                    *self.0.plain() = false;
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(self.0)
    }
}

/// Reads a member's name as its place in a table.
struct Name(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Option<(usize, &'static str)>;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<(usize, &'static str)>, D::Error> {
        from.deserialize_identifier(self)
    }
}

impl Visitor<'_> for Name {
    type Value = Option<(usize, &'static str)>;
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a name")
    }
    fn visit_str<E>(self, name: &str) -> Result<Option<(usize, &'static str)>, E> {
        Ok(self.0.iter().copied().enumerate().find(|(_, known)| *known == name))
    }
}

/// A text now in the batch, and whether it stands there as it was written: half a surrogate pair cannot.
pub(super) struct Words {
    pub(super) span: Span,
    pub(super) exact: bool,
}

/// Reads a text (or null) into the batch.
pub(super) struct Kept<'b>(pub(super) &'b mut Batch);

impl<'de> DeserializeSeed<'de> for Kept<'_> {
    type Value = Option<Words>;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Words>, D::Error> {
        from.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Kept<'_> {
    type Value = Option<Words>;
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a text or null")
    }
    fn visit_none<E>(self) -> Result<Option<Words>, E> {
        Ok(None)
    }
    // As bytes, since only so does serde_json let half a surrogate pair through: as three bytes, ED A0..BF 80..BF.
    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Option<Words>, D::Error> {
        from.deserialize_bytes(self)
    }
    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Option<Words>, E> {
        Ok(Some(match std::str::from_utf8(bytes) {
            Ok(text) => Words { span: self.0.keep_text(text), exact: true },
            Err(_) => Words { span: self.0.keep_text_with(|text| push_replacing(text, bytes)), exact: false },
        }))
    }
}

/// Appends text in which each half of a surrogate pair becomes one U+FFFD.
fn push_replacing(text: &mut String, bytes: &[u8]) {
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        // Of the three bytes the first begins the half, and the other two are invalid on their own.
        if chunk.invalid().first().is_some_and(|byte| *byte == 0xed) {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Reads a number (or null).
pub(super) struct Number;

impl<'de> DeserializeSeed<'de> for Number {
    type Value = Option<u64>;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<u64>, D::Error> {
        from.deserialize_any(self)
    }
}

impl Visitor<'_> for Number {
    type Value = Option<u64>;
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a number or null")
    }
    fn visit_unit<E>(self) -> Result<Option<u64>, E> {
        Ok(None)
    }
    fn visit_u64<E>(self, number: u64) -> Result<Option<u64>, E> {
        Ok(Some(number))
    }
    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<Option<u64>, E> {
        Err(E::custom("negative"))
    }
    fn visit_f64<E>(self, number: f64) -> Result<Option<u64>, E> {
        // Some servers write seconds with a fraction. The cast saturates.
        Ok(Some(number as u64))
    }
}

/// Reads anything; gives whether it was free of text: null, a number, a yes or no, an empty text, a list of such.
pub(super) struct Blank;

impl<'de> DeserializeSeed<'de> for Blank {
    type Value = bool;
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<bool, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Blank {
    type Value = bool;
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("anything")
    }
    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(true)
    }
    fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
        Ok(true)
    }
    fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
        Ok(true)
    }
    fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
        Ok(true)
    }
    fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
        Ok(true)
    }
    fn visit_str<E>(self, text: &str) -> Result<bool, E> {
        Ok(text.is_empty())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
        let mut blank = true;
        while let Some(entry) = list.next_element_seed(Blank)? {
            blank &= entry;
        }
        Ok(blank)
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let mut blank = true;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            blank = false;
        }
        Ok(blank)
    }
}

/// Reads an object of numbers under known names, as servers count their time and their tokens.
pub(super) struct Figures<'b>(pub(super) &'b mut bool, pub(super) &'static [&'static str]);

impl<'de> DeserializeSeed<'de> for Figures<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Figures<'_> {
    type Value = ();
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of numbers")
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(known) = map.next_key_seed(Name(self.1))? {
            let blank = map.next_value_seed(Blank)?;
            *self.0 &= known.is_some() && blank;
        }
        Ok(())
    }
}

/// Something that reads the entries of a list, one by one.
pub(super) trait Entries<'de> {
    /// Takes the entry at `position`; `None` where the list has ended.
    fn entry<A: SeqAccess<'de>>(&mut self, position: u16, list: &mut A) -> Result<Option<()>, A::Error>;
}

/// Reads a list (or null).
pub(super) struct List<'e, T>(pub(super) &'e mut T);

impl<'de, T: Entries<'de>> DeserializeSeed<'de> for List<'_, T> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de, T: Entries<'de>> Visitor<'de> for List<'_, T> {
    type Value = ();
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list")
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut position = 0;
        while self.0.entry(position, &mut list)?.is_some() {
            position += 1;
            if position > MAX_INDEX {
                return list.next_element::<IgnoredAny>()?.map_or(Ok(()), |_| Err(A::Error::custom("too many entries")));
            }
        }
        Ok(())
    }
}
