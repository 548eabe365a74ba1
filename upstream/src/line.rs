//! A way back to whoever answers: what a person says to a question goes there, by the way that the answer comes.

use std::sync::{Arc, Weak};

use headgate_contracts::{Code, Fault, Prompt, TurnId, wire::chat::Confirmation};
use http::StatusCode;

use crate::{Shared, Upstream, endpoint::Endpoint, hop::Socket};

/// A way back to whoever answers a turn. It keeps neither the answer nor its connection.
pub struct Line {
    turn: TurnId,
    to: To,
}

enum To {
    /// By a call of its own, proven as the dispatch was.
    Call { shared: Arc<Shared>, endpoint: Arc<Endpoint>, prompt: Box<Prompt> },
    /// On the socket that carries the turn.
    Frame(Weak<Socket>),
}

impl Line {
    pub(crate) fn by_call(shared: &Arc<Shared>, endpoint: &Arc<Endpoint>, prompt: Prompt) -> Line {
        let (shared, endpoint) = (Arc::clone(shared), Arc::clone(endpoint));
        Line { turn: prompt.turn, to: To::Call { shared, endpoint, prompt: Box::new(prompt) } }
    }

    pub(crate) fn by_frame(turn: TurnId, socket: Weak<Socket>) -> Line {
        Line { turn, to: To::Frame(socket) }
    }

    /// Takes what a person says to a question there. Cancel safe in so far as it may be told again: the first word counts.
    ///
    /// Errors: `not_found`, where the turn asks no such thing any more; `already_answered`; those of [`Upstream::tell`]. A socket
    /// that takes it says neither of the first two of the other side's.
    pub async fn confirm(&self, said: &Confirmation) -> Result<(), Fault> {
        let (shared, endpoint, prompt) = match &self.to {
            To::Frame(socket) => {
                let taken = socket.upgrade().is_some_and(|socket| socket.confirm(&self.turn, said));
                return if taken { Ok(()) } else { Err(Fault::client(Code::NotFound)) };
            }
            To::Call { shared, endpoint, prompt } => (shared, endpoint, prompt),
        };
        let path = format!("/v1/conversation/turns/{}/confirm", self.turn);
        let (upstream, body) = (Upstream(Arc::clone(shared)), said.body());
        let told = upstream.tell(&endpoint.name, &path, &body, |sent| match &prompt.seal {
            Some(seal) => seal(prompt, sent),
            None => Ok(prompt.headers.clone()),
        });
        match told.await? {
            status if status.is_success() => Ok(()),
            StatusCode::NOT_FOUND => Err(Fault::client(Code::NotFound)),
            StatusCode::CONFLICT => Err(Fault::client(Code::AlreadyAnswered)),
            status => Err(Fault::upstream(Code::UpstreamRefused).caused_by(format!("status {status} to what a person said"))),
        }
    }
}
