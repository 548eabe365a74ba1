//! The files of the tree, as a fresh clone would have them, and what stands in them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::Command,
    sync::OnceLock,
};

/// The tree's root.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A file of the tree, which has to be there.
pub(crate) fn text(path: &str) -> &'static str {
    texts().get(path).unwrap_or_else(|| panic!("there is no {path}"))
}

/// Every text file that is or would be committed, by its path from the root.
pub(crate) fn texts() -> &'static BTreeMap<String, String> {
    static TEXTS: OnceLock<BTreeMap<String, String>> = OnceLock::new();
    TEXTS.get_or_init(|| {
        let listed = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root())
            .output()
            .expect("git lists the files of the tree");
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        let listed = String::from_utf8(listed.stdout).expect("paths in UTF-8");
        // What cannot be read is binary, or has been deleted and not committed yet.
        let read = |path: &str| Some((path.to_owned(), fs::read_to_string(root().join(path)).ok()?));
        let texts: BTreeMap<_, _> = listed.split('\0').filter_map(read).collect();
        assert!(texts.len() > 100, "the tree is larger than {} files", texts.len());
        texts
    })
}

/// The files whose paths end so.
pub(crate) fn ending(end: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    texts().iter().filter(move |(path, _)| path.ends_with(end)).map(|(path, text)| (path.as_str(), text.as_str()))
}

/// The words between backticks, outside of fenced blocks.
pub(crate) fn quoted(markdown: &str) -> Vec<&str> {
    let prose = markdown.split("\n```").step_by(2);
    prose.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

/// The fenced blocks of a language.
pub(crate) fn fenced<'a>(markdown: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("\n```{language}\n");
    markdown.split(&fence).skip(1).map(|rest| rest.split_once("\n```").map_or(rest, |(block, _)| block)).collect()
}

/// The names of all functions in Rust code, tests among them.
pub(crate) fn functions() -> BTreeSet<&'static str> {
    let names = ending(".rs").flat_map(|(_, text)| text.split("fn ").skip(1));
    names.map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default()).collect()
}
