//! Every config in `tests/refused` is refused with exactly the words beside it: what is wrong, where, and the remedy.
//!
//! `HEADGATE_WRITE=1 cargo test -p headgate-config --test refused` writes the words anew: read them before they are kept.

use std::{env, fs, path::Path};

use headgate_config::{Environment, Faults, Severity};

fn variables(name: &str) -> Option<String> {
    let value = match name {
        "NUMBER" => "7",
        "TOKEN" => "a-secret-token",
        "MULTILINE" => "a\nsecret",
        "EMPTY" => "",
        _ => return None,
    };
    Some(value.to_owned())
}

fn refused(path: &Path, environment: Option<Environment>) -> Faults {
    match headgate_config::load(path, environment, &variables) {
        Ok(_) => panic!("{} is taken", path.display()),
        Err(faults) => faults,
    }
}

#[test]
fn each_bad_config_is_refused_in_the_words_beside_it() {
    // Relative, so that no machine's folders stand in the words.
    let folder = Path::new("tests/refused");
    let (mut seen, mut wrong) = (0, Vec::new());
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yaml"))
        .collect();
    names.sort();
    for name in &names {
        let stem = name.trim_end_matches(".yaml");
        if stem.contains('.') {
            continue;
        }
        let environment = Environment::ALL.into_iter().find(|environment| names.contains(&format!("{stem}.{environment}.yaml")));
        let faults = refused(&folder.join(name), environment);
        let words = format!("{faults}\n");
        for secret in ["sk-live", "a-secret", "MC4CAQAwBQYDK2VwBCIEIA", "hg_0123456789abcdef", "user:pass"] {
            assert!(!words.contains(secret), "{name} shows a secret:\n{words}");
        }
        for fault in faults.0.iter().filter(|fault| fault.severity == Severity::Error) {
            assert!(fault.line > 0 && fault.column > 0, "{name} names no line: {fault}");
        }
        let beside = folder.join(format!("{stem}.txt"));
        if env::var_os("HEADGATE_WRITE").is_some() {
            fs::write(&beside, &words).unwrap();
        }
        if fs::read_to_string(&beside).unwrap_or_default() != words {
            wrong.push(format!("{name}:\n{words}"));
        }
        seen += 1;
    }
    assert!(wrong.is_empty(), "not the words beside it:\n{}", wrong.join("\n"));
    assert!(seen >= 50, "{seen}");
}
