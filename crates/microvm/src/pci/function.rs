//! One PCI function as the guest meets it: configuration and BAR accesses, resets, loss of the device.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use migration::GuestEvent;
use vfio_migration::pci::REGION_CONFIG;
use vfio_migration::{DeviceError, DeviceResult, PciFunction};

use crate::body::InterruptController;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::layout::intx_gsi;
use crate::pci::config::{COMMAND, CONFIG_BYTES, ConfigSpace, Effects, Space};
use crate::pci::fence::ResetFence;
use crate::pci::irq::Interrupts;
use crate::pci::msix::{self, Hit};

/// Why a device is gone, once it is. Shared with whoever notices first.
pub type Loss = Arc<OnceLock<String>>;

/// How a function is doing, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionStatus {
    /// The user's name for the device.
    pub id: String,
    /// Its slot on bus 0.
    pub slot: u8,
    /// Why its server is gone, if it is: the guest reads all ones.
    pub lost: Option<String>,
    /// Reads that were answered with all ones because the device failed them.
    pub failed_reads: u64,
    /// Writes that the device failed.
    pub failed_writes: u64,
}

/// A function in its slot.
pub(crate) struct Function {
    pub(super) id: String,
    slot: u8,
    device: Arc<dyn PciFunction>,
    pub(super) interrupts: Arc<dyn InterruptController>,
    events: Arc<Events>,
    loss: Loss,
    fence: Arc<ResetFence>,
    failed_reads: AtomicU64,
    failed_writes: AtomicU64,
    guest: Mutex<GuestSide>,
}

/// What the guest set.
pub(super) struct GuestSide {
    pub(super) config: ConfigSpace,
    pub(super) irq: Interrupts,
}

