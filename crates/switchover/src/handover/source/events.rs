//! States, events and actions of the source's machine.

use crate::handover::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome, Resolve};
use crate::message::{Attempt, Connection, DeviceIndex, Failure, Features, Id, Message, Session};

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Connecting and comparing.
    Setup,
    /// The guest runs, memory and devices are being copied.
    Precopy,
    /// Switching over: the vCPUs stop, devices are asked once more. Revocable.
    Look,
    /// Devices stop peer-to-peer DMA. Revocable.
    Quiesce,
    /// Devices stopped, the rest is being sent.
    StopCopy,
    /// Everything was sent.
    AwaitReady,
    /// Commit may have been sent: never back on its own guess.
    Committed,
    /// No answer to Commit, and the link is gone.
    InDoubt,
    /// The guest runs at the destination.
    Done,
    /// Back to Precopy from Look or Quiesce; no data is thrown away.
    Revoking,
    /// Back to a running guest from StopCopy or later, and from there to Precopy or to an end.
    RollingBack,
    /// Ending the migration under a running guest.
    Cancelling,
    /// Ended, the guest runs here.
    Failed,
    /// Ended as wished, the guest runs here.
    Cancelled,
}

impl State {
    /// The name that `status`, logs and holds use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Precopy => "precopy",
            Self::Look => "look",
            Self::Quiesce => "quiesce",
            Self::StopCopy => "stop-copy",
            Self::AwaitReady => "await-ready",
            Self::Committed => "committed",
            Self::InDoubt => "in-doubt",
            Self::Done => "done",
            Self::Revoking => "revoking",
            Self::RollingBack => "rolling-back",
            Self::Cancelling => "cancelling",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The migration is over.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// Commit may have been sent and no answer has come.
    pub fn is_committed(self) -> bool {
        matches!(self, Self::Committed | Self::InDoubt)
    }
}

/// The answer to a question that can be refused.
pub type Answer = Result<(), Failure>;

/// How a device call ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CallResult {
    /// As wanted.
    Done,
    /// Failed; the device is now in `state`, `None` when it could not even be asked.
    Failed {
        /// Where it is now.
        state: Option<DeviceState>,
        /// Why.
        failure: Failure,
    },
}

/// A device's answer to PRECOPY_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InfoAnswer {
    /// It answered.
    Known {
        /// initial_bytes is not 0.
        unread_initial: bool,
        /// REINIT was set.
        reinit: bool,
    },
    /// It has no PRECOPY_INFO, or the query failed.
    Unknown,
}

/// Which sync of dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sync {
    /// vCPUs stopped, devices still write.
    Provisional,
    /// Nobody writes any more.
    Final,
}

/// Where a verdict is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// vCPUs stopped, every device asked.
    Look,
    /// Devices P2P-quiescent, asked again; next they stop.
    Quiesce,
    /// Devices stopped and drained; next is the final sync and the last of memory.
    FinalSync,
    /// The last of memory is sent; next is the machine state.
    MachineState,
    /// Ready has come and the decision is recorded; next is the point of no return.
    Commit,
}

/// The answer to [`Action::Judge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Go on.
    Go,
    /// Read, send and load the new initial data with the vCPUs stopped.
    Absorb,
    /// Back: the vCPUs resume. From StopCopy on this is a roll-back.
    Revoke,
}

