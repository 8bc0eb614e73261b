//! The KVM guest.
//!
//! | module | holds |
//! |---|---|
//! | `machine` | the VM: memory slots, interrupt controllers, timer, capabilities |
//! | `vcpu` | vCPU threads: run, emulate exits, park |
//! | `state` | the state of one vCPU |
//! | `lapic_timer` | what passes for a LAPIC timer while its state is on the way |
//! | `chips` | the state of interrupt controllers, timer and clock |
//! | `interrupts` | GSI routing and irqfds |
//! | `dirty`, `ring` | what vCPUs write: KVM's dirty log, its dirty rings |
//! | `crash` | what a vCPU looked like when its guest died |
//! | `cpuid` | the guest's CPUID |
//! | `ioctls` | what `kvm-ioctls` lacks |

mod chips;
mod cpuid;
mod crash;
mod dirty;
mod interrupts;
mod ioctls;
mod lapic_timer;
mod machine;
mod ring;
mod state;
mod vcpu;

use std::sync::{Arc, Mutex, PoisonError};

use migration::{DirtyTracker, GuestMemory, Section, SectionVersion};

use crate::body::{Body, BodyDescription, GuestBus, InterruptController};
use crate::config::DirtyTracking;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::pvh::Boot;
use crate::section::find;
use crate::time::realtime_ns;

use chips::ChipState;
use interrupts::os;
use machine::Machine;
use state::{Advance, VcpuState};
use vcpu::Vcpus;

pub use ring::{RingCounters, available as dirty_ring_available};

/// Why this host cannot run a KVM guest.
pub fn available() -> std::result::Result<(), String> {
    machine::open().map(drop).map_err(|error| error.to_string())
}

/// A KVM machine before its bus is there: what PCI needs to connect interrupts.
pub struct KvmParts {
    machine: Machine,
    vcpus: Vec<kvm_ioctls::VcpuFd>,
}

impl KvmParts {
    /// A machine over `memory` with `vcpus` vCPUs, whose writes can be tracked by `tracking`.
    pub fn new(memory: Arc<GuestMemory>, vcpus: u32, tracking: DirtyTracking) -> Result<Self> {
        let (machine, vcpus) = Machine::new(memory, vcpus, tracking)?;
        Ok(Self { machine, vcpus })
    }

    /// The in-kernel interrupt controllers.
    pub fn interrupts(&self) -> Arc<dyn InterruptController> {
        Arc::clone(&self.machine.interrupts) as _
    }
}

/// vCPUs of KVM.
pub struct KvmBody {
    machine: Machine,
    vcpus: Vcpus,
    power_on: PowerOn,
    /// Set by [`Body::load`]: the first resume has an interrupt to make good.
    after_load: Mutex<bool>,
}

/// The state before the first instruction.
struct PowerOn {
    vcpus: Vec<VcpuState>,
    chips: ChipState,
}

impl KvmBody {
    /// The body of `parts`, whose exits go to `bus`. It is paused.
    pub fn new(parts: KvmParts, bus: Arc<dyn GuestBus>, events: Arc<Events>) -> Result<Self> {
        let KvmParts { machine, vcpus } = parts;
        let vcpus = Vcpus::new(vcpus, bus, events, machine.rings().cloned())?;
        let power_on = PowerOn {
            vcpus: vcpus.each(|_, vcpu| VcpuState::save(vcpu, &machine.abilities))?,
            chips: ChipState::save(&machine.vm)?,
        };
        Ok(Self { machine, vcpus, power_on, after_load: Mutex::new(false) })
    }
}

impl Body for KvmBody {
    fn description(&self) -> BodyDescription {
        BodyDescription {
            machine: "microvm-kvm",
            cpuid: cpuid::describe(&self.machine.cpuid),
            xsave_bytes: self.machine.abilities.xsave_bytes as u32,
            tsc_khz: self.machine.tsc_khz,
            tsc_scaling: self.machine.tsc_scaling,
        }
    }

