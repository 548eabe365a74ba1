//! What a peer did wrong: one kind per family of rules, with a sentence.

/// A rule of the wire that the peer broke, or the way its connection ended. Tests match on the kind; people read the sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Not well-formed HTTP: a head, a chunk size, contradicting lengths.
    #[error("not well-formed HTTP: {0}")]
    Http(String),
    /// A well-formed answer, but not the stream asked for: another status, another content type, a missing header.
    #[error("not the stream asked for: {0}")]
    Answer(String),
    /// Not well-formed server-sent events, or not a well-formed WebSocket message.
    #[error("not well-framed: {0}")]
    Framing(String),
    /// An event with the wrong members, or members of the wrong type or value.
    #[error("not an event of this wire: {0}")]
    Members(String),
    /// The id of an event is missing, misspelt or of another turn.
    #[error("wrong id: {0}")]
    Identity(String),
    /// A sequence number left out, repeated or out of order.
    #[error("wrong sequence: {0}")]
    Sequence(String),
    /// An event where it may not stand: not `open` first, `open` twice, text after the finish.
    #[error("wrong order: {0}")]
    Order(String),
    /// Something after the terminal event.
    #[error("not the end: {0}")]
    AfterEnd(String),
    /// The stream was closed before its terminal event, or a body before its announced end.
    #[error("cut short: {0}")]
    Cut(String),
    /// The peer reset the connection.
    #[error("reset by the peer: {0}")]
    Reset(String),
}

/// Bytes for an error's sentence: printable, and at most 120 of them.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let more = if bytes.len() > 120 { "…" } else { "" };
    format!("`{}{more}`", bytes[..bytes.len().min(120)].escape_ascii())
}
