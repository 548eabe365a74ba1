//! Shows a turn: the answer on one stream, what became of it on the other, and nothing that a terminal takes for a command.

use std::{
    borrow::Cow,
    io::{self, IsTerminal, Stderr, Stdout, Write},
};

use super::tale::{Event, Said, Tale, one_line};

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// What the answer is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// For a person: made safe, reasoning dimmed.
    Terminal,
    /// For a file or a program: the answer's text and nothing else.
    Text,
    /// Every event.
    Json,
}

pub(super) struct Screen<W: Write, E: Write> {
    out: W,
    err: E,
    form: Form,
    /// Whether remarks are dimmed.
    is_dim: bool,
    /// Whether the last thing written ended its line.
    is_at_margin: bool,
    is_reasoning: bool,
}

impl Screen<Stdout, Stderr> {
    /// The process's own.
    pub(super) fn of_process(is_json: bool) -> Self {
        let form = match (is_json, io::stdout().is_terminal()) {
            (true, _) => Form::Json,
            (false, true) => Form::Terminal,
            (false, false) => Form::Text,
        };
        // https://no-color.org: any value but an empty one.
        let is_dim = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Screen::new(io::stdout(), io::stderr(), form, is_dim)
    }
}

// Nobody is left to tell when a terminal is gone; the turn then ends by the signal that comes with it.
impl<W: Write, E: Write> Screen<W, E> {
    fn new(out: W, err: E, form: Form, is_dim: bool) -> Self {
        Screen { out, err, form, is_dim, is_at_margin: true, is_reasoning: false }
    }

    /// Shows an event.
    pub(super) fn show(&mut self, event: &Event) {
        match self.form {
            Form::Json => {
                let _ = writeln!(self.out, "{}", event.frame);
            }
            Form::Text | Form::Terminal => self.tell(&event.said),
        }
        let _ = self.out.flush();
    }

    fn tell(&mut self, said: &Said) {
        let text = said.text.as_deref().unwrap_or_default();
        match (said.kind.as_str(), said.lane.as_deref().unwrap_or("content"), said.choice) {
            ("text", "content" | "refusal", 0) => {
                self.reason(false);
                self.write(text);
            }
            ("text", "reasoning", 0) if self.form == Form::Terminal => {
                self.reason(true);
                self.write(text);
            }
            ("tool", ..) => self.note(&format!("calls the tool {}", said.name.as_deref().unwrap_or_default())),
            // A model had its hand in it: made safe, as all remarks are.
            ("confirm", ..) => self.note(said.prompt.as_deref().unwrap_or_default()),
            ("gap", ..) => self.note("events are missing here: the gateway no longer has them"),
            _ => {}
        }
    }

    /// Begins or ends the dim passage that reasoning is.
    fn reason(&mut self, is_reasoning: bool) {
        if self.is_reasoning == is_reasoning {
            return;
        }
        self.is_reasoning = is_reasoning;
        match is_reasoning {
            true if self.is_dim => drop(write!(self.out, "{DIM}")),
            true => {}
            false => {
                if self.is_dim {
                    let _ = write!(self.out, "{PLAIN}");
                }
                let _ = write!(self.out, "\n\n");
            }
        }
    }

    fn write(&mut self, text: &str) {
        let text = if self.form == Form::Terminal { safe(text) } else { Cow::Borrowed(text) };
        if let Some(last) = text.chars().next_back() {
            self.is_at_margin = last == '\n';
        }
        let _ = self.out.write_all(text.as_bytes());
    }

    /// Ends the answer and says what became of it.
    pub(super) fn end(&mut self, tale: &Tale) {
        self.reason(false);
        if self.form == Form::Json {
            return;
        }
        self.end_line();
        for line in tale.sum() {
            self.note(&line);
        }
    }

    /// A problem in place of an answer; a person is told with the end.
    pub(super) fn problem(&mut self, problem: &Said) {
        if self.form != Form::Json {
            return;
        }
        match &problem.raw {
            Some(raw) => drop(writeln!(self.out, "{}", one_line(raw))),
            None => {
                let error =
                    serde_json::json!({"type": "error", "code": problem.code, "message": problem.message, "retryable": problem.retryable});
                let _ = writeln!(self.out, "{error}");
            }
        }
        let _ = self.out.flush();
    }

    /// A remark of ours.
    pub(super) fn note(&mut self, remark: &str) {
        // In a file the answer goes on as if nothing had been remarked.
        if self.form == Form::Terminal {
            self.end_line();
        }
        let remark = safe(remark);
        let _ = match self.is_dim {
            true => writeln!(self.err, "{DIM}{remark}{PLAIN}"),
            false => writeln!(self.err, "{remark}"),
        };
    }

