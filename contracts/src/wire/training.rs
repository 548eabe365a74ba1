//! Training mode: what its calls answer, and what the audit says of them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Code, Subject, TenantId};

/// How a tenant's turns run now: the answer of `GET /v1/training` and of each of its calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TrainingState {
    /// The tenant of the token.
    pub tenant: TenantId,
    /// `training`, or `enforce`.
    pub mode: Mode,
    /// The fence that verdicts of its turns carry, while it is in training mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
    /// Who holds the lock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Subject>,
    /// Since when, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// The lock is over by then, in Unix seconds, however it is renewed, unless another admin approves before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// Who approved of it last, if anybody: another than the owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_by: Option<Subject>,
}

/// How policy is applied to turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// As written.
    Enforce,
    /// In training mode, by an admin who holds the lock.
    Training,
}

impl Mode {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Enforce => "enforce",
            Mode::Training => "training",
        }
    }
}

/// A record of the audit of training mode, as it stands in the topic: one JSON object whose `hash` is the SHA-256 of its bytes before
/// `,"hash":`. Of one `writer` and `tenant`, each record's `prev_hash` is the `hash` of the one before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TrainingRecord {
    /// Its place in its chain, from 1. One that comes twice was written by somebody who did not hear that it had been: the action that
    /// it tells of was given up then.
    pub seq: u64,
    /// Unix seconds.
    pub time: u64,
    /// `training.enable`, `training.approve`, `training.disable`, `training.status`: a call, with its outcome.
    /// `training.lock.acquired`, `.approved`, `.released`, `.expired`, `.lost`: what became of the lock.
    pub action: String,
    /// Who: the token's subject, or `unknown`.
    pub actor: String,
    /// How it went.
    pub facts: TrainingFacts,
    /// The `hash` of the record before; of the first: that of no bytes.
    pub prev_hash: String,
    /// RFC 9530, of the bytes before it.
    pub hash: String,
}

/// How something went that the audit tells of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TrainingFacts {
    /// Whose training mode; `unknown` where nobody knows who called.
    pub tenant: String,
    /// `allowed`, `denied` or `failed`.
    pub outcome: Outcome,
    /// Why it was not allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Code>,
    /// The fence, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
    /// Who holds or held the lock, where that is somebody else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The lock's session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// In a word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Denied attempts since this writer's last record that have none of their own: more came than are written down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unwritten: Option<u64>,
    /// W3C Trace Context of the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Which orchestrator wrote it: random, made with its event log.
    pub writer: String,
}

/// How an attempt went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done, or is about to be.
    Allowed,
    /// It must not be done.
    Denied,
    /// It could not be done.
    Failed,
}
