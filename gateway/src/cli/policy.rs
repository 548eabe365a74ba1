//! `headgate policy`: puts a version of the policy in force, shows what is, and goes back to the one before.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use headgate_config::{Environment, Faults, Plan};
use headgate_filters::{
    units::{Moment, Span},
    unix_now,
};
use headgate_policy::{
    ANY_TENANT, Digest, Entry, KeyFault, LONGEST_OVERLAP, PREVIOUS_FOR, Previous, Ring, Standing, Unsigned, Verifier,
    audit::{Audit, AuditFault},
    custody::audit_beside,
};
use headgate_store::{MOST_TENANTS, NotPut, Store, Unreachable, Unusable};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{EX_CONFIG, EX_UNAVAILABLE, fail, keys::user};
use crate::build;

/// What to do with the policy registry.
#[derive(clap::Subcommand)]
pub enum Policy {
    /// Put the policy of a config in force, from now on or from a time on.
    #[command(after_help = "\
What is published is the version and the constitution's hash of the config: the hash covers the document and what `moderation` looks
for, so it is computed as a gateway with this config does. The entry is signed with the policy key; processes that follow the
registry have it within a second.

The version before counts until the new one's time has come, and --overlap longer. Roll the gateways over to the new config within
that time: one that is early is not ready until the version is in force, one that is late is not ready any more.

The ring of policy keys is made once, with `headgate keys generate`, and kept where no gateway runs; its public half is what
`policy.registry.keys` of the config names (`headgate keys jwks RING > registry.jwks.json`).

Exit codes: 0 published, or in force already; 1 refused, nothing was changed; 69 the registry, the ring or the audit cannot be used;
78 the config has faults.

Examples:
  headgate policy publish --ring registry-ring.json headgate.yaml
  headgate policy publish --ring registry-ring.json --from 2027-01-31T08:00:00Z --overlap 30min headgate.yaml
  headgate policy publish --ring registry-ring.json --tenant acme acme.yaml")]
    Publish {
        /// What is changed, and by whom.
        #[command(flatten)]
        change: Change,
        /// When it comes into force, e.g. `2027-01-31T08:00:00Z`. Default: now.
        #[arg(long, value_name = "TIME")]
        from: Option<Moment>,
        /// Replace what stands there even if it cannot be read as an entry of these policy keys. Nothing of it counts as previous.
        #[arg(long)]
        replace: bool,
    },
    /// Show what is in force, for whom, until when.
    #[command(after_help = "\
Exit codes: 0 shown; 1 something stands there that no policy key signed, or this config's policy is not in force; 69 the registry
cannot be reached; 78 the config has faults.

Examples:
  headgate policy show headgate.yaml
  headgate policy show --json headgate.yaml | jq '.entries[] | {tenant, version: .active.version}'")]
    Show {
        /// Where the registry is.
        #[command(flatten)]
        place: Place,
        /// One JSON object instead of a table, times in Unix seconds.
        #[arg(long)]
        json: bool,
    },
    /// Put the previous version in force again.
    #[command(after_help = "\
The version that was in force becomes the previous one and counts for --overlap: with `--overlap 0s` it ends at once, and turns of
gateways that still have its config are refused. What was published for a later time and is not in force yet is taken back.

Exit codes: as for publish.

Example: headgate policy rollback --ring registry-ring.json headgate.yaml")]
    Rollback {
        /// What is changed, and by whom.
        #[command(flatten)]
        change: Change,
    },
}

/// Where the registry is.
#[derive(clap::Args)]
pub struct Place {
    /// The config: its policy, and where its registry is.
    #[arg(default_value = "headgate.yaml", env = "HEADGATE_CONFIG")]
    pub config: PathBuf,
    /// Lay the overlay of this environment over it: local, preview, staging or production.
    #[arg(long, env = "HEADGATE_ENV")]
    pub env: Option<Environment>,
    /// Use the registry in this folder, whatever the config names.
    #[arg(long, value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
}

