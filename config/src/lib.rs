//! Turns a YAML file into a [`Plan`], or into everything that is wrong with it.
//!
//! | module | story |
//! |---|---|
//! | [`file`] | the config as it is written |
//! | `tree` | YAML in which every node knows its place |
//! | `variables` | puts in what the environment says |
//! | `overlay` | lays a file for one environment over it |
//! | `read` | a tree as settings, and all of its faults |
//! | `check` | settings that are inert, contradictory or out of bounds; and the plan |
//! | [`plan`] | the config as it is used |
//! | [`effect`] | what a route comes to: delays, bounds, memory |
//! | `fault` | what is wrong, as compilers show it |
//! | [`schema`] | the schema for editors, the reference for people |
//!
//! [`load`] is the only thing here that reads files.

use std::{
    collections::HashSet,
    fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

mod check;
pub mod effect;
mod fault;
pub mod file;
mod overlay;
pub mod plan;
mod read;
pub mod schema;
mod tree;
mod variables;

pub use fault::{Fault, Faults, Severity};
pub use plan::Plan;
pub use tree::MAX_BYTES;

use plan::Files;
use tree::Source;

/// The largest file that a config may name, in bytes.
const MAX_NAMED_BYTES: u64 = 4 << 20;

/// Where a process runs: which overlay is laid over its config, and how strict the checks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Environment {
    /// A developer's machine.
    Local,
    /// A short-lived copy, for a review.
    Preview,
    /// The rehearsal.
    Staging,
    /// The real thing: nothing unsafe may come from its overlay.
    Production,
}

impl Environment {
    /// All of them.
    pub const ALL: [Environment; 4] = [Environment::Local, Environment::Preview, Environment::Staging, Environment::Production];

    /// The word for it: in `--env`, and in the overlay's name, `headgate.production.yaml`.
    pub fn name(self) -> &'static str {
        match self {
            Environment::Local => "local",
            Environment::Preview => "preview",
            Environment::Staging => "staging",
            Environment::Production => "production",
        }
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Environment {
    type Err = String;
    fn from_str(text: &str) -> Result<Environment, String> {
        Environment::ALL.into_iter().find(|environment| environment.name() == text).ok_or_else(|| {
            let names = Environment::ALL.map(Environment::name);
            format!("`{text}` is not one of {}{}", names.join(", "), fault::did_you_mean(text, names))
        })
    }
}

/// Variables by name, as `${NAME}` finds them; in a process `&|name| std::env::var(name).ok()`.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads the config at `path`, lays the overlay of `environment` over it (`headgate.production.yaml` beside `headgate.yaml`,
/// where there is one), checks everything, and reads the files it names.
///
/// Errors: all faults at once. Work: one read of each file; every filter is built once, and thrown away.
pub fn load(path: &Path, environment: Option<Environment>, vars: Variables<'_>) -> Result<Plan, Faults> {
    let folder = path.parent().map(Path::to_owned).unwrap_or_default();
    let base = Source { name: path.display().to_string(), text: text_of(path).map_err(|fault| Faults::one(*fault))? };
    let mut disk = Disk { files: Files { folder, own: Some(path.to_owned()), ..Files::default() } };
    disk.files.texts.insert(path.to_owned(), base.text.as_str().into());
    let overlay = match environment.map(|environment| path.with_extension(format!("{environment}.yaml"))) {
        Some(path) if path.exists() => {
            let text = text_of(&path).map_err(|fault| Faults::one(*fault))?;
            disk.files.texts.insert(path.clone(), text.as_str().into());
            Some(Source { name: path.display().to_string(), text })
        }
        Some(_) | None => None,
    };
    plan_of(base, overlay, environment, vars, &mut disk)
}

/// Reads a config that is in no file, e.g. one that is built in. `name` stands for it in faults; the files it names are
/// relative to `folder`.
///
/// Errors: all faults at once.
pub fn parse(name: &str, text: &str, folder: &Path, environment: Option<Environment>, vars: Variables<'_>) -> Result<Plan, Faults> {
    if text.len() > MAX_BYTES {
        return Err(Faults::one(too_large(name)));
    }
    let mut disk = Disk { files: Files { folder: folder.to_owned(), ..Files::default() } };
    plan_of(Source { name: name.to_owned(), text: text.to_owned() }, None, environment, vars, &mut disk)
}

fn too_large(name: &str) -> Fault {
    Fault::of_file(name, format!("larger than {} KiB", MAX_BYTES >> 10)).remedy("keep lists of phrases in files of their own")
}

/// The text of a config file; never reads more than fits.
fn text_of(path: &Path) -> Result<String, Box<Fault>> {
    let name = path.display().to_string();
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes));
    if let Err(error) = read {
        return Err(Fault::of_file(&name, format!("cannot read the config: {error}"))
            .remedy("name the file to use, or make it readable")
            .into());
    }
    if bytes.len() > MAX_BYTES {
        return Err(too_large(&name).into());
    }
    String::from_utf8(bytes).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        Box::new(Fault::of_file(&name, format!("line {line} is not UTF-8")))
    })
}

