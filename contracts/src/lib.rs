//! The nouns of Headgate and their wire forms, without I/O and without a runtime.
//!
//! Read this page as the lexicon; every other crate uses these words and no others.
//!
//! | word | type |
//! |---|---|
//! | **turn**: one prompt and its streamed answer | [`Turn`], [`TurnId`] |
//! | **session**: one conversation of one principal | [`SessionId`], [`Principal`] |
//! | **prompt**: the request of a turn, parsed | [`Prompt`], [`Message`] |
//! | **answer**: a **head**, then **events** in **batches** | [`Head`], [`Event`], [`Batch`] |
//! | **lane**: one channel of text inside an answer | [`Lane`], [`Channel`] |
//! | **question**: what a person is asked within an answer, before a tool is called | [`Question`], [`What::Confirm`] |
//! | **finding**: one hit of a filter; never the matched text | [`Finding`], [`Category`] |
//! | **refusal**: policy said no | [`Refusal`] |
//! | **fault**: something broke | [`Fault`] |
//! | **end**: how a turn ended, exactly once | [`End`], [`Stop`] |
//! | **record**: the facts about a turn that outlive it | [`Record`] |
//! | **code**: the stable name of a refusal or fault, with its status, close code and retry advice | [`Code`] |
//!
//! [`wire`] holds the codecs: server-sent events, OpenAI chat completions, our own chat stream, WebSocket frames, problems.
//! [`schema`] generates JSON Schema, OpenAPI and AsyncAPI from the same types; [`drift`] says what a change of them asks of others.

mod address;
mod code;
mod event;
mod finding;
mod ids;
mod prompt;
mod stop;
mod turn;

pub mod drift;
pub mod schema;
pub mod wire;

pub use address::may_serve;
pub use code::{Code, ErrorType, Retry};
pub use event::{Batch, Channel, Dialect, Event, Head, Lane, Question, Span, Usage, What};
pub use finding::{Category, Finding, Source, Stage};
pub use ids::{InvalidId, SessionId, Subject, TenantId, TurnId};
pub use prompt::{Content, Credential, Dispatch, Message, Part, Principal, Prompt, Role, Seal, Secret, Settings};
pub use stop::{End, Fault, Finish, Gone, Refusal, Stop, Who};
pub use turn::{Flow, MAX_FINDINGS, MAX_TRACESTATE_BYTES, OnDisconnect, Outcome, OutputSeal, Record, Trace, Turn};
