//! `headgate token`: makes an API key. The key is shown once; the config keeps its hash.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use headgate_contracts::{Subject, TenantId};
use headgate_filters::{auth::KeyHash, units::Moment};

use super::fail;

/// Whose key it is, and what it allows.
#[derive(clap::Args)]
#[command(after_help = "\
The key is 256 random bits. It is printed once and kept nowhere; the lines to put into the config hold its hash, from which \
nobody can get it back. Give the key to the client, which sends it as `Authorization: Bearer hg_...`.

Examples:
  headgate token --tenant acme
  headgate token --tenant acme --subject nightly-report --scope chat:send --expires 2027-01-31
  headgate token --tenant acme --only-key > key.txt      # the lines for the config go to standard error")]
pub struct Args {
    /// Who pays, and whose policy applies.
    #[arg(long)]
    pub tenant: TenantId,
    /// Who asks: a name for this one client, seen in logs and verdicts.
    #[arg(long, default_value = "key")]
    pub subject: Subject,
    /// What it allows; may be given several times.
    #[arg(long = "scope", value_name = "SCOPE", value_parser = scope)]
    pub scopes: Vec<String>,
    /// When it ends: a day or a time in UTC, e.g. 2027-01-31. Default: never.
    #[arg(long, value_name = "DATE")]
    pub expires: Option<Moment>,
    /// Print the key alone on standard output, and the lines for the config on standard error.
    #[arg(long)]
    pub only_key: bool,
}

fn scope(text: &str) -> Result<String, String> {
    // What OAuth allows in a scope (RFC 6749 section 3.3), less what YAML would read as more than text.
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.:/*+-".contains(&b);
    let is_scope = (1..=64).contains(&text.len()) && text.bytes().all(plain);
    if is_scope { Ok(text.to_owned()) } else { Err("a scope is a word such as `chat:send`".to_owned()) }
}

/// Makes a key and shows it.
pub fn run(args: Args) -> ExitCode {
    match fresh().and_then(|key| show(&args, &key, &mut io::stdout().lock(), &mut io::stderr().lock())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

/// `hg_` and 64 hexadecimal digits: 256 random bits.
pub(super) fn fresh() -> io::Result<String> {
    let mut bytes = [0; 32];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| io::Error::other("the system gives no random bytes"))?;
    let mut key = String::with_capacity(3 + 64);
    key.push_str("hg_");
    for byte in bytes {
        // Writing into a string cannot fail.
        let _ = write!(key, "{byte:02x}");
    }
    Ok(key)
}

fn show(args: &Args, key: &str, out: &mut impl Write, err: &mut impl Write) -> io::Result<()> {
    let lines = lines(args, key);
    if args.only_key {
        write!(err, "{lines}")?;
        return writeln!(out, "{key}");
    }
    writeln!(out, "The key, shown this once:\n\n  {key}\n\nUnder `auth: {{ keys: [...] }}` of the routes that it opens:\n")?;
    write!(out, "{lines}")?;
    if !io::stdout().is_terminal() {
        writeln!(err, "headgate: the key is in the output; keep it as a secret")?;
    }
    Ok(())
}

/// The key's entry in the config.
fn lines(args: &Args, key: &str) -> String {
    let mut lines = format!("- key: {}\n  tenant: {}\n  subject: {}\n", KeyHash::of(key), args.tenant, args.subject);
    if !args.scopes.is_empty() {
        lines += &format!("  scopes: [{}]\n", args.scopes.iter().map(|scope| format!("{scope:?}")).collect::<Vec<_>>().join(", "));
    }
    if let Some(expires) = args.expires {
        lines += &format!("  expires: {expires}\n");
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use headgate_contracts::{Credential, Secret, Stop};
    use headgate_filters::{Tools, build_chain};

    use super::*;

    fn args() -> Args {
        Args {
            tenant: "acme".parse().unwrap(),
            subject: "nightly-report".parse().unwrap(),
            scopes: vec!["chat:send".into(), "a*".into()],
            expires: Some("2999-01-31".parse().unwrap()),
            only_key: true,
        }
    }

    #[test]
    fn keys_are_long_and_never_the_same() {
        let (one, other) = (fresh().unwrap(), fresh().unwrap());
        assert_ne!(one, other);
        assert!(one.len() == 67 && one.starts_with("hg_"), "{one}");
    }

    #[tokio::test]
    async fn the_lines_in_a_config_admit_the_key_and_no_other() {
        let (mut key, mut entry) = (Vec::new(), Vec::new());
        let made = fresh().unwrap();
        show(&args(), &made, &mut key, &mut entry).unwrap();
        assert_eq!(String::from_utf8(key).unwrap().trim_end(), made);
        let entry = String::from_utf8(entry).unwrap();
        assert!(!entry.contains(&made));

        let indented: String = entry.lines().map(|line| format!("            {line}\n")).collect();
        let config = format!(
            "listen: 127.0.0.1:0\nupstreams:\n  m: {{ protocol: openai, endpoints: [http://127.0.0.1:1] }}\nroutes:\n  - path: /v1/chat/stream\n    upstream: m\n    filters:\n      - auth:\n          scopes: [chat:send]\n          keys:\n{indented}"
        );
        let plan =
            headgate_config::parse("test.yaml", &config, Path::new("."), None, &|_| None).unwrap_or_else(|faults| panic!("{faults}"));
        let chain = build_chain(&plan.routes[0].steps, &Tools::none()).unwrap();
        let admit = chain.iter().find_map(|built| built.admit.clone()).unwrap();
        let owner = admit.admit(&Credential::Bearer(Secret::new(&made))).await.unwrap();
        assert_eq!((owner.tenant.to_string(), owner.subject.to_string()), ("acme".to_owned(), "nightly-report".to_owned()));
        let stranger = admit.admit(&Credential::Bearer(Secret::new(&fresh().unwrap()))).await;
        assert!(matches!(stranger, Err(Stop::Refused(_) | Stop::Failed(_))));
    }

    #[test]
    fn a_scope_is_one_word() {
        assert!(scope("chat:send").is_ok());
        for bad in ["", "two words", "a, b]", "\"", &"x".repeat(65)] {
            assert!(scope(bad).is_err(), "{bad}");
        }
    }
}
