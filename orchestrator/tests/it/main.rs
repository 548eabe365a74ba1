//! The orchestrator over real sockets, with a gateway's keys on one side and a scripted or a real model on the other.

mod desk;

mod confirm;
mod events;
mod leaving;
mod limits;
mod model;
mod reports;
mod sharing;
mod turns;
mod verdicts;
mod websocket;
