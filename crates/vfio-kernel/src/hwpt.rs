//! [`Hwpt`]: a hardware page table of iommufd that tracks which pages devices wrote.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vfio_migration::DmaRange;

use crate::raw::iommufd;
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
    /// last report, and forgets them. Bits already set stay.
    pub fn report(&self, range: DmaRange, page_size: u64, bitmap: &mut [u64]) -> io::Result<()> {
        let DmaRange { iova, length } = range;
        let fd = self.iommufd.as_fd();
        iommufd::hwpt_get_dirty_bitmap(fd, self.id, 0, iova, length, page_size, bitmap)
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
