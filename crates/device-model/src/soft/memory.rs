//! Guest memory as the device reaches it: mappings by IOVA.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_migration::{DeviceError, DeviceResult, DmaAccess, DmaBacking, DmaPermissions};

use crate::core::{DmaFault, GuestDma};

/// Most mappings of one device.
const MAPPINGS_MAX: usize = 65_536;

#[derive(Debug, Default)]
pub(super) struct DmaMap {
    mappings: BTreeMap<u64, Mapping>,
}

struct Mapping {
    size: u64,
    permissions: DmaPermissions,
    backing: Backing,
}

enum Backing {
    File { file: File, offset: u64 },
    Calls(Arc<dyn DmaAccess>),
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let backing = match self.backing {
            Backing::File { .. } => "file",
            Backing::Calls(_) => "calls",
        };
        f.debug_struct("Mapping").field("size", &self.size).field("backing", &backing).finish()
    }
}

fn fail<T>(call: &'static str, errno: i32) -> DeviceResult<T> {
    Err(DeviceError::Errno { call, errno })
}

impl DmaMap {
    /// # Errors
    /// EINVAL for an empty range, one that wraps, or one that its file does not hold; EEXIST for one that
    /// overlaps another; ENOSPC for one too many.
    pub(super) fn map(
        &mut self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        backing: DmaBacking,
    ) -> DeviceResult<()> {
        const CALL: &str = "DMA_MAP";
        let Some(end) = iova.checked_add(size).filter(|_| size > 0) else {
            return fail(CALL, libc::EINVAL);
        };
        let before = self.mappings.range(..end).next_back();
        if before.is_some_and(|(start, mapping)| start.saturating_add(mapping.size) > iova) {
            return fail(CALL, libc::EEXIST);
        }
        if self.mappings.len() >= MAPPINGS_MAX {
            return fail(CALL, libc::ENOSPC);
        }
        let backing = match backing {
            DmaBacking::Calls(access) => Backing::Calls(access),
            DmaBacking::Fd { fd, offset } => {
                let io = |source| DeviceError::Io { call: CALL, source };
                let file = File::from(fd.try_clone().map_err(io)?);
                let len = file.metadata().map_err(io)?.len();
                if offset.checked_add(size).is_none_or(|end| end > len) {
                    return fail(CALL, libc::EINVAL);
                }
                Backing::File { file, offset }
            }
        };
        self.mappings.insert(iova, Mapping { size, permissions, backing });
        Ok(())
    }

    /// # Errors
    /// ENOENT where no mapping is exactly this one.
    pub(super) fn unmap(&mut self, iova: u64, size: u64) -> DeviceResult<()> {
        match self.mappings.get(&iova) {
            Some(mapping) if mapping.size == size => {
                self.mappings.remove(&iova);
                Ok(())
            }
            _ => fail("DMA_UNMAP", libc::ENOENT),
        }
    }

    /// The calls behind `[iova, iova + len)`, where there are any.
    pub(super) fn calls(&self, iova: u64, len: usize) -> Option<Arc<dyn DmaAccess>> {
        match self.writable(iova, len) {
            Some((Mapping { backing: Backing::Calls(access), .. }, _)) => Some(Arc::clone(access)),
            _ => None,
        }
    }

    /// The mapping that holds the range, with the range's offset in it.
    fn writable(&self, iova: u64, len: usize) -> Option<(&Mapping, u64)> {
        let (start, mapping) = self.mappings.range(..=iova).next_back()?;
        let at = iova - start;
        let end = at.checked_add(len as u64)?;
        (end <= mapping.size && mapping.permissions.write).then_some((mapping, at))
    }
}

impl GuestDma for DmaMap {
    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), DmaFault> {
        match self.writable(iova, data.len()) {
            None => Err(DmaFault::Failed),
            Some((Mapping { backing: Backing::Calls(_), .. }, _)) => Err(DmaFault::Later),
            Some((Mapping { backing: Backing::File { file, offset }, .. }, at)) => {
                // The sum was checked by `map`.
                file.write_all_at(data, offset.saturating_add(at)).map_err(|error| {
                    tracing::debug!(%error, iova, "DMA write");
                    DmaFault::Failed
                })
            }
        }
    }
}
