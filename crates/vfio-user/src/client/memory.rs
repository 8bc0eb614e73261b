//! Guest memory as the server may reach it: the table of DMA mappings, and the serving of DMA_READ
//! and DMA_WRITE from it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use vfio_migration::{DeviceResult, DmaAccess, DmaPermissions};

/// One mapping.
#[derive(Clone)]
pub(crate) struct Mapping {
    pub(crate) size: u64,
    pub(crate) permissions: DmaPermissions,
    /// Who serves it; `None` where the server has an fd and nobody was named for messages.
    pub(crate) access: Option<Arc<dyn DmaAccess>>,
    /// The server has an fd for it.
    pub(crate) has_fd: bool,
}

/// All mappings, by IOVA. They do not overlap.
#[derive(Default)]
pub(crate) struct DmaTable(RwLock<BTreeMap<u64, Mapping>>);

/// A piece of a request that one mapping serves: IOVA, length, access.
type Part = (u64, usize, Arc<dyn DmaAccess>);

/// The refusal of a DMA request, as an errno.
type Refused = i32;

impl DmaTable {
    /// Enters a mapping; `false` where it would overlap one, is empty or wraps around.
    pub(crate) fn insert(&self, iova: u64, mapping: Mapping) -> bool {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(end) = iova.checked_add(mapping.size).filter(|end| *end > iova) else {
            return false;
        };
        let before = table.range(..end).next_back();
        if before.is_some_and(|(start, there)| start.saturating_add(there.size) > iova) {
            return false;
        }
        table.insert(iova, mapping);
        true
    }

    /// Removes the mapping that is exactly this one; `false` where there is none.
    pub(crate) fn remove(&self, iova: u64, size: u64) -> bool {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let exact = table.get(&iova).is_some_and(|mapping| mapping.size == size);
        if exact {
            table.remove(&iova);
        }
        exact
    }

    /// There is exactly this mapping.
    pub(crate) fn contains(&self, iova: u64, size: u64) -> bool {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        table.get(&iova).is_some_and(|mapping| mapping.size == size)
    }

    /// The parts of mappings with an fd that lie inside of `iova`, `length`, ascending.
    pub(crate) fn fd_parts(&self, iova: u64, length: u64) -> Vec<(u64, u64)> {
        let end = iova.saturating_add(length);
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let parts = table.range(..end).filter(|(_, mapping)| mapping.has_fd);
        parts
            .filter_map(|(start, mapping)| {
                let from = (*start).max(iova);
                let to = start.saturating_add(mapping.size).min(end);
                (from < to).then(|| (from, to - from))
            })
            .collect()
    }

    /// Serves DMA_READ.
    pub(crate) fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Refused> {
        let parts = self.parts(iova, data.len(), |permissions| permissions.read)?;
        let mut rest = data;
        for (iova, len, access) in parts {
            let (part, tail) = rest.split_at_mut_checked(len).ok_or(libc::EFAULT)?;
            refused(access.dma_read(iova, part))?;
            rest = tail;
        }
        Ok(())
    }

    /// Serves DMA_WRITE. The access marks the pages dirty.
    pub(crate) fn write(&self, iova: u64, data: &[u8]) -> Result<(), Refused> {
        let parts = self.parts(iova, data.len(), |permissions| permissions.write)?;
        let mut rest = data;
        for (iova, len, access) in parts {
            let (part, tail) = rest.split_at_checked(len).ok_or(libc::EFAULT)?;
            refused(access.dma_write(iova, part))?;
            rest = tail;
        }
        Ok(())
    }

    /// The mappings that cover the whole range, or a refusal before anything is touched. The table is not
    /// locked while memory is accessed.
    fn parts(
        &self,
        iova: u64,
        len: usize,
        allowed: impl Fn(&DmaPermissions) -> bool,
    ) -> Result<Vec<Part>, Refused> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut parts = Vec::new();
        let mut at = iova;
        let mut left = len as u64;
        while left > 0 {
            let (start, mapping) = table.range(..=at).next_back().ok_or(libc::EFAULT)?;
            let inside = at - start;
            let room = mapping.size.checked_sub(inside).filter(|room| *room > 0);
            let part = room.ok_or(libc::EFAULT)?.min(left);
            if !allowed(&mapping.permissions) {
                return Err(libc::EACCES);
            }
            let access = mapping.access.as_ref().ok_or(libc::EOPNOTSUPP)?;
            parts.push((at, part as usize, Arc::clone(access)));
            left -= part;
            at = at.checked_add(part).ok_or(libc::EFAULT)?;
        }
        Ok(parts)
    }
}

fn refused(result: DeviceResult<()>) -> Result<(), Refused> {
    result.map_err(|error| error.errno().unwrap_or(libc::EFAULT))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Ram(Mutex<Vec<u8>>);

    impl DmaAccess for Ram {
        fn dma_read(&self, iova: u64, data: &mut [u8]) -> DeviceResult<()> {
            data.copy_from_slice(&self.0.lock().unwrap()[iova as usize..][..data.len()]);
            Ok(())
        }
        fn dma_write(&self, iova: u64, data: &[u8]) -> DeviceResult<()> {
            self.0.lock().unwrap()[iova as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    #[test]
    fn accesses_stay_inside_of_mappings_and_their_permissions() {
        let ram: Arc<dyn DmaAccess> = Arc::new(Ram(Mutex::new(vec![0; 0x4000])));
        let map = |write, access| Mapping {
            size: 0x1000,
            permissions: DmaPermissions { read: true, write },
            access,
            has_fd: false,
        };
        let table = DmaTable::default();
        assert!(table.insert(0x1000, map(true, Some(ram.clone()))));
        assert!(table.insert(0x2000, map(false, Some(ram.clone()))));
        assert!(table.insert(0x3000, map(true, None)));
        assert!(!table.insert(0x1fff, map(true, None)), "overlap");
        assert!(!table.insert(0x0800, map(true, None)), "overlap");
        assert!(!table.insert(u64::MAX - 5, map(true, None)), "wraps");
        assert!(!table.insert(0x1000, Mapping { size: 0, ..map(true, None) }), "empty");

        assert_eq!(table.write(0x1ffe, b"ab"), Ok(()));
        assert_eq!(table.write(0x1fff, b"ab"), Err(libc::EACCES), "runs into a read-only mapping");
        let mut two = [0; 2];
        assert_eq!(table.read(0x1fff, &mut two), Ok(()));
        assert_eq!(&two, b"b\0", "a read may span two mappings");
        assert_eq!(table.read(0x0fff, &mut two), Err(libc::EFAULT));
        assert_eq!(table.read(0x3000, &mut two), Err(libc::EOPNOTSUPP));
        assert_eq!(table.read(u64::MAX, &mut two), Err(libc::EFAULT));

        assert!(!table.remove(0x1000, 0x800));
        assert!(table.remove(0x1000, 0x1000));
        assert_eq!(table.read(0x1000, &mut two), Err(libc::EFAULT));
    }
}
