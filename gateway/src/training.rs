//! Training mode, between those who know parts of it: filters sign what the locks say, and an orchestrator believes an identity provider.

use std::{pin::Pin, sync::Arc, time::Duration};

use headgate_config::plan;
use headgate_contracts::{Code, Fault, Principal};
use headgate_filters::{
    auth::{Admin, Admins, NoAdmin},
    unix_now,
};
use headgate_orchestrator::training::{Identify, NotAdmitted, Settings, Training};
use headgate_store::{ModeNow, Modes};

use crate::{
    build::{self, Lasting, Unbuildable},
    keys::Discovered,
};

/// When to come back while nobody can say in which mode a tenant is.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// What the locks say, for those who sign.
pub(crate) struct Seen(pub(crate) Arc<Modes>);

impl headgate_filters::Modes for Seen {
    fn fence(&self, tenant: &str) -> Result<Option<u64>, Fault> {
        match self.0.of(tenant) {
            ModeNow::Enforce => Ok(None),
            ModeNow::Training(fence) => Ok(Some(fence)),
            ModeNow::Unknown => {
                let fault = Fault::us(Code::PolicyRegistryUnavailable).after(TRY_AGAIN);
                Err(fault.saying("nobody can say now whether the tenant is in training mode"))
            }
        }
    }
}

/// Admins, as an identity provider's tokens say.
struct Provider(Admins);

impl Identify for Provider {
    fn identify<'a>(&'a self, token: &'a str) -> Pin<Box<dyn Future<Output = Result<Principal, NotAdmitted>> + Send + 'a>> {
        let known = |Admin { tenant, subject }| Principal { tenant, subject, scopes: Vec::new(), expires: None };
        Box::pin(async move {
            self.0.admit(token).await.map(known).map_err(|refused| match refused {
                NoAdmin::Unknown => NotAdmitted::Unknown,
                NoAdmin::Expired => NotAdmitted::Expired,
                NoAdmin::Stale(admin) => NotAdmitted::Stale(known(admin)),
                NoAdmin::Roleless(admin) => NotAdmitted::Roleless(known(admin)),
                NoAdmin::Unchecked(fault) => NotAdmitted::Unchecked(fault),
            })
        })
    }
}

/// The training mode of a plan; `keys` are those of its identity provider.
pub(crate) fn open(told: &plan::Training, events: &plan::Events, keys: &Discovered, lasting: &Lasting) -> Result<Training, Unbuildable> {
    let topic = told.topic.as_ref().map(build::topic);
    let settings = Settings { folder: events.folder.clone(), topic, epoch: told.epoch, ttl: told.ttl, max_hold: told.max_hold };
    let admins = Admins::new(told.admins.clone(), Arc::new(keys.clone()), unix_now);
    Training::open(settings, Arc::new(Provider(admins)), lasting.modes.clone()).map_err(Unbuildable::Training)
}
