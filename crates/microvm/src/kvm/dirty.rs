//! What the vCPUs write: KVM's dirty log.
//!
//! With manual protection the log is read and cleared in two steps. A page written between the two
//! is in the answer already, and its bytes are read after the clearing; a page written after the clearing
//! is marked anew: none is lost. Clearing goes in chunks, because KVM holds its MMU lock over each.
//!
//! A log whose clearing is deferred only reads; the engine clears each block right before it copies it. At the
//! start all bits are set then, and memory is protected block by block as the first pass goes over it.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use migration::cost::Held;
use migration::{Completeness, DirtyBitmap, DirtyClearer, DirtyTracker, PAGE_SIZE, VmmError};

use super::ioctls;
use super::machine::Slots;
use crate::error::Result;

/// Words of the bitmap that one KVM_CLEAR_DIRTY_LOG covers: 64 MiB of memory.
const CHUNK_WORDS: usize = 256;

/// The dirty log of all memory slots.
pub(super) struct KvmDirtyLog {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
    manual: bool,
    /// Clearing is left to a [`Clearer`].
    deferred: bool,
    /// Our number among the trackers of these slots, once started: only the last one started counts.
    turn: Option<u64>,
    /// One buffer per slot, kept over calls.
    buffers: Vec<Vec<u64>>,
    /// What they take.
    _held: Held,
}

impl KvmDirtyLog {
    pub(super) fn new(vm: Arc<VmFd>, slots: Arc<Slots>, manual: bool) -> Self {
        let words = |pages: u64| vec![0; pages.div_ceil(64) as usize];
        let buffers: Vec<_> = slots.layout().iter().map(|region| words(region.pages())).collect();
        let bytes: usize = buffers.iter().map(|words| size_of_val(words.as_slice())).sum();
        let held = Held::new(bytes as u64);
        Self { vm, slots, manual, deferred: false, turn: None, buffers, _held: held }
    }

    /// Reads the log of slot `slot` into its buffer and clears what it read.
    fn take(&mut self, slot: usize) -> Result<()> {
        let pages = self.slots.layout()[slot].len / PAGE_SIZE;
        let buffer = &mut self.buffers[slot];
        buffer.fill(0);
        ioctls::get_dirty_log(&self.vm, slot as u32, buffer)?;
        if !self.manual || self.deferred {
            return Ok(());
        }
        for (chunk, words) in buffer.chunks(CHUNK_WORDS).enumerate() {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let first = (chunk * CHUNK_WORDS * 64) as u64;
            let count = (words.len() as u64 * 64).min(pages - first) as u32;
            ioctls::clear_dirty_log(&self.vm, slot as u32, first, count, words)?;
        }
        Ok(())
    }

    fn try_start(&mut self) -> Result<()> {
        self.turn = Some(self.slots.start_logging(&self.vm)?);
        if self.deferred {
            return Ok(());
        }
        // Slots may begin with all bits set, so that switching the log on need not protect all memory at
        // once; or with the bits of an earlier log. Neither is a write since now.
        (0..self.buffers.len()).try_for_each(|slot| self.take(slot))
    }

    fn try_collect(&mut self, into: &mut DirtyBitmap) -> Result<Completeness> {
        self.slots.check_turn(self.turn)?;
        let mut completeness = Completeness::Complete;
        for slot in 0..self.buffers.len() {
            if let Err(error) = self.take(slot) {
                // What was not read or not cleared stays in the log.
                tracing::warn!(slot, %error, "the dirty log failed: all memory counts as written");
                completeness = Completeness::Incomplete;
            }
            let words = into.region_mut(slot).iter_mut();
            words.zip(&self.buffers[slot]).for_each(|(word, dirty)| *word |= dirty);
        }
        Ok(completeness)
    }

    fn try_stop(&mut self) -> Result<()> {
        match self.turn.take() {
            Some(turn) => self.slots.stop_logging(&self.vm, turn).map(drop),
            None => Ok(()),
        }
    }
}

/// Clears the log for [`KvmDirtyLog::defer`].
struct Clearer {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
}

impl DirtyClearer for Clearer {
    fn clear(&self, region: usize, first: u64, words: &[u64]) -> std::result::Result<(), VmmError> {
        let Some(layout) = self.slots.layout().get(region) else { return Ok(()) };
        let count = (words.len() as u64 * 64).min((layout.len / PAGE_SIZE).saturating_sub(first));
        ioctls::clear_dirty_log(&self.vm, region as u32, first, count as u32, words)?;
        Ok(())
    }
}

impl DirtyTracker for KvmDirtyLog {
    fn defer(&mut self) -> Option<Arc<dyn DirtyClearer>> {
        if !self.manual || self.turn.is_some() {
            return None;
        }
        self.deferred = true;
        Some(Arc::new(Clearer { vm: Arc::clone(&self.vm), slots: Arc::clone(&self.slots) }))
    }

    fn name(&self) -> &'static str {
        "kvm-dirty-log"
    }

    fn start(&mut self) -> std::result::Result<(), VmmError> {
        Ok(self.try_start()?)
    }

    fn collect(&mut self, into: &mut DirtyBitmap) -> std::result::Result<Completeness, VmmError> {
        Ok(self.try_collect(into)?)
    }

    fn stop(&mut self) -> std::result::Result<(), VmmError> {
        Ok(self.try_stop()?)
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.try_stop() {
            tracing::warn!(%error, "the dirty log stays on");
        }
    }
}
