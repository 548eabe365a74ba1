//! `headgate schema`: the schemas of the config and of everything on the wire, as this binary understands them.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use super::{EX_CONFIG, EX_USAGE, fail, say};

/// Which schema.
#[derive(clap::Args)]
#[command(after_help = "\
Without a name, the names are listed. For an editor that knows YAML schemas, put this into the first line of a config:
  # yaml-language-server: $schema=headgate.schema.json

With --check nothing is printed: the file is compared with what this binary says, for a CI job that keeps a copy.

Exit codes: 0 printed, or equal; 64 no such schema; 78 the file differs.

Examples:
  headgate schema config > headgate.schema.json
  headgate schema openapi
  headgate schema config --check headgate.schema.json")]
pub struct Args {
    /// config, openapi, asyncapi, or a message on the wire.
    pub name: Option<String>,
    /// Compare with this file instead of printing.
    #[arg(long, value_name = "FILE", requires = "name")]
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

/// Names and documents: the config's, then those of the wire, without the endings of their files.
fn documents() -> Vec<(String, String)> {
    let wire = headgate_contracts::schema::documents().into_iter().map(|(file, text)| {
        let name = file.rsplit_once('.').map_or(file, |(name, _)| name);
        // A turn is what clients of the chat stream send.
        (if name == "turn" { "chat".to_owned() } else { name.to_owned() }, text)
    });
    std::iter::once(("config".to_owned(), headgate_config::schema::text())).chain(wire).collect()
}

fn schema(args: &Args, out: &mut impl Write) -> io::Result<ExitCode> {
    let all = documents();
    let Some(name) = &args.name else {
        for (name, _) in &all {
            writeln!(out, "{name}")?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let Some((_, text)) = all.iter().find(|(other, _)| other == name) else {
        let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        return Ok(say(format_args!("no schema `{name}`; there are {}", names.join(", ")), EX_USAGE));
    };
    let Some(path) = &args.check else {
        out.write_all(text.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    };
    match std::fs::read_to_string(path) {
        Ok(found) if found == *text => Ok(ExitCode::SUCCESS),
        Ok(_) => {
            let line = format_args!("{} is not what `headgate schema {name}` says; write it anew", path.display());
            Ok(say(line, EX_CONFIG))
        }
        Err(error) => Ok(say(format_args!("cannot read {}: {error}", path.display()), EX_CONFIG)),
    }
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
}
