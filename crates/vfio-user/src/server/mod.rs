//! The server: serves a device to one client at a time.
//!
//! ```text
//!   accept ── negotiate ── Session::run ── clean up ── accept …
//!                             │ next_command() → execute → reply
//!                             └ device threads: DMA_READ / DMA_WRITE over the twin socket, or the same
//! ```
//!
//! **Order.** Commands are worked off in the order of their arrival, as the protocol says. So a region
//! access waits behind a state change, a data read or a PRECOPY_INFO that came before it, for as long
//! as that one device call takes and no longer: the server itself adds no waiting, and every command is
//! one device call (a write one per part that the device takes). Clients keep data reads small while
//! the guest runs, see [`client`](crate::client).
//!
//! **Disconnect.** The client's memory is unmapped, its eventfds are dropped, its DMA log is closed.
//! The device keeps its state, a data session included. A client that waits for its turn gets it then.
//!
//! **Distrust.** Lengths are bounded before memory is taken; what is wrong inside of a whole message is
//! refused with an errno, what makes the stream unreadable closes this connection, with the reason in
//! the log, and nothing else.
//!
//! | file | holds |
//! |---|---|
//! | `options` | [`ServerOptions`] |
//! | `negotiate` | VERSION, what is offered |
//! | `link` | the sockets, shared by the command thread and DMA callers |
//! | `session` | one connection: dispatch, replies, cleaning up |
//! | `function` | shape, regions, interrupts, DMA map, reset |
//! | `feature`, `logging` | DEVICE_FEATURE |
//! | `data` | data stream, precopy information and how REINIT is kept, digest |
//! | [`breaks`] | rules broken on purpose, for tests of tests |
//! | `memory` | the client's memory as the device reaches it |
//! | `stop` | [`StopHandle`], [`RunningServer`] |

pub mod breaks;

mod data;
mod feature;
mod function;
mod link;
mod logging;
mod memory;
mod negotiate;
mod options;
mod session;
mod stop;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration::{DeviceCapabilities, MigratableDevice, PciFunction};

pub use options::ServerOptions;
pub use stop::{RunningServer, StopHandle};

use crate::codec::header::message_limit_bytes;
use crate::error::VfioUserError;
use crate::wire::{Channel, wait_readable};
use link::Link;
use session::Session;

/// libvfio-user receives bodies with one recv(): 32 KiB of data behind the fixed part always came whole.
const COMPAT_PAYLOAD_BYTES_MAX: usize = (32 << 10) + 64;

/// Pause after a failed accept, such as for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What is served. Both handles speak of one device; the server calls both from one thread.
pub struct ServedDevice {
    /// The migration side; `None` for a device that cannot be migrated. Its
    /// [`precopy_info_v2`](DeviceCapabilities::precopy_info_v2) says whether the opt-in is there to be
    /// made; its `reset` resets the whole function.
    pub migration: Option<Box<dyn MigratableDevice>>,
    /// The function.
    pub pci: Arc<dyn PciFunction>,
}

impl ServedDevice {
    /// The capabilities of the migration side, where it is served.
    fn capabilities(&self, options: &ServerOptions) -> Option<DeviceCapabilities> {
        let migration = self.migration.as_ref().filter(|_| options.migration);
        migration.map(|migration| migration.capabilities())
    }
}

/// What outlives a connection.
#[derive(Debug, Default)]
struct Kept {
    /// A REINIT that the client may not have seen yet.
    reinit: bool,
    /// The device was opted in to INFOv2, by whichever client.
    device_opted_in: bool,
    /// Where data is read to, kept so that it need not be allocated again.
    read_buffer: Vec<u8>,
    /// What broken rules keep.
    broken: breaks::Broken,
}

/// A bound server.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: Option<PathBuf>,
    options: ServerOptions,
    stop: StopHandle,
}

