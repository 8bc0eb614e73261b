//! The outside of the console: threads that write its output and read its input.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::Serial;
use crate::error::{Error, Result};

/// What may wait for a sink that is slow, in bytes.
const OUTPUT_MAX_BYTES: usize = 1 << 20;
/// How long the end waits for a sink that is slow.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(1);

/// The thread that writes output.
pub(super) struct Output {
    queue: Arc<Queue>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    closed: bool,
    /// Everything is written, or nothing can be any more.
    finished: bool,
}

impl Output {
    pub(super) fn start(sink: Box<dyn Write + Send>) -> Result<Self> {
        let queue = Arc::new(Queue::default());
        let thread = std::thread::Builder::new()
            .name("serial-output".into())
            .spawn({
                let queue = Arc::clone(&queue);
                move || queue.drain(sink)
            })
            .map_err(|source| Error::Os { call: "spawn of the serial thread", source })?;
        Ok(Self { queue, thread: Some(thread) })
    }

    /// Bytes that find no room are lost, as on a line without flow control.
    pub(super) fn send(&self, byte: u8) {
        let mut waiting = self.queue.lock();
        if waiting.bytes.len() < OUTPUT_MAX_BYTES {
            waiting.bytes.push(byte);
            self.queue.changed.notify_all();
        }
    }
}

impl Queue {
    fn drain(&self, mut sink: Box<dyn Write + Send>) {
        loop {
            let mut waiting = self.lock();
            while waiting.bytes.is_empty() && !waiting.closed {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            let bytes = std::mem::take(&mut waiting.bytes);
            if bytes.is_empty() {
                break;
            }
            drop(waiting);
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                tracing::warn!(%error, "the serial console's output is lost from now on");
                break;
            }
        }
        self.lock().finished = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut waiting = self.queue.lock();
        waiting.closed = true;
        self.queue.changed.notify_all();
        let last = self
            .queue
            .changed
            .wait_timeout_while(waiting, OUTPUT_PATIENCE, |waiting| !waiting.finished);
        let finished = last.is_ok_and(|(waiting, _)| waiting.finished);
        // A sink that blocks keeps its thread until the process ends.
        if let Some(thread) = self.thread.take().filter(|_| finished) {
            let _ = thread.join();
        }
    }
}

/// The thread that reads standard input.
pub(super) struct Input {
    stop: EventFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Input {
    pub(super) fn start(serial: Weak<Serial>) -> Result<Self> {
        let stop = EventFd::new(libc::EFD_CLOEXEC)
            .map_err(|source| Error::Os { call: "eventfd", source })?;
        let stopped =
            stop.try_clone().map_err(|source| Error::Os { call: "dup of an eventfd", source })?;
        let thread = std::thread::Builder::new()
            .name("serial-input".into())
            .spawn(move || read_input(&serial, &stopped))
            .map_err(|source| Error::Os { call: "spawn of the serial thread", source })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

fn read_input(serial: &Weak<Serial>, stop: &EventFd) {
    let stdin = std::io::stdin();
    let mut buffer = [0u8; 256];
    loop {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(stdin.as_fd().as_raw_fd()), poll(stop.as_raw_fd())];
        // SAFETY: the array is valid for the call and its length is given.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready < 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted {
            continue;
        }
        if ready < 0 || fds[1].revents != 0 {
            return;
        }
        // SAFETY: the buffer is valid for its length; the descriptor is standard input.
        let read = unsafe {
            libc::read(stdin.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len())
        };
        let Ok(read @ 1..) = usize::try_from(read) else { return };
        let Some(serial) = serial.upgrade() else { return };
        serial.receive(&buffer[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sink that never takes anything.
    struct Stuck;

    impl Write for Stuck {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            loop {
                std::thread::park();
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_sink_that_blocks_holds_nobody() {
        let output = Output::start(Box::new(Stuck)).unwrap();
        (0..2 * OUTPUT_MAX_BYTES).for_each(|_| output.send(b'x'));
        assert!(output.queue.lock().bytes.len() <= OUTPUT_MAX_BYTES);
        drop(output);
    }
}
