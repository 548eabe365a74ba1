//! What is asked of a peer: how many streams, how their answers are paced, and what is measured.

use std::time::Duration;

/// How clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Front {
    /// `POST /v1/chat/completions`, streamed.
    OpenAi,
    /// `POST /v1/chat/completions`, the answer whole.
    Whole,
    /// `POST /v1/chat/stream`.
    Chat,
    /// `GET /v1/chat/stream` with an Upgrade.
    WebSocket,
}

/// When clients ask, and when they go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Clients {
    /// Each stream is one turn that lasts as long as the run.
    Stay,
    /// Each connection asks again as soon as it is answered: shows what a peer can take at most.
    Again,
    /// Turns begin at this rate per second whatever the answers do, on whichever connection is free.
    Rate(u32),
    /// One client after another leaves in this interval, in the middle of its answer; a new one takes its place.
    Leave(Duration),
}

/// Where an event's text begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Events end with a blank: nothing in them can be part of a match that is still forming.
    AfterBlank,
    /// Events begin with a blank, as tokens of most models do: their last word might go on, to an e-mail address for example.
    BeforeBlank,
}

/// One kind of load.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) front: Front,
    pub(crate) clients: Clients,
    pub(crate) streams: usize,
    /// Streams that share a connection; more than one only as WebSockets.
    pub(crate) per_socket: usize,
    /// Events in one write of the model.
    pub(crate) burst: usize,
    /// Between two writes of the model in one stream; zero: all at once, at once.
    pub(crate) every: Duration,
    /// Writes per answer; `None`: until the run ends.
    pub(crate) writes: Option<u32>,
    /// Bytes of text per event, at least 12.
    pub(crate) text: usize,
    pub(crate) cut: Cut,
    /// Bytes of text in a prompt.
    pub(crate) prompt: usize,
    pub(crate) whom: Whom,
}

/// Who is measured with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whom {
    /// All that can serve it.
    All,
    /// All but AI gateways, which cannot take so much.
    Proxies,
    /// What matters here is Headgate; nginx stands beside it.
    Us,
}

const ONE_BY_ONE: Workload = Workload {
    name: "W3",
    about: "1,000 streams, one event per 20 ms each",
    front: Front::OpenAi,
    clients: Clients::Stay,
    streams: 1000,
    per_socket: 1,
    burst: 1,
    every: Duration::from_millis(20),
    writes: None,
    text: 16,
    cut: Cut::AfterBlank,
    prompt: 64,
    whom: Whom::Proxies,
};

const ONE_REQUEST: Workload = Workload {
    name: "W1",
    about: "1 KB request, 1 KB answer, not streamed; 64 connections that ask again as soon as they are answered",
    front: Front::Whole,
    clients: Clients::Again,
    streams: 64,
    every: Duration::ZERO,
    writes: Some(1),
    text: 1024,
    prompt: 1024,
    whom: Whom::All,
    ..ONE_BY_ONE
};

