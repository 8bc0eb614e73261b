//! The thread that owns one device on the destination: calls and write()s, one at a time.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use switchover::Time;
use switchover::destination::Event;
use switchover::handover::DeviceCall;
use switchover::handover::DeviceState as BrainState;
use switchover::handover::source::CallResult;
use switchover::message::{DeviceIndex, Failure, Session, Side};

use super::{Input, Mailbox};
use crate::calls::OwnedDevice;
use crate::channel::{DeviceFrame, StreamChecksum};
use crate::clock;
use crate::cost::{Account, Work as Job};
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
    pub(super) stream: Session,
    pub(super) bytes: u64,
    pub(super) checksum: u32,
    pub(super) load_ns: u64,
}

/// What calls of the switchover took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CallTimes {
    /// RESUMING → STOP.
    pub(super) validate_ns: Option<u64>,
    /// STOP → RUNNING, all calls of it.
    pub(super) start_ns: Option<u64>,
}

#[derive(Default)]
struct Inbox {
    commands: VecDeque<Command>,
    frames: VecDeque<DeviceFrame>,
    frame_bytes: usize,
    /// Frames of streams up to this one are of an attempt that was rolled back.
    ended_streams: Session,
    stream: Session,
    loaded: Loaded,
    calls: CallTimes,
    /// The driver was told that more is loaded, and has not looked yet.
    told: bool,
    /// Frames of streams that were over when they came.
    dropped: u64,
    /// No frame is taken any more.
    sealed: bool,
    closed: bool,
    /// Closed, and the owner has gone.
    ended: bool,
    /// How long the last call took.
    last_call: Time,
}

struct Shared {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

/// The owning thread, from outside; ends when closed and its current call returns.
#[derive(Clone)]
pub(super) struct DeviceThread {
    shared: Arc<Shared>,
    owned: Arc<OwnedDevice>,
}

impl DeviceThread {
    pub(super) fn spawn(
        place: u64,
        index: DeviceIndex,
        device: &Device,
        vmm: Arc<dyn Vmm>,
        mailbox: Mailbox,
        account: Account,
    ) -> std::io::Result<Self> {
        let owned = Arc::new(OwnedDevice::new(Side::Destination, device));
        let shared = Arc::new(Shared { inbox: Mutex::default(), changed: Condvar::new() });
        let name = format!("dst-{}", owned.id);
        let owner = Owner {
            place,
            index,
            owned: Arc::clone(&owned),
            vmm,
            mailbox,
            shared: Arc::clone(&shared),
            checksum: StreamChecksum::default(),
            handed: 0,
            unsettled: 0,
        };
        std::thread::Builder::new().name(name).spawn(move || {
            let _joined = account.join(Job::Devices);
            owner.run();
        })?;
        Ok(Self { shared, owned })
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, command: Command) {
        let mut inbox = self.inbox();
        if !inbox.closed {
            inbox.commands.push_back(command);
            self.shared.changed.notify_all();
        }
    }

