//! The eventfds of the VMM.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};

use vfio_migration::{DeviceError, DeviceResult, IrqIndex};

use crate::irq::Fired;
use crate::regs::MSIX_VECTORS;

#[derive(Debug, Default)]
pub(super) struct Eventfds {
    msix: [Option<File>; MSIX_VECTORS as usize],
    intx: Option<File>,
}

impl Eventfds {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn clear_index(&mut self, index: IrqIndex) {
        match index {
            IrqIndex::Intx => self.intx = None,
            IrqIndex::Msix => self.msix = Default::default(),
            _ => {}
        }
    }

    /// Keeps a duplicate of `eventfd`, or drops the one that is there.
    pub(super) fn set(
        &mut self,
        index: IrqIndex,
        vector: u32,
        eventfd: Option<BorrowedFd<'_>>,
    ) -> DeviceResult<()> {
        let call = "SET_IRQS";
        let file = match eventfd.map(|fd| fd.try_clone_to_owned()).transpose() {
            Ok(fd) => fd.map(File::from),
            Err(source) => return Err(DeviceError::Io { call, source }),
        };
        let slot = match index {
            IrqIndex::Intx if vector == 0 => Some(&mut self.intx),
            IrqIndex::Msix => self.msix.get_mut(vector as usize),
            _ => None,
        };
        match slot {
            Some(slot) => *slot = file,
            None => return Err(DeviceError::Errno { call, errno: libc::EINVAL }),
        }
        Ok(())
    }

    pub(super) fn signal(&self, fired: Fired) {
        for (vector, eventfd) in self.msix.iter().enumerate() {
            if fired.msix >> vector & 1 != 0 {
                signal(eventfd.as_ref());
            }
        }
        if fired.intx {
            signal(self.intx.as_ref());
        }
    }
}

/// Adds one to an eventfd. One that would block is full, and so signalled already.
fn signal(eventfd: Option<&File>) {
    let Some(mut eventfd) = eventfd else { return };
    let mut poll = libc::pollfd { fd: eventfd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd for the duration of the call, which does not wait.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    if ready == 1
        && poll.revents & libc::POLLOUT != 0
        && let Err(error) = eventfd.write_all(&1u64.to_ne_bytes())
    {
        tracing::warn!(%error, "signalling an interrupt");
    }
}
