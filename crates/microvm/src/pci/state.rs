//! The saved state of one function: section `pci:<id>`, kind [`KIND`], version [`VERSION`].
//!
//! | field | |
//! |---|---|
//! | bytes | configuration space, 256 bytes: PCI_COMMAND, BAR addresses, MSI and MSI-X control included |
//! | u32 n, then n × (u64, u32, u8) | MSI-X table: address, data, flags (bit 0 masked, bit 1 pending) |
//! | u32 | pending vectors of MSI, one bit each |
//! | u8 | INTx level |
//!
//! Pending means: the vector's event came and was not delivered, because it was masked or because the
//! interrupts were detached for saving. It is delivered once, when the guest has its interrupts and the
//! vector is unmasked.

use migration::{Section, SectionVersion};

use crate::body::MsiMessage;
use crate::error::{Error, Result};
use crate::pci::function::{Function, GuestSide};
use crate::pci::msix::Entry;
use crate::section::{Reader, Writer};

/// Kind of the section.
pub const KIND: &str = "pci-function";
/// Version of the kind.
pub const VERSION: u32 = 1;

const FLAG_MASKED: u8 = 1;
const FLAG_PENDING: u8 = 2;

impl Function {
    fn section_name(&self) -> String {
        format!("pci:{}", self.id)
    }

    /// The section that [`save`](Self::save) makes.
    pub fn section(&self) -> SectionVersion {
        SectionVersion { name: self.section_name(), kind: KIND.into(), version: VERSION }
    }

    /// The state, with the guest paused, the device stopped and the interrupts detached: only then does
    /// what is pending stay as it is.
    pub fn save(&self) -> Result<Section> {
        let guest = self.lock();
        if guest.irq.is_attached() {
            let what = format!("device {}: interrupts must be detached before saving", self.id);
            return Err(Error::State(what));
        }
        let GuestSide { config, irq } = &*guest;
        let mut writer = Writer::new();
        writer.bytes(config.bytes()).u32(irq.table.len() as u32);
        for (vector, entry) in irq.table.iter().enumerate() {
            let masked = if entry.masked { FLAG_MASKED } else { 0 };
            let pending = if irq.is_msix_pending(vector) { FLAG_PENDING } else { 0 };
            writer.u64(entry.message.addr).u32(entry.message.data).u8(masked | pending);
        }
        writer.u32(irq.msi_pending()).u8(u8::from(irq.is_intx_high()));
        Ok(Section {
            name: self.section_name(),
            kind: KIND.into(),
            version: VERSION,
            payload: writer.finish(),
        })
    }

    /// Loads the state into a function that the guest never touched, and leaves the interrupts detached.
    /// Nothing changes when the section is refused.
    pub fn load(&self, sections: &[Section]) -> Result<()> {
        let name = self.section_name();
        let Some(section) = sections.iter().find(|section| section.name == name) else {
            return Err(Error::section(name, "it is missing"));
        };
        if section.kind != KIND || section.version != VERSION {
            let what = format!(
                "{} version {} came, {KIND} version {VERSION} is known here",
                section.kind, section.version
            );
            return Err(Error::section(name, what));
        }
        let mut guest = self.lock();
        let mut reader = Reader::new(&name, &section.payload);
        let mut config = guest.config.clone();
        let bytes = reader.exact()?;
        config.load(&bytes).map_err(|what| reader.error(what))?;

        let vectors = reader.u32()? as usize;
        if vectors != guest.irq.table.len() {
            return Err(reader.error(format!(
                "{vectors} MSI-X vectors came, {} are here",
                guest.irq.table.len()
            )));
        }
        let mut table = Vec::with_capacity(vectors);
        let mut pending = Vec::with_capacity(vectors);
        for vector in 0..vectors {
            let message = MsiMessage { addr: reader.u64()?, data: reader.u32()? };
            let flags = reader.u8()?;
            if flags & !(FLAG_MASKED | FLAG_PENDING) != 0 || message.addr & 3 != 0 {
                return Err(reader.error(format!("MSI-X vector {vector} makes no sense")));
            }
            table.push(Entry { message, masked: flags & FLAG_MASKED != 0 });
            pending.push(flags & FLAG_PENDING != 0);
        }
        let msi_pending = reader.u32()?;
        let msi_vectors = config.msi().map_or(0, |msi| msi.vectors() as u32);
        if u64::from(msi_pending) >= 1 << msi_vectors {
            return Err(reader.error("pending MSI vectors that the function does not have"));
        }
        let intx_high = match reader.u8()? {
            level @ (0 | 1) => level == 1,
            level => return Err(reader.error(format!("an INTx level of {level}"))),
        };
        reader.finish()?;

        guest.irq.detach(&*self.interrupts);
        guest.config = config;
        guest.irq.table = table;
        guest.irq.load_pending(&pending, msi_pending, intx_high);
        Ok(())
    }
}
