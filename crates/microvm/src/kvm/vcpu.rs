//! The thread of one vCPU: runs the guest, emulates its exits, and parks on demand.
//!
//! ```text
//!   pauser                               vCPU thread
//!   want = Pause                         KVM_RUN ──────────────┐
//!   immediate_exit = 1, signal ────────> EINTR, or an exit ────┤ emulate
//!                                        want ≠ Run:           │
//!                                        KVM_RUN again, until EINTR: the instruction is complete
//!   wait for all parked  <────────────── parked + 1
//! ```
//!
//! `immediate_exit` is set in the mapped `kvm_run` by the pauser, under the lock that the thread holds
//! when it clears it: a thread that is about to enter KVM_RUN sees it there, one that is inside gets
//! the signal. With it set, KVM_RUN completes the instruction of the last exit and returns EINTR
//! without running any other.
//!
//! A throttled guest is kicked the same way at the start of each period; its thread then waits, not parked,
//! until its part of the period begins or it is to park.

use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, kvm_run,
};
use kvm_ioctls::VcpuFd;
use migration::GuestEvent;

use super::crash::CrashState;
use super::ring::DirtyRings;
use crate::body::GuestBus;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::throttle::Throttle;
use crate::time::boottime_ns;

/// What the vCPUs are wanted to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Pause,
    Stop,
}

struct Gate {
    want: Want,
    parked: usize,
}

/// All vCPUs of a VM.
pub(super) struct Vcpus {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Kicks the vCPUs at the start of each period while they are throttled.
    kicker: Mutex<Option<JoinHandle<()>>>,
    count: usize,
}

struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    throttle: Throttle,
    /// The thread of a vCPU holds its lock while it is not parked.
    vcpus: Vec<Mutex<VcpuFd>>,
    kicks: Vec<Kick>,
    bus: Arc<dyn GuestBus>,
    events: Arc<Events>,
    rings: Option<Arc<DirtyRings>>,
}

/// What it takes to get a vCPU out of KVM_RUN.
struct Kick {
    /// A mapping of its own of the vCPU's `kvm_run`: the vCPU's thread holds the other one.
    run: NonNull<kvm_run>,
    thread: Mutex<Option<libc::pthread_t>>,
}

