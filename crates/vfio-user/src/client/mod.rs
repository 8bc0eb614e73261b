//! The client: a device in a server process, as the VMM and the engine drive it.

mod options;

use std::path::Path;
use std::sync::Arc;

use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, DeviceState, DmaRange, MigratableDevice,
    PciFunction, PrecopyInfo, ReadOutcome,
};

pub use options::{LossCallback, Options};

use crate::error::VfioUserError;

/// An open device. Cheap to clone; the connection lives until the last handle is dropped.
#[derive(Clone)]
pub struct VfioUserDevice {}

impl VfioUserDevice {
    /// Connects to the server at `path`, negotiates and reads the shape of the device.
    pub fn open(path: &Path, _options: Options) -> Result<Self, VfioUserError> {
        let source = std::io::ErrorKind::Unsupported.into();
        Err(VfioUserError::Connect { path: path.into(), source })
    }

    /// The function as the VMM drives it.
    pub fn pci(&self) -> Arc<dyn PciFunction> {
        unreachable!()
    }

    /// The device as the engine drives it. Probes the migration features; `Unsupported` where the
    /// server has none. Take it once: two handles would not know of each other's sessions.
    pub fn migration(&self) -> DeviceResult<VfioUserMigration> {
        Err(DeviceError::Unsupported { call: "MIGRATION" })
    }

    /// Why the server is gone, if it is.
    pub fn connection_lost(&self) -> Option<String> {
        None
    }

    /// Closes the connection: calls under way and later ones fail with `Gone`.
    pub fn disconnect(&self) {}
}

/// The migration side of a device; see [`VfioUserDevice::migration`].
pub struct VfioUserMigration {}

impl MigratableDevice for VfioUserMigration {
    fn capabilities(&self) -> DeviceCapabilities {
        unreachable!()
    }
    fn state(&mut self) -> DeviceResult<DeviceState> {
        unreachable!()
    }
    fn set_state(&mut self, _target: DeviceState) -> DeviceResult<()> {
        unreachable!()
    }
    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        unreachable!()
    }
    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        unreachable!()
    }
    fn read(&mut self, _buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        unreachable!()
    }
    fn write(&mut self, _buf: &[u8]) -> DeviceResult<usize> {
        unreachable!()
    }
    fn start_dma_logging(&mut self, _ranges: &[DmaRange], _page_size: u64) -> DeviceResult<u64> {
        unreachable!()
    }
    fn reset(&mut self) -> DeviceResult<()> {
        unreachable!()
    }
}
