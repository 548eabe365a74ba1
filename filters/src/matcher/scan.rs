//! Reads the text of one lane, piece by piece, and says what is settled.

use std::fmt;

use aho_corasick::automaton::StateID as PhraseState;
use regex_automata::{dfa::Automaton, util::primitives::StateID};

use super::{
    Edits, Matcher, Progress, RuleId,
    detectors::{self, Tail},
    found::Found,
    normal::{self, Composer, Part},
    patterns::{Behind, Goal, LONGEST, Machine, Patterns, Prose},
    places::Places,
};

/// A long piece is settled in slices of this many bytes, so that what is found and not yet said has a bound.
const SLICE: usize = 512;

/// The state of one lane of one turn.
///
/// Feed it the lane's text with [`Scan::push`] and end it with [`Scan::finish`], always with the matcher it came from. Memory:
/// some 300 bytes, and while matches are forming a few dozen bytes for each character of the longest one.
pub struct Scan {
    /// Bytes of the lane seen.
    at: u64,
    /// Bytes of normalised text fed to the automata.
    fed: u64,
    /// The end of the original character fed last.
    end: u64,
    cleared: u64,
    stage: Stage,
    composer: Composer,
    phrase: Option<PhraseState>,
    places: Places,
    /// Phrases that end with the character fed last; they stand unless the next one joins it.
    ended: Vec<Ended>,
    behind: Behind,
    /// Patterns forming, in order of their starts.
    threads: Vec<Thread>,
    /// Patterns with a check forming, and the normalised text since the first of them began.
    checked: Vec<Thread>,
    text: Vec<u8>,
    text_from: u64,
    going: Vec<Going>,
    found: Found,
    /// Tests of the tests: a wrong scan that lets this many bytes too many go.
    #[cfg(test)]
    pub(super) leaks: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    Cut,
    Ended,
}

struct Ended {
    rule: RuleId,
    start: u64,
    end: u64,
}

/// A pattern forming: where it began and how far it is.
struct Thread {
    start: u64,
    /// The same place in the normalised text.
    from: u64,
    machine: u32,
    state: StateID,
}

/// The tail of a match, going on.
struct Going {
    rule: RuleId,
    tail: &'static Tail,
    /// Where what certainly belongs to it ends.
    end: u64,
    left: u32,
    end_line: u8,
    /// The character fed last belongs to it too, unless the next one joins it.
    waits: bool,
}

impl fmt::Debug for Scan {
    /// Positions only: never text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scan").field("at", &self.at).field("cleared", &self.cleared).finish_non_exhaustive()
    }
}

impl Scan {
    pub(super) fn new(matcher: &Matcher) -> Scan {
        Scan {
            at: 0,
            fed: 0,
            end: 0,
            cleared: 0,
            stage: Stage::Open,
            composer: Composer::default(),
            phrase: matcher.phrases.as_ref().map(|phrases| phrases.start()),
            places: Places::default(),
            ended: Vec::new(),
            behind: Behind::Nothing,
            threads: Vec::new(),
            checked: Vec::new(),
            text: Vec::new(),
            text_from: 0,
            going: Vec::new(),
            found: Found::default(),
            #[cfg(test)]
            leaks: 0,
        }
    }

    /// Reads the next piece of the lane's text and appends what is settled to `out`.
    ///
    /// Masks come in order, do not overlap and end at or before what is cleared. After a cut or [`Scan::finish`] nothing is
    /// read any more. Work: one pass, a step for each automaton that is in the middle of a match; nothing is allocated while
    /// the text is clean.
    pub fn push(&mut self, matcher: &Matcher, piece: &str, out: &mut Edits) -> Progress {
        let mut rest = piece;
        while self.stage == Stage::Open && !rest.is_empty() {
            let (slice, later) = rest.split_at(rest.floor_char_boundary(SLICE));
            self.read(matcher, slice);
            self.settle(matcher, out);
            rest = later;
        }
        self.progress()
    }

    /// Nothing more comes on this lane: settles everything.
    pub fn finish(&mut self, matcher: &Matcher, out: &mut Edits) -> Progress {
        if self.stage == Stage::Open {
            self.flush(matcher);
            self.character_stands(matcher);
            self.last_matches(matcher);
            let (cleared, cut) = self.found.settle(self.at, |_| false, out);
            self.cleared = cleared;
            self.stage = if cut { Stage::Cut } else { Stage::Ended };
        }
        self.progress()
    }

