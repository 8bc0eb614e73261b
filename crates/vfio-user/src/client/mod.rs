//! The client: a device in a server process, as the VMM and the engine drive it.
//!
//! One connection carries region accesses of all vCPUs, set-up calls and the migration stream.
//! Requests of any thread go out as they come; a reader thread matches the replies by msg_id, so a
//! slow call of one thread does not stop another from asking, but the server works in order: see
//! `stream` for how long a region access can be held up.
//!
//! | file | holds |
//! |---|---|
//! | `options` | [`Options`]: time limits, who serves DMA |
//! | `negotiate` | VERSION |
//! | `connection` | requests, replies, the reader threads, loss |
//! | `slot` | a request under way; the caller's buffer lent to the reader |
//! | `memory` | DMA mappings, serving DMA_READ and DMA_WRITE |
//! | `pci` | `PciFunction` |
//! | `feature` | DEVICE_FEATURE, probing |
//! | `migration` | [`VfioUserMigration`]: `MigratableDevice` |
//! | `stream` | chunked reads of the data stream |
//! | `ahead`, `behind` | reads and writes that stay under way between two calls |
//! | `logging` | DMA logging |
//! | `raw` | [`RawDevice`]: requests as they are given, for tests of servers |
//!
//! After the server is gone every call fails with `DeviceError::Gone`. There is no reconnect inside
//! of a handle: open the device anew, map memory and wire interrupts again. Towards an old session
//! that goes on, the new handle assumes a REINIT, because the edge may have been lost with the old
//! connection.

mod ahead;
mod behind;
mod connection;
mod feature;
mod logging;
mod memory;
mod migration;
mod negotiate;
mod options;
mod pci;
mod raw;
mod slot;
mod stream;

use std::path::Path;
use std::sync::Arc;

use vfio_migration::{DeviceResult, PciFunction};

pub use migration::VfioUserMigration;
pub use options::{LossCallback, Options};
pub use raw::RawDevice;

use crate::codec::version::MigrationCapabilities;
use crate::error::VfioUserError;
use crate::wire::{self, Channel};
use connection::Connection;
use pci::VfioUserPci;

/// Connects and negotiates.
fn connect(
    path: &Path,
    options: &Options,
) -> Result<(Arc<Connection>, MigrationCapabilities), VfioUserError> {
    let io = |source| VfioUserError::Io { what: "vfio-user socket", source };
    let stream = wire::connect(path, options.setup_timeout)
        .map_err(|source| VfioUserError::Connect { path: path.into(), source })?;
    let fds_max = negotiate::MAX_MSG_FDS;
    let mut channel = Channel::new(stream, fds_max, options.setup_timeout).map_err(io)?;
    let agreed = negotiate::negotiate(&channel, options)?;
    channel.set_stall_timeout(options.stall_timeout).map_err(io)?;
    channel.set_send_buffer(agreed.limits.max_data_xfer_bytes).map_err(io)?;
    let on_loss = options.on_loss.clone();
    let connection = Connection::start(channel, agreed.twin, agreed.limits, on_loss);
    Ok((Arc::new(connection.map_err(io)?), agreed.migration))
}

/// An open device. Cheap to clone; the connection closes when the last handle, [`pci`](Self::pci) and
/// [`migration`](Self::migration) included, is dropped.
#[derive(Clone)]
pub struct VfioUserDevice {
    connection: Arc<Connection>,
    pci: Arc<VfioUserPci>,
    options: Options,
    announced: MigrationCapabilities,
}

impl std::fmt::Debug for VfioUserDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioUserDevice")
            .field("limits", &self.connection.shared.limits)
            .field("announced", &self.announced)
            .field("lost", &self.connection_lost())
            .finish_non_exhaustive()
    }
}

impl VfioUserDevice {
    /// Connects to the server at `path`, negotiates and reads the shape of the device.
    pub fn open(path: &Path, options: Options) -> Result<Self, VfioUserError> {
        let (connection, announced) = connect(path, &options)?;
        let own_server = announced.whole_messages;
        let pci = Arc::new(VfioUserPci::open(Arc::clone(&connection), &options, own_server)?);
        Ok(Self { connection, pci, options, announced })
    }

    /// The function as the VMM drives it.
    pub fn pci(&self) -> Arc<dyn PciFunction> {
        Arc::clone(&self.pci) as Arc<dyn PciFunction>
    }

    /// The device as the engine drives it. Probes the migration features, opts in to INFOv2 where it is
    /// offered; `Unsupported` where the server has no migration. Take it once: two handles would not know
    /// of each other's sessions.
    pub fn migration(&self) -> DeviceResult<VfioUserMigration> {
        VfioUserMigration::open(Arc::clone(&self.connection), self.options.clone(), self.announced)
    }

    /// Why the server is gone, if it is.
    pub fn connection_lost(&self) -> Option<String> {
        self.connection.shared.lost()
    }

    /// Closes the connection: calls under way and later ones fail with `Gone`. The loss callback is not
    /// called.
    pub fn disconnect(&self) {
        self.connection.shared.close();
    }
}
