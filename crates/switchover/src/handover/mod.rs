//! The handover of a guest between two hosts: one pair of finite state machines.
//!
//! ```text
//!  Source       Setup → Precopy → Look → Quiesce → StopCopy → AwaitReady → Committed → Done
//!                          ↑        │        │         │           │             └→ InDoubt
//!                          ├─ Revoking ←─────┘         │           │                   │
//!                          └─ RollingBack ←────────────┴───────────┴─── Never ─────────┘
//!               ends: Failed, Cancelled
//!
//!  Destination  Setup → Loading → Prepared → Starting → Running
//!                          ↑ │        │ └→ Expired
//!                          │ │        │       │
//!                          └─── RollBack ─────┘
//!                            └→ Aborted
//! ```
//!
//! From Look and Quiesce a switchover is *revoked*: no device was stopped, no session ends. From StopCopy
//! and AwaitReady it is *rolled back*: the devices' sessions end, what the attempt sent of memory is dirty
//! again, the destination resets its devices, and the same migration tries again. A source in doubt is
//! brought back by `Never` or by its operator, and that ends the migration.
//!
//! What each side has recorded is read back into a machine when its process begins anew:
//! [`source::Source::recovered`], [`destination::Destination::recovered`]. The guest's memory died with the
//! process, so neither of them ever runs the guest; they only answer, or listen.
//!
//! Ids and states only; nothing here measures, waits or decides. A verdict comes in as an event, so a
//! model check can try every one. Both machines are driven by `handle(event)`, which appends actions;
//! every action is answered by an event, and a call that hangs is an event that does not come.

pub mod destination;
mod rules;
pub mod source;

pub use rules::Rules;

/// A device's migration state, as far as the handover needs it (Linux uAPI names).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceState {
    /// Only a reset leaves it.
    Error,
    /// Stopped.
    Stop,
    /// Fully operational.
    Running,
    /// Stopped, its state is read.
    StopCopy,
    /// Stopped, its state is written.
    Resuming,
    /// Running, no new peer-to-peer DMA.
    RunningP2p,
    /// Running, its state is read.
    PreCopy,
    /// `PreCopy`, no new peer-to-peer DMA.
    PreCopyP2p,
}

/// What a device can do, as far as the handover needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceTraits {
    /// It has PRE_COPY.
    pub pre_copy: bool,
    /// It has the P2P states.
    pub p2p: bool,
}

/// A call on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceCall {
    /// SET MIG_DEVICE_STATE.
    SetState(DeviceState),
    /// PRECOPY_INFO and MIG_DATA_SIZE.
    Info,
    /// Reset, then PCI_COMMAND and vectors as the guest had them.
    Reset,
}

/// A decision that must outlive the process; see [`Record`](Decision).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Source: Commit may have been sent.
    Committing,
    /// Destination: everything is here.
    Prepared,
    /// Destination: the guest runs here.
    Running,
    /// Destination: the guest never runs here. Source: nothing came of its Committing.
    Never,
    /// Source: the guest is not here any more, by the destination's word or the operator's.
    Gone,
}

/// What an operator decides where the two sides cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolve {
    /// The guest runs here. On a source in doubt this is refused until the destination's window is surely
    /// over, unless forced; on a destination it is refused where nothing complete is held, and once `never`
    /// is recorded.
    RunHere {
        /// Do not wait for the window. The danger that remains is that the guest already runs there.
        force: bool,
    },
    /// The guest does not run here any more, whatever became of it.
    Discard,
}

/// How a migration ended, for this side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The guest stayed at the source.
    Failed(crate::message::Failure),
    /// The guest stayed at the source because somebody wished so.
    Cancelled,
    /// Only the comparison was wanted, and it fits.
    DryRun,
    /// The operator gave the guest up at a source in doubt.
    Abandoned,
}