    fn progress(&self) -> Progress {
        Progress { cleared: self.cleared, cut: self.stage == Stage::Cut }
    }

    fn settle(&mut self, matcher: &Matcher, out: &mut Edits) {
        let live = self.live(matcher);
        #[cfg(test)]
        let live = (live + self.leaks).min(self.at);
        if self.found.is_empty() {
            self.cleared = self.cleared.max(live);
            return;
        }
        let going = &self.going;
        let (cleared, cut) = self.found.settle(live, |rule| going.iter().any(|going| going.rule == rule), out);
        debug_assert!(cleared >= self.cleared, "what has gone cannot be taken back");
        self.cleared = cleared.max(self.cleared);
        if cut {
            self.stage = Stage::Cut;
        }
    }

    /// Where the earliest match begins that is still forming or not yet certain; the end of the text if there is none.
    fn live(&self, matcher: &Matcher) -> u64 {
        let waits = self.composer.waits();
        let depth = self.depth(matcher);
        if depth == 0 && !waits && self.threads.is_empty() && self.checked.is_empty() && self.ended.is_empty() && self.going.is_empty() {
            return self.at;
        }
        let changed = waits && self.composer.letter_has_changed();
        let mut live = self.at;
        let mut at_most = |start: u64| live = live.min(start);
        // While marks wait, a phrase without any beyond ASCII cannot go on.
        if depth > 0 && !(waits && matcher.phrases.as_ref().is_some_and(|phrases| phrases.ascii)) {
            at_most(self.places.start(self.fed - depth));
        }
        if !changed {
            self.ended.iter().for_each(|ended| at_most(ended.start));
        }
        for thread in self.threads.iter().chain(&self.checked) {
            let goes_on = !waits
                || matcher.patterns.machines.get(thread.machine as usize).is_some_and(|machine| {
                    // While marks wait, a pattern without any can only have ended before them: its match shows one byte later.
                    !machine.ascii || (!changed && machine.dfa.is_match_state(machine.dfa.next_state(thread.state, 0xcc)))
                });
            if goes_on {
                at_most(thread.start);
            }
        }
        if waits && matcher.patterns.begins_beyond_ascii {
            self.composer.waits_from().into_iter().for_each(&mut at_most);
        }
        self.going.iter().for_each(|going| at_most(going.end));
        live.max(self.found.floor)
    }

    /// How many normalised bytes back the longest phrase now forming began.
    fn depth(&self, matcher: &Matcher) -> u64 {
        matcher.phrases.as_ref().zip(self.phrase).map_or(0, |(phrases, state)| phrases.depth(state).into())
    }

    fn read(&mut self, matcher: &Matcher, slice: &str) {
        if slice.is_ascii() {
            return self.ascii(matcher, slice.as_bytes());
        }
        let mut rest = slice;
        while let Some(first) = rest.chars().next() {
            if first.is_ascii() {
                let end = rest.bytes().position(|byte| !byte.is_ascii()).unwrap_or(rest.len());
                let (run, later) = rest.split_at(end);
                self.ascii(matcher, run.as_bytes());
                rest = later;
            } else {
                self.character(matcher, first);
                rest = rest.split_at(first.len_utf8()).1;
            }
        }
    }

    /// Each byte is one character that joins nothing before it.
    fn ascii(&mut self, matcher: &Matcher, run: &[u8]) {
        self.flush(matcher);
        self.places.ascii(self.fed, self.at, matcher.phrases_reach());
        let mut rest = run;
        loop {
            rest = rest.get(self.coast(matcher, rest)..).unwrap_or_default();
            let Some((byte, later)) = rest.split_first() else { break };
            self.ascii_byte(matcher, byte.to_ascii_lowercase());
            rest = later;
        }
        if let Some(last) = run.last() {
            self.composer.ascii(last.to_ascii_lowercase());
        }
    }

