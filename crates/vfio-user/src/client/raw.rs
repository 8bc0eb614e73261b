//! [`RawDevice`]: requests as they are given.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::{DeviceResult, PciFunction};

use super::connection::{Connection, Request};
use super::options::Options;
use super::pci::VfioUserPci;
use crate::codec::Command;
use crate::codec::version::MigrationCapabilities;
use crate::error::VfioUserError;

/// A connection to a server, for tests of servers: nothing is probed, opted in to, checked or kept in
/// step. Closes when it and its [`pci`](Self::pci) are dropped.
pub struct RawDevice {
    connection: Arc<Connection>,
    options: Options,
    announced: MigrationCapabilities,
}

impl RawDevice {
    /// Connects to the server at `path` and negotiates; nothing else is asked.
    pub fn open(path: &Path, options: Options) -> Result<Self, VfioUserError> {
        let (connection, announced) = super::connect(path, &options)?;
        Ok(Self { connection, options, announced })
    }

    /// What the server announced of our extension, unchecked.
    pub fn announced(&self) -> MigrationCapabilities {
        self.announced
    }

    /// The most data of one message, in bytes, as negotiated.
    pub fn max_data_xfer_bytes(&self) -> usize {
        self.connection.shared.limits.max_data_xfer_bytes
    }

    /// Reads the shape of the device, and answers it as a VMM drives it.
    pub fn pci(&self) -> DeviceResult<Arc<dyn PciFunction>> {
        let own_server = self.announced.whole_messages;
        let pci = VfioUserPci::open(Arc::clone(&self.connection), &self.options, own_server)?;
        Ok(Arc::new(pci))
    }

    /// One request. The payload is `fixed` and then `data`; the reply's payload is answered, at most as large
    /// as negotiated.
    ///
    /// # Errors
    /// [`Errno`](vfio_migration::DeviceError::Errno) where the server refuses, and what ends any call.
    pub fn call(
        &self,
        call: &'static str,
        command: Command,
        fixed: &[u8],
        data: &[u8],
        timeout: Option<Duration>,
    ) -> DeviceResult<Vec<u8>> {
        let request = Request { call, command, fixed, data, fds: &[], timeout };
        Ok(self.connection.shared.call(request)?.payload)
    }
}

impl std::fmt::Debug for RawDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawDevice").field("announced", &self.announced).finish_non_exhaustive()
    }
}
