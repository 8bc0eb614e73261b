//! Interrupts by eventfd: GSI routing and irqfds.
//!
//! GSIs 0 to 23 are the pins of PIC and IOAPIC; each MSI connection takes a GSI of its own above them.
//! The route is set before the irqfd is connected and removed after it is disconnected, so a signal
//! never meets a GSI without its route.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQFD_FLAG_DEASSIGN, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::VmFd;

use super::ioctls;
use crate::body::{InterruptController, IrqConnection, MsiMessage};
use crate::error::{Error, Result};

/// Pins of the IOAPIC.
const PINS: u32 = 24;
/// Most routes; KVM takes 4096, pins and both PICs included.
const GSIS_MAX: u32 = 2048;

/// The in-kernel interrupt controllers, as devices see them.
pub(super) struct KvmInterrupts {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    /// Messages of the GSIs from [`PINS`] on; `None` = free.
    messages: Mutex<Vec<Option<MsiMessage>>>,
}

impl KvmInterrupts {
    /// Sets the routing of the pins.
    pub(super) fn new(vm: Arc<VmFd>) -> Result<Self> {
        let shared = Shared { vm, messages: Mutex::new(Vec::new()) };
        shared.set_routing(&[])?;
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl InterruptController for KvmInterrupts {
    fn connect_msi(
        &self,
        trigger: BorrowedFd<'_>,
        message: MsiMessage,
    ) -> Result<Box<dyn IrqConnection>> {
        let trigger = duplicate(trigger)?;
        let gsi = self.shared.allocate(message)?;
        let mut connection =
            Connection { shared: Arc::clone(&self.shared), trigger, gsi, msi: true, live: false };
        ioctls::irqfd(&self.shared.vm, &connection.trigger, None, gsi, 0)?;
        connection.live = true;
        Ok(Box::new(connection))
    }

    fn connect_intx(
        &self,
        trigger: BorrowedFd<'_>,
        resample: BorrowedFd<'_>,
        gsi: u32,
    ) -> Result<Box<dyn IrqConnection>> {
        if gsi >= PINS {
            return Err(Error::Config(format!("interrupt line {gsi}: there are {PINS}")));
        }
        let trigger = duplicate(trigger)?;
        let mut connection =
            Connection { shared: Arc::clone(&self.shared), trigger, gsi, msi: false, live: false };
        ioctls::irqfd(&self.shared.vm, &connection.trigger, Some(&resample), gsi, 0)?;
        connection.live = true;
        Ok(Box::new(connection))
    }

    fn inject_msi(&self, message: MsiMessage) -> Result<()> {
        let msi = kvm_msi {
            address_lo: message.addr as u32,
            address_hi: (message.addr >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // 0 means that no vCPU took it (its LAPIC is off): that is the guest's affair.
        self.shared.vm.signal_msi(msi).map_err(os("KVM_SIGNAL_MSI")).map(drop)
    }

    fn set_line(&self, gsi: u32, high: bool) -> Result<()> {
        self.shared.vm.set_irq_line(gsi, high).map_err(os("KVM_IRQ_LINE"))
    }
}

/// One irqfd.
struct Connection {
    shared: Arc<Shared>,
    trigger: OwnedFd,
    gsi: u32,
    msi: bool,
    live: bool,
}

impl IrqConnection for Connection {
    fn update_msi(&self, message: MsiMessage) -> Result<()> {
        if !self.msi {
            return Err(Error::State("an INTx connection has no message".into()));
        }
        self.shared.update(self.gsi, Some(message))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let shared = &self.shared;
        if self.live {
            let flags = KVM_IRQFD_FLAG_DEASSIGN;
            if let Err(error) = ioctls::irqfd(&shared.vm, &self.trigger, None, self.gsi, flags) {
                tracing::warn!(gsi = self.gsi, %error, "an interrupt stays connected");
                return;
            }
        }
        if self.msi
            && let Err(error) = shared.update(self.gsi, None)
        {
            tracing::warn!(gsi = self.gsi, %error, "an interrupt's route stays");
        }
    }
}

impl Shared {
    fn allocate(&self, message: MsiMessage) -> Result<u32> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match messages.iter().position(Option::is_none) {
            Some(free) => free,
            None if (messages.len() as u32) < GSIS_MAX => {
                messages.push(None);
                messages.len() - 1
            }
            None => return Err(Error::Config(format!("more than {GSIS_MAX} MSI vectors"))),
        };
        messages[index] = Some(message);
        if let Err(error) = self.set_routing(&messages) {
            messages[index] = None;
            return Err(error);
        }
        Ok(PINS + index as u32)
    }

    fn update(&self, gsi: u32, message: Option<MsiMessage>) -> Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = messages.get_mut((gsi - PINS) as usize) else { return Ok(()) };
        if *slot == message {
            return Ok(());
        }
        *slot = message;
        self.set_routing(&messages)
    }

    fn set_routing(&self, messages: &[Option<MsiMessage>]) -> Result<()> {
        let mut entries = pin_routes();
        for (index, message) in messages.iter().enumerate() {
            let Some(message) = message else { continue };
            entries.push(msi_route(PINS + index as u32, *message));
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| Error::Config(format!("interrupt routes: {error:?}")))?;
        self.vm.set_gsi_routing(&routing).map_err(os("KVM_SET_GSI_ROUTING"))
    }
}

/// GSI n is pin n of the IOAPIC and, below 16, of the PICs too. As on a PC, the PIT (GSI 0) comes in at
/// IOAPIC pin 2, which is free because the PICs are cascaded over it.
fn pin_routes() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(64);
    for gsi in 0..PINS {
        if gsi < 16 && gsi != 2 {
            let (chip, pin) = match gsi {
                0..8 => (KVM_IRQCHIP_PIC_MASTER, gsi),
                _ => (KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
            };
            entries.push(chip_route(gsi, chip, pin));
        }
        match gsi {
            0 => entries.push(chip_route(0, KVM_IRQCHIP_IOAPIC, 2)),
            2 => {}
            _ => entries.push(chip_route(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        }
    }
    entries
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_bindings::kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_bindings::kvm_irq_routing_msi {
        address_lo: message.addr as u32,
        address_hi: (message.addr >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    fd.try_clone_to_owned().map_err(|source| Error::Os { call: "dup of an eventfd", source })
}

/// Names the ioctl that failed.
pub(super) fn os(call: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> Error {
    move |error| Error::Os { call, source: std::io::Error::from_raw_os_error(error.errno()) }
}
