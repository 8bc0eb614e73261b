//! [`KernelDevice`]: a device of the kernel, open.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vfio_migration::{DeviceResult, PciFunction};

use crate::device_error;
use crate::error::KernelError;
use crate::migration::KernelMigration;
use crate::pci::KernelPci;
use crate::raw;
use crate::raw::uapi;
use crate::space::{AddressSpaces, Space, Translation, open_node};
use crate::spec::{Access, DeviceSpec};
use crate::sysfs::{Found, System};
use crate::watch::{InCall, Watch};

/// How a device is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which way, where the name does not say it.
    pub access: Access,
    /// Shared by the devices of one VM; `None`: the device gets its own.
    pub spaces: Option<Arc<AddressSpaces>>,
    /// Where sysfs and `/dev` are.
    pub system: System,
}

/// How a device was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The node: of the device itself, or of its group.
    pub node: PathBuf,
    /// By character device and iommufd, or by group and container. Never [`Access::Best`].
    pub access: Access,
    /// What stands between the device and memory.
    pub translation: Translation,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// The number of its IOMMU group.
    pub group: Option<u32>,
    /// A mediated device.
    pub mediated: bool,
}

impl fmt::Display for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.translation {
            Translation::HwptWithDirtyTracking => "cdev, iommufd with dirty tracking",
            Translation::Ioas => "cdev, iommufd",
            Translation::Type1 => "group, type1 container",
        };
        write!(f, "{how}, {}", self.node.display())?;
        if let Some(driver) = &self.driver {
            write!(f, ", driver {driver}")?;
        }
        Ok(())
    }
}

/// Who knows which pages the device wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DirtySource {
    /// Nobody: every mapped page is dirty for ever (L12).
    None,
    /// The device logs its DMA.
    Device,
    /// The IOMMU, through a page table of iommufd with dirty tracking.
    Iommufd,
    /// Type1, for a mediated device: exactly what its driver wrote or pinned.
    Type1,
}

/// An open device. Cheap to clone; it is closed when the last handle, [`pci`](Self::pci) and
/// [`migration`](Self::migration) included, is dropped.
#[derive(Clone)]
pub struct KernelDevice {
    shared: Arc<Shared>,
}

/// What the handles of one device share.
pub(crate) struct Shared {
    pub(crate) name: String,
    // Closed before the address space.
    pub(crate) fd: OwnedFd,
    pub(crate) space: Arc<Space>,
    pub(crate) watch: Arc<Watch>,
    pub(crate) sysfs: PathBuf,
    /// Resets seen so far: counted before and after, so an odd number is one under way.
    pub(crate) resets: AtomicU64,
    opened: Opened,
    /// A state change and a reset exclude each other.
    change: Mutex<()>,
    /// What this device mapped.
    mapped: Mutex<Vec<(u64, u64)>>,
}

impl fmt::Debug for KernelDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelDevice")
            .field("name", &self.shared.name)
            .field("opened", &self.shared.opened)
            .finish_non_exhaustive()
    }
}

impl KernelDevice {
    /// Opens the device that `spec` names, see [`DeviceSpec`].
    pub fn open(spec: &str, options: Options) -> Result<Self, KernelError> {
        let refused = |why| KernelError::Spec { spec: spec.into(), why };
        let spec: DeviceSpec = spec.parse().map_err(refused)?;
        let found = options.system.find(&spec)?;
        let access = match (spec.access, options.access) {
            (Access::Best, access) => access,
            (access, _) => access,
        };
        let has_iommufd = options.system.dev.join("iommu").exists();
        let spaces = options.spaces.unwrap_or_default();
        match access {
            Access::Group => Self::open_by_group(&options.system, &spaces, found),
            Access::Best if found.cdev.is_none() || !has_iommufd => {
                Self::open_by_group(&options.system, &spaces, found)
            }
            _ => Self::open_by_cdev(&options.system, &spaces, found),
        }
    }