    /// The fast path: reads on while no match ends and at most one pattern is forming. Returns how many bytes that was.
    fn coast(&mut self, matcher: &Matcher, run: &[u8]) -> usize {
        if self.threads.len() + self.checked.len() > 1 || !(self.ended.is_empty() && self.going.is_empty()) {
            return 0;
        }
        let thread = self.threads.pop().or(self.checked.pop());
        let mut coast = Coast {
            patterns: &matcher.patterns,
            fed: self.fed,
            at: self.at,
            behind: self.behind,
            forming: thread.and_then(|thread| Some((matcher.patterns.machines.get(thread.machine as usize)?, thread, None))),
            read: 0,
            no_words_before: 0,
        };
        let mut rest = run;
        loop {
            match (&matcher.phrases, &mut self.phrase) {
                (Some(phrases), Some(state)) => phrases.coast(state, rest, |byte| coast.takes(byte)),
                (_, _) => _ = rest.iter().all(|byte| coast.takes(byte.to_ascii_lowercase())),
            }
            rest = run.get(coast.read..).unwrap_or_default();
            let (Some(byte), Some(prose)) = (rest.first(), &matcher.patterns.prose) else { break };
            if !coast.may_read_words(prose, *byte) {
                break;
            }
            let (words, looked) = prose.read(rest);
            coast.no_words_before = coast.read + looked;
            let mut words = rest.get(..words).unwrap_or_default();
            if let (Some(phrases), Some(state)) = (&matcher.phrases, &mut self.phrase) {
                words = phrases.words(state, words, prose);
            }
            if let Some(last) = words.last() {
                (coast.behind, coast.read) = (Behind::of(*last), coast.read + words.len());
                rest = run.get(coast.read..).unwrap_or_default();
            }
        }
        let Coast { behind, forming, read, .. } = coast;
        if read > 0 {
            (self.behind, self.fed, self.at) = (behind, self.fed + read as u64, self.at + read as u64);
            self.end = self.at;
        }
        match forming {
            Some((machine, thread, begun)) if machine.checked => {
                if begun.is_some() {
                    (self.text_from, _) = (thread.from, self.text.clear());
                }
                self.text.extend(run.iter().take(read).skip(begun.unwrap_or(0)).map(u8::to_ascii_lowercase));
                self.checked.push(thread);
            }
            Some((_, thread, _)) => self.threads.push(thread),
            None => {}
        }
        read
    }

    fn ascii_byte(&mut self, matcher: &Matcher, byte: u8) {
        self.character_stands(matcher);
        self.step(matcher, byte, true);
        self.tails(byte);
        self.advance(matcher, byte);
        self.begin(matcher, byte, self.at);
        self.at += 1;
        self.fed += 1;
        self.end = self.at;
        self.behind = Behind::of(byte);
        self.phrases_end(matcher);
    }

    fn character(&mut self, matcher: &Matcher, c: char) {
        let start = self.at;
        self.at += c.len_utf8() as u64;
        if normal::is_invisible(c) {
            return self.invisible(matcher, start);
        }
        let (mut composer, end) = (std::mem::take(&mut self.composer), self.at);
        if normal::is_inert(c) {
            composer.take_inert(c, start, end, |part| self.feed(matcher, part));
        } else {
            normal::decompose(c, |part| composer.take(part, start, end, |part| self.feed(matcher, part)));
        }
        self.composer = composer;
    }

    fn flush(&mut self, matcher: &Matcher) {
        if self.composer.waits() {
            let mut composer = std::mem::take(&mut self.composer);
            composer.flush(|part| self.feed(matcher, part));
            self.composer = composer;
        }
    }

    /// An invisible character is not fed, so any number of them fit into a match still forming. Beyond what can be held, the
    /// forming text is masked and goes; should it turn out to be a match, that match begins here.
    fn invisible(&mut self, matcher: &Matcher, start: u64) {
        let live = self.live(matcher);
        if self.at - live > matcher.stretch() {
            let rule = matcher.invisible();
            self.found.record(rule, matcher.rules().get(rule.0 as usize), live, self.at, self.fed);
            self.found.floor = start;
            self.going.iter_mut().for_each(|going| going.end = going.end.max(start));
        }
    }