/// What is changed, by whom, and where it is recorded.
#[derive(clap::Args)]
pub struct Change {
    /// Where the registry is.
    #[command(flatten)]
    pub place: Place,
    /// The ring of policy keys: its current key signs.
    #[arg(long, value_name = "FILE", env = "HEADGATE_POLICY_RING")]
    pub ring: PathBuf,
    /// The tenant whose policy it is. Default: that of all tenants that have none of their own.
    #[arg(long, default_value = ANY_TENANT, hide_default_value = true)]
    pub tenant: String,
    /// How long the version before counts after the new one has come into force, `0s` to `24h`.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_secs(PREVIOUS_FOR)), value_parser = overlap)]
    pub overlap: Span,
    /// Where the change is recorded, before it is made. Default: beside the ring, `keys.audit.jsonl` for `keys.json`.
    #[arg(long, value_name = "FILE")]
    pub audit: Option<PathBuf>,
    /// Who changes it, as the record says. Default: the user of this shell.
    #[arg(long, env = "HEADGATE_ACTOR", default_value_t = user())]
    pub actor: String,
}

/// How long Redis may take to be there.
const PATIENCE: Duration = Duration::from_secs(5);

fn overlap(text: &str) -> Result<Span, String> {
    let span: Span = text.parse().map_err(|error| format!("{error}"))?;
    if span.0.as_secs() <= LONGEST_OVERLAP { Ok(span) } else { Err("expected 0s to 24h".to_owned()) }
}

/// Does it, and says what was and what is in force.
pub async fn run(policy: Policy) -> ExitCode {
    let mut out = Vec::new();
    let done = told(&policy, unix_now(), &mut out).await;
    match io::stdout().write_all(&out) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return fail(&error, 1),
        Ok(()) | Err(_) => {}
    }
    match done {
        Ok(code) => code,
        Err(failed) => fail(&failed, failed.code()),
    }
}

