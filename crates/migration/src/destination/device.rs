//! The thread that owns one device on the destination: calls and write()s, one at a time.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use switchover::destination::Event;
use switchover::handover::DeviceCall;
use switchover::handover::DeviceState as BrainState;
use switchover::handover::source::CallResult;
use switchover::message::{DeviceIndex, Failure, Session, Side};

use super::{Input, Mailbox};
use crate::calls::OwnedDevice;
use crate::channel::DeviceFrame;
use crate::clock;
use crate::vmm::{Device, Vmm};

/// Bytes that may wait for one device; whoever brings more waits too. So a source cannot fill the
/// destination's memory, and backlog stays small.
const INBOX_BYTES_MAX: usize = 8 << 20;

/// What the owning thread is told.
pub(super) enum Command {
    Call(DeviceCall),
    /// Frames of this stream are loaded from now on, from offset 0.
    BeginStream(Session),
    Digest(Sender<Option<[u8; 32]>>),
}

/// What is loaded of the current stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Loaded {
    pub(super) bytes: u64,
    pub(super) checksum: u32,
    pub(super) load_ns: u64,
}

#[derive(Default)]
struct Inbox {
    commands: VecDeque<Command>,
    frames: VecDeque<DeviceFrame>,
    frame_bytes: usize,
    stream: Session,
    loaded: Loaded,
    closed: bool,
    reset_at_end: bool,
    /// Closed, and the owner has gone.
    ended: bool,
}

struct Shared {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

/// The owning thread, from outside; ends when closed and its current call returns.
#[derive(Clone)]
pub(super) struct DeviceThread(Arc<Shared>);

impl DeviceThread {
    pub(super) fn spawn(
        place: u64,
        index: DeviceIndex,
        device: &Device,
        vmm: Arc<dyn Vmm>,
        mailbox: Mailbox,
    ) -> std::io::Result<Self> {
        let owned = OwnedDevice::new(Side::Destination, device);
        let shared = Arc::new(Shared { inbox: Mutex::default(), changed: Condvar::new() });
        let name = format!("dst-{}", owned.id);
        let owner = Owner {
            place,
            index,
            owned,
            vmm,
            mailbox,
            shared: Arc::clone(&shared),
            checksum: crc32fast::Hasher::new(),
        };
        std::thread::Builder::new().name(name).spawn(move || owner.run())?;
        Ok(Self(shared))
    }

    pub(super) fn tell(&self, command: Command) {
        let mut inbox = self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.commands.push_back(command);
        self.0.changed.notify_all();
    }

    /// Hands a frame over; waits while too much is queued. False once closed.
    pub(super) fn push(&self, frame: DeviceFrame) -> bool {
        let mut inbox = self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        while inbox.frame_bytes > INBOX_BYTES_MAX && !inbox.closed {
            inbox = self.0.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        if inbox.closed {
            return false;
        }
        inbox.frame_bytes += frame.data.len();
        inbox.frames.push_back(frame);
        self.0.changed.notify_all();
        true
    }

    pub(super) fn loaded(&self) -> Loaded {
        self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner).loaded
    }

    /// Closes, and waits until the call under way has returned and the device is reset, so that another
    /// stream can be loaded.
    pub(super) fn close_and_reset(&self) {
        self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner).reset_at_end = true;
        self.close();
        let mut inbox = self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        while !inbox.ended {
            inbox = self.0.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn close(&self) {
        let mut inbox = self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.closed = true;
        inbox.frames.clear();
        inbox.commands.clear();
        self.0.changed.notify_all();
    }
}

enum Work {
    Command(Command),
    Frame(DeviceFrame),
    /// A frame whose stream is over.
    Stale,
}

struct Owner {
    place: u64,
    index: DeviceIndex,
    owned: OwnedDevice,
    vmm: Arc<dyn Vmm>,
    mailbox: Mailbox,
    shared: Arc<Shared>,
    checksum: crc32fast::Hasher,
}

impl Owner {
    fn run(mut self) {
        while let Some(work) = self.next() {
            match work {
                Work::Command(Command::Call(call)) => self.call(call),
                Work::Command(Command::BeginStream(session)) => self.begin_stream(session),
                Work::Command(Command::Digest(reply)) => {
                    let _ = reply.send(self.owned.lock().state_digest().unwrap_or_default());
                }
                Work::Frame(frame) => self.load(&frame),
                Work::Stale => self.mailbox.send(Input::Dropped(self.place)),
            }
        }
        if self.reset_at_end() {
            self.reset_device();
        }
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.ended = true;
        self.shared.changed.notify_all();
    }

