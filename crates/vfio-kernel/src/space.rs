//! IO address spaces: what guest memory a device can reach, and the dirty tracking of the IOMMU.
//!
//! ```text
//!   iommufd   device ── bind ──> /dev/iommu     attach ──> HWPT with dirty tracking ──> IOAS <── map
//!                                                       └> IOAS (mediated, or no dirty tracking)
//!   type1     device <── group ── set container ──> /dev/vfio/vfio <── map
//! ```
//!
//! The devices of one VM share an address space ([`AddressSpaces`]): memory is pinned and accounted once,
//! and devices of one group can only be opened together. A mapping that several devices make counts its users.
//!
//! A mapping made with `IOMMU_IOAS_MAP_FILE` needs no address in this process; on older kernels, and with
//! type1, the file is mapped here and that mapping lent to the kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_migration::{DeviceError, DeviceResult, DmaPermissions, DmaRange};

use crate::chain;
use crate::device_error;
use crate::error::KernelError;
use crate::hwpt::Hwpt;
use crate::raw::memory::{FileMapping, bitmap_words};
use crate::raw::uapi::{
    IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_WRITEABLE, IommuIovaRange, VFIO_API_VERSION,
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_GROUP_FLAGS_VIABLE, VFIO_TYPE1V2_IOMMU,
};
use crate::raw::{self, group, iommufd};
use crate::sysfs::{Found, System};

/// More than any capability chain of type1 needs, in bytes.
const TYPE1_INFO_BYTES_MAX: u32 = 64 << 10;

/// The address spaces of one VM. Made when the first device needs them, and kept as long as a device or this
/// lives.
#[derive(Debug, Default)]
pub struct AddressSpaces {
    iommufd: Mutex<Option<Arc<Space>>>,
    type1: Mutex<Option<Arc<Space>>>,
}

impl AddressSpaces {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The one of iommufd.
    pub(crate) fn iommufd(&self, system: &System, device: &str) -> Result<Arc<Space>, KernelError> {
        let mut space = lock(&self.iommufd);
        if let Some(space) = &*space {
            return Ok(Arc::clone(space));
        }
        let path = system.dev.join("iommu");
        let failed = |call: String, source, remedy: &str| KernelError::Call {
            device: device.into(),
            call,
            source,
            remedy: remedy.into(),
        };
        let fd = open_node(&path).map_err(|error| {
            let remedy = "load iommufd, or name the device with group: before it";
            failed(format!("open {}", path.display()), error, remedy)
        })?;
        let ioas = iommufd::ioas_alloc(fd.as_fd())
            .map_err(|error| failed("IOMMU_IOAS_ALLOC".into(), error, ""))?;
        let fd = Arc::new(fd);
        let made = Arc::new(Space::new(Backend::Iommufd { fd, ioas, hwpts: Mutex::default() }));
        *space = Some(Arc::clone(&made));
        Ok(made)
    }

