//! Whole-gateway scenarios over real sockets, in one binary: a scripted model on one side, a strict client on the other.

mod demo;
mod support;

mod model;
mod eyes;
mod proxy;
mod reload;
mod tls;
mod security;
mod faults;
mod bad_input;
mod clients;
mod house;
mod sockets;
mod drain;
mod http2;
mod leaving;
mod resume;
mod slow;
mod streams;
