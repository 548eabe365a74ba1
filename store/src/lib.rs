//! What the processes of a deployment share: a connection to Redis, the signed policy registry, the verdicts already used, who is in training mode.
//!
//! | word | type |
//! |---|---|
//! | **redis**: a connection that nobody waits for longer than its budget | [`Redis`] |
//! | **store**: where signed registry entries are kept | [`Store`] |
//! | **followed**: a registry that is read again whenever its store changes | [`Followed`] |
//! | **used**: the verdicts used anywhere | [`Used`] |
//! | **locks**: who may train, one per tenant | [`Locks`] |
//! | **modes**: which tenants are in training mode | [`Modes`] |
//!
//! Redis is never believed further than this: entries are signed by the policy key, and whoever can write to Redis can at
//! most keep a change back. Nothing secret is kept there.

mod followed;
mod locks;
mod modes;
mod redis;
mod store;
mod used;

// The one home of the client: whoever asks Redis for something, asks through this crate.
pub use ::redis::{Cmd, FromRedisValue, Pipeline, cmd, pipe};

pub use followed::{Followed, MOST_TENANTS, TRUSTED_FOR};
pub use locks::{Acquired, Fenced, Held, Here, Locks, MOST_LOCKS, Renewed};
pub use modes::{ModeNow, Modes};
pub use redis::{Redis, Unanswered, Unusable};
pub use store::{NotPut, Store, Unreachable};
pub use used::Used;
