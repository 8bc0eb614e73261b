//! Opening a device: found by its backend, memory mapped, described for the other host.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use migration::{Device, DeviceDescription, GuestMemory};
use vfio_kernel::{AddressSpaces, KernelDevice};
use vfio_migration::pci::REGION_CONFIG;
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, IrqIndex, MigratableDevice, PciFunction,
};
use vfio_user::VfioUserDevice;

use crate::config::{DeviceBackend, DeviceConfig};
use crate::error::{Error, Result};
use crate::pci::dma::{GuestDma, map_memory};
use crate::pci::fence::{Fenced, ResetFence};
use crate::pci::function::Loss;

/// A device that is ready for a slot and for the engine.
#[derive(Clone)]
pub struct OpenDevice {
    /// What the engine drives.
    pub device: Device,
    /// What the guest drives.
    pub function: Arc<dyn PciFunction>,
    /// Set when the device's server is gone.
    pub loss: Loss,
    /// Orders resets by the guest and the failures they cause.
    pub fence: Arc<ResetFence>,
    /// The device itself, where the kernel implements it. Pages of guest memory may be pinned for it then: they
    /// must stay the pages of the memory's files.
    pub kernel: Option<KernelDevice>,
}

impl std::fmt::Debug for OpenDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OpenDevice").field(&self.device.description.id).finish()
    }
}

/// Opens the device that `config` names and maps `memory` for it. The kernel devices of one VM share
/// `spaces`.
pub fn open(
    config: &DeviceConfig,
    memory: &Arc<GuestMemory>,
    spaces: &Arc<AddressSpaces>,
) -> Result<OpenDevice> {
    let id = &config.id;
    let refused = |what: String| Error::Config(format!("device {id} ({}): {what}", config.backend));
    let loss = Loss::default();
    let backend = match &config.backend {
        DeviceBackend::VfioUser(path) => open_vfio_user(id, path, memory, &loss),
        DeviceBackend::Vfio(spec) => open_kernel(spec, spaces),
    };
    let Backend { name, function, migration, remedy, kernel } = backend.map_err(refused)?;
    reset_after_others(id, &*function)
        .map_err(|error| refused(format!("it cannot be reset: {error}; {remedy}")))?;
    let capabilities = migration.capabilities();
    map_memory(&*function, memory).map_err(|error| {
        refused(format!("guest memory cannot be mapped for it: {error}; {remedy}"))
    })?;
    let description =
        describe(id, name, &*function, capabilities).map_err(|error| refused(error.to_string()))?;
    let fence = Arc::new(ResetFence::default());
    let handle = Arc::new(Mutex::new(Fenced::new(migration, Arc::clone(&fence))));
    Ok(OpenDevice { device: Device { description, handle }, function, loss, fence, kernel })
}

/// What a backend gives.
struct Backend {
    /// As the other host is told.
    name: &'static str,
    function: Arc<dyn PciFunction>,
    migration: Box<dyn MigratableDevice>,
    /// What helps when the device fails to be set up.
    remedy: &'static str,
    kernel: Option<KernelDevice>,
}

fn open_vfio_user(
    id: &str,
    path: &Path,
    memory: &Arc<GuestMemory>,
    loss: &Loss,
) -> std::result::Result<Backend, String> {
    let options = vfio_user::Options {
        dma_access: Some(Arc::new(GuestDma::new(Arc::clone(memory)))),
        on_loss: Some(on_loss(id.into(), Arc::clone(loss))),
        ..vfio_user::Options::default()
    };
    let opened = VfioUserDevice::open(path, options).map_err(|error| {
        format!("{error}; start its server (vmferry device serve), or correct the path")
    })?;
    let migration = opened.migration().map_err(|error| {
        format!("it cannot be migrated: {error}; use a server that offers migration")
    })?;
    Ok(Backend {
        name: "vfio-user",
        function: opened.pci(),
        migration: Box::new(migration),
        remedy: "restart its server",
        kernel: None,
    })
}

fn open_kernel(spec: &str, spaces: &Arc<AddressSpaces>) -> std::result::Result<Backend, String> {
    let spaces = Some(Arc::clone(spaces));
    let options = vfio_kernel::Options { spaces, ..vfio_kernel::Options::default() };
    let opened = KernelDevice::open(spec, options).map_err(|error| error.to_string())?;
    let function =
        opened.pci().map_err(|error| format!("{error}; only PCI devices can be passed through"))?;
    let migration = opened.migration().map_err(|error| {
        format!("it cannot be migrated: {error}; bind it to a VFIO driver of its own kind, vfio-pci itself has no migration")
    })?;
    Ok(Backend {
        name: "vfio",
        function,
        migration: Box::new(migration),
        remedy: "the kernel's log may say more",
        kernel: Some(opened),
    })
}

