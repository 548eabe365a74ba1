//! Sends a request and waits for the head of its response, on a connection at hand.

use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    http1::{HeadReader, Malformed, ResponseHead},
    settings::Limits,
};

/// What is read at once, in bytes. It stands on the stack during a read and nowhere between two.
pub(crate) const READ_BYTES: usize = 16 << 10;

/// A response that has begun: its head, and the bytes of the body that came with it.
pub(crate) struct Begun {
    pub(crate) head: ResponseHead,
    pub(crate) early: Vec<u8>,
}

/// Why there is no response head.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// The connection ended before any byte of a response: on a kept connection this is the endpoint's own idle timeout.
    #[error("the connection ended before the response")]
    Unanswered(#[source] Option<io::Error>),
    /// It ended within the head.
    #[error("the connection ended within the response head")]
    Cut(#[source] Option<io::Error>),
    /// The head is not one.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Sends `request` and reads until the head of the response is whole. The response may come before the request is sent; then
/// the connection is good for nothing else. The caller sets the deadline; dropping the future closes the connection with `io`.
pub(crate) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(io: &mut S, request: &[u8], limits: &Limits) -> Result<Begun, Broken> {
    let mut reader = HeadReader::new(limits.head, limits.fields);
    let mut sending = Sending { request, sent: 0, flushed: false, failed: None };
    poll_fn(|cx| {
        sending.poll(io, cx);
        loop {
            let read = poll_read(io, cx, |bytes| {
                let whole = reader.push(bytes)?;
                Ok::<_, Malformed>(whole.map(|(head, used)| Begun { head, early: bytes.get(used..).unwrap_or_default().to_vec() }))
            });
            let broken = |error| if reader.begun() { Broken::Cut(error) } else { Broken::Unanswered(error) };
            match read {
                // The response may have been sent before the connection was closed on our request: it is looked for first.
                Poll::Pending => match sending.failed.take() {
                    Some(error) => return Poll::Ready(Err(broken(Some(error)))),
                    None => return Poll::Pending,
                },
                Poll::Ready(Err(error)) => return Poll::Ready(Err(broken(Some(error)))),
                Poll::Ready(Ok(None)) => return Poll::Ready(Err(broken(None))),
                Poll::Ready(Ok(Some(Ok(None)))) => {}
                Poll::Ready(Ok(Some(Ok(Some(mut begun))))) => {
                    begun.head.keep &= sending.flushed;
                    return Poll::Ready(Ok(begun));
                }
                Poll::Ready(Ok(Some(Err(malformed)))) => return Poll::Ready(Err(malformed.into())),
            }
        }
    })
    .await
}

/// Reads once and hands the bytes to `take`; `None` at the connection's end. Nothing is kept and nothing is zeroed.
pub(crate) fn poll_read<S: AsyncRead + Unpin, T>(
    io: &mut S,
    cx: &mut Context<'_>,
    take: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<Option<T>>> {
    let mut space = [const { MaybeUninit::uninit() }; READ_BYTES];
    let mut buffer = ReadBuf::uninit(&mut space);
    ready!(Pin::new(io).poll_read(cx, &mut buffer))?;
    let bytes = buffer.filled();
    Poll::Ready(Ok((!bytes.is_empty()).then(|| take(bytes))))
}

struct Sending<'a> {
    request: &'a [u8],
    sent: usize,
    flushed: bool,
    failed: Option<io::Error>,
}

impl Sending<'_> {
    /// Sends what can be sent now.
    fn poll<S: AsyncWrite + Unpin>(&mut self, io: &mut S, cx: &mut Context<'_>) {
        while self.failed.is_none() && !self.flushed {
            let rest = self.request.get(self.sent..).unwrap_or_default();
            let step = if rest.is_empty() {
                Pin::new(&mut *io).poll_flush(cx).map_ok(|()| self.flushed = true)
            } else {
                Pin::new(&mut *io).poll_write(cx, rest).map(|written| match written {
                    Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => {
                        self.sent += n;
                        Ok(())
                    }
                    Err(error) => Err(error),
                })
            };
            match step {
                Poll::Pending => return,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => self.failed = Some(error),
            }
        }
    }
}
