//! `headgate schema`: the schemas of the config and of everything on the wire, as this binary understands them.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use headgate_contracts::drift::{self, VERSION, Weight};

use super::{EX_CONFIG, EX_USAGE, fail, say};

/// Which schema.
#[derive(clap::Args)]
#[command(after_help = "\
Without a name, the names are listed. For an editor that knows YAML schemas, put this into the first line of a config:
  # yaml-language-server: $schema=headgate.schema.json

With --check what others keep is compared with what this binary says: one file of the schema that is named, or, without a name, a
folder of them, with the names that contracts/schema/ has (and the config's as headgate.schema.json, if it is there). Each difference
is printed with what it asks of those who know the kept one: nothing (words, addition), or to change (BREAKS).

Exit codes: 0 printed, or equal; 64 no such schema; 78 something differs.

Examples:
  headgate schema config > headgate.schema.json
  headgate schema openapi
  headgate schema --check contracts/schema
  headgate schema config --check headgate.schema.json")]
pub struct Args {
    /// config, openapi, asyncapi, or a message on the wire.
    pub name: Option<String>,
    /// Compare with this file, or with the files in this folder, instead of printing.
    #[arg(long, value_name = "PATH")]
    pub check: Option<PathBuf>,
}

/// Prints or compares.
pub fn run(args: Args) -> ExitCode {
    match schema(&args, &mut io::stdout().lock()) {
        Ok(code) => code,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

/// The file that keeps the config's schema.
const CONFIG: &str = "headgate.schema.json";

/// What there is: its name, the file that keeps it, and what this binary says.
struct Document {
    name: String,
    file: &'static str,
    text: String,
}

/// The config's, then those of the wire, named as their files are, without the endings.
fn documents() -> Vec<Document> {
    let wire = headgate_contracts::schema::documents().into_iter().map(|(file, text)| {
        let name = file.rsplit_once('.').map_or(file, |(name, _)| name);
        // A turn is what clients of the chat stream send.
        Document { name: (if name == "turn" { "chat" } else { name }).to_owned(), file, text }
    });
    let config = Document { name: "config".to_owned(), file: CONFIG, text: headgate_config::schema::text() };
    std::iter::once(config).chain(wire).collect()
}

fn schema(args: &Args, out: &mut impl Write) -> io::Result<ExitCode> {
    let all = documents();
    let Some(name) = &args.name else {
        if let Some(path) = &args.check {
            return compare_all(&all, path, out);
        }
        for document in &all {
            writeln!(out, "{}", document.name)?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let Some(document) = all.iter().find(|document| document.name == *name) else {
        let names: Vec<&str> = all.iter().map(|document| document.name.as_str()).collect();
        return Ok(say(format_args!("no schema `{name}`; there are {}", names.join(", ")), EX_USAGE));
    };
    match &args.check {
        None => out.write_all(document.text.as_bytes()).map(|()| ExitCode::SUCCESS),
        Some(path) => match std::fs::read_to_string(path) {
            Ok(kept) if compare(document, &kept, out)? == 0 => Ok(ExitCode::SUCCESS),
            Ok(_) => {
                let line = format_args!("{} is not what `headgate schema {name}` says; write it anew", path.display());
                Ok(say(line, EX_CONFIG))
            }
            Err(error) => Ok(say(format_args!("cannot read {}: {error}", path.display()), EX_CONFIG)),
        },
    }
}

/// Prints how a kept document differs: how many differences there are.
fn compare(document: &Document, kept: &str, out: &mut impl Write) -> io::Result<usize> {
    if kept == document.text {
        return Ok(0);
    }
    let changes = if document.file == CONFIG { drift::changes_of_what_is_read } else { drift::changes };
    let found = changes(kept, &document.text);
    for change in &found {
        writeln!(out, "{}: {change}", document.file)?;
    }
    if found.is_empty() {
        writeln!(out, "{}: {:<8}  /: written otherwise, saying the same", document.file, Weight::Words)?;
    }
    Ok(found.len().max(1))
}

fn compare_all(all: &[Document], folder: &Path, out: &mut impl Write) -> io::Result<ExitCode> {
    if !folder.is_dir() {
        let line = format_args!("{} is no folder; for one file, name its schema: `headgate schema config --check FILE`", folder.display());
        return Ok(say(line, EX_USAGE));
    }
    let mut differences = 0;
    for document in all {
        match std::fs::read_to_string(folder.join(document.file)) {
            Ok(kept) => differences += compare(document, &kept, out)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && document.file == CONFIG => {}
            Err(error) => {
                writeln!(out, "{}: cannot be read: {error}", document.file)?;
                differences += 1;
            }
        }
    }
    let known: BTreeSet<PathBuf> = all.iter().map(|document| folder.join(document.file)).collect();
    for kept in [folder.to_owned(), folder.join("events")].iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten() {
        let kept = kept?.path();
        if kept.extension().is_some_and(|end| end == "json") && !known.contains(&kept) {
            writeln!(out, "{}: no schema of this version", kept.strip_prefix(folder).unwrap_or(&kept).display())?;
            differences += 1;
        }
    }
    if differences == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    let line = format_args!("{} differs in {differences} places from what this version says (contracts {VERSION})", folder.display());
    Ok(say(line, EX_CONFIG))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: Option<&str>, check: Option<PathBuf>) -> (ExitCode, String) {
        let mut out = Vec::new();
        let code = schema(&Args { name: name.map(str::to_owned), check }, &mut out).unwrap();
        (code, String::from_utf8(out).unwrap())
    }

    #[test]
    fn every_name_that_is_listed_is_a_document() {
        let (_, names) = told(None, None);
        for wanted in ["config", "chat", "openapi", "asyncapi"] {
            assert!(names.lines().any(|name| name == wanted), "{names}");
        }
        for name in names.lines() {
            let (code, text) = told(Some(name), None);
            assert_eq!(code, ExitCode::SUCCESS);
            assert!(text.len() > 100, "{name}");
        }
        assert_eq!(told(Some("confg"), None), (ExitCode::from(EX_USAGE), String::new()));
    }

    #[test]
    fn a_copy_that_differs_is_told_by_the_exit_code() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy.json");
        let (_, text) = told(Some("config"), None);
        std::fs::write(&path, &text).unwrap();
        assert_eq!(told(Some("config"), Some(path.clone())), (ExitCode::SUCCESS, String::new()));
        std::fs::write(&path, text + " ").unwrap();
        assert_eq!(told(Some("config"), Some(path)).0, ExitCode::from(EX_CONFIG));
        assert_eq!(told(Some("config"), Some(folder.path().join("none"))).0, ExitCode::from(EX_CONFIG));
    }

    #[test]
    fn the_schemas_in_the_repository_are_those_of_this_binary() {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contracts/schema");
        assert_eq!(told(None, Some(kept)), (ExitCode::SUCCESS, String::new()));
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/schema").join(CONFIG);
        assert_eq!(told(Some("config"), Some(config)), (ExitCode::SUCCESS, String::new()));
    }

    #[test]
    fn a_folder_that_differs_is_told_place_by_place() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("events")).unwrap();
        for document in documents() {
            std::fs::write(folder.path().join(document.file), document.text).unwrap();
        }
        let check = || told(None, Some(folder.path().to_owned()));
        assert_eq!(check(), (ExitCode::SUCCESS, String::new()));
        let kept = folder.path().join("turn.json");
        let text = std::fs::read_to_string(&kept).unwrap();
        std::fs::write(&kept, text.replacen("\"model\"", "\"modle\"", 1)).unwrap();
        std::fs::remove_file(folder.path().join("gap.json")).unwrap();
        std::fs::write(folder.path().join("events/turn.lost.v1.json"), "{}").unwrap();
        let (code, said) = check();
        assert_eq!(code, ExitCode::from(EX_CONFIG));
        for place in [
            "turn.json: BREAKS    /properties/modle: is gone",
            "turn.json: addition  /properties/model: is new",
            "gap.json: cannot be read",
            "events/turn.lost.v1.json: no schema of this version",
        ] {
            assert!(said.contains(place), "{place}: {said}");
        }
        assert_eq!(told(None, Some(kept)).0, ExitCode::from(EX_USAGE));
    }
}
