//! What can go wrong in the VMM.

use std::path::PathBuf;

use migration::{MemoryError, VmmError};
use vfio_migration::DeviceError;

/// Result of a VMM call.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration asks for something impossible.
    #[error("configuration refused: {0}")]
    Config(String),
    /// A system call or ioctl failed.
    #[error("{call}: {source}")]
    Os {
        /// The call.
        call: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The kernel file cannot be booted.
    #[error("{}: cannot be booted: {what}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device failed a call.
    #[error("device {id}: {source}")]
    Device {
        /// The user's name for the device.
        id: String,
        /// The cause.
        source: DeviceError,
    },
    /// A machine-state section cannot be loaded.
    #[error("machine state section {name}: {what}")]
    Section {
        /// The section.
        name: String,
        /// Why.
        what: String,
    },
    /// The call does not fit the VM's state.
    #[error("{0}")]
    State(String),
    /// The guest did not answer, or answered with an error.
    #[error("guest: {0}")]
    Guest(String),
}

impl Error {
    /// The error of the system call that just failed.
    pub fn last_os(call: &'static str) -> Self {
        Self::Os { call, source: std::io::Error::last_os_error() }
    }

    /// As [`Error::Section`].
    pub fn section(name: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Section { name: name.into(), what: what.into() }
    }

    fn errno(&self) -> Option<i32> {
        match self {
            Self::Os { source, .. } => source.raw_os_error(),
            Self::Device { source, .. } => source.errno(),
            _ => None,
        }
    }
}

impl From<Error> for VmmError {
    fn from(error: Error) -> Self {
        Self { errno: error.errno(), what: error.to_string() }
    }
}