    /// Feeds a decomposed character to the automata.
    fn feed(&mut self, matcher: &Matcher, part: Part) {
        self.places.character(self.fed, part.start, matcher.phrases_reach());
        if part.joins {
            self.ended.clear();
            self.going.clear();
        } else {
            self.character_stands(matcher);
        }
        let mut bytes = [0; 4];
        for (i, byte) in part.c.encode_utf8(&mut bytes).bytes().enumerate() {
            let begins = i == 0 && !part.joins;
            self.step(matcher, byte, begins);
            if begins {
                self.tails(byte);
            }
            self.advance(matcher, byte);
            if begins {
                self.begin(matcher, byte, part.start);
            } else if !self.checked.is_empty() {
                self.text.push(byte);
            }
            self.fed += 1;
            self.behind = Behind::of(byte);
        }
        self.end = self.end.max(part.end);
        self.phrases_end(matcher);
    }

    /// Nothing joins the character fed last any more: what ended or goes on with it is certain.
    fn character_stands(&mut self, matcher: &Matcher) {
        let Scan { found, end, fed, .. } = self;
        for ended in self.ended.drain(..) {
            found.record(ended.rule, matcher.rules().get(ended.rule.0 as usize), ended.start, ended.end, *fed);
        }
        self.going.retain_mut(|going| {
            if going.waits {
                found.extend(going.rule, going.end, *end);
                (going.end, going.waits) = (*end, false);
                going.left -= 1;
            }
            going.left > 0 && going.end_line < 13
        });
    }

    /// A new character begins with `byte`: which tails does it belong to?
    fn tails(&mut self, byte: u8) {
        self.going.retain_mut(|going| {
            going.waits = (going.tail.class)(byte);
            if going.tail.until_end_line {
                going.end_line = detectors::end_line(going.end_line, byte);
            }
            going.waits
        });
    }

    /// The phrases' step.
    #[inline]
    fn advance(&mut self, matcher: &Matcher, byte: u8) {
        if let (Some(phrases), Some(state)) = (&matcher.phrases, &mut self.phrase) {
            *state = phrases.next(*state, byte);
        }
    }

    /// Notes the phrases that end with the character just fed.
    #[inline]
    fn phrases_end(&mut self, matcher: &Matcher) {
        if let (Some(phrases), Some(state)) = (&matcher.phrases, self.phrase)
            && phrases.is_match(state)
        {
            for (rule, length) in phrases.ending(state) {
                self.ended.push(Ended { rule, start: self.places.start(self.fed - u64::from(length)), end: self.end });
            }
        }
    }

    /// The patterns' step. A match shows one byte after its end; it counts if a new character begins there (`begins`).
    fn step(&mut self, matcher: &Matcher, byte: u8, begins: bool) {
        if self.threads.is_empty() && self.checked.is_empty() {
            return self.text.clear();
        }
        let Scan { threads, checked, text, text_from, going, found, end, fed, .. } = self;
        let mut reached = |thread: &Thread, goal: &Goal| {
            if begins && goal.accepts(text, *text_from, thread.from) {
                reach(matcher, found, going, goal, thread.start, *end, *fed);
            }
        };
        // Threads in one state have one future: the earliest start is all that counts. Those of a pattern with counts are
        // never in one state unless their starts were; so it is enough to look at the last one kept.
        let mut last = None;
        threads.retain_mut(|thread| {
            let goes_on = thread.step(matcher, byte, &mut reached);
            goes_on && last.replace((thread.machine, thread.state)) != Some((thread.machine, thread.state))
        });
        checked.retain_mut(|thread| thread.step(matcher, byte, &mut reached));
        match checked.first() {
            None => text.clear(),
            // Threads may follow each other without end: what lies before the first one is dropped now and then.
            Some(first) if text.len() > 2 * LONGEST => {
                let before = usize::try_from(first.from - *text_from).unwrap_or(0).min(text.len());
                text.drain(..before);
                *text_from = first.from;
            }
            Some(_) => {}
        }
    }

    /// Starts the patterns that can begin with `byte`.
    #[inline]
    fn begin(&mut self, matcher: &Matcher, byte: u8, start: u64) {
        for starter in matcher.patterns.starters(self.behind, byte) {
            let thread = Thread { start, from: self.fed, machine: starter.machine, state: starter.state };
            if starter.checked {
                if self.checked.is_empty() {
                    (self.text_from, _) = (self.fed, self.text.clear());
                }
                self.checked.push(thread);
            } else {
                self.threads.push(thread);
            }
        }
        if !self.checked.is_empty() {
            self.text.push(byte);
        }
    }