    fn open_by_cdev(
        system: &System,
        spaces: &AddressSpaces,
        found: Found,
    ) -> Result<Self, KernelError> {
        let failed = |call: String, source: io::Error| {
            let remedy = match source.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => "run as root, or give the node to your user",
                Some(libc::EBUSY) => "another process has the device or its group open",
                Some(libc::ENODEV) => "the device is going away",
                _ => "",
            };
            KernelError::Call { device: found.name.clone(), call, source, remedy: remedy.into() }
        };
        let node = found.cdev.clone().ok_or_else(|| KernelError::Spec {
            spec: found.name.clone(),
            why: "the kernel has no character device for it (CONFIG_VFIO_DEVICE_CDEV); name it with group: \
                  before it"
                .into(),
        })?;
        let space = spaces.iommufd(system, &found.name)?;
        let fd =
            open_node(&node).map_err(|error| failed(format!("open {}", node.display()), error))?;
        let iommufd = space.iommufd().ok_or_else(|| {
            let source = io::Error::from_raw_os_error(libc::EBADF);
            failed("VFIO_DEVICE_BIND_IOMMUFD".into(), source)
        })?;
        let dev_id = raw::bind_iommufd(fd.as_fd(), iommufd)
            .map_err(|error| failed("VFIO_DEVICE_BIND_IOMMUFD".into(), error))?;
        let translation = space
            .attach(fd.as_fd(), dev_id, found.mediated)
            .map_err(|error| failed("VFIO_DEVICE_ATTACH_IOMMUFD_PT".into(), error))?;
        Ok(Self::new(found, fd, space, node, Access::Cdev, translation))
    }

    fn open_by_group(
        system: &System,
        spaces: &AddressSpaces,
        found: Found,
    ) -> Result<Self, KernelError> {
        let (space, fd) = spaces.type1(system, &found)?;
        let node = system.group_path(found.group.unwrap_or_default());
        Ok(Self::new(found, fd, space, node, Access::Group, Translation::Type1))
    }

    fn new(
        found: Found,
        fd: OwnedFd,
        space: Arc<Space>,
        node: PathBuf,
        access: Access,
        translation: Translation,
    ) -> Self {
        let Found { name, sysfs, driver, group, mediated, .. } = found;
        let opened = Opened { node, access, translation, driver, group, mediated };
        tracing::info!(device = name, %opened, "device opened");
        let watch = Watch::new(&name);
        Self {
            shared: Arc::new(Shared {
                name,
                fd,
                space,
                watch,
                sysfs,
                resets: AtomicU64::new(0),
                opened,
                change: Mutex::new(()),
                mapped: Mutex::default(),
            }),
        }
    }

    /// The kernel's name for it: PCI address or UUID.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// How it was opened.
    pub fn opened(&self) -> &Opened {
        &self.shared.opened
    }

    /// Its folder in sysfs.
    pub fn sysfs(&self) -> &Path {
        &self.shared.sysfs
    }

    /// The device's fd, for calls of [`raw`]. Whoever changes the state or resets the device through it takes
    /// what [`migration`](Self::migration) keeps out of step.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }

    /// The longest call that is under way on it.
    pub fn in_call(&self) -> Option<InCall> {
        self.shared.watch.oldest(Instant::now())
    }

    /// VFIO_DEVICE_GET_INFO.
    pub fn info(&self) -> DeviceResult<uapi::DeviceInfo> {
        self.shared.call("DEVICE_GET_INFO", || raw::device_info(self.fd()))
    }

    /// The function as the VMM drives it; `Unsupported` for a device that is not PCI.
    pub fn pci(&self) -> DeviceResult<Arc<dyn PciFunction>> {
        let pci = KernelPci::open(Arc::clone(&self.shared))?;
        Ok(Arc::new(pci))
    }

    /// The device as the engine drives it. Probes the migration features, opts in to INFOv2 where the kernel
    /// has it; `Unsupported` where the device cannot be migrated. Take it once: two handles would not know
    /// of each other's sessions.
    pub fn migration(&self) -> DeviceResult<KernelMigration> {
        KernelMigration::open(Arc::clone(&self.shared))
    }
}

impl Shared {
    /// Makes a call, under the eyes of the watch.
    pub(crate) fn call<T>(
        &self,
        call: &'static str,
        make: impl FnOnce() -> io::Result<T>,
    ) -> DeviceResult<T> {
        let _under_way = self.watch.begin(call);
        make().map_err(|error| device_error(call, error))
    }

    /// A state change or a reset begins: one at a time.
    pub(crate) fn change(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// VFIO_DEVICE_RESET. Not behind the calls of the migration: the kernel takes a reset at any time, and a
    /// read that waits for the device must not keep the guest from resetting it.
    pub(crate) fn reset(&self) -> DeviceResult<()> {
        let _one_at_a_time = self.change();
        self.resets.fetch_add(1, Ordering::AcqRel);
        let reset = self.call("DEVICE_RESET", || raw::reset(self.fd.as_fd()));
        self.resets.fetch_add(1, Ordering::AcqRel);
        reset
    }

    pub(crate) fn opened(&self) -> &Opened {
        &self.opened
    }

    pub(crate) fn mapped(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The address space may live on with other devices.
        for (iova, size) in std::mem::take(&mut *self.mapped()) {
            if let Err(error) = self.space.unmap(iova, size) {
                tracing::warn!(device = self.name, %error, "a mapping is left behind");
            }
        }
    }
}
