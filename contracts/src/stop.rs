//! How a turn ends: complete, refused, failed or cancelled; the three that stop it early.

use std::{borrow::Cow, error::Error, fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{Category, Code};

/// How a turn ended: `Ok` is complete. Every turn has exactly one.
pub type End = Result<(), Stop>;

/// Why a turn stops before its natural end.
#[derive(Debug, Clone)]
pub enum Stop {
    /// Policy said no: a stable code, shown to the client.
    Refused(Refusal),
    /// Something broke: the code is shown, the chain is logged.
    Failed(Fault),
    /// Nobody is listening, or somebody said stop.
    Gone(Gone),
}

impl Stop {
    /// The code a client and a log line see.
    pub fn code(&self) -> Code {
        match self {
            Stop::Refused(refusal) => refusal.code,
            Stop::Failed(fault) => fault.code,
            Stop::Gone(gone) => gone.code(),
        }
    }

    /// The word for the end in logs and metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Stop::Refused(_) => "refused",
            // An orchestrator says of its turn, as it says of a fault, that its person did not agree: nothing broke.
            Stop::Failed(Fault { code: Code::Declined | Code::Unanswered, .. }) | Stop::Gone(_) => "cancelled",
            Stop::Failed(_) => "failed",
        }
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Stop {
        Stop::Refused(refusal)
    }
}
impl From<Fault> for Stop {
    fn from(fault: Fault) -> Stop {
        Stop::Failed(fault)
    }
}
impl From<Gone> for Stop {
    fn from(gone: Gone) -> Stop {
        Stop::Gone(gone)
    }
}

/// Why the model stopped writing, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// It was done, or a stop string came.
    #[default]
    Stop,
    /// A limit of tokens or bytes was reached.
    Length,
    /// Policy ended it.
    ContentFilter,
    /// It wants tools called.
    ToolCalls,
}

impl Finish {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ContentFilter => "content_filter",
            Finish::ToolCalls => "tool_calls",
        }
    }

    /// The reason of that name; unknown ones (servers invent some) count as `stop`.
    pub fn from_name(name: &str) -> Finish {
        match name {
            "length" | "max_tokens" => Finish::Length,
            "content_filter" => Finish::ContentFilter,
            "tool_calls" | "function_call" => Finish::ToolCalls,
            _ => Finish::Stop,
        }
    }
}

/// Policy said no. Everything in here may be shown to the client: never put matched text in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// The stable code.
    pub code: Code,
    /// Which rule, e.g. `moderation.deny` or `budget.output_tokens`.
    pub rule: Cow<'static, str>,
    /// What the client is told, as a sentence without a full stop.
    pub message: Cow<'static, str>,
    /// Why, where it is about text.
    pub categories: Vec<Category>,
    /// How the answer's `finish_reason` reads when this cuts an answer.
    pub finish: Finish,
    /// When to come back, where that is known.
    pub retry_after: Option<Duration>,
}

impl Refusal {
    /// A refusal by `rule` with the code's own summary as its message.
    pub fn new(code: Code, rule: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal {
            code,
            rule: rule.into(),
            message: code.summary().into(),
            categories: Vec::new(),
            finish: Finish::ContentFilter,
            retry_after: None,
        }
    }

    /// With words of its own for the client.
    pub fn saying(mut self, message: impl Into<Cow<'static, str>>) -> Refusal {
        self.message = message.into();
        self
    }

    /// With the categories that it is about.
    pub fn about(mut self, categories: impl IntoIterator<Item = Category>) -> Refusal {
        self.categories.extend(categories);
        self.categories.sort_unstable();
        self.categories.dedup();
        self
    }

    /// With the `finish_reason` that it ends an answer with.
    pub fn finishing(mut self, finish: Finish) -> Refusal {
        self.finish = finish;
        self
    }

    /// With the pause after which trying again may work.
    pub fn after(mut self, pause: Duration) -> Refusal {
        self.retry_after = Some(pause);
        self
    }
}

/// Whose side broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The client's.
    Client,
    /// The upstream's.
    Upstream,
    /// Ours.
    Us,
}

/// Something broke. Clients see the code and `message`; the log sees the source chain too.
#[derive(Clone)]
pub struct Fault {
    /// The stable code.
    pub code: Code,
    /// Whose side.
    pub who: Who,
    /// What the client is told, as a sentence without a full stop.
    pub message: Cow<'static, str>,
    /// When to come back, where that is known.
    pub retry_after: Option<Duration>,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

impl Fault {
    /// A fault with the code's own summary as its message.
    pub fn new(who: Who, code: Code) -> Fault {
        Fault { code, who, message: code.summary().into(), retry_after: None, source: None }
    }
    /// The upstream broke.
    pub fn upstream(code: Code) -> Fault {
        Fault::new(Who::Upstream, code)
    }
    /// The client broke the rules.
    pub fn client(code: Code) -> Fault {
        Fault::new(Who::Client, code)
    }
    /// We broke.
    pub fn us(code: Code) -> Fault {
        Fault::new(Who::Us, code)
    }

    /// With words of its own for the client: never message text, never a secret, never an internal address.
    pub fn saying(mut self, message: impl Into<Cow<'static, str>>) -> Fault {
        self.message = message.into();
        self
    }

    /// With its cause, for the log.
    pub fn caused_by(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Fault {
        self.source = Some(Arc::from(source.into()));
        self
    }

    /// With the pause after which trying again may work.
    pub fn after(mut self, pause: Duration) -> Fault {
        self.retry_after = Some(pause);
        self
    }

    /// The whole chain of causes on one line, for the log.
    pub fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut next = self.source();
        while let Some(cause) = next {
            line.push_str(": ");
            line.push_str(&cause.to_string());
            next = cause.source();
        }
        line
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}
impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fault({:?}, {})", self.who, self.chain())
    }
}
impl Error for Fault {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

/// Why nobody is listening any more, or nobody wants what would come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// The client closed its connection (and its grace, if any, ran out).
    Left,
    /// The client, or another device of its session, asked for a stop.
    Stopped,
    /// The client took nothing for too long.
    Slow,
    /// This instance is shutting down and its drain time ran out.
    Drained,
    /// The person who was asked said no, or could not be asked.
    Declined,
    /// The person who was asked said nothing in time.
    Unanswered,
}

impl Gone {
    /// The code of that end.
    pub fn code(self) -> Code {
        match self {
            Gone::Left => Code::ClientClosed,
            Gone::Stopped => Code::Stopped,
            Gone::Slow => Code::SlowConsumer,
            Gone::Drained => Code::Draining,
            Gone::Declined => Code::Declined,
            Gone::Unanswered => Code::Unanswered,
        }
    }
}
