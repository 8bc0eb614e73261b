//! A VM that executes nothing: memory and devices for the engine to move.

use std::sync::{Arc, Mutex};

use migration::{
    Device, DeviceDescription, DirtyTracker, GuestEventSink, GuestMemory, MachineDescription,
    RegionLayout, Section, SectionVersion, Vmm, VmmError,
};
use vfio_migration::MigratableDevice;

/// The VM.
pub struct StillVm {
    memory: Arc<GuestMemory>,
    devices: Vec<Device>,
}

impl StillVm {
    /// With so much memory and these devices.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(
        memory_bytes: u64,
        devices: Vec<Arc<Mutex<dyn MigratableDevice>>>,
    ) -> anyhow::Result<Arc<Self>> {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, len: memory_bytes }])?);
        let device = |(place, handle): (usize, Arc<Mutex<dyn MigratableDevice>>)| {
            let capabilities = match handle.lock() {
                Ok(device) => device.capabilities(),
                Err(poisoned) => poisoned.into_inner().capabilities(),
            };
            Device {
                description: DeviceDescription {
                    id: format!("bulk{place}"),
                    backend: "bench".into(),
                    pci_ids: [1, 2, 3, 4],
                    class_revision: 0,
                    region_sizes: Vec::new(),
                    region_flags: Vec::new(),
                    irq_counts: Vec::new(),
                    migration_flags: capabilities.flags.as_raw(),
                    precopy_info: capabilities.precopy_info,
                    precopy_info_v2: capabilities.precopy_info_v2,
                    data_size: capabilities.data_size,
                    dma_logging: capabilities.dma_logging,
                    reset_runs: capabilities.reset_runs,
                },
                handle,
            }
        };
        let devices = devices.into_iter().enumerate().map(device).collect();
        Ok(Arc::new(Self { memory, devices }))
    }
}

impl Vmm for StillVm {
    fn description(&self) -> MachineDescription {
        MachineDescription {
            machine: "bench".into(),
            version: 1,
            vcpus: 1,
            memory: self.memory.layout(),
            cpuid: Vec::new(),
            xsave_bytes: 0,
            tsc_khz: None,
            tsc_scaling: false,
            sections: vec![SectionVersion {
                name: "still".into(),
                kind: "still".into(),
                version: 1,
            }],
        }
    }

    fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    fn devices(&self) -> Vec<Device> {
        self.devices.clone()
    }

    fn dirty_trackers(&self) -> Result<Vec<Box<dyn DirtyTracker>>, VmmError> {
        Ok(Vec::new())
    }

    fn pause(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn save_machine_state(&self) -> Result<Vec<Section>, VmmError> {
        let (name, kind) = ("still".into(), "still".into());
        Ok(vec![Section { name, kind, version: 1, payload: vec![0; 64] }])
    }

    fn load_machine_state(&self, _sections: &[Section]) -> Result<(), VmmError> {
        Ok(())
    }

    fn reattach(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn rearm_device(&self, _id: &str) -> Result<(), VmmError> {
        Ok(())
    }

    fn set_guest_event_sink(&self, _sink: Option<GuestEventSink>) {}

    fn discard_memory(&self) -> Result<(), VmmError> {
        Ok(())
    }
}
