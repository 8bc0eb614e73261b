//! A device of either backend, open.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use microvm::DeviceBackend;
use vfio_kernel::KernelDevice;
use vfio_migration::pci::REGION_CONFIG;
use vfio_migration::{DeviceError, DeviceResult, MigratableDevice, PciFunction};
use vfio_user::VfioUserDevice;

/// Limits of a server's calls: a command must end.
const STATE_TIMEOUT: Duration = Duration::from_secs(120);
const DATA_TIMEOUT: Duration = Duration::from_secs(60);

/// A device of either backend.
pub(super) struct Device {
    backend: Backend,
    /// Its name as it was given.
    pub(super) name: String,
    /// How it was opened, for people.
    pub(super) opened: String,
    /// What saved states must have come from: the backend, and the driver of a device of the kernel.
    pub(super) kind: String,
}

enum Backend {
    VfioUser(VfioUserDevice),
    Kernel(KernelDevice),
}

impl Device {
    pub(super) fn open(device: &DeviceBackend) -> anyhow::Result<Self> {
        match device {
            DeviceBackend::VfioUser(path) => Self::open_socket(path),
            DeviceBackend::Vfio(spec) => {
                let opened = KernelDevice::open(spec, vfio_kernel::Options::default())?;
                let driver = opened.opened().driver.clone().unwrap_or_else(|| "unknown".into());
                Ok(Self {
                    name: format!("vfio:{spec}"),
                    opened: opened.opened().to_string(),
                    kind: format!("vfio/{driver}"),
                    backend: Backend::Kernel(opened),
                })
            }
        }
    }

    fn open_socket(path: &Path) -> anyhow::Result<Self> {
        let options = vfio_user::Options {
            state_timeout: Some(STATE_TIMEOUT),
            data_timeout: Some(DATA_TIMEOUT),
            ..vfio_user::Options::default()
        };
        let opened = VfioUserDevice::open(path, options)?;
        Ok(Self {
            name: format!("vfio-user:{}", path.display()),
            opened: "vfio-user socket".into(),
            kind: "vfio-user".into(),
            backend: Backend::VfioUser(opened),
        })
    }

    /// The migration side, if there is one.
    pub(super) fn migration(&self) -> DeviceResult<Option<Box<dyn MigratableDevice>>> {
        let migration = match &self.backend {
            Backend::VfioUser(device) => device.migration().map(|it| Box::new(it) as Box<_>),
            Backend::Kernel(device) => device.migration().map(|it| Box::new(it) as Box<_>),
        };
        match migration {
            Ok(migration) => Ok(Some(migration)),
            Err(DeviceError::Unsupported { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The migration side of a device that must have one.
    pub(super) fn need_migration(&self) -> anyhow::Result<Box<dyn MigratableDevice>> {
        let migration = self.migration().with_context(|| self.name.clone())?;
        migration.with_context(|| format!("{} has no migration support", self.name))
    }

    /// The function; `None` for a device that is not PCI.
    pub(super) fn pci(&self) -> DeviceResult<Option<Arc<dyn PciFunction>>> {
        match &self.backend {
            Backend::VfioUser(device) => Ok(Some(device.pci())),
            Backend::Kernel(device) => match device.pci() {
                Ok(pci) => Ok(Some(pci)),
                Err(DeviceError::Unsupported { .. }) => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    /// Vendor, device, subsystem, class and revision as they are written; `none` for a device without.
    pub(super) fn ids(&self) -> anyhow::Result<String> {
        let Some(pci) = self.pci().with_context(|| self.name.clone())? else {
            return Ok("none".into());
        };
        let mut config = [0; 64];
        let read = pci.region_read(REGION_CONFIG, 0, &mut config);
        read.with_context(|| format!("{}: reading the configuration space", self.name))?;
        let half = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
        Ok(format!(
            "{:04x}:{:04x} subsystem {:04x}:{:04x} class {:02x}{:02x}{:02x} revision {:02x}",
            half(0),
            half(2),
            half(0x2c),
            half(0x2e),
            config[0xb],
            config[0xa],
            config[9],
            config[8]
        ))
    }
}
