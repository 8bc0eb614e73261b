//! Configuration space as the guest sees it: 256 bytes, of which the VMM keeps a shadow.
//!
//! Each bit belongs to one of three kinds, told by two masks:
//!
//! | `writable` | `passthrough` | the bit |
//! |---|---|---|
//! | 0 | 0 | fixed: identity, shape of the capabilities |
//! | 1 | 0 | emulated: PCI_COMMAND, BARs, MSI and MSI-X control, power state |
//! | 0 | 1 | the device's own: status, link and device control, vendor capabilities |
//!
//! This module is pure: a write answers with its [`Effects`], and the function performs them. The
//! machine has no memory-mapped configuration access, so the space behind 256 bytes is out of the
//! guest's reach.

use vfio_migration::{IrqIndex, PciFunctionInfo};

use crate::pci::bar::{self, Bar, BarKind};
use crate::pci::capability::{self, ID_AF, ID_EA, ID_EXPRESS, ID_MSI, ID_MSIX, ID_PM};
use crate::pci::msi::MsiLayout;
use crate::pci::msix::MsixLayout;

/// Length of configuration space in bytes.
pub const CONFIG_BYTES: usize = 256;

/// Offset of PCI_COMMAND.
pub const COMMAND: usize = 0x04;
/// Offset of PCI_STATUS.
pub const STATUS: usize = 0x06;
const HEADER_TYPE: usize = 0x0e;
const ROM_BAR: usize = 0x30;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER_END: usize = 0x40;

/// PCI_COMMAND: I/O decoding.
pub const COMMAND_IO: u16 = 1 << 0;
/// PCI_COMMAND: memory decoding.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// PCI_COMMAND: bus mastering.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// PCI_COMMAND: INTx off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SERR: u16 = 1 << 8;

/// How the function interrupts the guest now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqMode {
    /// Not at all.
    Off,
    /// By its line.
    Intx,
    /// By MSI.
    Msi,
    /// By MSI-X.
    Msix,
}

/// Which address space an access is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Memory.
    Memory,
    /// I/O ports.
    Io,
}

/// What the function has to do after a write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Bytes for the device's own configuration space.
    pub forward: Vec<(u64, Vec<u8>)>,
    /// PCI_COMMAND, as [`ConfigSpace::device_command`] gives it, goes to the device.
    pub command: bool,
    /// The guest asked for a reset of the function.
    pub reset: bool,
    /// Interrupt routing may have changed.
    pub interrupts: bool,
}

/// The shadow of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    power_on: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    passthrough: [u8; CONFIG_BYTES],
    bars: Vec<Bar>,
    msi: Option<MsiLayout>,
    msix: Option<MsixLayout>,
    power: Option<usize>,
    /// Where the bits that start a function-level reset are: they never reach the device, which is
    /// reset in one way only.
    flr: Vec<FlrBit>,
    has_intx: bool,
    can_reset: bool,
}

/// A bit that starts a function-level reset.
#[derive(Clone, Copy, Debug)]
struct FlrBit {
    at: usize,
    bit: u8,
    /// The function claims the capability, so the bit means something.
    capable: bool,
}

impl ConfigSpace {
    /// Builds the shadow from what the device's configuration space holds. `interrupt_line` is what
    /// firmware would write there.
    pub fn new(
        device: [u8; CONFIG_BYTES],
        info: &PciFunctionInfo,
        interrupt_line: u8,
    ) -> Result<Self, String> {
        if device[..2] == [0xff, 0xff] || device[..2] == [0, 0] {
            return Err("its configuration space has no vendor id".into());
        }
        if device[HEADER_TYPE] & 0x7f != 0 {
            return Err(format!("header type {:#x}: only type 0 fits", device[HEADER_TYPE] & 0x7f));
        }
        let irqs = |index: IrqIndex| info.irqs.get(index as usize).map_or(0, |irq| irq.count);
        let mut bytes = device;
        capability::hide(&mut bytes, ID_EA)?;
        if irqs(IrqIndex::Msi) == 0 {
            capability::hide(&mut bytes, ID_MSI)?;
        }
        if irqs(IrqIndex::Msix) == 0 {
            capability::hide(&mut bytes, ID_MSIX)?;
        }
        bytes[HEADER_TYPE] = 0;
        bytes[COMMAND..COMMAND + 2].fill(0);
        bytes[bar::BAR0_OFFSET..bar::BAR0_OFFSET + 4 * bar::BAR_COUNT].fill(0);
        bytes[ROM_BAR..ROM_BAR + 4].fill(0);
        let has_intx = irqs(IrqIndex::Intx) > 0;
        bytes[INTERRUPT_PIN] = u8::from(has_intx);
        bytes[INTERRUPT_LINE] = if has_intx { interrupt_line } else { 0xff };

        let bars = bar::parse(&device, info)?;
        let mut space = Self {
            bytes,
            power_on: bytes,
            writable: [0; CONFIG_BYTES],
            passthrough: [0; CONFIG_BYTES],
            bars,
            msi: None,
            msix: None,
            power: None,
            flr: Vec::new(),
            has_intx,
            can_reset: info.reset,
        };
        space.set_header_masks();
        for capability in capability::walk(&bytes)? {
            space.add_capability(capability)?;
        }
        space.check_msix_bars()?;
        for bar in space.bars.clone() {
            bar.set_address(&mut space.bytes, 0);
        }
        space.power_on = space.bytes;
        Ok(space)
    }

