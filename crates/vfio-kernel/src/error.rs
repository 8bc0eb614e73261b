//! What can go wrong on the way to an open device: [`KernelError`].

use std::io;
use std::path::PathBuf;

use vfio_migration::DeviceError;

/// A device that could not be opened. The texts name the device, the call, its errno and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// What the user wrote does not name a device.
    #[error("{spec}: {why}")]
    Spec {
        /// What was written.
        spec: String,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such device.
    #[error("{spec}: {}: {source}; {remedy}", path.display())]
    NotFound {
        /// What was written.
        spec: String,
        /// Where it was looked for.
        path: PathBuf,
        /// What came.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// The device is driven by something else.
    #[error(
        "{device} is not bound to a VFIO driver (driver: {driver}); bind it to vfio-pci or to its own VFIO driver, \
         for example: driverctl set-override {device} vfio-pci"
    )]
    NotVfio {
        /// The device.
        device: String,
        /// The driver it is bound to.
        driver: String,
    },
    /// Other devices of the group are in use by the host.
    #[error(
        "{device}: group {group} is not viable: every device in it has to be bound to a VFIO driver or to none: {members}"
    )]
    NotViable {
        /// The device.
        device: String,
        /// Its group.
        group: u32,
        /// The devices of the group with their drivers.
        members: String,
    },
    /// A call failed.
    #[error("{device}: {call}: {source}{}{remedy}", if remedy.is_empty() { "" } else { "; " })]
    Call {
        /// The device.
        device: String,
        /// The call, with the node it was made on.
        call: String,
        /// What came.
        source: io::Error,
        /// What to do, as far as known.
        remedy: String,
    },
    /// The device failed a call, or broke the protocol.
    #[error("{device}: {source}")]
    Device {
        /// The device.
        device: String,
        /// What it did.
        source: DeviceError,
    },
}

impl KernelError {
    /// The errno behind the failure, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::NotFound { source, .. } | Self::Call { source, .. } => source.raw_os_error(),
            Self::Device { source, .. } => source.errno(),
            _ => None,
        }
    }
}
