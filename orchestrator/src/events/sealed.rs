//! Keeps what was said, where somebody asked for it: gathers text, cuts it into pieces, and seals each under the subject's key.
//!
//! Text is the least of what a log keeps. It has no room of its own: where the disk is behind, or fuller than it should be, a piece
//! is let go, and what is missing shows by the places of those that are there. No turn is refused for it, and no end is lost.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use headgate_contracts::{
    Batch, Channel, Lane, Message, TurnId, What,
    wire::log::{Event, Kind, Segment},
};
use headgate_policy::vault::{Master, Opened, Sealer, Vault, VaultFault};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};

use super::{Shared, Unopened, facts::Begun, writer::Command};

/// The largest piece of a prompt. Sealed and in its event it fits a record.
const PROMPT_PIECE: usize = 6 << 10;
/// Of an answer, a piece is sealed once there is so much of it,
const ANSWER_PIECE: usize = 4 << 10;
/// or once its first words have waited so long and more come.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Text is written out in runs of so many bytes, so that no piece is much larger than it should be: in JSON a byte may take six.
const RUN: usize = 512;
/// The most that waits for the disk, of all turns together.
const MOST_WAITING: u64 = 32 << 20;

/// Where the keys are that text is sealed under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// The file with the master key.
    pub master: PathBuf,
    /// The folder with the keys of subjects.
    pub folder: PathBuf,
}

impl Keys {
    /// Opens the keys.
    ///
    /// Errors: they cannot be used.
    pub fn open(&self) -> Result<Vault, Unopened> {
        Ok(Vault::open(&self.folder, &Master::load(&self.master)?)?)
    }
}

/// The text of one turn, on its way into the log.
pub(crate) struct Text {
    begun: Begun,
    sealer: Sealer,
    writer: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    /// What the model wrote, as far as it is not sealed yet; the last line may be open.
    gathered: Vec<u8>,
    /// Whose text the open line is.
    line: Option<Lane>,
    since: Option<Instant>,
    nth: u32,
}

impl Text {
    pub(super) fn new(begun: Begun, sealer: Sealer, writer: mpsc::Sender<Command>, shared: Arc<Shared>) -> Text {
        Text { begun, sealer, writer, shared, gathered: Vec::new(), line: None, since: None, nth: 0 }
    }