/// All workloads, in the order of the report.
pub(crate) fn all() -> Vec<Workload> {
    vec![
        ONE_REQUEST,
        Workload {
            name: "W1o",
            about: "the same at 1,000 requests a second, open loop: latency counts from when a request was due",
            clients: Clients::Rate(1000),
            streams: 256,
            whom: Whom::Us,
            ..ONE_REQUEST
        },
        Workload {
            name: "W2b",
            about: "200 streams, bursts of 32 events in one write, a burst per 20 ms each",
            streams: 200,
            burst: 32,
            ..ONE_BY_ONE
        },
        ONE_BY_ONE,
        Workload { name: "W3h", about: "as W3 with 400 streams: latency where nobody is short of time", streams: 400, ..ONE_BY_ONE },
        Workload {
            name: "W3t",
            about: "as W3h, but events begin with a blank as models' tokens do, so that their last word may have to wait for the next",
            streams: 400,
            cut: Cut::BeforeBlank,
            text: 11,
            whom: Whom::Us,
            ..ONE_BY_ONE
        },
        Workload {
            name: "W3c",
            about: "as W3h on /v1/chat/stream, as server-sent events",
            streams: 400,
            front: Front::Chat,
            whom: Whom::Us,
            ..ONE_BY_ONE
        },
        Workload {
            name: "W3w",
            about: "as W3 on /v1/chat/stream, a WebSocket for each stream; who passes on unread has a model that speaks WebSocket",
            front: Front::WebSocket,
            ..ONE_BY_ONE
        },
        Workload {
            name: "W3m",
            about: "as W3w with 50 WebSockets, 20 turns at a time on each",
            front: Front::WebSocket,
            per_socket: 20,
            ..ONE_BY_ONE
        },
        Workload {
            name: "W3s",
            about: "25 streams, one event per 50 ms each: what AI gateways can take, too",
            streams: 25,
            every: Duration::from_millis(50),
            whom: Whom::All,
            ..ONE_BY_ONE
        },
        Workload {
            name: "W4",
            about: "9,000 streams that have begun and wait for their next event",
            streams: 9000,
            every: Duration::from_secs(3600),
            ..ONE_BY_ONE
        },
        Workload {
            name: "W5",
            about: "100 streams, one event per 500 ms each; every 5 ms a client leaves",
            clients: Clients::Leave(Duration::from_millis(5)),
            streams: 100,
            every: Duration::from_millis(500),
            whom: Whom::All,
            ..ONE_BY_ONE
        },
        Workload {
            name: "W6",
            about: "64 connections that ask again as soon as they are answered, with 32 streamed events in one write",
            clients: Clients::Again,
            streams: 64,
            burst: 32,
            every: Duration::ZERO,
            writes: Some(1),
            whom: Whom::Us,
            ..ONE_BY_ONE
        },
    ]
}

/// The workload of that name.
pub(crate) fn named(name: &str) -> Option<Workload> {
    all().into_iter().find(|work| work.name.eq_ignore_ascii_case(name))
}

impl Workload {
    /// The same, small: what the smoke test runs.
    pub(crate) fn small(self) -> Workload {
        let clients = match self.clients {
            Clients::Rate(_) => Clients::Rate(200),
            clients => clients,
        };
        Workload { clients, streams: self.streams.min(50), ..self }
    }

    /// Whether a peer that passes bytes on unread can serve it.
    pub(crate) fn is_plain(&self) -> bool {
        self.front != Front::Chat
    }

    /// Whether its streams are there to be counted, not to carry anything.
    pub(crate) fn is_idle(&self) -> bool {
        self.every > Duration::from_secs(60)
    }

    /// Whether it asks for as much as a peer can do.
    pub(crate) fn is_at_most(&self) -> bool {
        self.clients == Clients::Again
    }

    /// Whether what matters is a request, not an event.
    pub(crate) fn is_by_request(&self) -> bool {
        self.front == Front::Whole
    }

    /// The text of an event; the word stands at the place that is returned with it.
    pub(crate) fn event_text(&self, word: &[u8]) -> (Vec<u8>, usize) {
        let mut text = Vec::with_capacity(self.text);
        let at = match self.cut {
            Cut::AfterBlank => 0,
            Cut::BeforeBlank => {
                text.push(b' ');
                1
            }
        };
        text.extend_from_slice(word);
        if self.cut == Cut::AfterBlank {
            fill(&mut text, self.text.saturating_sub(1));
            text.push(b' ');
        }
        (text, at)
    }
}

/// Brings text to this length with words that say nothing.
pub(crate) fn fill(text: &mut Vec<u8>, len: usize) {
    let words = b" the lamp was lit and the road lay open before them so they went on".iter();
    text.extend(words.cycle().take(len.saturating_sub(text.len())));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::{LEN, STREAMS};

    #[test]
    fn workloads_have_names_of_their_own_and_fit_their_words() {
        let all = all();
        for (index, work) in all.iter().enumerate() {
            assert!(all[..index].iter().all(|other| other.name != work.name), "{}", work.name);
            assert!(work.text > LEN && work.burst > 0 && work.streams < STREAMS, "{}", work.name);
            let (text, at) = work.event_text(&[b'B'; LEN]);
            assert_eq!((text.len(), &text[at..at + LEN]), (work.text, [b'B'; LEN].as_slice()), "{}", work.name);
        }
    }
}
