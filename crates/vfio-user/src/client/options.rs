//! [`Options`] of a client.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::DmaAccess;

/// Called once, from whichever thread finds out, with the reason why the server is gone. Must
/// return soon and must not call the device.
pub type LossCallback = Arc<dyn Fn(&str) + Send + Sync>;

/// How a device is opened.
#[derive(Clone)]
pub struct Options {
    /// Serves the server's DMA_READ and DMA_WRITE for memory that was mapped with an fd. Memory
    /// mapped by calls is served by the calls of its mapping. `None`: such requests are refused.
    pub dma_access: Option<Arc<dyn DmaAccess>>,
    /// Told once when the server is gone.
    pub on_loss: Option<LossCallback>,
    /// Ask for a second socket for the server's DMA commands.
    pub twin_socket: bool,
    /// Limit of connecting, negotiating and every set-up call (information, DMA map, interrupts).
    pub setup_timeout: Duration,
    /// Limit of a region access and of a mask or unmask.
    pub region_timeout: Duration,
    /// Limit of a state change and of a reset; `None` = it may take what it takes.
    pub state_timeout: Option<Duration>,
    /// Limit of a query: state, PRECOPY_INFO, MIG_DATA_SIZE, DMA logging, digest.
    pub query_timeout: Option<Duration>,
    /// Limit of one read or write of the data stream. A stream whose read ran into it is dead.
    pub data_timeout: Option<Duration>,
    /// A server that stops in the middle of a message for so long is given up.
    pub stall_timeout: Duration,
    /// The most data of one message, in bytes, that is offered to the server.
    pub max_data_xfer_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dma_access: None,
            on_loss: None,
            twin_socket: true,
            setup_timeout: Duration::from_secs(10),
            region_timeout: Duration::from_secs(5),
            state_timeout: None,
            query_timeout: Some(Duration::from_secs(30)),
            data_timeout: Some(Duration::from_secs(60)),
            stall_timeout: Duration::from_secs(10),
            max_data_xfer_bytes: 1 << 20,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("twin_socket", &self.twin_socket)
            .field("setup_timeout", &self.setup_timeout)
            .field("region_timeout", &self.region_timeout)
            .field("state_timeout", &self.state_timeout)
            .field("query_timeout", &self.query_timeout)
            .field("data_timeout", &self.data_timeout)
            .field("stall_timeout", &self.stall_timeout)
            .field("max_data_xfer_bytes", &self.max_data_xfer_bytes)
            .finish_non_exhaustive()
    }
}
