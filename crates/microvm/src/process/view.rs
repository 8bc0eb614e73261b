//! The guest threads' own mapping of guest memory.
//!
//! PAGEMAP_SCAN sees only writes through the one mapping that is registered with userfaultfd. So the guest
//! threads have a mapping of their own, and nothing else writes through it: the VMM writes through
//! [`GuestMemory`], devices through mappings of theirs, and each is tracked in its own way.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use migration::{GuestMemory, RegionLayout};

use crate::error::{Error, Result};

/// A mapping of all guest memory. Accesses are atomic and aligned, because host, devices and other guest
/// threads access the same bytes.
#[derive(Debug)]
pub struct View {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    layout: RegionLayout,
    addr: NonNull<u8>,
}

// SAFETY: a shared mapping that lives as long as the part, only accessed by atomics.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.layout.len as usize) };
    }
}

impl View {
    /// Maps `memory` anew.
    pub fn new(memory: &GuestMemory) -> Result<Self> {
        let parts = memory.layout().into_iter().enumerate();
        let parts = parts.map(|(index, layout)| Part::new(layout, memory.region_fd(index)));
        Ok(Self { parts: parts.collect::<Result<_>>()? })
    }

    /// Other files stand behind `memory` than before: they take the place of those here, at the same addresses.
    /// Nobody uses the view meanwhile.
    pub fn replace(&self, memory: &GuestMemory) -> Result<()> {
        self.parts.iter().enumerate().try_for_each(|(index, part)| {
            map(part.layout, memory.region_fd(index), Some(part.addr)).map(drop)
        })
    }

    /// The regions with their host addresses, in the order of [`GuestMemory::layout`].
    pub fn ranges(&self) -> impl Iterator<Item = (RegionLayout, u64)> {
        self.parts.iter().map(|part| (part.layout, part.addr.as_ptr() as u64))
    }

    /// `[gpa, gpa + len)` is memory of one region.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.find(gpa, len).is_some()
    }

    /// The u32 at `gpa`; all ones where there is no memory, as on a bus.
    pub fn load_u32(&self, gpa: u64) -> u32 {
        self.u32_at(gpa).map_or(u32::MAX, |value| u32::from_le(value.load(Ordering::Acquire)))
    }

    /// Sets the u32 at `gpa`; dropped where there is no memory.
    pub fn store_u32(&self, gpa: u64, value: u32) {
        if let Some(at) = self.u32_at(gpa) {
            at.store(value.to_le(), Ordering::Release);
        }
    }

    /// Adds to the u32 at `gpa`, wrapping, and answers what was there.
    pub fn add_u32(&self, gpa: u64, value: u32) -> u32 {
        let add = |old: u32| Some(u32::from_le(old).wrapping_add(value).to_le());
        let Some(at) = self.u32_at(gpa) else { return u32::MAX };
        at.fetch_update(Ordering::AcqRel, Ordering::Acquire, add).map_or(u32::MAX, u32::from_le)
    }

    /// The u64 at `gpa`; all ones where there is no memory.
    pub fn load_u64(&self, gpa: u64) -> u64 {
        self.u64_at(gpa).map_or(u64::MAX, |value| u64::from_le(value.load(Ordering::Acquire)))
    }

    /// Sets the u64 at `gpa`; dropped where there is no memory.
    pub fn store_u64(&self, gpa: u64, value: u64) {
        if let Some(at) = self.u64_at(gpa) {
            at.store(value.to_le(), Ordering::Release);
        }
    }

    fn u32_at(&self, gpa: u64) -> Option<&AtomicU32> {
        let addr = self.find(gpa, 4).filter(|_| gpa.is_multiple_of(4))?;
        // SAFETY: inside the mapping, aligned, and only accessed by atomics in this process's Rust code;
        // other processes' accesses are the guest's affair.
        Some(unsafe { AtomicU32::from_ptr(addr.as_ptr().cast()) })
    }

    fn u64_at(&self, gpa: u64) -> Option<&AtomicU64> {
        let addr = self.find(gpa, 8).filter(|_| gpa.is_multiple_of(8))?;
        // SAFETY: as in `u32_at`.
        Some(unsafe { AtomicU64::from_ptr(addr.as_ptr().cast()) })
    }

    fn find(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        self.parts.iter().find_map(|part| {
            let offset = gpa.checked_sub(part.layout.gpa)?;
            let inside = offset < part.layout.len && len <= part.layout.len - offset;
            // SAFETY: the offset is inside the mapping.
            inside.then(|| unsafe { part.addr.add(offset as usize) })
        })
    }
}