    fn reset_at_end(&self) -> bool {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner).reset_at_end
    }

    /// Back to how the device was before anything was loaded.
    fn reset_device(&self) {
        if let CallResult::Failed { failure, .. } = self.owned.reset(&*self.vmm) {
            tracing::error!(%failure, "a device could not be reset after an aborted migration");
        }
    }

    /// Commands first; a frame only when its stream is the current one. A frame of a stream that has
    /// not begun here waits for the control channel to say so.
    fn next(&self) -> Option<Work> {
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(command) = inbox.commands.pop_front() {
                return Some(Work::Command(command));
            }
            if inbox.closed {
                return None;
            }
            let stream = inbox.stream;
            let due = inbox.frames.front().is_some_and(|frame| frame.session <= stream);
            if due && let Some(frame) = inbox.frames.pop_front() {
                inbox.frame_bytes -= frame.data.len();
                self.shared.changed.notify_all();
                let current = frame.session == stream;
                return Some(if current { Work::Frame(frame) } else { Work::Stale });
            }
            inbox = self.shared.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn call(&mut self, call: DeviceCall) {
        let result = match call {
            DeviceCall::SetState(target) => {
                let result = self.owned.set_state(target);
                if target != BrainState::Resuming {
                    self.set_stream(Session(0));
                }
                result
            }
            DeviceCall::Reset => {
                self.set_stream(Session(0));
                self.owned.reset(&*self.vmm)
            }
            DeviceCall::Info => return,
        };
        self.tell(Event::CallDone { device: self.index, call, result });
    }

    fn begin_stream(&mut self, session: Session) {
        self.checksum = crc32fast::Hasher::new();
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.stream = session;
        inbox.loaded = Loaded::default();
    }

    fn set_stream(&self, session: Session) {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner).stream = session;
    }

    /// Writes a frame. What is acknowledged later is what write() has returned for, nothing else.
    fn load(&mut self, frame: &DeviceFrame) {
        let expected = {
            let inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            inbox.loaded.bytes
        };
        if frame.offset != expected {
            let what = format!("its stream jumps from {expected} to {}", frame.offset);
            return self.fail(Failure::new(Side::Source, what).device(self.owned.id.clone()));
        }
        let begin = clock::now();
        let mut rest = &frame.data[..];
        while !rest.is_empty() {
            // The lock is taken for each write, so that a digest or a status can come between.
            let written = self.owned.lock().write(rest);
            match written {
                Ok(0) => return self.fail(self.misbehaved("write() took nothing")),
                Ok(length) if length > rest.len() => {
                    return self.fail(self.misbehaved("write() took more than it was given"));
                }
                Ok(length) => rest = &rest[length..],
                Err(error) => return self.fail(self.owned.failure(&error)),
            }
        }
        self.checksum.update(&frame.data);
        let offset = {
            let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            inbox.loaded.bytes += frame.data.len() as u64;
            inbox.loaded.checksum = self.checksum.clone().finalize();
            inbox.loaded.load_ns += clock::now().since(begin).0;
            inbox.loaded.bytes
        };
        self.tell(Event::Loaded { device: self.index, stream: frame.session, offset });
    }

    fn misbehaved(&self, what: &str) -> Failure {
        Failure::new(Side::Destination, what).device(self.owned.id.clone())
    }

    fn fail(&self, failure: Failure) {
        // Nothing more of this stream is loaded.
        self.set_stream(Session(u64::MAX));
        self.tell(Event::Fail(failure));
    }

    fn tell(&self, event: Event) {
        self.mailbox.send(Input::Event(self.place, event));
    }
}
