//! Guest memory: memfd regions, handed out only as a type whose writes mark their pages.
//!
//! The VMM's own writes are one of the four sources of dirty pages. Whoever writes through
//! [`GuestMemory::write`] is seen; whoever takes [`GuestMemory::untracked_addr`] (vCPUs, devices with
//! a mapping of the memfd) must be covered by a tracker of its own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::backing::{self, PageSizes};
use crate::bitmap::DirtyBitmap;

/// The page size of dirty tracking and transfer, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// A range of guest physical addresses backed by memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RegionLayout {
    /// First guest physical address; page aligned.
    pub gpa: u64,
    /// Length in bytes; page aligned.
    pub len: u64,
}

impl RegionLayout {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE
    }
}

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The range is not guest memory.
    #[error("{len:#x} bytes at guest address {gpa:#x} are not guest memory")]
    OutOfRange {
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The layout cannot be built.
    #[error("memory layout refused: {0}")]
    Layout(String),
    /// There is no tmpfs with huge pages to be had.
    #[error(
        "no huge pages for guest memory: {source}; run it as root on a kernel with transparent huge pages, or \
         leave them to the kernel"
    )]
    HugePages {
        /// The cause.
        source: std::io::Error,
    },
    /// The kernel refused.
    #[error("{call} of {len:#x} bytes of guest memory: {source}")]
    Os {
        /// The system call.
        call: &'static str,
        /// Length in bytes.
        len: u64,
        /// The cause.
        source: std::io::Error,
    },
}

/// One region: a memfd and this process's mapping of it.
#[derive(Debug)]
struct Region {
    layout: RegionLayout,
    fd: Arc<OwnedFd>,
    addr: NonNull<u8>,
    dirty: Vec<AtomicU64>,
}

// SAFETY: the mapping is shared memory that lives as long as the region; every access through it is
// a raw copy, and the guest may change the bytes at any time anyway.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: address and length are those of our own mmap, and no reference into it is handed out.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.layout.len as usize) };
    }
}

/// All of a guest's memory.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    tracking: AtomicBool,
}

impl GuestMemory {
    /// Memory of its own memfd per region. Regions must be page aligned, ascending and apart.
    pub fn new(layout: &[RegionLayout]) -> Result<Self, MemoryError> {
        Self::with_pages(layout, PageSizes::default())
    }

    /// As [`new`](Self::new), of the pages that are asked for.
    pub fn with_pages(layout: &[RegionLayout], pages: PageSizes) -> Result<Self, MemoryError> {
        if layout.is_empty() {
            return Err(MemoryError::Layout("no region".into()));
        }
        let mut end = 0;
        for region in layout {
            let aligned = region.gpa % PAGE_SIZE == 0 && region.len % PAGE_SIZE == 0;
            if !aligned || region.len == 0 {
                return Err(MemoryError::Layout(format!("{region:x?} is not whole pages")));
            }
            if region.gpa < end {
                return Err(MemoryError::Layout(format!("{region:x?} overlaps the one before")));
            }
            end = region
                .gpa
                .checked_add(region.len)
                .ok_or_else(|| MemoryError::Layout(format!("{region:x?} wraps around")))?;
        }
        let region = |layout| Region::new(layout, pages);
        let regions = layout.iter().map(region).collect::<Result<_, _>>()?;
        Ok(Self { regions, tracking: AtomicBool::new(false) })
    }

    /// The regions, ascending.
    pub fn layout(&self) -> Vec<RegionLayout> {
        self.regions.iter().map(|r| r.layout).collect()
    }

