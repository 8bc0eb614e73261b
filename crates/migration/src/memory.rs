//! Guest memory: memfd regions, handed out only as a type whose writes mark their pages.
//!
//! The VMM's own writes are one of the four sources of dirty pages. Whoever writes through
//! [`GuestMemory::write`] is seen; whoever takes [`GuestMemory::untracked_addr`] (vCPUs, devices with
//! a mapping of the memfd) must be covered by a tracker of its own.
//!
//! In a local move another process's memory takes the place of this one's, behind the same descriptors and at the
//! same addresses:
//!
//! ```text
//!            adopt(files)              unlock()                   keep()
//!   own ──────────────────▶ adopted, ───────────▶ adopted, ──────────────▶ own
//!    ▲                      read only             writable
//!    └──────────────────────────┴── give_back() ──────┘          own ── let_go() ──▶ own, empty
//! ```

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    /// It cannot be memory of two processes.
    #[error("guest memory cannot be handed over: {0}")]
    Shared(String),
    /// It is the source's until Commit.
    #[error("{len:#x} bytes at guest address {gpa:#x} are still the source's")]
    Locked {
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
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

/// What x86-64 and most others call a huge page, in bytes.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// What came of the wish for huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// The range is made of them, and populated.
    There,
    /// There is no such page to be had now.
    Refused,
    /// Somebody is at the pages that are there, or a signal came.
    Busy,
    /// Not here, and where that is the answer always, not at all: the kernel has one word for both.
    Unknown,
}

impl HugePages {
    fn after(error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            // No page, or no more for this cgroup.
            Some(libc::ENOMEM | libc::EBUSY) => Self::Refused,
            Some(libc::EAGAIN | libc::EINTR) => Self::Busy,
            _ => Self::Unknown,
        }
    }
}

/// One region: a memfd and this process's mapping of it.
#[derive(Debug)]
struct Region {
    layout: RegionLayout,
    fd: Arc<OwnedFd>,
    addr: NonNull<u8>,
    /// The part of the address space that the mapping lies in.
    reserved: Reserved,
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
        unsafe { libc::munmap(self.reserved.addr.as_ptr().cast(), self.reserved.len) };
    }
}

/// Address space for a region alone, down to the level of page tables that stand for 1 GiB each: what KVM and the
/// kernel do about a change of a mapping takes a time that grows with its size, unless no page table is there.
#[derive(Debug)]
struct Reserved {
    addr: NonNull<u8>,
    len: usize,
}

