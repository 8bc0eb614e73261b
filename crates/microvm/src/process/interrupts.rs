//! The interrupt controller of the process guest.
//!
//! Messages and lines set bits in the *interrupt request register* of a vCPU, as a LAPIC has it; the vCPU's
//! thread takes them between two steps. One thread listens to all connected eventfds:
//!
//! ```text
//!   device ──> eventfd ──[thread]──> request bit of a vCPU ──> taken between two steps
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::body::{InterruptController, IrqConnection, MsiMessage};
use crate::error::{Error, Result};
use crate::pci::signal::Signal;
use crate::workload::WORKLOAD_VCPUS_MAX;

/// Vector of the INTx of PCI slot 1, line 16; the others follow.
pub const VECTOR_INTX: u8 = 0x38;
/// Line of PCI slot 1.
const FIRST_INTX_LINE: u32 = 16;
/// Lines of PCI.
const INTX_LINES: u32 = 8;

/// The request bits of one vCPU, by vector.
pub type Requests = [u64; 4];

/// Interrupts of the process guest.
#[derive(Debug)]
pub struct ProcessInterrupts {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    requests: Vec<[AtomicU64; 4]>,
    epoll: OwnedFd,
    end: Signal,
    connections: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    /// Never used twice: an event that the thread holds in its hands must not hit a later connection.
    next: u64,
    list: BTreeMap<u64, Connected>,
}

#[derive(Debug)]
struct Connected {
    trigger: OwnedFd,
    to: To,
}

#[derive(Debug)]
enum To {
    Message(MsiMessage),
    Line { gsi: u32, resample: OwnedFd },
}

/// Stands for the `end` signal in epoll.
const END: u64 = u64::MAX;

impl ProcessInterrupts {
    /// A controller with nothing connected.
    pub fn new() -> Result<Arc<Self>> {
        // SAFETY: a system call with one integer argument.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(Error::last_os("epoll_create1"));
        }
        // SAFETY: a new fd that nobody else owns.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let requests = (0..WORKLOAD_VCPUS_MAX).map(|_| Default::default()).collect();
        let connections = Mutex::default();
        let shared = Arc::new(Shared { requests, epoll, end: Signal::new()?, connections });
        shared.listen(shared.end.as_raw_fd(), END)?;
        let thread = std::thread::Builder::new()
            .name("interrupts".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.run()
            })
            .map_err(|source| Error::Os { call: "spawning the interrupt thread", source })?;
        Ok(Arc::new(Self { shared, thread: Some(thread) }))
    }

    /// Takes the requests of `vcpu`.
    pub fn take(&self, vcpu: usize) -> Requests {
        match self.shared.requests.get(vcpu) {
            Some(words) => std::array::from_fn(|i| match words[i].load(Ordering::Relaxed) {
                0 => 0,
                _ => words[i].swap(0, Ordering::AcqRel),
            }),
            None => [0; 4],
        }
    }

    /// The requests of `vcpu`, left where they are.
    pub fn requests(&self, vcpu: usize) -> Requests {
        let words = self.shared.requests.get(vcpu);
        words.map_or([0; 4], |words| std::array::from_fn(|i| words[i].load(Ordering::Acquire)))
    }

    /// Sets the requests of `vcpu`, keeping those that are there.
    pub fn add_requests(&self, vcpu: usize, requests: Requests) {
        let Some(words) = self.shared.requests.get(vcpu) else { return };
        for (word, requests) in words.iter().zip(requests) {
            word.fetch_or(requests, Ordering::AcqRel);
        }
    }

    /// The guest is done with the interrupt of line `gsi`: whoever drives it is told to look again.
    pub fn end_of_interrupt(&self, gsi: u32) {
        let connections = self.shared.lock();
        for connected in connections.list.values() {
            if let To::Line { gsi: line, resample } = &connected.to
                && *line == gsi
            {
                signal(resample);
            }
        }
    }

    fn connect(&self, trigger: BorrowedFd<'_>, to: To) -> Result<Box<dyn IrqConnection>> {
        let trigger = duplicate(trigger)?;
        let mut connections = self.shared.lock();
        let id = connections.next;
        connections.next += 1;
        self.shared.listen(trigger.as_raw_fd(), id)?;
        connections.list.insert(id, Connected { trigger, to });
        // What is in the eventfd already.
        self.shared.deliver(&connections, id);
        drop(connections);
        Ok(Box::new(Connection { shared: Arc::clone(&self.shared), id }))
    }
}