fn plan_of(
    base: Source,
    overlay: Option<Source>,
    environment: Option<Environment>,
    vars: Variables<'_>,
    disk: &mut Disk,
) -> Result<Plan, Faults> {
    let mut sources = vec![base];
    sources.extend(overlay);
    for source in &mut sources {
        // Some editors put a byte order mark first; columns are counted without it.
        if let Some(text) = source.text.strip_prefix('\u{feff}') {
            source.text = text.to_owned();
        }
    }
    let (mut faults, mut struck) = (Vec::new(), HashSet::new());
    let mut trees = Vec::new();
    for at in 0..sources.len() {
        match tree::parse(&sources, at) {
            Ok(mut tree) => {
                struck.extend(variables::expand(&mut tree, &sources, vars, &mut faults));
                trees.push(tree);
            }
            Err(fault) => faults.push(*fault),
        }
    }
    if trees.len() < sources.len() {
        return Err(sorted(faults, &sources));
    }
    let mut trees = trees.into_iter();
    let Some(mut tree) = trees.next() else { return Err(sorted(faults, &sources)) };
    if let (Some(over), Some(environment)) = (trees.next(), environment) {
        overlay::lay(&mut tree, over, &sources, environment, &mut faults);
    }
    let Some(file) = read::read::<file::File>(&mut tree, &sources, &mut struck, &mut faults) else {
        return Err(sorted(faults, &sources));
    };
    let plan = check::check(&file, &tree, &sources, &struck, environment, disk, &mut faults);
    let (errors, warnings): (Vec<Fault>, Vec<Fault>) = sorted(faults, &sources).0.into_iter().partition(Fault::is_error);
    match plan {
        Some(plan) if errors.is_empty() => Ok(Plan { warnings, files: std::mem::take(&mut disk.files), ..plan }),
        // Warnings are for configs that are taken: beside errors, most of them follow from those.
        _ => Err(Faults(errors)),
    }
}

/// In the order of the files and their lines.
fn sorted(mut faults: Vec<Fault>, sources: &[Source]) -> Faults {
    faults.sort_by_key(|fault| (sources.iter().position(|source| source.name == fault.file), fault.line, fault.column));
    faults.dedup();
    faults.truncate(fault::MOST);
    Faults(faults)
}

/// The files that a config names.
struct Disk {
    files: Files,
}

impl Disk {
    /// The text of a file that the config names, at most 4 MiB; kept, so that what is used is what was checked.
    fn read(&mut self, path: &Path) -> io::Result<Arc<str>> {
        let path = self.files.resolve(path);
        if let Some(text) = self.files.texts.get(&path) {
            return Ok(text.clone());
        }
        let mut text = String::new();
        fs::File::open(&path)?.take(MAX_NAMED_BYTES + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_NAMED_BYTES {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 4 MiB"));
        }
        let text: Arc<str> = text.into();
        self.files.texts.insert(path, text.clone());
        Ok(text)
    }

    /// A file that somebody else will read: where it is. Errors: it cannot be opened.
    fn name(&mut self, path: &Path) -> io::Result<PathBuf> {
        let path = self.files.resolve(path);
        let is_file = fs::File::open(&path)?.metadata()?.is_file();
        self.files.unread.push(path.clone());
        if is_file { Ok(path) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file")) }
    }
}
