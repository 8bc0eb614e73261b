//! All interrupts of one function: which index is wired to the device, and which vectors are routed to
//! the guest.
//!
//! *Wiring* hands the eventfds of one interrupt index to the device (SET_IRQS). It happens when the
//! function is opened, because some servers refuse it in stopped states; it changes only when the guest
//! changes the mode, because a device that has MSI-X wired does not use its line. *Routing* connects
//! wired eventfds to the guest, and changes with every mask bit.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vfio_migration::{DeviceResult, IrqIndex, PciFunction};

use crate::body::{InterruptController, MsiMessage};
use crate::error::Result;
use crate::pci::config::{ConfigSpace, IrqMode};
use crate::pci::intx::Intx;
use crate::pci::msix::Entry;
use crate::pci::vectors::Vectors;

/// The interrupts of one function.
pub struct Interrupts {
    /// The MSI-X table.
    pub table: Vec<Entry>,
    msix: Vectors,
    msi: Vectors,
    intx: Option<Intx>,
    wired: Option<IrqIndex>,
    wiring_owed: bool,
    attached: bool,
}

impl Interrupts {
    /// The interrupts of `function`, neither wired nor routed.
    pub fn new(
        id: &str,
        function: &Arc<dyn PciFunction>,
        config: &ConfigSpace,
        gsi: u32,
    ) -> Result<Self> {
        let count = |index: IrqIndex| {
            function.info().irqs.get(index as usize).map_or(0, |irq| irq.count as usize)
        };
        let table = config.msix().map_or(0, |msix| usize::from(msix.vectors));
        let msi = config.msi().map_or(0, |msi| msi.vectors());
        let intx = match count(IrqIndex::Intx) {
            0 => None,
            _ => Some(Intx::new(id, Arc::clone(function), gsi)?),
        };
        Ok(Self {
            table: vec![Entry::default(); table],
            msix: Vectors::new(table.min(count(IrqIndex::Msix)))?,
            msi: Vectors::new(msi.min(count(IrqIndex::Msi)))?,
            intx,
            wired: None,
            wiring_owed: false,
            attached: true,
        })
    }

    /// The guest has the interrupts; after [`detach`](Self::detach) it has not.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// The last wiring was refused and has to be tried again.
    pub fn is_wiring_owed(&self) -> bool {
        self.wiring_owed
    }

    /// Vector `vector` of MSI-X waits for being unmasked.
    pub fn is_msix_pending(&self, vector: usize) -> bool {
        self.msix.is_pending(vector)
    }

    /// The vectors of MSI that wait, one bit each.
    pub fn msi_pending(&self) -> u32 {
        let pending = (0..self.msi.count()).filter(|&vector| self.msi.is_pending(vector));
        pending.fold(0, |bits, vector| bits | 1 << vector)
    }

    /// The line is high.
    pub fn is_intx_high(&self) -> bool {
        self.intx.as_ref().is_some_and(Intx::is_high)
    }

    /// Sets what waits, as a loaded state says; replaces what waited.
    pub fn load_pending(&mut self, msix: &[bool], msi: u32, intx_high: bool) {
        self.clear();
        for (vector, _) in msix.iter().enumerate().filter(|(_, pending)| **pending) {
            self.msix.set_pending(vector);
        }
        for vector in (0..self.msi.count()).filter(|vector| msi >> vector & 1 != 0) {
            self.msi.set_pending(vector);
        }
        if let Some(intx) = &self.intx {
            intx.set_high(intx_high);
        }
    }

    /// As at power-on: nothing routed, nothing pending, every entry masked.
    pub fn reset(&mut self, interrupts: &dyn InterruptController) {
        self.unroute(interrupts);
        self.clear();
        self.table.fill(Entry::default());
    }

    fn clear(&mut self) {
        self.msix.clear_pending();
        self.msi.clear_pending();
        if let Some(intx) = &self.intx {
            intx.set_high(false);
        }
    }