    fn sections(&self) -> Vec<SectionVersion> {
        let vcpu = |index| SectionVersion {
            name: vcpu_name(index),
            kind: state::KIND.into(),
            version: state::VERSION,
        };
        let mut sections: Vec<_> = (0..self.power_on.vcpus.len()).map(vcpu).collect();
        sections.push(SectionVersion {
            name: chips::NAME.into(),
            kind: chips::KIND.into(),
            version: chips::VERSION,
        });
        sections
    }

    fn resume(&self) -> Result<()> {
        if std::mem::take(&mut *self.after_load.lock().unwrap_or_else(PoisonError::into_inner)) {
            chips::make_up_tick(&self.machine.vm)?;
        }
        self.vcpus.resume();
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        self.vcpus.pause();
        Ok(())
    }

    fn set_throttle(&self, percent: u8) -> Result<()> {
        self.vcpus.set_throttle(percent)
    }

    fn halt(&self) {
        self.vcpus.halt();
    }

    fn stop(&self) {
        self.vcpus.stop();
    }

    fn reset(&self, boot: &Boot) -> Result<()> {
        let abilities = &self.machine.abilities;
        self.vcpus.each(|index, vcpu| {
            let mut state = self.power_on.vcpus[index].clone();
            if index == 0 {
                state.set_pvh_entry(boot);
            }
            state.load(vcpu, abilities, Advance::None)
        })?;
        self.power_on.chips.load(&self.machine.vm, Advance::None)
    }

    fn dirty_tracker(&self) -> Result<Box<dyn DirtyTracker>> {
        Ok(self.machine.dirty_tracker())
    }

    fn ring_counters(&self) -> Option<RingCounters> {
        self.machine.rings().map(|rings| rings.counters())
    }

    /// KVM's slots are addresses of this process, and follow what is mapped there.
    fn memory_replaced(&self) -> Result<()> {
        Ok(())
    }

    /// The chips come before the vCPUs: PIT and IOAPIC go on while the vCPUs stand still, and a tick
    /// between the two is then in the LAPIC that is saved, instead of in neither.
    fn save(&self) -> Result<Vec<Section>> {
        let chips = ChipState::save(&self.machine.vm)?;
        let mut sections = self.vcpus.each(|index, vcpu| {
            let state = VcpuState::save(vcpu, &self.machine.abilities)?;
            Ok(Section {
                name: vcpu_name(index),
                kind: state::KIND.into(),
                version: state::VERSION,
                payload: state.encode(),
            })
        })?;
        sections.push(Section {
            name: chips::NAME.into(),
            kind: chips::KIND.into(),
            version: chips::VERSION,
            payload: chips.encode(),
        });
        Ok(sections)
    }

    /// The vCPUs come before the chips: loading the IOAPIC delivers what it holds to LAPICs that must be
    /// there already, and would be overwritten otherwise.
    fn load(&self, sections: &[Section]) -> Result<()> {
        let abilities = &self.machine.abilities;
        let chips = find(sections, chips::NAME, chips::KIND, chips::VERSION)?;
        let chips = ChipState::decode(&chips.name, &chips.payload)?;
        let mut states = Vec::new();
        for index in 0..self.power_on.vcpus.len() {
            let section = find(sections, &vcpu_name(index), state::KIND, state::VERSION)?;
            let state = VcpuState::decode(&section.name, &section.payload, abilities)?;
            self.check_tsc(&section.name, &state)?;
            states.push(state);
        }
        let advance = Advance::Elapsed { now_ns: realtime_ns() };
        self.vcpus.each(|index, vcpu| states[index].load(vcpu, abilities, advance))?;
        chips.load(&self.machine.vm, advance)?;
        *self.after_load.lock().unwrap_or_else(PoisonError::into_inner) = true;
        Ok(())
    }
}

