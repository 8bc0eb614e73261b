//! The message-signalled vectors of a function: an eventfd each, wired to the device once, and routed to
//! the guest while the vector is unmasked.
//!
//! ```text
//!   device ──> eventfd ──(connection, while unmasked)──> guest
//!                 └─ count not zero while masked = pending
//! ```
//!
//! An event that comes while no connection stands stays in the eventfd's count. The count *is* the
//! pending bit, so masking, unmasking, saving and going on lose nothing and need no copying; unmasking
//! delivers once, however many events came.

use crate::body::{InterruptController, IrqConnection, MsiMessage};
use crate::error::Result;
use crate::pci::signal::Signal;

/// The vectors of one interrupt index.
#[derive(Default)]
pub struct Vectors {
    list: Vec<Vector>,
}

struct Vector {
    event: Signal,
    route: Option<Route>,
}

struct Route {
    message: MsiMessage,
    connection: Box<dyn IrqConnection>,
}

impl Vectors {
    /// `count` vectors, none routed.
    pub fn new(count: usize) -> Result<Self> {
        let vector = |_| Ok(Vector { event: Signal::new()?, route: None });
        Ok(Self { list: (0..count).map(vector).collect::<Result<_>>()? })
    }

    /// Number of vectors.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// The eventfds, by vector.
    pub fn events(&self) -> impl Iterator<Item = &Signal> {
        self.list.iter().map(|vector| &vector.event)
    }

    /// An event of `vector` waits for a route.
    pub fn is_pending(&self, vector: usize) -> bool {
        self.list.get(vector).is_some_and(|v| v.route.is_none() && v.event.is_raised())
    }

    /// Makes `vector` pending.
    pub fn set_pending(&self, vector: usize) {
        if let Some(vector) = self.list.get(vector) {
            vector.event.raise();
        }
    }

    /// Forgets what is pending.
    pub fn clear_pending(&self) {
        for vector in self.list.iter().filter(|vector| vector.route.is_none()) {
            vector.event.take();
        }
    }

    /// Routes `vector` to `message`, or to nowhere. What is pending is delivered by a new route.
    pub fn route(
        &mut self,
        vector: usize,
        message: Option<MsiMessage>,
        interrupts: &dyn InterruptController,
    ) -> Result<()> {
        let Some(Vector { event, route }) = self.list.get_mut(vector) else { return Ok(()) };
        let Some(message) = message else {
            *route = None;
            return Ok(());
        };
        match route {
            Some(route) if route.message == message => {}
            Some(route) => {
                route.connection.update_msi(message)?;
                route.message = message;
            }
            None => {
                let connection =
                    interrupts.connect_msi(std::os::fd::AsFd::as_fd(event), message)?;
                *route = Some(Route { message, connection });
            }
        }
        Ok(())
    }
}