impl Part {
    fn new(layout: RegionLayout, fd: BorrowedFd<'_>) -> Result<Self> {
        Ok(Self { layout, addr: map(layout, fd, None)? })
    }
}

/// Maps a region, in the place of our own mapping of it at `at` if there is one.
fn map(layout: RegionLayout, fd: BorrowedFd<'_>, at: Option<NonNull<u8>>) -> Result<NonNull<u8>> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | fixed;
    let len = layout.len as usize;
    let at = at.map_or(std::ptr::null_mut(), |at| at.as_ptr().cast());
    // SAFETY: a mapping of an fd we hold, at an address the kernel chooses or in the place of ours.
    let addr = unsafe { libc::mmap(at, len, prot, flags, fd.as_raw_fd(), 0) };
    if addr == libc::MAP_FAILED {
        return Err(Error::last_os("mmap of guest memory for the guest's threads"));
    }
    NonNull::new(addr.cast()).ok_or_else(|| Error::State("mmap gave 0".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_view_and_the_vmms_mapping_are_one_memory() {
        let layout = [RegionLayout { gpa: 0, len: 8192 }, RegionLayout { gpa: 1 << 32, len: 4096 }];
        let memory = GuestMemory::new(&layout).unwrap();
        let view = View::new(&memory).unwrap();
        view.store_u64((1 << 32) + 4088, 0x0102_0304_0506_0708);
        let mut bytes = [0; 8];
        memory.read((1 << 32) + 4088, &mut bytes).unwrap();
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
        memory.write(8, &5u32.to_le_bytes()).unwrap();
        assert_eq!(view.add_u32(8, 2), 5);
        assert_eq!(view.load_u32(8), 7);
    }

    #[test]
    fn a_view_follows_memory_that_was_replaced() {
        let layout = [RegionLayout { gpa: 0, len: 8192 }];
        let (source, here) =
            (GuestMemory::new(&layout).unwrap(), GuestMemory::new(&layout).unwrap());
        let view = View::new(&here).unwrap();
        view.store_u32(0, 1);
        source.write(0, &7u32.to_le_bytes()).unwrap();
        let files = source.files_to_share().unwrap();
        here.adopt(files.iter().map(|file| file.try_clone().unwrap()).collect()).unwrap();
        assert_eq!(view.load_u32(0), 1, "until it is told");
        view.replace(&here).unwrap();
        assert_eq!(view.load_u32(0), 7);
        here.give_back().unwrap();
        view.replace(&here).unwrap();
        view.store_u32(4, 2);
        let mut bytes = [0; 8];
        here.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn outside_of_memory_reads_all_ones_and_writes_vanish() {
        let memory = GuestMemory::new(&[RegionLayout { gpa: 4096, len: 4096 }]).unwrap();
        let view = View::new(&memory).unwrap();
        for gpa in [0, 4092, 8192, u64::MAX - 7, u64::MAX] {
            view.store_u64(gpa, 1);
            assert_eq!(view.load_u64(gpa), u64::MAX, "{gpa:#x}");
        }
        assert_eq!(view.load_u32(8192), u32::MAX);
        assert_eq!(view.load_u64(4100), u64::MAX, "not aligned");
        assert!(view.contains(4096, 4096) && !view.contains(4096, 4097));
    }
}
