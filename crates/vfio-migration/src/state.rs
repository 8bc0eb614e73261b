//! The device states of VFIO migration v2 (Linux uAPI, `enum vfio_device_mig_state`).

use std::fmt;

/// A migration state; the discriminant is the uAPI's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum DeviceState {
    /// The device failed; only a reset leaves this state.
    Error = 0,
    /// No DMA, no interrupts, no internal change; configuration accesses still answer.
    Stop = 1,
    /// Fully operational.
    Running = 2,
    /// As `Stop`, and the state can be read.
    StopCopy = 3,
    /// Stopped, the state is being written.
    Resuming = 4,
    /// Running, starts no new peer-to-peer DMA.
    RunningP2p = 5,
    /// Running, tracks its changes, the state can be read.
    PreCopy = 6,
    /// `PreCopy` and peer-to-peer quiescent.
    PreCopyP2p = 7,
}

impl DeviceState {
    /// Every state, in the order of the uAPI's numbers.
    pub const ALL: [DeviceState; 8] = [
        DeviceState::Error,
        DeviceState::Stop,
        DeviceState::Running,
        DeviceState::StopCopy,
        DeviceState::Resuming,
        DeviceState::RunningP2p,
        DeviceState::PreCopy,
        DeviceState::PreCopyP2p,
    ];

    /// The state with the uAPI's number `raw`; `None` for a number this version does not know (F7, F10).
    pub fn from_raw(raw: u32) -> Option<Self> {
        Self::ALL.get(raw as usize).copied()
    }

    /// The uAPI's number.
    pub fn as_raw(self) -> u32 {
        self as u32
    }

    /// PRE_COPY, PRE_COPY_P2P and STOP_COPY share one data session.
    pub fn is_saving(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p | Self::StopCopy)
    }

    /// PRECOPY_INFO is valid here (P2).
    pub fn is_precopy(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p)
    }

    /// The device executes work in this state.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p)
    }

    /// A peer-to-peer quiescent, still running state.
    pub fn is_p2p(self) -> bool {
        matches!(self, Self::RunningP2p | Self::PreCopyP2p)
    }

    /// The uAPI's name without its prefix, as logs and reports print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        }
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