    /// Hands a frame over; waits while too much is queued. False once closed.
    pub(super) fn push(&self, frame: DeviceFrame) -> bool {
        let mut inbox = self.inbox();
        while inbox.frame_bytes > INBOX_BYTES_MAX && !inbox.sealed {
            inbox = self.shared.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        if inbox.sealed {
            return false;
        }
        inbox.frame_bytes += frame_cost(&frame);
        inbox.frames.push_back(frame);
        self.shared.changed.notify_all();
        true
    }

    pub(super) fn loaded(&self) -> Loaded {
        self.inbox().loaded
    }

    pub(super) fn call_times(&self) -> CallTimes {
        self.inbox().calls
    }

    /// The bytes that are loaded, when nothing waits to be.
    pub(super) fn drained(&self) -> Option<u64> {
        let inbox = self.inbox();
        inbox.frames.is_empty().then_some(inbox.loaded.bytes)
    }

    /// As [`loaded`](Self::loaded), for the driver that was told: from now on it is told again.
    pub(super) fn take_loaded(&self) -> Loaded {
        let mut inbox = self.inbox();
        inbox.told = false;
        inbox.loaded
    }

    /// How long the call that was just told of took.
    pub(super) fn last_call(&self) -> Time {
        self.inbox().last_call
    }

    pub(super) fn dropped_frames(&self) -> u64 {
        self.inbox().dropped
    }

    /// The stream is complete: no frame is taken any more, and whoever waits with one goes on.
    pub(super) fn seal(&self) {
        let mut inbox = self.inbox();
        inbox.sealed = true;
        inbox.frames.clear();
        inbox.frame_bytes = 0;
        self.shared.changed.notify_all();
    }

    /// The attempt is rolled back: of streams up to `session` nothing counts any more, and whoever waits with
    /// a frame of them goes on.
    pub(super) fn end_streams(&self, session: Session) {
        let mut inbox = self.inbox();
        inbox.ended_streams = inbox.ended_streams.max(session);
        self.shared.changed.notify_all();
    }

    /// Frames are taken again.
    pub(super) fn unseal(&self) {
        self.inbox().sealed = false;
    }

    /// No command is obeyed any more; the thread ends when its current call returns.
    pub(super) fn close(&self) {
        self.seal();
        let mut inbox = self.inbox();
        inbox.closed = true;
        inbox.commands.clear();
        self.shared.changed.notify_all();
    }

    /// Closed: waits until the call under way has returned.
    pub(super) fn wait_ended(&self) {
        let mut inbox = self.inbox();
        while !inbox.ended {
            inbox = self.shared.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ended: back to how the device was before anything was loaded.
    pub(super) fn reset_device(&self, vmm: &dyn Vmm) {
        if let CallResult::Failed { failure, .. } = self.owned.reset(vmm) {
            tracing::error!(%failure, "a device could not be reset after an aborted migration");
        }
    }
}

/// What a frame takes of the inbox: the memory it holds, which is more than its bytes where a larger buffer was used
/// again; one without bytes takes something too.
fn frame_cost(frame: &DeviceFrame) -> usize {
    frame.data.footprint() + size_of::<DeviceFrame>()
}

/// The thread has ended, also by a panic.
struct EndedGuard(Arc<Shared>);

impl Drop for EndedGuard {
    fn drop(&mut self) {
        let mut inbox = self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.ended = true;
        self.0.changed.notify_all();
    }
}

enum Work {
    Command(Command),
    Frame(DeviceFrame),
    /// Nothing waits, but writes are unanswered.
    Settle,
}

struct Owner {
    place: u64,
    index: DeviceIndex,
    owned: Arc<OwnedDevice>,
    vmm: Arc<dyn Vmm>,
    mailbox: Mailbox,
    shared: Arc<Shared>,
    checksum: StreamChecksum,
    /// Bytes of the current stream that the device was given.
    handed: u64,
    /// The last so many of them are not known to be loaded.
    unsettled: u64,
}

impl Owner {
    fn run(mut self) {
        let _ended = EndedGuard(Arc::clone(&self.shared));
        while let Some(work) = self.next() {
            match work {
                Work::Command(Command::Call(call)) => self.call(call),
                Work::Command(Command::BeginStream(session)) => self.begin_stream(session),
                Work::Command(Command::Digest(reply)) => {
                    let _ = reply.send(self.owned.lock().state_digest().unwrap_or_default());
                }
                Work::Frame(frame) => self.load(&frame),
                Work::Settle => self.settle(),
            }
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
            let (stream, ended) = (inbox.stream, inbox.ended_streams);
            let due = inbox.frames.front().is_some_and(|frame| frame.session <= stream.max(ended));
            if due && let Some(frame) = inbox.frames.pop_front() {
                inbox.frame_bytes = inbox.frame_bytes.saturating_sub(frame_cost(&frame));
                self.shared.changed.notify_all();
                if frame.session == stream && frame.session > ended {
                    return Some(Work::Frame(frame));
                }
                inbox.dropped += 1;
                continue;
            }
            if self.unsettled > 0 {
                return Some(Work::Settle);
            }
            inbox = self.shared.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn call(&mut self, call: DeviceCall) {
        let begin = clock::now();
        let result = match call {
            DeviceCall::SetState(target) => {
                let result = self.owned.set_state(target);
                // It does not leave RESUMING before everything is loaded.
                if self.unsettled > 0 && matches!(result, CallResult::Done) {
                    self.note_loaded(0, clock::now().since(begin));
                }
                if target != BrainState::Resuming {
                    self.set_stream(Session(0));
                }
                result
            }
            DeviceCall::Reset => {
                self.set_stream(Session(0));
                self.unsettled = 0;
                self.owned.reset(&*self.vmm)
            }
            DeviceCall::Info => return,
        };
        self.note_took(call, clock::now().since(begin));
        self.tell(Event::CallDone { device: self.index, call, result });
    }

    fn note_took(&self, call: DeviceCall, took: Time) {
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.last_call = took;
        let DeviceCall::SetState(target) = call else { return };
        let calls = &mut inbox.calls;
        match target {
            BrainState::Stop => calls.validate_ns = Some(took.0),
            BrainState::RunningP2p => calls.start_ns = Some(took.0),
            BrainState::Running => calls.start_ns = Some(calls.start_ns.unwrap_or(0) + took.0),
            _ => *calls = CallTimes::default(),
        }
    }

    fn begin_stream(&mut self, session: Session) {
        self.checksum = StreamChecksum::default();
        (self.handed, self.unsettled) = (0, 0);
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.stream = session;
        inbox.loaded = Loaded { stream: session, ..Loaded::default() };
    }

    fn set_stream(&self, session: Session) {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner).stream = session;
    }

    /// Writes a frame. What is acknowledged later is what the device has answered for, nothing else.
    fn load(&mut self, frame: &DeviceFrame) {
        if frame.offset != self.handed {
            let what = format!("its stream jumps from {} to {}", self.handed, frame.offset);
            return self.fail(Failure::new(Side::Source, what).device(self.owned.id.clone()));
        }
        let begin = clock::now();
        let mut rest = &frame.data[..];
        let mut unsettled = self.unsettled;
        while !rest.is_empty() {
            // The lock is taken for each write, so that a digest or a status can come between.
            let written = {
                let mut device = self.owned.lock();
                let written = device.write_behind(rest);
                unsettled = device.unsettled_bytes();
                written
            };
            match written {
                Ok(0) => return self.fail(self.misbehaved("write() took nothing")),
                Ok(length) if length > rest.len() => {
                    return self.fail(self.misbehaved("write() took more than it was given"));
                }
                Ok(length) => rest = &rest[length..],
                Err(error) => return self.fail(self.owned.failure(&error)),
            }
        }
        self.checksum.push(&frame.data, frame.checksum);
        self.handed += frame.data.len() as u64;
        self.note_loaded(unsettled, clock::now().since(begin));
    }

    /// Waits until the device has answered for all it was given.
    fn settle(&mut self) {
        let begin = clock::now();
        let settled = self.owned.lock().settle();
        match settled {
            Ok(()) => self.note_loaded(0, clock::now().since(begin)),
            Err(error) => self.fail(self.owned.failure(&error)),
        }
    }

    /// All that was handed over is loaded but for the last `unsettled` bytes; it took that long.
    fn note_loaded(&mut self, unsettled: u64, took: Time) {
        self.unsettled = unsettled;
        let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.loaded.bytes = self.handed.saturating_sub(unsettled);
        // Of all that was handed over: it is looked at where nothing is unsettled any more.
        inbox.loaded.checksum = self.checksum.value();
        inbox.loaded.load_ns += took.0;
        // Small frames come faster than the driver looks: once is enough until it does.
        let told = std::mem::replace(&mut inbox.told, true);
        drop(inbox);
        if !told {
            self.mailbox.send(Input::Loaded(self.place, self.index));
        }
    }

    fn misbehaved(&self, what: &str) -> Failure {
        Failure::new(Side::Destination, what).device(self.owned.id.clone())
    }

    fn fail(&mut self, failure: Failure) {
        // Nothing more of this stream is loaded.
        self.unsettled = 0;
        self.set_stream(Session(u64::MAX));
        self.tell(Event::Fail(failure));
    }

    fn tell(&self, event: Event) {
        self.mailbox.send(Input::Event(self.place, event));
    }
}