    fn set_header_masks(&mut self) {
        let mut command = COMMAND_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE;
        if self.bars.iter().any(|bar| bar.kind == BarKind::Io) {
            command |= COMMAND_IO;
        }
        if self.bars.iter().any(|bar| bar.kind != BarKind::Io) {
            command |= COMMAND_MEMORY;
        }
        self.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        self.passthrough[STATUS..STATUS + 2].fill(0xff);
        // The capability bit goes with the shadow's list.
        self.passthrough[STATUS] &= !0x10;
        // Cache line size and latency timer are kept for the guest and mean nothing.
        self.writable[0x0c..0x0e].fill(0xff);
        self.writable[INTERRUPT_LINE] = 0xff;
        self.passthrough[HEADER_END..].fill(0xff);
        for bar in &self.bars {
            let mask = bar.writable().to_le_bytes();
            let len = bar.register_len();
            self.writable[bar.offset()..][..len].copy_from_slice(&mask[..len]);
        }
    }

    fn add_capability(&mut self, found: capability::Capability) -> Result<(), String> {
        let at = usize::from(found.offset);
        self.passthrough[at..at + 2].fill(0);
        let need = |len: usize| match at + len <= CONFIG_BYTES {
            true => Ok(()),
            false => Err(format!("capability {:#x} at {at:#x} does not fit", found.id)),
        };
        match found.id {
            ID_MSI if self.msi.is_none() => {
                let msi = MsiLayout::parse(&self.bytes, found.offset)?;
                self.passthrough[at..at + msi.len_bytes()].fill(0);
                msi.set_writable(&mut self.writable);
                let writable = self.writable;
                clear_bits(&mut self.bytes[at..at + msi.len_bytes()], &writable[at..]);
                msi.set_pending(&mut self.bytes, 0);
                self.msi = Some(msi);
            }
            ID_MSIX if self.msix.is_none() => {
                let msix = MsixLayout::parse(&self.bytes, found.offset)?;
                self.passthrough[at..at + 12].fill(0);
                self.writable[at + 3] = 0xc0;
                self.bytes[at + 3] &= !0xc0;
                self.msix = Some(msix);
            }
            ID_PM if self.power.is_none() => {
                need(8)?;
                self.emulate(at + 4, 3, 0);
                self.writable[at + 4] = 3;
                if !self.can_reset {
                    // No soft reset: leaving D3hot changes nothing.
                    self.emulate(at + 4, 8, 8);
                }
                self.power = Some(at);
            }
            ID_EXPRESS => {
                need(0x14)?;
                let capable = self.claim_flr(at + 7, 0x10);
                // Device control bit 15 reads as 0.
                self.emulate(at + 9, 0x80, 0);
                self.flr.push(FlrBit { at: at + 9, bit: 0x80, capable });
            }
            ID_AF => {
                need(6)?;
                let capable = self.claim_flr(at + 3, 2);
                self.flr.push(FlrBit { at: at + 4, bit: 1, capable });
            }
            _ => {}
        }
        Ok(())
    }

    /// The bits `mask` at `at` are the shadow's, and `value` for now.
    fn emulate(&mut self, at: usize, mask: u8, value: u8) {
        self.passthrough[at] &= !mask;
        self.bytes[at] = self.bytes[at] & !mask | value;
    }

    /// Whether the capability bit of FLR is set; it is not shown of a device that cannot be reset.
    fn claim_flr(&mut self, at: usize, bit: u8) -> bool {
        let capable = self.bytes[at] & bit != 0 && self.can_reset;
        self.emulate(at, bit, if capable { bit } else { 0 });
        capable
    }

    fn check_msix_bars(&self) -> Result<(), String> {
        let Some(msix) = self.msix else { return Ok(()) };
        let size = |index: u8| self.bars.iter().find(|b| b.index == index).map_or(0, |b| b.size);
        let table_end = msix.table_offset + super::msix::ENTRY_BYTES * u64::from(msix.vectors);
        let pba_end = msix.pba_offset + 8 * u64::from(msix.vectors).div_ceil(64);
        if table_end > size(msix.table_bar) || pba_end > size(msix.pba_bar) {
            return Err("the MSI-X table or its pending bits lie outside of their BAR".into());
        }
        Ok(())
    }

