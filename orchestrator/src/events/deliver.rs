//! Takes what is durable on to a topic, in order, and remembers how far it came: the one thread that reads the log while it is written.
//!
//! Order is kept by giving up: where one event fails, its sender is left with all that it has not delivered, and another begins again
//! after the last event that the topic has, with all before it. Consumers may see an event twice, always in order, and count it once.

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{Arc, atomic::Ordering, mpsc},
    thread,
    time::{Duration, Instant},
};

use rdkafka::error::KafkaError;
use tokio::runtime;

use super::{
    Shared, Topic, Unfit,
    cursor::Cursor,
    kafka::{Message, Offered, Sender, check},
    read::Follow,
};

/// The most events on their way at once, as many as a sender takes.
const WINDOW: usize = 2000;
/// Of these, how many are sent before the brokers are listened to: they answer while more is sent.
const AT_ONCE: usize = 128;
/// How long the brokers are listened to where nothing more can be sent: with no room for it, and with nothing there.
const LISTEN: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(5)];
/// How long nothing may happen in the log before it is looked at unasked.
const IDLE: Duration = Duration::from_secs(1);
/// How often the cursor is saved while events move.
const SAVE: Duration = Duration::from_millis(200);
/// How long a sender that was left is not followed by another, at first and at most.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// How long events that are on their way are waited for once the log is closed.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A broker did not let us in, or is none that we trust.
const BARRED: &str = "barred";

/// The log's reader, and what it needs.
pub(super) struct Deliverer {
    pub(super) folder: PathBuf,
    pub(super) topic: Topic,
    pub(super) shared: Arc<Shared>,
    pub(super) cursor: Cursor,
}

/// Why a sender is left.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Topic(#[from] Unfit),
    #[error("the topic did not take an event")]
    Kafka(#[from] KafkaError),
    #[error("the event log cannot be read")]
    Log(#[from] io::Error),
}

impl Broken {
    /// As metrics have it.
    fn why(&self) -> &'static str {
        match self {
            Broken::Topic(Unfit::Away(_)) => "away",
            Broken::Topic(Unfit::Barred(_)) => BARRED,
            Broken::Topic(_) => "topic",
            Broken::Kafka(_) => "event",
            Broken::Log(_) => "log",
        }
    }
}

impl Deliverer {
    /// Delivers until the log is closed. `first` is told how the first look at the topic went.
    pub(super) fn run(mut self, first: mpsc::SyncSender<Result<(), Unfit>>) {
        let mut first = Some(first);
        let mut pause = PAUSES[0];
        while !self.shared.is_closed() {
            let before = self.cursor.number();
            let Err(broken) = self.deliver(&mut first) else { return };
            self.shared.failed(broken.why());
            if self.cursor.number() > before {
                pause = PAUSES[0];
            }
            tracing::warn!(
                error = &broken as &dyn std::error::Error,
                topic = self.topic.name,
                undelivered = self.shared.undelivered(),
                again_in_ms = pause.as_millis(),
                "the event log is not delivered"
            );
            if let (Broken::Topic(unfit), Some(first)) = (broken, first.take())
                && let Err(unheard) = first.send(Err(unfit))
            {
                drop(unheard);
            }
            thread::park_timeout(pause);
            pause = (pause * 2).min(PAUSES[1]);
        }
    }

    /// One sender's life.
    fn deliver(&mut self, first: &mut Option<mpsc::SyncSender<Result<(), Unfit>>>) -> Result<(), Broken> {
        let mut source = Source::after(self)?;
        source.look(&self.shared)?;
        runtime::Builder::new_current_thread().enable_all().build()?.block_on(check(&self.topic))?;
        if let Some(first) = first.take() {
            // Whoever opened the log may have stopped waiting.
            let _ = first.send(Ok(()));
        }
        let sender = Sender::new(&self.topic)?;
        let mut window = Window::after(self.cursor.number());
        let delivered = self.keep_on(&mut source, &sender, &mut window);
        // Whatever happened, what the topic has it need not get again.
        self.save(window.delivered());
        delivered
    }