/// A time limit; the caller knows how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TimeLimit {
    /// Hello and Describe.
    Setup,
    /// A device's answer with the vCPUs stopped.
    Look,
    /// The acknowledgement of initial data that is absorbed with the vCPUs stopped.
    Absorb,
    /// Ready after everything was sent.
    Ready,
    /// RolledBack after RollBack.
    RolledBack,
    /// Running or Never after Commit. Goes on in doubt: once it has struck, the destination's window is
    /// over.
    Answer,
    /// An answer to Query: then it is asked again.
    Query,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A control connection is up; it is the newest.
    LinkUp(Connection),
    /// A control connection is down.
    LinkDown(Connection, Failure),
    /// A message came.
    Message(Connection, Message),
    /// Dirty tracking started, or could not.
    TrackingStarted(Answer),
    /// A device call ended.
    CallDone {
        /// The device.
        device: DeviceIndex,
        /// The call.
        call: DeviceCall,
        /// How it ended.
        result: CallResult,
    },
    /// [`DeviceCall::Info`] was answered.
    Info {
        /// The device.
        device: DeviceIndex,
        /// Its answer.
        answer: InfoAnswer,
        /// Bytes of its stream read so far.
        offset: u64,
    },
    /// A read found nothing more for now: all initial data lies before `offset`.
    InitialRead {
        /// The device.
        device: DeviceIndex,
        /// Bytes of its stream read so far.
        offset: u64,
    },
    /// STOP_COPY: everything was read and sent.
    StreamEnded {
        /// The device.
        device: DeviceIndex,
    },
    /// Precopy is good enough: try to switch over.
    Switchover,
    /// The vCPUs are paused, or could not be.
    Paused(Answer),
    /// The vCPUs run again, or could not.
    Resumed(Answer),
    /// Dirty pages are synced.
    Synced(Sync, Answer),
    /// The last memory was sent.
    RamSent(Answer),
    /// The machine state is saved and sent.
    MachineStateSaved(Answer),
    /// Interrupts are attached again.
    Reattached(Answer),
    /// The independent hashes agree, or not.
    Verified(Answer),
    /// The answer to [`Action::Judge`].
    Verdict(Verdict),
    /// The decision is written, or could not be.
    Recorded(Answer),
    /// The guest reset a device.
    DeviceReset(DeviceIndex),
    /// The guest powered off or died.
    GuestEnded(Failure),
    /// Somebody wants the guest to stay.
    Cancel,
    /// The blackout does not fit any more, for this reason: back by whichever way is left, at once. Look and
    /// Quiesce are revoked, StopCopy and AwaitReady rolled back; the migration goes on. Nothing happens
    /// where the guest runs, is on its way back, or is committed.
    TakeBack(Failure),
    /// The operator decides what doubt leaves open.
    Operator(Resolve),
    /// Something else failed.
    Fail(Failure),
    /// A limit armed by [`Action::Arm`] struck.
    Timeout(TimeLimit),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A state is entered; comes before the actions of that state.
    Enter(State),
    /// Send on the newest connection.
    Send(Message),
    /// Start every source of dirty pages; answered by `TrackingStarted`.
    StartTracking,
    /// Stop them.
    StopTracking,
    /// Call a device; answered by `CallDone` or `Info`.
    Call(DeviceIndex, DeviceCall),
    /// Read and send a device's stream: in PRE_COPY until there is nothing now, in STOP_COPY to its end.
    Read(DeviceIndex),
    /// Stop reading; chunks under way are still sent.
    StopReading(DeviceIndex),
    /// Pause the vCPUs; answered by `Paused`.
    Pause,
    /// Resume them; answered by `Resumed`.
    Resume,
    /// Collect dirty pages; answered by `Synced`.
    Sync(Sync),
    /// Mark again what was collected and not sent, or sent in an attempt that does not count.
    RestoreDirty,
    /// Send all collected pages; answered by `RamSent`.
    SendFinalRam,
    /// Detach interrupts, save and send the machine state; answered by `MachineStateSaved`.
    SaveMachineState,
    /// Undo the detaching; answered by `Reattached`.
    Reattach,
    /// Send StateEnd with what every channel and device carried.
    SendStateEnd(Attempt),
    /// Hash memory and devices here and there and compare; answered by `Verified`.
    Verify(Attempt),
    /// Decide; answered by `Verdict`.
    Judge(Point),
    /// Write a decision down; answered by `Recorded`.
    Record(Decision, Attempt),
    /// Start a time limit.
    Arm(TimeLimit),
    /// Forget it.
    Disarm(TimeLimit),
    /// Connect again and again until the doubt is resolved.
    Reconnect,
    /// Tell people.
    Report(Notice),
    /// The end.
    Finish(Outcome),
}

/// What people are told, apart from states.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// New initial data was announced; `late` when the vCPUs were already stopped.
    Reinit {
        /// The device.
        device: DeviceIndex,
        /// The new session.
        session: Session,
        /// After the decision to switch over.
        late: bool,
    },
    /// A session's initial data is loaded at the destination.
    Acked {
        /// The device.
        device: DeviceIndex,
        /// The session.
        session: Session,
    },
    /// An acknowledgement of a session that is over was ignored.
    StaleAck {
        /// The device.
        device: DeviceIndex,
        /// The session.
        session: Session,
    },
    /// New initial data is taken along with the vCPUs stopped.
    Absorbing(Attempt),
    /// The switchover was taken back.
    Revoked(Attempt),
    /// It is being rolled back.
    RollingBack {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: Failure,
    },
    /// It was rolled back: the guest runs here again.
    RolledBack(Attempt),
    /// The guest's device lost its state in a reset.
    DeviceStateLost {
        /// The device.
        device: DeviceIndex,
        /// What led to it.
        failure: Failure,
    },
    /// The device is gone altogether.
    DeviceLost {
        /// The device.
        device: DeviceIndex,
        /// Why.
        failure: Failure,
    },
    /// A cancel came after the point of no return.
    CancelTooLate,
    /// The destination has no answer that ends doubt.
    NoAnswer(Option<Failure>),
    /// The operator's decision is obeyed.
    Resolved(Resolve),
    /// It is not, and why.
    ResolveRefused(String),
    /// The destination says that the guest runs there while it runs here, by the operator's decision.
    RunsThereToo(Attempt),
}

/// What the machine is told at the start.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Setup {
    /// The migration's id.
    pub migration: Id,
    /// This process's id.
    pub instance: Id,
    /// What this side can do.
    pub features: Features,
    /// The body of Describe.
    pub description: String,
    /// The devices, in the order of Describe.
    pub devices: Vec<DeviceTraits>,
    /// Stop after the comparison.
    pub dry_run: bool,
}
