//! [`Link`]: one socket to the client, used by the command thread and by device threads that do DMA.
//!
//! There is no reader thread. Whoever waits for something receives, one at a time, and hands what is
//! not for it to the others: the command thread keeps replies for the DMA callers, a DMA caller keeps
//! commands for the command thread. So a region access costs no hop between threads, and a device that
//! does DMA in the middle of a command gets its reply although further commands are queued before it.
//!
//! ```text
//!   command thread ── next_command() ──┐              ┌─> commands (bounded)
//!                                      ├─ receive one ┤
//!   device thread ─── request() ───────┘              └─> replies by msg_id
//! ```

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration::{DeviceError, DeviceResult};

use crate::codec::{Command, Header, MessageKind};
use crate::wire::{Channel, ReceiveError, SendError, gone_reason};

/// The most commands, and bytes of them, that may wait while a device call is under way and DMA
/// replies are looked for behind them.
const QUEUE_COMMANDS_MAX: usize = 256;
const QUEUE_BYTES_MAX: usize = 32 << 20;

/// The most DMA requests under way at once.
const REQUESTS_MAX: usize = 1024;

/// Buffers kept for reuse: a 1 MiB body must not be allocated anew for each write.
const SPARE_BUFFERS_MAX: usize = 4;

/// A payload in a reused buffer.
#[derive(Debug, Default)]
pub(super) struct Body {
    buf: Vec<u8>,
    len: usize,
}

impl Body {
    pub(super) fn bytes(&self) -> &[u8] {
        self.buf.get(..self.len).unwrap_or_default()
    }

    fn resize(&mut self, len: usize) -> &mut [u8] {
        if self.buf.len() < len {
            self.buf.resize(len, 0);
        }
        self.len = len;
        self.buf.get_mut(..len).unwrap_or_default()
    }
}

/// A message of the client.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) body: Body,
    pub(super) fds: Vec<OwnedFd>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    channel: Channel,
    limit_bytes: usize,
    takes_commands: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    receiving: bool,
    commands: VecDeque<Message>,
    queued_bytes: usize,
    /// Requests under way; `Some` once the reply is there. One given up is kept until its reply comes.
    requests: HashMap<u16, Pending>,
    next_id: u16,
    spare: Vec<Body>,
    ended: Option<String>,
}

#[derive(Debug)]
struct Pending {
    command: Command,
    given_up: bool,
    reply: Option<Result<Body, i32>>,
}

impl Link {
    /// The socket on which the client sends its commands.
    pub(super) fn main(channel: Channel, limit_bytes: usize) -> Self {
        Self::new(channel, limit_bytes, true)
    }

    /// A twin socket: the client sends replies only.
    pub(super) fn twin(channel: Channel, limit_bytes: usize) -> Self {
        Self::new(channel, limit_bytes, false)
    }

    fn new(channel: Channel, limit_bytes: usize, takes_commands: bool) -> Self {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { channel, limit_bytes, takes_commands, state, changed }
    }

    /// Ends the link; everybody waiting is told `reason`.
    pub(super) fn end(&self, reason: &str) {
        self.channel.shutdown();
        self.lock().ended.get_or_insert_with(|| reason.into());
        self.changed.notify_all();
    }

