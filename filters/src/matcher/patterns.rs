//! Regular expressions as automata that can be started anywhere and left waiting between two pieces of text.

use regex_automata::{
    Anchored, MatchKind,
    dfa::{Automaton, StartKind, dense},
    nfa::thompson,
    util::{primitives::StateID, start},
};
use regex_syntax::{
    ParserBuilder,
    hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind, Literal, Look, Repetition},
};

use super::{
    BuildError, RuleId,
    detectors::{Check, Tail},
    normal,
};

/// The longest match a pattern may have, in normalised bytes: what a lane may have to hold for it.
pub(super) const LONGEST: usize = 4096;
/// What the automaton of one pattern may take, in bytes.
const MOST_TABLE_BYTES: usize = 8 << 20;
const MOST_WORK_BYTES: usize = 64 << 20;
/// A class with more characters beyond ASCII than this, or missing more of them, is refused.
const MOST_LISTED: usize = 64;
const BEYOND_ASCII: usize = 0x11_0000 - 0x800 - 0x80;

/// Reads a pattern in `regex` syntax so that it fits normalised text.
///
/// Literals are normalised as text is, so case does not matter. `\w \d \s \b` are ASCII. `.` and negated classes match one
/// decomposed character: é is two, e and its accent. Captures mean nothing, greediness neither: every match counts.
pub(super) fn fold(pattern: &str) -> Result<Hir, BuildError> {
    let fault = |reason: String, remedy| BuildError::Pattern { pattern: pattern.to_owned(), reason, remedy };
    // Without `unicode`, \w and its like are ASCII and small; with it, letters beyond ASCII can be written at all.
    let mut parser = ParserBuilder::new();
    parser.utf8(false).case_insensitive(true).unicode(!pattern.is_ascii()).nest_limit(64);
    let hir = parser.build().parse(pattern).map_err(|error| match error {
        regex_syntax::Error::Parse(error) => fault(error.kind().to_string(), "correct the pattern"),
        regex_syntax::Error::Translate(error) => fault(error.kind().to_string(), "correct the pattern"),
        error => fault(error.to_string(), "correct the pattern"),
    })?;
    let hir = folded(&hir).map_err(|(reason, remedy)| fault(reason.to_owned(), remedy))?;
    let properties = hir.properties();
    if properties.minimum_len().is_none_or(|least| least == 0) {
        return Err(fault("it matches the empty text, or nothing at all".into(), "make at least one character of it required"));
    }
    match properties.maximum_len() {
        None => Err(fault(
            "its matches have no greatest length, so text would have to be held without end".into(),
            "write {1,64} for +, {0,64} for *",
        )),
        Some(longest) if longest > LONGEST => {
            Err(fault(format!("its matches may be {longest} bytes long, at most {LONGEST} can be held"), "lower the repeat counts"))
        }
        Some(_) => Ok(hir),
    }
}

type Why = (&'static str, &'static str);

fn folded(hir: &Hir) -> Result<Hir, Why> {
    Ok(match hir.kind() {
        HirKind::Empty => Hir::empty(),
        HirKind::Literal(Literal(bytes)) => {
            let text = std::str::from_utf8(bytes).map_err(|_| ("it names a byte that is no text", "write characters, not bytes"))?;
            Hir::literal(normal::normalise(text).into_bytes())
        }
        HirKind::Class(class) => folded_class(class)?,
        HirKind::Look(look) => Hir::look(match look {
            Look::WordUnicode => Look::WordAscii,
            Look::WordUnicodeNegate => Look::WordAsciiNegate,
            Look::WordStartUnicode => Look::WordStartAscii,
            Look::WordEndUnicode => Look::WordEndAscii,
            Look::WordStartHalfUnicode => Look::WordStartHalfAscii,
            Look::WordEndHalfUnicode => Look::WordEndHalfAscii,
            other => *other,
        }),
        HirKind::Repetition(Repetition { min, max, greedy, sub }) => {
            Hir::repetition(Repetition { min: *min, max: *max, greedy: *greedy, sub: Box::new(folded(sub)?) })
        }
        HirKind::Capture(capture) => folded(&capture.sub)?,
        HirKind::Concat(parts) => Hir::concat(parts.iter().map(folded).collect::<Result<_, _>>()?),
        HirKind::Alternation(parts) => Hir::alternation(parts.iter().map(folded).collect::<Result<_, _>>()?),
    })
}

