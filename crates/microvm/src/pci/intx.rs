//! The legacy line of a function.
//!
//! A level-triggered line needs more than an eventfd: the device masks itself when it asserts, the guest's
//! acknowledgement lowers the line, and only then may the device assert again. One thread stands in
//! between, so the VMM always knows whether the line is high:
//!
//! ```text
//!   device ──> event ──[thread: level = high]──> trigger ──> guest
//!   device <──unmask───[thread: level = low ]<── resample <── EOI
//! ```

use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vfio_migration::{IrqIndex, PciFunction};

use crate::body::{InterruptController, IrqConnection};
use crate::error::{Error, Result};
use crate::pci::signal::Signal;

/// The line of one function.
pub struct Intx {
    shared: Arc<Shared>,
    connection: Option<Box<dyn IrqConnection>>,
    gsi: u32,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    event: Signal,
    trigger: Signal,
    resample: Signal,
    wake: Signal,
    line: Mutex<Line>,
    function: Arc<dyn PciFunction>,
    unmask: bool,
}

#[derive(Default)]
struct Line {
    connected: bool,
    high: bool,
    stop: bool,
}

impl Intx {
    /// The line of `function`, raising `gsi`; not connected yet.
    pub fn new(id: &str, function: Arc<dyn PciFunction>, gsi: u32) -> Result<Self> {
        let info = function.info().irqs.get(IrqIndex::Intx as usize).copied().unwrap_or_default();
        let shared = Arc::new(Shared {
            event: Signal::new()?,
            trigger: Signal::new()?,
            resample: Signal::new()?,
            wake: Signal::new()?,
            line: Mutex::default(),
            function,
            unmask: info.automasked || info.maskable,
        });
        let thread = std::thread::Builder::new()
            .name(format!("intx-{id}"))
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.run()
            })
            .map_err(|source| Error::Os { call: "spawning the INTx thread", source })?;
        Ok(Self { shared, connection: None, gsi, thread: Some(thread) })
    }

    /// The eventfd that the device signals.
    pub fn event(&self) -> &Signal {
        &self.shared.event
    }

    /// The line is high, or the device asserted it while it was not connected.
    pub fn is_high(&self) -> bool {
        self.shared.lock().high || self.shared.event.is_raised()
    }

    /// Sets the level that the guest has not acknowledged yet; delivered when the line is connected.
    pub fn set_high(&self, high: bool) {
        self.shared.lock().high = high;
        if !high {
            self.shared.event.take();
        }
    }

    /// Connects the line to the guest: what is high is delivered, and a device that may still be masked
    /// is unmasked, so that it asserts again if it wants service.
    pub fn connect(&mut self, interrupts: &dyn InterruptController) -> Result<()> {
        if self.connection.is_some() {
            return Ok(());
        }
        self.shared.resample.take();
        let high = self.shared.lock().high;
        if high {
            self.shared.trigger.raise();
        }
        let (trigger, resample) = (self.shared.trigger.as_fd(), self.shared.resample.as_fd());
        self.connection = Some(interrupts.connect_intx(trigger, resample, self.gsi)?);
        self.shared.lock().connected = true;
        if !high {
            self.shared.unmask();
        }
        self.shared.wake.raise();
        Ok(())
    }

    /// Disconnects the line. What the guest acknowledged until now is taken in; what the device asserts
    /// from now on stays in its eventfd.
    pub fn disconnect(&mut self) {
        if self.connection.is_none() {
            return;
        }
        self.shared.lock().connected = false;
        self.connection = None;
        if self.shared.resample.take() {
            self.shared.lock().high = false;
        }
    }
}

impl Drop for Intx {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let (listen, take_event) = {
                let line = self.lock();
                if line.stop {
                    return;
                }
                (line.connected, line.connected && !line.high)
            };
            // A negative fd is skipped by poll.
            let when = |on: bool, signal: &Signal| libc::pollfd {
                fd: if on { signal.as_raw_fd() } else { -1 },
                events: libc::POLLIN,
                revents: 0,
            };
            let mut polls = [
                when(true, &self.wake),
                when(listen, &self.resample),
                when(take_event, &self.event),
            ];
            // SAFETY: three valid pollfds.
            let ready = unsafe { libc::poll(polls.as_mut_ptr(), 3, -1) };
            if ready <= 0 {
                continue;
            }
            self.wake.take();
            if polls[1].revents != 0 {
                self.acknowledged();
            }
            if polls[2].revents != 0 {
                self.asserted();
            }
        }
    }

    /// The guest acknowledged the interrupt.
    fn acknowledged(&self) {
        let mut line = self.lock();
        if line.connected && self.resample.take() {
            line.high = false;
            drop(line);
            self.unmask();
        }
    }

    /// The device asserted the line.
    fn asserted(&self) {
        let mut line = self.lock();
        if line.connected && !line.high && self.event.take() {
            line.high = true;
            self.trigger.raise();
        }
    }

    fn unmask(&self) {
        if !self.unmask {
            return;
        }
        if let Err(error) = self.function.set_irq_masked(IrqIndex::Intx, 0, false) {
            tracing::debug!(%error, "INTx cannot be unmasked");
        }
    }
}
