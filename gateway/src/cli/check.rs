//! `headgate check`: what a config comes to, or everything that is wrong with it. Opens no port and asks nobody.

use std::{
    fmt::Display,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use headgate_config::{Environment, Faults, Plan};

use super::{EX_CONFIG, fail};
use crate::tls::Tls;

/// Which config, and in which form the answer comes.
#[derive(clap::Args)]
#[command(after_help = "\
Prints, for each route: the filters in force (with those that stand there by default), the longest that text can wait for them, \
how much text can leave unjudged, and the most memory a stream can take. Warnings come first.

Opens no port and asks nobody, so it fits a CI job. Variables that the config names must be set.

Exit codes: 0 the config is good, perhaps with warnings; 64 bad usage; 78 the config is refused.

Examples:
  headgate check
  headgate check --env production /etc/headgate/headgate.yaml
  headgate check --format json | jq '.routes[].effect.delay'")]
pub struct Args {
    /// The config file.
    #[arg(default_value = "headgate.yaml", env = "HEADGATE_CONFIG")]
    pub config: PathBuf,
    /// Lay the overlay of this environment over it: local, preview, staging or production (`headgate.production.yaml` beside `headgate.yaml`).
    #[arg(long, env = "HEADGATE_ENV")]
    pub env: Option<Environment>,
    /// For people, or one JSON object for programs.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// The form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people: faults as compilers show them.
    Text,
    /// For programs: one JSON object, `{"ok": ...}`.
    Json,
}

/// Checks, and says so on standard output; faults for people go to standard error.
pub fn run(args: Args) -> ExitCode {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    match check(&args, &|name| std::env::var(name).ok(), &mut out, &mut err) {
        Ok(code) => code,
        // Whoever reads us has gone: `headgate check | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn check(args: &Args, vars: &dyn Fn(&str) -> Option<String>, out: &mut impl Write, err: &mut impl Write) -> io::Result<ExitCode> {
    match headgate_config::load(&args.config, args.env, vars).and_then(usable) {
        Ok(plan) => {
            match args.format {
                Format::Text => write!(out, "{}", plan.summary())?,
                Format::Json => writeln!(out, "{:#}", plan.summary().to_json())?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(faults) => {
            match args.format {
                Format::Text => writeln!(err, "{faults}")?,
                Format::Json => writeln!(out, "{:#}", faults.to_json())?,
            }
            Ok(ExitCode::from(EX_CONFIG))
        }
    }
}

/// What only the libraries that will use them can say: whether the certificate and its key are a pair.
fn usable(plan: Plan) -> Result<Plan, Faults> {
    if let Some(tls) = &plan.tls
        && let Err(error) = Tls::load(&tls.certificate, &tls.key)
    {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        return Err(refused(&plan, "tls", &format_args!("{error}{cause}")));
    }
    Ok(plan)
}

fn refused(plan: &Plan, setting: &str, found: &dyn Display) -> Faults {
    plan.refused(setting, found.to_string(), "make them anew, as a pair")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const GOOD: &str = "\
listen: 127.0.0.1:0
upstreams:
  model: { protocol: openai, endpoints: [http://127.0.0.1:8081] }
routes:
  - path: /v1/chat/stream
    upstream: model
    filters:
      - moderation: { mask: [email] }
        max_hold: ${HOLD:-20ms}
";

    fn checked(files: &[(&str, &str)], env: Option<Environment>, format: Format) -> (ExitCode, String, String) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let args = Args { config: folder.path().join("headgate.yaml"), env, format };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = check(&args, &|_| None, &mut out, &mut err).unwrap();
        (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn a_good_config_is_told_route_by_route() {
        let (code, out, err) = checked(&[("headgate.yaml", GOOD)], None, Format::Text);
        assert_eq!((code, err.as_str()), (ExitCode::SUCCESS, ""));
        assert!(out.contains("/v1/chat/stream (chat) -> model"), "{out}");
        assert!(out.contains("moderation (masks, holds at most 20ms)"), "{out}");
        assert!(out.contains("added delay      at most 20ms"), "{out}");
        assert!(out.contains("warning: anybody who can connect may call this"), "{out}");
    }

    #[test]
    fn json_is_one_object_whatever_is_said() {
        let (code, out, _) = checked(&[("headgate.yaml", GOOD)], None, Format::Json);
        let told: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((code, told["ok"].as_bool()), (ExitCode::SUCCESS, Some(true)));
        assert_eq!(told["routes"][0]["effect"]["delay"]["milliseconds"], 20);
        let (code, out, err) = checked(&[("headgate.yaml", "routes: 7")], None, Format::Json);
        let told: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!((code, err.as_str(), told["ok"].as_bool()), (ExitCode::from(EX_CONFIG), "", Some(false)));
        assert_eq!((&told["faults"][0]["path"], &told["faults"][0]["line"]), (&"routes".into(), &1.into()));
    }

    #[test]
    fn a_refused_config_is_told_on_standard_error_and_by_the_exit_code() {
        let (code, out, err) = checked(&[("headgate.yaml", &GOOD.replace("model\n", "modle\n"))], None, Format::Text);
        assert_eq!((code, out.as_str()), (ExitCode::from(EX_CONFIG), ""));
        assert!(err.contains("unknown upstream `modle`, did you mean `model`?") && err.contains("headgate.yaml:6:15"), "{err}");
    }

    #[test]
    fn the_overlay_of_the_environment_counts() {
        let overlay = "drain: { timeout: 5h }\n";
        let files = [("headgate.yaml", GOOD), ("headgate.staging.yaml", overlay)];
        assert_eq!(checked(&files, None, Format::Text).0, ExitCode::SUCCESS);
        let (code, _, err) = checked(&files, Some(Environment::Staging), Format::Text);
        assert_eq!(code, ExitCode::from(EX_CONFIG));
        assert!(err.contains("headgate.staging.yaml:1:19"), "{err}");
    }

    #[test]
    fn a_key_that_does_not_fit_its_certificate_is_found_before_the_start() {
        let pair = || rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (one, other) = (pair(), pair());
        let config = format!("tls: {{ certificate: a.pem, key: a.key }}\n{GOOD}");
        let files = |key: String| {
            let (cert, config) = (one.cert.pem(), config.clone());
            checked(&[("headgate.yaml", &config), ("a.pem", &cert), ("a.key", &key)], None, Format::Text)
        };
        assert_eq!(files(one.signing_key.serialize_pem()).0, ExitCode::SUCCESS);
        let (code, _, err) = files(other.signing_key.serialize_pem());
        assert_eq!(code, ExitCode::from(EX_CONFIG));
        assert!(err.contains("does not fit the certificate"), "{err}");
    }
}
