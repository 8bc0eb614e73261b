//! The host's free memory, the same for whoever is measured.
//!
//! In a virtual machine, pages that were free for long have gone back to the hypervisor, and the first touch fetches
//! them anew, at several times the price. Whoever ran first would pay that for the others, and with much free
//! memory nobody knows who pays when.

use anyhow::Context;
use migration::{GuestMemory, RegionLayout};

const PIECE_BYTES: u64 = 128 << 20;
/// What must stay free while a piece is taken, for everybody else.
const MARGIN_BYTES: u64 = 384 << 20;

/// Holds all free memory but a stated part, touched, for as long as it lives.
pub struct Ballast(#[expect(dead_code, reason = "held")] Vec<GuestMemory>);

impl Ballast {
    /// Leaves `leave_bytes` of what is free, at most `most_bytes` of the rest are held.
    ///
    /// # Errors
    /// Memory cannot be had, or its size not be read.
    pub fn new(leave_bytes: u64, most_bytes: u64) -> anyhow::Result<Self> {
        let spare = free_bytes()?.saturating_sub(leave_bytes).min(most_bytes);
        Ok(Self((0..spare / PIECE_BYTES).map(|_| piece()).collect::<anyhow::Result<_>>()?))
    }
}

/// Touches all free memory but a margin, at most `most_bytes`, and gives it back.
///
/// # Errors
/// As for [`Ballast::new`].
pub fn warm_up(most_bytes: u64) -> anyhow::Result<()> {
    Ballast::new(MARGIN_BYTES, most_bytes).map(drop)
}

fn piece() -> anyhow::Result<GuestMemory> {
    let memory = GuestMemory::new(&[RegionLayout { gpa: 0, len: PIECE_BYTES }])?;
    memory.populate(0, PIECE_BYTES)?;
    Ok(memory)
}

fn free_bytes() -> anyhow::Result<u64> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).context(path)?;
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemFree:")?.trim().strip_suffix(" kB"));
    let kib: u64 =
        kib.and_then(|kib| kib.parse().ok()).with_context(|| format!("no MemFree in {path}"))?;
    Ok(kib << 10)
}