    /// The patterns' last step: the end of the text.
    fn last_matches(&mut self, matcher: &Matcher) {
        let Scan { threads, checked, text, text_from, going, found, end, fed, .. } = self;
        for thread in threads.drain(..).chain(checked.drain(..)) {
            if let Some(machine) = matcher.patterns.machines.get(thread.machine as usize) {
                let state = machine.dfa.next_eoi_state(thread.state);
                if machine.dfa.is_match_state(state) {
                    for goal in machine.reached(state).filter(|goal| goal.accepts(text, *text_from, thread.from)) {
                        reach(matcher, found, going, goal, thread.start, *end, *fed);
                    }
                }
            }
        }
    }
}

/// The patterns' part of the fast path.
struct Coast<'m> {
    patterns: &'m Patterns,
    fed: u64,
    at: u64,
    behind: Behind,
    /// The pattern forming, and where in this run it began.
    forming: Option<(&'m Machine, Thread, Option<usize>)>,
    read: usize,
    /// Up to here it was looked for words already.
    no_words_before: usize,
}

impl Coast<'_> {
    /// May the next bytes be ordinary words?
    #[inline(always)]
    fn may_read_words(&self, prose: &Prose, byte: u8) -> bool {
        self.forming.is_none() && self.read >= self.no_words_before && prose.begins(self.behind, byte)
    }

    /// Takes the byte, unless something happens with it that needs the slow path, or words may begin with it.
    #[inline(always)]
    fn takes(&mut self, byte: u8) -> bool {
        if self.patterns.prose.as_ref().is_some_and(|prose| self.may_read_words(prose, byte)) {
            return false;
        }
        let begins = self.patterns.begins(self.behind, byte);
        if let Some((machine, thread, _)) = &mut self.forming {
            let next = machine.dfa.next_state(thread.state, byte);
            let quiet = machine.is_quiet(next);
            if begins || (!quiet && machine.dfa.is_match_state(next)) {
                return false;
            }
            thread.state = next;
            if !quiet {
                self.forming = None;
            }
        } else if begins {
            let [starter] = self.patterns.starters(self.behind, byte) else { return false };
            let Some(machine) = self.patterns.machines.get(starter.machine as usize) else { return false };
            let read = self.read as u64;
            let thread = Thread { start: self.at + read, from: self.fed + read, machine: starter.machine, state: starter.state };
            self.forming = Some((machine, thread, Some(self.read)));
        }
        self.behind = Behind::of(byte);
        self.read += 1;
        true
    }
}

impl Thread {
    /// One byte on. False when no match can come any more.
    #[inline]
    fn step(&mut self, matcher: &Matcher, byte: u8, reached: &mut impl FnMut(&Thread, &Goal)) -> bool {
        let Some(machine) = matcher.patterns.machines.get(self.machine as usize) else { return false };
        self.state = machine.dfa.next_state(self.state, byte);
        if machine.is_quiet(self.state) {
            return true;
        }
        if machine.dfa.is_match_state(self.state) {
            machine.reached(self.state).for_each(|goal| reached(self, goal));
        }
        machine.is_alive(self.state)
    }
}

impl Goal {
    /// Does the check, if there is one, accept the normalised text from `from` on? Without any, `from` means nothing.
    fn accepts(&self, text: &[u8], text_from: u64, from: u64) -> bool {
        // Of patterns without a check no text is kept.
        let span = || text.get(usize::try_from(from.checked_sub(text_from)?).ok()?..);
        self.check.is_none_or(|check| span().is_some_and(check))
    }
}

/// A pattern's match stands; its tail begins.
fn reach(matcher: &Matcher, found: &mut Found, going: &mut Vec<Going>, goal: &Goal, start: u64, end: u64, fed: u64) {
    let info = matcher.rules().get(goal.rule.0 as usize);
    found.record(goal.rule, info, start, end, fed);
    if let Some(tail) = goal.tail.filter(|_| info.is_some_and(|info| info.action == super::Action::Mask)) {
        // A tail that begins later ends later: one for each rule is enough.
        going.retain(|going| going.rule != goal.rule);
        going.push(Going { rule: goal.rule, tail, end, left: tail.limit, end_line: 0, waits: false });
    }
}
