//! Log lines on their way out: gathered for a moment, and written many at once by a thread of their own.
//!
//! A line costs the turn that it is about a copy; no call of the system, and never a wait: whoever reads our lines may be slow, or stand
//! still. Then lines are dropped, and counted.

use std::{
    fmt,
    io::{self, Write},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::{Context, Layer},
};

/// How long the first of some lines waits for others.
const GATHER: Duration = Duration::from_millis(5);
/// The most bytes of lines that wait: those of some 1,500 turns.
const MAX_WAITING_BYTES: usize = 1 << 20;
/// Room that is kept for the next lines.
const KEPT_BYTES: usize = 64 << 10;
/// How long the last lines may take when the process ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Lines that found no room. One for the process, as its subscriber is.
pub(super) static DROPPED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Where lines are put. Clones are the same place.
#[derive(Clone, Default)]
pub(super) struct Lines(Arc<Place>);

#[derive(Default)]
struct Place {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    stage: Stage,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    /// What waits is the last to be written.
    Ending,
    /// Nobody writes any more.
    Ended,
}

/// Dropped when the process ends: every line is written by then, unless nobody takes them.
pub(super) struct Tail(Lines);

impl Lines {
    /// Starts the thread that writes them to `out`. Without one, lines are written to standard error by who has them.
    pub(super) fn begin(&self, out: impl Write + Send + 'static) -> Tail {
        let lines = self.clone();
        if thread::Builder::new().name("logs".to_owned()).spawn(move || lines.write_to(out)).is_err() {
            self.state().stage = Stage::Ended;
        }
        Tail(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts whole lines behind those that wait.
    fn put(&self, line: &[u8]) {
        let mut state = self.state();
        if state.stage == Stage::Ended {
            drop(state);
            // Nobody is left to tell if even this fails.
            drop(io::stderr().write_all(line));
            return;
        }
        if state.waiting.len() + line.len() > MAX_WAITING_BYTES {
            DROPPED.inc();
            return;
        }
        let is_first = state.waiting.is_empty();
        state.waiting.extend_from_slice(line);
        drop(state);
        if is_first {
            self.0.changed.notify_one();
        }
    }

    fn write_to(&self, mut out: impl Write) {
        let Place { changed, .. } = &*self.0;
        let mut lines = Vec::new();
        loop {
            let nothing = |state: &mut State| state.stage == Stage::Open && state.waiting.is_empty();
            let state = changed.wait_while(self.state(), nothing).unwrap_or_else(PoisonError::into_inner);
            let is_open = |state: &mut State| state.stage == Stage::Open;
            let (mut state, _) = changed.wait_timeout_while(state, GATHER, is_open).unwrap_or_else(PoisonError::into_inner);
            if state.waiting.is_empty() {
                state.stage = Stage::Ended;
                changed.notify_all();
                return;
            }
            std::mem::swap(&mut lines, &mut state.waiting);
            drop(state);
            write_all(&mut out, &lines);
            lines.clear();
            lines.shrink_to(KEPT_BYTES);
        }
    }
}

/// As `Write::write_all`, and patient with an `out` that somebody else has set not to wait.
fn write_all(out: &mut impl Write, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return,
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(GATHER),
            // Nobody reads us any more.
            Err(_) => return,
        }
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let Place { changed, .. } = &*self.0.0;
        let mut state = self.0.state();
        if state.stage == Stage::Open {
            state.stage = Stage::Ending;
        }
        changed.notify_all();
        drop(changed.wait_timeout_while(state, LAST_WORDS, |state| state.stage != Stage::Ended));
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes events as JSON, an object a line.
pub(super) struct Json(pub(super) Lines);

impl<S: Subscriber> Layer<S> for Json {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line { json: Vec::with_capacity(1 << 10), logger: None };
        line.json.extend_from_slice(b"{\"timestamp\":\"");
        // Digits and punctuation, in memory.
        let _ = SystemTime.format_time(&mut Writer::new(&mut line));
        line.json.extend_from_slice(b"\"");
        line.text("level", event.metadata().level().as_str());
        event.record(&mut line);
        let logger = line.logger.take();
        line.text("target", logger.as_deref().unwrap_or(event.metadata().target()));
        line.json.extend_from_slice(b"}\n");
        self.0.put(&line.json);
    }
}

struct Line {
    json: Vec<u8>,
    /// Who spoke, where that was said to the `log` crate.
    logger: Option<String>,
}

impl Line {
    fn member(&mut self, name: &str) {
        for part in [",\"", name, "\":"] {
            self.json.extend_from_slice(part.as_bytes());
        }
    }

