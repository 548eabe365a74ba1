//! Says which policy is in force: the one of the config, or what a signed registry says, which others read too.

use std::{fmt, sync::Arc, time::Duration};

use headgate_config::Plan;
use headgate_filters::{Spec, unix_now};
use headgate_policy::{ANY_TENANT, Entry, Issuer, Memory, Registry, Ring, Standing, Unavailable};
use headgate_store::{Followed, Redis, Store};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
};
use tokio::time::{MissedTickBehavior, interval};

use crate::{build::Unbuildable, live::App};

/// How often our own standing is looked at: a policy comes into force, and goes, by the clock.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Who says what is in force, for as long as the process lives.
#[derive(Clone)]
pub struct Policies(Arc<Kind>);

enum Kind {
    /// The config: its policy is signed with a key that nobody else has, as the registry takes nothing unsigned.
    Own { memory: Memory, key: Ring },
    /// A store of entries that the policy key signed.
    Followed(Followed),
}

impl Policies {
    /// What `plan` asks for; its own policy is in force at once.
    pub fn of(plan: &Plan, redis: Option<&Redis>) -> Result<Policies, Unbuildable> {
        let told = plan.policy.as_ref().and_then(|policy| policy.registry.as_ref());
        let kind = match told {
            None => Kind::Own { memory: Memory::new(1), key: Ring::generate(unix_now())? },
            Some(told) => {
                let store = match (&told.folder, redis) {
                    (Some(folder), _) => Store::Folder(folder.clone()),
                    (None, Some(redis)) => Store::redis(redis),
                    (None, None) => return Err(Unbuildable::NoRedis),
                };
                Kind::Followed(Followed::new(store, told.keys.clone(), unix_now))
            }
        };
        let policies = Policies(Arc::new(kind));
        policies.adopt(plan)?;
        Ok(policies)
    }

    /// Takes over what another plan says: its policy, which is then in force, or the policy keys.
    pub fn adopt(&self, plan: &Plan) -> Result<(), Unbuildable> {
        let Some(policy) = &plan.policy else { return Ok(()) };
        match (&*self.0, &policy.registry) {
            (Kind::Own { memory, key }, _) => {
                let (Issuer { pol, con, .. }, now) = (&policy.issuer, unix_now());
                let entry = match memory.entries().first() {
                    None => Entry::first(ANY_TENANT, &pol.ver, *con, 0),
                    Some(entry) if entry.active.ver == pol.ver && entry.active.con == *con => return Ok(()),
                    // The turns on their way were signed under the one before.
                    Some(entry) => entry.succeeded_by(&pol.ver, *con, now),
                };
                memory.install(&key.sign_entry(&entry)?, &key.verifier(), now)?;
            }
            (Kind::Followed(followed), Some(told)) => followed.trust(told.keys.clone()),
            (Kind::Followed(_), None) => {}
        }
        Ok(())
    }

    /// What verdicts are checked against.
    pub fn registry(&self) -> Arc<dyn Registry> {
        Arc::new(self.clone())
    }

    /// Reads the registry, and reads it again, for as long as it is polled.
    pub async fn follow(self) {
        match &*self.0 {
            Kind::Own { .. } => std::future::pending().await,
            Kind::Followed(followed) => followed.follow().await,
        }
    }

    /// Adds what is counted to what is exported.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        if let Kind::Followed(followed) = &*self.0 {
            followed.register(registry);
        }
    }

    fn entries(&self) -> Result<Vec<Arc<Entry>>, Unavailable> {
        match &*self.0 {
            Kind::Own { memory, .. } => Ok(memory.entries()),
            Kind::Followed(followed) => followed.entries(),
        }
    }
}

impl Registry for Policies {
    fn entry(&self, tenant: &str, now: u64) -> Result<Option<Arc<Entry>>, Unavailable> {
        match &*self.0 {
            Kind::Own { memory, .. } => memory.entry(tenant, now),
            Kind::Followed(followed) => followed.entry(tenant, now),
        }
    }
}

