//! The connection: requests out, replies matched to them, the server's DMA served in between.
//!
//! ```text
//!   callers ── call() ──> Channel ──────────────> server
//!      ▲                                            │
//!      └── Slot <── reader thread <── main socket ──┤  replies by msg_id; DMA commands too,
//!                     DmaTable <──────────┘         │  where there is no twin socket
//!                     DmaTable <── twin thread <────┘  twin socket: DMA commands only
//! ```
//!
//! A reply that nobody waits for any more (its caller ran into a time limit) is received and dropped;
//! its msg_id is not used again before that. Whatever the server does against the protocol ends the
//! connection, since nothing that follows could be trusted.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration::{DeviceError, DeviceResult};

use super::memory::DmaTable;
use super::options::LossCallback;
use super::slot::{Outcome, Sink, Slot};
use crate::codec::dma::DmaTransfer;
use crate::codec::migration::MigData;
use crate::codec::{Command, Header, MessageKind};
use crate::wire::{Channel, ReceiveError, SendError, gone_reason};

/// The most requests without a reply, those given up included.
const PENDING_MAX: usize = 1024;

/// How long a reply to the server's DMA command may wait for room on the socket.
const DMA_REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// What was negotiated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The most data of one message, in bytes.
    pub(crate) max_data_xfer_bytes: usize,
    /// The largest message, in bytes.
    pub(crate) message_bytes: usize,
    /// The most fds the server takes in one message.
    pub(crate) max_msg_fds: usize,
}

/// State shared by callers and reader threads.
pub(crate) struct Shared {
    channel: Channel,
    twin: Option<Channel>,
    pub(crate) limits: Limits,
    pub(crate) dma: DmaTable,
    /// Counts resets, so that the migration side sees those of the function side.
    pub(crate) resets: AtomicU64,
    /// Held over a reset and over a state change: a session that a change begins is either ended by the
    /// reset or begun after it, and which of the two is known.
    reset_or_change: Mutex<()>,
    pending: Mutex<Pending>,
    on_loss: Option<LossCallback>,
    closing: AtomicBool,
}

#[derive(Default)]
struct Pending {
    next_id: u16,
    slots: HashMap<u16, Arc<Slot>>,
    lost: Option<String>,
}

/// A reply to a small request.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// A request to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    /// The call, in the uAPI's words, for errors.
    pub(crate) call: &'static str,
    pub(crate) command: Command,
    /// Fixed part of the payload.
    pub(crate) fixed: &'a [u8],
    /// Data after the fixed part.
    pub(crate) data: &'a [u8],
    pub(crate) fds: &'a [BorrowedFd<'a>],
    pub(crate) timeout: Option<Duration>,
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Call {
    call: &'static str,
    slot: Arc<Slot>,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
}

impl Call {
    /// Its time begins again: it waited behind others, which took theirs.
    pub(crate) fn renew(&mut self) {
        self.deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    }

    /// [`finish`](Shared::finish) would not wait.
    pub(crate) fn is_done(&self) -> bool {
        self.slot.is_done()
    }
}

/// The connection with its reader threads; closes when dropped.
pub(crate) struct Connection {
    pub(crate) shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

impl Connection {
    /// Starts the reader threads of a negotiated connection.
    pub(crate) fn start(
        channel: Channel,
        twin: Option<Channel>,
        limits: Limits,
        on_loss: Option<LossCallback>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            channel,
            twin,
            limits,
            dma: DmaTable::default(),
            resets: AtomicU64::new(0),
            reset_or_change: Mutex::default(),
            pending: Mutex::default(),
            on_loss,
            closing: AtomicBool::new(false),
        });
        let mut connection = Self { shared, readers: Vec::new() };
        connection.spawn("vfio-user", |shared| shared.read_main())?;
        if connection.shared.twin.is_some() {
            connection.spawn("vfio-user-dma", |shared| shared.read_twin())?;
        }
        Ok(connection)
    }

    fn spawn(&mut self, name: &str, read: fn(&Shared) -> ReceiveError) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.into());
        self.readers.push(thread.spawn(move || {
            let error = read(&shared);
            shared.lose(error.to_string());
        })?);
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.close();
        let me = std::thread::current().id();
        for reader in self.readers.drain(..) {
            // The loss callback may drop the last handle on a reader thread itself.
            if reader.thread().id() != me {
                // A reader that panicked has nothing to give back.
                let _ = reader.join();
            }
        }
    }
}

impl Shared {
    /// Begins a reset or a state change; it is over when the answer is dropped.
    pub(crate) fn reset_or_change(&self) -> MutexGuard<'_, ()> {
        self.reset_or_change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request and waits for its reply.
    pub(crate) fn call(&self, request: Request<'_>) -> DeviceResult<Reply> {
        let call = self.start(request, Sink::Bytes)?;
        match self.finish(&call)? {
            Outcome::Reply(payload, fds) => Ok(Reply { payload, fds }),
            other => Err(broke(request.call, format!("{other:?} instead of a reply"))),
        }
    }