fn folded_class(class: &Class) -> Result<Hir, Why> {
    let ranges: Vec<(u32, u32)> = match class {
        Class::Unicode(class) => class.iter().map(|range| (u32::from(range.start()), u32::from(range.end()))).collect(),
        Class::Bytes(class) => {
            // In a class of bytes, all those beyond ASCII stand for any character beyond it: `.` is a character, not a byte.
            let beyond: usize = class.iter().map(|range| (0x80..=0xff).filter(|b| (range.start()..=range.end()).contains(b)).count()).sum();
            if beyond != 0 && beyond != 0x80 {
                return Err(("it has a class of bytes that is no text", "write characters, not bytes"));
            }
            let ascii = class.iter().filter(|range| range.start() < 0x80).map(|range| (range.start().into(), range.end().min(0x7f).into()));
            ascii.chain((beyond != 0).then_some((0x80, 0x10_ffff))).collect()
        }
    };
    let chars = || ranges.iter().flat_map(|(from, to)| *from..=*to).filter_map(char::from_u32);
    let mut single = ClassUnicode::empty();
    let one = |c: char| ClassUnicodeRange::new(c, c);
    chars().take_while(char::is_ascii).for_each(|c| single.push(one(c.to_ascii_lowercase())));
    let beyond = chars().filter(|c| !c.is_ascii()).count();
    let mut spelled = Vec::new();
    if beyond + MOST_LISTED >= BEYOND_ASCII {
        single.push(ClassUnicodeRange::new('\u{80}', char::MAX));
    } else if beyond > MOST_LISTED {
        return Err(("it has a class of very many letters beyond ASCII", r"write [a-z0-9_] for \w, or list the letters"));
    } else {
        for c in chars().filter(|c| !c.is_ascii()) {
            let text = normal::normalise(c.encode_utf8(&mut [0; 4]));
            let mut letters = text.chars();
            match (letters.next(), letters.next()) {
                (Some(letter), None) => single.push(one(letter)),
                (Some(_), Some(_)) => spelled.push(Hir::literal(text.into_bytes())),
                (None, _) => {}
            }
        }
    }
    if !single.ranges().is_empty() {
        spelled.push(Hir::class(Class::Unicode(single)));
    }
    Ok(Hir::alternation(spelled))
}

/// One automaton for one or more patterns: anchored where it is started, reporting every match of every one.
pub(super) struct Machine {
    pub(super) dfa: dense::DFA<Vec<u32>>,
    /// By state: can a match still come after it?
    alive: Vec<bool>,
    /// By state: alive, and no match.
    quiet: Vec<bool>,
    /// By pattern.
    pub(super) goals: Vec<Goal>,
    /// A check looks at the text between start and end, so threads of different starts must not be merged.
    pub(super) checked: bool,
    /// No match has a character beyond ASCII in it.
    pub(super) ascii: bool,
}

/// What a match of a pattern means.
#[derive(Clone, Copy)]
pub(super) struct Goal {
    pub(super) rule: RuleId,
    pub(super) check: Option<Check>,
    pub(super) tail: Option<&'static Tail>,
}

impl Machine {
    pub(super) fn build(hirs: &[&Hir], goals: Vec<Goal>) -> Result<Machine, String> {
        let nfa = thompson::Compiler::new()
            .configure(
                thompson::Config::new().utf8(false).which_captures(thompson::WhichCaptures::None).nfa_size_limit(Some(MOST_WORK_BYTES)),
            )
            .build_many_from_hir(hirs)
            .map_err(|error| error.to_string())?;
        let dfa = dense::Builder::new()
            .configure(
                dense::Config::new()
                    .match_kind(MatchKind::All)
                    .start_kind(StartKind::Anchored)
                    .dfa_size_limit(Some(MOST_TABLE_BYTES))
                    .determinize_size_limit(Some(MOST_WORK_BYTES)),
            )
            .build_from_nfa(&nfa)
            .map_err(|error| error.to_string())?;
        let checked = goals.iter().any(|goal| goal.check.is_some());
        let mut machine = Machine { dfa, alive: Vec::new(), quiet: Vec::new(), goals, checked, ascii: true };
        machine.measure()?;
        Ok(machine)
    }