impl fmt::Debug for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Kind::Own { memory, .. } => f.debug_tuple("Own").field(memory).finish(),
            Kind::Followed(followed) => f.debug_tuple("Followed").field(followed).finish(),
        }
    }
}

/// What this gateway signs under, and who says whether that is in force.
#[derive(Debug, Clone)]
pub struct OurPolicy {
    issuer: Issuer,
    policies: Policies,
}

impl OurPolicy {
    /// The policy that some route of `plan` signs under, if one does.
    pub fn of(plan: &Plan, policies: &Policies) -> Option<OurPolicy> {
        let signs = plan.routes.iter().flat_map(|route| &route.steps).any(|step| matches!(step.spec, Spec::PolicyHeaders(_)));
        let policy = plan.policy.as_ref().filter(|_| signs)?;
        Some(OurPolicy { issuer: policy.issuer.clone(), policies: policies.clone() })
    }

    /// How it stands now, for those tenants for whom it stands best: a tenant with a policy of its own may be refused here and be
    /// served elsewhere.
    pub fn stands(&self) -> Stands {
        let (Issuer { pol, con, .. }, now) = (&self.issuer, unix_now());
        let Ok(entries) = self.policies.entries() else { return Stands::Unavailable };
        let standing = |entry: &Arc<Entry>| match entry.standing(&pol.ver, *con, now) {
            Standing::Active => Stands::Active,
            Standing::Previous => Stands::Previous,
            Standing::OtherVersion | Standing::Unknown => Stands::Unknown,
        };
        entries.iter().map(standing).min().unwrap_or(Stands::Unknown)
    }
}

/// How our policy stands, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stands {
    /// It is in force.
    Active,
    /// Another has taken over, or is about to: ours counts for a while.
    Previous,
    /// It is not in force, so that nothing that we sign would be believed.
    Unknown,
    /// The registry has not been reached for too long.
    Unavailable,
}

impl Stands {
    const ALL: [Stands; 4] = [Stands::Active, Stands::Previous, Stands::Unknown, Stands::Unavailable];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Stands::Active => "active",
            Stands::Previous => "previous",
            Stands::Unknown => "unknown",
            Stands::Unavailable => "unavailable",
        }
    }

    /// Whether turns are taken under it.
    pub fn is_good(self) -> bool {
        matches!(self, Stands::Active | Stands::Previous)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Standings {
    standing: &'static str,
}

/// How our policy stands, for whoever watches.
#[derive(Clone, Default)]
pub struct Watch(Family<Standings, Gauge>);

impl Watch {
    /// Adds the gauge to what is exported.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        registry.register("headgate_policy_standing", "1 for how the policy that this gateway signs under stands", self.0.clone());
    }

    /// Says loudly whenever the standing of what `app` signs under changes, for as long as it is polled.
    pub async fn over(self, app: App) {
        let (mut ticks, mut before) = (interval(LOOK_AGAIN), None);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let live = app.live();
            let Some(ours) = &live.policy else { continue };
            let now = (ours.stands(), ours.issuer.pol.ver.clone());
            for standing in Stands::ALL {
                self.0.get_or_create(&Standings { standing: standing.as_str() }).set((standing == now.0).into());
            }
            if before.as_ref() == Some(&now) {
                continue;
            }
            let (version, constitution) = (&now.1, ours.issuer.con.short());
            match now.0 {
                Stands::Active => tracing::info!(version, constitution, "our policy is in force"),
                Stands::Previous => tracing::warn!(
                    version,
                    constitution,
                    "our policy counts only for a while: another takes its place. Give this gateway the config of the new version"
                ),
                Stands::Unknown => tracing::error!(
                    version,
                    constitution,
                    "our policy is not in force: turns are refused. Publish it with `headgate policy publish`, or go back to the config of the version in force"
                ),
                Stands::Unavailable => tracing::error!(version, constitution, "the policy registry cannot be reached: turns are refused"),
            }
            before = Some(now);
        }
    }
}