impl Drop for ProcessInterrupts {
    fn drop(&mut self) {
        self.shared.end.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl InterruptController for ProcessInterrupts {
    fn connect_msi(
        &self,
        trigger: BorrowedFd<'_>,
        message: MsiMessage,
    ) -> Result<Box<dyn IrqConnection>> {
        self.connect(trigger, To::Message(message))
    }

    fn connect_intx(
        &self,
        trigger: BorrowedFd<'_>,
        resample: BorrowedFd<'_>,
        gsi: u32,
    ) -> Result<Box<dyn IrqConnection>> {
        self.connect(trigger, To::Line { gsi, resample: duplicate(resample)? })
    }

    fn inject_msi(&self, message: MsiMessage) -> Result<()> {
        self.shared.request(message);
        Ok(())
    }

    /// Only the lines of PCI lead anywhere.
    fn set_line(&self, gsi: u32, high: bool) -> Result<()> {
        if high {
            self.shared.request_line(gsi);
        }
        Ok(())
    }
}

struct Connection {
    shared: Arc<Shared>,
    id: u64,
}

impl IrqConnection for Connection {
    fn update_msi(&self, message: MsiMessage) -> Result<()> {
        match self.shared.lock().list.get_mut(&self.id) {
            Some(Connected { to: To::Message(current), .. }) => {
                *current = message;
                Ok(())
            }
            _ => Err(Error::State("an INTx connection has no message".into())),
        }
    }
}

impl Drop for Connection {
    /// The lock is held by whoever delivers: when it is ours, no delivery is under way.
    fn drop(&mut self) {
        if let Some(connected) = self.shared.lock().list.remove(&self.id) {
            self.shared.forget(connected.trigger.as_raw_fd());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, fd: i32, id: u64) -> Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: id };
        // SAFETY: both fds are open and the event is valid.
        let result = unsafe {
            libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event)
        };
        if result < 0 { Err(Error::last_os("epoll_ctl")) } else { Ok(()) }
    }

    fn forget(&self, fd: i32) {
        // SAFETY: both fds are open; the event is ignored.
        unsafe {
            libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut())
        };
    }

    fn run(&self) {
        const EVENTS: usize = 32;
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        loop {
            // SAFETY: the array is as long as told.
            let count = unsafe {
                libc::epoll_wait(
                    self.epoll.as_raw_fd(),
                    events.as_mut_ptr(),
                    EVENTS as libc::c_int,
                    -1,
                )
            };
            if count < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    tracing::error!(%error, "interrupts end: epoll_wait failed");
                    return;
                }
            }
            let connections = self.lock();
            for event in events.iter().take(count.max(0) as usize) {
                match event.u64 {
                    END => return,
                    id => self.deliver(&connections, id),
                }
            }
        }
    }

    fn deliver(&self, connections: &Connections, id: u64) {
        let Some(connected) = connections.list.get(&id) else { return };
        if !take(&connected.trigger) {
            return;
        }
        match connected.to {
            To::Message(message) => self.request(message),
            To::Line { gsi, .. } => self.request_line(gsi),
        }
    }

    /// Sets the request bit that `message` names: destination in address bits 12 to 19, vector in data
    /// bits 0 to 7. A message to a vCPU that does not exist is lost, as on hardware.
    fn request(&self, message: MsiMessage) {
        let vcpu = (message.addr >> 12 & 0xff) as usize;
        let vector = message.data & 0xff;
        if let Some(words) = self.requests.get(vcpu).filter(|_| message.addr >> 20 == 0xfee) {
            words[(vector / 64) as usize].fetch_or(1 << (vector % 64), Ordering::AcqRel);
        }
    }

    fn request_line(&self, gsi: u32) {
        let line = gsi.wrapping_sub(FIRST_INTX_LINE);
        if line < INTX_LINES {
            let data = u32::from(VECTOR_INTX) + line;
            self.request(MsiMessage { addr: 0xfee0_0000, data });
        }
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    fd.try_clone_to_owned().map_err(|source| Error::Os { call: "dup of an eventfd", source })
}

