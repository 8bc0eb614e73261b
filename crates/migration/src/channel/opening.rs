//! The first frames of a connection: a Hello makes it a control channel, an Attach a data channel.
//!
//! Read without reading ahead, so that what follows is left to the channel.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use switchover::message::Message;

use super::{ChannelError, Stream};
use crate::wire::{Attach, FrameHeader, HEADER_LEN, WireError, decode_message, kind};

/// What a connection begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpeningFrame {
    /// A control channel; the message is a [`Message::Hello`].
    Hello(Message),
    /// A data channel.
    Attach(Attach),
}

/// Destination: the first frame of a new connection, all of it within `limit`.
pub fn read_opening(stream: &mut Stream, limit: Duration) -> Result<OpeningFrame, ChannelError> {
    let (header, payload) =
        read_frame(stream, limit, "Hello or Attach", |header| match header.kind {
            kind::HELLO | kind::ATTACH => Ok(()),
            kind => Err(WireError::WrongChannel { kind, channel: "new" }),
        })?;
    if header.kind == kind::ATTACH {
        let attach = Attach::decode(&header, &payload).map_err(|e| stream.wire_error(e))?;
        return Ok(OpeningFrame::Attach(attach));
    }
    match decode_message(&header, &payload).map_err(|e| stream.wire_error(e))? {
        Some(hello @ Message::Hello { .. }) => Ok(OpeningFrame::Hello(hello)),
        _ => Err(stream.wire_error(WireError::UnknownKind(header.kind))),
    }
}

/// Source: says which migration a data channel belongs to.
pub fn send_attach(stream: &mut Stream, attach: &Attach) -> Result<(), ChannelError> {
    let (header, payload) = attach.encode();
    send(stream, &header, &payload)
}

/// Destination: takes the data channel.
pub fn send_attach_ok(stream: &mut Stream, attach: &Attach) -> Result<(), ChannelError> {
    send(stream, &answer(kind::ATTACH_OK, attach, b""), b"")
}

/// Destination: does not take the data channel, and says why (cut at 4096 bytes).
pub fn send_attach_refused(
    stream: &mut Stream,
    attach: &Attach,
    reason: &str,
) -> Result<(), ChannelError> {
    let reason = &reason.as_bytes()[..reason.len().min(4096)];
    send(stream, &answer(kind::ATTACH_REFUSED, attach, reason), reason)
}

/// Source: the answer to [`send_attach`], within `limit`.
pub fn read_attach_ok(
    stream: &mut Stream,
    attach: &Attach,
    limit: Duration,
) -> Result<(), ChannelError> {
    let (header, payload) =
        read_frame(stream, limit, "answer to Attach", |header| match header.kind {
            kind::ATTACH_OK | kind::ATTACH_REFUSED => Ok(()),
            kind => Err(WireError::WrongChannel { kind, channel: "new data" }),
        })?;
    if header.kind == kind::ATTACH_REFUSED {
        header.check_payload(&payload, true).map_err(|e| stream.wire_error(e))?;
        let reason = String::from_utf8_lossy(&payload).into_owned();
        return Err(ChannelError::Refused { channel: stream.label().to_owned(), reason });
    }
    if header.a != attach.connection.0 || header.c != u32::from(attach.channel) {
        let what = format!("connection {}, channel {} was not asked for", header.a, header.c);
        return Err(stream.wire_error(WireError::Field { kind: header.kind, what }));
    }
    Ok(())
}

fn answer(kind: u16, attach: &Attach, payload: &[u8]) -> FrameHeader {
    FrameHeader {
        kind,
        length: payload.len() as u32,
        payload_checksum: (!payload.is_empty()).then(|| crc32fast::hash(payload)),
        a: attach.connection.0,
        b: 0,
        c: attach.channel.into(),
    }
}

fn send(stream: &mut Stream, header: &FrameHeader, payload: &[u8]) -> Result<(), ChannelError> {
    let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
    frame.extend_from_slice(&header.encode());
    frame.extend_from_slice(payload);
    stream.write_all(&frame).map_err(|source| stream.io_error("write", source))
}

fn read_frame(
    stream: &mut Stream,
    limit: Duration,
    what: &'static str,
    expected: impl Fn(&FrameHeader) -> Result<(), WireError>,
) -> Result<(FrameHeader, Vec<u8>), ChannelError> {
    let deadline = Instant::now() + limit;
    let late =
        |stream: &Stream| ChannelError::Late { channel: stream.label().to_owned(), what, limit };
    let mut bytes = [0; HEADER_LEN];
    read_exact(stream, &mut bytes, deadline, &late)?;
    let header = FrameHeader::decode(&bytes).map_err(|e| stream.wire_error(e))?;
    // Only what is expected here may ask for memory.
    expected(&header).map_err(|e| stream.wire_error(e))?;
    let mut payload = vec![0; header.length as usize];
    read_exact(stream, &mut payload, deadline, &late)?;
    stream.set_read_timeout(None).map_err(|source| stream.io_error("setsockopt", source))?;
    Ok((header, payload))
}

fn read_exact(
    stream: &mut Stream,
    mut buffer: &mut [u8],
    deadline: Instant,
    late: &dyn Fn(&Stream) -> ChannelError,
) -> Result<(), ChannelError> {
    while !buffer.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late(stream));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| stream.io_error("setsockopt", e))?;
        match stream.read(buffer) {
            Ok(0) => return Err(stream.closed()),
            Ok(n) => buffer = &mut buffer[n..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(late(stream)),
            Err(source) => return Err(stream.io_error("read", source)),
        }
    }
    Ok(())
}