    /// Sends a request; [`finish`](Self::finish) waits for its reply.
    pub(crate) fn start(&self, request: Request<'_>, sink: Sink) -> DeviceResult<Call> {
        let Request { call, command, fixed, data, fds, timeout } = request;
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let slot = Arc::new(Slot::new(command, sink));
        let msg_id = self.register(call, &slot)?;
        let header = Header::command(msg_id, command, fixed.len() + data.len());
        let mut head = Vec::with_capacity(64);
        head.extend_from_slice(&header.encode());
        head.extend_from_slice(fixed);
        match self.channel.send(&head, data, fds, deadline) {
            Ok(()) => Ok(Call { call, slot, timeout, deadline }),
            Err(SendError::TimedOut) => {
                self.lock().slots.remove(&msg_id);
                Err(timed_out(call, timeout))
            }
            Err(SendError::Broken(error)) => {
                self.lose(gone_reason(&error));
                Err(self.gone(call))
            }
        }
    }

    /// Waits for the outcome of a request; refusals and losses are errors.
    pub(crate) fn finish(&self, call: &Call) -> DeviceResult<Outcome> {
        match call.slot.wait(call.deadline) {
            Some(Outcome::Refused(errno)) => Err(DeviceError::Errno { call: call.call, errno }),
            Some(Outcome::Lost(reason)) => Err(DeviceError::Gone { call: call.call, reason }),
            Some(outcome) => Ok(outcome),
            None => Err(timed_out(call.call, call.timeout)),
        }
    }

    /// Why the server is gone, if it is.
    pub(crate) fn lost(&self) -> Option<String> {
        self.lock().lost.clone()
    }

