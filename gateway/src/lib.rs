//! The gateway: client connections in, judged turns out.
//!
//! Read [`turn`] first: the whole data path is there, on one screen. Around it: [`serve`] accepts connections, [`front`] finds
//! the route and answers, [`session`] begins turns and finds them again, [`outbox`] lies between a turn and its client,
//! [`voice`] writes events, [`sse`] and [`ws`] carry them, `chunked` writes what HTTP/1.1 streams. [`live`] is the configuration at work, [`telemetry`] what a turn
//! leaves behind, [`admin`] the operators' listener.

pub mod admin;
mod asked;
pub mod body;
mod buffers;
pub mod build;
mod chunked;
pub mod cli;
pub mod delivery;
pub mod drive;
pub mod front;
pub mod keys;
pub mod live;
pub mod outbox;
pub mod page;
pub mod proxy;
pub mod registry;
pub mod reload;
pub mod serve;
pub mod session;
pub mod shell;
pub mod sse;
mod streams;
mod tap;
pub mod telemetry;
pub mod tls;
mod training;
pub mod turn;
pub mod voice;
pub mod ws;
