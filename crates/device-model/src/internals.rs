//! The device's internal state: what a migration must carry, and what the digest is made of.

use std::sync::Arc;

use crate::blocks::{BLOCK_BYTES, BlockSet};
use crate::irq::Pending;
use crate::pattern;

/// Sizes of one device; source and destination must agree on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Configuration after power-on, in KiB.
    pub(crate) initial_kib: u32,
    /// Largest configuration, in KiB.
    pub(crate) initial_max_kib: u32,
    /// Bulk state in bytes.
    pub(crate) bulk_bytes: u64,
    /// The last so many bytes of bulk can be read only in STOP_COPY.
    pub(crate) stop_only_bytes: u64,
}

impl Geometry {
    pub(crate) fn blocks(&self) -> u64 {
        self.bulk_bytes.div_ceil(BLOCK_BYTES)
    }

    /// The first block that can be read only in STOP_COPY.
    pub(crate) fn first_stop_only_block(&self) -> u64 {
        match self.stop_only_bytes {
            0 => self.blocks(),
            bytes => self.bulk_bytes.saturating_sub(bytes) / BLOCK_BYTES,
        }
    }

    /// Length of block `block` in bytes.
    pub(crate) fn block_len(&self, block: u64) -> u64 {
        self.bulk_bytes.saturating_sub(block.saturating_mul(BLOCK_BYTES)).min(BLOCK_BYTES)
    }
}

/// The configuration: bytes that follow from (generation, size), or that a stream brought.
#[derive(Clone, Debug)]
pub(crate) struct Configuration {
    pub(crate) generation: u32,
    pub(crate) size_bytes: u64,
    stored: Option<Arc<Vec<u8>>>,
}

const DOMAIN_CONFIG: u64 = 0x636f_6e66;
const DOMAIN_BULK: u64 = 0x6275_6c6b;

impl Configuration {
    pub(crate) fn generated(generation: u32, size_kib: u32) -> Self {
        Self { generation, size_bytes: u64::from(size_kib) * 1024, stored: None }
    }

    /// A configuration that a stream brought.
    pub(crate) fn stored(generation: u32, bytes: Vec<u8>) -> Self {
        Self { generation, size_bytes: bytes.len() as u64, stored: Some(Arc::new(bytes)) }
    }

    /// Copies bytes from `offset` (a multiple of 8) on.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) {
        match &self.stored {
            None => {
                let seed =
                    pattern::seed(DOMAIN_CONFIG, u64::from(self.generation), self.size_bytes);
                pattern::fill(seed, offset, out);
            }
            Some(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let end = start.saturating_add(out.len());
                if let Some(part) = bytes.get(start..end) {
                    out.copy_from_slice(part);
                }
            }
        }
    }
}

/// The bulk state. A block is either a pattern of the fill that wrote it, or bytes that a stream
/// brought; memory is taken only for the latter.
#[derive(Clone, Debug)]
pub(crate) struct Bulk {
    geometry: Geometry,
    /// The fill that last wrote each block; 0 = power-on.
    fills: Vec<u64>,
    stored: Vec<u8>,
    is_stored: BlockSet,
}

impl Bulk {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let blocks = geometry.blocks();
        let fills = vec![0; blocks as usize];
        Self { geometry, fills, stored: Vec::new(), is_stored: BlockSet::empty(blocks) }
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Rewrites blocks `first..end` as fill number `fill`.
    pub(crate) fn fill(&mut self, first: u64, end: u64, fill: u64) {
        for block in first..end.min(self.geometry.blocks()) {
            if let Some(slot) = self.fills.get_mut(block as usize) {
                *slot = fill;
            }
        }
        self.is_stored.remove_range(first, end);
    }

    /// Copies block `block` to the front of `out` and answers its length.
    pub(crate) fn read_block(&self, block: u64, out: &mut [u8]) -> usize {
        let len = (self.geometry.block_len(block) as usize).min(out.len());
        let out = &mut out[..len];
        if self.is_stored.contains(block) {
            let start = (block * BLOCK_BYTES) as usize;
            if let Some(bytes) = self.stored.get(start..start + len) {
                out.copy_from_slice(bytes);
            }
        } else {
            let fill = self.fills.get(block as usize).copied().unwrap_or(0);
            pattern::fill(pattern::seed(DOMAIN_BULK, fill, block), 0, out);
        }
        len
    }

