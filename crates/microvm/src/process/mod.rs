//! The process guest: threads of this process run the workload (docs/workload.md) on guest memory, for hosts
//! without KVM. Devices, bus and mailbox are the same as under KVM.
//!
//! ```text
//!   gate ──parks──> thread of each vCPU: step, step, step …  ──(accesses)──> GuestBus
//!                     │ writes through        ^ takes
//!                     v                       └── ProcessInterrupts <── eventfds of devices
//!                   View (the guest's own mapping) <──scans── PagemapTracker
//! ```
//!
//! | module | about |
//! |---|---|
//! | `cpu` | the workload in steps; `driver` is its driver, `state` its section |
//! | `gate` | where the threads park |
//! | `interrupts` | request bits of the vCPUs, set by eventfds |
//! | `tracker` | dirty pages by PAGEMAP_SCAN; `uffd` has the system calls, `view` the mapping |

mod cpu;
mod driver;
mod gate;
mod interrupts;
mod state;
#[cfg(test)]
mod tests;
mod tracker;
mod uffd;
mod view;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use migration::{DirtyTracker, GuestEvent, GuestMemory, Section, SectionVersion};

use crate::body::{Body, BodyDescription, GuestBus};
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::pvh::Boot;
use crate::throttle::Throttle;
use crate::time::boottime_ns;
use crate::workload::WORKLOAD_VCPUS_MAX;
use cpu::{Cpu, CpuState, Step, Surroundings};
use gate::Gate;
use tracker::{PagemapTracker, TrackingSlot};
use view::View;

pub use interrupts::ProcessInterrupts;
pub use tracker::pagemap_scan_available;

/// Sleep of a vCPU that has nothing to do; half a tick, so that no tick is missed.
const IDLE: Duration = Duration::from_micros(500);

/// Why this host cannot run a process guest that can be migrated.
pub fn available() -> std::result::Result<(), String> {
    pagemap_scan_available()
}

/// Threads that run the workload.
pub struct ProcessBody {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    tracking: TrackingSlot,
}

struct Shared {
    gate: Gate,
    throttle: Throttle,
    /// The thread of a vCPU holds its lock while it is not parked.
    cpus: Vec<Mutex<Cpu>>,
    memory: Arc<GuestMemory>,
    view: Arc<View>,
    bus: Arc<dyn GuestBus>,
    interrupts: Arc<ProcessInterrupts>,
    events: Arc<Events>,
}

impl ProcessBody {
    /// The body of a VM whose memory, bus and interrupts are there already. It is paused, and reads the
    /// start page from memory when it first runs, as the KVM guest does.
    pub fn new(
        config: &VmConfig,
        memory: Arc<GuestMemory>,
        bus: Arc<dyn GuestBus>,
        interrupts: Arc<ProcessInterrupts>,
        events: Arc<Events>,
    ) -> Result<Self> {
        if config.kernel.is_some() {
            let what = "the process guest runs the built-in workload only; a kernel needs KVM";
            return Err(Error::Config(what.into()));
        }
        if !(1..=WORKLOAD_VCPUS_MAX).contains(&config.vcpus) {
            let what = format!("{} vCPUs: 1 to {WORKLOAD_VCPUS_MAX} fit", config.vcpus);
            return Err(Error::Config(what));
        }
        let shared = Arc::new(Shared {
            gate: Gate::new(config.vcpus as usize),
            throttle: Throttle::default(),
            cpus: (0..config.vcpus).map(|index| Mutex::new(Cpu::new(index))).collect(),
            view: Arc::new(View::new(&memory)?),
            memory,
            bus,
            interrupts,
            events,
        });
        let body = Self { shared, threads: Mutex::default(), tracking: TrackingSlot::default() };
        for index in 0..body.shared.cpus.len() {
            let shared = Arc::clone(&body.shared);
            let thread = std::thread::Builder::new()
                .name(format!("guest{index}"))
                .spawn(move || shared.run(index))
                .map_err(|source| Error::Os { call: "spawning a guest thread", source })?;
            lock(&body.threads).push(thread);
        }
        body.shared.gate.wait_parked();
        Ok(body)
    }
}

impl Drop for ProcessBody {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Body for ProcessBody {
    fn description(&self) -> BodyDescription {
        BodyDescription { machine: "microvm-process", ..BodyDescription::default() }
    }

    fn sections(&self) -> Vec<SectionVersion> {
        (0..self.shared.cpus.len()).map(state::section).collect()
    }

    fn resume(&self) -> Result<()> {
        self.shared.gate.open();
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        self.shared.gate.close();
        self.shared.gate.wait_parked();
        Ok(())
    }

    /// The threads look at the throttle between two steps.
    fn set_throttle(&self, percent: u8) -> Result<()> {
        self.shared.throttle.set(percent);
        Ok(())
    }

    fn stop(&self) {
        self.shared.gate.end();
        for thread in lock(&self.threads).drain(..) {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
    }

    fn halt(&self) {
        self.shared.gate.close();
    }

    /// The entry is the workload's, always.
    fn reset(&self, _boot: &Boot) -> Result<()> {
        for (index, cpu) in self.shared.cpus.iter().enumerate() {
            lock(cpu).set_state(CpuState::default());
            self.shared.interrupts.take(index);
        }
        Ok(())
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>> {
        let (view, slot) = (Arc::clone(&self.shared.view), self.tracking.clone());
        Ok(Box::new(PagemapTracker::new(view, slot)))
    }

    fn memory_replaced(&self) -> Result<()> {
        self.shared.view.replace(&self.shared.memory)
    }

    fn save(&self) -> Result<Vec<Section>> {
        let save = |(index, cpu): (usize, &Mutex<Cpu>)| {
            state::encode(index, &lock(cpu).state, self.shared.interrupts.requests(index))
        };
        Ok(self.shared.cpus.iter().enumerate().map(save).collect())
    }

    fn load(&self, sections: &[Section]) -> Result<()> {
        let count = self.shared.cpus.len();
        let states: Vec<_> =
            (0..count).map(|index| state::decode(index, sections)).collect::<Result<_>>()?;
        for (index, (state, requests)) in states.into_iter().enumerate() {
            lock(&self.shared.cpus[index]).set_state(state);
            self.shared.interrupts.take(index);
            self.shared.interrupts.add_requests(index, requests);
        }
        Ok(())
    }
}

impl Shared {
    fn run(&self, index: usize) {
        let _abandoned = Abandoned(&self.gate);
        while self.gate.park() {
            let mut cpu = lock(&self.cpus[index]);
            while self.gate.is_open() {
                let now_ns = boottime_ns();
                if let Some(rest) = self.throttle.rest(now_ns) {
                    self.gate.sleep(rest);
                    continue;
                }
                match cpu.step(self.surroundings(), now_ns) {
                    Step::Busy => {}
                    Step::Idle => self.gate.sleep(IDLE),
                    Step::TripleFault => {
                        self.gate.close();
                        let reason = "triple fault".into();
                        self.events.emit(GuestEvent::Crashed { reason });
                    }
                }
            }
        }
    }

    fn surroundings(&self) -> Surroundings<'_> {
        Surroundings {
            view: &self.view,
            bus: &*self.bus,
            interrupts: &self.interrupts,
            memory: &self.memory,
        }
    }
}

/// A thread that panics must not keep others waiting for it to park.
struct Abandoned<'a>(&'a Gate);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.leave();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
