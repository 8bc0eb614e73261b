//! An eventfd as interrupts use it: never blocking, readable while its count is not zero.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};

/// A non-blocking eventfd. Its count is the pending state of what it stands for.
#[derive(Debug)]
pub struct Signal(EventFd);

impl Signal {
    /// A new one with count 0.
    pub fn new() -> Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map(Self)
            .map_err(|source| Error::Os { call: "eventfd", source })
    }

    /// Adds one to the count. A count at its maximum says "signalled" already.
    pub fn raise(&self) {
        if let Err(error) = self.0.write(1)
            && error.raw_os_error() != Some(libc::EAGAIN)
        {
            tracing::error!(%error, "an eventfd cannot be written");
        }
    }

    /// Takes the count and leaves zero; answers whether there was any.
    pub fn take(&self) -> bool {
        self.0.read().is_ok_and(|count| count > 0)
    }

    /// The count is not zero; it stays as it is.
    pub fn is_raised(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, and no waiting.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        ready == 1 && poll.revents & libc::POLLIN != 0
    }
}

impl AsFd for Signal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the fd is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsRawFd for Signal {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_stays_until_it_is_taken() {
        let signal = Signal::new().unwrap();
        assert!(!signal.is_raised());
        assert!(!signal.take());
        signal.raise();
        signal.raise();
        assert!(signal.is_raised());
        assert!(signal.is_raised());
        assert!(signal.take());
        assert!(!signal.is_raised());
    }
}