    /// Takes the bytes of one block from a stream. `bytes` has the block's length.
    pub(crate) fn store_block(&mut self, block: u64, bytes: &[u8]) {
        if self.stored.is_empty() {
            // Zeroed pages come from the system one by one as they are written.
            self.stored = vec![0; self.geometry.bulk_bytes as usize];
        }
        let start = (block * BLOCK_BYTES) as usize;
        if let Some(slot) = self.stored.get_mut(start..start + bytes.len()) {
            slot.copy_from_slice(bytes);
            self.is_stored.insert_range(block, block + 1);
        }
    }
}

/// Everything that follows from what the guest did.
#[derive(Clone, Debug)]
pub(crate) struct Internals {
    pub(crate) regs: Registers,
    pub(crate) pending: Pending,
    pub(crate) config: Configuration,
    pub(crate) bulk: Bulk,
}

/// Registers and counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) control: u32,
    /// Without STATUS_INTX, which is a pending interrupt.
    pub(crate) status: u32,
    pub(crate) config_kib: u32,
    pub(crate) dma_addr: u64,
    pub(crate) dma_pages: u32,
    pub(crate) dma_rate: u32,
    pub(crate) vector: u32,
    pub(crate) fill_kib: u32,
    pub(crate) scratch: u32,
    /// Stamps written.
    pub(crate) completed: u64,
    /// Interrupts raised.
    pub(crate) raised: u64,
    /// Doorbell stamps still to be written.
    pub(crate) owed: u64,
    /// The doorbell's interrupt is still to be raised.
    pub(crate) irq_owed: bool,
    /// Fills of bulk state so far.
    pub(crate) fills: u64,
    /// The block the next fill starts at.
    pub(crate) fill_cursor: u64,
}

impl Internals {
    /// The state after power-on or reset.
    pub(crate) fn power_on(geometry: Geometry) -> Self {
        let regs = Registers {
            control: 0,
            status: 0,
            config_kib: geometry.initial_kib,
            dma_addr: 0,
            dma_pages: 0,
            dma_rate: 0,
            vector: 0,
            fill_kib: 0,
            scratch: 0,
            completed: 0,
            raised: 0,
            owed: 0,
            irq_owed: false,
            fills: 0,
            fill_cursor: 0,
        };
        Self {
            regs,
            pending: Pending::default(),
            config: Configuration::generated(0, geometry.initial_kib),
            bulk: Bulk::new(geometry),
        }
    }

    /// A digest of all of it, made from scratch. It knows nothing of streams: whether a byte is
    /// generated or was loaded does not matter, only what it is.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"vmferry software device, state digest 1");
        let Registers {
            control,
            status,
            config_kib,
            dma_addr,
            dma_pages,
            dma_rate,
            vector,
            fill_kib,
            scratch,
            completed,
            raised,
            owed,
            irq_owed,
            fills,
            fill_cursor,
        } = self.regs;
        for word in [control, status, config_kib, dma_pages, dma_rate, vector, fill_kib, scratch] {
            hasher.update(&word.to_le_bytes());
        }
        for word in [dma_addr, completed, raised, owed, fills, fill_cursor] {
            hasher.update(&word.to_le_bytes());
        }
        hasher.update(&[u8::from(irq_owed), self.pending.msix, u8::from(self.pending.intx)]);

        let mut chunk = vec![0; 64 << 10];
        hasher.update(&self.config.generation.to_le_bytes());
        hasher.update(&self.config.size_bytes.to_le_bytes());
        let mut offset = 0;
        while offset < self.config.size_bytes {
            let len = (self.config.size_bytes - offset).min(chunk.len() as u64) as usize;
            self.config.read(offset, &mut chunk[..len]);
            hasher.update(&chunk[..len]);
            offset += len as u64;
        }
        let geometry = self.bulk.geometry();
        hasher.update(&geometry.bulk_bytes.to_le_bytes());
        let mut used = 0;
        for block in 0..geometry.blocks() {
            used += self.bulk.read_block(block, &mut chunk[used..]);
            if used + BLOCK_BYTES as usize > chunk.len() {
                hasher.update(&chunk[..used]);
                used = 0;
            }
        }
        hasher.update(&chunk[..used]);
        hasher.finalize().into()
    }
}
