//! Whole-gateway scenarios over real sockets, in one binary: a scripted model on one side, a strict client on the other.

mod demo;
mod support;

mod bad_input;
mod clients;
mod copies;
mod desync;
mod drain;
mod eyes;
mod faults;
mod files;
mod house;
mod http2;
mod keys;
mod leaving;
mod model;
mod proxy;
mod registry;
mod reload;
mod resume;
mod security;
mod slow;
mod sockets;
mod streams;
mod tls;
