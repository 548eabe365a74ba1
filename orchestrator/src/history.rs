//! Remembers what was said in each session, within bounds, so that a prompt can carry only what is new.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    sync::{Mutex, PoisonError},
};

use headgate_contracts::{Content, Message, Principal, Prompt, Role, SessionId, Subject, TenantId, TurnId};

/// How much is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Sessions; the one that has been silent longest is forgotten first.
    pub sessions: usize,
    /// Messages per session; its oldest turns are forgotten first.
    pub messages: usize,
    /// Bytes of text per session.
    pub session_bytes: usize,
    /// Bytes of text in all sessions together.
    pub bytes: usize,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { sessions: 10_000, messages: 128, session_bytes: 64 << 10, bytes: 256 << 20 }
    }
}

/// Whose session. Every access names all three, so a session of another tenant or subject is simply not there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    tenant: TenantId,
    subject: Subject,
    session: SessionId,
}

impl Key {
    pub(crate) fn of(prompt: &Prompt) -> Key {
        Key { tenant: prompt.principal.tenant.clone(), subject: prompt.principal.subject.clone(), session: prompt.session.clone() }
    }

    /// A prompt of nothing but whose it is: what a verdict about `turn` is judged by.
    pub(crate) fn prompt(&self, turn: TurnId) -> Prompt {
        let principal = Principal { tenant: self.tenant.clone(), subject: self.subject.clone(), ..Principal::anonymous() };
        Prompt { principal, ..Prompt::new(turn, self.session.clone(), Vec::new()) }
    }
}

/// Who keeps the conversation, as a request shows by what it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeper {
    /// The client: its messages hold earlier answers and are the whole conversation.
    Client,
    /// We: its messages are what is new.
    Us,
}

fn keeper(messages: &[Message]) -> Keeper {
    if messages.iter().any(|message| message.role == Role::Assistant) { Keeper::Client } else { Keeper::Us }
}

/// One turn that was answered, wholly or in part.
#[derive(Clone)]
pub(crate) struct Exchange {
    /// What was asked; no system messages, those belong to the session.
    asked: Vec<Message>,
    /// What the model said.
    answer: Message,
    /// Whether that was cut before its end.
    cut: Cut,
    bytes: usize,
}

/// Whether an answer reached its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It did.
    No,
    /// Its turn was cancelled or failed; what is remembered is what was generated until then.
    Yes,
}

#[derive(Default)]
struct Session {
    system: Vec<Message>,
    system_bytes: usize,
    exchanges: VecDeque<Exchange>,
    touched: u64,
}

impl Session {
    /// Those that `new` comes after: all but the last one where its answer was cut and its question is asked again.
    fn before(&self, new: &[Message]) -> usize {
        let asked = new.iter().filter(|message| message.role != Role::System);
        let again = self.exchanges.back().is_some_and(|last| last.cut == Cut::Yes && last.asked.iter().eq(asked));
        self.exchanges.len() - usize::from(again)
    }

    fn bytes(&self) -> usize {
        self.system_bytes + self.exchanges.iter().map(|exchange| exchange.bytes).sum::<usize>()
    }

    fn messages(&self) -> usize {
        self.system.len() + self.exchanges.iter().map(|exchange| exchange.asked.len() + 1).sum::<usize>()
    }
}

/// The sessions of this process.
pub(crate) struct History {
    bounds: Bounds,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    sessions: HashMap<Key, Session>,
    by_age: BTreeMap<u64, Key>,
    clock: u64,
    bytes: usize,
}

impl History {
    pub(crate) fn new(bounds: Bounds) -> History {
        History { bounds, kept: Mutex::default() }
    }

    /// The most text that a turn can add to what is remembered, in bytes.
    pub(crate) fn session_bytes(&self) -> usize {
        self.bounds.session_bytes
    }

    /// Whether messages like these can be remembered at all.
    pub(crate) fn takes(&self, messages: &[Message]) -> bool {
        messages.len() < self.bounds.messages && messages.iter().map(size).sum::<usize>() <= self.bounds.session_bytes
    }