/// All of a guest's memory.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    tracking: AtomicBool,
    /// Adopted, and still the source's: nothing here writes it.
    locked: AtomicBool,
    /// This process's own files, while adopted ones stand in their place.
    set_aside: Mutex<Option<Vec<OwnedFd>>>,
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
        Ok(Self {
            regions,
            tracking: AtomicBool::new(false),
            locked: AtomicBool::new(false),
            set_aside: Mutex::default(),
        })
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
        if self.locked.load(Ordering::Acquire) {
            return Err(MemoryError::Locked { gpa, len: data.len() as u64 });
        }
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

    /// As [`populate`](Self::populate), with a huge page for each 2 MiB that begin at `gpa`, a multiple of that in
    /// its region, even where the kernel would not take any by itself (`MADV_COLLAPSE`, Linux 6.1). Pages that are
    /// there already are copied, and what they hold stays.
    pub fn populate_huge(&self, gpa: u64, len: u64) -> Result<HugePages, MemoryError> {
        // A block with nothing in it counts as cut off. By a fault: what fallocate() makes is not cleared before somebody
        // faults it in, and where that is a huge page already, Linux 6.18 maps it as it is.
        for block in (0..len).step_by(HUGE_PAGE_BYTES) {
            if !self.populate(gpa + block, PAGE_SIZE)? {
                return Ok(HugePages::Unknown);
            }
        }
        let addr = self.addr(gpa, len)?;
        // SAFETY: the range is ours and mapped; which pages it is made of changes nothing of its content.
        if unsafe { libc::madvise(addr.as_ptr().cast(), len as usize, libc::MADV_COLLAPSE) } != 0 {
            return Ok(HugePages::after(&std::io::Error::last_os_error()));
        }
        // Maps all of it, whatever size the kernel's huge pages have.
        Ok(if self.populate(gpa, len)? { HugePages::There } else { HugePages::Unknown })
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

    // --- local moves --------------------------------------------------------------------------

    /// The regions' files, for another process to map.
    ///
    /// # Errors
    /// [`MemoryError::Shared`] where one is no memfd that is sealed.
    pub fn files_to_share(&self) -> Result<Vec<Arc<OwnedFd>>, MemoryError> {
        let share = |region: &Region| {
            backing::check_shared(region.fd.as_fd(), region.layout.len)?;
            Ok(Arc::clone(&region.fd))
        };
        self.regions.iter().map(share).collect()
    }

    /// Puts the memory of another process in the place of this one's: `files[i]` behind region i, at the same
    /// address and behind the same descriptor. Whoever mapped the file itself maps it anew. Until
    /// [`unlock`](Self::unlock) nothing can be written through this mapping: [`write`](Self::write) fails and
    /// whoever writes by address gets SIGSEGV. Nobody may use the memory meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::Shared`] where a file is not what the region needs; then all is as before.
    pub fn adopt(&self, files: Vec<OwnedFd>) -> Result<(), MemoryError> {
        if files.len() != self.regions.len() {
            let what = format!("{} files for {} regions", files.len(), self.regions.len());
            return Err(MemoryError::Shared(what));
        }
        for (place, (region, file)) in self.regions.iter().zip(&files).enumerate() {
            backing::check_shared(file.as_fd(), region.layout.len)?;
            let twice = files[..place].iter().any(|other| same_file(other, file));
            if twice || same_file(&region.fd, file) {
                return Err(MemoryError::Shared("one file is there twice".into()));
            }
        }
        let mut set_aside = self.set_aside();
        if set_aside.is_some() {
            return Err(MemoryError::Shared("memory was adopted already".into()));
        }
        let own: Vec<OwnedFd> =
            self.regions.iter().map(Region::own_file).collect::<Result<_, _>>()?;
        self.locked.store(true, Ordering::Release);
        for (place, (region, file)) in self.regions.iter().zip(&files).enumerate() {
            if let Err(error) = region.replace(file, libc::PROT_READ) {
                for (region, own) in self.regions[..=place].iter().zip(&own) {
                    region.replace(own, READ_WRITE)?;
                }
                self.locked.store(false, Ordering::Release);
                return Err(error);
            }
        }
        *set_aside = Some(own);
        Ok(())
    }

    /// Memory that was adopted is this process's from here on: it may be written.
    ///
    /// # Errors
    /// The kernel's refusal; then it still cannot.
    pub fn unlock(&self) -> Result<(), MemoryError> {
        if !self.locked.load(Ordering::Acquire) {
            return Ok(());
        }
        for region in &self.regions {
            let len = region.layout.len;
            // SAFETY: our own mapping of a file that is open for writing.
            let done =
                unsafe { libc::mprotect(region.addr.as_ptr().cast(), len as usize, READ_WRITE) };
            if done != 0 {
                let source = std::io::Error::last_os_error();
                return Err(MemoryError::Os { call: "mprotect", len, source });
            }
        }
        self.locked.store(false, Ordering::Release);
        Ok(())
    }

    /// Memory that was adopted stays for good.
    pub fn keep(&self) {
        *self.set_aside() = None;
    }

    /// Undoes [`adopt`](Self::adopt): this process's own memory is back, and it has no more of the other's.
    /// Answers whether there was anything to undo.
    ///
    /// # Errors
    /// The kernel's refusal; the memory must not be used then.
    pub fn give_back(&self) -> Result<bool, MemoryError> {
        let mut set_aside = self.set_aside();
        let Some(own) = set_aside.as_ref() else { return Ok(false) };
        for (region, own) in self.regions.iter().zip(own) {
            region.replace(own, READ_WRITE)?;
        }
        *set_aside = None;
        self.locked.store(false, Ordering::Release);
        Ok(true)
    }

    /// Another process has the memory for good: empty memory takes its place here.
    ///
    /// # Errors
    /// The kernel's refusal; what was replaced by then is.
    pub fn let_go(&self) -> Result<(), MemoryError> {
        for region in &self.regions {
            let empty = backing::create(region.layout.len, PageSizes::default())?;
            region.replace(&empty, READ_WRITE)?;
        }
        Ok(())
    }

    fn set_aside(&self) -> MutexGuard<'_, Option<Vec<OwnedFd>>> {
        self.set_aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn addr(&self, gpa: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        let (region, offset) = self.locate(gpa, len)?;
        // SAFETY: the offset is inside the mapping.
        Ok(unsafe { self.regions[region].addr.add(offset as usize) })
    }
}

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

