//! Every name of a device leads to it, and what cannot be opened says why.

use anyhow::{Context, ensure};
use vfio_kernel::{Access, AddressSpaces, KernelDevice, Options, Translation};

use super::{WAYS, open};
use crate::case::{Case, Outcome};
use crate::lab::{Lab, Parent};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("kernel-every-name-opens-the-device", every_name),
        Case::new("kernel-a-device-in-use-is-refused-with-the-reason", in_use),
        Case::new("kernel-devices-share-an-address-space", shared),
    ]
}

fn every_name(lab: &Lab) -> anyhow::Result<Outcome> {
    let device = lab.create(Parent::Mtty)?;
    let text = |path: std::path::PathBuf| path.display().to_string();
    let (cdev, group) = (text(device.cdev()?), text(device.group()?));
    let (uuid, sysfs) = (device.uuid(), text(device.sysfs()));
    let names = [
        (cdev.clone(), Access::Cdev),
        (group.clone(), Access::Group),
        (uuid.to_owned(), Access::Cdev),
        (sysfs.clone(), Access::Cdev),
        (format!("cdev:{uuid}"), Access::Cdev),
        (format!("group:{uuid}"), Access::Group),
        (format!("group:{cdev}"), Access::Group),
        (format!("group:{sysfs}"), Access::Group),
    ];
    for (name, access) in names {
        let opened = KernelDevice::open(&name, Options::default())?;
        let how = opened.opened();
        let (node, translation) = match access {
            Access::Group => (&group, Translation::Type1),
            _ => (&cdev, Translation::Ioas),
        };
        ensure!(how.access == access, "{name} was opened by {how}");
        ensure!(how.node.as_os_str() == node.as_str(), "{name} was opened by {how}");
        ensure!(how.translation == translation && how.mediated, "{name} was opened by {how}");
        ensure!(opened.name() == uuid, "{name} is {}", opened.name());
        ensure!(how.driver.as_deref() == Some("mtty"), "{name} was opened by {how}");
        let info = opened.info()?;
        ensure!(info.num_regions == 9, "{name} has {} regions", info.num_regions);
    }
    Ok(Outcome::Passed)
}

fn in_use(lab: &Lab) -> anyhow::Result<Outcome> {
    let device = lab.create(Parent::Mtty)?;
    for held in WAYS {
        let first = open(&device, held)?;
        for access in WAYS {
            let error = open(&device, access).err().context("it was opened twice")?;
            let error = format!("{error:#}");
            ensure!(error.contains(device.uuid()) && error.contains("open"), "{error}");
        }
        drop(first);
        open(&device, held)?;
    }
    Ok(Outcome::Passed)
}

fn shared(lab: &Lab) -> anyhow::Result<Outcome> {
    let memory = super::memory(1 << 20)?;
    for access in WAYS {
        let devices = [lab.create(Parent::Mtty)?, lab.create(Parent::Mtty)?];
        let spaces = Some(AddressSpaces::new());
        let open = |name: &str| {
            let options = Options { access, spaces: spaces.clone(), ..Options::default() };
            KernelDevice::open(name, options)
        };
        let first = open(devices[0].uuid())?;
        let second = open(devices[1].uuid())?;
        // The same memory for both, and again after one of them is gone.
        for device in [&first, &second] {
            microvm::pci::map_memory(&*device.pci()?, &memory)?;
        }
        drop(first);
        let again = open(devices[0].uuid())?;
        microvm::pci::map_memory(&*again.pci()?, &memory)?;
        let twice = microvm::pci::map_memory(&*again.pci()?, &memory);
        ensure!(twice.is_err(), "one device mapped the same twice");
        let other = super::memory(1 << 20)?;
        second.pci()?.dma_unmap(0, 1 << 20)?;
        let clash = microvm::pci::map_memory(&*second.pci()?, &other);
        ensure!(clash.is_err(), "two things are mapped at one address");
    }
    Ok(Outcome::Passed)
}