    fn text(&mut self, name: &str, value: &str) {
        self.value(name, value);
    }

    fn value(&mut self, name: &str, value: impl serde::Serialize) {
        self.member(name);
        // Texts and numbers, in memory.
        let _ = serde_json::to_writer(&mut self.json, &value);
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.json.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

impl Visit for Line {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.value(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.value(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.value(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.value(field.name(), value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "log.target" => self.logger = Some(value.to_owned()),
            // Where in its source a library said something to the `log` crate.
            name if name.starts_with("log.") => {}
            name => self.text(name, value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field.name(), &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// Takes what is written when it is asked to, and tells of each call.
    struct Reader {
        may: mpsc::Receiver<()>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.may.recv();
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reader() -> (Reader, mpsc::Sender<()>, mpsc::Receiver<Vec<u8>>) {
        let ((go, may), (written, seen)) = (mpsc::channel(), mpsc::channel());
        (Reader { may, written }, go, seen)
    }

    #[test]
    fn every_line_is_written_in_order_before_the_process_ends() {
        let (reader, go, seen) = reader();
        drop(go);
        let lines = Lines::default();
        let tail = lines.begin(reader);
        let all: Vec<String> = (0..1000).map(|number| format!("{number}\n")).collect();
        all.iter().for_each(|line| lines.put(line.as_bytes()));
        drop(tail);
        let writes: Vec<Vec<u8>> = seen.try_iter().collect();
        assert_eq!(String::from_utf8(writes.concat()).unwrap(), all.concat());
        assert!(writes.len() < all.len(), "one write for each line");
    }

    #[test]
    fn who_has_a_line_never_waits_for_who_reads_them_and_what_finds_no_room_is_counted() {
        let (reader, go, seen) = reader();
        let lines = Lines::default();
        let tail = lines.begin(reader);
        let line = vec![b'x'; MAX_WAITING_BYTES / 8];
        let before = DROPPED.get();
        // Nobody reads: one write is under way with what came first, and as much as there is room for waits.
        (0..32).for_each(|_| lines.put(&line));
        let dropped = DROPPED.get() - before;
        assert!((16..=24).contains(&dropped), "{dropped}");
        drop(go);
        drop(tail);
        assert_eq!(seen.try_iter().map(|bytes| bytes.len() as u64).sum::<u64>(), (32 - dropped) * line.len() as u64);
    }

    #[test]
    fn a_line_is_one_json_object_with_its_fields_as_they_are() {
        let (reader, go, seen) = reader();
        drop(go);
        let lines = Lines::default();
        let tail = lines.begin(reader);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(Json(lines)), || {
            let absent: Option<&str> = None;
            tracing::warn!(target: "a::b", text = "say \"so\"\n", number = 7_u64, below = -1, part = 0.5, odd = f64::NAN, yes = true, shown = %'x', absent, "it {}", "is");
        });
        drop(tail);
        let bytes = seen.recv().unwrap();
        let line: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let stamp = line["timestamp"].as_str().unwrap();
        assert!(stamp.len() == "2026-11-21T16:29:45.188053Z".len() && stamp.ends_with('Z'), "{stamp}");
        let rest = r#","level":"WARN","message":"it is","text":"say \"so\"\n","number":7,"below":-1,"part":0.5,"odd":null,"yes":true,"shown":"x","target":"a::b"}"#;
        assert_eq!(String::from_utf8(bytes).unwrap(), format!("{{\"timestamp\":\"{stamp}\"{rest}\n"));
    }
}