impl Region {
    fn new(layout: &RegionLayout, pages: PageSizes) -> Result<Self, MemoryError> {
        let len = layout.len;
        let fd = backing::create(len, pages)?;
        let reserved = Reserved::new(len)?;
        let words = layout.pages().div_ceil(64);
        let dirty = (0..words).map(|_| AtomicU64::new(0)).collect();
        let addr = reserved.start();
        let region = Self { layout: *layout, fd: Arc::new(fd), addr, reserved, dirty };
        region.map(&region.fd, READ_WRITE)?;
        Ok(region)
    }

    fn os(&self, call: &'static str, source: std::io::Error) -> MemoryError {
        MemoryError::Os { call, len: self.layout.len, source }
    }

    /// Another descriptor of the file as it is now.
    fn own_file(&self) -> Result<OwnedFd, MemoryError> {
        self.fd.as_fd().try_clone_to_owned().map_err(|source| self.os("dup", source))
    }

    /// `file` stands behind the region's address from here on.
    fn map(&self, file: &OwnedFd, prot: libc::c_int) -> Result<(), MemoryError> {
        let len = self.layout.len as usize;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let addr = self.addr.as_ptr().cast();
        // SAFETY: inside of what is reserved for it, in the place of our own mapping of the same length if there is
        // one, into which nobody holds a reference.
        if unsafe { libc::mmap(addr, len, prot, flags, file.as_raw_fd(), 0) } == libc::MAP_FAILED {
            return Err(self.os("mmap", std::io::Error::last_os_error()));
        }
        // A wish: where the kernel does not grant it, all works the same.
        // SAFETY: advice about our own mapping.
        unsafe { libc::madvise(addr, len, libc::MADV_HUGEPAGE) };
        Ok(())
    }

    /// `file` stands behind the region's descriptor and address from here on.
    fn replace(&self, file: &OwnedFd, prot: libc::c_int) -> Result<(), MemoryError> {
        self.map(file, prot)?;
        // SAFETY: both are ours, and whoever holds the number is to see the other file.
        if unsafe { libc::dup3(file.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
            return Err(self.os("dup3", std::io::Error::last_os_error()));
        }
        Ok(())
    }
}

impl Reserved {
    /// What a page table of the second level stands for, in bytes.
    const ALIGN: usize = 1 << 30;

    /// For a mapping of `len` bytes.
    fn new(len: u64) -> Result<Self, MemoryError> {
        let os = |source| MemoryError::Os { call: "mmap", len, source };
        let whole = usize::try_from(len)
            .ok()
            .and_then(|len| len.checked_next_multiple_of(Self::ALIGN)?.checked_add(Self::ALIGN))
            .ok_or_else(|| os(std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping without access, at an address the kernel chooses.
        let addr =
            unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(os(std::io::Error::last_os_error()));
        }
        let addr = NonNull::new(addr.cast())
            .ok_or_else(|| os(std::io::Error::from_raw_os_error(libc::EFAULT)))?;
        Ok(Self { addr, len: whole })
    }

    /// Where the mapping begins.
    fn start(&self) -> NonNull<u8> {
        let offset = self.addr.as_ptr().align_offset(Self::ALIGN);
        // SAFETY: less than ALIGN, by which more is reserved.
        unsafe { self.addr.add(offset) }
    }
}

fn same_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    let id = |fd: &OwnedFd| {
        let about = std::fs::File::from(fd.try_clone().ok()?).metadata().ok()?;
        Some((about.dev(), about.ino()))
    };
    id(one).is_some_and(|one| id(other) == Some(one))
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