    /// Finds the states after which a match can still come: a state is alive if a transition matches or leads to such a state.
    fn measure(&mut self) -> Result<(), String> {
        let Machine { dfa, .. } = &*self;
        let index = |state: StateID| state.as_usize() >> dfa.stride2();
        let bytes: Vec<u8> = dfa.byte_classes().representatives(0..=255).filter_map(|unit| unit.as_u8()).collect();
        let (mut seen, mut queue) = (Vec::<bool>::new(), Vec::new());
        let mut before: Vec<Vec<StateID>> = Vec::new();
        let mut alive_now = Vec::new();
        for look in Behind::ALL {
            queue.push(begin(dfa, look)?);
        }
        while let Some(state) = queue.pop() {
            if seen.len() <= index(state) {
                seen.resize(index(state) + 1, false);
            }
            if std::mem::replace(&mut seen[index(state)], true) || dfa.is_dead_state(state) {
                continue;
            }
            let ends = dfa.is_match_state(dfa.next_eoi_state(state));
            let mut matches = ends;
            for next in bytes.iter().map(|byte| dfa.next_state(state, *byte)) {
                matches |= dfa.is_match_state(next);
                if before.len() <= index(next) {
                    before.resize(index(next) + 1, Vec::new());
                }
                before[index(next)].push(state);
                queue.push(next);
            }
            if matches {
                alive_now.push(state);
            }
        }
        let mut alive = vec![false; seen.len()];
        while let Some(state) = alive_now.pop() {
            if !std::mem::replace(&mut alive[index(state)], true) {
                alive_now.extend(before.get(index(state)).into_iter().flatten());
            }
        }
        let state = |index: usize| StateID::new_unchecked(index << dfa.stride2());
        let is_alive = |state: StateID| alive.get(index(state)).copied().unwrap_or(false);
        let (mut quiet, mut ascii) = (vec![false; alive.len()], true);
        for (i, quiet) in quiet.iter_mut().enumerate().filter(|(i, _)| is_alive(state(*i))) {
            *quiet = !dfa.is_match_state(state(i));
            ascii &= !(0x80..=0xff).any(|byte| is_alive(dfa.next_state(state(i), byte)));
        }
        (self.alive, self.quiet, self.ascii) = (alive, quiet, ascii);
        Ok(())
    }

    /// Nothing ends in this state, and something may after it.
    #[inline]
    pub(super) fn is_quiet(&self, state: StateID) -> bool {
        self.quiet.get(state.as_usize() >> self.dfa.stride2()).copied().unwrap_or(false)
    }

    #[inline]
    pub(super) fn is_alive(&self, state: StateID) -> bool {
        self.alive.get(state.as_usize() >> self.dfa.stride2()).copied().unwrap_or(false)
    }

    /// The goals reached in this match state.
    pub(super) fn reached(&self, state: StateID) -> impl Iterator<Item = &Goal> {
        (0..self.dfa.match_len(state)).filter_map(move |i| self.goals.get(self.dfa.match_pattern(state, i).as_usize()))
    }
}

/// What stands before a position, as far as a pattern can look back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Behind {
    Nothing,
    Word,
    Line,
    Return,
    Other,
}

impl Behind {
    const ALL: [Behind; 5] = [Behind::Nothing, Behind::Word, Behind::Line, Behind::Return, Behind::Other];

    #[inline]
    pub(super) fn of(byte: u8) -> Behind {
        const OF: [Behind; 256] = {
            let (mut of, mut byte) = ([Behind::Other; 256], 0);
            while byte < 256 {
                of[byte] = match byte as u8 {
                    b'\n' => Behind::Line,
                    b'\r' => Behind::Return,
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => Behind::Word,
                    _ => Behind::Other,
                };
                byte += 1;
            }
            of
        };
        OF[byte as usize]
    }
}