    /// Closes the connection on our own wish: no loss is announced.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.lose("the connection was closed here".into());
    }

    /// Ends the connection: every request under way and every later one fails with `reason`.
    pub(crate) fn lose(&self, reason: String) {
        let slots = {
            let mut pending = self.lock();
            if pending.lost.is_some() {
                return;
            }
            pending.lost = Some(reason.clone());
            std::mem::take(&mut pending.slots)
        };
        self.channel.shutdown();
        if let Some(twin) = &self.twin {
            twin.shutdown();
        }
        for slot in slots.into_values() {
            slot.complete(Outcome::Lost(reason.clone()));
        }
        if self.closing.load(Ordering::Acquire) {
            return;
        }
        tracing::warn!(reason, "vfio-user: the device server is gone");
        if let Some(on_loss) = &self.on_loss {
            on_loss(&reason);
        }
    }

    fn gone(&self, call: &'static str) -> DeviceError {
        let reason = self.lost().unwrap_or_else(|| "the connection is closed".into());
        DeviceError::Gone { call, reason }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, call: &'static str, slot: &Arc<Slot>) -> DeviceResult<u16> {
        let mut pending = self.lock();
        if let Some(reason) = &pending.lost {
            return Err(DeviceError::Gone { call, reason: reason.clone() });
        }
        if pending.slots.len() >= PENDING_MAX {
            return Err(broke(call, format!("{PENDING_MAX} requests are unanswered")));
        }
        while pending.slots.contains_key(&pending.next_id) {
            pending.next_id = pending.next_id.wrapping_add(1);
        }
        let msg_id = pending.next_id;
        pending.next_id = msg_id.wrapping_add(1);
        pending.slots.insert(msg_id, Arc::clone(slot));
        Ok(msg_id)
    }

    /// The main socket's reader: replies, and DMA commands of servers without a twin socket.
    fn read_main(&self) -> ReceiveError {
        let mut scratch = Vec::new();
        loop {
            let mut fds = Vec::new();
            let result = match self.channel.receive_header(self.limits.message_bytes, &mut fds) {
                Err(error) => Err(error),
                Ok(header) => match header.kind {
                    MessageKind::Command { no_reply } => {
                        self.serve(&self.channel, header, no_reply, &mut scratch, &mut fds)
                    }
                    _ => self.take_reply(header, fds),
                },
            };
            if let Err(error) = result {
                return error;
            }
        }
    }

    /// The twin socket's reader: commands only.
    fn read_twin(&self) -> ReceiveError {
        let Some(twin) = &self.twin else { return ReceiveError::Closed };
        let mut scratch = Vec::new();
        loop {
            let mut fds = Vec::new();
            let result = match twin.receive_header(self.limits.message_bytes, &mut fds) {
                Err(error) => Err(error),
                Ok(header) => match header.kind {
                    MessageKind::Command { no_reply } => {
                        self.serve(twin, header, no_reply, &mut scratch, &mut fds)
                    }
                    _ => Err(protocol("a reply on the twin socket")),
                },
            };
            if let Err(error) = result {
                return error;
            }
        }
    }

    fn take_reply(&self, header: Header, mut fds: Vec<OwnedFd>) -> Result<(), ReceiveError> {
        let slot = self.lock().slots.get(&header.msg_id).cloned();
        let Some(slot) = slot else {
            let what = format!("a reply to message {} that was not sent", header.msg_id);
            return Err(protocol(what));
        };
        if slot.command != header.command {
            let (sent, got) = (slot.command.name(), header.command.0);
            return Err(protocol(format!("a reply to command {got} for a request of {sent}")));
        }
        let outcome = match (header.kind, &slot.sink) {
            (MessageKind::ErrorReply { errno }, _) => {
                // libvfio-user sends the request back with some refusals.
                self.channel.discard(header.payload_bytes, &mut fds)?;
                Outcome::Refused(errno)
            }
            (_, Sink::Bytes) => {
                let mut payload = vec![0; header.payload_bytes];
                self.channel.receive_body(&mut payload, &mut fds)?;
                Outcome::Reply(payload, fds)
            }
            (_, Sink::Stream { target, requested }) => {
                let mut fixed = [0; MigData::SIZE];
                let Some(body) = header.payload_bytes.checked_sub(fixed.len()) else {
                    return Err(protocol("a MIG_DATA_READ reply without its fixed part"));
                };
                self.channel.receive_body(&mut fixed, &mut fds)?;
                let size = MigData::decode(&fixed).map_or(u32::MAX, |data| data.size);
                if size > *requested || size as usize > body {
                    let what = format!(
                        "{size} bytes of data in a reply of {body} to a MIG_DATA_READ of {requested}"
                    );
                    return Err(protocol(what));
                }
                let data = size as usize;
                let received = target.fill(data, |buf| self.channel.receive_body(buf, &mut fds));
                match received {
                    Some(result) => result?,
                    // Nobody waits for it any more.
                    None => self.channel.discard(data, &mut fds)?,
                }
                self.channel.discard(body - data, &mut fds)?;
                Outcome::Data(size)
            }
        };
        self.lock().slots.remove(&header.msg_id);
        slot.complete(outcome);
        Ok(())
    }

    /// Serves one command of the server. What it gets wrong inside of a whole message is refused; the
    /// connection goes on.
    fn serve(
        &self,
        channel: &Channel,
        header: Header,
        no_reply: bool,
        payload: &mut Vec<u8>,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<(), ReceiveError> {
        payload.clear();
        payload.resize(header.payload_bytes, 0);
        channel.receive_body(payload, fds)?;
        let answer = match header.command {
            Command::DMA_READ => self.serve_read(payload),
            Command::DMA_WRITE => self.serve_write(payload),
            other => {
                tracing::debug!(command = other.0, "vfio-user: the server sent a strange command");
                Err(libc::EINVAL)
            }
        };
        if no_reply {
            return Ok(());
        }
        let (header, body) = match &answer {
            Ok(body) => (header.reply(body.len()), body.as_slice()),
            Err(errno) => (header.error_reply(*errno, 0), &[] as &[u8]),
        };
        let deadline = Some(Instant::now() + DMA_REPLY_TIMEOUT);
        match channel.send(&header.encode(), body, &[], deadline) {
            Ok(()) => Ok(()),
            Err(SendError::TimedOut) => Err(protocol("the server does not take a DMA reply")),
            Err(SendError::Broken(error)) => Err(error.into()),
        }
    }

    fn serve_read(&self, payload: &[u8]) -> Result<Vec<u8>, i32> {
        let transfer = DmaTransfer::decode(payload).map_err(|_| libc::EINVAL)?;
        let count = self.bounded(transfer.count)?;
        let mut body = vec![0; DmaTransfer::SIZE + count];
        let (fixed, data) = body.split_at_mut(DmaTransfer::SIZE);
        fixed.copy_from_slice(payload.get(..DmaTransfer::SIZE).ok_or(libc::EINVAL)?);
        self.dma.read(transfer.address, data)?;
        Ok(body)
    }

    fn serve_write(&self, payload: &[u8]) -> Result<Vec<u8>, i32> {
        let (transfer, data) = DmaTransfer::decode_with_data(payload).map_err(|_| libc::EINVAL)?;
        self.bounded(transfer.count)?;
        self.dma.write(transfer.address, data)?;
        let mut body = Vec::with_capacity(DmaTransfer::SIZE);
        transfer.encode(&mut body);
        Ok(body)
    }

    fn bounded(&self, count: u64) -> Result<usize, i32> {
        let count = usize::try_from(count).map_err(|_| libc::EINVAL)?;
        if count > self.limits.max_data_xfer_bytes { Err(libc::EINVAL) } else { Ok(count) }
    }
}

fn protocol(what: impl Into<String>) -> ReceiveError {
    let what = format!("the server broke the protocol: {}", what.into());
    ReceiveError::Io(std::io::Error::other(what))
}

/// The server broke the protocol in a way that concerns this call only.
pub(crate) fn broke(call: &'static str, what: impl Into<String>) -> DeviceError {
    DeviceError::Protocol { call, what: what.into() }
}

fn timed_out(call: &'static str, timeout: Option<Duration>) -> DeviceError {
    let limit_ms =
        timeout.map_or(0, |timeout| timeout.as_millis().min(u128::from(u64::MAX)) as u64);
    DeviceError::TimedOut { call, limit_ms }
}
