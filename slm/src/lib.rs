//! A small language model, run in this process, behind the API that OpenAI's clients speak.
//!
//! The embedded model has two million parameters and knows a little customer support: a true language model with real
//! tokens, counts, sampling and cancellation, for demos and tests that need nothing else. It is not for real answers.
//!
//! [`gguf`] reads a model file, [`tokenizer`] splits text, [`model`] scores the next token, [`sample`] picks it,
//! [`chat`] makes conversations of tokens, [`server`] speaks HTTP.

mod chat;
mod gguf;
mod model;
mod openai;
mod patience;
mod requests;
mod sample;
mod server;
mod tokenizer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use chat::{Finish, Generation, Limits, Message, Prompt, Role, Step, TooLong};
pub use gguf::Error;
pub use sample::Sampling;
pub use server::{Options, serve};
pub use tokenizer::Id;

/// A loaded model; shared by all who use it.
#[derive(Debug)]
pub struct Slm {
    name: String,
    tokenizer: tokenizer::Tokenizer,
    model: model::Model,
    template: chat::Template,
    tokens_generated: AtomicU64,
}

impl Slm {
    /// The demo model that is part of this program.
    #[must_use]
    pub fn embedded() -> Self {
        Self::from_bytes(include_bytes!("../model/demo-q8.gguf")).expect("the embedded model is read by the tests")
    }

    /// Reads a GGUF file: llama architecture, F32 or Q8_0, SentencePiece vocabulary, ChatML template.
    ///
    /// Blocks while it reads. Errors: what in the file is broken or not supported.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::from_bytes(&std::fs::read(path)?)
    }

    /// As [`load`](Self::load), from memory. The bytes need not be trusted.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut file = gguf::Gguf::parse(bytes)?;
        let tokenizer = tokenizer::Tokenizer::from_gguf(&file)?;
        let template = chat::Template::from_gguf(&file, &tokenizer)?;
        let model = model::Model::from_gguf(&mut file, tokenizer.vocabulary_size())?;
        let name = file.text("general.name")?.to_owned();
        Ok(Self { name, tokenizer, model, template, tokens_generated: AtomicU64::new(0) })
    }

    /// What the file calls the model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens the model can look back on; prompt and answer together.
    pub fn context_tokens(&self) -> usize {
        self.model.context
    }

    /// Memory one turn takes at most, besides its text.
    pub fn turn_bytes_max(&self) -> usize {
        self.model.state_bytes()
    }

    /// Tokens of answer made since the model was loaded, over all turns. Stands still when nobody is served.
    pub fn tokens_generated(&self) -> u64 {
        self.tokens_generated.load(Ordering::Relaxed)
    }

    /// The tokens of `text`. No text yields a control token.
    pub fn encode(&self, text: &str) -> Vec<Id> {
        let mut ids = Vec::new();
        self.tokenizer.encode(text, &mut ids);
        ids
    }

    /// The prompt for a conversation. Room is kept for `max_tokens` of answer, though for no more than half the
    /// context; whole turns are dropped, oldest first, until the rest fits.
    pub fn prompt(&self, messages: &[Message], max_tokens: usize) -> Result<Prompt, TooLong> {
        let context = self.context_tokens();
        Prompt::fit(self, messages, context - max_tokens.min(context / 2))
    }

    /// Begins an answer.
    pub fn generate(self: &Arc<Self>, prompt: Prompt, limits: Limits) -> Generation {
        Generation::new(Arc::clone(self), prompt, limits)
    }

    fn count_token(&self) {
        self.tokens_generated.fetch_add(1, Ordering::Relaxed);
    }
}