    /// Wires what the guest's mode needs; a guest that uses no interrupts yet keeps what is wired, or gets
    /// the best the function has. `again`: the device may have lost its wiring.
    pub fn wire(
        &mut self,
        config: &ConfigSpace,
        function: &dyn PciFunction,
        again: bool,
    ) -> DeviceResult<()> {
        let wanted = match config.irq_mode() {
            IrqMode::Msix => Some(IrqIndex::Msix),
            IrqMode::Msi => Some(IrqIndex::Msi),
            IrqMode::Intx => Some(IrqIndex::Intx),
            IrqMode::Off => self.wired,
        };
        let Some(wanted) = wanted.or_else(|| self.best()) else { return Ok(()) };
        if self.wired == Some(wanted) && !again && !self.wiring_owed {
            return Ok(());
        }
        self.wire_index(wanted, function)
    }

    fn wire_index(&mut self, index: IrqIndex, function: &dyn PciFunction) -> DeviceResult<()> {
        self.wiring_owed = true;
        if let Some(other) = self.wired.filter(|&wired| wired != index) {
            function.set_irq_eventfds(other, 0, &[])?;
            self.wired = None;
        }
        let events: Vec<Option<BorrowedFd<'_>>> = match index {
            IrqIndex::Msix => self.msix.events().map(|event| Some(event.as_fd())).collect(),
            IrqIndex::Msi => self.msi.events().map(|event| Some(event.as_fd())).collect(),
            _ => self.intx.iter().map(|intx| Some(intx.event().as_fd())).collect(),
        };
        function.set_irq_eventfds(index, 0, &events)?;
        self.wired = Some(index);
        self.wiring_owed = false;
        Ok(())
    }

    /// Wires the best the function has, as a guest that has not said anything yet will want it.
    pub fn wire_best(&mut self, function: &dyn PciFunction) -> DeviceResult<()> {
        match self.best() {
            Some(index) => self.wire_index(index, function),
            None => Ok(()),
        }
    }

    fn best(&self) -> Option<IrqIndex> {
        if self.msix.count() > 0 {
            Some(IrqIndex::Msix)
        } else if self.msi.count() > 0 {
            Some(IrqIndex::Msi)
        } else {
            self.intx.is_some().then_some(IrqIndex::Intx)
        }
    }

    /// Routes every vector as configuration space and table say. The first failure is answered; what could
    /// be routed is.
    pub fn route(
        &mut self,
        config: &ConfigSpace,
        interrupts: &dyn InterruptController,
    ) -> Result<()> {
        let mut outcome = Ok(());
        for vector in 0..self.msix.count() {
            outcome = outcome.and(self.route_msix(vector, config, interrupts));
        }
        let is_msi = self.attached && config.irq_mode() == IrqMode::Msi;
        for vector in 0..self.msi.count() {
            let message =
                config.msi().filter(|_| is_msi).and_then(|msi| msi.message(config.bytes(), vector));
            outcome = outcome.and(self.msi.route(vector, message, interrupts));
        }
        if let Some(intx) = &mut self.intx {
            if self.attached && config.irq_mode() == IrqMode::Intx {
                outcome = outcome.and(intx.connect(interrupts));
            } else {
                intx.disconnect();
            }
        }
        outcome
    }

    /// Routes one vector of MSI-X.
    pub fn route_msix(
        &mut self,
        vector: usize,
        config: &ConfigSpace,
        interrupts: &dyn InterruptController,
    ) -> Result<()> {
        let is_on = self.attached && config.irq_mode() == IrqMode::Msix && !config.is_msix_masked();
        let entry = self.table.get(vector).filter(|entry| is_on && !entry.masked);
        let message: Option<MsiMessage> = entry.map(|entry| entry.message);
        self.msix.route(vector, message, interrupts)
    }

    /// Takes the interrupts from the guest: when this returns, outstanding injections are done, and what
    /// comes stays in the eventfds.
    pub fn detach(&mut self, interrupts: &dyn InterruptController) {
        self.attached = false;
        self.unroute(interrupts);
    }

    /// Lets the guest have its interrupts; [`route`](Self::route) has to follow.
    pub fn attach(&mut self) {
        self.attached = true;
    }

    fn unroute(&mut self, interrupts: &dyn InterruptController) {
        for vectors in [&mut self.msix, &mut self.msi] {
            for vector in 0..vectors.count() {
                // Unrouting cannot fail.
                let _ = vectors.route(vector, None, interrupts);
            }
        }
        if let Some(intx) = &mut self.intx {
            intx.disconnect();
        }
    }
}