/// What stood in the way.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Config(#[from] Faults),
    #[error("{} has no section `policy`: there is nothing to put in force", .0.display())]
    NoPolicy(PathBuf),
    #[error("{} names no registry: add `policy.registry` and `redis` to it, or name a folder with --folder", .0.display())]
    NoRegistry(PathBuf),
    #[error("cannot use redis")]
    NoUrl(#[from] Unusable),
    #[error("redis, where the config says the registry is, does not answer within {}s: is it up, and may this machine reach it?", PATIENCE.as_secs())]
    NoRedis,
    #[error("cannot use the ring of policy keys: make one with `headgate keys generate`, or name another with --ring")]
    Ring(#[source] KeyFault),
    #[error(
        "no gateway with {} would believe the ring's current key: it is not in `policy.registry.keys`. Publish it there first: headgate keys jwks {}",
        config.display(), ring.display()
    )]
    NotBelieved { config: PathBuf, ring: PathBuf },
    #[error("what stands there for {tenant} is no entry that a key of this ring signed ({}): use the ring that did, or --replace to put an end to it", why.as_str())]
    Unreadable { tenant: String, why: headgate_policy::Rejected },
    #[error(
        "version {version} is published for {tenant} with another hash, {there}: a version names one constitution, so raise `policy.version`"
    )]
    Renamed { version: String, tenant: String, there: String },
    #[error("--from {0} is over: leave it out to begin now")]
    Over(Moment),
    #[error("nothing is published for {0}, so there is nothing to go back from")]
    Nothing(String),
    #[error("there is no version before {version} for {tenant}: publish the one you want")]
    NoPrevious { version: String, tenant: String },
    #[error("cannot sign the entry")]
    Unsigned(#[from] Unsigned),
    #[error("cannot record the change, so it was not made")]
    Audit(#[from] AuditFault),
    #[error(transparent)]
    NotPut(#[from] NotPut),
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    #[error("cannot say what was done")]
    Said(#[from] io::Error),
}

impl Failed {
    fn code(&self) -> u8 {
        match self {
            Failed::Config(_) | Failed::NoPolicy(_) | Failed::NoRegistry(_) | Failed::NoUrl(_) => EX_CONFIG,
            Failed::NoRedis | Failed::Ring(_) | Failed::Audit(_) | Failed::Unreachable(_) | Failed::NotPut(NotPut::Unreachable(_)) => {
                EX_UNAVAILABLE
            }
            Failed::NotBelieved { .. }
            | Failed::Unreadable { .. }
            | Failed::Renamed { .. }
            | Failed::Over(_)
            | Failed::Nothing(_)
            | Failed::NoPrevious { .. }
            | Failed::Unsigned(_)
            | Failed::NotPut(NotPut::Overtaken)
            | Failed::Said(_) => 1,
        }
    }
}

async fn told(policy: &Policy, now: u64, out: &mut impl Write) -> Result<ExitCode, Failed> {
    match policy {
        Policy::Publish { change, from, replace } => {
            let desk = change.open(*replace).await?;
            let (ver, con) = desk.named()?;
            let nbf = match from {
                Some(from) if from.0 < now => return Err(Failed::Over(*from)),
                from => from.map_or(now, |from| from.0),
            };
            if let Some(before) = &desk.before {
                let Entry { active, .. } = before;
                if active.ver == ver && active.con == con {
                    // The same key signs the same entry with the same signature.
                    if desk.found.as_ref() != Some(&desk.ring.sign_entry(before)?) {
                        let anew = Entry { seq: before.seq.saturating_add(1), ..before.clone() };
                        return change.put(&desk, anew, "policy.entry.signed_anew", now, out).await;
                    }
                    writeln!(out, "version {ver} is published for {} already, nothing was changed", whom(&before.tid))?;
                    entry_lines(before, now, out)?;
                    return Ok(ExitCode::SUCCESS);
                }
                if active.ver == ver {
                    return Err(Failed::Renamed { version: ver, tenant: whom(&before.tid), there: active.con.short() });
                }
            }
            let next = match &desk.before {
                None => Entry::first(&change.tenant, &ver, con, nbf),
                Some(before) => change.overlapping(following(before, &ver, con, nbf, now)),
            };
            change.put(&desk, next, "policy.entry.published", now, out).await
        }
        Policy::Rollback { change } => {
            let desk = change.open(false).await?;
            let Some(before) = &desk.before else { return Err(Failed::Nothing(whom(&change.tenant))) };
            let Some(Previous { con, ver, .. }) = &before.previous else {
                return Err(Failed::NoPrevious { version: before.active.ver.clone(), tenant: whom(&before.tid) });
            };
            let mut next = before.succeeded_by(ver, *con, now);
            if before.active.nbf > now {
                // It was never in force, and so it is nothing to go on with for a while.
                next.previous = None;
            }
            change.put(&desk, change.overlapping(next), "policy.entry.rolled_back", now, out).await
        }
        Policy::Show { place, json } => {
            let (plan, store) = place.open().await?;
            let Some(keys) = plan.policy.as_ref().and_then(|policy| Some(&policy.registry.as_ref()?.keys)) else {
                return Err(Failed::NoRegistry(place.config.clone()));
            };
            show(&plan, &store.entries(MOST_TENANTS).await?, keys, *json, now, out)
        }
    }
}

/// The entry after `before`. What is in force now is the previous one of the next, also where another was to come first.
fn following(before: &Entry, ver: &str, con: Digest, nbf: u64, now: u64) -> Entry {
    let mut next = before.succeeded_by(ver, con, nbf);
    if before.active.nbf > now {
        next.previous.clone_from(&before.previous);
    }
    next
}

impl Place {
    async fn open(&self) -> Result<(Plan, Store), Failed> {
        let plan = headgate_config::load(&self.config, self.env, &|name| std::env::var(name).ok())?;
        let named = plan.policy.as_ref().and_then(|policy| policy.registry.as_ref());
        let folder = self.folder.clone().or_else(|| named.and_then(|registry| registry.folder.clone()));
        let store = match (folder, &plan.redis) {
            (Some(folder), _) => Store::Folder(folder),
            (None, Some(redis)) if named.is_some() => {
                let redis = build::redis(redis, PATIENCE)?;
                timeout(PATIENCE, redis.up()).await.map_err(|_| Failed::NoRedis)?;
                Store::Redis(redis)
            }
            (None, _) => return Err(Failed::NoRegistry(self.config.clone())),
        };
        Ok((plan, store))
    }
}

/// A registry, opened for a change.
struct Desk {
    plan: Plan,
    config: PathBuf,
    store: Store,
    ring: Ring,
    /// What stands there for the tenant, as it was found, and as an entry.
    found: Option<String>,
    before: Option<Entry>,
}

impl Desk {
    fn named(&self) -> Result<(String, Digest), Failed> {
        let policy = self.plan.policy.as_ref().ok_or_else(|| Failed::NoPolicy(self.config.clone()))?;
        Ok((policy.issuer.pol.ver.clone(), policy.issuer.con))
    }
}

impl Change {
    async fn open(&self, replace: bool) -> Result<Desk, Failed> {
        let (plan, store) = self.place.open().await?;
        let ring = Ring::load(&self.ring).map_err(Failed::Ring)?;
        let believed = plan.policy.as_ref().and_then(|policy| policy.registry.as_ref()).is_none_or(|registry| {
            let probe = ring.sign_entry(&Entry::first(ANY_TENANT, "probe", Digest::of(b""), 0));
            probe.is_ok_and(|probe| registry.keys.open_entry(&probe, unix_now()).is_ok())
        });
        if !believed {
            return Err(Failed::NotBelieved { config: self.place.config.clone(), ring: self.ring.clone() });
        }
        let found = store.entry(&self.tenant).await?;
        let before = match found.as_deref().map(|found| ring.verifier().open_entry(found, unix_now())) {
            None => None,
            Some(Ok(entry)) if entry.tid == self.tenant => Some(entry),
            Some(_) if replace => None,
            Some(read) => {
                let why = read.err().unwrap_or(headgate_policy::Rejected::Tenant);
                return Err(Failed::Unreadable { tenant: whom(&self.tenant), why });
            }
        };
        Ok(Desk { plan, config: self.place.config.clone(), store, ring, found, before })
    }

    fn overlapping(&self, mut next: Entry) -> Entry {
        if let Some(previous) = &mut next.previous {
            previous.overlap = Some(self.overlap.0.as_secs());
        }
        next
    }

    /// Records the change, makes it, and says so.
    async fn put(&self, desk: &Desk, mut next: Entry, action: &str, now: u64, out: &mut impl Write) -> Result<ExitCode, Failed> {
        // By the clock, too: what is published after the store has lost everything still follows what processes remember.
        next.seq = next.seq.max(now);
        let token = desk.ring.sign_entry(&next)?;
        let path = self.audit.clone().unwrap_or_else(|| audit_beside(&self.ring));
        let mut audit = Audit::open(&path)?;
        let facts = json!({
            "tenant": next.tid,
            "seq": next.seq,
            "version": next.active.ver,
            "constitution": next.active.con,
            "from": next.active.nbf,
            "was": desk.before.as_ref().map(|before| json!({"seq": before.seq, "version": before.active.ver, "constitution": before.active.con})),
            "key": desk.ring.current().map(|kid| kid.to_string()),
        });
        audit.append(now, action, &self.actor, facts)?;
        if let Err(error) = desk.store.put(&self.tenant, &token, desk.found.as_deref()).await {
            // Redis may have taken it without saying so; the next look will tell.
            let facts = json!({"tenant": next.tid, "seq": next.seq, "why": error.to_string()});
            audit.append(unix_now(), "policy.entry.unconfirmed", &self.actor, facts)?;
            return Err(error.into());
        }
        writeln!(out, "was")?;
        match &desk.before {
            Some(before) => entry_lines(before, now, out)?,
            None => writeln!(out, "  nothing for {}", whom(&self.tenant))?,
        }
        writeln!(out, "is from now on")?;
        entry_lines(&next, now, out)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A tenant, for people.
fn whom(tenant: &str) -> String {
    if tenant == ANY_TENANT { "all tenants without their own".to_owned() } else { format!("tenant {tenant:?}") }
}

fn entry_lines(entry: &Entry, now: u64, out: &mut impl Write) -> io::Result<()> {
    let Entry { tid, seq, active, previous } = entry;
    writeln!(out, "  {}, entry {seq}", whom(tid))?;
    let when = if active.nbf > now { "in force from" } else { "in force since" };
    write!(out, "    {:<16} {}  {when} {}", active.ver, active.con.short(), Moment(active.nbf))?;
    match active.until {
        Some(until) => writeln!(out, " until {}", Moment(until))?,
        None => writeln!(out)?,
    }
    if let (Some(Previous { con, ver, .. }), Some(until)) = (previous, entry.previous_until()) {
        let counts = if now <= until { "counts until" } else { "counted until" };
        writeln!(out, "    {ver:<16} {}  {counts} {}", con.short(), Moment(until))?;
    }
    Ok(())
}

fn show(plan: &Plan, found: &[String], keys: &Verifier, as_json: bool, now: u64, out: &mut impl Write) -> Result<ExitCode, Failed> {
    let read: Vec<_> = found.iter().map(|token| (token, keys.open_entry(token, now))).collect();
    let mut entries: Vec<&Entry> = read.iter().filter_map(|(_, entry)| entry.as_ref().ok()).collect();
    entries.sort_by_key(|entry| &entry.tid);
    let refused: Vec<_> = read.iter().filter_map(|(token, entry)| Some((Digest::of(token.as_bytes()), entry.as_ref().err()?))).collect();
    let ours = plan.policy.as_ref().map(|policy| (&policy.issuer.pol.ver, policy.issuer.con));
    let stands = |entry: &Entry| {
        ours.map(|(ver, con)| match entry.standing(ver, con, now) {
            Standing::Active => "active",
            Standing::Previous => "previous",
            Standing::OtherVersion | Standing::Unknown => "unknown",
        })
    };
    let is_in_force = entries.iter().any(|entry| stands(entry).is_some_and(|word| word != "unknown"));
    if as_json {
        let entry = |entry: &&Entry| -> Value {
            let previous = entry
                .previous
                .as_ref()
                .map(|previous| json!({"version": previous.ver, "constitution": previous.con, "until": entry.previous_until()}));
            json!({
                "tenant": entry.tid,
                "seq": entry.seq,
                "active": {"version": entry.active.ver, "constitution": entry.active.con, "from": entry.active.nbf, "until": entry.active.until},
                "previous": previous,
                "config": stands(entry),
            })
        };
        let refused: Vec<_> = refused.iter().map(|(digest, why)| json!({"digest": digest, "why": why.as_str()})).collect();
        let config = ours.map(|(ver, con)| json!({"version": ver, "constitution": con}));
        let all: Vec<_> = entries.iter().map(entry).collect();
        writeln!(out, "{:#}", json!({"config": config, "entries": all, "refused": refused}))?;
    } else {
        for entry in &entries {
            entry_lines(entry, now, out)?;
        }
        if entries.is_empty() {
            writeln!(out, "nothing is published: no turn is taken until `headgate policy publish` was run")?;
        }
        for (digest, why) in &refused {
            writeln!(out, "  something that is no entry of a policy key ({}), {}: it changes nothing", why.as_str(), digest.short())?;
        }
        if let Some((ver, con)) = ours {
            let words = entries.iter().map(|entry| (entry, stands(entry).unwrap_or_default()));
            let stands = words.min_by_key(|(_, word)| ["active", "previous", "unknown"].iter().position(|known| known == word));
            match stands {
                Some((entry, "active")) => writeln!(out, "this config, {ver} {}, is in force for {}", con.short(), whom(&entry.tid))?,
                Some((entry, "previous")) => {
                    let until = Moment(entry.previous_until().unwrap_or_default());
                    writeln!(out, "this config, {ver} {}, counts until {until} for {}", con.short(), whom(&entry.tid))?;
                }
                Some(_) | None => writeln!(out, "this config, {ver} {}, is not in force: a gateway with it is not ready", con.short())?,
            }
        }
    }
    Ok(if refused.is_empty() && is_in_force { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;
    use headgate_policy::Rejected;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        policy: Policy,
    }

    /// A ring of policy keys, a config that believes them, and a registry in a folder.
    struct House(tempfile::TempDir);

    impl House {
        fn new() -> House {
            let folder = tempfile::tempdir().unwrap();
            let ring = Ring::generate(NOW).unwrap();
            ring.save(&folder.path().join("ring.json")).unwrap();
            fs::write(folder.path().join("registry.jwks.json"), ring.jwks()).unwrap();
            fs::write(folder.path().join("constitution.md"), "# Be kind\n").unwrap();
            let house = House(folder);
            house.config("1", "registry: { keys: registry.jwks.json, folder: policies }");
            house
        }

        fn config(&self, version: &str, registry: &str) {
            let config = format!(
                "listen: 127.0.0.1:0\npolicy: {{ constitution: constitution.md, version: \"{version}\", {registry} }}\n\
                 upstreams:\n  chat: {{ protocol: orchestrator, endpoints: [http://127.0.0.1:8090] }}\n\
                 routes:\n  - path: /v1/chat/stream\n    upstream: chat\n    filters: [policy_headers]\n"
            );
            fs::write(self.path("headgate.yaml"), config).unwrap();
        }

        fn version(&self, version: &str) {
            self.config(version, "registry: { keys: registry.jwks.json, folder: policies }");
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// What `headgate policy ...` says at `now`, and whether all is well.
        async fn policy(&self, args: &[&str], now: u64) -> Result<(String, bool), Failed> {
            let (config, ring) = (self.path("headgate.yaml"), self.path("ring.json"));
            let mut line = vec!["policy", args[0], config.to_str().unwrap()];
            if args[0] != "show" {
                line.extend(["--actor", "ann"]);
                if !args.contains(&"--ring") {
                    line.extend(["--ring", ring.to_str().unwrap()]);
                }
            }
            line.extend(&args[1..]);
            let line = Line::try_parse_from(line).unwrap_or_else(|error| panic!("{error}"));
            let mut out = Vec::new();
            let code = told(&line.policy, now, &mut out).await?;
            Ok((String::from_utf8(out).unwrap(), format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS)))
        }

        async fn shown(&self, now: u64) -> Value {
            serde_json::from_str(&self.policy(&["show", "--json"], now).await.unwrap().0).unwrap()
        }
    }

    #[tokio::test]
    async fn a_version_is_published_followed_and_rolled_back_and_all_of_it_is_on_record() {
        let house = House::new();
        let (out, is_good) = house.policy(&["show"], NOW).await.unwrap_or_else(|error| (error.to_string(), false));
        assert!(!is_good, "{out}");
        let (out, _) = house.policy(&["publish"], NOW).await.unwrap();
        assert!(out.contains("nothing for all tenants without their own") && out.contains("in force since 2027-01-15T08:00:00Z"), "{out}");
        let (out, is_good) = house.policy(&["show"], NOW).await.unwrap();
        assert!(is_good && out.contains("is in force for all tenants without their own"), "{out}");
        let (out, _) = house.policy(&["publish"], NOW + 1).await.unwrap();
        assert!(out.contains("already, nothing was changed"), "{out}");

        house.version("2");
        let (_, is_good) = house.policy(&["show"], NOW + 10).await.unwrap();
        assert!(!is_good, "version 2 is not in force yet");
        house.policy(&["publish", "--overlap", "10min"], NOW + 10).await.unwrap();
        let shown = house.shown(NOW + 10).await;
        assert_eq!(shown["entries"][0]["active"]["version"], "2");
        assert_eq!(shown["entries"][0]["config"], "active");
        assert_eq!(shown["entries"][0]["previous"]["version"], "1");
        assert_eq!(shown["entries"][0]["previous"]["until"], NOW + 10 + 600);

        let (out, _) = house.policy(&["rollback", "--overlap", "0s"], NOW + 100).await.unwrap();
        assert!(out.find("\n    2 ").unwrap() < out.rfind("\n    1 ").unwrap(), "{out}");
        let shown = house.shown(NOW + 101).await;
        assert_eq!(shown["entries"][0]["active"]["version"], "1");
        assert_eq!(shown["entries"][0]["config"], "unknown", "this config has version 2");
        let seqs = [NOW, NOW + 10, NOW + 100];
        let recorded = fs::read_to_string(house.path("ring.audit.jsonl")).unwrap();
        let recorded: Vec<Value> = recorded.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let actions: Vec<_> = recorded.iter().map(|record| record["action"].as_str().unwrap()).collect();
        assert_eq!(actions, ["policy.entry.published", "policy.entry.published", "policy.entry.rolled_back"]);
        for (record, seq) in recorded.iter().zip(seqs) {
            assert_eq!((&record["actor"], &record["facts"]["seq"]), (&json!("ann"), &json!(seq)));
        }
        headgate_policy::audit::verify(&house.path("ring.audit.jsonl"), |_| ()).unwrap();
    }

    #[tokio::test]
    async fn what_is_published_for_later_leaves_in_force_what_is_and_can_be_taken_back() {
        let house = House::new();
        house.policy(&["publish"], NOW).await.unwrap();
        house.version("2");
        let later = Moment(NOW + 3600).to_string();
        let (out, _) = house.policy(&["publish", "--from", &later], NOW + 10).await.unwrap();
        assert!(out.contains(&format!("in force from {later}")), "{out}");
        house.version("3");
        house.policy(&["publish", "--from", &later], NOW + 20).await.unwrap();
        let shown = house.shown(NOW + 20).await;
        assert_eq!((&shown["entries"][0]["active"]["version"], &shown["entries"][0]["previous"]["version"]), (&json!("3"), &json!("1")));
        house.policy(&["rollback"], NOW + 30).await.unwrap();
        let shown = house.shown(NOW + 30).await;
        assert_eq!((&shown["entries"][0]["active"]["version"], &shown["entries"][0]["previous"]), (&json!("1"), &Value::Null));
    }

    #[tokio::test]
    async fn after_a_rotation_of_the_policy_key_the_same_is_signed_anew() {
        let house = House::new();
        house.policy(&["publish"], NOW).await.unwrap();
        let mut ring = Ring::load(&house.path("ring.json")).unwrap();
        ring.prepare(NOW, 10).unwrap();
        ring.promote(NOW + 10).unwrap();
        ring.save(&house.path("ring.json")).unwrap();
        // What every config has to have first.
        let unbelieved = house.policy(&["publish"], NOW + 20).await;
        assert!(matches!(unbelieved, Err(Failed::NotBelieved { .. })));
        fs::write(house.path("registry.jwks.json"), ring.jwks()).unwrap();
        let before = house.shown(NOW + 20).await;
        let (out, _) = house.policy(&["publish"], NOW + 20).await.unwrap();
        assert!(out.contains("is from now on"), "{out}");
        let after = house.shown(NOW + 20).await;
        assert_eq!((&before["entries"][0]["active"], &after["entries"][0]["seq"]), (&after["entries"][0]["active"], &json!(NOW + 20)));
        let (out, _) = house.policy(&["publish"], NOW + 30).await.unwrap();
        assert!(out.contains("already, nothing was changed"), "{out}");
    }

    #[tokio::test]
    async fn a_tenant_can_have_a_policy_of_its_own() {
        let house = House::new();
        house.policy(&["publish"], NOW).await.unwrap();
        house.version("2");
        house.policy(&["publish", "--tenant", "acme"], NOW).await.unwrap();
        let shown = house.shown(NOW).await;
        let tenants: Vec<_> =
            shown["entries"].as_array().unwrap().iter().map(|entry| (&entry["tenant"], &entry["active"]["version"])).collect();
        assert_eq!(tenants, [(&json!("*"), &json!("1")), (&json!("acme"), &json!("2"))]);
    }

    #[tokio::test]
    async fn what_cannot_be_done_is_said_with_the_remedy_and_changes_nothing() {
        let house = House::new();
        house.policy(&["publish"], NOW).await.unwrap();
        let before = fs::read(house.path("policies/any.jws")).unwrap();
        let over = Moment(NOW - 1).to_string();

        fs::write(house.path("constitution.md"), "# Be kinder\n").unwrap();
        let renamed = house.policy(&["publish"], NOW).await.unwrap_err();
        assert!(renamed.to_string().contains("raise `policy.version`"), "{renamed}");
        house.version("2");
        assert!(matches!(house.policy(&["publish", "--from", &over], NOW).await, Err(Failed::Over(_))));
        assert!(matches!(house.policy(&["rollback"], NOW).await, Err(Failed::NoPrevious { .. })));
        assert!(matches!(house.policy(&["rollback", "--tenant", "acme"], NOW).await, Err(Failed::Nothing(_))));

        let stranger = Ring::generate(NOW).unwrap();
        stranger.save(&house.path("stranger.json")).unwrap();
        let path = house.path("stranger.json");
        let unbelieved = house.policy(&["publish", "--ring", path.to_str().unwrap()], NOW).await;
        assert!(unbelieved.is_err_and(|failed| failed.to_string().contains("headgate keys jwks")));
        let missing = house.path("no-ring.json");
        let missing = house.policy(&["publish", "--ring", missing.to_str().unwrap()], NOW).await.unwrap_err();
        assert!(missing.to_string().contains("headgate keys generate") && missing.code() == EX_UNAVAILABLE, "{missing}");
        assert_eq!(fs::read(house.path("policies/any.jws")).unwrap(), before);

        fs::write(house.path("policies/any.jws"), stranger.sign_entry(&Entry::first("*", "9", Digest::of(b"lax"), 0)).unwrap()).unwrap();
        let (out, is_good) = house.policy(&["show"], NOW).await.unwrap();
        assert!(!is_good && out.contains("it changes nothing"), "{out}");
        let unreadable = house.policy(&["publish"], NOW).await.unwrap_err();
        assert!(matches!(unreadable, Failed::Unreadable { why: Rejected::Kid, .. }) && unreadable.to_string().contains("--replace"));
        house.policy(&["publish", "--replace"], NOW + 5).await.unwrap();
        let (_, is_good) = house.policy(&["show"], NOW + 5).await.unwrap();
        assert!(is_good);

        house.config("2", "issuer: headgate");
        let nowhere = house.policy(&["publish"], NOW).await.unwrap_err();
        assert!(nowhere.to_string().contains("policy.registry") && nowhere.code() == EX_CONFIG, "{nowhere}");
    }
}
