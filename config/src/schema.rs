//! The schema of the config for editors, and the reference of all settings for people, both from the types that read it.

use std::fmt::Write as _;

use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use crate::file::File;

/// The version of the config's form. What was promised last is kept in `config/frozen/`; a test asks for the version that the changes
/// since then need: a major one where a config that was taken is refused, a minor one for a new setting, a patch for other words.
pub const VERSION: &str = "1.1.0";

/// The schema: JSON Schema, draft 2020-12. Kept in `config/schema/headgate.schema.json`, and held fresh by a test.
pub fn text() -> String {
    format!("{:#}\n", value())
}

fn value() -> Value {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<File>().to_value();
    admit_variables(&mut schema);
    schema["$comment"] = format!("version {VERSION} of the config's form").into();
    schema
}

/// Wherever one value stands, a variable may stand instead.
fn admit_variables(schema: &mut Value) {
    const VARIABLE: &str = r"\$\{";
    match schema {
        Value::Array(list) => list.iter_mut().for_each(admit_variables),
        Value::Object(map) => {
            for (name, inner) in map.iter_mut() {
                // What stands under these is a value and no schema.
                if !matches!(name.as_str(), "default" | "examples" | "enum" | "const" | "required") {
                    admit_variables(inner);
                }
            }
            let types: Vec<String> = match map.get("type") {
                Some(Value::String(one)) => vec![one.clone()],
                Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                _ => Vec::new(),
            };
            let is = |name: &str| types.iter().any(|other| other == name);
            if (is("integer") || is("number") || is("boolean")) && !is("string") {
                map.insert("type".into(), types.iter().map(String::as_str).chain(["string"]).collect());
                map.insert("pattern".into(), VARIABLE.into());
            } else if is("string")
                && let Some(Value::String(pattern)) = map.get("pattern")
            {
                if !pattern.contains(VARIABLE) {
                    let either = format!("({pattern})|{VARIABLE}");
                    map.insert("pattern".into(), either.into());
                }
            } else if let Some(Value::Array(words)) = map.get("oneOf")
                && words.iter().all(|word| word.get("const").is_some())
            {
                let mut words = words.clone();
                words.push(json!({ "type": "string", "pattern": VARIABLE }));
                map.insert("oneOf".into(), words.into());
            } else if let Some(words) = map.remove("enum") {
                map.remove("type");
                map.insert("anyOf".into(), json!([{ "enum": words }, { "type": "string", "pattern": VARIABLE }]));
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The reference: a table for each section of the file, in Markdown. Kept in `docs/configure.md`, and held fresh by a test.
pub fn reference() -> String {
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<File>().to_value();
    let mut reference = Reference { root: &schema, out: String::new() };
    reference.section("", &schema);
    reference.filters();
    reference.out
}

struct Reference<'a> {
    root: &'a Value,
    out: String,
}

/// One setting of a section.
struct Row<'a> {
    name: &'a str,
    schema: &'a Value,
    required: bool,
}

impl<'a> Reference<'a> {
    fn resolve(&self, schema: &'a Value) -> &'a Value {
        let named = |schema: &Value| schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix('#')).map(str::to_owned);
        match named(schema).and_then(|pointer| self.root.pointer(&pointer)) {
            Some(named) => self.resolve(named),
            // An optional one: itself, or null.
            None => match schema.get("anyOf").and_then(Value::as_array).map(Vec::as_slice) {
                Some([one, null]) if null.get("type").is_some_and(|kind| kind == "null") => self.resolve(one),
                _ => schema,
            },
        }
    }

    fn rows(schema: &'a Value) -> Vec<Row<'a>> {
        let required: Vec<&str> =
            schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let properties = schema.get("properties").and_then(Value::as_object).into_iter().flatten();
        properties.map(|(name, schema)| Row { name, schema, required: required.contains(&name.as_str()) }).collect()
    }

    /// The sections below a setting: what it is, once optional, listed and named things are unwrapped.
    fn below(&self, name: &str, schema: &'a Value) -> Option<(String, &'a Value)> {
        let schema = self.resolve(schema);
        if let Some(items) = schema.get("items") {
            return self.below(&format!("{name}[]"), items);
        }
        if let Some(named @ Value::Object(_)) = schema.get("additionalProperties") {
            return self.below(&format!("{name}.NAME"), named);
        }
        schema.get("properties").map(|_| (name.to_owned(), schema))
    }

    fn section(&mut self, path: &str, schema: &'a Value) {
        let title = if path.is_empty() { "The file".to_owned() } else { format!("`{path}`") };
        let _ = writeln!(self.out, "### {title}\n");
        if let Some(about) = schema.get("description").and_then(Value::as_str) {
            let _ = writeln!(self.out, "{}\n", about.replace('\n', " "));
        }
        let rows = Self::rows(schema);
        self.table(&rows);
        for row in rows {
            let name = if path.is_empty() { row.name.to_owned() } else { format!("{path}.{}", row.name) };
            if let Some((name, schema)) = self.below(&name, row.schema) {
                self.section(&name, schema);
            }
        }
    }

    fn table(&mut self, rows: &[Row<'a>]) {
        let _ = writeln!(self.out, "| setting | value | default | meaning |\n|---|---|---|---|");
        for row in rows {
            let about = row.schema.get("description").or_else(|| self.resolve(row.schema).get("description")).and_then(Value::as_str);
            let default = match row.schema.get("default") {
                _ if row.required => "needed".to_owned(),
                None | Some(Value::Null) => String::new(),
                // Its own table says it.
                Some(Value::Object(_)) => String::new(),
                Some(Value::Array(list)) if list.is_empty() => String::new(),
                Some(Value::String(text)) => format!("`{text}`"),
                Some(other) => format!("`{other}`"),
            };
            let about = about.unwrap_or_default().replace('\n', " ").replace('|', "\\|");
            let _ = writeln!(self.out, "| `{}` | {} | {default} | {about} |", row.name, self.kind(row.schema).replace('|', "\\|"));
        }
        self.out.push('\n');
    }

    /// What a value looks like, in a few words.
    fn kind(&self, schema: &'a Value) -> String {
        let name = schema.get("$ref").or_else(|| schema.pointer("/anyOf/0/$ref")).and_then(Value::as_str).unwrap_or_default();
        match name.rsplit('/').next() {
            Some("Span") => return "duration".to_owned(),
            Some("Bytes") => return "size".to_owned(),
            Some("Rate") => return "rate".to_owned(),
            _ => {}
        }
        let schema = self.resolve(schema);
        let words =
            |list: &Vec<Value>| list.iter().filter_map(Value::as_str).map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ");
        if let Some(list) = schema.get("enum").and_then(Value::as_array) {
            return words(list);
        }
        if let Some(list) = schema.get("oneOf").and_then(Value::as_array) {
            let all: Vec<Value> = list
                .iter()
                .flat_map(|one| {
                    one.get("const").cloned().into_iter().chain(one.get("enum").and_then(Value::as_array).cloned().unwrap_or_default())
                })
                .collect();
            if !all.is_empty() {
                return words(&all);
            }
        }
        if let Some(list) = schema.get("examples").and_then(Value::as_array) {
            return format!("e.g. {}", words(list));
        }
        if let Some(items) = schema.get("items") {
            return format!("list: {}", self.kind(items));
        }
        if schema.get("additionalProperties").is_some_and(Value::is_object) {
            return "names and their settings".to_owned();
        }
        if schema.get("properties").is_some() {
            return "settings, see below".to_owned();
        }
        if let Some(forms) = schema.get("anyOf").and_then(Value::as_array) {
            let mut all: Vec<String> = Vec::new();
            for form in forms {
                let kind = form.get("description").and_then(Value::as_str).map_or_else(|| self.kind(form), str::to_owned);
                if !all.contains(&kind) {
                    all.push(kind);
                }
            }
            return all.join(", or ");
        }
        let kinds: Vec<&str> = match schema.get("type") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).filter(|kind| *kind != "null").collect(),
            _ => Vec::new(),
        };
        match kinds.first() {
            Some(&"integer") => "whole number".to_owned(),
            Some(&"number") => "number".to_owned(),
            Some(&"boolean") => "`true`, `false`".to_owned(),
            Some(&"string") => "text".to_owned(),
            _ => String::new(),
        }
    }

    /// The filters, each with its settings; first the terms that stand beside any of them.
    fn filters(&mut self) {
        let root = self.root;
        let forms = root.pointer("/$defs/Step/anyOf").and_then(Value::as_array);
        // The form without a required name is the filter's name alone.
        let forms: Vec<&'a Value> = forms.into_iter().flatten().filter(|form| form.get("required").is_some()).collect();
        let name_of = |form: &'a Value| form.pointer("/required/0").and_then(Value::as_str).unwrap_or_default();
        if let Some(first) = forms.first() {
            let _ = writeln!(
                self.out,
                "### Terms of a step\n\nThey stand beside the filter's name and mean the same for every filter that judges text.\n"
            );
            let terms: Vec<Row<'a>> = Self::rows(first).into_iter().filter(|row| row.name != name_of(first)).collect();
            self.table(&terms);
        }
        for form in forms {
            let name = name_of(form);
            let Some(schema) = form.pointer("/properties").and_then(|all| all.get(name)) else { continue };
            let schema = self.resolve(schema);
            let _ = writeln!(self.out, "### Filter `{name}`\n");
            if let Some(about) = schema.get("description").and_then(Value::as_str) {
                let _ = writeln!(self.out, "{}\n", about.replace('\n', " "));
            }
            let rows = Self::rows(schema);
            if !rows.is_empty() {
                self.table(&rows);
            }
            for row in rows {
                if let Some((name, schema)) = self.below(&format!("{name}.{}", row.name), row.schema) {
                    self.section(&name, schema);
                }
            }
        }
    }
}
