//! Bus 0 and its host bridge: configuration mechanism 1 and the dispatch of memory and port accesses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use migration::{Section, SectionVersion};
use vfio_migration::PciFunction;

use crate::body::InterruptController;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::layout::{
    DEVICES_MAX, FIRST_DEVICE_SLOT, MMIO_END, MMIO_START, PCI_CONFIG_ADDRESS_PORT,
    PCI_CONFIG_DATA_PORT,
};
use crate::pci::bar::{Allocator, BarKind};
use crate::pci::config::Space;
use crate::pci::fence::ResetFence;
use crate::pci::function::{Function, FunctionStatus, Loss};
use crate::pci::open::OpenDevice;
use crate::section::{Reader, Writer};

/// Section with the configuration address register.
const SECTION: &str = "pci-host";
const SECTION_VERSION: u32 = 1;

/// Bit of the configuration address register: accesses of the data register are configuration cycles.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Bits of the configuration address register that are kept.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Where ports of I/O BARs are handed out at power-on.
const IO_WINDOW: std::ops::Range<u64> = 0x1000..0x1_0000;

/// The host bridge in slot 0: 1b36:0008, class 0600. Guests look for one before they believe in PCI.
const BRIDGE_CONFIG: [u8; 16] = [0x36, 0x1b, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0];

/// Bus 0.
pub struct PciHost {
    interrupts: Arc<dyn InterruptController>,
    events: Arc<Events>,
    functions: Vec<Function>,
    address: AtomicU32,
    memory: Allocator,
    ports: Allocator,
}

impl PciHost {
    /// A bus with its host bridge only.
    pub fn new(interrupts: Arc<dyn InterruptController>, events: Arc<Events>) -> Self {
        Self {
            interrupts,
            events,
            functions: Vec::new(),
            address: AtomicU32::new(0),
            memory: Allocator::new(MMIO_START..MMIO_END),
            ports: Allocator::new(IO_WINDOW),
        }
    }

    /// Puts an opened device into the next slot; its loss shows at once, not only when the guest touches
    /// it.
    pub fn add_device(&mut self, device: &OpenDevice) -> Result<()> {
        let id = &device.device.description.id;
        let watched = (Arc::clone(&device.loss), Arc::clone(&device.fence));
        self.add_watched(id, Arc::clone(&device.function), watched)
    }

    /// Puts `function` into the next slot and wires its interrupts. Memory is mapped for DMA already.
    pub fn add(&mut self, id: &str, function: Arc<dyn PciFunction>) -> Result<()> {
        self.add_watched(id, function, Default::default())
    }

    fn add_watched(
        &mut self,
        id: &str,
        device: Arc<dyn PciFunction>,
        watched: (Loss, Arc<ResetFence>),
    ) -> Result<()> {
        if self.functions.len() >= DEVICES_MAX {
            return Err(Error::Config(format!("device {id}: at most {DEVICES_MAX} devices fit")));
        }
        if self.functions.iter().any(|function| function.id == id) {
            return Err(Error::Config(format!("device {id} is there twice: ids must differ")));
        }
        let slot = FIRST_DEVICE_SLOT + self.functions.len() as u8;
        let (interrupts, events) = (Arc::clone(&self.interrupts), Arc::clone(&self.events));
        let function = Function::new(id, slot, device, interrupts, events, watched)?;
        self.place_bars(&function)?;
        self.functions.push(function);
        Ok(())
    }

    /// Hands out power-on addresses, as firmware would. They follow from the devices and their order
    /// alone, so both ends of a migration come to the same.
    fn place_bars(&mut self, function: &Function) -> Result<()> {
        let mut guest = function.lock();
        for bar in guest.config.bars().to_vec() {
            let address = match bar.kind {
                BarKind::Io => self.ports.take(bar.size, 4),
                BarKind::Memory32 | BarKind::Memory64 => self.memory.take(bar.size, 4096),
            };
            let Some(address) = address else {
                return Err(Error::Config(format!(
                    "device {}: BAR {} of {:#x} bytes does not fit the PCI window below 4 GiB",
                    function.id, bar.index, bar.size
                )));
            };
            guest.config.set_power_on_address(bar.index, address);
        }
        Ok(())
    }