    /// Total bytes.
    pub fn size_bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.layout.len).sum()
    }

    /// The memfd of region `region`; the region starts at its offset 0.
    pub fn region_fd(&self, region: usize) -> BorrowedFd<'_> {
        self.regions[region].fd.as_fd()
    }

    /// The memfd of region `region`, to keep.
    pub fn region_fd_arc(&self, region: usize) -> Arc<OwnedFd> {
        Arc::clone(&self.regions[region].fd)
    }

    /// Copies guest memory at `gpa` into `data`.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let addr = self.addr(gpa, data.len() as u64)?;
        // SAFETY: `addr` checked that the whole range lies in one mapping; bytes may be torn by the
        // guest, which a raw copy allows for.
        unsafe { std::ptr::copy_nonoverlapping(addr.as_ptr(), data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    /// Copies `data` to guest memory at `gpa` and marks the pages dirty. The mark comes after the bytes:
    /// a sync in between sends the page again instead of missing it.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let addr = self.addr(gpa, data.len() as u64)?;
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), addr.as_ptr(), data.len()) };
        self.mark_dirty(gpa, data.len() as u64);
        Ok(())
    }

    /// Marks the pages of a range as written by the VMM. Bytes outside of memory are ignored.
    pub fn mark_dirty(&self, gpa: u64, len: u64) {
        if len == 0 || !self.tracking.load(Ordering::Acquire) {
            return;
        }
        let end = gpa.saturating_add(len);
        for region in &self.regions {
            let first = gpa.max(region.layout.gpa);
            let last = end.min(region.layout.gpa + region.layout.len);
            if first >= last {
                continue;
            }
            let pages = (first - region.layout.gpa) / PAGE_SIZE
                ..(last - region.layout.gpa).div_ceil(PAGE_SIZE);
            for page in pages {
                region.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    /// Starts or stops marking; both forget all marks.
    pub fn set_tracking(&self, on: bool) {
        self.tracking.store(on, Ordering::Release);
        for region in &self.regions {
            region.dirty.iter().for_each(|word| word.store(0, Ordering::Release));
        }
    }

    /// Moves the marks of the VMM's own writes into `into`.
    pub fn take_dirty(&self, into: &mut DirtyBitmap) {
        for (index, region) in self.regions.iter().enumerate() {
            let words = into.region_mut(index);
            for (word, dirty) in words.iter_mut().zip(&region.dirty) {
                if dirty.load(Ordering::Relaxed) != 0 {
                    *word |= dirty.swap(0, Ordering::AcqRel);
                }
            }
        }
    }

    /// The address of `[gpa, gpa + len)` in this process, for writers that have a tracker of their own
    /// (vCPUs, guest threads, a migration being loaded). Writes through it are *not* marked.
    pub fn untracked_addr(&self, gpa: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        self.addr(gpa, len)
    }

    /// Gives `[gpa, gpa + len)`, whole pages, memory of the host where it has none, and maps it writable here:
    /// nobody who writes it later waits for a page. What the pages hold stays. Answers false where the kernel
    /// cannot (before Linux 5.14).
    pub fn populate(&self, gpa: u64, len: u64) -> Result<bool, MemoryError> {
        let addr = self.addr(gpa, len)?;
        loop {
            // SAFETY: the range is ours and mapped; populating changes nothing of its content.
            let done = unsafe {
                libc::madvise(addr.as_ptr().cast(), len as usize, libc::MADV_POPULATE_WRITE)
            };
            if done == 0 {
                return Ok(true);
            }
            let source = std::io::Error::last_os_error();
            match source.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => {}
                Some(libc::EINVAL) => return Ok(false),
                _ => {
                    return Err(MemoryError::Os {
                        call: "madvise(MADV_POPULATE_WRITE)",
                        len,
                        source,
                    });
                }
            }
        }
    }

    /// The region that holds `[gpa, gpa + len)`, and the range's offset in it.
    pub fn locate(&self, gpa: u64, len: u64) -> Result<(usize, u64), MemoryError> {
        let out_of_range = MemoryError::OutOfRange { gpa, len };
        let Some(end) = gpa.checked_add(len) else { return Err(out_of_range) };
        let holds = |r: &Region| gpa >= r.layout.gpa && end <= r.layout.gpa + r.layout.len;
        match self.regions.iter().position(holds) {
            Some(region) => Ok((region, gpa - self.regions[region].layout.gpa)),
            None => Err(out_of_range),
        }
    }

    fn addr(&self, gpa: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        let (region, offset) = self.locate(gpa, len)?;
        // SAFETY: the offset is inside the mapping.
        Ok(unsafe { self.regions[region].addr.add(offset as usize) })
    }
}

impl Region {
    fn new(layout: &RegionLayout, pages: PageSizes) -> Result<Self, MemoryError> {
        let len = layout.len;
        let fd = backing::create(len, pages)?;
        let addr = map_shared(fd.as_fd(), len).ok_or_else(|| MemoryError::Os {
            call: "mmap",
            len,
            source: std::io::Error::last_os_error(),
        })?;
        // A wish: where the kernel does not grant it, all works the same.
        // SAFETY: advice about our own mapping.
        unsafe { libc::madvise(addr.as_ptr().cast(), len as usize, libc::MADV_HUGEPAGE) };
        let words = layout.pages().div_ceil(64);
        let dirty = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { layout: *layout, fd: Arc::new(fd), addr, dirty })
    }
}

fn map_shared(fd: BorrowedFd<'_>, len: u64) -> Option<NonNull<u8>> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping of an fd we hold, at an address the kernel chooses.
    let addr =
        unsafe { libc::mmap(std::ptr::null_mut(), len as usize, prot, flags, fd.as_raw_fd(), 0) };
    if addr == libc::MAP_FAILED { None } else { NonNull::new(addr.cast()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn whoever_holds_the_file_cannot_take_memory_away_from_under_the_mapping() {
        let layout = [RegionLayout { gpa: 0, len: 2 * PAGE_SIZE }];
        let memory = GuestMemory::new(&layout).unwrap();
        let file = File::from(memory.region_fd(0).try_clone_to_owned().unwrap());
        for len in [0, PAGE_SIZE, 3 * PAGE_SIZE] {
            let refused = file.set_len(len).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM), "{len}");
        }
        memory.write(PAGE_SIZE, &[1]).unwrap();
    }

    #[test]
    fn huge_pages_come_whole() {
        let layout = [RegionLayout { gpa: 0, len: 8 << 20 }];
        let memory = match GuestMemory::with_pages(&layout, PageSizes::Huge) {
            Ok(memory) => memory,
            Err(error @ MemoryError::HugePages { .. }) => {
                return println!("skipped: {error}");
            }
            Err(error) => panic!("{error}"),
        };
        memory.write(5 << 20, &[7; 100]).unwrap();
        let file = File::from(memory.region_fd(0).try_clone_to_owned().unwrap());
        let allocated = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        assert!(
            allocated == 2 << 20 || allocated == 4096,
            "{allocated}: a page, huge unless memory is in pieces"
        );
        let mut data = [0; 100];
        memory.read(5 << 20, &mut data).unwrap();
        assert_eq!(data, [7; 100]);
    }
}
