//! HTTP/2 frame by frame (RFC 9113), for clients that break its rules or keep to them and do harm.

use std::{io, net::SocketAddr, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::soon;

/// RFC 9113 section 6: the types of frames.
pub mod kind {
    #![allow(missing_docs, reason = "the RFC's own names")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// ACK of SETTINGS and PING.
pub const ACK: u8 = 0x1;
/// The last frame of a stream's half: HEADERS and DATA.
pub const END_STREAM: u8 = 0x1;
/// The header block is whole.
pub const END_HEADERS: u8 = 0x4;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its type, of [`kind`].
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// Its stream; 0 is the connection.
    pub stream: u32,
    /// What is in it, as it came.
    pub payload: Bytes,
}

impl Frame {
    /// A frame.
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Bytes>) -> Frame {
        Frame { kind, flags, stream, payload: payload.into() }
    }

    /// The head of a POST of JSON to `path`, whole; its body follows.
    pub fn post(stream: u32, path: &str) -> Frame {
        let mut block = vec![0x83, 0x86];
        for (name, value) in [(":path", path), (":authority", "h"), ("content-type", "application/json")] {
            // RFC 7541 section 6.2.2: a literal without indexing, its name spelled out.
            block.push(0);
            for text in [name, value] {
                block.push(u8::try_from(text.len()).ok().filter(|len| *len < 127).expect("a short text"));
                block.extend_from_slice(text.as_bytes());
            }
        }
        Frame::new(kind::HEADERS, END_HEADERS, stream, block)
    }

    fn write(&self, out: &mut Vec<u8>) {
        let len = u32::try_from(self.payload.len()).expect("a frame's length");
        out.extend_from_slice(&len.to_be_bytes()[1..]);
        out.extend_from_slice(&[self.kind, self.flags]);
        out.extend_from_slice(&self.stream.to_be_bytes());
        out.extend_from_slice(&self.payload);
    }
}

/// How a server ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With a reason, of RFC 9113 section 7.
    GoAway(u32),
    /// Without a word.
    Closed,
}

/// A client that sends what it is told.
pub struct Frames {
    write: OwnedWriteHalf,
    read: Incoming,
}

struct Incoming {
    io: OwnedReadHalf,
    buffer: BytesMut,
}

impl Frames {
    /// Connects, and sends the preface and its settings.
    pub async fn connect(addr: SocketAddr) -> Frames {
        let io = soon(TcpStream::connect(addr), "a connection").await.unwrap_or_else(|error| panic!("cannot connect to {addr}: {error}"));
        let _ = io.set_nodelay(true);
        let (io, mut write) = io.into_split();
        soon(write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "the preface to be taken").await.expect("a fresh connection");
        let mut frames = Frames { write, read: Incoming { io, buffer: BytesMut::new() } };
        frames.send(&[Frame::new(kind::SETTINGS, 0, 0, "")]).await.expect("a fresh connection");
        frames
    }

    /// Sends frames in one write. Errors: the server has closed the connection.
    pub async fn send(&mut self, frames: &[Frame]) -> io::Result<()> {
        send(&mut self.write, frames).await
    }

    /// The next frame; nothing at the end of the connection, be it a clean one.
    pub async fn next(&mut self) -> Option<Frame> {
        self.read.next().await
    }

    /// Reads to the end of the connection, however much comes before it, and says how it came.
    pub async fn end(&mut self) -> End {
        self.read.end().await
    }

    /// Sends what `attack` makes of 0, 1, 2 ... up to `most`, and reads what comes meanwhile: who reads nothing is held back by
    /// the server's answers, and never comes to its limits. Gives how the server ended it, or nothing where it has not within
    /// `patience` after the last one.
    pub async fn flood(mut self, most: u32, patience: Duration, mut attack: impl FnMut(u32) -> Vec<Frame>) -> Option<End> {
        let write = &mut self.write;
        let writing = async {
            for round in 0..most {
                if send(write, &attack(round)).await.is_err() {
                    break;
                }
            }
            tokio::time::sleep(patience).await;
        };
        tokio::select! {
            biased;
            end = self.read.end() => Some(end),
            () = writing => None,
        }
    }
}

async fn send(write: &mut OwnedWriteHalf, frames: &[Frame]) -> io::Result<()> {
    let mut bytes = Vec::new();
    frames.iter().for_each(|frame| frame.write(&mut bytes));
    write.write_all(&bytes).await
}

impl Incoming {
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(head) = self.buffer.first_chunk::<9>() {
                let [a, b, c, kind, flags, stream @ ..] = *head;
                let len = u32::from_be_bytes([0, a, b, c]) as usize;
                if self.buffer.len() >= 9 + len {
                    self.buffer.advance(9);
                    let payload = self.buffer.split_to(len).freeze();
                    return Some(Frame { kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff, payload });
                }
            }
            if !matches!(self.io.read_buf(&mut self.buffer).await, Ok(1..)) {
                return None;
            }
        }
    }

    async fn end(&mut self) -> End {
        let mut end = End::Closed;
        while let Some(frame) = self.next().await {
            if let (kind::GOAWAY, Some(reason)) = (frame.kind, frame.payload.get(4..8)) {
                // Of several the last one says why.
                end = End::GoAway(u32::from_be_bytes(reason.try_into().expect("four bytes")));
            }
        }
        end
    }
}
