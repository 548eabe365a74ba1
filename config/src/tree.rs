//! YAML as a tree in which every node knows where it was written, within bounds of size and depth.
//!
//! A tree of our own, because three things need positions after parsing: variables are put in, an overlay is laid over,
//! and settings are judged together. Events come from the parser that also serves serde-saphyr.

use std::{collections::HashMap, fmt};

use granit_parser::{Event, Parser, ScalarStyle};

use crate::fault::Fault;

/// The largest config file, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
/// The most nodes, those that aliases repeat included: a few lines of aliases can stand for millions.
const MAX_NODES: usize = 50_000;
/// The deepest nesting; the settings themselves need nine.
const MAX_DEPTH: usize = 32;

/// One file, as text.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
}

impl Source {
    /// A line, counted from 1.
    pub(crate) fn line(&self, line: usize) -> Option<&str> {
        self.text.lines().nth(line.checked_sub(1)?)
    }
}

/// Where something is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    /// Which file, as an index of the sources.
    pub(crate) source: usize,
    /// Counted from 1.
    pub(crate) line: usize,
    /// Counted from 1, in characters.
    pub(crate) column: usize,
    /// In characters, at least 1.
    pub(crate) width: usize,
}

/// A node and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

#[derive(Debug, Clone)]
pub(crate) enum Value {
    Scalar(Scalar),
    /// Elements keep the number they were written with, so that places stay true when one is struck out.
    List(Vec<(usize, Node)>),
    Map(Vec<(Key, Node)>),
}

#[derive(Debug, Clone)]
pub(crate) struct Scalar {
    pub(crate) text: String,
    /// Not quoted: may be a number, a truth or nothing.
    pub(crate) plain: bool,
    /// As it was written, where variables have been put in.
    pub(crate) written: Option<String>,
}

impl Scalar {
    /// Nothing at all: `key:` or `key: ~`.
    pub(crate) fn is_null(&self) -> bool {
        self.plain && matches!(self.text.as_str(), "" | "~" | "null")
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) place: Place,
}

/// A step into the tree.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// The way to a setting, e.g. `routes[0].filters[2].max_hold`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct Path(pub(crate) Vec<Step>);

impl Path {
    pub(crate) fn root() -> Path {
        Path::default()
    }

    pub(crate) fn key(&self, name: &str) -> Path {
        self.with(Step::Key(name.to_owned()))
    }

    pub(crate) fn index(&self, index: usize) -> Path {
        self.with(Step::Index(index))
    }

    /// The path with what a filter says about its own inside, e.g. `moderation.mask[0]` or `[2].max_hold`.
    pub(crate) fn inside(&self, text: &str) -> Path {
        let mut path = self.clone();
        for part in text.split(['.', '[']).filter(|part| !part.is_empty()) {
            match part.strip_suffix(']').and_then(|digits| digits.parse().ok()) {
                Some(index) => path.0.push(Step::Index(index)),
                None => path.0.push(Step::Key(part.to_owned())),
            }
        }
        path
    }

    /// The innermost name, with the numbers after it: `origins[0]`.
    pub(crate) fn last(&self) -> String {
        let from = self.0.iter().rposition(|step| matches!(step, Step::Key(_))).unwrap_or(0);
        Path(self.0.iter().skip(from).cloned().collect()).to_string()
    }

    pub(crate) fn with(&self, step: Step) -> Path {
        let mut path = self.clone();
        path.0.push(step);
        path
    }

