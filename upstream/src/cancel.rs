//! Tells an orchestrator that nobody waits for a turn any more; closing the connection alone is not heard by every server.

use std::{sync::Arc, time::Duration};

use headgate_contracts::TurnId;
use tokio::{runtime::Handle, time::timeout};

use crate::{Shared, balance::Lease, endpoint::Endpoint, request::cancel_bytes, settings::Protocol, tell::call};

/// How long a cancel call may take, and how many may be under way for one upstream: it is a courtesy, the closed connection is
/// the message.
const PATIENCE: Duration = Duration::from_secs(2);
pub(crate) const MAX_UNDER_WAY: usize = 64;

/// Makes the cancel call when dropped, unless the turn ended by itself.
pub(crate) struct Cancel(Option<Box<Armed>>);

struct Armed {
    shared: Arc<Shared>,
    endpoint: Arc<Endpoint>,
    turn: TurnId,
    traceparent: String,
}

impl Cancel {
    /// From here on the endpoint may know of the turn. Protocols without a cancel call get none.
    pub(crate) fn arm(shared: &Arc<Shared>, lease: &Lease, turn: TurnId, traceparent: impl FnOnce() -> String) -> Cancel {
        Cancel(match shared.settings.protocol {
            Protocol::OpenAi => None,
            Protocol::Orchestrator => {
                let (shared, endpoint) = (Arc::clone(shared), Arc::clone(lease.endpoint()));
                Some(Box::new(Armed { shared, endpoint, turn, traceparent: traceparent() }))
            }
        })
    }

    /// A turn that is stopped in another way.
    pub(crate) fn none() -> Cancel {
        Cancel(None)
    }

    /// The turn has ended.
    pub(crate) fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        let Some(armed) = self.0.take() else { return };
        let room = Arc::clone(&armed.shared.cancels).try_acquire_owned();
        match (Handle::try_current(), room) {
            (Ok(runtime), Ok(room)) => drop(runtime.spawn(async move {
                let taken = timeout(PATIENCE, armed.call()).await.unwrap_or(false);
                let stats = &armed.shared.stats;
                if taken {
                    stats.cancelled.one()
                } else {
                    stats.cancel_failed.one()
                }
                drop(room);
            })),
            _ => armed.shared.stats.cancel_failed.one(),
        }
    }
}

impl Armed {
    /// Whether the endpoint took the call.
    async fn call(&self) -> bool {
        let bytes = cancel_bytes(&self.endpoint, self.turn, &self.traceparent, self.shared.authorization.as_ref());
        call(&self.shared, &self.endpoint, &bytes).await.is_ok_and(|status| status.is_success())
    }
}
