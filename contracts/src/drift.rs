//! Says how two versions of a document differ, and whether whoever knows the older can go on with the newer.
//!
//! What is plainly an addition is one: an optional member, a value of an enumeration, a variant, a call, an error code. What
//! changes only words is told as such. Everything else breaks somebody: a member that is gone, renamed, of another type, or
//! suddenly required, and a bound that moved. Of what goes over the wire it is not asked who reads and who writes: one rule for both
//! is the stricter. What we alone read, as the config, may also ask for less than it did: that is an addition.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde_json::{Map, Value};

/// The version of all contracts together. What was promised last is kept in `contracts/frozen/`; a test asks for the version that
/// the changes since then need.
pub const VERSION: &str = "1.1.0";

/// How much a change asks of those who know the older version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// Nothing: only explanations differ. Asks for a patch.
    Words,
    /// Nothing, if they let pass what they do not know. Asks for a minor version.
    Addition,
    /// They must change. Asks for a major version.
    Break,
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Weight::Words => "words",
            Weight::Addition => "addition",
            Weight::Break => "BREAKS",
        })
    }
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// How much it asks.
    pub weight: Weight,
    /// Where: names from the top, with `/` between them.
    pub at: String,
    /// What, for people.
    pub what: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = if self.at.is_empty() { "/" } else { &self.at };
        write!(f, "{:<8}  {at}: {}", self.weight, self.what)
    }
}

/// How the document `new` differs from `old`: two JSON documents, or two tables of errors.
pub fn changes(old: &str, new: &str) -> Vec<Change> {
    Found::default().between(old, new)
}

/// The same of a schema for what we read and never write: to take more than before breaks nobody.
pub fn changes_of_what_is_read(old: &str, new: &str) -> Vec<Change> {
    Found { is_read: true, ..Found::default() }.between(old, new)
}

