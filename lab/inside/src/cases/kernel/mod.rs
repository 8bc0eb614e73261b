//! The crate `vfio-kernel` on the kernel itself: every way to open a device, states and data fd, interrupts, DMA
//! and who knows of it.

mod dirty;
mod function;
mod names;
mod states;

use std::sync::Arc;

use anyhow::Context;
use vfio_kernel::{Access, KernelDevice, Options};

use crate::case::{Case, Outcome};
use crate::lab::{Lab, Mdev, Parent};

/// The cases of this part.
pub fn cases() -> Vec<Case> {
    [names::cases(), states::cases(), function::cases(), dirty::cases()].concat()
}

/// Both ways to open a device.
const WAYS: [Access; 2] = [Access::Cdev, Access::Group];

/// Opens a device in one of the two ways.
fn open(device: &Mdev, access: Access) -> anyhow::Result<KernelDevice> {
    let options = Options { access, ..Options::default() };
    KernelDevice::open(device.uuid(), options).with_context(|| format!("open by {access:?}"))
}

/// Runs `case` on a new device of `parent`, once for each way to open it.
fn each_way(
    lab: &Lab,
    parent: Parent,
    case: impl Fn(&Mdev, KernelDevice) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    if !lab.has(parent) {
        return Ok(Outcome::Skipped(format!("there is no {}", parent.name())));
    }
    for access in WAYS {
        let device = lab.create(parent)?;
        let opened = open(&device, access)?;
        case(&device, opened).with_context(|| format!("opened by {access:?}"))?;
    }
    Ok(Outcome::Passed)
}

/// Guest memory of one region at IOVA 0.
fn memory(len: u64) -> anyhow::Result<Arc<migration::GuestMemory>> {
    let layout = [migration::RegionLayout { gpa: 0, len }];
    Ok(Arc::new(migration::GuestMemory::new(&layout)?))
}
