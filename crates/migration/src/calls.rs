//! Device calls as the engine makes them: the brain's states on one side, the uAPI's on the other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use switchover::handover::DeviceState as BrainState;
use switchover::handover::source::CallResult;
use switchover::message::{Failure, Side};
use vfio_migration::{DeviceError, DeviceState, MigratableDevice};

use crate::vmm::Vmm;

/// A device as its owning thread holds it.
pub(crate) struct OwnedDevice {
    pub(crate) id: String,
    pub(crate) side: Side,
    handle: Arc<Mutex<dyn MigratableDevice>>,
}

impl OwnedDevice {
    pub(crate) fn new(side: Side, device: &crate::Device) -> Self {
        Self { id: device.description.id.clone(), side, handle: Arc::clone(&device.handle) }
    }

    /// The device. A panic of an earlier owner says nothing about the device's own state.
    pub(crate) fn lock(&self) -> MutexGuard<'_, dyn MigratableDevice + 'static> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SET MIG_DEVICE_STATE, and where it failed, what became of the device.
    pub(crate) fn set_state(&self, target: BrainState) -> CallResult {
        let mut device = self.lock();
        match device.set_state(to_uapi(target)) {
            Ok(()) => CallResult::Done,
            Err(error) => {
                let state = device.state().ok().map(from_uapi);
                CallResult::Failed { state, failure: self.failure(&error) }
            }
        }
    }

    /// Resets the device and has PCI_COMMAND and vectors set again.
    pub(crate) fn reset(&self, vmm: &dyn Vmm) -> CallResult {
        let reset = self.lock().reset();
        if let Err(error) = reset {
            return CallResult::Failed { state: None, failure: self.failure(&error) };
        }
        match vmm.rearm_device(&self.id) {
            Ok(()) => CallResult::Done,
            Err(error) => {
                let failure = Failure::new(self.side, error.what).device(self.id.clone());
                CallResult::Failed { state: None, failure }
            }
        }
    }

    /// A device error in the words of a report.
    pub(crate) fn failure(&self, error: &DeviceError) -> Failure {
        let mut failure = Failure::new(self.side, error.to_string()).device(self.id.clone());
        failure.call = Some(error.call().to_owned());
        failure.errno = error.errno();
        if error.is_gone() {
            failure.remedy = Some("start the device's server again and the VM with it".into());
        }
        failure
    }
}

/// The uAPI's state of the brain's.
pub(crate) fn to_uapi(state: BrainState) -> DeviceState {
    match state {
        BrainState::Error => DeviceState::Error,
        BrainState::Stop => DeviceState::Stop,
        BrainState::Running => DeviceState::Running,
        BrainState::StopCopy => DeviceState::StopCopy,
        BrainState::Resuming => DeviceState::Resuming,
        BrainState::RunningP2p => DeviceState::RunningP2p,
        BrainState::PreCopy => DeviceState::PreCopy,
        BrainState::PreCopyP2p => DeviceState::PreCopyP2p,
    }
}

/// The brain's state of the uAPI's.
pub(crate) fn from_uapi(state: DeviceState) -> BrainState {
    match state {
        DeviceState::Error => BrainState::Error,
        DeviceState::Stop => BrainState::Stop,
        DeviceState::Running => BrainState::Running,
        DeviceState::StopCopy => BrainState::StopCopy,
        DeviceState::Resuming => BrainState::Resuming,
        DeviceState::RunningP2p => BrainState::RunningP2p,
        DeviceState::PreCopy => BrainState::PreCopy,
        DeviceState::PreCopyP2p => BrainState::PreCopyP2p,
    }
}
