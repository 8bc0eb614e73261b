//! The control channel: messages both ways.
//!
//! Sending queues; one thread per channel writes, and says that it is alive when there is nothing else
//! to say. Receiving takes a peer that is silent for too long as gone.

use std::io::Write;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use switchover::message::Message;

use super::reader::FrameReader;
use super::{ChannelError, Stream};
use crate::wire::{WireError, decode_message, encode_message, is_control};

/// Messages that may wait; a peer that lets more pile up does not read.
const QUEUE_LEN: usize = 1024;

/// How long a control channel may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlLimits {
    /// A keep-alive is sent after so long without another message.
    pub keep_alive: Duration,
    /// A peer from which nothing comes, or which takes nothing in, for so long is gone.
    pub silence: Duration,
}

impl Default for ControlLimits {
    /// 1 s and 10 s.
    fn default() -> Self {
        Self { keep_alive: Duration::from_secs(1), silence: Duration::from_secs(10) }
    }
}

/// Sends messages, from any thread.
#[derive(Clone, Debug)]
pub struct ControlSender {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `None` once closed. The queue outlives it until the writer has emptied it.
    queue: Mutex<Option<SyncSender<Vec<u8>>>>,
    stream: Stream,
    done: Arc<Done>,
    silence: Duration,
}

/// The writer thread has ended.
#[derive(Debug, Default)]
struct Done {
    flag: Mutex<bool>,
    changed: Condvar,
}

impl ControlSender {
    /// With the default limits.
    pub fn new(stream: Stream) -> Self {
        Self::with_limits(stream, ControlLimits::default())
    }

    /// Takes the sending direction of `stream` and starts its writer.
    pub fn with_limits(stream: Stream, limits: ControlLimits) -> Self {
        let (queue, waiting) = sync_channel(QUEUE_LEN);
        let done = Arc::new(Done::default());
        let started = stream.try_clone().and_then(|stream| {
            stream.set_write_timeout(Some(limits.silence))?;
            let done = Arc::clone(&done);
            let writer = move || {
                write_queue(stream, &waiting, limits.keep_alive);
                *done.flag.lock().unwrap_or_else(PoisonError::into_inner) = true;
                done.changed.notify_all();
            };
            thread::Builder::new().name("vmferry-control".into()).spawn(writer)
        });
        if let Err(error) = started {
            tracing::error!(channel = stream.label(), %error, "no writer for the control channel");
            stream.shutdown();
            *done.flag.lock().unwrap_or_else(PoisonError::into_inner) = true;
        }
        let queue = Mutex::new(Some(queue));
        Self { shared: Arc::new(Shared { queue, stream, done, silence: limits.silence }) }
    }

    /// Queues a message; does not wait for it to be written. Fails once the channel is closed or broken.
    pub fn send(&self, message: Message) -> Result<(), ChannelError> {
        let stream = &self.shared.stream;
        let frame = encode_message(&message).map_err(|e| stream.wire_error(e))?;
        let channel = || stream.label().to_owned();
        let queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = queue.as_ref() else {
            return Err(ChannelError::ShutDown { channel: channel() });
        };
        match queue.try_send(frame) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                Err(ChannelError::Congested { channel: channel(), queued: QUEUE_LEN })
            }
            Err(TrySendError::Disconnected(_)) => {
                Err(ChannelError::ShutDown { channel: channel() })
            }
        }
    }

    /// Writes what is queued, waiting for it as long as silence is borne, and ends both directions.
    pub fn close(&self) {
        let shared = &self.shared;
        *shared.queue.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let done = shared.done.flag.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = shared.done.changed.wait_timeout_while(done, shared.silence, |done| !*done);
        drop(wait);
        shared.stream.shutdown();
    }

    /// Ends both directions at once; what is queued is lost.
    pub fn abort(&self) {
        *self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.stream.shutdown();
    }
}

/// Writes until the queue is closed and empty, or the stream breaks; then the stream is down, so that
/// the receiver of this side sees it too.
///
/// A keep-alive is never the first frame: that says what a connection is, and a source that is held up for a
/// moment before its Hello would be taken for something else.
fn write_queue(mut stream: Stream, queue: &Receiver<Vec<u8>>, keep_alive: Duration) {
    let mut begun = false;
    loop {
        let frame = match queue.recv_timeout(keep_alive) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) if !begun => continue,
            Err(RecvTimeoutError::Timeout) => match encode_message(&Message::KeepAlive) {
                Ok(frame) => frame,
                Err(_) => continue,
            },
            Err(RecvTimeoutError::Disconnected) => break,
        };
        begun = true;
        if let Err(error) = stream.write_all(&frame) {
            tracing::debug!(channel = stream.label(), %error, "control channel cannot be written");
            break;
        }
    }
    stream.shutdown();
}

/// Receives messages.
#[derive(Debug)]
pub struct ControlReceiver {
    reader: FrameReader,
}

impl ControlReceiver {
    /// With the default limits.
    pub fn new(stream: Stream) -> Self {
        Self::with_limits(stream, ControlLimits::default())
    }

    /// Takes the receiving direction of `stream`.
    pub fn with_limits(stream: Stream, limits: ControlLimits) -> Self {
        Self { reader: FrameReader::new(stream, Some(limits.silence)) }
    }

    /// The next message. Keep-alives and frames that may be skipped are swallowed. After an error
    /// nothing more can be read.
    pub fn recv(&mut self) -> Result<Message, ChannelError> {
        loop {
            let Some(header) = self.reader.header()? else {
                return Err(self.reader.stream().closed());
            };
            // Before its payload is waited for: a data frame may be long.
            if header.is_known() && !is_control(header.kind) {
                let error = WireError::WrongChannel { kind: header.kind, channel: "control" };
                return Err(self.reader.stream().wire_error(error));
            }
            let payload = self.reader.payload(header.length as usize)?;
            let message = decode_message(&header, &payload)
                .map_err(|e| self.reader.stream().wire_error(e))?;
            match message {
                None | Some(Message::KeepAlive) => {}
                Some(message) => return Ok(message),
            }
        }
    }
}
