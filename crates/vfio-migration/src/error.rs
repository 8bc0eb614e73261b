//! What can go wrong on a device.

use crate::state::DeviceState;

/// Result of a device call.
pub type DeviceResult<T> = Result<T, DeviceError>;

/// A failed device call. The device's name is added by whoever knows it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device does not offer this at all.
    #[error("{call} is not supported by the device")]
    Unsupported {
        /// The call, in the uAPI's words.
        call: &'static str,
    },
    /// The device refused or failed the call.
    #[error("{call} failed: {}", std::io::Error::from_raw_os_error(*.errno))]
    Errno {
        /// The call, in the uAPI's words.
        call: &'static str,
        /// The errno it answered.
        errno: i32,
    },
    /// The device, or the checks before it, refused the call, and it is known what that means.
    #[error("{call} failed: {}: {why}", std::io::Error::from_raw_os_error(*.errno))]
    Refused {
        /// The call, in the uAPI's words.
        call: &'static str,
        /// The errno, the device's own or the one it would have answered.
        errno: i32,
        /// What is wrong, and what to do about it.
        why: String,
    },
    /// A state change failed and left the device where `state` says (`None`: it could not be asked).
    #[error("SET {target} failed: {}; the device is in {}", std::io::Error::from_raw_os_error(*.errno), state_name(*.state))]
    Transition {
        /// The state that was wanted.
        target: DeviceState,
        /// The state the device is in now, if it could be asked.
        state: Option<DeviceState>,
        /// The errno of the failed SET.
        errno: i32,
    },
    /// The device or its server broke the protocol.
    #[error("{call}: the device broke the protocol: {what}")]
    Protocol {
        /// The call, in the uAPI's words.
        call: &'static str,
        /// What it did.
        what: String,
    },
    /// The device's server is gone; every later call fails in the same way.
    #[error("{call}: the device's server is gone: {reason}")]
    Gone {
        /// The call, in the uAPI's words.
        call: &'static str,
        /// Why, as far as known.
        reason: String,
    },
    /// The call did not answer in time.
    #[error("{call} did not answer within {limit_ms} ms")]
    TimedOut {
        /// The call, in the uAPI's words.
        call: &'static str,
        /// The limit, in ms.
        limit_ms: u64,
    },
    /// An I/O error of the transport.
    #[error("{call}: {source}")]
    Io {
        /// The call, in the uAPI's words.
        call: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}

impl DeviceError {
    /// The errno behind the failure, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Errno { errno, .. }
            | Self::Refused { errno, .. }
            | Self::Transition { errno, .. } => Some(*errno),
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// The device itself is gone, not only this call.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }

    /// The device did not answer in time, and may still.
    pub fn is_time_out(&self) -> bool {
        matches!(self, Self::TimedOut { .. })
    }

    /// The call, in the uAPI's words.
    pub fn call(&self) -> &'static str {
        match self {
            Self::Unsupported { call }
            | Self::Errno { call, .. }
            | Self::Refused { call, .. }
            | Self::Protocol { call, .. }
            | Self::Gone { call, .. }
            | Self::TimedOut { call, .. }
            | Self::Io { call, .. } => call,
            Self::Transition { .. } => "SET MIG_DEVICE_STATE",
        }
    }
}

fn state_name(state: Option<DeviceState>) -> &'static str {
    state.map_or("an unknown state", DeviceState::name)
}