    /// What the model is to be sent for `new`: as it is where the client keeps the conversation, else after what is remembered.
    ///
    /// System messages in `new` stand in place of remembered ones, and a question whose answer was cut stands in place of itself.
    pub(crate) fn recall(&self, key: &Key, new: &[Message]) -> Vec<Message> {
        let kept = self.kept();
        let session = match (keeper(new), kept.sessions.get(key)) {
            (Keeper::Us, Some(session)) => session,
            (Keeper::Us, None) | (Keeper::Client, _) => return new.to_vec(),
        };
        let is_system = |message: &&Message| message.role == Role::System;
        let mut all = Vec::with_capacity(session.messages() + new.len());
        if new.iter().any(|message| is_system(&message)) {
            all.extend(new.iter().filter(is_system).cloned());
        } else {
            all.extend(session.system.iter().cloned());
        }
        for exchange in session.exchanges.iter().take(session.before(new)) {
            all.extend(exchange.asked.iter().cloned());
            all.push(exchange.answer.clone());
        }
        all.extend(new.iter().filter(|message| !is_system(message)).cloned());
        all
    }

    /// Remembers what was asked and what was answered. A turn that brought no answer at all leaves no trace: the model would
    /// otherwise be shown a question that nobody answered.
    pub(crate) fn remember(&self, key: &Key, new: &[Message], answer: Message, cut: Cut) {
        if size(&answer) == 0 && answer.tool_calls.is_none() {
            return;
        }
        let (system, asked): (Vec<_>, Vec<_>) = new.iter().cloned().partition(|message| message.role == Role::System);
        let keeper = keeper(new);
        let mut kept = self.kept();
        let Kept { sessions, by_age, clock, bytes } = &mut *kept;
        let session = sessions.entry(key.clone()).or_default();
        *bytes -= session.bytes();
        if keeper == Keeper::Client {
            session.exchanges.clear();
        }
        session.exchanges.truncate(session.before(new));
        if !system.is_empty() || keeper == Keeper::Client {
            session.system_bytes = system.iter().map(size).sum();
            session.system = system;
        }
        let size = asked.iter().map(size).sum::<usize>() + size(&answer);
        session.exchanges.push_back(Exchange { asked, answer, cut, bytes: size });
        while session.messages() > self.bounds.messages || session.bytes() > self.bounds.session_bytes {
            // What does not fit alone is forgotten too: half an exchange would say something that nobody said.
            if session.exchanges.pop_front().is_none() {
                session.system.clear();
                session.system_bytes = 0;
                break;
            }
        }
        *bytes += session.bytes();
        *clock += 1;
        by_age.remove(&std::mem::replace(&mut session.touched, *clock));
        by_age.insert(*clock, key.clone());
        while sessions.len() > self.bounds.sessions || *bytes > self.bounds.bytes {
            let Some((_, oldest)) = by_age.pop_first() else { break };
            if let Some(forgotten) = sessions.remove(&oldest) {
                *bytes -= forgotten.bytes();
            }
        }
    }

    /// How many sessions and bytes are held.
    pub(crate) fn held(&self) -> (usize, usize) {
        let kept = self.kept();
        (kept.sessions.len(), kept.bytes)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        // A panic between two changes could only leave a count wrong, never a session in other hands.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that count for the bounds.
fn size(message: &Message) -> usize {
    let text = message.content.iter().flat_map(Content::texts).map(str::len).sum::<usize>();
    let name = message.name.as_ref().map_or(0, String::len);
    let calls = message.tool_calls.as_ref().map_or(0, |calls| calls.to_string().len());
    text + name + calls
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sessions, bytes) = self.held();
        f.debug_struct("History").field("sessions", &sessions).field("bytes", &bytes).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tenant: &str, session: &str) -> Key {
        Key { tenant: tenant.parse().unwrap(), subject: "u1".parse().unwrap(), session: session.parse().unwrap() }
    }

    fn user(text: &str) -> Message {
        Message::new(Role::User, text)
    }

    fn assistant(text: &str) -> Message {
        Message::new(Role::Assistant, text)
    }

    fn words(messages: &[Message]) -> Vec<String> {
        let word = |message: &Message| {
            let text: String = message.content.iter().flat_map(Content::texts).collect();
            format!("{}:{text}", message.role.as_str())
        };
        messages.iter().map(word).collect()
    }

    fn say(history: &History, key: &Key, asked: &str, answered: &str) {
        history.remember(key, &[user(asked)], assistant(answered), Cut::No);
    }

    #[test]
    fn a_second_turn_is_sent_after_the_first() {
        let history = History::new(Bounds::default());
        say(&history, &key("a", "s"), "one", "1");
        assert_eq!(words(&history.recall(&key("a", "s"), &[user("two")])), ["user:one", "assistant:1", "user:two"]);
    }