    /// Waits for the client's next command; the reason of the end when there is none any more.
    pub(super) fn next_command(&self) -> Result<Message, String> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.commands.pop_front() {
                state.queued_bytes -= message.body.len;
                return Ok(message);
            }
            if let Some(reason) = &state.ended {
                return Err(reason.clone());
            }
            state = self.receive_or_wait(state, None);
        }
    }

    /// Gives the buffer of a handled command back.
    pub(super) fn recycle(&self, body: Body) {
        let mut state = self.lock();
        if state.spare.len() < SPARE_BUFFERS_MAX {
            state.spare.push(body);
        }
    }

    /// Sends a message of `head` and `data` with fds; failing that, the link ends.
    pub(super) fn send(
        &self,
        head: &[u8],
        data: &[u8],
        fds: &[std::os::fd::BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(), String> {
        let deadline = Instant::now().checked_add(timeout);
        self.channel.send(head, data, fds, deadline).map_err(|error| {
            let reason = match error {
                SendError::TimedOut => "the client takes no messages".into(),
                SendError::Broken(error) => gone_reason(&error),
            };
            self.end(&reason);
            reason
        })
    }

    /// Sends a command to the client and waits for its reply, which `take` gets.
    pub(super) fn request<T>(
        &self,
        command: Command,
        fixed: &[u8],
        data: &[u8],
        timeout: Duration,
        take: impl FnOnce(&[u8]) -> DeviceResult<T>,
    ) -> DeviceResult<T> {
        let call = command.name();
        let msg_id = self.register(command)?;
        let header = Header::command(msg_id, command, fixed.len() + data.len());
        let mut head = header.encode().to_vec();
        head.extend_from_slice(fixed);
        if let Err(reason) = self.send(&head, data, &[], timeout) {
            return Err(DeviceError::Gone { call, reason });
        }
        let body = self.wait_reply(call, msg_id, timeout)?;
        let result = take(body.bytes());
        self.recycle(body);
        result
    }

    fn register(&self, command: Command) -> DeviceResult<u16> {
        let call = command.name();
        let mut state = self.lock();
        if let Some(reason) = &state.ended {
            return Err(DeviceError::Gone { call, reason: reason.clone() });
        }
        if state.requests.len() >= REQUESTS_MAX {
            let what = format!("{REQUESTS_MAX} requests to the client are unanswered");
            return Err(DeviceError::Protocol { call, what });
        }
        while state.requests.contains_key(&state.next_id) {
            state.next_id = state.next_id.wrapping_add(1);
        }
        let msg_id = state.next_id;
        state.next_id = msg_id.wrapping_add(1);
        state.requests.insert(msg_id, Pending { command, given_up: false, reply: None });
        Ok(msg_id)
    }

    fn wait_reply(&self, call: &'static str, msg_id: u16, timeout: Duration) -> DeviceResult<Body> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        loop {
            let pending = state.requests.get_mut(&msg_id);
            if let Some(reply) = pending.and_then(|pending| pending.reply.take()) {
                state.requests.remove(&msg_id);
                return reply.map_err(|errno| DeviceError::Errno { call, errno });
            }
            if let Some(reason) = &state.ended {
                return Err(DeviceError::Gone { call, reason: reason.clone() });
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                if let Some(pending) = state.requests.get_mut(&msg_id) {
                    pending.given_up = true;
                }
                let limit_ms = timeout.as_millis().try_into().unwrap_or(u64::MAX);
                return Err(DeviceError::TimedOut { call, limit_ms });
            }
            state = self.receive_or_wait(state, deadline);
        }
    }

    /// Receives one message and enters it, or, where another thread does, waits until something changed
    /// (or the deadline passed).
    fn receive_or_wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        deadline: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        if state.receiving {
            let Some(deadline) = deadline else {
                return self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = self.changed.wait_timeout(state, left);
            return waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.receiving = true;
        let body = state.spare.pop().unwrap_or_default();
        drop(state);
        let received = self.receive(body, deadline);
        let mut state = self.lock();
        state.receiving = false;
        let entered = match received {
            Ok(Some(message)) => self.enter(&mut state, message),
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(reason) = entered {
            // An end that was asked for has its own reason already.
            state.ended.get_or_insert(reason);
            self.channel.shutdown();
        }
        self.changed.notify_all();
        state
    }

    /// Receives one message; `None` when the deadline passed before it began.
    fn receive(
        &self,
        mut body: Body,
        deadline: Option<Instant>,
    ) -> Result<Option<Message>, ReceiveError> {
        if let Some(deadline) = deadline
            && !self.channel.wait_readable(deadline)?
        {
            return Ok(None);
        }
        let mut fds = Vec::new();
        let header = self.channel.receive_header(self.limit_bytes, &mut fds)?;
        self.channel.receive_body(body.resize(header.payload_bytes), &mut fds)?;
        Ok(Some(Message { header, body, fds }))
    }

    fn enter(&self, state: &mut State, message: Message) -> Result<(), String> {
        let (header, len) = (message.header, message.body.len);
        let reply = match header.kind {
            MessageKind::Command { .. } if !self.takes_commands => {
                return Err("a command on the twin socket".into());
            }
            MessageKind::Command { .. } => {
                state.queued_bytes += len;
                if state.commands.len() >= QUEUE_COMMANDS_MAX
                    || state.queued_bytes > QUEUE_BYTES_MAX
                {
                    return Err("too many commands are under way at once".into());
                }
                state.commands.push_back(message);
                return Ok(());
            }
            MessageKind::Reply => Ok(message.body),
            MessageKind::ErrorReply { errno } => Err(errno),
        };
        let Some(pending) = state.requests.get_mut(&header.msg_id) else {
            return Err(format!("a reply to message {} that was not sent", header.msg_id));
        };
        if pending.command != header.command {
            return Err(format!("a reply to another command than {}", pending.command.name()));
        }
        if pending.given_up {
            state.requests.remove(&header.msg_id);
        } else {
            pending.reply = Some(reply);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
