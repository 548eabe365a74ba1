//! Remembers, for all orchestrators together, which verdicts were used.

use headgate_policy::{Jti, LEEWAY, LIFETIME, Use};

use crate::{Redis, cmd};

/// How long a number is remembered: a verdict's life, and the leeway of the clocks at both of its ends.
const REMEMBERED_MS: u64 = (LIFETIME + 2 * LEEWAY) * 1000;

/// The used verdicts of all processes that share a Redis.
#[derive(Debug, Clone)]
pub struct Used(Redis);

impl Used {
    /// Those that this Redis remembers.
    pub fn new(redis: Redis) -> Used {
        Used(redis)
    }

    /// Uses `jti` up, everywhere. [`Use::Unknown`] where Redis does not answer within its budget.
    pub async fn spend(&self, jti: Jti) -> Use {
        let mut set = cmd("SET");
        set.arg(format!("vj:{jti}")).arg(1).arg("NX").arg("PX").arg(REMEMBERED_MS);
        match self.0.ask::<Option<String>>(&set).await {
            Ok(Some(_)) => Use::First,
            Ok(None) => Use::Again,
            Err(_) => Use::Unknown,
        }
    }
}
