//! Interrupts between the device and the eventfds of the VMM.
//!
//! Pending bits are device state and travel; wiring and masks are the VMM's and do not. A vector
//! fires when it is pending, wired and unmasked while the device works.

use crate::regs::MSIX_VECTORS;

/// What is to be signalled now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fired {
    /// Bit v: MSI-X vector v.
    pub msix: u8,
    /// The INTx line.
    pub intx: bool,
}

impl Fired {
    /// Nothing is to be signalled.
    pub fn is_empty(self) -> bool {
        self.msix == 0 && !self.intx
    }
}

/// The VMM's side: which vectors are wired, which masked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wiring {
    pub(crate) msix_wired: u8,
    pub(crate) msix_masked: u8,
    pub(crate) intx_wired: bool,
    pub(crate) intx_masked: bool,
}

/// The device's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pending {
    pub(crate) msix: u8,
    pub(crate) intx: bool,
}

/// All vectors.
pub(crate) const MSIX_MASK: u8 = (1 << MSIX_VECTORS) - 1;

impl Wiring {
    /// Takes out of `pending` what can be signalled. INTx stays asserted and masks itself.
    pub(crate) fn deliver(&mut self, pending: &mut Pending, intx_disabled: bool) -> Fired {
        let msix = pending.msix & self.msix_wired & !self.msix_masked;
        pending.msix &= !msix;
        let intx = pending.intx && self.intx_wired && !self.intx_masked && !intx_disabled;
        self.intx_masked |= intx;
        Fired { msix, intx }
    }
}