    fn keep_on(&mut self, source: &mut Source, sender: &Sender, window: &mut Window) -> Result<(), Broken> {
        let (mut saved, mut closed): (Instant, Option<Instant>) = (Instant::now(), None);
        loop {
            // Listening takes all the time it is given, whatever is heard.
            let mut listen = Duration::ZERO;
            for _ in 0..AT_ONCE {
                if window.waiting.len() >= WINDOW {
                    listen = LISTEN[0];
                    break;
                }
                let Some((number, message)) = source.look(&self.shared)? else {
                    listen = LISTEN[1];
                    break;
                };
                match sender.offer(number, message)? {
                    Offered::Taken => window.waiting.push_back((message.at_ms, false)),
                    Offered::Full => {
                        listen = LISTEN[0];
                        break;
                    }
                }
                source.next = None;
            }
            if window.waiting.is_empty() && source.next.is_none() {
                self.save(window.delivered());
                if self.shared.is_closed() {
                    return Ok(());
                }
                thread::park_timeout(IDLE);
                continue;
            }
            let heard = sender.heard(listen)?;
            if let Some(reason) = sender.barred() {
                self.shared.failed(BARRED);
                let undelivered = self.shared.undelivered();
                tracing::warn!(reason, topic = self.topic.name, undelivered, "a Kafka broker does not let us in");
            }
            let before = window.delivered();
            heard.into_iter().for_each(|number| window.mark(number));
            self.shared.delivered_events.inc_by(window.delivered() - before);
            self.shared.oldest_ms.store(window.oldest_ms().or(source.next_ms()).unwrap_or(0), Ordering::Relaxed);
            if saved.elapsed() >= SAVE {
                self.save(window.delivered());
                saved = Instant::now();
            }
            if self.shared.is_closed() && closed.get_or_insert_with(Instant::now).elapsed() >= LAST_WORDS {
                return Ok(());
            }
        }
    }

    /// Remembers that everything up to `number` was delivered, and lets the writer know.
    fn save(&mut self, number: u64) {
        if number == self.cursor.number() {
            return;
        }
        match self.cursor.save(number) {
            Ok(()) => drop(self.shared.delivered.send_replace(number)),
            Err(error) => tracing::warn!(%error, "how far the event log was delivered is not kept; nothing of it is let go"),
        }
    }
}

/// What is durable and not sent yet.
struct Source {
    follow: Follow,
    /// The number of the record that comes next.
    number: u64,
    next: Option<(u64, Message)>,
}

impl Source {
    fn after(deliverer: &Deliverer) -> io::Result<Source> {
        let number = deliverer.cursor.number() + 1;
        Ok(Source { follow: Follow::from(&deliverer.folder, number)?, number, next: None })
    }

    /// The next event to send, if it is durable.
    ///
    /// Errors: it is durable and cannot be read.
    fn look(&mut self, shared: &Shared) -> io::Result<Option<(u64, &Message)>> {
        if self.next.is_none() && self.number <= shared.durable.load(Ordering::Acquire) {
            let damaged = || io::Error::new(io::ErrorKind::InvalidData, format!("record {} is durable and not there", self.number));
            let entry = loop {
                let entry = self.follow.next_entry()?.ok_or_else(damaged)?;
                if entry.number >= self.number {
                    break entry;
                }
            };
            if entry.number != self.number {
                return Err(damaged());
            }
            let message = Message::of(&entry.event);
            if shared.oldest_ms.load(Ordering::Relaxed) == 0 {
                shared.oldest_ms.store(message.at_ms, Ordering::Relaxed);
            }
            self.next = Some((self.number, message));
            self.number += 1;
        }
        Ok(self.next.as_ref().map(|(number, message)| (*number, message)))
    }

    fn next_ms(&self) -> Option<i64> {
        self.next.as_ref().map(|(_, message)| message.at_ms)
    }
}

/// Events on their way, the oldest first: partitions answer in any order, and the cursor moves in one.
struct Window {
    /// The number of the last record that was delivered, with all before it.
    delivered: u64,
    /// When each later one happened, and whether it was delivered.
    waiting: VecDeque<(i64, bool)>,
}

impl Window {
    fn after(delivered: u64) -> Window {
        Window { delivered, waiting: VecDeque::with_capacity(WINDOW) }
    }

    fn delivered(&self) -> u64 {
        self.delivered
    }

    fn oldest_ms(&self) -> Option<i64> {
        self.waiting.front().map(|(at_ms, _)| *at_ms)
    }

    fn mark(&mut self, number: u64) {
        let place = number.checked_sub(self.delivered + 1).and_then(|place| usize::try_from(place).ok());
        if let Some((_, delivered)) = place.and_then(|place| self.waiting.get_mut(place)) {
            *delivered = true;
        }
        while self.waiting.pop_front_if(|(_, delivered)| *delivered).is_some() {
            self.delivered += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_waits_for_the_oldest_event_whatever_else_was_delivered() {
        let mut window = Window::after(10);
        window.waiting.extend([(1, false), (2, false), (3, false), (4, false)]);
        for (number, delivered, oldest) in [(12, 10, Some(1)), (14, 10, Some(1)), (11, 12, Some(3)), (11, 12, Some(3)), (13, 14, None)] {
            window.mark(number);
            assert_eq!((window.delivered(), window.oldest_ms()), (delivered, oldest), "after {number}");
        }
        window.mark(99);
        assert_eq!(window.delivered(), 14);
    }
}