impl KvmBody {
    /// The engine refused other frequencies at Describe already; a host that scales is set to scale.
    fn check_tsc(&self, name: &str, state: &VcpuState) -> Result<()> {
        let (theirs, Some(ours)) = (state.tsc_khz(), self.machine.tsc_khz) else { return Ok(()) };
        let apart = u64::from(theirs.abs_diff(ours)) * 1_000_000;
        if theirs == 0 || apart <= u64::from(ours) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        if !self.machine.tsc_scaling {
            return Err(Error::section(
                name,
                format!("the TSC ran at {theirs} kHz, here it runs at {ours} kHz without scaling"),
            ));
        }
        self.vcpus.each(|_, vcpu| vcpu.set_tsc_khz(theirs).map_err(os("KVM_SET_TSC_KHZ")))?;
        Ok(())
    }
}

/// Frequencies this close need no scaling (NTP corrects as much).
const TSC_TOLERANCE_PPM: u64 = 250;

fn vcpu_name(index: usize) -> String {
    format!("vcpu{index}")
}

#[cfg(test)]
pub(in crate::kvm) mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};
    use std::time::{Duration, Instant};

    use migration::RegionLayout;

    use super::*;
    use crate::pvh;
    use crate::workload::pvh_elf;

    /// A bus whose ports take a while, and give another value each time.
    #[derive(Default)]
    struct Slow(AtomicU8);

    impl GuestBus for Slow {
        fn port_read(&self, _: u16, data: &mut [u8]) {
            std::thread::sleep(Duration::from_millis(1));
            data.fill(self.0.fetch_add(1, Ordering::SeqCst).wrapping_add(1));
        }
        fn port_write(&self, port: u16, _: &[u8]) {
            panic!("a bug behind port {port:#x}");
        }
        fn mmio_read(&self, _: u64, data: &mut [u8]) {
            data.fill(0xff);
        }
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }

    const COUNTER: u64 = 0x5000;

    pub(in crate::kvm) struct Rig {
        pub(in crate::kvm) body: KvmBody,
        pub(in crate::kvm) memory: Arc<GuestMemory>,
        bus: Arc<Slow>,
        events: Arc<Events>,
    }

    fn rig(code: &[u8], vcpus: u32) -> Option<Rig> {
        rig_with(code, vcpus, DirtyTracking::Log)
    }

    pub(in crate::kvm) fn rig_with(
        code: &[u8],
        vcpus: u32,
        tracking: DirtyTracking,
    ) -> Option<Rig> {
        if let Err(why) = available() {
            println!("skipped: {why}");
            return None;
        }
        let memory = GuestMemory::new(&[RegionLayout { gpa: 0, len: 16 << 20 }]).unwrap();
        let memory = Arc::new(memory);
        let elf = pvh_elf(code, 0x10_0000);
        let boot = pvh::load(&mut std::io::Cursor::new(elf), "", &memory).unwrap();
        let parts = KvmParts::new(Arc::clone(&memory), vcpus, tracking).unwrap();
        let bus = Arc::new(Slow::default());
        let events = Arc::new(Events::default());
        let body = KvmBody::new(parts, Arc::clone(&bus) as _, Arc::clone(&events)).unwrap();
        body.reset(&boot).unwrap();
        Some(Rig { body, memory, bus, events })
    }

    pub(in crate::kvm) fn counter(memory: &GuestMemory) -> u32 {
        let mut word = [0; 4];
        memory.read(COUNTER, &mut word).unwrap();
        u32::from_le_bytes(word)
    }

    pub(in crate::kvm) fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// incl 0x5000; jmp back
    const COUNT: &[u8] = b"\xff\x05\x00\x50\x00\x00\xeb\xf8";

    #[test]
    fn a_vcpu_halted_and_resumed_before_it_parked_goes_on() {
        let Some(Rig { body, memory, .. }) = rig(COUNT, 1) else { return };
        body.resume().unwrap();
        for _ in 0..200 {
            body.halt();
            body.resume().unwrap();
        }
        let before = counter(&memory);
        until("it counts", || counter(&memory) != before);
    }

    #[test]
    fn vcpus_that_wait_for_init_are_paused_and_saved_as_they_are() {
        let Some(Rig { body, memory, .. }) = rig(COUNT, 3) else { return };
        body.resume().unwrap();
        until("it counts", || counter(&memory) > 0);
        body.pause().unwrap();
        let states =
            body.vcpus.each(|_, vcpu| vcpu.get_mp_state().map_err(os("KVM_GET_MP_STATE"))).unwrap();
        let states: Vec<_> = states.iter().map(|state| state.mp_state).collect();
        let waiting = kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
        assert_eq!(states, [kvm_bindings::KVM_MP_STATE_RUNNABLE, waiting, waiting]);
        assert_eq!(body.save().unwrap().len(), 4);
    }

    #[test]
    fn a_pause_completes_the_instruction_that_left_the_guest() {
        // in $0x80, %al; mov %al, 0x5000; incl 0x5004; jmp back: AL is read from the bus, which takes its time,
        // so a pause mostly comes while the read is under way.
        let code = b"\xe4\x80\xa2\x00\x50\x00\x00\xff\x05\x04\x50\x00\x00\xeb\xf1";
        let Some(Rig { body, memory, bus, .. }) = rig(code, 1) else { return };
        body.resume().unwrap();
        until("it reads", || counter(&memory) & 0xff > 2);
        let mut behind_the_read = 0;
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(1));
            body.pause().unwrap();
            let regs = body.vcpus.each(|_, vcpu| vcpu.get_regs().map_err(os("KVM_GET_REGS")));
            let regs = regs.unwrap()[0];
            // The guest was given what the bus answered last: an answer that waits in `kvm_run` for the next
            // KVM_RUN is in no register, and would be lost with a state that is saved now.
            assert_eq!(regs.rax as u8, bus.0.load(Ordering::SeqCst));
            behind_the_read += u32::from(regs.rip == 0x10_0002);
            body.resume().unwrap();
        }
        assert!(behind_the_read > 0, "no pause came while the read was under way");
    }

    #[test]
    fn a_panic_behind_the_bus_ends_the_guest_and_holds_nobody() {
        // out %al, $0x81
        let Some(Rig { body, events, .. }) = rig(b"\xe6\x81", 1) else { return };
        body.resume().unwrap();
        until("it ends", || events.ended().is_some());
        body.pause().unwrap();
        body.stop();
        assert!(matches!(events.ended(), Some(migration::GuestEvent::Crashed { .. })));
    }

    /// What the vCPU of `code` looked like when its guest had died of `reason`.
    fn died_of(code: &[u8], reason: &str) -> Option<String> {
        let Rig { body, events, .. } = rig(code, 1)?;
        body.resume().unwrap();
        until("it ends", || events.ended().is_some());
        body.pause().unwrap();
        match events.ended() {
            Some(migration::GuestEvent::Crashed { reason: told }) => {
                assert!(told.starts_with(reason), "{told}");
            }
            other => panic!("{other:?}"),
        }
        let states = body.vcpus.each(|_, vcpu| crash::CrashState::take(vcpu)).unwrap();
        Some(states[0].to_string())
    }

    #[test]
    fn a_triple_fault_tells_where() {
        // mov $0x123456, %esp; ud2: the guest has no IDT.
        let Some(state) = died_of(b"\xbc\x56\x34\x12\x00\x0f\x0b", "triple fault") else { return };
        let at_fault =
            state.starts_with("rip=0x100005 rsp=0x123456 ") && state.contains(" cs=0x8:0x0 ");
        // On AMD, KVM has reset the vCPU already.
        let after_init =
            state.starts_with("rip=0xfff0 ") && state.contains(" cs=0xf000:0xffff0000 ");
        assert!(at_fault || after_init, "{state}");
    }

    #[test]
    fn an_internal_error_tells_where() {
        // jmp to 0x2000000: nothing can be executed where a device is.
        let Some(state) = died_of(b"\xe9\xfb\xff\xef\x01", "internal error") else { return };
        assert!(state.starts_with("rip=0x2000000 ") && state.contains(" cr0=0x11 "), "{state}");
    }
}
