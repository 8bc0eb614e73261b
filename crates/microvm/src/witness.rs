//! The run witness: proves after the fact that two copies of a guest never ran at once.
//!
//! A file mapped by every process that runs the guest. Each heartbeat adds an entry; a slot is taken
//! with one atomic addition, so the entries are in the order in which they were made, across processes.
//!
//! | offset | type | meaning |
//! |---|---|---|
//! | 0 | u64 | magic `VMFYRUNW` |
//! | 8 | u32 | version 1 |
//! | 12 | u32 | capacity in entries |
//! | 16 | u64 | entries made so far; entry n is in slot n mod capacity |
//! | 64 + 32 s | u64 | n + 1, written last |
//! | + 8 | u64 | CLOCK_BOOTTIME in ns |
//! | + 16 | u32 | process id |
//! | + 20 | u32 | VM inside the process |
//!
//! In the byte order of the host (x86: little endian); both ends of the file are on one host.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::time::boottime_ns;

const MAGIC: u64 = u64::from_le_bytes(*b"VMFYRUNW");
const VERSION: u32 = 1;
const CAPACITY: u32 = 1 << 17;
const HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 32;
const FILE_BYTES: usize = HEADER_BYTES + CAPACITY as usize * ENTRY_BYTES;

/// One sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// CLOCK_BOOTTIME in ns.
    pub time_ns: u64,
    /// Process id.
    pub process: u32,
    /// VM inside the process.
    pub instance: u32,
}

/// A mapped witness file.
pub struct Witness {
    map: NonNull<u8>,
    instance: u32,
}

// SAFETY: the mapping is only reached through atomics.
unsafe impl Send for Witness {}
// SAFETY: as above.
unsafe impl Sync for Witness {}

impl Witness {
    /// Maps the file at `path`, made if it is not there.
    pub fn open(path: &Path) -> Result<Self> {
        static INSTANCES: AtomicU32 = AtomicU32::new(1);
        let refused = |what: String| Error::Config(format!("witness {}: {what}", path.display()));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|error| refused(error.to_string()))?;
        // SAFETY: the descriptor is ours.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(Error::last_os("flock of the witness"));
        }
        let len = file.metadata().map_err(|error| refused(error.to_string()))?.len();
        match len {
            0 => {
                file.set_len(FILE_BYTES as u64).map_err(|error| refused(error.to_string()))?;
            }
            len if len == FILE_BYTES as u64 => {}
            _ => return Err(refused(format!("it has {len} bytes, not {FILE_BYTES}"))),
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of a file that has the length just checked.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                FILE_BYTES,
                prot,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        let Some(map) = NonNull::new(map.cast()).filter(|_| map != libc::MAP_FAILED) else {
            return Err(Error::last_os("mmap of the witness"));
        };
        let this = Self { map, instance: INSTANCES.fetch_add(1, Ordering::Relaxed) };
        let shape = u64::from(VERSION) | u64::from(CAPACITY) << 32;
        if len == 0 {
            this.u64_at(8).store(shape, Ordering::Relaxed);
            this.u64_at(0).store(MAGIC, Ordering::Release);
        }
        // Not left to the closing of the file: the mapping keeps it open.
        // SAFETY: the descriptor is ours.
        unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
        let header = (this.u64_at(0), this.u64_at(8));
        if (header.0.load(Ordering::Acquire), header.1.load(Ordering::Acquire)) != (MAGIC, shape) {
            return Err(refused("it is no witness file of version 1".into()));
        }
        Ok(this)
    }

    /// Adds an entry.
    pub fn stamp(&self) {
        let number = self.u64_at(16).fetch_add(1, Ordering::AcqRel);
        let slot = HEADER_BYTES + (number % u64::from(CAPACITY)) as usize * ENTRY_BYTES;
        let who = u64::from(std::process::id()) | u64::from(self.instance) << 32;
        self.u64_at(slot + 8).store(boottime_ns(), Ordering::Relaxed);
        self.u64_at(slot + 16).store(who, Ordering::Relaxed);
        self.u64_at(slot).store(number + 1, Ordering::Release);
    }

    /// The entries that are still there, oldest first. One that is being made is left out.
    pub fn stamps(&self) -> Vec<Stamp> {
        let made = self.u64_at(16).load(Ordering::Acquire);
        let first = made.saturating_sub(u64::from(CAPACITY));
        let stamp = |number: u64| {
            let slot = HEADER_BYTES + (number % u64::from(CAPACITY)) as usize * ENTRY_BYTES;
            let read = |offset| self.u64_at(slot + offset).load(Ordering::Acquire);
            let (made, time_ns, who) = (read(0), read(8), read(16));
            let stamp = Stamp { time_ns, process: who as u32, instance: (who >> 32) as u32 };
            (made == number + 1).then_some(stamp)
        };
        (first..made).filter_map(stamp).collect()
    }

    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= FILE_BYTES);
        // SAFETY: aligned and inside the mapping, which lives as long as `self`; all access is atomic.
        unsafe { AtomicU64::from_ptr(self.map.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        // SAFETY: address and length are those of our own mmap.
        unsafe { libc::munmap(self.map.as_ptr().cast(), FILE_BYTES) };
    }
}

/// Entries of the file at `path`.
pub fn read(path: &Path) -> Result<Vec<Stamp>> {
    Ok(Witness::open(path)?.stamps())
}

/// The order in which VMs ran, as (process, instance). One after the other: as many as there were
/// moves, plus one. Two that ran at once alternate, and the order is longer.
pub fn order_of_running(stamps: &[Stamp]) -> Vec<(u32, u32)> {
    let mut order = Vec::new();
    for stamp in stamps {
        let who = (stamp.process, stamp.instance);
        if order.last() != Some(&who) {
            order.push(who);
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_several_writers_are_in_the_order_they_were_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("witness");
        let (first, second) = (Witness::open(&path).unwrap(), Witness::open(&path).unwrap());
        first.stamp();
        first.stamp();
        second.stamp();
        let stamps = read(&path).unwrap();
        let instances: Vec<_> = stamps.iter().map(|stamp| stamp.instance).collect();
        assert_eq!(instances, [first.instance, first.instance, second.instance]);
        assert!(stamps.is_sorted_by_key(|stamp| stamp.time_ns));
        assert!(stamps.iter().all(|stamp| stamp.process == std::process::id()));
    }

    #[test]
    fn an_overlap_shows_as_a_return() {
        let stamp = |instance| Stamp { time_ns: 0, process: 1, instance };
        let handed_over = [1, 1, 2, 2].map(stamp);
        assert_eq!(order_of_running(&handed_over), [(1, 1), (1, 2)]);
        let both = [1, 2, 1, 2].map(stamp);
        assert_eq!(order_of_running(&both).len(), 4);
    }

    #[test]
    fn the_ring_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("witness");
        let witness = Witness::open(&path).unwrap();
        (0..u64::from(CAPACITY) + 10).for_each(|_| witness.stamp());
        assert_eq!(witness.stamps().len(), CAPACITY as usize);
    }

    #[test]
    fn another_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("other");
        std::fs::write(&path, "something else").unwrap();
        assert!(Witness::open(&path).is_err());
        std::fs::write(&path, vec![1; FILE_BYTES]).unwrap();
        assert!(Witness::open(&path).is_err());
    }
}
