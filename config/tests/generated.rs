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

#[test]
fn every_config_in_the_guide_is_taken() {
    let guide = fs::read_to_string(home().join("../docs/configure.md")).unwrap();
    let blocks: Vec<&str> = guide.split("```yaml\n").skip(1).filter_map(|rest| rest.split_once("```")).map(|(block, _)| block).collect();
    let whole: Vec<&str> = blocks.iter().copied().filter(|block| block.starts_with("listen:")).collect();
    assert_eq!(whole.len(), 2);
    for text in &whole {
        headgate_config::parse("guide.yaml", text, &home().join("examples"), None, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
    }
    // The overlay is laid over the first one.
    let folder = tempfile::tempdir().unwrap();
    for name in ["constitution.md", "rules/deny.txt"] {
        fs::create_dir_all(folder.path().join("rules")).unwrap();
        fs::copy(home().join("examples").join(name), folder.path().join(name)).unwrap();
    }
    let overlay = blocks.iter().find(|block| block.starts_with("workers:")).unwrap();
    let base = whole[0].replace("2026-11-21 }", "2026-11-21, key: file:key.json }");
    fs::write(folder.path().join("headgate.yaml"), base).unwrap();
    fs::write(folder.path().join("headgate.production.yaml"), overlay).unwrap();
    let production = Some(headgate_config::Environment::Production);
    let plan =
        headgate_config::load(&folder.path().join("headgate.yaml"), production, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!((plan.workers, plan.routes[0].effect.delay), (16, headgate_config::effect::Delay::Milliseconds(100)));
}

/// `HEADGATE_FREEZE=1` promises what is there now, under the version it has: part of a release.
#[test]
fn a_change_of_the_form_that_was_promised_has_the_version_it_needs() {
    use headgate_contracts::drift::{Change, Version, changes_of_what_is_read};
    let frozen = home().join("frozen");
    let version: Version = headgate_config::schema::VERSION.parse().unwrap();
    if std::env::var_os("HEADGATE_FREEZE").is_some() {
        let _ = fs::remove_dir_all(&frozen);
        fs::create_dir_all(frozen.join(version.to_string())).unwrap();
        fs::write(frozen.join(version.to_string()).join("headgate.schema.json"), headgate_config::schema::text()).unwrap();
    }
    let folders: Vec<_> = fs::read_dir(&frozen).unwrap().map(|entry| entry.unwrap()).collect();
    let [folder] = folders.as_slice() else { panic!("config/frozen/ has one folder, the version promised last") };
    let promised: Version = folder.file_name().to_str().unwrap().parse().unwrap();
    let old = fs::read_to_string(folder.path().join("headgate.schema.json")).unwrap();
    let needed = |new: &str| {
        let found = changes_of_what_is_read(&old, new);
        (promised.after(found.iter().map(|change| change.weight).max()), found)
    };
    let (least, found) = needed(&headgate_config::schema::text());
    let list: Vec<String> = found.iter().map(Change::to_string).collect();
    assert!(
        version >= least,
        "the config's form promised as {promised} changed: raise VERSION in config/src/schema.rs from {version} to {least}\n{}",
        list.join("\n")
    );
    // Planted: a setting that is gone, one that is new, other words.
    let Version(major, minor, patch) = promised;
    for (from, to, next) in [
        ("\"budget\": {", "\"patience\": {", Version(major + 1, 0, 0)),
        ("\"budget\": {", "\"patience\": { \"type\": \"string\" }, \"budget\": {", Version(major, minor + 1, 0)),
        ("\"description\": \"Where it is", "\"description\": \"Its place", Version(major, minor, patch + 1)),
    ] {
        assert!(old.contains(from), "{from}");
        assert_eq!(needed(&old.replacen(from, to, 1)).0, next, "{to}");
    }
}