/// Takes the count of a non-blocking eventfd.
fn take(fd: &OwnedFd) -> bool {
    let mut count = 0u64;
    // SAFETY: 8 bytes of our own.
    let read = unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
    read == 8
}

fn signal(fd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: 8 bytes of our own. A full count says "signalled" already.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const MESSAGE: MsiMessage = MsiMessage { addr: 0xfee0_1000, data: 0x41 };

    fn until(mut done: impl FnMut() -> bool) {
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !done() {
            assert!(std::time::Instant::now() < limit, "it never came");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_signal_sets_the_bit_of_its_message_and_taking_clears_it() {
        let interrupts = ProcessInterrupts::new().unwrap();
        let event = Signal::new().unwrap();
        let connection = interrupts.connect_msi(event.as_fd(), MESSAGE).unwrap();
        event.raise();
        until(|| interrupts.requests(1) == [0, 0b10, 0, 0]);
        assert_eq!(interrupts.take(1), [0, 0b10, 0, 0]);
        assert_eq!(interrupts.take(1), [0; 4]);
        connection.update_msi(MsiMessage { data: 0x42, ..MESSAGE }).unwrap();
        event.raise();
        until(|| interrupts.take(1) == [0, 0b100, 0, 0]);
    }

    #[test]
    fn what_is_in_the_eventfd_is_injected_by_connecting_and_stays_there_after_disconnecting() {
        let interrupts = ProcessInterrupts::new().unwrap();
        let event = Signal::new().unwrap();
        event.raise();
        event.raise();
        let connection = interrupts.connect_msi(event.as_fd(), MESSAGE).unwrap();
        assert_eq!(interrupts.take(1), [0, 0b10, 0, 0]);
        drop(connection);
        event.raise();
        assert!(event.is_raised());
        assert_eq!(interrupts.take(1), [0; 4]);
    }

    #[test]
    fn a_line_is_raised_and_its_end_is_told() {
        let interrupts = ProcessInterrupts::new().unwrap();
        let (trigger, resample) = (Signal::new().unwrap(), Signal::new().unwrap());
        let connection = interrupts.connect_intx(trigger.as_fd(), resample.as_fd(), 17).unwrap();
        trigger.raise();
        until(|| interrupts.take(0) == [1 << 0x39, 0, 0, 0]);
        interrupts.end_of_interrupt(16);
        assert!(!resample.is_raised());
        interrupts.end_of_interrupt(17);
        assert!(resample.is_raised());
        assert!(connection.update_msi(MESSAGE).is_err());
    }

    #[test]
    fn messages_to_nobody_are_lost_and_harm_nobody() {
        let interrupts = ProcessInterrupts::new().unwrap();
        for addr in [0, 0xfeef_f000, 0x1_fee0_0000] {
            interrupts.inject_msi(MsiMessage { addr, data: 0xffff_ffff }).unwrap();
        }
        interrupts.set_line(4, true).unwrap();
        interrupts.set_line(u32::MAX, true).unwrap();
        assert!((0..16).all(|vcpu| interrupts.requests(vcpu) == [0; 4]));
    }
}