    #[test]
    fn a_session_of_another_tenant_is_not_there() {
        let history = History::new(Bounds::default());
        say(&history, &key("a", "s"), "one", "1");
        assert_eq!(words(&history.recall(&key("b", "s"), &[user("two")])), ["user:two"]);
    }

    #[test]
    fn a_client_that_keeps_the_conversation_is_taken_at_its_word() {
        let history = History::new(Bounds::default());
        say(&history, &key("a", "s"), "one", "1");
        let own = [user("eins"), assistant("1"), user("zwei")];
        assert_eq!(words(&history.recall(&key("a", "s"), &own)), ["user:eins", "assistant:1", "user:zwei"]);
        history.remember(&key("a", "s"), &own, assistant("2"), Cut::No);
        assert_eq!(
            words(&history.recall(&key("a", "s"), &[user("drei")])),
            ["user:eins", "assistant:1", "user:zwei", "assistant:2", "user:drei"]
        );
    }

    #[test]
    fn instructions_are_sent_once_and_the_newest_count() {
        let history = History::new(Bounds::default());
        let system = |text: &str| Message::new(Role::System, text);
        history.remember(&key("a", "s"), &[system("be brief"), user("one")], assistant("1"), Cut::No);
        assert_eq!(words(&history.recall(&key("a", "s"), &[user("two")])), ["system:be brief", "user:one", "assistant:1", "user:two"]);
        assert_eq!(
            words(&history.recall(&key("a", "s"), &[system("be long"), user("two")])),
            ["system:be long", "user:one", "assistant:1", "user:two"]
        );
    }

    #[test]
    fn a_cut_answer_is_remembered_and_marked_and_an_empty_one_is_not() {
        let history = History::new(Bounds::default());
        history.remember(&key("a", "s"), &[user("one")], assistant(""), Cut::Yes);
        assert_eq!(history.held(), (0, 0));
        history.remember(&key("a", "s"), &[user("one")], assistant("half"), Cut::Yes);
        assert_eq!(words(&history.recall(&key("a", "s"), &[user("two")])), ["user:one", "assistant:half", "user:two"]);
    }

    #[test]
    fn a_question_asked_again_after_its_answer_was_cut_stands_once() {
        let history = History::new(Bounds::default());
        history.remember(&key("a", "s"), &[user("one")], assistant("half"), Cut::Yes);
        assert_eq!(words(&history.recall(&key("a", "s"), &[user("one")])), ["user:one"]);
        say(&history, &key("a", "s"), "one", "whole");
        assert_eq!(words(&history.recall(&key("a", "s"), &[user("one")])), ["user:one", "assistant:whole", "user:one"]);
    }

    #[test]
    fn the_oldest_turns_of_a_session_are_forgotten_first() {
        let history = History::new(Bounds { messages: 4, ..Bounds::default() });
        for word in ["one", "two", "three"] {
            say(&history, &key("a", "s"), word, "yes");
        }
        assert_eq!(words(&history.recall(&key("a", "s"), &[])), ["user:two", "assistant:yes", "user:three", "assistant:yes"]);

        let history = History::new(Bounds { session_bytes: 10, ..Bounds::default() });
        say(&history, &key("a", "s"), "one", "yes");
        say(&history, &key("a", "s"), "two", "yes");
        assert_eq!(words(&history.recall(&key("a", "s"), &[])), ["user:two", "assistant:yes"]);
        say(&history, &key("a", "s"), "far too long to keep", "yes");
        assert_eq!((words(&history.recall(&key("a", "s"), &[])).len(), history.held().1), (0, 0));
    }

    #[test]
    fn the_session_silent_longest_is_forgotten_first() {
        for bounds in [Bounds { sessions: 2, ..Bounds::default() }, Bounds { bytes: 8, ..Bounds::default() }] {
            let history = History::new(bounds);
            say(&history, &key("a", "1"), "hi", "ho");
            say(&history, &key("a", "2"), "hi", "ho");
            history.remember(&key("a", "1"), &[user("hi"), assistant("ho"), user("")], assistant("ha"), Cut::No);
            say(&history, &key("a", "3"), "h", "o");
            let there = ["1", "2", "3"].map(|session| !history.recall(&key("a", session), &[]).is_empty());
            assert_eq!(there, [true, false, true]);
            assert!(history.held().1 <= history.bounds.bytes && history.held().0 <= 2);
        }
    }

    #[test]
    fn no_text_reaches_a_debug_form() {
        let history = History::new(Bounds::default());
        say(&history, &key("a", "s"), "canary", "canary");
        assert!(!format!("{history:?}").contains("canary"));
    }
}