    /// The BARs.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// The MSI capability.
    pub fn msi(&self) -> Option<&MsiLayout> {
        self.msi.as_ref()
    }

    /// The MSI-X capability.
    pub fn msix(&self) -> Option<&MsixLayout> {
        self.msix.as_ref()
    }

    /// The shadow.
    pub fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }

    /// Sets the address that BAR `index` has at power-on.
    pub fn set_power_on_address(&mut self, index: u8, address: u64) {
        if let Some(bar) = self.bars.iter().find(|bar| bar.index == index) {
            bar.set_address(&mut self.power_on, address);
            bar.set_address(&mut self.bytes, address);
        }
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    /// PCI_COMMAND as the guest wrote it.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// PCI_COMMAND for the device: no bus mastering while the guest has the function in a low-power
    /// state, which is not passed on.
    pub fn device_command(&self) -> u16 {
        if self.is_awake() { self.command() } else { self.command() & !COMMAND_MASTER }
    }

    fn is_awake(&self) -> bool {
        self.power.is_none_or(|at| self.bytes[at + 4] & 3 == 0)
    }

    /// How the function interrupts now.
    pub fn irq_mode(&self) -> IrqMode {
        if self.msix_control() & 0x80 != 0 {
            IrqMode::Msix
        } else if self.msi.is_some_and(|msi| msi.is_enabled(&self.bytes)) {
            IrqMode::Msi
        } else if self.has_intx && self.command() & COMMAND_INTX_DISABLE == 0 {
            IrqMode::Intx
        } else {
            IrqMode::Off
        }
    }

    /// All of MSI-X is masked.
    pub fn is_msix_masked(&self) -> bool {
        self.msix_control() & 0x40 != 0
    }

    /// Upper byte of the MSI-X control register.
    fn msix_control(&self) -> u8 {
        self.msix.map_or(0, |msix| self.bytes[usize::from(msix.capability) + 3])
    }

    /// The BAR that decodes all of `[addr, addr + len)`, with the offset in it.
    pub fn hit(&self, space: Space, addr: u64, len: u64) -> Option<(u8, u64)> {
        let enabled = match space {
            Space::Memory => COMMAND_MEMORY,
            Space::Io => COMMAND_IO,
        };
        if self.command() & enabled == 0 || !self.is_awake() {
            return None;
        }
        let in_space = |bar: &&Bar| (bar.kind == BarKind::Io) == (space == Space::Io);
        self.bars.iter().filter(in_space).find_map(|bar| {
            let base = bar.address(&self.bytes);
            let offset = addr.checked_sub(base)?;
            let inside = base != 0 && offset < bar.size && len <= bar.size - offset;
            inside.then_some((bar.index, offset))
        })
    }

    /// The bits of `[offset, offset + N)` that are the device's own.
    pub fn passthrough(&self, offset: usize, len: usize) -> &[u8] {
        self.passthrough.get(offset..offset.saturating_add(len)).unwrap_or(&[])
    }

    /// Shows the pending bits of MSI.
    pub fn set_msi_pending(&mut self, pending: u32) {
        if let Some(msi) = self.msi {
            msi.set_pending(&mut self.bytes, pending);
        }
    }

    /// A guest write of at most 4 bytes that stays inside one register.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Effects {
        let mut effects = Effects::default();
        let Some(end) = offset.checked_add(data.len()).filter(|&end| end <= CONFIG_BYTES) else {
            return effects;
        };
        let touches = |start: usize, len: usize| offset < start + len && end > start;
        let power_before = self.power_state();
        for (at, &byte) in (offset..).zip(data) {
            let writable = self.writable[at];
            self.bytes[at] = self.bytes[at] & !writable | byte & writable;
        }
        let mut forward = data.to_vec();
        let at_byte = |at: usize| at.checked_sub(offset).filter(|&i| i < data.len());

        if let Some(power) = self.power
            && let Some(i) = at_byte(power + 4)
        {
            forward[i] &= !3;
            effects.reset |= self.settle_power(power, power_before);
            effects.command = true;
            effects.interrupts = true;
        }
        for flr in &self.flr {
            if let Some(i) = at_byte(flr.at) {
                effects.reset |= flr.capable && data[i] & flr.bit != 0;
                forward[i] &= !flr.bit;
            }
        }
        if touches(COMMAND, 2) {
            effects.command = true;
            effects.interrupts = true;
        }
        let in_msi = self.msi.is_some_and(|m| touches(usize::from(m.capability), m.len_bytes()));
        let in_msix = self.msix.is_some_and(|m| touches(usize::from(m.capability), 4));
        effects.interrupts |= in_msi || in_msix;

        // PCI_STATUS is cleared by writing ones; everything else of the header stays here.
        let skip = if offset < HEADER_END { STATUS.saturating_sub(offset) } else { 0 };
        let is_own = offset >= HEADER_END || touches(STATUS, 2);
        if is_own && let Some(rest) = forward.get(skip..).filter(|rest| !rest.is_empty()) {
            effects.forward.push(((offset + skip) as u64, rest.to_vec()));
        }
        effects
    }

    fn power_state(&self) -> u8 {
        self.power.map_or(0, |at| self.bytes[at + 4] & 3)
    }

    /// Discards a state the function does not have; answers whether this was the way out of D3hot that
    /// resets the function.
    fn settle_power(&mut self, power: usize, before: u8) -> bool {
        let capabilities = self.bytes[power + 3];
        let has_state = match self.bytes[power + 4] & 3 {
            1 => capabilities & 2 != 0,
            2 => capabilities & 4 != 0,
            _ => true,
        };
        if !has_state {
            self.bytes[power + 4] = self.bytes[power + 4] & !3 | before;
        }
        let no_soft_reset = self.bytes[power + 4] & 8 != 0;
        before == 3 && self.power_state() == 0 && !no_soft_reset
    }

    /// What the device has to be told again after a reset, or before it runs somewhere else: the
    /// control words of MSI and MSI-X. PCI_COMMAND comes on its own.
    pub fn interrupt_controls(&self) -> Vec<(u64, Vec<u8>)> {
        let mut controls = Vec::new();
        let offsets = [self.msi.map(|m| m.capability), self.msix.map(|m| m.capability)];
        for at in offsets.into_iter().flatten().map(usize::from) {
            controls.push(((at + 2) as u64, self.bytes[at + 2..at + 4].to_vec()));
        }
        controls
    }

    /// Takes over the emulated bits of `saved`, another function's shadow. Every fixed bit must be equal:
    /// a state of another kind of device is refused by naming the offset and both values.
    pub fn load(&mut self, saved: &[u8; CONFIG_BYTES]) -> Result<(), String> {
        for (at, &theirs) in saved.iter().enumerate() {
            // The status bits and pending bits of MSI are not the shadow's to compare.
            let volatile = self.passthrough[at] | self.msi_pending_mask(at);
            let fixed = !(self.writable[at] | volatile);
            if (theirs ^ self.bytes[at]) & fixed != 0 {
                return Err(format!(
                    "configuration space differs at {at:#x}: {theirs:#04x} came, {:#04x} is here",
                    self.bytes[at]
                ));
            }
        }
        for (at, &theirs) in saved.iter().enumerate() {
            let writable = self.writable[at];
            self.bytes[at] = self.bytes[at] & !writable | theirs & writable;
        }
        Ok(())
    }

    fn msi_pending_mask(&self, at: usize) -> u8 {
        if self.msi.is_some_and(|msi| msi.has_pending_at(at, 1)) { 0xff } else { 0 }
    }
}

