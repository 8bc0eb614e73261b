//! Pages that arrive.

use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use super::Population;
use super::written::Written;
use super::zero::is_zero_page;
use crate::memory::{GuestMemory, MemoryError, PAGE_SIZE};
use crate::wire::RamRange;

/// Writes to the memory of a guest that is being loaded. Every address is checked.
#[derive(Debug)]
pub(crate) struct RamReceiver {
    memory: Arc<GuestMemory>,
    /// Made when it is needed, where no population brings it.
    written: OnceLock<Arc<Written>>,
    population: Option<Arc<Population>>,
    buffer: Vec<u8>,
    /// What the buffer takes, also while somebody has it.
    buffer_bytes: usize,
}

impl RamReceiver {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            written: OnceLock::new(),
            population: None,
            buffer: Vec::new(),
            buffer_bytes: 0,
        }
    }

    /// Memory is populated by and by.
    pub(crate) fn populate(&mut self, population: Arc<Population>) {
        self.written = OnceLock::from(population.written());
        self.population = Some(population);
    }

    fn written(&self) -> &Written {
        self.written.get_or_init(|| Arc::new(Written::of(&self.memory)))
    }

    /// Where the pages of `range` belong: writable for the whole range, and populated. Whoever asks writes them.
    pub(crate) fn target(&self, range: RamRange) -> Result<NonNull<u8>, MemoryError> {
        let target = self.memory.untracked_addr(range.gpa, range.len)?;
        if let Some(population) = &self.population {
            population.before_write(range)?;
        }
        self.written().note(&self.memory, range)?;
        Ok(target)
    }

    /// A buffer of `len` bytes, for pages that are checked first.
    pub(crate) fn take_buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(len, 0);
        self.buffer_bytes = buffer.capacity();
        buffer
    }

    /// What the buffer takes, in bytes.
    pub(crate) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Gives the buffer back.
    pub(crate) fn keep_buffer(&mut self, buffer: Vec<u8>) {
        self.buffer = buffer;
    }

    /// Writes checked pages.
    pub(crate) fn write(&self, range: RamRange, pages: &[u8]) -> Result<(), MemoryError> {
        let len = range.len.min(pages.len() as u64);
        let target = self.memory.untracked_addr(range.gpa, len)?;
        // SAFETY: `target` holds `len` bytes, and `pages` too.
        unsafe { std::ptr::copy_nonoverlapping(pages.as_ptr(), target.as_ptr(), len as usize) };
        Ok(())
    }

    /// Makes pages zero. Looks only at those that may be other than zero, and writes only those that are; holes stay
    /// holes. (They are not made holes either: a device may have the pages mapped.)
    pub(crate) fn zero(&self, range: RamRange) -> Result<(), MemoryError> {
        let (region, offset) = self.memory.locate(range.gpa, range.len)?;
        let first = self.memory.untracked_addr(range.gpa, range.len)?;
        let (begin, end) = (offset / PAGE_SIZE, (offset + range.len) / PAGE_SIZE);
        for page in self.written().in_range(region, begin, end) {
            // SAFETY: `page` is inside the range, which is whole pages from `first` on.
            unsafe {
                let page = first.add(((page - begin) * PAGE_SIZE) as usize);
                if !is_zero_page(page) {
                    std::ptr::write_bytes(page.as_ptr(), 0, PAGE_SIZE as usize);
                }
            }
        }
        Ok(())
    }
}
