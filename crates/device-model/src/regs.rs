//! The registers of BAR 0, as `docs/workload.md` gives them.

/// Vendor id.
pub const VENDOR_ID: u16 = 0x1b36;
/// Device id.
pub const DEVICE_ID: u16 = 0x00f7;
/// Subsystem vendor id.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x1b36;
/// Subsystem id.
pub const SUBSYSTEM_ID: u16 = 0x0001;
/// Class code (24 bits).
pub const CLASS_CODE: u32 = 0x08_8000;
/// Revision.
pub const REVISION: u8 = 1;

/// Size of BAR 0, in bytes.
pub const BAR0_BYTES: u64 = 4096;
/// Size of BAR 2, in bytes.
pub const BAR2_BYTES: u64 = 4096;
/// Size of configuration space, in bytes.
pub const CONFIG_SPACE_BYTES: u64 = 256;
/// Offset of the MSI-X table in BAR 2.
pub const MSIX_TABLE_OFFSET: u64 = 0;
/// Offset of the pending bit array in BAR 2.
pub const MSIX_PBA_OFFSET: u64 = 0x800;
/// Number of MSI-X vectors.
pub const MSIX_VECTORS: u32 = 4;

/// R: [`ID_VALUE`].
pub const ID: u64 = 0x00;
/// R: [`VERSION_VALUE`].
pub const VERSION: u64 = 0x04;
/// RW: [`CONTROL_DMA`], [`CONTROL_IRQ`].
pub const CONTROL: u64 = 0x08;
/// R, some bits W1C: [`STATUS_RECONFIGURED`], [`STATUS_DMA_FAILED`], [`STATUS_INTX`].
pub const STATUS: u64 = 0x0c;
/// RW: size of the next configuration, in KiB.
pub const CONFIG_KIB: u64 = 0x10;
/// RW: writing reconfigures.
pub const CONFIG_GEN: u64 = 0x14;
/// R: the generation in force.
pub const CONFIG_ACK: u64 = 0x18;
/// RW: ring address, low half.
pub const DMA_LO: u64 = 0x1c;
/// RW: ring address, high half.
pub const DMA_HI: u64 = 0x20;
/// RW: ring length in pages.
pub const DMA_PAGES: u64 = 0x24;
/// RW: background stamps per second.
pub const DMA_RATE: u64 = 0x28;
/// W: so many stamps, then one interrupt.
pub const DOORBELL: u64 = 0x2c;
/// R: stamps written, low half.
pub const COMPLETED: u64 = 0x30;
/// R: stamps written, high half.
pub const COMPLETED_HI: u64 = 0x34;
/// RW: vector to raise.
pub const VECTOR: u64 = 0x38;
/// R: interrupts raised.
pub const RAISED: u64 = 0x3c;
/// RW: rewrites so many KiB of bulk state.
pub const FILL_KIB: u64 = 0x40;
/// RW: kept as written.
pub const SCRATCH: u64 = 0x44;

/// Largest value of [`DMA_RATE`].
pub const DMA_RATE_MAX: u32 = 1_000_000;

/// What [`ID`] reads.
pub const ID_VALUE: u32 = 0x5946_4d56;
/// What [`VERSION`] reads.
pub const VERSION_VALUE: u32 = 1;

/// [`CONTROL`]: background DMA on.
pub const CONTROL_DMA: u32 = 1;
/// [`CONTROL`]: interrupts on.
pub const CONTROL_IRQ: u32 = 2;
/// [`STATUS`]: a reconfiguration is in force.
pub const STATUS_RECONFIGURED: u32 = 1;
/// [`STATUS`]: a DMA failed; write 1 to clear.
pub const STATUS_DMA_FAILED: u32 = 2;
/// [`STATUS`]: the INTx line is asserted; write 1 to lower it.
pub const STATUS_INTX: u32 = 4;

/// Distance of two stamps, and size of a ring page, in bytes.
pub const STAMP_STRIDE_BYTES: u64 = 4096;
/// Size of a stamp in bytes.
pub const STAMP_BYTES: usize = 16;
/// Doorbell stamps that are done before the write returns.
pub const DOORBELL_SYNC_STAMPS: u64 = 1024;

/// The bytes of stamp number `number`.
pub fn stamp(number: u64) -> [u8; STAMP_BYTES] {
    let mut bytes = [0; STAMP_BYTES];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    bytes
}
