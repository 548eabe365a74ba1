//! Reads settings from a tree through serde, and finds every fault instead of the first.
//!
//! serde stops where something is wrong. That node is noted and struck out, and the tree is read again, until it reads or the
//! root is gone. What is missing only because it was struck out is not told twice.

use std::{collections::HashSet, fmt};

use serde::{
    Deserializer,
    de::{self, DeserializeOwned, DeserializeSeed, EnumAccess, Expected, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor},
    forward_to_deserialize_any,
};

use crate::{
    fault::{Fault, MOST, did_you_mean},
    tree::{Key, Node, Path, Place, Scalar, Source, Step, Value},
};

/// Reads a `T`; `None` where too little is left of it. `struck` gains the paths that were taken out.
pub(crate) fn read<T: DeserializeOwned>(
    tree: &mut Node,
    sources: &[Source],
    struck: &mut HashSet<Path>,
    faults: &mut Vec<Fault>,
) -> Option<T> {
    loop {
        let error = match T::deserialize(Reader(tree)) {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let path = Path(error.path.iter().rev().cloned().collect());
        if !error.why.follows_from(struck, &path) {
            faults.push(error.why.fault(sources, tree, &path));
        }
        if faults.len() >= MOST || !tree.strike(&path) {
            return None;
        }
        struck.insert(path);
    }
}

/// Why a node cannot be read, and the way to it, innermost step first.
#[derive(Debug)]
pub(crate) struct Error {
    path: Vec<Step>,
    why: Why,
}

#[derive(Debug)]
enum Why {
    Unknown { name: String, expected: &'static [&'static str] },
    UnknownWord { word: String, expected: &'static [&'static str] },
    Missing(&'static str),
    Wrong { found: String, expected: String },
    Said(String),
}

impl Error {
    fn within(mut self, step: Step) -> Error {
        self.path.push(step);
        self
    }
}

impl Why {
    /// Whether it is so only because something within was struck out, and told.
    fn follows_from(&self, struck: &HashSet<Path>, path: &Path) -> bool {
        let mut within = struck.iter().filter(|struck| struck.starts_with(path) && struck.0.len() > path.0.len());
        match self {
            // What was misspelled is missing too.
            Why::Missing(field) => within.any(|struck| match struck.0.get(path.0.len()) {
                Some(Step::Key(name)) => name == field || !did_you_mean(name, [*field]).is_empty(),
                Some(Step::Index(_)) | None => false,
            }),
            Why::Unknown { .. } | Why::UnknownWord { .. } => false,
            Why::Wrong { .. } | Why::Said(_) => within.next().is_some(),
        }
    }

    fn fault(self, sources: &[Source], tree: &Node, path: &Path) -> Fault {
        let at = |place: Place, found: String| Fault::at(sources, place, path, without_value(found, tree.find(path)));
        let cannot_be = |found: String| format!("`{}` cannot be {found}", path.last());
        let value = tree.place(path);
        let key = tree.key_place(path).unwrap_or(value);
        let list = |words: &[&str]| words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ");
        match self {
            Why::Unknown { name, expected } => {
                let near = did_you_mean(&name, expected.iter().copied());
                at(key, format!("unknown setting `{name}`{near}")).expected(if expected.is_empty() {
                    "no settings here".into()
                } else {
                    format!("one of {}", list(expected))
                })
            }
            Why::UnknownWord { word, expected } => {
                let near = did_you_mean(&word, expected.iter().copied());
                at(value, cannot_be(format!("`{word}`{near}"))).expected(format!("one of {}", list(expected)))
            }
            Why::Missing(field) => at(key, format!("`{field}` is missing")).remedy(format!("add `{field}`")),
            Why::Wrong { found, expected } => at(value, cannot_be(found)).expected(expected),
            Why::Said(said) => match said.split_once("` is not ") {
                // "`80` is not a duration: ...": our own quantities, and the like.
                Some((found, expected)) if found.starts_with('`') => at(value, cannot_be(format!("{found}`"))).expected(expected),
                _ => {
                    let (found, more) = said.split_once("; ").or_else(|| said.split_once(": expected ")).unwrap_or((&said, ""));
                    let place = if said.starts_with("unknown filter") { key } else { value };
                    at(place, found.to_owned()).expected(more.strip_prefix("expected ").unwrap_or(more))
                }
            },
        }
    }
}