    pub(crate) fn starts_with(&self, other: &Path) -> bool {
        self.0.starts_with(&other.0)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Key(name) if name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-/*".contains(&b)) => {
                    write!(f, "{}{name}", if at == 0 { "" } else { "." })?;
                }
                Step::Key(name) => write!(f, "[{name:?}]")?,
            }
        }
        Ok(())
    }
}

impl Node {
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|(_, node)| node)
    }

    pub(crate) fn entry(&self, key: &str) -> Option<&(Key, Node)> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(entry, _)| entry.name == key),
            Value::Scalar(_) | Value::List(_) => None,
        }
    }

    /// The text of a scalar.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(scalar) => Some(&scalar.text),
            Value::List(_) | Value::Map(_) => None,
        }
    }

    /// The node at `path`, by the numbers that list elements were written with.
    pub(crate) fn find(&self, path: &Path) -> Option<&Node> {
        path.0.iter().try_fold(self, |node, step| match (step, &node.value) {
            (Step::Key(name), Value::Map(_)) => node.get(name),
            (Step::Index(index), Value::List(list)) => list.iter().find(|(number, _)| number == index).map(|(_, node)| node),
            _ => None,
        })
    }

    /// Where `path` stands: its scalar, else the key that names it, else the nearest thing around it.
    pub(crate) fn place(&self, path: &Path) -> Place {
        let (mut node, mut place) = (self, self.place);
        for step in &path.0 {
            match (step, &node.value) {
                (Step::Key(name), Value::Map(entries)) => match entries.iter().find(|(key, _)| key.name == *name) {
                    Some((key, next)) => {
                        place = match &next.value {
                            Value::Scalar(scalar) if !scalar.text.is_empty() || !scalar.plain => next.place,
                            _ => key.place,
                        };
                        node = next;
                    }
                    None => break,
                },
                (Step::Index(index), Value::List(list)) => match list.iter().find(|(number, _)| number == index) {
                    Some((_, next)) => {
                        place = first(next);
                        node = next;
                    }
                    None => break,
                },
                _ => break,
            }
        }
        place
    }

    /// Where the key of `path` stands.
    pub(crate) fn key_place(&self, path: &Path) -> Option<Place> {
        let (Step::Key(name), parents) = path.0.split_last()? else { return None };
        self.find(&Path(parents.to_vec()))?.entry(name).map(|(key, _)| key.place)
    }

    /// Takes out the node at `path`, its key with it.
    pub(crate) fn strike(&mut self, path: &Path) -> bool {
        let Some((last, parents)) = path.0.split_last() else { return false };
        let parent = parents.iter().try_fold(self, |node, step| match (step, &mut node.value) {
            (Step::Key(name), Value::Map(entries)) => entries.iter_mut().find(|(key, _)| key.name == *name).map(|(_, node)| node),
            (Step::Index(index), Value::List(list)) => list.iter_mut().find(|(number, _)| number == index).map(|(_, node)| node),
            _ => None,
        });
        match (last, parent.map(|node| &mut node.value)) {
            (Step::Key(name), Some(Value::Map(entries))) => entries.iter().position(|(key, _)| key.name == *name).map(|at| {
                entries.remove(at);
            }),
            (Step::Index(index), Some(Value::List(list))) => list.iter().position(|(number, _)| number == index).map(|at| {
                list.remove(at);
            }),
            _ => None,
        }
        .is_some()
    }
}

/// The first word of a node, which is what one looks for when told about a list's element.
fn first(node: &Node) -> Place {
    match &node.value {
        Value::Map(entries) => entries.first().map_or(node.place, |(key, _)| key.place),
        Value::Scalar(_) | Value::List(_) => node.place,
    }
}

/// A collection that is not closed yet.
struct Open {
    anchor: usize,
    place: Place,
    kind: Kind,
}

enum Kind {
    List(Vec<(usize, Node)>),
    Map { entries: Vec<(Key, Node)>, names: HashMap<String, usize>, key: Option<Key> },
}

/// Reads the one document of `sources[at]`.
///
/// Errors: the first place where it is no YAML, or YAML that has no place in a config; what follows it cannot be trusted.
pub(crate) fn parse(sources: &[Source], at: usize) -> Result<Node, Box<Fault>> {
    let Some(source) = sources.get(at) else { return Err(Box::new(Fault::of_file("", "no such file"))) };
    let mut options = granit_parser::options! {
        disallow_directives: true,
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    options.set_emit_comments(false);

    let mut reader = Tree { sources, at, open: Vec::new(), anchors: HashMap::new(), nodes: 0, root: None };
    for next in Parser::new_from_str_with_options(&source.text, options) {
        match next {
            Ok((event, span)) => {
                let width = match (span.start.line() == span.end.line(), span.end.col().checked_sub(span.start.col())) {
                    (true, Some(width)) => width.max(1),
                    _ => 1,
                };
                let place = Place { source: at, line: span.start.line(), column: span.start.col() + 1, width };
                reader.take(event, place)?;
            }
            Err(error) => {
                let mark = error.marker();
                let place = Place { source: at, line: mark.line(), column: mark.col() + 1, width: 1 };
                let fault = Fault::at(sources, place, &Path::root(), format!("this is not YAML: {}", error.info()));
                let variable = source.line(place.line).is_some_and(|line| line.contains(": ${") && line.contains('{'));
                let remedy = if variable { "within `{ }` and `[ ]` put quotes around a variable: `\"${NAME}\"`" } else { "" };
                return Err(Box::new(fault.remedy(remedy)));
            }
        }
    }
    let nothing = || Node { place: Place { source: at, line: 1, column: 1, width: 1 }, value: Value::Map(Vec::new()) };
    match reader.root {
        Some(Node { value: Value::Scalar(scalar), .. }) if scalar.is_null() => Ok(nothing()),
        Some(root @ Node { value: Value::Map(_), .. }) => Ok(root),
        Some(root) => {
            let fault = Fault::at(sources, root.place, &Path::root(), "a config is a map of settings");
            Err(Box::new(fault.remedy("begin with `listen: 127.0.0.1:8080`")))
        }
        None => Ok(nothing()),
    }
}

struct Tree<'a> {
    sources: &'a [Source],
    at: usize,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    root: Option<Node>,
}

impl Tree<'_> {
    fn take(&mut self, event: Event<'_>, place: Place) -> Result<(), Box<Fault>> {
        if event.tag().is_some() {
            return Err(self.fault(place, "tags have no meaning here").remedy("remove the word that begins with `!`").into());
        }
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let scalar = Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain, written: None };
                self.put(Node { place, value: Value::Scalar(scalar) }, anchor, 1)
            }
            Event::SequenceStart(_, anchor, _) => self.begin(anchor, place, Kind::List(Vec::new())),
            Event::MappingStart(_, anchor, _) => {
                self.begin(anchor, place, Kind::Map { entries: Vec::new(), names: HashMap::new(), key: None })
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open { anchor, place, kind: Kind::List(list) }) => self.put(Node { place, value: Value::List(list) }, anchor, 1),
                Some(Open { anchor, place, kind: Kind::Map { entries, .. } }) => {
                    self.put(Node { place, value: Value::Map(entries) }, anchor, 1)
                }
                None => Ok(()),
            },
            Event::Alias(anchor) => match self.anchors.get(&anchor).cloned() {
                Some(node) => {
                    let size = size(&node);
                    if self.open.len() + depth(&node) > MAX_DEPTH {
                        return Err(self.too_deep(place).into());
                    }
                    self.put(node, 0, size)
                }
                None => Err(self.fault(place, "an alias within what it stands for").remedy("write the settings out").into()),
            },
            Event::DocumentStart(..) if self.root.is_some() => Err(self
                .fault(place, "a second document: a config is one")
                .remedy("remove the `---` between them, or make two files")
                .into()),
            Event::UnresolvedAlias(_) => Err(self.fault(place, "an alias of nothing").into()),
            // The parser may learn to emit more that is no node.
            Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(..)
            | Event::DocumentEnd
            | Event::Anchor(..)
            | Event::Comment(..)
            | _ => Ok(()),
        }
    }

    fn begin(&mut self, anchor: usize, place: Place, kind: Kind) -> Result<(), Box<Fault>> {
        if self.open.len() >= MAX_DEPTH {
            return Err(self.too_deep(place).into());
        }
        self.open.push(Open { anchor, place, kind });
        Ok(())
    }

    fn put(&mut self, node: Node, anchor: usize, size: usize) -> Result<(), Box<Fault>> {
        self.nodes = self.nodes.saturating_add(size);
        if self.nodes > MAX_NODES {
            return Err(self.fault(node.place, format!("more than {MAX_NODES} settings, what aliases repeat included")).into());
        }
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let fault = match self.open.last_mut().map(|open| &mut open.kind) {
            None => {
                self.root = Some(node);
                None
            }
            Some(Kind::List(list)) => {
                list.push((list.len(), node));
                None
            }
            Some(Kind::Map { entries, names, key }) => match (key.take(), node.value) {
                (Some(key), value) => {
                    entries.push((key, Node { place: node.place, value }));
                    None
                }
                (None, Value::Scalar(scalar)) => match names.insert(scalar.text.clone(), node.place.line) {
                    Some(line) => Some((node.place, scalar.text, line)),
                    None => {
                        *key = Some(Key { name: scalar.text, place: node.place });
                        None
                    }
                },
                (None, Value::List(_) | Value::Map(_)) => Some((node.place, String::new(), 0)),
            },
        };
        match fault {
            None => Ok(()),
            Some((place, _, 0)) => Err(self.fault(place, "a key that is not a word").into()),
            Some((place, name, line)) => {
                Err(self.fault(place, format!("`{name}` stands in line {line} already")).remedy("remove one of the two").into())
            }
        }
    }

    fn too_deep(&self, place: Place) -> Fault {
        self.fault(place, format!("more than {MAX_DEPTH} levels"))
    }

    fn fault(&self, place: Place, found: impl Into<String>) -> Fault {
        Fault::at(self.sources, Place { source: self.at, ..place }, &Path::root(), found)
    }
}

fn size(node: &Node) -> usize {
    1 + match &node.value {
        Value::Scalar(_) => 0,
        Value::List(list) => list.iter().map(|(_, node)| size(node)).sum(),
        Value::Map(entries) => entries.iter().map(|(_, node)| size(node)).sum(),
    }
}

fn depth(node: &Node) -> usize {
    match &node.value {
        Value::Scalar(_) => 0,
        Value::List(list) => 1 + list.iter().map(|(_, node)| depth(node)).max().unwrap_or(0),
        Value::Map(entries) => 1 + entries.iter().map(|(_, node)| depth(node)).max().unwrap_or(0),
    }
}
