//! [`Hwpt`]: a hardware page table of iommufd that tracks which pages devices wrote.
//!
//! Linux 7.2 loses a page: where several pages share one entry (AMDv1's contiguous entries), `record_dirty` of
//! `drivers/iommu/generic_pt/iommu_pt.h` takes the index of the entry's last page for the one behind it, so
//! that a dirty entry is reported without its last page. The page that is missing always follows one that is
//! there, so a report is widened by one page behind each: one page too much per run, and none lost.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vfio_migration::DmaRange;

use crate::raw::iommufd;
use crate::raw::memory::bitmap_words;
use crate::raw::uapi::IOMMU_HWPT_ALLOC_DIRTY_TRACKING;

/// A page table over an IOAS, allocated with IOMMU_HWPT_ALLOC_DIRTY_TRACKING: only devices whose IOMMU tracks
/// dirty pages can be attached to it. It is destroyed with this.
pub struct Hwpt {
    iommufd: Arc<OwnedFd>,
    id: u32,
}

impl fmt::Debug for Hwpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hwpt").field(&self.id).finish()
    }
}

impl Hwpt {
    /// One for the bound device `dev_id` over `ioas`. EOPNOTSUPP where its IOMMU has no dirty tracking.
    pub fn new(iommufd: &Arc<OwnedFd>, dev_id: u32, ioas: u32) -> io::Result<Self> {
        let flags = IOMMU_HWPT_ALLOC_DIRTY_TRACKING;
        let id = iommufd::hwpt_alloc(iommufd.as_fd(), dev_id, ioas, flags)?;
        Ok(Self { iommufd: Arc::clone(iommufd), id })
    }

    /// Its id, to attach devices to.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Turns tracking on, with every page clean, or off.
    pub fn set_tracking(&self, on: bool) -> io::Result<()> {
        iommufd::hwpt_set_dirty_tracking(self.iommufd.as_fd(), self.id, on)
    }

    /// Sets bit i of `bitmap` for each page i, counted from the start of `range`, that was written since the
    /// last report, and for the one behind it; forgets them. Bits already set stay.
    pub fn report(&self, range: DmaRange, page_size: u64, bitmap: &mut [u64]) -> io::Result<()> {
        let DmaRange { iova, length } = range;
        let words = bitmap_words(length, page_size);
        let own = usize::try_from(words).ok().filter(|words| *words <= bitmap.len());
        let mut own = vec![0; own.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?];
        let fd = self.iommufd.as_fd();
        iommufd::hwpt_get_dirty_bitmap(fd, self.id, 0, iova, length, page_size, &mut own)?;
        merge_widened(bitmap, &own, length.div_ceil(page_size.max(1)));
        Ok(())
    }
}

impl Drop for Hwpt {
    fn drop(&mut self) {
        // Still attached devices keep it until they are closed; closing the iommufd ends it in any case.
        if let Err(error) = iommufd::destroy(self.iommufd.as_fd(), self.id) {
            tracing::debug!(id = self.id, %error, "a page table is left to the kernel");
        }
    }
}

/// Sets the bits of `report`, and the bit behind each, in `bitmap`; `count` bits mean something.
fn merge_widened(bitmap: &mut [u64], report: &[u64], count: u64) {
    let mut carry = 0;
    let mut left = count;
    for (to, word) in bitmap.iter_mut().zip(report) {
        let mask = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        *to |= (word | word << 1 | carry) & mask;
        carry = word >> 63;
        left = left.saturating_sub(64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_brings_the_one_behind_it_and_nothing_behind_the_end() {
        let cases = [
            ([0, 0], 128, [0, 0]),
            ([1, 0], 128, [3, 0]),
            ([1 << 63, 0], 128, [1 << 63, 1]),
            ([0b0111, 1 << 63], 128, [0b1111, 1 << 63]),
            ([0, 1 << 3], 68, [0, 1 << 3]),
            ([0, 1 << 2], 68, [0, 3 << 2]),
            ([u64::MAX, u64::MAX], 70, [u64::MAX, 0x3f]),
        ];
        for (report, count, expected) in cases {
            let mut bitmap = [0; 2];
            merge_widened(&mut bitmap, &report, count);
            assert_eq!(bitmap, expected, "{report:x?} of {count}");
        }
        let mut kept = [1 << 40];
        merge_widened(&mut kept, &[1], 64);
        assert_eq!(kept, [1 << 40 | 3], "what is set stays and brings nothing");
    }
}
