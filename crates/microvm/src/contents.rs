//! Whole-memory work of the host: filling memory before the guest starts, hashing it for verification.

use std::os::fd::AsRawFd;

use migration::{GuestMemory, PAGE_SIZE};

use crate::config::WorkloadConfig;
use crate::error::{Error, Result};

const READ_BYTES: usize = 1 << 20;

/// Fills `percent` of the pages from [`WorkloadConfig::WS_BASE`] on with bytes that follow from `seed` and
/// the page's address. Each page is another one, and none of them compresses well.
pub fn fill(memory: &GuestMemory, seed: u64, percent: u8) -> Result<()> {
    let mut state = seed;
    let pattern: Vec<u64> = (0..PAGE_SIZE / 8).map(|_| split_mix(&mut state)).collect();
    let mut page = vec![0u8; PAGE_SIZE as usize];
    for region in memory.layout() {
        let first = region.gpa.max(WorkloadConfig::WS_BASE);
        for gpa in (first..region.gpa + region.len).step_by(PAGE_SIZE as usize) {
            let mut state = seed ^ gpa;
            let key = split_mix(&mut state);
            if key % 100 >= percent.into() {
                continue;
            }
            for (word, bytes) in pattern.iter().zip(page.chunks_exact_mut(8)) {
                bytes.copy_from_slice(&(word ^ key).to_le_bytes());
            }
            memory.write(gpa, &page)?;
        }
    }
    Ok(())
}