    /// Shows that it is the reader's turn.
    pub(super) fn ask(&mut self) {
        self.end_line();
        let _ = write!(self.err, "> ");
        let _ = self.err.flush();
    }

    /// Shows that a yes or no is waited for.
    pub(super) fn ask_whether(&mut self) {
        self.end_line();
        let _ = write!(self.err, "yes or no? ");
        let _ = self.err.flush();
    }

    /// Ends a line that was asked for and never came.
    pub(super) fn rest(&mut self) {
        let _ = writeln!(self.err);
    }

    fn end_line(&mut self) {
        if !self.is_at_margin {
            let _ = writeln!(self.out);
            let _ = self.out.flush();
            self.is_at_margin = true;
        }
    }
}

/// Whether a terminal may take it for a command, or show other text because of it: control characters and bidirectional overrides.
pub(super) fn is_command(char: char) -> bool {
    char.is_control() || matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text that a terminal shows and does not obey: a model may write escape sequences, or be made to.
fn safe(text: &str) -> Cow<'_, str> {
    let is_unsafe = |char: char| is_command(char) && !matches!(char, '\n' | '\t');
    if text.contains(is_unsafe) { text.replace(is_unsafe, "\u{fffd}").into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use headgate_contracts::TurnId;

    use super::*;

    /// What a screen of that form writes for some events.
    fn shown(form: Form, events: &[(&str, &str)]) -> (String, String) {
        let mut screen = Screen::new(Vec::new(), Vec::new(), form, form == Form::Terminal);
        for (seq, (name, data)) in events.iter().enumerate() {
            screen.show(&Event::of_sse(name, Some(TurnId::fresh()), Some(seq as u64), data).unwrap());
        }
        (String::from_utf8(screen.out).unwrap(), String::from_utf8(screen.err).unwrap())
    }

    #[test]
    fn a_terminal_is_never_told_what_to_do_by_a_model() {
        let hostile = r#"{"text":"a\u001b]0;owned\u0007b\u009b2Jc\rd\u202ee\n\tf"}"#;
        assert_eq!(shown(Form::Terminal, &[("text", hostile)]).0, "a\u{fffd}]0;owned\u{fffd}b\u{fffd}2Jc\u{fffd}d\u{fffd}e\n\tf");
        assert_eq!(shown(Form::Terminal, &[("confirm", r#"{"id":"q","prompt":"pay\u001b[2J?"}"#)]).1, "\x1b[2mpay\u{fffd}[2J?\x1b[0m\n");
        assert!(!shown(Form::Terminal, &[("tool", r#"{"id":"1","name":"x\u001b[2J","index":0}"#)]).1.contains("\x1b[2J"));
        assert!(!shown(Form::Json, &[("text", hostile)]).0.contains(|char: char| is_command(char) && char != '\n'));
    }

    #[test]
    fn a_file_gets_the_answer_as_it_was_and_nothing_else() {
        let events = [
            ("open", "{}"),
            ("text", r#"{"text":"hmm","lane":"reasoning"}"#),
            ("text", r#"{"text":"a\u001b[1m"}"#),
            ("text", r#"{"text":"other","choice":1}"#),
            ("tool", r#"{"id":"1","name":"look","index":0}"#),
            ("text", r#"{"text":"{}","lane":"tool_arguments","tool":0}"#),
        ];
        assert_eq!(shown(Form::Text, &events[..4]).0, "a\x1b[1m");
        assert_eq!(shown(Form::Text, &events[4..]).1, "calls the tool look\n");
    }

    #[test]
    fn reasoning_is_dimmed_and_kept_apart() {
        let events =
            [("text", r#"{"text":"hm","lane":"reasoning"}"#), ("text", r#"{"text":"m","lane":"reasoning"}"#), ("text", r#"{"text":"so"}"#)];
        assert_eq!(shown(Form::Terminal, &events).0, "\x1b[2mhmm\x1b[0m\n\nso");
    }

    #[test]
    fn a_remark_begins_on_a_line_of_its_own_and_leaves_a_file_as_it_was() {
        for (form, expected) in [(Form::Terminal, "half a line\nwhole line\n"), (Form::Text, "half a linewhole line\n")] {
            let mut screen = Screen::new(Vec::new(), Vec::new(), form, false);
            screen.write("half a line");
            screen.note("remark");
            screen.write("whole line\n");
            screen.note("remark");
            assert_eq!(screen.out, expected.as_bytes(), "{form:?}");
            assert_eq!(screen.err, b"remark\nremark\n");
        }
    }
}