impl Function {
    /// Reads the device's configuration space and wires its interrupts.
    pub fn new(
        id: &str,
        slot: u8,
        device: Arc<dyn PciFunction>,
        interrupts: Arc<dyn InterruptController>,
        events: Arc<Events>,
        (loss, fence): (Loss, Arc<ResetFence>),
    ) -> Result<Self> {
        let failed = |source| Error::Device { id: id.into(), source };
        let unfit =
            |what: String| Error::Config(format!("device {id} cannot be passed through: {what}"));
        let bytes = read_config(&*device).map_err(failed)?;
        let gsi = intx_gsi(slot);
        let config = ConfigSpace::new(bytes, device.info(), gsi as u8).map_err(unfit)?;
        let mut irq = Interrupts::new(id, &device, &config, gsi)?;
        // Whatever drove the device before: bus mastering is off until this guest turns it on.
        let command = config.device_command().to_le_bytes();
        device.region_write(REGION_CONFIG, COMMAND as u64, &command).map_err(failed)?;
        // Only the index that is likely to be used: what the guest chooses comes with its first write.
        irq.wire_best(&*device).map_err(failed)?;
        Ok(Self {
            id: id.into(),
            slot,
            device,
            interrupts,
            events,
            loss,
            fence,
            failed_reads: AtomicU64::new(0),
            failed_writes: AtomicU64::new(0),
            guest: Mutex::new(GuestSide { config, irq }),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, GuestSide> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the function is doing.
    pub fn status(&self) -> FunctionStatus {
        FunctionStatus {
            id: self.id.clone(),
            slot: self.slot,
            lost: self.loss.get().cloned(),
            failed_reads: self.failed_reads.load(Ordering::Relaxed),
            failed_writes: self.failed_writes.load(Ordering::Relaxed),
        }
    }

    /// A guest read of configuration space; `data` stays inside a dword.
    pub fn config_read(&self, offset: usize, data: &mut [u8]) {
        let own: Vec<u8>;
        {
            let mut guest = self.lock();
            if guest.config.msi().is_some_and(|msi| msi.has_pending_at(offset, data.len())) {
                let pending = guest.irq.msi_pending();
                guest.config.set_msi_pending(pending);
            }
            let shadow = guest.config.bytes().get(offset..offset.saturating_add(data.len()));
            let Some(shadow) = shadow else {
                data.fill(0xff);
                return;
            };
            data.copy_from_slice(shadow);
            own = guest.config.passthrough(offset, data.len()).to_vec();
        }
        if self.is_lost() {
            self.failed_reads.fetch_add(1, Ordering::Relaxed);
            data.fill(0xff);
            return;
        }
        if own.iter().all(|&mask| mask == 0) {
            return;
        }
        let mut device = [0; 8];
        let Some(device) = device.get_mut(..data.len()) else { return };
        match self.device.region_read(REGION_CONFIG, offset as u64, device) {
            Ok(()) => {
                for ((byte, device), mask) in data.iter_mut().zip(device).zip(own) {
                    *byte = *byte & !mask | *device & mask;
                }
            }
            Err(error) => {
                self.read_failed(&error);
                data.fill(0xff);
            }
        }
    }

    /// A guest write to configuration space; `data` stays inside a dword.
    pub fn config_write(&self, offset: usize, data: &[u8]) {
        let mut guest = self.lock();
        let effects = guest.config.write(offset, data);
        self.perform(&mut guest, &effects);
        drop(guest);
        if effects.reset {
            self.reset_by_guest();
        }
    }

    fn perform(&self, guest: &mut GuestSide, effects: &Effects) {
        if effects.command {
            let command = guest.config.device_command().to_le_bytes();
            self.write_device(REGION_CONFIG, COMMAND as u64, &command);
        }
        for (offset, data) in &effects.forward {
            self.write_device(REGION_CONFIG, *offset, data);
        }
        if effects.interrupts {
            self.update_interrupts(guest);
        }
    }

    /// Wires and routes as configuration space says. A failure cannot be told to the guest: it is logged,
    /// and tried again with the next change.
    fn update_interrupts(&self, guest: &mut GuestSide) {
        let GuestSide { config, irq } = guest;
        if let Err(error) = irq.wire(config, &*self.device, false) {
            self.note(&error);
            tracing::warn!(device = %self.id, %error, "interrupts cannot be wired");
        }
        if let Err(error) = irq.route(config, &*self.interrupts) {
            tracing::warn!(device = %self.id, %error, "interrupts cannot be routed");
        }
    }

    /// A read of `space` at `addr`; `false` when no BAR of this function decodes it.
    pub fn read(&self, space: Space, addr: u64, data: &mut [u8]) -> bool {
        let guest = self.lock();
        let Some((bar, offset)) = guest.config.hit(space, addr, data.len() as u64) else {
            return false;
        };
        let hit = guest.config.msix().map(|msix| msix.hit(bar, offset, data.len() as u64));
        match hit.unwrap_or(Hit::Device) {
            _ if self.is_lost() => {
                self.failed_reads.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
            Hit::Table(offset) => msix::read_table(&guest.irq.table, offset, data),
            Hit::Pending(offset) => {
                let is_pending = |vector| guest.irq.is_msix_pending(vector);
                msix::read_pending(guest.irq.table.len(), is_pending, offset, data);
            }
            Hit::Straddles => data.fill(0xff),
            Hit::Device => {
                drop(guest);
                self.read_device(u32::from(bar), offset, data);
            }
        }
        true
    }

    /// A write to `space` at `addr`; `false` when no BAR of this function decodes it.
    pub fn write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        let mut guest = self.lock();
        let Some((bar, offset)) = guest.config.hit(space, addr, data.len() as u64) else {
            return false;
        };
        let hit = guest.config.msix().map(|msix| msix.hit(bar, offset, data.len() as u64));
        match hit.unwrap_or(Hit::Device) {
            Hit::Table(offset) => {
                let GuestSide { config, irq } = &mut *guest;
                let Some(vector) = msix::write_table(&mut irq.table, offset, data) else {
                    return true;
                };
                if let Err(error) = irq.route_msix(vector, config, &*self.interrupts) {
                    tracing::warn!(device = %self.id, vector, %error, "vector cannot be routed");
                }
            }
            Hit::Pending(_) | Hit::Straddles => {}
            Hit::Device => {
                drop(guest);
                self.write_pieces(u32::from(bar), offset, data);
            }
        }
        true
    }

    fn read_device(&self, region: u32, offset: u64, data: &mut [u8]) {
        if !self.is_inside(region, offset, data.len()) {
            data.fill(0xff);
            return;
        }
        let mut at = offset;
        let mut rest = data;
        while let Some((piece, tail)) = rest.split_at_mut_checked(piece_len(rest.len())) {
            if piece.is_empty() {
                break;
            }
            if let Err(error) = self.device.region_read(region, at, piece) {
                self.read_failed(&error);
                piece.fill(0xff);
            }
            at += piece.len() as u64;
            rest = tail;
        }
    }

    fn write_pieces(&self, region: u32, offset: u64, data: &[u8]) {
        if !self.is_inside(region, offset, data.len()) {
            return;
        }
        let mut at = offset;
        let mut rest = data;
        while let Some((piece, tail)) = rest.split_at_checked(piece_len(rest.len())) {
            if piece.is_empty() {
                break;
            }
            self.write_device(region, at, piece);
            at += piece.len() as u64;
            rest = tail;
        }
    }

    /// A BAR may be larger than its region.
    fn is_inside(&self, region: u32, offset: u64, len: usize) -> bool {
        let size = self.device.info().regions.get(region as usize).map_or(0, |r| r.size);
        offset.checked_add(len as u64).is_some_and(|end| end <= size)
    }

    fn write_device(&self, region: u32, offset: u64, data: &[u8]) {
        if self.is_lost() {
            self.failed_writes.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if let Err(error) = self.device.region_write(region, offset, data) {
            self.note(&error);
            let before = self.failed_writes.fetch_add(1, Ordering::Relaxed);
            if before == 0 {
                tracing::warn!(device = %self.id, region, offset, %error, "a write failed");
            }
        }
    }

    fn read_failed(&self, error: &DeviceError) {
        self.note(error);
        let before = self.failed_reads.fetch_add(1, Ordering::Relaxed);
        if before == 0 {
            tracing::warn!(device = %self.id, %error, "a read failed, the guest gets all ones");
        }
    }

    fn is_lost(&self) -> bool {
        self.loss.get().is_some()
    }

    /// Remembers the loss of the device.
    fn note(&self, error: &DeviceError) {
        if error.is_gone() && self.loss.set(error.to_string()).is_ok() {
            tracing::error!(device = %self.id, %error, "the device is lost");
        }
    }

    fn noted<T>(&self, result: DeviceResult<T>) -> Result<T> {
        result.map_err(|source| {
            self.note(&source);
            Error::Device { id: self.id.clone(), source }
        })
    }

    /// A reset that the guest asked for. What the guest configured stays, as with a kernel that saves and
    /// restores configuration space around the reset, and the device is set up with it again. The event
    /// comes after the reset: whoever starts a new session on it starts it on the fresh device.
    fn reset_by_guest(&self) {
        let _told_when_dropped = self.fence.begin();
        let mut guest = self.lock();
        let outcome = self.reset_locked(&mut guest);
        drop(guest);
        let _logged = self.tell_reset(outcome);
    }

    /// Machine reset: configuration as at power-on, device reset. A device that is lost does not keep the
    /// machine from starting anew.
    pub fn reset(&self) -> Result<()> {
        let _told_when_dropped = self.fence.begin();
        let mut guest = self.lock();
        guest.config.reset();
        guest.irq.reset(&*self.interrupts);
        let outcome = self.reset_locked(&mut guest);
        drop(guest);
        let outcome = self.tell_reset(outcome);
        if self.is_lost() { Ok(()) } else { outcome }
    }

    fn reset_locked(&self, guest: &mut GuestSide) -> Result<Result<()>> {
        self.noted(self.device.reset_function())?;
        Ok(self.rearm_locked(guest))
    }

    /// Tells of a reset that happened, whether or not the device could be set up after it.
    fn tell_reset(&self, outcome: Result<Result<()>>) -> Result<()> {
        if outcome.is_ok() {
            self.events.emit(GuestEvent::DeviceReset { id: self.id.clone() });
        }
        let outcome = outcome.and_then(|rearmed| rearmed);
        if let Err(error) = &outcome {
            tracing::warn!(%error, "a reset failed");
        }
        outcome
    }

    /// PCI_COMMAND, the controls of MSI and MSI-X, and the eventfds are set again, as a reset or a new
    /// instance of the device needs it (H6).
    pub fn rearm(&self) -> Result<()> {
        self.rearm_locked(&mut self.lock())
    }

    fn rearm_locked(&self, guest: &mut GuestSide) -> Result<()> {
        let command = guest.config.device_command().to_le_bytes();
        self.noted(self.device.region_write(REGION_CONFIG, COMMAND as u64, &command))?;
        for (offset, data) in guest.config.interrupt_controls() {
            self.noted(self.device.region_write(REGION_CONFIG, offset, &data))?;
        }
        let GuestSide { config, irq } = guest;
        match irq.wire(config, &*self.device, true) {
            Ok(()) => Ok(()),
            // Some servers refuse SET_IRQS while the device is stopped. The wiring of the opening stands, and
            // a change of it is made when the guest gets its interrupts.
            Err(error) if error.errno() == Some(libc::EINVAL) => {
                tracing::debug!(device = %self.id, %error, "wiring is left for later");
                Ok(())
            }
            Err(error) => self.noted(Err(error)),
        }
    }

    /// Takes the interrupts from the guest.
    pub fn detach(&self) {
        self.lock().irq.detach(&*self.interrupts);
    }

    /// Gives the guest its interrupts; what is pending and unmasked is delivered once.
    pub fn attach(&self) -> Result<()> {
        let mut guest = self.lock();
        if guest.irq.is_attached() && !guest.irq.is_wiring_owed() {
            return Ok(());
        }
        guest.irq.attach();
        let GuestSide { config, irq } = &mut *guest;
        let wired = if self.is_lost() { Ok(()) } else { irq.wire(config, &*self.device, false) };
        // Routed in any case: what came before a failure is not to be lost with it.
        let routed = irq.route(config, &*self.interrupts);
        self.noted(wired).and(routed)
    }
}

fn read_config(device: &dyn PciFunction) -> DeviceResult<[u8; CONFIG_BYTES]> {
    let size = device.info().regions.get(REGION_CONFIG as usize).map_or(0, |region| region.size);
    let mut bytes = [0; CONFIG_BYTES];
    let len = (size.min(CONFIG_BYTES as u64) & !3) as usize;
    if len < 0x40 {
        return Err(DeviceError::Protocol {
            call: "GET_REGION_INFO",
            what: format!("a configuration space of {size} bytes"),
        });
    }
    for (offset, dword) in bytes[..len].chunks_exact_mut(4).enumerate() {
        device.region_read(REGION_CONFIG, 4 * offset as u64, dword)?;
    }
    Ok(bytes)
}

/// Accesses of odd lengths, which page-crossing instructions make, reach the device in whole registers.
fn piece_len(len: usize) -> usize {
    match len {
        0 => 0,
        8.. => 8,
        len => 1 << len.ilog2(),
    }
}