    const TWO: [RegionLayout; 2] = [
        RegionLayout { gpa: 0, len: PAGE_SIZE },
        RegionLayout { gpa: 1 << 32, len: 3 * PAGE_SIZE },
    ];

    fn shared(memory: &GuestMemory) -> Vec<OwnedFd> {
        let files = memory.files_to_share().unwrap();
        files.iter().map(|file| file.try_clone().unwrap()).collect()
    }

    fn byte(memory: &GuestMemory, gpa: u64) -> u8 {
        let mut byte = [0];
        memory.read(gpa, &mut byte).unwrap();
        byte[0]
    }

    /// Whether the kernel can write there; a plain write would be the end of the test.
    fn writable(memory: &GuestMemory, gpa: u64) -> bool {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut writer, &[9]).unwrap();
        let addr = memory.untracked_addr(gpa, 1).unwrap();
        // SAFETY: one byte of the mapping, which fails instead of raising a signal where it cannot be written.
        let read = unsafe { libc::read(reader.as_raw_fd(), addr.as_ptr().cast(), 1) };
        if read != 1 {
            let mut rest = [0];
            std::io::Read::read_exact(&mut reader, &mut rest).unwrap();
        }
        read == 1
    }

    #[test]
    fn adopted_memory_is_the_others_and_cannot_be_written_before_it_is_unlocked() {
        let source = GuestMemory::new(&TWO).unwrap();
        let here = GuestMemory::new(&TWO).unwrap();
        source.write(1 << 32, &[5]).unwrap();
        here.write(1 << 32, &[1]).unwrap();
        let descriptor = here.region_fd(1).as_raw_fd();
        here.adopt(shared(&source)).unwrap();
        assert_eq!(byte(&here, 1 << 32), 5);
        assert_eq!(here.region_fd(1).as_raw_fd(), descriptor);
        assert!(matches!(here.write(0, &[1]), Err(MemoryError::Locked { .. })));
        assert!(!writable(&here, 0), "neither by a call nor by an address");
        source.write(0, &[6]).unwrap();
        assert_eq!(byte(&here, 0), 6, "the source's guest runs on");
        here.unlock().unwrap();
        here.write(0, &[7]).unwrap();
        assert!(writable(&here, 1));
        assert_eq!((byte(&source, 0), byte(&source, 1)), (7, 9));
    }

    #[test]
    fn given_back_it_is_the_own_memory_again_and_the_others_is_untouched() {
        let source = GuestMemory::new(&TWO).unwrap();
        let here = GuestMemory::new(&TWO).unwrap();
        assert!(!here.give_back().unwrap());
        source.write(0, &[5]).unwrap();
        here.write(0, &[1]).unwrap();
        here.adopt(shared(&source)).unwrap();
        assert!(here.give_back().unwrap());
        assert_eq!(byte(&here, 0), 1);
        here.write(0, &[2]).unwrap();
        assert_eq!(byte(&source, 0), 5);
        here.adopt(shared(&source)).unwrap();
        here.unlock().unwrap();
        here.keep();
        assert!(!here.give_back().unwrap(), "it stays");
        source.let_go().unwrap();
        assert_eq!((byte(&here, 0), byte(&source, 0)), (5, 0));
        source.write(0, &[3]).unwrap();
        assert_eq!(byte(&here, 0), 5);
        // And on to a third.
        assert_eq!(shared(&here).len(), 2);
    }

