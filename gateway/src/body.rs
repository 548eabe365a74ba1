//! The bodies that responses have: nothing, something whole, a turn's stream, or another server's.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame, SizeHint};

use crate::sse::Stream;

/// What goes wrong while a body is sent: it cuts the response, never ends it as if it were whole.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A response body.
pub enum Reply {
    /// Nothing, or something whole.
    Whole(Option<Bytes>),
    /// A turn.
    Turn(Box<Stream>),
    /// What another server answers, passed on as it comes.
    Passed(UnsyncBoxBody<Bytes, BodyError>),
}

impl Reply {
    /// No body.
    pub fn empty() -> Reply {
        Reply::Whole(None)
    }

    /// Another server's body, passed on as it comes.
    pub fn passed<B>(body: B) -> Reply
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BodyError>,
    {
        Reply::Passed(body.map_err(Into::into).boxed_unsync())
    }
}

impl<T: Into<Bytes>> From<T> for Reply {
    fn from(bytes: T) -> Reply {
        Reply::Whole(Some(bytes.into()))
    }
}

fn never(error: Infallible) -> BodyError {
    match error {}
}

impl Body for Reply {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Reply::Whole(bytes) => Poll::Ready(bytes.take().filter(|bytes| !bytes.is_empty()).map(|bytes| Ok(Frame::data(bytes)))),
            Reply::Turn(stream) => Pin::new(&mut **stream).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(never))),
            Reply::Passed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Reply::Whole(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Reply::Turn(_) => false,
            Reply::Passed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Reply::Turn(_) => SizeHint::default(),
            Reply::Passed(body) => body.size_hint(),
        }
    }
}