fn clear_bits(bytes: &mut [u8], mask: &[u8]) {
    for (byte, mask) in bytes.iter_mut().zip(mask) {
        *byte &= !mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::mock::{self, EXPRESS_AT, POWER_AT};

    #[test]
    fn a_device_that_cannot_be_reset_shows_no_way_to_reset_it() {
        let info = PciFunctionInfo { reset: false, ..mock::info() };
        let mut space = ConfigSpace::new(mock::config(), &info, 16).unwrap();
        assert_eq!(space.bytes()[EXPRESS_AT + 7] & 0x10, 0, "FLR capability");
        assert_eq!(space.bytes()[POWER_AT + 4] & 8, 8, "no soft reset");
        assert_eq!(space.passthrough(EXPRESS_AT + 7, 1)[0] & 0x10, 0);
        assert!(!space.write(EXPRESS_AT + 8, &[0, 0x80]).reset);
        assert!(!space.write(POWER_AT + 4, &[3, 0]).reset);
        assert!(!space.write(POWER_AT + 4, &[0, 0]).reset);
    }

    #[test]
    fn a_write_beyond_the_space_has_no_effect() {
        let mut space = ConfigSpace::new(mock::config(), &mock::info(), 16).unwrap();
        for (offset, len) in [(253, 4), (256, 1), (usize::MAX, 2)] {
            assert_eq!(space.write(offset, &vec![0xff; len]), Effects::default());
        }
    }

    #[test]
    fn status_bits_are_cleared_on_the_device_and_pci_command_goes_on_its_own() {
        let mut space = ConfigSpace::new(mock::config(), &mock::info(), 16).unwrap();
        let effects = space.write(COMMAND, &[6, 0, 0, 0x80]);
        assert!(effects.command && effects.interrupts && !effects.reset);
        assert_eq!(effects.forward, [(STATUS as u64, vec![0, 0x80])]);
        assert_eq!(space.device_command(), 6);
    }
}
