//! What can go wrong in opening or serving a device.

use std::io;
use std::path::PathBuf;

use vfio_migration::DeviceError;

/// A failure of the crate's own: setting a connection up, or serving one. Calls on an open device
/// fail with [`DeviceError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioUserError {
    /// Nothing answers at the path.
    #[error("connect to the device server at {}: {source}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The socket cannot be served at.
    #[error("serve a device at {}: {source}", path.display())]
    Bind {
        /// The socket's path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Client and server do not agree on a version or its capabilities.
    #[error("vfio-user version negotiation: {0}")]
    Version(String),
    /// A call needed to open the device failed.
    #[error("opening the device: {0}")]
    Device(#[from] DeviceError),
    /// An I/O error outside of any call.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}
