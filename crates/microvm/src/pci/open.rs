//! Opening a device: its server found, memory mapped, described for the other host.

use std::sync::{Arc, Mutex, OnceLock};

use migration::{Device, DeviceDescription, GuestMemory};
use vfio_migration::pci::REGION_CONFIG;
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, IrqIndex, MigratableDevice, PciFunction,
};
use vfio_user::{Options, VfioUserDevice};

use crate::config::DeviceConfig;
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
}

impl std::fmt::Debug for OpenDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OpenDevice").field(&self.device.description.id).finish()
    }
}

/// Opens the device that `config` names and maps `memory` for it.
pub fn open(config: &DeviceConfig, memory: &Arc<GuestMemory>) -> Result<OpenDevice> {
    let id = &config.id;
    let refused = |what: String| {
        Error::Config(format!("device {id} (vfio-user:{}): {what}", config.path.display()))
    };
    let loss = Loss::default();
    let options = Options {
        dma_access: Some(Arc::new(GuestDma::new(Arc::clone(memory)))),
        on_loss: Some(on_loss(id.clone(), Arc::clone(&loss))),
        ..Options::default()
    };
    let opened = VfioUserDevice::open(&config.path, options).map_err(|error| {
        refused(format!("{error}; start its server (vmferry device serve), or correct the path"))
    })?;
    let function = opened.pci();
    reset_after_others(id, &*function)
        .map_err(|error| refused(format!("it cannot be reset: {error}; restart its server")))?;
    let migration = opened.migration().map_err(|error| {
        refused(format!("it cannot be migrated: {error}; use a server that offers migration"))
    })?;
    map_memory(&*function, memory).map_err(|error| {
        refused(format!("guest memory cannot be mapped for it: {error}; restart its server"))
    })?;
    let description = describe(id, "vfio-user", &*function, migration.capabilities())
        .map_err(|error| refused(error.to_string()))?;
    let fence = Arc::new(ResetFence::default());
    let handle = Arc::new(Mutex::new(Fenced::new(migration, Arc::clone(&fence))));
    Ok(OpenDevice { device: Device { description, handle }, function, loss, fence })
}

/// A server keeps its device from one client to the next: what an earlier VMM left behind is no concern of
/// this guest. A device that can be reset in some states only (libvfio-user, while it is stopped) is taken as
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
    fn a_missing_server_is_named_with_its_socket_and_the_remedy() {
        let layout = [RegionLayout { gpa: 0, len: 4096 }];
        let memory = Arc::new(GuestMemory::new(&layout).unwrap());
        let config = DeviceConfig { id: "nic0".into(), path: "/nonexistent/nic.sock".into() };
        let error = open(&config, &memory).unwrap_err().to_string();
        for part in ["nic0", "/nonexistent/nic.sock", "vmferry device serve"] {
            assert!(error.contains(part), "{error}");
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