    /// Seals the messages of the prompt, a line of JSON each.
    pub(super) fn prompt(&mut self, lines: &str) {
        let mut events = Vec::with_capacity(lines.len() / PROMPT_PIECE + 1);
        let (mut rest, mut nth) = (lines, 0);
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(rest.floor_char_boundary(PROMPT_PIECE));
            rest = more;
            events.extend(self.seal(Kind::InputSegment, nth, rest.is_empty(), piece.as_bytes()));
            nth += 1;
        }
        self.send(events);
    }

    /// Adds what the model wrote.
    pub(crate) fn add(&mut self, batch: &Batch) {
        for event in batch.events() {
            match event.what {
                What::Text { lane, text } => {
                    let mut rest = batch.text(text);
                    while !rest.is_empty() {
                        let (run, more) = rest.split_at(rest.floor_char_boundary(RUN));
                        rest = more;
                        self.write(lane, run);
                        self.flush(ANSWER_PIECE);
                    }
                }
                What::Tool { choice, index, id, name } => {
                    self.end_line();
                    let (id, name) = (batch.text(id), batch.text(name));
                    self.gathered
                        .extend_from_slice(json!({"choice": choice, "tool": index, "id": id, "name": name}).to_string().as_bytes());
                    self.gathered.push(b'\n');
                    self.since.get_or_insert_with(Instant::now);
                    self.flush(ANSWER_PIECE);
                }
                What::Confirm { .. } | What::Finish { .. } | What::Usage(_) | What::Note => {}
            }
        }
        if self.since.is_some_and(|since| since.elapsed() >= LONGEST_WAIT) {
            self.flush(0);
        }
    }

    /// Seals the last piece, and says that it is.
    pub(super) fn close(mut self) {
        if self.nth > 0 || !self.gathered.is_empty() {
            self.end_line();
            self.cut(true);
        }
    }

    fn write(&mut self, lane: Lane, text: &str) {
        if self.line != Some(lane) {
            self.end_line();
            let mut line = match lane.channel {
                // A question is ours, and no text of the model's.
                Channel::Content | Channel::Question(_) => json!({}),
                Channel::Reasoning => json!({"lane": "reasoning"}),
                Channel::Refusal => json!({"lane": "refusal"}),
                Channel::ToolArguments(tool) => json!({"lane": "tool_arguments", "tool": tool}),
            };
            if lane.choice > 0 {
                line["choice"] = lane.choice.into();
            }
            // The text comes last, and stays open for more of it.
            line["text"] = "".into();
            let line = line.to_string();
            self.gathered.extend_from_slice(line.strip_suffix("\"}").unwrap_or(&line).as_bytes());
            self.line = Some(lane);
            self.since.get_or_insert_with(Instant::now);
        }
        let written = serde_json::to_string(text).unwrap_or_default();
        self.gathered.extend_from_slice(written.get(1..written.len().saturating_sub(1)).unwrap_or_default().as_bytes());
    }

    fn end_line(&mut self) {
        if self.line.take().is_some() {
            self.gathered.extend_from_slice(b"\"}\n");
        }
    }

    /// Cuts a piece off where more than `most` bytes are gathered.
    fn flush(&mut self, most: usize) {
        if self.gathered.len() > most {
            self.end_line();
            self.cut(false);
        }
    }

    fn cut(&mut self, last: bool) {
        let piece = std::mem::take(&mut self.gathered);
        let event = self.seal(Kind::OutputSegment, self.nth, last, &piece);
        self.nth += 1;
        self.since = None;
        self.send(event.into_iter().collect());
    }

    fn seal(&mut self, kind: Kind, nth: u32, last: bool, piece: &[u8]) -> Option<Vec<u8>> {
        let subject = self.sealer.name().parse().ok()?;
        let mut event = self.begun.segment(kind, nth, SystemTime::now(), Segment { subject, last, sealed: String::new() });
        event.data.sealed = self.sealer.seal(&event.binding(), piece).ok()?;
        serde_json::to_vec(&event).ok()
    }

    /// Hands pieces to the writer: all of them, or where too much waits, none.
    fn send(&mut self, events: Vec<Vec<u8>>) {
        let (pieces, bytes) = (events.len() as u64, bytes(&events));
        let waiting = self.shared.text_waiting.fetch_add(bytes, Ordering::Relaxed);
        // Half of the queue is for facts alone.
        let has_place = self.writer.capacity() > self.writer.max_capacity() / 2;
        let is_sent =
            has_place && waiting + bytes <= MOST_WAITING && self.writer.try_send(Command::Text { turn: self.begun.turn(), events }).is_ok();
        if !is_sent {
            self.shared.text_waiting.fetch_sub(bytes, Ordering::Relaxed);
            self.shared.text_dropped.inc_by(pieces);
        }
    }
}

/// What pieces take while they wait.
pub(super) fn bytes(events: &[Vec<u8>]) -> u64 {
    events.iter().map(|event| event.len() as u64).sum()
}

/// Messages, a line of JSON each.
pub(super) fn lines(messages: &[Message]) -> String {
    let mut lines = String::new();
    for message in messages {
        lines.push_str(&serde_json::to_string(message).unwrap_or_default());
        lines.push('\n');
    }
    lines
}

/// The event, where it is one with sealed text, as it is shown to those who have the keys: `data` has `text` in place of `sealed`, and
/// that is `<erased>` where the subject was forgotten, and `<altered>` where it is not what was sealed. `None`: it is another event.
///
/// Errors: the keys cannot be read.
pub fn unseal(vault: &Vault, event: &[u8]) -> Result<Option<Vec<u8>>, VaultFault> {
    let Ok(event) = serde_json::from_slice::<Event<Segment>>(event) else { return Ok(None) };
    let opened = vault.open_sealed(event.data.subject.as_str(), &event.binding(), &event.data.sealed)?;
    let text = match &opened {
        Opened::Text(text) => String::from_utf8_lossy(text),
        Opened::Erased => "<erased>".into(),
        Opened::Altered => "<altered>".into(),
    };
    let Ok(mut shown) = serde_json::to_value(&event) else { return Ok(None) };
    shown["data"] = json!({"subject": event.data.subject, "last": event.data.last, "text": text});
    Ok(Some(shown.to_string().into_bytes()))
}

impl Begun {
    fn segment(&self, kind: Kind, nth: u32, at: SystemTime, data: Segment) -> Event<Segment> {
        self.first().segment(kind, nth, at, data)
    }