    #[test]
    fn files_that_are_not_the_memory_that_is_awaited_are_refused() {
        let source = GuestMemory::new(&TWO).unwrap();
        let here = GuestMemory::new(&TWO).unwrap();
        here.write(0, &[1]).unwrap();
        let refused = |files: Vec<OwnedFd>| {
            let error = here.adopt(files).unwrap_err();
            assert!(matches!(error, MemoryError::Shared(_)), "{error}");
            assert_eq!(byte(&here, 0), 1);
            here.write(0, &[1]).unwrap();
            error.to_string()
        };
        let plain = |file: File| vec![OwnedFd::from(file), shared(&source).remove(1)];
        assert!(refused(Vec::new()).contains("0 files"));
        assert!(refused(shared(&source).into_iter().rev().collect()).contains("bytes"));
        assert!(refused(plain(File::open("/dev/zero").unwrap())).contains("memfd"));
        let ordinary = tempfile::tempfile().unwrap();
        ordinary.set_len(PAGE_SIZE).unwrap();
        refused(plain(ordinary));
        // SAFETY: the name is a NUL-terminated constant, and the fd is new.
        let unsealed = unsafe {
            use std::os::fd::FromRawFd;
            File::from_raw_fd(libc::memfd_create(c"unsealed".as_ptr(), libc::MFD_ALLOW_SEALING))
        };
        unsealed.set_len(PAGE_SIZE).unwrap();
        assert!(refused(plain(unsealed.try_clone().unwrap())).contains("shortened"));
        // SAFETY: adds seals to a file we hold.
        let sealed = unsafe {
            let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_WRITE;
            libc::fcntl(unsealed.as_raw_fd(), libc::F_ADD_SEALS, seals)
        };
        assert_eq!(sealed, 0);
        assert!(refused(plain(unsealed)).contains("written"));
        let same = [TWO[0], RegionLayout { gpa: 1 << 32, len: PAGE_SIZE }];
        let (one, two) = (GuestMemory::new(&same).unwrap(), GuestMemory::new(&same).unwrap());
        let file = || shared(&one).remove(0);
        let error = two.adopt(vec![file(), file()]).unwrap_err().to_string();
        assert!(error.contains("twice"), "{error}");
    }

    /// What the kernel says of the mapping that holds `addr`, in KiB.
    fn smaps_kib(addr: NonNull<u8>, field: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in text.lines() {
            if let Some((from, rest)) = line.split_once('-')
                && let (Ok(from), Some(Ok(to))) = (
                    u64::from_str_radix(from, 16),
                    rest.split(' ').next().map(|to| u64::from_str_radix(to, 16)),
                )
            {
                inside = (from..to).contains(&(addr.as_ptr() as u64));
            } else if inside && let Some(value) = line.strip_prefix(field) {
                return value.trim_matches([':', ' ']).trim_end_matches(" kB").parse().unwrap();
            }
        }
        panic!("no {field} for {addr:?}");
    }

    /// Somebody else's bytes lie in memory that the kernel gives next.
    fn dirty_free_memory() {
        let memory = GuestMemory::new(&[RegionLayout { gpa: 0, len: 64 << 20 }]).unwrap();
        for gpa in (0..64 << 20).step_by(PAGE_SIZE as usize) {
            memory.write(gpa, &[0xa5; PAGE_SIZE as usize]).unwrap();
        }
    }

    #[test]
    fn memory_is_populated_with_huge_pages_and_holds_what_it_held() {
        let layout = [RegionLayout { gpa: 1 << 32, len: 8 << 20 }];
        let (empty, used) = ((1 << 32) + (2 << 20), (1 << 32) + (4 << 20));
        for pages in [PageSizes::Kernels, PageSizes::Huge] {
            dirty_free_memory();
            let Ok(memory) = GuestMemory::with_pages(&layout, pages) else {
                println!("skipped: no tmpfs with huge pages");
                continue;
            };
            memory.write(used + 5 * PAGE_SIZE + 17, b"here before").unwrap();
            for gpa in [empty, used] {
                match memory.populate_huge(gpa, 2 << 20).unwrap() {
                    HugePages::There => {}
                    other => return println!("skipped: huge pages of shared memory: {other:?}"),
                }
            }
            let addr = memory.untracked_addr(empty, 1).unwrap();
            assert_eq!(smaps_kib(addr, "ShmemPmdMapped"), 4096, "{pages:?}");
            let mut there = vec![0; 2 << 20];
            memory.read(empty, &mut there).unwrap();
            assert!(there.iter().all(|byte| *byte == 0), "{pages:?}");
            memory.read(used, &mut there).unwrap();
            let place = 5 * PAGE_SIZE as usize + 17;
            assert_eq!(&there[place..place + 11], b"here before");
            there[place..place + 11].fill(0);
            assert!(there.iter().all(|byte| *byte == 0), "{pages:?}");
        }
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
