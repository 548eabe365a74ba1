//! What is generated from the types is as the types say. `HEADGATE_WRITE=1 cargo test -p headgate-config --test generated`
//! writes it anew.

use std::{fs, path::PathBuf};

fn home() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Compares a file with what it should be, or writes it.
fn fresh(path: PathBuf, wanted: &str) {
    if std::env::var_os("HEADGATE_WRITE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, wanted).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == wanted, "{} is stale: run HEADGATE_WRITE=1 cargo test -p headgate-config --test generated", path.display());
}

#[test]
fn the_schema_for_editors_is_fresh() {
    fresh(home().join("schema/headgate.schema.json"), &headgate_config::schema::text());
}

const BEGIN: &str = "<!-- generated from here -->\n";

#[test]
fn the_reference_is_fresh() {
    let path = home().join("../docs/configure.md");
    let guide = fs::read_to_string(&path).unwrap();
    let (guide, _) = guide.split_once(BEGIN).expect("a mark after which the reference stands");
    fresh(path.clone(), &format!("{guide}{BEGIN}\n{}", headgate_config::schema::reference().trim_end().to_owned() + "\n"));
}