    /// A port read; `false` when nothing of PCI is there.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        if let Some(offset) = data_offset(port, data.len()) {
            data.fill(0xff);
            match self.target() {
                Target::Nobody => {}
                Target::Bridge(register) => {
                    for (byte, at) in data.iter_mut().zip(register + offset..) {
                        *byte = BRIDGE_CONFIG.get(at).copied().unwrap_or(0);
                    }
                }
                Target::Function(function, register) => {
                    function.config_read(register + offset, data);
                }
            }
            return true;
        }
        if port == PCI_CONFIG_ADDRESS_PORT && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
            return true;
        }
        self.functions.iter().any(|function| function.read(Space::Io, u64::from(port), data))
    }

    /// A port write; `false` when nothing of PCI is there. Writes of other lengths than 4 to the address
    /// register belong to other devices of a PC.
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        if let Some(offset) = data_offset(port, data.len()) {
            if let Target::Function(function, register) = self.target() {
                function.config_write(register + offset, data);
            }
            return true;
        }
        if port == PCI_CONFIG_ADDRESS_PORT
            && let Ok(dword) = data.try_into()
        {
            self.address.store(u32::from_le_bytes(dword) & ADDRESS_BITS, Ordering::Release);
            return true;
        }
        self.functions.iter().any(|function| function.write(Space::Io, u64::from(port), data))
    }

    /// A memory read; `false` when no BAR is there.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        self.functions.iter().any(|function| function.read(Space::Memory, addr, data))
    }

    /// A memory write; `false` when no BAR is there.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        self.functions.iter().any(|function| function.write(Space::Memory, addr, data))
    }

    fn target(&self) -> Target<'_> {
        let address = self.address.load(Ordering::Acquire);
        let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
        if address & ADDRESS_ENABLE == 0 || bus != 0 || function != 0 {
            return Target::Nobody;
        }
        let register = (address & 0xfc) as usize;
        let Some(index) = slot.checked_sub(u32::from(FIRST_DEVICE_SLOT)) else {
            return Target::Bridge(register);
        };
        match self.functions.get(index as usize) {
            Some(function) => Target::Function(function, register),
            None => Target::Nobody,
        }
    }

    /// The sections that [`save`](Self::save) makes.
    pub fn sections(&self) -> Vec<SectionVersion> {
        let host =
            SectionVersion { name: SECTION.into(), kind: SECTION.into(), version: SECTION_VERSION };
        std::iter::once(host).chain(self.functions.iter().map(Function::section)).collect()
    }

    /// The state of bus and functions; [`detach`](Self::detach) came before.
    pub fn save(&self) -> Result<Vec<Section>> {
        let host = Section {
            name: SECTION.into(),
            kind: SECTION.into(),
            version: SECTION_VERSION,
            payload: Writer::new().u32(self.address.load(Ordering::Acquire)).finish(),
        };
        std::iter::once(Ok(host)).chain(self.functions.iter().map(Function::save)).collect()
    }

    /// Loads what [`save`](Self::save) gave; sections of others are ignored. Interrupts are detached
    /// until [`reattach`](Self::reattach), which delivers once what was pending.
    pub fn load(&self, sections: &[Section]) -> Result<()> {
        let Some(host) = sections.iter().find(|section| section.name == SECTION) else {
            return Err(Error::section(SECTION, "it is missing"));
        };
        if host.kind != SECTION || host.version != SECTION_VERSION {
            return Err(Error::section(SECTION, format!("version {} is not known", host.version)));
        }
        let mut reader = Reader::new(SECTION, &host.payload);
        let address = reader.u32()?;
        if address & !ADDRESS_BITS != 0 {
            return Err(reader.error("reserved bits of the configuration address are set"));
        }
        reader.finish()?;
        self.functions.iter().try_for_each(|function| function.load(sections))?;
        self.address.store(address, Ordering::Release);
        Ok(())
    }

    /// Takes all interrupts from the guest: outstanding injections are done when this returns.
    pub fn detach(&self) {
        self.functions.iter().for_each(Function::detach);
    }

    /// Gives the guest its interrupts, after [`detach`](Self::detach) or [`load`](Self::load): what came
    /// meanwhile is delivered once. Called before every start of the vCPUs; does nothing when nothing is
    /// detached. Every function is tried; the first failure is answered.
    pub fn reattach(&self) -> Result<()> {
        self.functions.iter().map(Function::attach).fold(Ok(()), Result::and)
    }

    /// Sets PCI_COMMAND and the vectors of device `id` again.
    pub fn rearm(&self, id: &str) -> Result<()> {
        match self.functions.iter().find(|function| function.id == id) {
            Some(function) => function.rearm(),
            None => Err(Error::State(format!("there is no device {id}"))),
        }
    }

    /// Machine reset: every function reset, configuration back to power-on. Every function is tried; the
    /// first failure is answered.
    pub fn reset(&self) -> Result<()> {
        self.address.store(0, Ordering::Release);
        self.functions.iter().map(Function::reset).fold(Ok(()), Result::and)
    }

    /// How each function is doing.
    pub fn status(&self) -> Vec<FunctionStatus> {
        self.functions.iter().map(Function::status).collect()
    }

    /// Ids whose server is gone, with the reason.
    pub fn lost(&self) -> Vec<(String, String)> {
        self.status().into_iter().filter_map(|s| Some((s.id, s.lost?))).collect()
    }
}

/// Whom the configuration address names, and which register.
enum Target<'a> {
    Nobody,
    Bridge(usize),
    Function(&'a Function, usize),
}

/// The offset of an access inside the configuration data register.
fn data_offset(port: u16, len: usize) -> Option<usize> {
    let offset = usize::from(port.checked_sub(PCI_CONFIG_DATA_PORT)?);
    (offset + len <= 4).then_some(offset)
}