/// What a visitor says may quote the value. Where it came from a variable, the variable is shown instead.
fn without_value(said: String, node: Option<&Node>) -> String {
    match node.map(|node| &node.value) {
        Some(Value::Scalar(Scalar { text, written: Some(written), .. })) if !text.is_empty() => said.replace(text.as_str(), written),
        _ => said,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.why)
    }
}

impl std::error::Error for Error {}

impl From<Why> for Error {
    fn from(why: Why) -> Error {
        Error { path: Vec::new(), why }
    }
}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Error {
        Why::Said(message.to_string()).into()
    }

    fn unknown_field(name: &str, expected: &'static [&'static str]) -> Error {
        Why::Unknown { name: name.to_owned(), expected }.into()
    }

    fn unknown_variant(word: &str, expected: &'static [&'static str]) -> Error {
        Why::UnknownWord { word: word.to_owned(), expected }.into()
    }

    fn missing_field(field: &'static str) -> Error {
        Why::Missing(field).into()
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Error {
        Why::Wrong { found: words_for(found), expected: kind_of(&expected.to_string()) }.into()
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Error {
        de::Error::invalid_type(found, expected)
    }
}

fn words_for(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Bool(value) => format!("`{value}`"),
        Unexpected::Unsigned(value) => format!("`{value}`"),
        Unexpected::Signed(value) => format!("`{value}`"),
        Unexpected::Float(value) => format!("`{value}`"),
        Unexpected::Str(value) => format!("`{value}`"),
        Unexpected::Unit => "nothing".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a map of settings".to_owned(),
        other => other.to_string(),
    }
}

/// What Rust's types are called by people who write configs.
fn kind_of(expected: &str) -> String {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number, perhaps below 0".to_owned(),
        expected if expected.starts_with("a nonzero ") => "a whole number above 0".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a string" => "a text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a map of settings".to_owned(),
        expected if expected.starts_with("struct ") => "a map of settings".to_owned(),
        expected if expected.starts_with("enum ") => "a word".to_owned(),
        other => other.to_owned(),
    }
}

/// Reads one node.
struct Reader<'a>(&'a Node);

