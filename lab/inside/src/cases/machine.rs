//! What the other cases build upon: the kernel has everything that its configuration promises.

use std::path::Path;

use anyhow::{Context, ensure};

use crate::case::{Case, Outcome};
use crate::lab::{Lab, Parent};

/// The cases of this part.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("machine-has-its-kernel-interfaces", interfaces),
        Case::new("machine-mtty-makes-a-vfio-device", mtty),
        Case::new("machine-ferrydev-makes-a-vfio-device", ferrydev),
        Case::new("machine-takes-a-device-away-and-makes-it-again", again),
    ]
}

fn interfaces(_lab: &Lab) -> anyhow::Result<Outcome> {
    for path in [
        "/dev/kvm",
        "/dev/iommu",
        "/dev/vfio/vfio",
        "/sys/kernel/debug",
        "/sys/class/mdev_bus/mtty",
        "/proc/self/pagemap",
    ] {
        ensure!(Path::new(path).exists(), "there is no {path}");
    }
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("/dev/kvm cannot be opened")?;
    Ok(Outcome::Passed)
}

fn mtty(lab: &Lab) -> anyhow::Result<Outcome> {
    makes_a_device(lab, Parent::Mtty)
}

fn ferrydev(lab: &Lab) -> anyhow::Result<Outcome> {
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("ferrydev.ko is not in the initramfs".into()));
    }
    makes_a_device(lab, Parent::Ferrydev)
}

fn makes_a_device(lab: &Lab, parent: Parent) -> anyhow::Result<Outcome> {
    let device = lab.create(parent)?;
    for path in [device.cdev()?, device.group()?] {
        ensure!(path.exists(), "there is no {}", path.display());
    }
    Ok(Outcome::Passed)
}

fn again(lab: &Lab) -> anyhow::Result<Outcome> {
    for _ in 0..3 {
        let one = lab.create(Parent::Mtty)?;
        let other = lab.create(Parent::Mtty)?;
        ensure!(one.cdev()? != other.cdev()?, "two devices share {}", one.cdev()?.display());
        let gone = one.cdev()?;
        drop(one);
        ensure!(!gone.exists(), "{} outlives its device", gone.display());
    }
    Ok(Outcome::Passed)
}
