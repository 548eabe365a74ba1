//! OpenAI chat completions, on both sides: what clients ask and are answered, what models are asked and answer.

mod completion;
mod decode;
mod encode;
mod known;
mod request;

pub use completion::{Choice, Completion, ToolCall};
pub use decode::{decode, decode_answer};
pub use encode::{DONE, Envelope, Tail, models};
pub use request::{Form, Request, encode_request};