fn begin(dfa: &dense::DFA<Vec<u32>>, behind: Behind) -> Result<StateID, String> {
    let byte = match behind {
        Behind::Nothing => None,
        Behind::Word => Some(b'a'),
        Behind::Line => Some(b'\n'),
        Behind::Return => Some(b'\r'),
        Behind::Other => Some(b' '),
    };
    dfa.start_state(&start::Config::new().anchored(Anchored::Yes).look_behind(byte)).map_err(|error| error.to_string())
}

/// All automata of a matcher, and which of them begin with which byte.
pub(super) struct Patterns {
    pub(super) machines: Vec<Machine>,
    /// The starters for `behind` and `byte` are `starters[firsts[behind * 256 + byte]..firsts[.. + 1]]`.
    firsts: Vec<u32>,
    starters: Vec<Starter>,
    /// By `behind` and byte: does anything begin?
    begins: Box<[[bool; 256]; 5]>,
    /// Some match may begin with a character beyond ASCII.
    pub(super) begins_beyond_ascii: bool,
    pub(super) longest: usize,
    /// What can be read without any automaton, where these patterns allow it.
    pub(super) prose: Option<Box<Prose>>,
}

/// Ordinary words: runs of letters, of which none is long enough to match anything, each with what ends it. Nothing can be forming
/// behind such a word, so its letters are counted and no automaton is asked.
pub(super) struct Prose {
    /// By byte, of either case.
    of: [Reads; 256],
    /// A longer run of letters may be a match.
    most_letters: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    Letter,
    /// It begins nothing, and goes on with nothing that began with letters alone.
    End,
    Other,
}

impl Prose {
    /// The longest word that is worth looking for.
    const MOST_LETTERS: usize = 64;
    /// How much is looked at in one go: what ends it may have been all in vain.
    const MOST_BYTES: usize = 128;

    /// `None`: no word may be read without asking, not even one of a single letter with a blank behind it.
    fn of(patterns: &Patterns) -> Option<Box<Prose>> {
        let starters = |byte| Behind::ALL.into_iter().flat_map(move |behind| patterns.starters(behind, byte));
        let machine = |number: u32| patterns.machines.get(number as usize);
        // Whether a thread that is in this state is to be reckoned with: a match may come, or is there.
        let counts =
            |(number, state): &(u32, StateID)| machine(*number).is_none_or(|it| it.is_alive(*state) || it.dfa.is_match_state(*state));
        let begun = || (b'a'..=b'z').flat_map(starters).map(|starter| (starter.machine, starter.state));
        let mut ends: Vec<u8> = (0..0x80).filter(|byte: &u8| !byte.is_ascii_alphanumeric() && starters(*byte).next().is_none()).collect();
        // All that may be forming after so many letters.
        let (mut forming, mut most_letters): (Vec<_>, _) = (begun().collect(), 0);
        while most_letters < Prose::MOST_LETTERS {
            forming.sort_unstable();
            forming.dedup();
            let after = |byte: u8| {
                let next = move |(number, state): &(u32, StateID)| Some((*number, machine(*number)?.dfa.next_state(*state, byte)));
                forming.iter().filter_map(next).filter(counts)
            };
            let left: Vec<u8> = ends.iter().copied().filter(|end| after(*end).next().is_none()).collect();
            let is_quiet = |(number, state): &(u32, StateID)| machine(*number).is_some_and(|it| it.is_quiet(*state));
            if !forming.iter().all(is_quiet) || !left.contains(&b' ') {
                break;
            }
            (ends, most_letters) = (left, most_letters + 1);
            forming = (b'a'..=b'z').flat_map(after).chain(begun()).collect();
        }
        if most_letters == 0 {
            return None;
        }
        let mut of = [Reads::Other; 256];
        for (byte, reads) in (0..=255).zip(&mut of) {
            if ends.contains(&byte) {
                *reads = Reads::End;
            } else if u8::is_ascii_alphabetic(&byte) {
                *reads = Reads::Letter;
            }
        }
        Some(Box::new(Prose { of, most_letters }))
    }

    /// May words be read from here on, where nothing is forming?
    #[inline]
    pub(super) fn begins(&self, behind: Behind, byte: u8) -> bool {
        match self.of[usize::from(byte)] {
            Reads::Letter => behind != Behind::Word,
            Reads::End => true,
            Reads::Other => false,
        }
    }

