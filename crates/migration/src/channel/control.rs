//! The control channel: messages both ways.
//!
//! Whoever sends writes, as long as the socket has room; what it has none for waits for one thread per channel,
//! which also says that this side is alive when there is nothing else to say. Receiving takes a peer that is silent for too long as gone.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use switchover::message::Message;

use super::reader::FrameReader;
use super::{ChannelError, Stream, files};
use crate::wire::{WireError, decode_message, encode_message, is_control};

/// Messages that may wait; a peer that lets more pile up does not read.
const QUEUE_LEN: usize = 1024;

/// The least the writer waits.
const MOMENT: Duration = Duration::from_millis(1);

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
    handle: Arc<Handle>,
}

/// Sends messages as long as there is a [`ControlSender`], and does not keep the channel open.
#[derive(Clone, Debug)]
pub(crate) struct WeakSender(Weak<Handle>);

impl WeakSender {
    /// What cannot be sent is lost.
    pub(crate) fn send(&self, message: Message) {
        if let Some(handle) = self.0.upgrade() {
            let _ = ControlSender { handle }.send(message);
        }
    }
}

/// Held by those who send; when the last of them has gone, nothing more can come.
#[derive(Debug)]
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

#[derive(Debug)]
struct Shared {
    outbox: Mutex<Outbox>,
    changed: Condvar,
    stream: Stream,
    limits: ControlLimits,
}

#[derive(Debug)]
struct Outbox {
    /// Frames that wait for the writer: whole ones, but for the first one, whose beginning may be out.
    queue: VecDeque<Frame>,
    /// The writer is at it: nobody else may write.
    writing: bool,
    /// When something was written last; `None` before the first message.
    wrote: Option<Instant>,
    /// No message is taken any more.
    closed: bool,
    /// The writer has ended.
    done: bool,
}

/// Bytes of a frame, and the files that go with the first of them.
#[derive(Debug, Default)]
struct Frame {
    bytes: Vec<u8>,
    files: Vec<Arc<OwnedFd>>,
}

impl Frame {
    fn write(&self, stream: &Stream, wait: bool) -> io::Result<usize> {
        match self.files.is_empty() {
            true => stream.write_now(&self.bytes),
            false => {
                let files: Vec<_> = self.files.iter().map(|file| file.as_fd()).collect();
                files::send(stream, &self.bytes, &files, wait)
            }
        }
    }

    /// The beginning is out, and with it the files.
    fn written(&mut self, written: usize) {
        self.bytes.drain(..written);
        if written > 0 {
            self.files.clear();
        }
    }

    fn write_all(mut self, stream: &Stream) -> io::Result<()> {
        if !self.files.is_empty() {
            let written = self.write(stream, true)?;
            self.written(written);
        }
        let mut writer = stream;
        writer.write_all(&self.bytes)
    }
}

impl ControlSender {
    /// With the default limits.
    pub fn new(stream: Stream) -> Self {
        Self::with_limits(stream, ControlLimits::default())
    }

    /// Takes the sending direction of `stream` and starts its writer.
    pub fn with_limits(stream: Stream, limits: ControlLimits) -> Self {
        let outbox = Outbox {
            queue: VecDeque::with_capacity(16),
            writing: false,
            wrote: None,
            closed: false,
            done: false,
        };
        let (outbox, changed) = (Mutex::new(outbox), Condvar::new());
        let shared = Arc::new(Shared { outbox, changed, stream, limits });
        let started = shared.stream.set_write_timeout(Some(limits.silence)).and_then(|()| {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("vmferry-control".into())
                .spawn(move || shared.write_queue())
        });
        if let Err(error) = started {
            let channel = shared.stream.label();
            tracing::error!(channel, %error, "no writer for the control channel");
            shared.stream.shutdown();
            shared.lock().done = true;
        }
        Self { handle: Arc::new(Handle(shared)) }
    }

    pub(crate) fn weak(&self) -> WeakSender {
        WeakSender(Arc::downgrade(&self.handle))
    }

    /// Writes a message at once where the socket has room and nothing waits, else queues it; never waits for the
    /// other side. Fails once the channel is closed or broken.
    pub fn send(&self, message: Message) -> Result<(), ChannelError> {
        self.send_with(message, Vec::new())
    }