/// A server keeps its device from one client to the next, and so may a driver of the kernel: what an earlier
/// VMM left behind is no concern of this guest. A device that can be reset in some states only (libvfio-user, while it is stopped) is taken as
/// it is; that it opens in RUNNING is checked by who migrates it (D7).
fn reset_after_others(id: &str, function: &dyn PciFunction) -> DeviceResult<()> {
    if !function.info().reset {
        return Ok(());
    }
    match function.reset_function() {
        Err(error) if error.errno() == Some(libc::EINVAL) => {
            tracing::debug!(device = %id, %error, "the device is not reset before its first use");
            Ok(())
        }
        outcome => outcome,
    }
}

fn on_loss(id: String, loss: Loss) -> vfio_user::client::LossCallback {
    Arc::new(move |reason| {
        if OnceLock::set(&loss, reason.into()).is_ok() {
            tracing::error!(device = %id, reason, "the device is lost");
        }
    })
}

/// What the other host has to match.
pub fn describe(
    id: &str,
    backend: &str,
    function: &dyn PciFunction,
    capabilities: DeviceCapabilities,
) -> DeviceResult<DeviceDescription> {
    let info = function.info();
    let mut header = [0u8; 0x30];
    if info.regions.get(REGION_CONFIG as usize).is_none_or(|region| region.size < 0x40) {
        return Err(DeviceError::Protocol {
            call: "GET_REGION_INFO",
            what: "no configuration space".into(),
        });
    }
    for (index, dword) in header.chunks_exact_mut(4).enumerate() {
        function.region_read(REGION_CONFIG, 4 * index as u64, dword)?;
    }
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let flags = info.regions.iter().map(|region| {
        u32::from(region.flags.read)
            | u32::from(region.flags.write) << 1
            | u32::from(region.flags.mmap) << 2
    });
    Ok(DeviceDescription {
        id: id.into(),
        backend: backend.into(),
        pci_ids: [word(0), word(2), word(0x2c), word(0x2e)],
        class_revision: u32::from_le_bytes([header[8], header[9], header[10], header[11]]),
        region_sizes: info.regions.iter().map(|region| region.size).collect(),
        region_flags: flags.collect(),
        irq_counts: IrqIndex::ALL
            .iter()
            .map(|&index| info.irqs.get(index as usize).map_or(0, |irq| irq.count))
            .collect(),
        migration_flags: capabilities.flags.as_raw(),
        precopy_info: capabilities.precopy_info,
        precopy_info_v2: capabilities.precopy_info_v2,
        data_size: capabilities.data_size,
        dma_logging: capabilities.dma_logging,
        reset_runs: capabilities.reset_runs,
    })
}

#[cfg(test)]
mod tests {
    use migration::RegionLayout;
    use vfio_migration::MigrationFlags;

    use super::*;
    use crate::pci::mock::{self, MockFunction};

    #[test]
    fn a_missing_device_is_named_with_its_backend_and_the_remedy() {
        let layout = [RegionLayout { gpa: 0, len: 4096 }];
        let memory = Arc::new(GuestMemory::new(&layout).unwrap());
        let server = DeviceBackend::VfioUser("/nonexistent/nic.sock".into());
        let kernel = |spec: &str| DeviceBackend::Vfio(spec.into());
        let cases = [
            (server, ["vfio-user:/nonexistent/nic.sock", "vmferry device serve"]),
            (kernel("ffff:ff:1f.7"), ["vfio:ffff:ff:1f.7", "lspci"]),
            (kernel("nic"), ["vfio:nic", "a PCI address"]),
        ];
        for (backend, parts) in cases {
            let config = DeviceConfig { id: "nic0".into(), backend };
            let error = open(&config, &memory, &AddressSpaces::new()).unwrap_err().to_string();
            for part in parts.into_iter().chain(["nic0"]) {
                assert!(error.contains(part), "{error}");
            }
        }
    }

    #[test]
    fn the_description_is_what_the_device_says() {
        let device = MockFunction::new(mock::config());
        let capabilities = DeviceCapabilities {
            flags: MigrationFlags::new(true, true),
            precopy_info: true,
            precopy_info_v2: false,
            data_size: true,
            dma_logging: false,
            reset_runs: true,
            max_write_bytes: None,
        };
        let description = describe("nic0", "vfio-user", &*device, capabilities).unwrap();
        assert_eq!(description.pci_ids, [0x1b36, 0x00f7, 0x1b36, 1]);
        assert_eq!(description.class_revision, 0x0880_0001);
        assert_eq!(description.region_sizes, [0x1000, 0, 0x1000, 0, 0x1_0000, 0, 0, 256, 0]);
        assert_eq!(description.region_flags[0], 3);
        assert_eq!(description.irq_counts, [1, 4, 4, 0, 0]);
        assert_eq!(description.migration_flags, 7);
        assert!(description.data_size && !description.dma_logging && !description.precopy_info_v2);
        device.gone.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(describe("nic0", "vfio-user", &*device, capabilities).unwrap_err().is_gone());
    }

    #[test]
    fn a_device_that_refuses_the_first_reset_is_taken_as_it_is_and_a_lost_one_is_not() {
        let device = MockFunction::new(mock::config());
        reset_after_others("nic0", &*device).unwrap();
        assert_eq!(device.resets.load(std::sync::atomic::Ordering::Relaxed), 1);
        device.gone.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(reset_after_others("nic0", &*device).is_err());
    }
}