/// A digest of all memory, read anew from its files: BLAKE3 over each region's address, length and bytes.
/// Holes count as the zeros they read as, and are not filled by this.
pub fn digest(memory: &GuestMemory) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; READ_BYTES];
    for (index, region) in memory.layout().iter().enumerate() {
        hasher.update(&region.gpa.to_le_bytes()).update(&region.len.to_le_bytes());
        let fd = memory.region_fd(index).as_raw_fd();
        let mut at = 0;
        while at < region.len {
            let data = next_data(fd, at)?.unwrap_or(region.len).min(region.len);
            buffer[..READ_BYTES.min((data - at) as usize)].fill(0);
            while at < data {
                let len = READ_BYTES.min((data - at) as usize);
                hasher.update(&buffer[..len]);
                at += len as u64;
            }
            let hole = if at < region.len { next_hole(fd, at)?.min(region.len) } else { at };
            while at < hole {
                let len = READ_BYTES.min((hole - at) as usize);
                read_exact(fd, at, &mut buffer[..len])?;
                hasher.update(&buffer[..len]);
                at += len as u64;
            }
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Empties all memory: it reads as zeros. Pages go back to the host unless they may be `pinned`: a device would
/// go on using those that are no longer the guest's.
pub fn discard(memory: &GuestMemory, pinned: bool) -> Result<()> {
    for (index, region) in memory.layout().iter().enumerate() {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let fd = memory.region_fd(index).as_raw_fd();
        if pinned {
            overwrite(memory, region.gpa, fd, region.len)?;
            continue;
        }
        // SAFETY: the descriptor is a memfd of ours, and the range is all of it.
        if unsafe { libc::fallocate(fd, mode, 0, region.len as libc::off_t) } != 0 {
            return Err(Error::last_os("fallocate"));
        }
    }
    Ok(())
}

/// Writes zeros to everything of a region that is no hole.
fn overwrite(memory: &GuestMemory, gpa: u64, fd: i32, region_len: u64) -> Result<()> {
    let zeros = vec![0u8; READ_BYTES];
    let mut at = 0;
    while let Some(data) = next_data(fd, at)?.filter(|data| *data < region_len) {
        let hole = next_hole(fd, data)?.min(region_len);
        at = data;
        while at < hole {
            let len = READ_BYTES.min((hole - at) as usize);
            memory.write(gpa + at, &zeros[..len])?;
            at += len as u64;
        }
    }
    Ok(())
}

/// Where data begin at or behind `at`; `None`: there are none.
fn next_data(fd: i32, at: u64) -> Result<Option<u64>> {
    // SAFETY: a plain system call on a descriptor of ours; nobody uses its file offset.
    let found = unsafe { libc::lseek(fd, at as libc::off_t, libc::SEEK_DATA) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    match std::io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        source => Err(Error::Os { call: "lseek(SEEK_DATA)", source }),
    }
}

fn next_hole(fd: i32, at: u64) -> Result<u64> {
    // SAFETY: as in `next_data`.
    let found = unsafe { libc::lseek(fd, at as libc::off_t, libc::SEEK_HOLE) };
    if found < 0 { Err(Error::last_os("lseek(SEEK_HOLE)")) } else { Ok(found as u64) }
}

fn read_exact(fd: i32, at: u64, into: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < into.len() {
        let rest = &mut into[done..];
        let offset = (at + done as u64) as libc::off_t;
        // SAFETY: the buffer is valid for its length.
        let read = unsafe { libc::pread(fd, rest.as_mut_ptr().cast(), rest.len(), offset) };
        match usize::try_from(read) {
            Ok(0) => return Err(Error::State("guest memory's file is shorter than it was".into())),
            Ok(read) => done += read,
            Err(_) => return Err(Error::last_os("pread of guest memory")),
        }
    }
    Ok(())
}

/// SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use migration::RegionLayout;

    use super::*;

    fn memory() -> GuestMemory {
        let layout =
            [RegionLayout { gpa: 0, len: 16 << 20 }, RegionLayout { gpa: 1 << 32, len: 2 << 20 }];
        GuestMemory::new(&layout).unwrap()
    }

    /// The same digest the long way.
    fn digest_by_reading(memory: &GuestMemory) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for region in memory.layout() {
            hasher.update(&region.gpa.to_le_bytes()).update(&region.len.to_le_bytes());
            let mut bytes = vec![0; region.len as usize];
            memory.read(region.gpa, &mut bytes).unwrap();
            hasher.update(&bytes);
        }
        *hasher.finalize().as_bytes()
    }

    #[test]
    fn the_digest_is_of_all_bytes_wherever_holes_are() {
        let memory = memory();
        let empty = digest(&memory).unwrap();
        memory.write(0x7000, b"x").unwrap();
        memory.write((1 << 32) + 0x1f_ffff, b"y").unwrap();
        memory.write(0x2_3000, &[0; 4096]).unwrap();
        let written = digest(&memory).unwrap();
        assert_ne!(empty, written);
        assert_eq!(written, digest_by_reading(&memory));
        memory.write(0x7000, &[0]).unwrap();
        memory.write((1 << 32) + 0x1f_ffff, &[0]).unwrap();
        assert_eq!(digest(&memory).unwrap(), empty, "zeros are zeros");
    }

    #[test]
    fn a_single_flipped_bit_shows() {
        let memory = memory();
        fill(&memory, 1, 100).unwrap();
        let before = digest(&memory).unwrap();
        let mut byte = [0];
        memory.read(0x90_1234, &mut byte).unwrap();
        memory.write(0x90_1234, &[byte[0] ^ 0x10]).unwrap();
        assert_ne!(digest(&memory).unwrap(), before);
    }

    #[test]
    fn filling_follows_from_the_seed_and_leaves_the_low_part_alone() {
        let (one, same, other) = (memory(), memory(), memory());
        fill(&one, 7, 50).unwrap();
        fill(&same, 7, 50).unwrap();
        fill(&other, 8, 50).unwrap();
        assert_eq!(digest(&one).unwrap(), digest(&same).unwrap());
        assert_ne!(digest(&one).unwrap(), digest(&other).unwrap());
        let mut low = vec![0; WorkloadConfig::WS_BASE as usize];
        one.read(0, &mut low).unwrap();
        assert!(low.iter().all(|byte| *byte == 0));
        let filled = (WorkloadConfig::WS_BASE..16 << 20).step_by(4096).filter(|gpa| {
            let mut word = [0; 8];
            one.read(*gpa, &mut word).unwrap();
            word != [0; 8]
        });
        let filled = filled.count();
        assert!((700..1350).contains(&filled), "{filled} of 2048 pages");
    }

    #[test]
    fn discarded_memory_is_empty() {
        for pinned in [false, true] {
            let memory = memory();
            let empty = digest(&memory).unwrap();
            fill(&memory, 3, 50).unwrap();
            let file = memory.region_fd(0).as_raw_fd();
            let filled = next_data(file, 0).unwrap();
            assert!(filled.is_some());
            discard(&memory, pinned).unwrap();
            assert_eq!(digest(&memory).unwrap(), empty);
            // Pages that may be pinned stay the file's.
            assert_eq!(next_data(file, 0).unwrap(), filled.filter(|_| pinned));
        }
    }
}
