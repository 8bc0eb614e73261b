//! VFIO devices of the Linux kernel.
//!
//! [`KernelDevice::open`] takes what a user wrote ([`DeviceSpec`]), finds the device in sysfs, and opens it by
//! character device and iommufd, or by group and type1 container. What comes out is the pair of traits that
//! every backend offers: `MigratableDevice` for the engine, `PciFunction` for the VMM.
//!
//! | module | holds |
//! |---|---|
//! | [`spec`] | how a device is named |
//! | [`sysfs`] | finding it |
//! | [`device`] | opening it: [`KernelDevice`] |
//! | [`hwpt`] | page tables with dirty tracking |
//! | [`space`] | IO address spaces: iommufd and type1, DMA map, the IOMMU's dirty tracking |
//! | `pci` | `PciFunction`: regions, interrupts, reset |
//! | [`migration`] | `MigratableDevice`: states, data fd, features |
//! | `logging` | the range rules of DMA logging |
//! | `chain` | capability chains of drivers, which are not trusted |
//! | [`watch`] | calls that take long are told of while they last |
//! | [`raw`] | the uAPI's calls as thin safe functions; all `unsafe` is there |
//!
//! # What has been seen
//!
//! The lab of this project runs this crate on a real kernel with mediated devices (the kernel's mtty and our
//! ferrydev), by cdev and by group, and the layer of iommufd's hardware page tables on the kernel's mock
//! IOMMU. No real IOMMU was seen: dirty tracking by AMD-Vi, VT-d or SMMUv3 hardware, and type1 of devices
//! behind one, are written after the uAPI and the kernel's source. What the mock showed is in [`hwpt`]: Linux
//! 7.2 leaves out the last page of a dirty entry that several pages share, which is made up for.
//!
//! # Who knows which pages a device wrote
//!
//! The device itself where it logs its DMA; else a page table of iommufd with dirty tracking; else, for a
//! mediated device in a type1 container, type1 (VFIO_IOMMU_DIRTY_PAGES), which sees what the driver wrote
//! or pinned. Of a device behind a real IOMMU type1 reports every page always; that is what the engine
//! assumes of a device without any log, so it is not offered as one. See [`DirtySource`].

mod chain;
pub mod device;
pub mod error;
pub mod hwpt;
mod logging;
pub mod migration;
mod pci;
pub mod raw;
pub mod space;
pub mod spec;
pub mod sysfs;
pub mod watch;

pub use device::{DirtySource, KernelDevice, Opened, Options};
pub use error::KernelError;
pub use migration::KernelMigration;
pub use space::{AddressSpaces, Translation};
pub use spec::{Access, DeviceName, DeviceSpec};
pub use sysfs::System;
pub use watch::InCall;

use vfio_migration::DeviceError;

/// A failed call of [`raw`] as the traits tell it.
fn device_error(call: &'static str, error: std::io::Error) -> DeviceError {
    match error.raw_os_error() {
        Some(errno) => DeviceError::Errno { call, errno },
        None => DeviceError::Io { call, source: error },
    }
}