impl<'a> Reader<'a> {
    fn wrong<'de, T>(&self, visitor: impl Visitor<'de, Value = T>) -> Result<T, Error> {
        let found = match &self.0.value {
            Value::Scalar(scalar) if scalar.is_null() => "nothing".to_owned(),
            Value::Scalar(scalar) => format!("`{}`", scalar.text),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map of settings".to_owned(),
        };
        let expected = kind_of(&(&visitor as &dyn Expected).to_string());
        Err(Why::Wrong { found, expected }.into())
    }

    /// The scalar, if it is not nothing.
    fn scalar(&self) -> Option<&'a Scalar> {
        match &self.0.value {
            Value::Scalar(scalar) if !scalar.is_null() => Some(scalar),
            Value::Scalar(_) | Value::List(_) | Value::Map(_) => None,
        }
    }

    /// The scalar read as a number or a truth; quoted ones are texts.
    fn plain<T: std::str::FromStr>(&self) -> Option<T> {
        self.scalar().filter(|scalar| scalar.plain || scalar.written.is_some()).and_then(|scalar| scalar.text.parse().ok())
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self.plain::<$type>() {
                Some(number) => visitor.$visit(number),
                None => self.wrong(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.0.value {
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) => self.deserialize_map(visitor),
            Value::Scalar(scalar) if scalar.is_null() => visitor.visit_unit(),
            Value::Scalar(scalar) if !scalar.plain => visitor.visit_str(&scalar.text),
            Value::Scalar(scalar) => match scalar.text.as_str() {
                "true" => visitor.visit_bool(true),
                "false" => visitor.visit_bool(false),
                text => match (text.parse(), text.parse(), text.parse::<f64>()) {
                    (Ok(number), _, _) => visitor.visit_u64(number),
                    (_, Ok(number), _) => visitor.visit_i64(number),
                    (_, _, Ok(number)) if number.is_finite() => visitor.visit_f64(number),
                    _ => visitor.visit_str(text),
                },
            },
        }
    }

    numbers! {
        deserialize_bool visit_bool bool,
        deserialize_i8 visit_i8 i8,
        deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64,
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64,
        deserialize_f32 visit_f32 f32,
        deserialize_f64 visit_f64 f64,
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.scalar() {
            // As it is written: `1.10` is no number where a text is wanted.
            Some(scalar) => visitor.visit_str(&scalar.text),
            None => self.wrong(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.0.value {
            Value::Scalar(scalar) if scalar.is_null() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.0.value {
            Value::List(list) => visitor.visit_seq(Elements(list.iter())),
            Value::Scalar(_) | Value::Map(_) => self.wrong(visitor),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.0.value {
            Value::Map(entries) => visitor.visit_map(Entries { entries: entries.iter(), value: None }),
            Value::Scalar(_) | Value::List(_) => self.wrong(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(self, _: &'static str, _: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(self, _: &'static str, _: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        match &self.0.value {
            Value::Scalar(scalar) if !scalar.is_null() => visitor.visit_enum(de::value::StrDeserializer::new(&scalar.text)),
            Value::Map(entries) => match entries.as_slice() {
                [(key, value)] => visitor.visit_enum(Variant { key, value }),
                _ => self.wrong(visitor),
            },
            Value::Scalar(_) | Value::List(_) => self.wrong(visitor),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! { i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct }
}

struct Elements<'a>(std::slice::Iter<'a, (usize, Node)>);

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let Some((index, node)) = self.0.next() else { return Ok(None) };
        seed.deserialize(Reader(node)).map(Some).map_err(|error| error.within(Step::Index(*index)))
    }
}

struct Entries<'a> {
    entries: std::slice::Iter<'a, (Key, Node)>,
    value: Option<&'a (Key, Node)>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.value = self.entries.next();
        let Some((key, _)) = self.value else { return Ok(None) };
        let name = de::value::StrDeserializer::<Error>::new(&key.name);
        seed.deserialize(name).map(Some).map_err(|error| error.within(Step::Key(key.name.clone())))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (key, node) = self.value.ok_or_else(|| Error::from(Why::Said("a value without a key".to_owned())))?;
        seed.deserialize(Reader(node)).map_err(|error| error.within(Step::Key(key.name.clone())))
    }
}

struct Variant<'a> {
    key: &'a Key,
    value: &'a Node,
}

impl<'de, 'a> EnumAccess<'de> for Variant<'a> {
    type Error = Error;
    type Variant = Variant<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Variant<'a>), Error> {
        let name = de::value::StrDeserializer::<Error>::new(&self.key.name);
        let value = seed.deserialize(name).map_err(|error| error.within(Step::Key(self.key.name.clone())))?;
        Ok((value, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Err(Why::Wrong { found: "a map of settings".into(), expected: "a word".into() }.into())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(Reader(self.value)).map_err(|error| error.within(Step::Key(self.key.name.clone())))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        Reader(self.value).deserialize_seq(visitor).map_err(|error| error.within(Step::Key(self.key.name.clone())))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        Reader(self.value).deserialize_map(visitor).map_err(|error| error.within(Step::Key(self.key.name.clone())))
    }
}
