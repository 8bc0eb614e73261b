//! What to do after a failed transition.
//!
//! After a failed SET the device is in the original state or any state on the path (F10), and a held
//! fd is dead (X10). The order of remedies: a named recovery state, then a reset. What a reset costs
//! (the guest's device state, PCI_COMMAND, interrupts) is told by the outcome.

use crate::device::MigratableDevice;
use crate::error::DeviceError;
use crate::state::DeviceState;

/// Where a device ended after [`recover`].
#[derive(Debug)]
pub enum Recovery {
    /// The recovery state was reached: nothing of the device's own state is lost.
    Recovered,
    /// Only a reset helped: the device runs with its power-on state. The caller restores PCI_COMMAND
    /// and interrupts (H6) and reports the loss.
    Reset {
        /// Why the recovery state could not be reached.
        cause: DeviceError,
    },
    /// Not even a reset helped: the device is lost.
    Lost {
        /// Why the reset failed.
        cause: DeviceError,
    },
}

/// Brings `device` to `state` after a failed transition, over a reset if need be.
///
/// `state` is usually RUNNING on the source and, on the destination, the state to load anew from.
pub fn recover(device: &mut dyn MigratableDevice, state: DeviceState) -> Recovery {
    let cause = match device.set_state(state) {
        Ok(()) => return Recovery::Recovered,
        Err(cause) => cause,
    };
    if let Err(cause) = device.reset() {
        return Recovery::Lost { cause };
    }
    match device.state() {
        Ok(now) if now == state => Recovery::Reset { cause },
        Ok(_) => match device.set_state(state) {
            Ok(()) => Recovery::Reset { cause },
            Err(cause) => Recovery::Lost { cause },
        },
        Err(cause) => Recovery::Lost { cause },
    }
}