impl Server {
    /// Binds the socket at `path`. A stale socket file there is replaced, a live one refused.
    pub fn bind(path: &Path, options: ServerOptions) -> Result<Self, VfioUserError> {
        let bound = |source| VfioUserError::Bind { path: path.into(), source };
        remove_stale(path).map_err(bound)?;
        let listener = UnixListener::bind(path).map_err(bound)?;
        let mut server = Self::from_listener(listener, options)?;
        server.path = Some(path.into());
        Ok(server)
    }

    /// Serves at a socket that is bound already; its file, if any, is the caller's to remove.
    pub fn from_listener(
        listener: UnixListener,
        options: ServerOptions,
    ) -> Result<Self, VfioUserError> {
        let io = |source| VfioUserError::Io { what: "vfio-user server", source };
        listener.set_nonblocking(true).map_err(io)?;
        Ok(Self { listener, path: None, options, stop: StopHandle::new().map_err(io)? })
    }

    /// A handle that ends [`run`](Self::run) from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Serves `device`, one client after the other, until stopped. The device keeps its state between
    /// clients.
    pub fn run(&self, device: &mut ServedDevice) -> Result<(), VfioUserError> {
        let _span = tracing::info_span!("vfio_user_server", name = %self.options.name).entered();
        let mut kept = Kept::default();
        while let Some(stream) = self.accept()? {
            tracing::info!("client connected");
            match self.serve(stream, device, &mut kept) {
                Ok(reason) => tracing::info!(reason, "client disconnected"),
                Err(reason) => tracing::warn!(reason, "connection refused"),
            }
            self.stop.forget_streams();
        }
        Ok(())
    }

    /// [`run`](Self::run) on a thread of its own.
    pub fn spawn(self, device: ServedDevice) -> Result<RunningServer, VfioUserError> {
        RunningServer::start(self, device)
    }

    /// The next client; `None` once stopped.
    fn accept(&self) -> Result<Option<UnixStream>, VfioUserError> {
        let io = |source| VfioUserError::Io { what: "waiting for a client", source };
        loop {
            if self.stop.is_stopped() {
                return Ok(None);
            }
            wait_readable([Some(self.listener.as_fd()), Some(self.stop.as_fd())], None)
                .map_err(io)?;
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).map_err(io)?;
                    return Ok(Some(stream));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    let deadline = Some(Instant::now() + ACCEPT_RETRY);
                    wait_readable([None, Some(self.stop.as_fd())], deadline).map_err(io)?;
                }
            }
        }
    }

    /// One connection; answers why it ended, as an error where it never began.
    fn serve(
        &self,
        stream: UnixStream,
        device: &mut ServedDevice,
        kept: &mut Kept,
    ) -> Result<String, String> {
        let options = &self.options;
        let socket = |error: io::Error| format!("socket: {error}");
        let fds_max = negotiate::fds_max(options);
        let channel = Channel::new(stream, fds_max, options.stall_timeout).map_err(socket)?;
        self.stop.watch(channel.try_clone_stream().map_err(socket)?);
        let capabilities = device.capabilities(options);
        let mut agreed = negotiate::negotiate(&channel, options, capabilities.as_ref())?;
        channel.set_send_buffer(agreed.max_data_xfer_bytes).map_err(socket)?;
        let limit_bytes = message_limit_bytes(agreed.max_data_xfer_bytes);
        let twin = agreed.twin.take();
        let link = Arc::new(Link::main(channel, limit_bytes));
        let dma_link = match twin {
            Some(twin) => {
                self.stop.watch(twin.try_clone_stream().map_err(socket)?);
                Arc::new(Link::twin(twin, limit_bytes))
            }
            None => Arc::clone(&link),
        };
        tracing::debug!(
            max_data_xfer_bytes = agreed.max_data_xfer_bytes,
            twin_socket = !Arc::ptr_eq(&link, &dma_link),
            "negotiated"
        );
        Ok(Session::new(device, kept, options, &agreed, link, dma_link).run())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Someone may have removed it before.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes a socket file that nobody listens at. Anything else stays, and binding fails on it.
fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Ok(());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}
