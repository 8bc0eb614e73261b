//! Ending a server from outside, and a server on its own thread.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::{ServedDevice, Server};
use crate::error::VfioUserError;

/// Ends a server; clones end the same one.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    stopped: AtomicBool,
    /// Wakes the accepting thread; never read, so it stays readable.
    wake: EventFd,
    /// The sockets of the connection that is being served.
    streams: Mutex<Vec<UnixStream>>,
}

impl StopHandle {
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        let (stopped, streams) = (AtomicBool::new(false), Mutex::default());
        Ok(Self(Arc::new(Shared { stopped, wake, streams })))
    }

    /// Closes the connection, if any, and ends [`Server::run`]. A device call under way is waited for,
    /// but DMA of it fails at once.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::Release);
        // Full is as readable as it gets.
        let _ = self.0.wake.write(1);
        for stream in self.lock().iter() {
            // Closed already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as this handle is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.wake.as_raw_fd()) }
    }

    /// Enters a socket of the connection that is being served; it is shut down at once where the stop came
    /// first.
    pub(super) fn watch(&self, stream: UnixStream) {
        let mut streams = self.lock();
        if self.is_stopped() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        streams.push(stream);
    }

    pub(super) fn forget_streams(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<UnixStream>> {
        self.0.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Ended = (ServedDevice, Result<(), VfioUserError>);

/// A server on its own thread; dropping it stops it.
#[derive(Debug)]
pub struct RunningServer {
    stop: StopHandle,
    thread: Option<JoinHandle<Ended>>,
}

impl RunningServer {
    pub(super) fn start(server: Server, mut device: ServedDevice) -> Result<Self, VfioUserError> {
        let stop = server.stop_handle();
        let thread = std::thread::Builder::new().name("vfio-user-server".into());
        let thread = thread.spawn(move || {
            let result = server.run(&mut device);
            (device, result)
        });
        let thread =
            thread.map_err(|source| VfioUserError::Io { what: "server thread", source })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// A handle that ends the server from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Stops the server and gives the device back.
    pub fn stop(mut self) -> Result<ServedDevice, VfioUserError> {
        self.stop.stop();
        let panicked = || VfioUserError::Io {
            what: "server thread",
            source: io::Error::other("the device panicked"),
        };
        let thread = self.thread.take().ok_or_else(panicked)?;
        let (device, result) = thread.join().map_err(|_| panicked())?;
        result.map(|()| device)
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the device was printed where it happened.
            let _ = thread.join();
        }
    }
}