    /// How many bytes at the front of `run` are words with their ends, and how many were looked at to know it.
    pub(super) fn read(&self, run: &[u8]) -> (usize, usize) {
        let (mut words, mut letters) = (0, 0);
        for (i, byte) in run.iter().enumerate().take(Prose::MOST_BYTES) {
            match self.of[usize::from(*byte)] {
                Reads::End => (words, letters) = (i + 1, 0),
                Reads::Letter if letters < self.most_letters => letters += 1,
                Reads::Letter | Reads::Other => return (words, i + 1),
            }
        }
        (words, if run.len() > Prose::MOST_BYTES { words } else { run.len() })
    }

    /// How many bytes at the front of `words` are whole ones.
    pub(super) fn whole(&self, words: &[u8]) -> usize {
        words.iter().rposition(|byte| self.of[usize::from(*byte)] == Reads::End).map_or(0, |end| end + 1)
    }
}

/// A thread's first step: which machine, and its state after the first byte.
#[derive(Clone, Copy)]
pub(super) struct Starter {
    pub(super) machine: u32,
    pub(super) state: StateID,
    /// The machine has checks to make.
    pub(super) checked: bool,
}

impl Patterns {
    pub(super) fn build(machines: Vec<Machine>, longest: usize) -> Result<Patterns, BuildError> {
        let (mut firsts, mut starters, mut begins_beyond_ascii) = (vec![0], Vec::new(), false);
        let mut begins = Box::new([[false; 256]; 5]);
        for (behind, begins) in Behind::ALL.into_iter().zip(begins.iter_mut()) {
            for (byte, begins) in (0..=255).zip(begins) {
                for (machine, number) in machines.iter().zip(0..) {
                    let too_big = |reason| BuildError::TooBig { what: "a pattern", reason };
                    let state = machine.dfa.next_state(begin(&machine.dfa, behind).map_err(too_big)?, byte);
                    if machine.is_alive(state) {
                        starters.push(Starter { machine: number, state, checked: machine.checked });
                        *begins = true;
                        begins_beyond_ascii |= byte >= 0x80;
                    }
                }
                firsts.push(u32::try_from(starters.len()).unwrap_or(u32::MAX));
            }
        }
        let mut patterns = Patterns { machines, firsts, starters, begins, begins_beyond_ascii, longest, prose: None };
        patterns.prose = Prose::of(&patterns);
        Ok(patterns)
    }

    /// Does any thread begin with `byte` after `behind`?
    #[inline]
    pub(super) fn begins(&self, behind: Behind, byte: u8) -> bool {
        self.begins[behind as usize][byte as usize]
    }

    /// The threads that begin with `byte` after `behind`: none, for nearly every byte of ordinary text.
    #[inline]
    pub(super) fn starters(&self, behind: Behind, byte: u8) -> &[Starter] {
        let at = behind as usize * 256 + byte as usize;
        let (from, to) = (self.firsts.get(at), self.firsts.get(at + 1));
        from.zip(to).and_then(|(from, to)| self.starters.get(*from as usize..*to as usize)).unwrap_or(&[])
    }
}

/// A pattern to be built.
pub(super) struct Wanted<'a> {
    pub(super) hir: Hir,
    /// As written.
    pub(super) name: &'a str,
    pub(super) goal: Goal,
}

/// Builds patterns together if they fit in one table: then each place in the text has one thread at most. Else one by one, so
/// that the fault names the pattern that is too big.
pub(super) fn machines(wanted: &[Wanted<'_>]) -> Result<Vec<Machine>, BuildError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let hirs: Vec<&Hir> = wanted.iter().map(|wanted| &wanted.hir).collect();
    if let Ok(together) = Machine::build(&hirs, wanted.iter().map(|wanted| wanted.goal).collect()) {
        return Ok(vec![together]);
    }
    let alone = wanted.iter().map(|Wanted { hir, name, goal }| {
        Machine::build(&[hir], vec![*goal]).map_err(|reason| BuildError::Pattern {
            pattern: (*name).to_owned(),
            reason: format!("its automaton would take more than {} MiB ({reason})", MOST_TABLE_BYTES >> 20),
            remedy: "lower the repeat counts, or split it into several patterns",
        })
    });
    alone.collect()
}