// SAFETY: the mapping is only reached through atomic stores to one byte.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: address and length are those of our own mmap.
        unsafe { libc::munmap(self.run.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

impl Vcpus {
    /// Starts the threads, parked.
    pub(super) fn new(
        vcpus: Vec<VcpuFd>,
        bus: Arc<dyn GuestBus>,
        events: Arc<Events>,
        rings: Option<Arc<DirtyRings>>,
    ) -> Result<Self> {
        install_kick_handler()?;
        let kicks = vcpus.iter().map(Kick::new).collect::<Result<_>>()?;
        let count = vcpus.len();
        let shared = Arc::new(Shared {
            gate: Mutex::new(Gate { want: Want::Pause, parked: 0 }),
            changed: Condvar::new(),
            throttle: Throttle::default(),
            vcpus: vcpus.into_iter().map(Mutex::new).collect(),
            kicks,
            bus,
            events,
            rings,
        });
        let (threads, kicker) = (Mutex::new(Vec::new()), Mutex::new(None));
        let this = Self { shared, threads, kicker, count };
        for index in 0..count {
            let shared = Arc::clone(&this.shared);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || shared.run_thread(index))
                .map_err(|source| Error::Os { call: "spawn of a vCPU thread", source })?;
            *lock(&this.shared.kicks[index].thread) = Some(thread.as_pthread_t());
            lock(&this.threads).push(thread);
        }
        this.pause();
        Ok(this)
    }

    /// Lets the vCPUs run.
    pub(super) fn resume(&self) {
        let mut gate = lock(&self.shared.gate);
        if gate.want == Want::Pause {
            gate.want = Want::Run;
            self.shared.changed.notify_all();
        }
    }

    /// Asks the vCPUs to park, without waiting.
    pub(super) fn halt(&self) {
        self.shared.want(Want::Pause);
    }

    /// Parks the vCPUs and waits until they are.
    pub(super) fn pause(&self) {
        self.halt();
        let mut gate = lock(&self.shared.gate);
        while gate.parked < self.count {
            gate = self.shared.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Keeps the vCPUs out of the guest for so many percent of the time.
    pub(super) fn set_throttle(&self, percent: u8) -> Result<()> {
        let mut kicker = lock(&self.kicker);
        {
            // Under the lock that a kicker decides under whether to end.
            let _gate = lock(&self.shared.gate);
            self.shared.throttle.set(percent);
            self.shared.changed.notify_all();
        }
        if percent == 0 {
            if let Some(kicker) = kicker.take() {
                // One that panicked has ended as well.
                let _ = kicker.join();
            }
        } else if kicker.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new()
                .name("throttle".into())
                .spawn(move || shared.kick_each_period())
                .map_err(|source| Error::Os { call: "spawn of the throttle's thread", source })?;
            *kicker = Some(thread);
        }
        Ok(())
    }

    /// Ends the threads.
    pub(super) fn stop(&self) {
        self.shared.want(Want::Stop);
        if let Some(kicker) = lock(&self.kicker).take() {
            // One that panicked has ended as well.
            let _ = kicker.join();
        }
        for thread in lock(&self.threads).drain(..) {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
    }

    /// Calls `f` with each parked vCPU in turn.
    pub(super) fn each<T>(&self, mut f: impl FnMut(usize, &VcpuFd) -> Result<T>) -> Result<Vec<T>> {
        let each = |(index, vcpu): (usize, &Mutex<VcpuFd>)| f(index, &lock(vcpu));
        self.shared.vcpus.iter().enumerate().map(each).collect()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// How a vCPU left the guest.
enum Left {
    /// To be entered again.
    Emulated,
    /// By a signal or `immediate_exit`: the last instruction is complete.
    Interrupted,
    /// For good.
    Dead(String),
}

impl Shared {
    fn want(&self, want: Want) {
        let mut gate = lock(&self.gate);
        if gate.want == Want::Stop {
            return;
        }
        gate.want = want;
        for kick in &self.kicks {
            kick.now();
        }
        self.changed.notify_all();
    }

    /// Until the throttle is lifted or the vCPUs are stopped. Parked vCPUs need no kick.
    fn kick_each_period(&self) {
        let mut gate = lock(&self.gate);
        while gate.want != Want::Stop && self.throttle.percent() > 0 {
            let now_ns = boottime_ns();
            if gate.want == Want::Run && self.throttle.rest(now_ns).is_some() {
                self.kicks.iter().for_each(Kick::now);
            }
            let next = Throttle::until_period(now_ns);
            let waited = self.changed.wait_timeout(gate, next);
            gate = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn run_thread(&self, index: usize) {
        loop {
            let mut gate = lock(&self.gate);
            gate.parked += 1;
            self.changed.notify_all();
            while gate.want == Want::Pause {
                gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
            }
            if gate.want == Want::Stop {
                return;
            }
            gate.parked -= 1;
            self.kicks[index].clear();
            drop(gate);
            let ran = catch_unwind(AssertUnwindSafe(|| self.run(index)));
            if ran.is_err() {
                // Parked like the others, so that whoever waits for a pause is not kept waiting.
                let reason = format!("the thread of vCPU {index} panicked");
                self.want(Want::Pause);
                self.events.emit(GuestEvent::Crashed { reason });
            }
        }
    }

    /// Runs until the vCPU is to park and its last instruction is complete.
    fn run(&self, index: usize) {
        let mut vcpu = lock(&self.vcpus[index]);
        // Tells a guest that has a kvmclock that it stood still; EINVAL where it has none.
        let _ = vcpu.kvmclock_ctrl();
        loop {
            match self.enter(index, &mut vcpu) {
                Left::Emulated => {}
                Left::Interrupted => {
                    let mut gate = lock(&self.gate);
                    while gate.want == Want::Run
                        && let Some(rest) = self.throttle.rest(boottime_ns())
                    {
                        let waited = self.changed.wait_timeout(gate, rest);
                        gate = waited.unwrap_or_else(PoisonError::into_inner).0;
                    }
                    if gate.want != Want::Run {
                        return;
                    }
                    // Throttled, or halted and resumed before it parked.
                    self.kicks[index].clear();
                }
                Left::Dead(reason) => {
                    let state = match CrashState::take(&vcpu) {
                        Ok(state) => state.to_string(),
                        Err(error) => error.to_string(),
                    };
                    tracing::error!(vcpu = index, reason, state, "the guest is dead");
                    self.want(Want::Pause);
                    self.events.emit(GuestEvent::Crashed { reason });
                    return;
                }
            }
        }
    }

    fn enter(&self, index: usize, vcpu: &mut VcpuFd) -> Left {
        if let Err(error) = vcpu.run() {
            return match error.errno() {
                libc::EINTR => Left::Interrupted,
                libc::EAGAIN => Left::Emulated,
                errno => {
                    Left::Dead(format!("KVM_RUN: {}", std::io::Error::from_raw_os_error(errno)))
                }
            };
        }
        let run = vcpu.get_kvm_run();
        match run.exit_reason {
            KVM_EXIT_IO => self.port_exit(run),
            KVM_EXIT_MMIO => self.memory_exit(run),
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_HLT => Left::Emulated,
            KVM_EXIT_DIRTY_RING_FULL => {
                self.rings.iter().for_each(|rings| rings.full(index));
                Left::Emulated
            }
            KVM_EXIT_SHUTDOWN => Left::Dead("triple fault".into()),
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: the exit reason says which member of the union is valid.
                let kind = unsafe { run.__bindgen_anon_1.system_event.type_ };
                Left::Dead(format!("system event {kind}"))
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let fail = unsafe { run.__bindgen_anon_1.fail_entry };
                Left::Dead(format!("entry failed: {:#x}", fail.hardware_entry_failure_reason))
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: as above.
                let internal = unsafe { run.__bindgen_anon_1.internal };
                let (suberror, at) =
                    (internal.suberror, vcpu.get_regs().map_or(0, |regs| regs.rip));
                let count = (internal.ndata as usize).min(internal.data.len());
                let data = &internal.data[..count];
                Left::Dead(format!(
                    "internal error {suberror} of KVM at address {at:#x}, data {data:x?}"
                ))
            }
            reason => Left::Dead(format!("unexpected exit {reason} of KVM")),
        }
    }

    fn port_exit(&self, run: &mut kvm_run) -> Left {
        // SAFETY: the exit reason says which member of the union is valid.
        let io = unsafe { run.__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let bytes = size * io.count as usize;
        let base: *mut u8 = std::ptr::from_mut(run).cast();
        // SAFETY: KVM puts the data at this offset of the `kvm_run` mapping, behind the struct itself, and
        // nobody else touches it until the next KVM_RUN.
        let data =
            unsafe { std::slice::from_raw_parts_mut(base.add(io.data_offset as usize), bytes) };
        for item in data.chunks_exact_mut(size.max(1)) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                self.bus.port_read(io.port, item);
            } else {
                self.bus.port_write(io.port, item);
            }
        }
        Left::Emulated
    }

    fn memory_exit(&self, run: &mut kvm_run) -> Left {
        // SAFETY: the exit reason says which member of the union is valid.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        let (address, data) = (mmio.phys_addr, &mut mmio.data[..len]);
        if mmio.is_write != 0 {
            self.bus.mmio_write(address, data);
        } else {
            self.bus.mmio_read(address, data);
        }
        Left::Emulated
    }
}

impl Kick {
    fn new(vcpu: &VcpuFd) -> Result<Self> {
        let (bytes, fd) = (size_of::<kvm_run>(), vcpu.as_raw_fd());
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping, at an address the kernel chooses.
        let run = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, fd, 0) };
        match NonNull::new(run.cast()).filter(|_| run != libc::MAP_FAILED) {
            Some(run) => Ok(Self { run, thread: Mutex::new(None) }),
            None => Err(Error::last_os("mmap of a vCPU")),
        }
    }

    fn now(&self) {
        self.store(1);
        if let Some(thread) = *lock(&self.thread) {
            // SAFETY: the thread is joined only after `want` is Stop, and neither `want` nor the throttle kicks
            // any more then; until it is joined its id is valid, even if it has ended.
            unsafe { libc::pthread_kill(thread, kick_signal()) };
        }
    }

    fn clear(&self) {
        self.store(0);
    }

    fn store(&self, value: u8) {
        // SAFETY: the byte lies in our mapping; it is shared with the kernel and the vCPU's thread, hence
        // atomic.
        let immediate_exit =
            unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) };
        immediate_exit.store(value, Ordering::SeqCst);
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// The signal only has to interrupt KVM_RUN; its handler does nothing.
fn install_kick_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe since it does nothing.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            // KVM_RUN returns all the same; a device access under way goes on.
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) != 0
        };
        if failed {
            result = Err(Error::last_os("sigaction"));
        }
    });
    result
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