/// A version of contracts: breaks, additions, words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The least version that may follow this one with changes of that weight.
    pub fn after(self, weight: Option<Weight>) -> Version {
        match weight {
            None => self,
            Some(Weight::Words) => Version(self.0, self.1, self.2 + 1),
            Some(Weight::Addition) => Version(self.0, self.1 + 1, 0),
            Some(Weight::Break) => Version(self.0 + 1, 0, 0),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl FromStr for Version {
    type Err = String;
    fn from_str(text: &str) -> Result<Version, String> {
        let numbers: Option<Vec<u32>> = text.split('.').map(|part| part.parse().ok()).collect();
        match numbers.as_deref() {
            Some([major, minor, patch]) => Ok(Version(*major, *minor, *patch)),
            _ => Err(format!("`{text}` is no version such as 1.0.0")),
        }
    }
}

/// Members that only explain.
const WORDS: [&str; 10] = ["$schema", "title", "description", "summary", "examples", "$comment", "info", "tags", "license", "deprecated"];
/// Members that bound from above, and from below.
const ABOVE: [&str; 5] = ["maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"];
const BELOW: [&str; 5] = ["minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"];
/// Members whose value maps names to things: a name more is an addition, a name less a break.
const NAMED: [&str; 12] = [
    "properties",
    "$defs",
    "definitions",
    "components",
    "schemas",
    "messages",
    "channels",
    "operations",
    "responses",
    "content",
    "headers",
    "securitySchemes",
];

#[derive(Default)]
struct Found {
    changes: Vec<Change>,
    /// Whether what the schema is of is only read by us.
    is_read: bool,
}

impl Found {
    fn between(mut self, old: &str, new: &str) -> Vec<Change> {
        match (serde_json::from_str(old), serde_json::from_str(new)) {
            (Ok(old), Ok(new)) => self.node("", &old, &new),
            _ => self.table(old, new),
        }
        self.changes
    }

    fn add(&mut self, weight: Weight, at: &str, what: String) {
        self.changes.push(Change { weight, at: at.to_owned(), what });
    }

    /// The weight of asking for less than before.
    fn less(&self) -> Weight {
        if self.is_read { Weight::Addition } else { Weight::Break }
    }

    /// A schema, or a part of a document that is built like one: its members are keywords.
    fn node(&mut self, at: &str, old: &Value, new: &Value) {
        let (Value::Object(old), Value::Object(new)) = (old, new) else {
            if old != new {
                self.add(Weight::Break, at, format!("was {}, is {}", short(old), short(new)));
            }
            return;
        };
        let keywords: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for keyword in keywords {
            let (was, is) = (old.get(keyword), new.get(keyword));
            if was == is {
                continue;
            }
            let at = format!("{at}/{keyword}");
            match (keyword.as_str(), was, is) {
                (word, _, _) if WORDS.contains(&word) => self.add(Weight::Words, &at, "was said differently".into()),
                ("properties", was, is) => self.members(&at, map(was), map(is), new.get("required")),
                ("required", was, is) if !matches!(was.or(is), Some(Value::Bool(_))) => self.required(&at, was, is, old, new),
                ("enum", Some(Value::Array(was)), Some(Value::Array(is))) => self.set(&at, &keyed(was, short), &keyed(is, short)),
                ("oneOf" | "anyOf", Some(Value::Array(was)), Some(Value::Array(is))) => {
                    self.set(&at, &keyed(was, variant), &keyed(is, variant))
                }
                ("parameters", Some(Value::Array(was)), Some(Value::Array(is))) => {
                    let name = |parameter: &Value| parameter.get("name").map_or_else(|| short(parameter), short);
                    self.set(&at, &keyed(was, name), &keyed(is, name));
                }
                ("messages", Some(Value::Array(was)), Some(Value::Array(is))) => self.set(&at, &keyed(was, short), &keyed(is, short)),
                // Kinds of things by name, and in each the things by theirs.
                ("paths" | "components", Some(Value::Object(was)), Some(Value::Object(is))) => {
                    self.names(&at, was, is, &mut |found, at, was, is| found.names(at, map(Some(was)), map(Some(is)), &mut Found::node));
                }
                // OpenAPI names headers, AsyncAPI has a schema of them.
                ("headers", Some(was), Some(is)) if was.get("properties").is_some() => self.node(&at, was, is),
                (named, was, is) if NAMED.contains(&named) && !matches!(was.or(is), Some(Value::Array(_))) => {
                    self.names(&at, map(was), map(is), &mut Found::node);
                }
                (word, was, is) if asks_less(word, was, is) => {
                    let or_none = |value: Option<&Value>| value.map_or_else(|| "nothing".to_owned(), short);
                    self.add(self.less(), &at, format!("was {}, is {}", or_none(was), or_none(is)));
                }
                (_, Some(Value::Array(was)), Some(Value::Array(is))) if was.len() == is.len() => {
                    for (n, (was, is)) in was.iter().zip(is).enumerate() {
                        self.node(&format!("{at}/{n}"), was, is);
                    }
                }
                (_, Some(was), Some(is)) => self.node(&at, was, is),
                (_, Some(was), None) => self.add(Weight::Break, &at, format!("was {}, is gone", short(was))),
                (_, None, Some(is)) => self.add(Weight::Break, &at, format!("is new: {}", short(is))),
                (_, None, None) => {}
            }
        }
    }

    /// The members of an object.
    fn members(&mut self, at: &str, old: &Map<String, Value>, new: &Map<String, Value>, required: Option<&Value>) {
        let required = texts(required);
        for name in new.keys().filter(|name| !old.contains_key(*name) && required.contains(name.as_str())) {
            self.add(Weight::Break, &format!("{at}/{name}"), "is new, and required".into());
        }
        self.names(at, old, new, &mut Found::node);
    }

    /// What members must be there.
    fn required(&mut self, at: &str, was: Option<&Value>, is: Option<&Value>, old: &Map<String, Value>, new: &Map<String, Value>) {
        let (was, is) = (texts(was), texts(is));
        let has = |schema: &Map<String, Value>, name: &str| map(schema.get("properties")).contains_key(name);
        // A member that is new, or gone, is told as such.
        for name in is.difference(&was).filter(|name| has(old, name)) {
            self.add(Weight::Break, at, format!("`{name}` was optional, is required"));
        }
        for name in was.difference(&is).filter(|name| has(new, name)) {
            self.add(self.less(), at, format!("`{name}` was always there, is optional"));
        }
    }

    /// Names and what they name.
    fn names(
        &mut self,
        at: &str,
        old: &Map<String, Value>,
        new: &Map<String, Value>,
        each: &mut dyn FnMut(&mut Found, &str, &Value, &Value),
    ) {
        for (name, was) in old {
            let at = format!("{at}/{name}");
            match new.get(name) {
                None => self.add(Weight::Break, &at, "is gone, or has another name".into()),
                Some(is) if is != was => each(self, &at, was, is),
                Some(_) => {}
            }
        }
        for name in new.keys().filter(|name| !old.contains_key(*name)) {
            self.add(Weight::Addition, &format!("{at}/{name}"), "is new".into());
        }
    }

    /// Things in a list whose order says nothing.
    fn set(&mut self, at: &str, old: &BTreeMap<String, &Value>, new: &BTreeMap<String, &Value>) {
        for (name, was) in old {
            match new.get(name) {
                None => self.add(Weight::Break, at, format!("{name} is gone")),
                Some(is) if is != was => self.node(&format!("{at}/{name}"), was, is),
                Some(_) => {}
            }
        }
        for (name, is) in new.iter().filter(|(name, _)| !old.contains_key(*name)) {
            let asked = is.get("required") == Some(&Value::Bool(true));
            self.add(if asked { Weight::Break } else { Weight::Addition }, at, format!("{name} is new"));
        }
    }

    /// Rows of a Markdown table, by their first cell; the last cell explains.
    fn table(&mut self, old: &str, new: &str) {
        let (was, is) = (rows(old), rows(new));
        for (name, cells) in &was {
            match is.get(name) {
                None => self.add(Weight::Break, name, "is gone".into()),
                Some(now) if now == cells => {}
                Some(now) if now.split_last().map(|(_, rest)| rest) == cells.split_last().map(|(_, rest)| rest) => {
                    self.add(Weight::Words, name, "was said differently".into());
                }
                Some(now) => self.add(Weight::Break, name, format!("was {}, is {}", cells.join(" | "), now.join(" | "))),
            }
        }
        for name in is.keys().filter(|name| !was.contains_key(*name)) {
            self.add(Weight::Addition, name, "is new".into());
        }
        if self.changes.is_empty() && old != new {
            self.add(Weight::Words, "", "was said differently".into());
        }
    }
}

/// Whether a keyword that changed lets through all that it did, and more.
fn asks_less(keyword: &str, was: Option<&Value>, is: Option<&Value>) -> bool {
    let number = |value: Option<&Value>| value.and_then(Value::as_f64);
    match keyword {
        word if ABOVE.contains(&word) => is.is_none() || number(was).zip(number(is)).is_some_and(|(was, is)| is > was),
        word if BELOW.contains(&word) => is.is_none() || number(was).zip(number(is)).is_some_and(|(was, is)| is < was),
        "pattern" => is.is_none(),
        "additionalProperties" => was == Some(&Value::Bool(false)) && is.is_none_or(|is| *is == Value::Bool(true)),
        "type" => match (was, is) {
            (Some(Value::String(was)), Some(Value::Array(is))) => is.iter().any(|is| is == was),
            (Some(Value::Array(was)), Some(Value::Array(is))) => was.iter().all(|was| is.contains(was)),
            _ => false,
        },
        _ => false,
    }
}

fn map(value: Option<&Value>) -> &Map<String, Value> {
    static NONE: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    value.and_then(Value::as_object).unwrap_or(&NONE)
}

fn texts(value: Option<&Value>) -> BTreeSet<&str> {
    value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

/// A list by the names of what is in it; one that has another's name gets its place to it, so that none is overlooked.
fn keyed(list: &[Value], name: impl Fn(&Value) -> String) -> BTreeMap<String, &Value> {
    let mut all = BTreeMap::new();
    for (n, value) in list.iter().enumerate() {
        let name = name(value);
        let name = if all.contains_key(&name) { format!("{name} at {n}") } else { name };
        all.insert(name, value);
    }
    all
}

/// What tells a variant from its siblings: a constant, in it or in a member of it, what it refers to, that it lists words, its only
/// member, or its type.
fn variant(schema: &Value) -> String {
    let member = |member: &Value| member.get("const").cloned();
    let tag = schema.get("const").cloned().or_else(|| map(schema.get("properties")).values().find_map(member));
    if let Some(name) = tag.as_ref().or_else(|| schema.get("$ref")) {
        return short(name);
    }
    if schema.get("enum").is_some() {
        return "a word".to_owned();
    }
    // Of objects that have one member each, that one.
    let mut members = map(schema.get("properties")).keys();
    match (members.next(), members.next()) {
        (Some(only), None) => format!("an object of `{only}`"),
        _ => schema.get("type").map_or_else(|| short(schema), short),
    }
}

fn rows(table: &str) -> BTreeMap<String, Vec<String>> {
    let lines = table.lines().filter_map(|line| line.strip_prefix("| `"));
    lines
        .filter_map(|line| line.split_once("` |"))
        .map(|(name, rest)| (name.to_owned(), rest.split('|').map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).collect()))
        .collect()
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, path::Path};

    use serde_json::json;

    use super::*;
    use crate::schema::documents;

    fn weight(old: &Value, new: &Value) -> Option<Weight> {
        heaviest(Found::default(), old, new)
    }

    /// The same of what is only read.
    fn weight_of_read(old: &Value, new: &Value) -> Option<Weight> {
        heaviest(Found { is_read: true, ..Found::default() }, old, new)
    }

    // Of values, not of texts: thousands of documents are weighed below.
    fn heaviest(mut found: Found, old: &Value, new: &Value) -> Option<Weight> {
        found.node("", old, new);
        found.changes.into_iter().map(|change| change.weight).max()
    }

    /// All differences of two sets of documents.
    fn between(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> Vec<Change> {
        let mut all = Vec::new();
        for (name, was) in old {
            match new.get(name) {
                Some(is) => all.extend(changes(was, is).into_iter().map(|change| Change { at: format!("{name}{}", change.at), ..change })),
                None => all.push(Change { weight: Weight::Break, at: name.clone(), what: "the document is gone".into() }),
            }
        }
        let added = new.keys().filter(|name| !old.contains_key(*name));
        all.extend(added.map(|name| Change { weight: Weight::Addition, at: name.clone(), what: "the document is new".into() }));
        all
    }

    /// The least version for `new` after `old` was promised, and why.
    fn needed(promised: Version, old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> (Version, Vec<Change>) {
        let found = between(old, new);
        (promised.after(found.iter().map(|change| change.weight).max()), found)
    }

    fn now() -> BTreeMap<String, String> {
        documents().into_iter().map(|(name, text)| (name.to_owned(), text)).collect()
    }

    /// `HEADGATE_FREEZE=1` promises what is there now, under the version it has: part of a release.
    #[test]
    fn a_change_of_what_was_promised_has_the_version_it_needs() {
        let frozen = Path::new(env!("CARGO_MANIFEST_DIR")).join("frozen");
        let version: Version = VERSION.parse().unwrap();
        if env::var_os("HEADGATE_FREEZE").is_some() {
            let _ = fs::remove_dir_all(&frozen);
            for (name, text) in now() {
                let path = frozen.join(VERSION).join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
        let folders: Vec<_> = fs::read_dir(&frozen).unwrap().map(|entry| entry.unwrap()).collect();
        let [folder] = folders.as_slice() else { panic!("contracts/frozen/ has one folder, the version promised last") };
        let promised: Version = folder.file_name().to_str().unwrap().parse().unwrap();
        let mut old = BTreeMap::new();
        for part in ["", "events/"] {
            for entry in fs::read_dir(folder.path().join(part)).unwrap().map(|entry| entry.unwrap()).filter(|entry| entry.path().is_file())
            {
                old.insert(format!("{part}{}", entry.file_name().to_str().unwrap()), fs::read_to_string(entry.path()).unwrap());
            }
        }
        let (least, found) = needed(promised, &old, &now());
        let heaviest = found.iter().map(|change| change.weight).max();
        let list: Vec<String> = found.iter().filter(|change| Some(change.weight) == heaviest).map(Change::to_string).collect();
        assert!(
            version >= least,
            "the contracts promised as {promised} changed: raise VERSION in contracts/src/drift.rs from {version} to {least}\n{}",
            list.join("\n")
        );
    }

    #[test]
    fn a_planted_break_needs_a_major_version_and_a_planted_addition_a_minor_one() {
        let (all, promised) = (now(), Version(1, 2, 3));
        let planted = |from: &str, to: &str| {
            let mut new = all.clone();
            let text = new.get_mut("done.json").unwrap();
            assert!(text.contains(from), "{text}");
            *text = text.replacen(from, to, 1);
            needed(promised, &all, &new).0
        };
        assert_eq!(planted("\"outcome\": {", "\"outcome\": {"), promised);
        assert_eq!(planted("\"outcome\": {", "\"mood\": { \"type\": \"string\" }, \"outcome\": {"), Version(1, 3, 0));
        assert_eq!(planted("\"outcome\": {", "\"result\": {"), Version(2, 0, 0));
    }

    fn sample() -> Value {
        json!({
            "title": "A turn", "type": "object", "additionalProperties": false, "required": ["id", "kind"],
            "properties": {
                "id": {"type": "string", "maxLength": 64, "description": "Its name."},
                "kind": {"$ref": "#/$defs/Kind"},
                "note": {"type": "string"},
                "end": {"oneOf": [
                    {"type": "object", "properties": {"how": {"const": "done"}, "text": {"type": "string"}}, "required": ["how"]},
                    {"type": "object", "properties": {"how": {"const": "cut"}}, "required": ["how"]},
                ]},
            },
            "$defs": {"Kind": {"type": "string", "enum": ["one", "two"]}},
        })
    }

    #[test]
    fn each_kind_of_change_has_its_weight() {
        let words: Option<Weight> = Some(Weight::Words);
        let addition = Some(Weight::Addition);
        let breaks = Some(Weight::Break);
        type Mutate = fn(&mut Value);
        let planted: [(&str, Option<Weight>, Mutate); 23] = [
            ("nothing", None, |_| {}),
            ("a description", words, |v| v["properties"]["id"]["description"] = json!("The name.")),
            ("a title", words, |v| v["title"] = json!("One turn")),
            ("a member that should not be used any more", words, |v| v["properties"]["note"]["deprecated"] = json!(true)),
            ("an optional member", addition, |v| v["properties"]["more"] = json!({"type": "integer"})),
            ("a value of an enumeration", addition, |v| v["$defs"]["Kind"]["enum"] = json!(["one", "two", "three"])),
            ("the order of an enumeration", None, |v| v["$defs"]["Kind"]["enum"] = json!(["two", "one"])),
            ("a definition", addition, |v| v["$defs"]["Other"] = json!({"type": "string"})),
            ("a variant", addition, |v| v["properties"]["end"]["oneOf"].as_array_mut().unwrap().insert(0, json!({"const": "late"}))),
            ("an optional member in a variant", addition, |v| {
                v["properties"]["end"]["oneOf"][1]["properties"]["why"] = json!({"type": "string"})
            }),
            ("the order of what is required", None, |v| v["required"] = json!(["kind", "id"])),
            ("a member that is gone", breaks, |v| drop(v["properties"].as_object_mut().unwrap().remove("note"))),
            ("a member with another name", breaks, |v| {
                let note = v["properties"].as_object_mut().unwrap().remove("note").unwrap();
                v["properties"]["notes"] = note;
            }),
            ("a member of another type", breaks, |v| v["properties"]["note"]["type"] = json!("integer")),
            ("a member that may be null", breaks, |v| v["properties"]["note"]["type"] = json!(["string", "null"])),
            ("a member made required", breaks, |v| v["required"] = json!(["id", "kind", "note"])),
            ("a new member that is required", breaks, |v| {
                v["properties"]["more"] = json!({"type": "integer"});
                v["required"] = json!(["id", "kind", "more"]);
            }),
            ("a member that may be missing", breaks, |v| v["required"] = json!(["id"])),
            ("a value that is gone", breaks, |v| v["$defs"]["Kind"]["enum"] = json!(["one"])),
            ("a variant that is gone", breaks, |v| drop(v["properties"]["end"]["oneOf"].as_array_mut().unwrap().pop())),
            ("a tighter bound", breaks, |v| v["properties"]["id"]["maxLength"] = json!(32)),
            ("a bound where none was", breaks, |v| v["properties"]["note"]["maxLength"] = json!(32)),
            ("other members allowed", breaks, |v| drop(v.as_object_mut().unwrap().remove("additionalProperties"))),
        ];
        for (what, expected, mutate) in planted {
            let mut new = sample();
            mutate(&mut new);
            assert_eq!(weight(&sample(), &new), expected, "{what}: {:?}", changes(&sample().to_string(), &new.to_string()));
        }
    }

    #[test]
    fn variants_are_known_by_what_tells_them_apart_and_not_by_their_place() {
        let object = |name: &str| json!({"type": "object", "properties": {name: {"type": "string"}}, "required": [name]});
        let old = json!({"anyOf": [{"enum": ["one", "two"]}, {"type": "string", "pattern": "x"}, object("auth"), object("budget")]});
        let mut new = old.clone();
        new["anyOf"][0]["enum"] = json!(["one", "two", "three"]);
        new["anyOf"].as_array_mut().unwrap().insert(2, object("accent"));
        assert_eq!(weight(&old, &new), Some(Weight::Addition), "{:?}", changes(&old.to_string(), &new.to_string()));
        assert_eq!(weight(&new, &old), Some(Weight::Break));
    }

    #[test]
    fn what_is_only_read_may_ask_for_less_and_not_for_more() {
        type Mutate = fn(&mut Value);
        let less: [(&str, Mutate); 7] = [
            ("a member that may be missing", |v| v["required"] = json!(["id"])),
            ("a wider bound", |v| v["properties"]["id"]["maxLength"] = json!(65)),
            ("no bound", |v| drop(v["properties"]["id"].as_object_mut().unwrap().remove("maxLength"))),
            ("a lower floor", |v| v["properties"]["count"]["minimum"] = json!(0)),
            ("another type beside", |v| v["properties"]["note"]["type"] = json!(["string", "null"])),
            ("other members allowed", |v| drop(v.as_object_mut().unwrap().remove("additionalProperties"))),
            ("no pattern", |v| drop(v["properties"]["count"].as_object_mut().unwrap().remove("pattern"))),
        ];
        let mut old = sample();
        old["properties"]["count"] = json!({"type": "integer", "minimum": 1, "pattern": "x"});
        for (what, mutate) in less {
            let mut new = old.clone();
            mutate(&mut new);
            assert_eq!(weight_of_read(&old, &new), Some(Weight::Addition), "{what}");
            assert_eq!(weight_of_read(&new, &old), Some(Weight::Break), "{what}, taken back");
            assert_eq!(weight(&old, &new), Some(Weight::Break), "{what}, of what others read");
        }
    }

    #[test]
    fn a_schema_among_the_components_may_be_new_and_may_not_go() {
        let one = json!({"components": {"schemas": {"Turn": sample()}}});
        let two = json!({"components": {"schemas": {"Turn": sample(), "Stage": {"type": "string"}}}});
        assert_eq!((weight(&one, &two), weight(&two, &one)), (Some(Weight::Addition), Some(Weight::Break)));
    }

    #[test]
    fn a_member_named_like_a_keyword_is_a_member() {
        let mut old = sample();
        old["properties"]["description"] = json!({"type": "string"});
        let mut new = old.clone();
        new["properties"]["description"]["type"] = json!("integer");
        assert_eq!(weight(&old, &new), Some(Weight::Break));
    }

    /// Every schema within a value, by its pointer, that has members.
    fn objects(at: &str, value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                if map.get("properties").is_some_and(Value::is_object) && map.get("type") == Some(&json!("object")) {
                    found.push(at.to_owned());
                }
                for (name, value) in map {
                    objects(&format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), value, found);
                }
            }
            Value::Array(list) => list.iter().enumerate().for_each(|(n, value)| objects(&format!("{at}/{n}"), value, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn a_break_planted_anywhere_in_any_document_is_found() {
        let mut planted = 0;
        for (name, text) in documents() {
            let Ok(old) = serde_json::from_str::<Value>(&text) else { continue };
            let mut places = Vec::new();
            objects("", &old, &mut places);
            for place in places {
                let members: Vec<String> = map(old.pointer(&place).unwrap().get("properties")).keys().cloned().collect();
                for member in members {
                    let changed = |change: &dyn Fn(&mut Value)| {
                        let mut new = old.clone();
                        change(new.pointer_mut(&place).unwrap());
                        planted += 1;
                        weight(&old, &new)
                    };
                    let mut changed = changed;
                    let about = format!("{name}{place}/{member}");
                    let gone = changed(&|schema| drop(schema["properties"].as_object_mut().unwrap().remove(&member)));
                    assert_eq!(gone, Some(Weight::Break), "{about} is gone");
                    let retyped = changed(&|schema| schema["properties"][&member] = json!({"type": "null"}));
                    assert_eq!(retyped, Some(Weight::Break), "{about} has another type");
                    let more = changed(&|schema| schema["properties"][format!("{member}_more")] = json!({"type": "string"}));
                    assert_eq!(more, Some(Weight::Addition), "{about} has a new sibling");
                    let required = changed(&|schema| {
                        let mut all: Vec<Value> = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
                        if all.contains(&json!(member)) {
                            all.retain(|name| *name != json!(member))
                        } else {
                            all.push(json!(member))
                        }
                        schema["required"] = all.into();
                    });
                    assert_eq!(required, Some(Weight::Break), "{about} is required, or no longer");
                }
            }
        }
        assert!(planted > 500, "{planted}");
    }

    #[test]
    fn a_document_that_comes_or_goes_is_told() {
        let all = now();
        let mut fewer = all.clone();
        fewer.remove("gap.json").unwrap();
        assert_eq!(between(&all, &fewer).iter().map(|change| change.weight).collect::<Vec<_>>(), [Weight::Break]);
        assert_eq!(between(&fewer, &all).iter().map(|change| change.weight).collect::<Vec<_>>(), [Weight::Addition]);
    }

    #[test]
    fn a_call_or_an_error_code_may_be_added_and_not_taken_away() {
        let all = now();
        let openapi: Value = serde_json::from_str(&all["openapi.json"]).unwrap();
        let mut fewer = openapi.clone();
        fewer["paths"].as_object_mut().unwrap().remove("/v1/models").unwrap();
        assert_eq!((weight(&openapi, &fewer), weight(&fewer, &openapi)), (Some(Weight::Break), Some(Weight::Addition)));
        let mut asked = openapi.clone();
        let parameter = json!({"name": "X-New", "in": "header", "required": true, "schema": {"type": "string"}});
        asked["paths"]["/v1/chat/stream"]["post"]["parameters"].as_array_mut().unwrap().push(parameter);
        assert_eq!(weight(&openapi, &asked), Some(Weight::Break));

        let errors = &all["errors.md"];
        let row = errors.lines().find(|line| line.starts_with("| `rate_limited`")).unwrap();
        let heaviest = |old: &str, new: &str| changes(old, new).into_iter().map(|change| change.weight).max();
        let without = errors.replace(&format!("{row}\n"), "");
        assert_eq!((heaviest(errors, &without), heaviest(&without, errors)), (Some(Weight::Break), Some(Weight::Addition)));
        assert_eq!(heaviest(errors, &errors.replace("| 429 |", "| 430 |")), Some(Weight::Break));
        assert_eq!(heaviest(errors, errors), None);
    }

    #[test]
    fn a_version_rises_with_the_heaviest_change() {
        let version: Version = "1.4.2".parse().unwrap();
        assert_eq!(version.after(None), version);
        assert_eq!(version.after(Some(Weight::Words)).to_string(), "1.4.3");
        assert_eq!(version.after(Some(Weight::Addition)).to_string(), "1.5.0");
        assert_eq!(version.after(Some(Weight::Break)).to_string(), "2.0.0");
        assert!(Version(1, 10, 0) > Version(1, 9, 9));
        for wrong in ["1.0", "1.0.0.0", "v1.0.0", "1.0.x", ""] {
            assert!(wrong.parse::<Version>().is_err(), "{wrong}");
        }
    }
}