    /// As [`send`](Self::send), with files that go along; over a UNIX socket only.
    pub fn send_with(
        &self,
        message: Message,
        files: Vec<Arc<OwnedFd>>,
    ) -> Result<(), ChannelError> {
        let shared = &*self.handle.0;
        let bytes = encode_message(&message).map_err(|e| shared.stream.wire_error(e))?;
        let mut frame = Frame { bytes, files };
        let channel = || shared.stream.label().to_owned();
        let mut outbox = shared.lock();
        if outbox.closed || outbox.done {
            return Err(ChannelError::ShutDown { channel: channel() });
        }
        if outbox.queue.len() >= QUEUE_LEN {
            return Err(ChannelError::Congested { channel: channel(), queued: QUEUE_LEN });
        }
        // A message of a blackout does not wait for a thread to wake up.
        if outbox.queue.is_empty() && !outbox.writing {
            let Ok(written) = frame.write(&shared.stream, false) else {
                // The receiver of this side hears it, behind what the other side still had to say.
                outbox.closed = true;
                drop(outbox);
                shared.changed.notify_all();
                shared.stream.shutdown();
                return Ok(());
            };
            if written > 0 {
                outbox.wrote = Some(Instant::now());
            }
            if written == frame.bytes.len() {
                return Ok(());
            }
            frame.written(written);
        }
        outbox.queue.push_back(frame);
        drop(outbox);
        shared.changed.notify_all();
        Ok(())
    }

    /// Writes what is queued, waiting for it as long as silence is borne, and ends both directions.
    pub fn close(&self) {
        let shared = &self.handle.0;
        let mut outbox = shared.lock();
        outbox.closed = true;
        shared.changed.notify_all();
        let under_way = |outbox: &mut Outbox| !outbox.done;
        drop(shared.changed.wait_timeout_while(outbox, shared.limits.silence, under_way));
        shared.stream.shutdown();
    }

    /// Ends both directions at once; what is queued is lost.
    pub fn abort(&self) {
        let shared = &self.handle.0;
        let mut outbox = shared.lock();
        outbox.closed = true;
        outbox.queue.clear();
        drop(outbox);
        shared.changed.notify_all();
        shared.stream.shutdown();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what could not be written at once, until the queue is closed and empty, or the stream breaks; then
    /// the stream is down, so that the receiver of this side sees it too.
    ///
    /// A keep-alive is never the first frame: that says what a connection is, and a source that is held up for a
    /// moment before its Hello would be taken for something else.
    fn write_queue(&self) {
        let mut outbox = self.lock();
        loop {
            let frame = match outbox.queue.pop_front() {
                Some(frame) => frame,
                None if outbox.closed => break,
                None => {
                    let quiet = outbox.wrote.map(|wrote| wrote.elapsed());
                    let keep_alive = self.limits.keep_alive;
                    let left = quiet.map_or(keep_alive, |quiet| keep_alive.saturating_sub(quiet));
                    match encode_message(&Message::KeepAlive) {
                        Ok(bytes) if left.is_zero() => Frame { bytes, files: Vec::new() },
                        _ => {
                            let waited = self.changed.wait_timeout(outbox, left.max(MOMENT));
                            outbox = waited.unwrap_or_else(PoisonError::into_inner).0;
                            continue;
                        }
                    }
                }
            };
            outbox.writing = true;
            drop(outbox);
            let written = frame.write_all(&self.stream);
            outbox = self.lock();
            (outbox.writing, outbox.wrote) = (false, Some(Instant::now()));
            if let Err(error) = written {
                let channel = self.stream.label();
                tracing::debug!(channel, %error, "control channel cannot be written");
                break;
            }
        }
        outbox.done = true;
        drop(outbox);
        self.changed.notify_all();
        self.stream.shutdown();
    }
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

    /// Files that come along over a UNIX socket are kept for [`take_files`](Self::take_files); otherwise they are
    /// closed.
    #[must_use]
    pub fn keeping_files(mut self) -> Self {
        self.reader.keep_files();
        self
    }

    /// The files that came along with the messages received so far, at most a few dozen. Those that come with the
    /// last one are all there.
    pub fn take_files(&mut self) -> Vec<OwnedFd> {
        self.reader.take_files()
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
