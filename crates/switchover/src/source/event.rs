//! What goes into the source's brain and what comes out.

use super::*;

/// A device's answer to PRECOPY_INFO, with its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Info {
    /// It answered.
    Known {
        /// Unread initial bytes.
        initial_bytes: u64,
        /// Unread dirty bytes.
        dirty_bytes: u64,
        /// New initial data was announced.
        reinit: bool,
    },
    /// It cannot say.
    Unknown,
}

impl Info {
    /// Sizes that cannot be are as good as no answer (Z3): nobody will ever read that many bytes. New
    /// initial data is believed all the same.
    pub(super) fn credible(self) -> Self {
        match self {
            Self::Known { initial_bytes, dirty_bytes, reinit: false }
                if initial_bytes.max(dirty_bytes) > estimate::CREDIBLE_BYTES_MAX =>
            {
                Self::Unknown
            }
            other => other,
        }
    }
}

/// What happened, with what was measured.
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
    /// A device call other than Info ended.
    CallDone {
        /// The device.
        device: DeviceIndex,
        /// The call.
        call: DeviceCall,
        /// How it ended.
        result: CallResult,
        /// How long it took.
        took: Time,
    },
    /// A device was asked.
    Info {
        /// The device.
        device: DeviceIndex,
        /// Its answer.
        info: Info,
        /// MIG_DATA_SIZE in bytes, where it answered.
        stop_copy_bytes: Option<u64>,
        /// Bytes of its stream read so far.
        offset: u64,
        /// How long the answer took.
        took: Time,
    },
    /// Device bytes were read and sent.
    Progress {
        /// The device.
        device: DeviceIndex,
        /// How many since the last such event.
        bytes: u64,
        /// Time spent in read().
        read: Time,
    },
    /// A read found nothing for now.
    NothingNow {
        /// The device.
        device: DeviceIndex,
        /// Bytes of its stream read so far.
        offset: u64,
    },
    /// STOP_COPY was read to its end and sent.
    StreamEnded {
        /// The device.
        device: DeviceIndex,
    },
    /// The vCPUs are being asked to pause, from now on the guest's time counts.
    PauseRequested,
    /// The vCPUs are paused, or could not be.
    Paused(Answer),
    /// The vCPUs run again, or could not.
    Resumed(Answer),
    /// Dirty pages were collected between passes: so many bytes are to be sent.
    PassSynced {
        /// How long a page could be written, on average, to be among them; `None` = since the sync before.
        exposed: Option<Time>,
        /// Dirty bytes.
        dirty_bytes: u64,
        /// Whether it worked.
        answer: Answer,
    },
    /// Dirty pages were collected with the vCPUs stopped: so many bytes are to be sent.
    Synced {
        /// Which sync.
        sync: Sync,
        /// Dirty bytes.
        dirty_bytes: u64,
        /// How long it took.
        took: Time,
        /// Whether it worked.
        answer: Answer,
    },
    /// A pass was sent, or could not be.
    PassSent(Answer),
    /// A sample of the link's rate: there was always something to send, memory or device data.
    LinkSample {
        /// Bytes that went out.
        bytes: u64,
        /// The time for them.
        busy: Time,
    },
    /// The vCPUs are throttled as asked, or cannot be.
    Throttled(Answer),
    /// The last memory was sent.
    RamSent(Answer),
    /// The machine state is saved and sent.
    MachineStateSaved {
        /// How long it took.
        took: Time,
        /// Whether it worked.
        answer: Answer,
    },
    /// Interrupts are attached again.
    Reattached(Answer),
    /// The independent hashes agree, or not.
    Verified(Answer),
    /// A decision is written, or could not be.
    Recorded(Answer),
    /// The guest reset a device.
    DeviceReset(DeviceIndex),
    /// The guest powered off or died.
    GuestEnded(Failure),
    /// Somebody wants the guest to stay.
    Cancel,
    /// The switchover under way is to be taken back, for this reason; the migration goes on.
    TakeBack(Failure),
    /// The operator decides what doubt leaves open.
    Operator(Resolve),
    /// Somebody changed the downtime limit.
    Limit(Time),
    /// Something else failed.
    Fail(Failure),
}

/// What to do. `Judge`, `Arm` and `Disarm` of the handover are answered inside and never come out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// As the handover says.
    Handover(handover::Action),
    /// Collect dirty pages while the guest runs; answered by `PassSynced`.
    SyncPass,
    /// Send what was collected (all memory for pass 1); answered by `PassSent`.
    SendPass(u64),
    /// Keep the vCPUs from executing for a part of the time, 0 to 99 percent, until said otherwise; answered by
    /// `Throttled`. 0 lets them go.
    SetThrottle {
        /// The part.
        percent: u8,
    },
    /// Best effort: the limit is out of reach at the level of the promise however long one waits, so the next good
    /// moment is taken. For logs and reports.
    OutOfReach(String),
    /// A verdict was reached: for logs and reports.
    Judged {
        /// Where.
        point: Point,
        /// The verdict.
        verdict: Verdict,
        /// The estimate it rests on.
        estimate: Estimate,
        /// Time since the request to pause.
        elapsed: Time,
    },
}
