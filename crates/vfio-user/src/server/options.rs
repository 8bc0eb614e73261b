//! [`ServerOptions`]: what a server offers, and whose quirks it shows.

use std::time::Duration;

use super::breaks::Breaks;

/// What a server offers. The default offers everything the device has.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Name in logs.
    pub name: String,
    /// Behave as libvfio-user does: padded MIG_DATA_READ replies, EINVAL for features 9 and 12 and all
    /// unknown commands, no P2P, few commands in STOP and STOP_COPY, a reset that keeps the migration
    /// state, error replies with a body, and death of the connection on writes above 32 KiB.
    pub libvfio_user_compat: bool,
    /// Rules that are broken on purpose, for tests of tests.
    pub breaks: Breaks,
    /// Offer migration at all.
    pub migration: bool,
    /// Offer PRE_COPY, if the device has it.
    pub pre_copy: bool,
    /// Offer the P2P states, if the device has them.
    pub p2p: bool,
    /// Offer PRECOPY_INFO.
    pub precopy_info: bool,
    /// Offer the INFOv2 opt-in (REINIT).
    pub reinit: bool,
    /// Offer MIG_DATA_SIZE.
    pub data_size: bool,
    /// Offer DMA logging.
    pub dma_logging: bool,
    /// Offer the state digest.
    pub state_digest: bool,
    /// Grant a second socket for DMA_READ and DMA_WRITE to a client that asks for it.
    pub twin_socket: bool,
    /// The most data of one message, in bytes.
    pub max_data_xfer_bytes: usize,
    /// The most file descriptors of one message.
    pub max_msg_fds: usize,
    /// Limit of a DMA_READ or DMA_WRITE to the client.
    pub dma_timeout: Duration,
    /// A client that stops in the middle of a message, or does not take a reply, for so long is
    /// disconnected.
    pub stall_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            name: "device".into(),
            libvfio_user_compat: false,
            breaks: Breaks::default(),
            migration: true,
            pre_copy: true,
            p2p: true,
            precopy_info: true,
            reinit: true,
            data_size: true,
            dma_logging: true,
            state_digest: true,
            twin_socket: true,
            max_data_xfer_bytes: 1 << 20,
            max_msg_fds: 64,
            dma_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
        }
    }
}