    /// The one of type1, with the group of `found` in it, and the device's fd.
    pub(crate) fn type1(
        &self,
        system: &System,
        found: &Found,
    ) -> Result<(Arc<Space>, OwnedFd), KernelError> {
        let mut slot = lock(&self.type1);
        let failed = |call: String, source, remedy: &str| KernelError::Call {
            device: found.name.clone(),
            call,
            source,
            remedy: remedy.into(),
        };
        let number = found.group.ok_or_else(|| KernelError::Spec {
            spec: found.name.clone(),
            why: "the device has no IOMMU group; enable the IOMMU (intel_iommu=on, amd_iommu=on)"
                .into(),
        })?;
        if let Some(space) = &*slot
            && let Some(device) = space.device_of_open_group(number, &found.name)
        {
            let device = device
                .map_err(|error| failed("VFIO_GROUP_GET_DEVICE_FD".into(), error, DEVICE_IN_USE))?;
            return Ok((Arc::clone(space), device));
        }
        let path = system.group_path(number);
        let group_fd = open_node(&path).map_err(|error| {
            let remedy = match error.raw_os_error() {
                Some(libc::ENOENT) => "the kernel has no group node for it (CONFIG_VFIO_GROUP)",
                Some(libc::EBUSY) => {
                    "another process has the group open, or a device of it by cdev"
                }
                Some(libc::EACCES | libc::EPERM) => "run as root, or give the node to your user",
                _ => "",
            };
            failed(format!("open {}", path.display()), error, remedy)
        })?;
        let flags = group::group_status(group_fd.as_fd())
            .map_err(|error| failed("VFIO_GROUP_GET_STATUS".into(), error, ""))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(KernelError::NotViable {
                device: found.name.clone(),
                group: number,
                members: system.group_members(number).join(", "),
            });
        }
        let space = match &*slot {
            Some(space) => {
                space.add_group(number, group_fd).map_err(|error| {
                    failed(
                        "VFIO_GROUP_SET_CONTAINER".into(),
                        error,
                        "the group does not fit into the VM's container; open its devices by cdev",
                    )
                })?;
                Arc::clone(space)
            }
            None => Arc::new(new_type1(system, number, group_fd, failed)?),
        };
        let device = match space.device_of_open_group(number, &found.name) {
            Some(device) => device
                .map_err(|error| failed("VFIO_GROUP_GET_DEVICE_FD".into(), error, DEVICE_IN_USE))?,
            None => {
                return Err(failed(
                    "VFIO_GROUP_GET_DEVICE_FD".into(),
                    io::Error::from_raw_os_error(libc::ENODEV),
                    "",
                ));
            }
        };
        *slot = Some(Arc::clone(&space));
        Ok((space, device))
    }
}

const DEVICE_IN_USE: &str = "the device is in use; end the process that has it";

fn new_type1(
    system: &System,
    number: u32,
    group_fd: OwnedFd,
    failed: impl Fn(String, io::Error, &str) -> KernelError,
) -> Result<Space, KernelError> {
    let path = system.dev.join("vfio/vfio");
    let container = open_node(&path).map_err(|error| {
        let remedy = "load vfio and vfio_iommu_type1, or open the device by cdev";
        failed(format!("open {}", path.display()), error, remedy)
    })?;
    let unsupported = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    let version = group::api_version(container.as_fd())
        .map_err(|error| failed("VFIO_GET_API_VERSION".into(), error, ""))?;
    if version != VFIO_API_VERSION {
        let call = format!("VFIO_GET_API_VERSION ({version})");
        return Err(failed(call, unsupported(), "this kernel's VFIO is another version"));
    }
    if !group::check_extension(container.as_fd(), VFIO_TYPE1V2_IOMMU).unwrap_or(false) {
        let call = "VFIO_CHECK_EXTENSION (type1 v2)".into();
        return Err(failed(call, unsupported(), "load vfio_iommu_type1"));
    }
    group::group_set_container(group_fd.as_fd(), container.as_fd())
        .map_err(|error| failed("VFIO_GROUP_SET_CONTAINER".into(), error, DEVICE_IN_USE))?;
    group::set_iommu(container.as_fd(), VFIO_TYPE1V2_IOMMU).map_err(|error| {
        let remedy = "EPERM: the platform cannot isolate interrupts, see allow_unsafe_interrupts of \
                      vfio_iommu_type1";
        let is_eperm = error.raw_os_error() == Some(libc::EPERM);
        failed("VFIO_SET_IOMMU".into(), error, if is_eperm { remedy } else { "" })
    })?;
    let groups = Mutex::new(vec![(number, group_fd)]);
    Ok(Space::new(Backend::Type1 { groups, container }))
}

/// What stands between a device and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Translation {
    /// A hardware page table that tracks which pages the device wrote.
    HwptWithDirtyTracking,
    /// An IOAS: a mediated device, whose driver asks for pages, or an IOMMU without dirty tracking.
    Ioas,
    /// A type1 container.
    Type1,
}

