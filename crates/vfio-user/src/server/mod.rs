//! The server: serves a device to one client at a time.

mod options;

use std::path::Path;
use std::sync::Arc;

use vfio_migration::{MigratableDevice, PciFunction};

pub use options::ServerOptions;

use crate::error::VfioUserError;

/// What is served. Both handles speak of one device; the server calls `migration` from one thread.
pub struct ServedDevice {
    /// The migration side; `None` for a device that cannot be migrated.
    pub migration: Option<Box<dyn MigratableDevice>>,
    /// The function.
    pub pci: Arc<dyn PciFunction>,
}

/// A bound server.
pub struct Server {}

impl Server {
    /// Binds the socket at `path`. A stale socket file there is replaced, a live one refused.
    pub fn bind(path: &Path, _options: ServerOptions) -> Result<Self, VfioUserError> {
        let source = std::io::ErrorKind::Unsupported.into();
        Err(VfioUserError::Bind { path: path.into(), source })
    }

    /// A handle that ends [`run`](Self::run) from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        unreachable!()
    }

    /// Serves `device`, one client after the other, until stopped. The device keeps its state between
    /// clients.
    pub fn run(&self, _device: &mut ServedDevice) -> Result<(), VfioUserError> {
        unreachable!()
    }

    /// [`run`](Self::run) on a thread of its own.
    pub fn spawn(self, _device: ServedDevice) -> Result<RunningServer, VfioUserError> {
        unreachable!()
    }
}

/// Ends a server; clones end the same one.
#[derive(Clone, Debug)]
pub struct StopHandle {}

impl StopHandle {
    /// Closes the connection, if any, and ends [`Server::run`]. A device call under way is waited for.
    pub fn stop(&self) {}
}

/// A server on its own thread; dropping it stops it.
pub struct RunningServer {}

impl RunningServer {
    /// A handle that ends the server from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        unreachable!()
    }

    /// Stops the server and gives the device back.
    pub fn stop(self) -> Result<ServedDevice, VfioUserError> {
        unreachable!()
    }
}