    fn turn(&self) -> TurnId {
        self.first().subject
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use headgate_contracts::{
        Finish, Role,
        wire::log::{Delivered, Progress},
    };
    use headgate_policy::audit::Audit;
    use serde_json::Value;

    use super::*;
    use crate::events::{
        self, Account, Follow, Log, Settings,
        tests::{self, of_session},
        verify,
    };

    /// A log that keeps text, and its keys.
    struct House(tempfile::TempDir);

    impl House {
        fn new() -> House {
            let house = House(tempfile::tempdir().unwrap());
            Master::generate(&house.keys().master).unwrap();
            house
        }

        fn folder(&self) -> std::path::PathBuf {
            self.0.path().join("events")
        }

        fn keys(&self) -> Keys {
            Keys { master: self.0.path().join("master.key"), folder: self.0.path().join("keys") }
        }

        fn log(&self) -> Log {
            let settings = Settings { folder: self.folder(), cap: Settings::LEAST_CAP, turns: 64, topic: None, keys: Some(self.keys()) };
            Log::open(&settings).unwrap().0
        }

        fn vault(&self) -> Vault {
            self.keys().open().unwrap()
        }

        fn forget(&self, subject: &str) -> bool {
            let mut audit = Audit::open(&self.0.path().join("audit.jsonl")).unwrap();
            self.vault().forget("acme", subject, &mut audit, "officer", 7).unwrap()
        }
    }

    async fn begin(log: &Log, turn: TurnId, prompt: &str) -> Account {
        log.begin(of_session(turn, "s1").saying(&[Message::new(Role::User, prompt)])).await.unwrap()
    }

    fn said(lane: Lane, text: &str) -> Batch {
        let mut batch = Batch::new();
        batch.push_text(lane, text);
        batch
    }

    fn complete(account: Account) {
        account.close(&Ok(()), Finish::Stop, Progress::default());
    }

    /// The events of a log as one who has the keys sees them.
    fn shown(folder: &Path, vault: &Vault) -> Vec<Value> {
        let mut log = Follow::open(folder).unwrap();
        let all = std::iter::from_fn(|| log.next_entry().unwrap());
        all.map(|entry| serde_json::from_slice(&unseal(vault, &entry.event).unwrap().unwrap_or(entry.event)).unwrap()).collect()
    }

    /// What was said in a turn, put together: of its prompt, and of its answer.
    fn text(folder: &Path, vault: &Vault, turn: TurnId) -> [String; 2] {
        let all = shown(folder, vault);
        [Kind::InputSegment, Kind::OutputSegment].map(|kind| {
            let pieces = all.iter().filter(|event| event["type"] == kind.as_str() && event["subject"] == turn.to_string());
            pieces.map(|event| event["data"]["text"].as_str().unwrap()).collect()
        })
    }

    fn bytes_of(folder: &Path) -> Vec<u8> {
        fs::read_dir(folder).unwrap().flat_map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect()
    }

    fn holds(bytes: &[u8], text: &str) -> bool {
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    }

    #[tokio::test]
    async fn what_was_said_is_in_the_log_for_those_with_the_keys_and_for_nobody_else() {
        let house = House::new();
        let log = house.log();
        let turn = TurnId::fresh();
        let mut account = begin(&log, turn, "the canary asks").await;
        account.add(&said(Lane::DEFAULT, "the \"canary\" "));
        account.add(&said(Lane::DEFAULT, "sings\n"));
        account.add(&said(Lane { choice: 1, channel: Channel::Reasoning }, "why"));
        complete(account);
        log.flush().await.unwrap();
        let [prompt, answer] = text(&house.folder(), &house.vault(), turn);
        assert_eq!(prompt, "{\"role\":\"user\",\"content\":\"the canary asks\"}\n");
        let lines = "{\"text\":\"the \\\"canary\\\" sings\\n\"}\n{\"lane\":\"reasoning\",\"choice\":1,\"text\":\"why\"}\n";
        assert_eq!(answer, lines);
        let bytes = bytes_of(&house.folder());
        assert!(!holds(&bytes, "canary") && !holds(&bytes, "sings"));
        assert!(!holds(&bytes, "\"u1\"") && !holds(&bytes, "s1\""), "nor who asked, nor where");
        let judged = verify(&house.folder()).unwrap();
        assert!(judged.is_good() && judged.open.is_empty() && judged.unknown == 0, "{judged:?}");
    }

    #[tokio::test]
    async fn a_gateway_tells_of_turns_and_refusals_by_the_names_it_knows_and_the_log_keeps_others() {
        let house = House::new();
        let log = house.log();
        let turn = TurnId::fresh();
        complete(begin(&log, turn, "hers").await);
        log.flush().await.unwrap();
        let told = || tests::told(Delivered::Delivered);
        assert_eq!(log.tell(turn, "acme/another".into(), told()).await, Err(events::Untold::Unknown));
        assert_eq!(log.tell(turn, "acme/s1".into(), told()).await, Ok(events::Heard::Now));
        assert_eq!(log.deny(tests::denial(TurnId::fresh())).await, Ok(events::Heard::Now));
        log.flush().await.unwrap();
        let all = shown(&house.folder(), &house.vault());
        let session = house.vault().session("acme", "s1");
        assert!(all.iter().all(|event| event["partitionkey"] == format!("acme/{session}")), "{all:?}");
        let subjects: std::collections::BTreeSet<_> =
            all.iter().filter_map(|event| event["data"].get("subject")).map(Value::to_string).collect();
        assert_eq!(subjects.len(), 1, "whoever was answered and refused is one, under one name: {subjects:?}");
        assert!(!holds(&bytes_of(&house.folder()), "\"u1\""), "by chance it is part of some name");
        assert!(verify(&house.folder()).unwrap().is_good());
    }

    #[tokio::test]
    async fn who_is_forgotten_is_erased_at_once_in_every_copy_and_nobody_else_is() {
        let house = House::new();
        let log = house.log();
        let (first, other) = (TurnId::fresh(), TurnId::fresh());
        let mut account = begin(&log, first, "hers").await;
        complete(begin(&log, other, "hers too").await);
        log.flush().await.unwrap();
        let copy = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(house.folder()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
        let vault = house.vault();
        assert!(text(copy.path(), &vault, first)[0].contains("hers"));
        // The log is open, the turn runs, and its text has a key already.
        assert!(house.forget("u1"));
        account.add(&said(Lane::DEFAULT, "still said"));
        complete(account);
        let after = TurnId::fresh();
        complete(begin(&log, after, "back again").await);
        log.flush().await.unwrap();
        assert_eq!(text(&house.folder(), &vault, first), ["<erased>", "<erased>"]);
        assert_eq!(text(&house.folder(), &vault, other)[0], "<erased>");
        assert_eq!(text(copy.path(), &vault, first)[0], "<erased>");
        assert!(text(&house.folder(), &vault, after)[0].contains("back again"));
        let names: std::collections::BTreeSet<_> = shown(&house.folder(), &vault)
            .iter()
            .filter(|event| event["type"] == Kind::Accepted.as_str())
            .map(|event| event["data"]["subject"].to_string())
            .collect();
        assert_eq!(names.len(), 2, "nothing connects who came back with who was forgotten");
    }

    #[tokio::test]
    async fn a_piece_has_four_kibibytes_and_fits_a_record_whatever_is_in_it() {
        let house = House::new();
        let log = house.log();
        let turn = TurnId::fresh();
        // Each of these bytes takes six in JSON.
        let mut account = begin(&log, turn, &"\u{1}".repeat(20_000)).await;
        for _ in 0..40 {
            account.add(&said(Lane::DEFAULT, &"\u{2}".repeat(1000)));
        }
        complete(account);
        log.flush().await.unwrap();
        let [prompt, answer] = text(&house.folder(), &house.vault(), turn);
        assert_eq!(serde_json::from_str::<Message>(&prompt).unwrap(), Message::new(Role::User, "\u{1}".repeat(20_000)));
        let whole: String =
            answer.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned()).collect();
        assert_eq!(whole, "\u{2}".repeat(40_000));
        let mut log = Follow::open(&house.folder()).unwrap();
        let sizes: Vec<_> = std::iter::from_fn(|| log.next_entry().unwrap()).map(|entry| entry.event.len()).collect();
        assert!(*sizes.iter().max().unwrap() <= events::record::MAX_EVENT_BYTES - 1024, "room for the longest names: {sizes:?}");
        assert!(sizes.len() < 5 + 120_000 / (6 << 10) + 240_000 / (4 << 10) + 4, "{} events", sizes.len());
    }

    #[tokio::test(start_paused = true)]
    async fn words_that_come_slowly_are_one_piece_a_second() {
        let house = House::new();
        let log = house.log();
        let turn = TurnId::fresh();
        let mut account = begin(&log, turn, "count").await;
        for _ in 0..40 {
            account.add(&said(Lane::DEFAULT, "one "));
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        complete(account);
        log.flush().await.unwrap();
        let all = shown(&house.folder(), &house.vault());
        let pieces: Vec<_> = all.iter().filter(|event| event["type"] == Kind::OutputSegment.as_str()).collect();
        assert_eq!(pieces.len(), 4);
        let last: Vec<_> = pieces.iter().map(|event| event["data"]["last"].as_bool().unwrap()).collect();
        assert_eq!(last, [false, false, false, true]);
    }

    #[tokio::test]
    async fn a_full_log_lets_text_go_and_shows_it_and_keeps_every_end() {
        let house = House::new();
        let log = house.log();
        // It is open for all the while: nothing can be let go.
        let turn = TurnId::fresh();
        let mut account = begin(&log, turn, "a great deal").await;
        for _ in 0..2000 {
            account.add(&said(Lane::DEFAULT, &"x".repeat(4096)));
            log.flush().await.unwrap();
        }
        assert!(log.shared.text_dropped.get() > 0);
        let after = TurnId::fresh();
        let next = log.begin(of_session(after, "s2").saying(&[Message::new(Role::User, "more")])).await;
        complete(next.expect("turns are taken for longer than text"));
        complete(account);
        log.flush().await.unwrap();
        let judged = verify(&house.folder()).unwrap();
        assert!(judged.is_good() && judged.open.is_empty() && judged.ended == 2, "{judged:?}");
        let all = shown(&house.folder(), &house.vault());
        let pieces: Vec<_> = all.iter().filter(|event| event["type"] == Kind::OutputSegment.as_str()).collect();
        assert!(!pieces.is_empty() && pieces.iter().all(|event| event["data"]["last"] == false), "its end is missing, and that shows");
    }

    #[tokio::test]
    async fn without_its_keys_a_log_takes_no_turn() {
        let house = House::new();
        let log = house.log();
        fs::remove_dir_all(house.keys().folder).unwrap();
        let refused = log.begin(of_session(TurnId::fresh(), "s1")).await.err();
        assert_eq!(refused, Some(events::Refused::Keyless));
        fs::remove_file(house.keys().master).unwrap();
        let settings =
            Settings { folder: house.0.path().join("other"), cap: Settings::LEAST_CAP, turns: 1, topic: None, keys: Some(house.keys()) };
        assert!(matches!(Log::open(&settings), Err(Unopened::Unsealable(_))));
    }

    /// What it costs to keep text: `cargo test -p headgate-orchestrator --lib -- --ignored --nocapture keeping_text`. Each turn has a
    /// prompt of 1 KiB and an answer of 2 KiB in 100 pieces.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    #[ignore = "a measurement"]
    #[allow(clippy::print_stdout, reason = "the figures are what it is for")]
    async fn what_keeping_text_costs() {
        for (name, keeps) in [("no text", false), ("text", true), ("no text", false), ("text", true)] {
            let house = House(tempfile::tempdir_in(".").unwrap());
            Master::generate(&house.keys().master).unwrap();
            let keys = keeps.then(|| house.keys());
            let settings = Settings { folder: house.folder(), cap: 1 << 30, turns: 4096, topic: None, keys };
            let log = Arc::new(Log::open(&settings).unwrap().0);
            // Its key is made before.
            complete(begin(&log, TurnId::fresh(), "warm").await);
            let begun = std::time::Instant::now();
            let tasks = (0..16).map(|_| {
                let log = log.clone();
                tokio::spawn(async move {
                    let mut took = Vec::new();
                    for _ in 0..500 {
                        let begun = std::time::Instant::now();
                        let mut account = begin(&log, TurnId::fresh(), &"x".repeat(1024)).await;
                        took.push(begun.elapsed());
                        let batch = said(Lane::DEFAULT, "twenty bytes of text");
                        (0..100).for_each(|_| account.add(&batch));
                        complete(account);
                    }
                    took
                })
            });
            let tasks: Vec<_> = tasks.collect();
            let mut took = Vec::new();
            for task in tasks {
                took.extend(task.await.unwrap());
            }
            let rate = took.len() as f64 / begun.elapsed().as_secs_f64();
            took.sort_unstable();
            let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize];
            let dropped = log.shared.text_dropped.get();
            println!("{name}: beginning p50 {:?}, p99 {:?}, {rate:.0} turns/s, {dropped} pieces let go", at(0.5), at(0.99));
        }
    }
}
