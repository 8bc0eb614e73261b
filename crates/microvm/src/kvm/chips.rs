//! The state of what the vCPUs share: both PICs, the IOAPIC, the PIT and the guest's clock.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use zerocopy::IntoBytes;

use super::interrupts::os;
use super::state::{Advance, plain};
use crate::error::Result;
use crate::section::{Reader, Writer};
use crate::time::realtime_ns;

/// Name of the section.
pub(super) const NAME: &str = "chips";
/// Kind of the section.
pub(super) const KIND: &str = "kvm-chips";
/// Version of [`KIND`].
pub(super) const VERSION: u32 = 1;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// The PIT's modes that fire again and again.
const PIT_PERIODIC_MODES: [u8; 4] = [2, 3, 6, 7];

/// The state of the shared chips.
#[derive(Clone)]
pub(super) struct ChipState {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    /// The guest's clock (kvmclock) at `taken_ns`.
    clock_ns: u64,
    /// CLOCK_REALTIME of that moment, from KVM where it says so.
    taken_ns: u64,
}

impl ChipState {
    /// Saves; the vCPUs are paused.
    pub(super) fn save(vm: &VmFd) -> Result<Self> {
        let clock = vm.get_clock().map_err(os("KVM_GET_CLOCK"))?;
        let exact = clock.flags & KVM_CLOCK_REALTIME != 0;
        let taken_ns = if exact { clock.realtime } else { realtime_ns() };
        let pit = vm.get_pit2().map_err(os("KVM_GET_PIT2"))?;
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(os("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        Ok(Self { chips, pit, clock_ns: clock.clock, taken_ns })
    }

    /// Loads. The clock is moved on by what passed since it was saved; should the hosts' clocks say that
    /// nothing did, it goes on from where it was.
    pub(super) fn load(&self, vm: &VmFd, advance: Advance) -> Result<()> {
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(os("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(os("KVM_SET_PIT2"))?;
        let Advance::Elapsed { .. } = advance else { return Ok(()) };
        let elapsed_ns = realtime_ns().saturating_sub(self.taken_ns);
        let clock = self.clock_ns.saturating_add(elapsed_ns);
        let clock = kvm_clock_data { clock, ..Default::default() };
        vm.set_clock(&clock).map_err(os("KVM_SET_CLOCK"))
    }

    /// The section's payload.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        for chip in &self.chips {
            writer.bytes(chip.as_bytes());
        }
        writer.bytes(self.pit.as_bytes()).u64(self.clock_ns).u64(self.taken_ns).finish()
    }

    /// What [`encode`](Self::encode) made.
    pub(super) fn decode(name: &str, payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(name, payload);
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let chip: kvm_irqchip = plain(&mut reader)?;
            if chip.chip_id != chip_id {
                return Err(reader.error(format!("interrupt controller {}", chip.chip_id)));
            }
            chips.push(chip);
        }
        let pit = plain(&mut reader)?;
        let (clock_ns, taken_ns) = (reader.u64()?, reader.u64()?);
        reader.finish()?;
        Ok(Self { chips, pit, clock_ns, taken_ns })
    }
}

/// KVM counts PIT ticks it owes the guest where nobody can read them: the guest gets one, as it would
/// after any pause. One too many is allowed, one too few might be the one it sleeps for.
pub(super) fn make_up_tick(vm: &VmFd) -> Result<()> {
    let pit = vm.get_pit2().map_err(os("KVM_GET_PIT2"))?;
    let timer = &pit.channels[0];
    if timer.count != 0 && PIT_PERIODIC_MODES.contains(&timer.mode) {
        vm.set_irq_line(0, true).map_err(os("KVM_IRQ_LINE"))?;
        vm.set_irq_line(0, false).map_err(os("KVM_IRQ_LINE"))?;
    }
    Ok(())
}