/// One address space.
#[derive(Debug)]
pub(crate) struct Space {
    backend: Backend,
    mapped: Mutex<BTreeMap<u64, Mapped>>,
    /// How many devices have dirty tracking on.
    trackers: Mutex<u32>,
}

#[derive(Debug)]
enum Backend {
    Iommufd { fd: Arc<OwnedFd>, ioas: u32, hwpts: Mutex<Vec<Hwpt>> },
    // Groups are closed before their container.
    Type1 { groups: Mutex<Vec<(u32, OwnedFd)>>, container: OwnedFd },
}

#[derive(Debug, PartialEq, Eq)]
struct Shape {
    size: u64,
    permissions: DmaPermissions,
    /// Device and inode of the file, and where in it.
    file: (u64, u64),
    offset: u64,
}

#[derive(Debug)]
struct Mapped {
    shape: Shape,
    users: u32,
    /// Lent to the kernel, where it needs an address.
    _memory: Option<FileMapping>,
}

impl Space {
    fn new(backend: Backend) -> Self {
        Self { backend, mapped: Mutex::default(), trackers: Mutex::default() }
    }

    /// The iommufd, to bind a device to.
    pub(crate) fn iommufd(&self) -> Option<BorrowedFd<'_>> {
        match &self.backend {
            Backend::Iommufd { fd, .. } => Some(fd.as_fd()),
            Backend::Type1 { .. } => None,
        }
    }

    /// Attaches a bound device: to a page table with dirty tracking where the IOMMU has it.
    pub(crate) fn attach(
        &self,
        device: BorrowedFd<'_>,
        dev_id: u32,
        mediated: bool,
    ) -> io::Result<Translation> {
        let Backend::Iommufd { fd, ioas, hwpts } = &self.backend else {
            return Ok(Translation::Type1);
        };
        if !mediated {
            let mut hwpts = lock(hwpts);
            // One that an earlier device got, where it fits.
            for hwpt in hwpts.iter() {
                match raw::attach_iommufd_pt(device, hwpt.id()) {
                    Ok(_) => return Ok(Translation::HwptWithDirtyTracking),
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                    Err(error) => return Err(error),
                }
            }
            match Hwpt::new(fd, dev_id, *ioas) {
                Ok(hwpt) => {
                    raw::attach_iommufd_pt(device, hwpt.id())?;
                    if *lock(&self.trackers) > 0 {
                        hwpt.set_tracking(true)?;
                    }
                    hwpts.push(hwpt);
                    return Ok(Translation::HwptWithDirtyTracking);
                }
                Err(error) => {
                    tracing::debug!(%error, "no page table with dirty tracking for this device");
                }
            }
        }
        raw::attach_iommufd_pt(device, *ioas).map(|_| Translation::Ioas)
    }

    fn device_of_open_group(&self, number: u32, name: &str) -> Option<io::Result<OwnedFd>> {
        let Backend::Type1 { groups, .. } = &self.backend else { return None };
        let groups = lock(groups);
        let (_, group_fd) = groups.iter().find(|(there, _)| *there == number)?;
        let name = std::ffi::CString::new(name).map_err(io::Error::from);
        Some(name.and_then(|name| group::group_device_fd(group_fd.as_fd(), &name)))
    }

    fn add_group(&self, number: u32, group_fd: OwnedFd) -> io::Result<()> {
        if let Backend::Type1 { groups, container } = &self.backend {
            group::group_set_container(group_fd.as_fd(), container.as_fd())?;
            lock(groups).push((number, group_fd));
        }
        Ok(())
    }

    /// Maps a part of a file at `iova`; the same mapping again only counts.
    pub(crate) fn map(
        &self,
        iova: u64,
        size: u64,
        permissions: DmaPermissions,
        file: &OwnedFd,
        offset: u64,
    ) -> DeviceResult<()> {
        let call = "DMA_MAP";
        let refuse = |errno, why: String| Err(DeviceError::Refused { call, errno, why });
        let place = format!("{iova:#x} +{size:#x}");
        if size == 0 || iova.checked_add(size).is_none() {
            return refuse(libc::EINVAL, format!("{place} is no range"));
        }
        let file_id = file
            .try_clone()
            .and_then(|file| File::from(file).metadata())
            .map(|metadata| (metadata.dev(), metadata.ino()))
            .map_err(|source| DeviceError::Io { call, source })?;
        let shape = Shape { size, permissions, file: file_id, offset };
        let mut mapped = lock(&self.mapped);
        if let Some(there) = mapped.get_mut(&iova) {
            if there.shape == shape {
                there.users += 1;
                return Ok(());
            }
            return refuse(libc::EEXIST, format!("{place} is mapped to something else"));
        }
        let before = mapped.range(..iova.saturating_add(size)).next_back();
        if before.is_some_and(|(start, there)| start.saturating_add(there.shape.size) > iova) {
            return refuse(libc::EEXIST, format!("{place} overlaps another mapping"));
        }
        match self.map_new(iova, &shape, file.as_fd()) {
            Ok(memory) => {
                mapped.insert(iova, Mapped { shape, users: 1, _memory: memory });
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                Some(errno) => refuse(errno, self.why_not_mapped(errno, &place)),
                None => Err(DeviceError::Io { call, source: error }),
            },
        }
    }

    fn map_new(
        &self,
        iova: u64,
        shape: &Shape,
        file: BorrowedFd<'_>,
    ) -> io::Result<Option<FileMapping>> {
        let DmaPermissions { read, write } = shape.permissions;
        let lent = || FileMapping::new(file, shape.offset, shape.size, read, write);
        match &self.backend {
            Backend::Iommufd { fd, ioas, .. } => {
                let mut flags = if read { IOMMU_IOAS_MAP_READABLE } else { 0 };
                flags |= if write { IOMMU_IOAS_MAP_WRITEABLE } else { 0 };
                let (start, length) = (shape.offset, shape.size);
                let by_file =
                    iommufd::ioas_map_file(fd.as_fd(), *ioas, flags, file, start, length, iova);
                match by_file {
                    Ok(()) => Ok(None),
                    // An older kernel, or a file that is no memfd.
                    Err(error)
                        if matches!(
                            error.raw_os_error(),
                            Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL | libc::EBADF)
                        ) =>
                    {
                        let memory = lent()?;
                        iommufd::ioas_map(fd.as_fd(), *ioas, flags, &memory, iova)?;
                        Ok(Some(memory))
                    }
                    Err(error) => Err(error),
                }
            }
            Backend::Type1 { container, .. } => {
                let mut flags = if read { VFIO_DMA_MAP_FLAG_READ } else { 0 };
                flags |= if write { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
                let memory = lent()?;
                group::type1_map(container.as_fd(), flags, &memory, iova)?;
                Ok(Some(memory))
            }
        }
    }

    fn why_not_mapped(&self, errno: i32, place: &str) -> String {
        match errno {
            libc::ENOMEM | libc::EPERM => format!(
                "{place} could not be pinned; raise the limit of locked memory (ulimit -l, LimitMEMLOCK) \
                 above the guest's memory"
            ),
            libc::EINVAL | libc::EADDRINUSE => {
                let usable = self.usable_ranges();
                format!("the IOMMU cannot map {place}{usable}")
            }
            _ => format!("{place} could not be mapped"),
        }
    }

    fn usable_ranges(&self) -> String {
        let Backend::Iommufd { fd, ioas, .. } = &self.backend else { return String::new() };
        let mut ranges = [IommuIovaRange::default(); 8];
        let Ok((count, _)) = iommufd::ioas_iova_ranges(fd.as_fd(), *ioas, &mut ranges) else {
            return String::new();
        };
        let shown = ranges.iter().take(count as usize);
        let shown: Vec<String> =
            shown.map(|range| format!("{:#x}..={:#x}", range.start, range.last)).collect();
        format!("; it can use {}", shown.join(", "))
    }

    /// Takes one user from a mapping, and with the last the mapping itself.
    pub(crate) fn unmap(&self, iova: u64, size: u64) -> DeviceResult<()> {
        let call = "DMA_UNMAP";
        let mut mapped = lock(&self.mapped);
        let Some(there) = mapped.get_mut(&iova).filter(|there| there.shape.size == size) else {
            let why = format!("{iova:#x} +{size:#x} is not a mapping");
            return Err(DeviceError::Refused { call, errno: libc::ENOENT, why });
        };
        if there.users > 1 {
            there.users -= 1;
            return Ok(());
        }
        let unmapped = match &self.backend {
            Backend::Iommufd { fd, ioas, .. } => iommufd::ioas_unmap(fd.as_fd(), *ioas, iova, size),
            Backend::Type1 { container, .. } => group::type1_unmap(container.as_fd(), iova, size),
        };
        unmapped.map_err(|error| device_error(call, error))?;
        mapped.remove(&iova);
        Ok(())
    }

    /// Type1 can say which pages were written through it.
    pub(crate) fn has_type1_tracking(&self) -> bool {
        let Backend::Type1 { container, .. } = &self.backend else { return false };
        let Ok(bytes) = group::type1_info(container.as_fd(), TYPE1_INFO_BYTES_MAX) else {
            return false;
        };
        let first = group::type1_info_head(&bytes).map_or(0, |head| head.cap_offset);
        chain::type1_migration(&bytes, first).is_some()
    }

    /// Starts the IOMMU's dirty tracking, or joins it where another device has it on.
    pub(crate) fn start_tracking(&self) -> io::Result<()> {
        let mut trackers = lock(&self.trackers);
        if *trackers == 0 {
            self.set_tracking(true)?;
        }
        *trackers += 1;
        Ok(())
    }

    /// Stops it with the last device that has it on.
    pub(crate) fn stop_tracking(&self) -> io::Result<()> {
        let mut trackers = lock(&self.trackers);
        match *trackers {
            0 => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
            1 => self.set_tracking(false)?,
            _ => {}
        }
        *trackers -= 1;
        Ok(())
    }

    fn set_tracking(&self, on: bool) -> io::Result<()> {
        match &self.backend {
            Backend::Iommufd { hwpts, .. } => {
                let hwpts = lock(hwpts);
                for (index, hwpt) in hwpts.iter().enumerate() {
                    if let Err(error) = hwpt.set_tracking(on) {
                        for done in hwpts.iter().take(index).filter(|_| on) {
                            let _ = done.set_tracking(false);
                        }
                        return Err(error);
                    }
                }
                Ok(())
            }
            Backend::Type1 { container, .. } => group::type1_dirty_tracking(container.as_fd(), on),
        }
    }

    /// Sets the bits of the pages that were written since the last report, and forgets them. All devices of
    /// the space are reported together: their reports have to be united, as dirty pages are anyway.
    pub(crate) fn report(
        &self,
        range: DmaRange,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> io::Result<()> {
        match &self.backend {
            Backend::Iommufd { hwpts, .. } => {
                lock(hwpts).iter().try_for_each(|hwpt| hwpt.report(range, page_size, bitmap))
            }
            Backend::Type1 { container, .. } => {
                // This one overwrites instead of setting bits.
                let DmaRange { iova, length } = range;
                let mut own = vec![0; bitmap_words(length, page_size) as usize];
                let fd = container.as_fd();
                group::type1_dirty_bitmap(fd, iova, length, page_size, &mut own)?;
                for (word, new) in bitmap.iter_mut().zip(own) {
                    *word |= new;
                }
                Ok(())
            }
        }
    }
}

pub(crate) fn open_node(path: &std::path::Path) -> io::Result<OwnedFd> {
    File::options().read(true).write(true).open(path).map(OwnedFd::from)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
