//! Finding a device: what sysfs and `/dev/vfio` say about it.
//!
//! ```text
//!   <device>/driver            -> the driver it is bound to
//!   <device>/vfio-dev/vfioN       its character device is /dev/vfio/devices/vfioN
//!   <device>/iommu_group       -> /sys/kernel/iommu_groups/N, its group is /dev/vfio/N
//! ```

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::KernelError;
use crate::spec::{DeviceName, DeviceSpec};

/// Where the kernel's trees are mounted. Anything else than the default is for tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
}

impl Default for System {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into() }
    }
}

/// A device as the system shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The kernel's name for it: PCI address or UUID. GROUP_GET_DEVICE_FD takes it.
    pub name: String,
    /// Its folder.
    pub sysfs: PathBuf,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// Its character device, where there is one.
    pub cdev: Option<PathBuf>,
    /// The number of its IOMMU group.
    pub group: Option<u32>,
    /// A mediated device: its DMA is made by a driver of the kernel and not by hardware behind an IOMMU.
    pub mediated: bool,
}

/// Nobody has more devices in one group than this many that would be listed.
const LISTED_MAX: usize = 64;

impl System {
    /// Finds the device that `spec` names.
    pub fn find(&self, spec: &DeviceSpec) -> Result<Found, KernelError> {
        let (path, remedy) = match &spec.name {
            DeviceName::Cdev(number) => (
                self.sys.join(format!("class/vfio-dev/vfio{number}/device")),
                "no device is bound to a VFIO driver under this number; ls -l /sys/class/vfio-dev",
            ),
            DeviceName::Group(number) => (
                self.only_device_of(*number, spec)?,
                "the group lost its device; ls /sys/kernel/iommu_groups",
            ),
            DeviceName::Sysfs(path) => (path.clone(), "correct the path"),
            DeviceName::Pci(address) => (
                self.sys.join("bus/pci/devices").join(address),
                "this host has no such PCI device; lspci -D lists them",
            ),
            DeviceName::Mdev(uuid) => (
                self.sys.join("bus/mdev/devices").join(uuid),
                "create it first: echo UUID > /sys/class/mdev_bus/PARENT/mdev_supported_types/TYPE/create",
            ),
        };
        let not_found = |source| KernelError::NotFound {
            spec: spec.to_string(),
            path: path.clone(),
            source,
            remedy,
        };
        let sysfs = fs::canonicalize(&path).map_err(not_found)?;
        self.describe(spec, sysfs)
    }

    fn describe(&self, spec: &DeviceSpec, sysfs: PathBuf) -> Result<Found, KernelError> {
        let name = sysfs.file_name().and_then(OsStr::to_str).unwrap_or_default().to_owned();
        let unfit = |why: &str| KernelError::Spec { spec: spec.to_string(), why: why.into() };
        if name.is_empty() {
            return Err(unfit("this is no device's folder"));
        }
        let subsystem = link_name(&sysfs.join("subsystem"));
        let driver = link_name(&sysfs.join("driver"));
        let vfio_dev = sysfs.join("vfio-dev");
        let cdev = entries(&vfio_dev)
            .into_iter()
            .find(|entry| entry.strip_prefix("vfio").is_some_and(|n| n.parse::<u32>().is_ok()))
            .map(|entry| self.dev.join("vfio/devices").join(entry))
            .filter(|path| path.exists());
        let group = link_name(&sysfs.join("iommu_group")).and_then(|name| name.parse().ok());
        // A folder without any of these is not a device that VFIO could open, whoever drives it.
        if driver.is_none() && group.is_none() && cdev.is_none() && subsystem.is_none() {
            return Err(unfit("this is no device's folder"));
        }
        let mediated = subsystem.as_deref() == Some("mdev");
        let is_vfio = vfio_dev.is_dir();
        let found = Found { name, sysfs, driver, cdev, group, mediated };
        // The folder is there since Linux 6.1; before, the group says by its existence who drives the device.
        let has_group_node = found.group.is_some_and(|group| self.group_path(group).exists());
        if !is_vfio && !has_group_node {
            return Err(KernelError::NotVfio {
                device: found.name,
                driver: found.driver.unwrap_or_else(|| "none".into()),
            });
        }
        Ok(found)
    }

    fn only_device_of(&self, group: u32, spec: &DeviceSpec) -> Result<PathBuf, KernelError> {
        let folder = self.sys.join(format!("kernel/iommu_groups/{group}/devices"));
        let devices = entries(&folder);
        match devices.as_slice() {
            [device] => Ok(folder.join(device)),
            [] => Err(KernelError::Spec {
                spec: spec.to_string(),
                why: "there is no such group, or it is empty; ls /sys/kernel/iommu_groups".into(),
            }),
            several => Err(KernelError::Spec {
                spec: spec.to_string(),
                why: format!("the group has several devices, name one: {}", several.join(", ")),
            }),
        }
    }

    /// The node of a group.
    pub fn group_path(&self, group: u32) -> PathBuf {
        self.dev.join(format!("vfio/{group}"))
    }

    /// The devices of a group with the driver of each, as far as it has one.
    pub fn group_members(&self, group: u32) -> Vec<String> {
        let folder = self.sys.join(format!("kernel/iommu_groups/{group}/devices"));
        let named = entries(&folder).into_iter().map(|device| {
            let driver = link_name(&folder.join(&device).join("driver"));
            format!("{device} ({})", driver.as_deref().unwrap_or("no driver"))
        });
        named.collect()
    }
}

/// The last part of where a link leads.
fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// The names in a folder, sorted; none where it cannot be read.
fn entries(folder: &Path) -> Vec<String> {
    let Ok(read) = fs::read_dir(folder) else { return Vec::new() };
    let names = read.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.take(LISTED_MAX).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

    /// A PCI device on vfio-pci, one on another driver, and a mediated device.
    struct Host {
        _root: tempfile::TempDir,
        system: System,
    }

    impl Host {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let at = |path: &str| root.path().join(path);
            let folder = |path: &str| fs::create_dir_all(at(path)).unwrap();
            let link = |from: &str, to: &str| {
                fs::create_dir_all(at(from).parent().unwrap()).unwrap();
                symlink(at(to), at(from)).unwrap();
            };
            for node in
                ["dev/vfio/devices/vfio3", "dev/vfio/devices/vfio0", "dev/vfio/17", "dev/vfio/20"]
            {
                folder(node);
            }
            let device = |path: &str,
                          bus: &str,
                          driver: Option<&str>,
                          group: u32,
                          vfio: Option<&str>| {
                let name = path.rsplit('/').next().unwrap();
                folder(path);
                folder(&format!("sys/bus/{bus}"));
                link(&format!("{path}/subsystem"), &format!("sys/bus/{bus}"));
                link(&format!("sys/bus/{bus}/devices/{name}"), path);
                folder(&format!("sys/kernel/iommu_groups/{group}/devices"));
                link(&format!("{path}/iommu_group"), &format!("sys/kernel/iommu_groups/{group}"));
                link(&format!("sys/kernel/iommu_groups/{group}/devices/{name}"), path);
                if let Some(driver) = driver {
                    folder(&format!("sys/bus/{bus}/drivers/{driver}"));
                    link(&format!("{path}/driver"), &format!("sys/bus/{bus}/drivers/{driver}"));
                }
                if let Some(vfio) = vfio {
                    folder(&format!("{path}/vfio-dev/{vfio}"));
                    link(&format!("{path}/vfio-dev/{vfio}/device"), path);
                    link(&format!("sys/class/vfio-dev/{vfio}"), &format!("{path}/vfio-dev/{vfio}"));
                }
            };
            let bus = "sys/devices/pci0000:64/0000:64:00.0";
            device(&format!("{bus}/0000:65:00.1"), "pci", Some("mlx5_vfio_pci"), 17, Some("vfio3"));
            device(&format!("{bus}/0000:65:00.2"), "pci", Some("mlx5_core"), 18, None);
            device(&format!("{bus}/0000:65:00.3"), "pci", None, 18, None);
            device(
                &format!("sys/devices/virtual/mtty/mtty/{UUID}"),
                "mdev",
                Some("vfio_mtty"),
                20,
                Some("vfio0"),
            );
            let system = System { sys: at("sys"), dev: at("dev") };
            Self { _root: root, system }
        }

        fn find(&self, spec: &str) -> Result<Found, KernelError> {
            self.system.find(&spec.parse().unwrap())
        }
    }

    #[test]
    fn every_name_leads_to_the_same_device() {
        let host = Host::new();
        let sysfs = host.system.sys.join("bus/pci/devices/0000:65:00.1");
        let found = host.find("65:00.1").unwrap();
        for spec in ["/dev/vfio/devices/vfio3", "/dev/vfio/17", sysfs.to_str().unwrap()] {
            assert_eq!(host.find(spec).unwrap(), found, "{spec}");
        }
        assert_eq!(found.name, "0000:65:00.1");
        assert_eq!(found.driver.as_deref(), Some("mlx5_vfio_pci"));
        assert_eq!(found.cdev, Some(host.system.dev.join("vfio/devices/vfio3")));
        assert_eq!((found.group, found.mediated), (Some(17), false));
        let mdev = host.find(UUID).unwrap();
        assert_eq!((mdev.name.as_str(), mdev.group, mdev.mediated), (UUID, Some(20), true));
        assert_eq!(host.find("/dev/vfio/devices/vfio0").unwrap(), mdev);
    }

    #[test]
    fn a_kernel_without_character_devices_leaves_the_group() {
        let host = Host::new();
        fs::remove_dir(host.system.dev.join("vfio/devices/vfio3")).unwrap();
        let found = host.find("65:00.1").unwrap();
        assert_eq!((found.cdev, found.group), (None, Some(17)));
    }

    #[test]
    fn what_cannot_be_opened_is_named_with_the_remedy() {
        let host = Host::new();
        let cases = [
            ("65:00.2", &["0000:65:00.2", "mlx5_core", "vfio-pci"][..]),
            ("65:00.3", &["0000:65:00.3", "none", "vfio-pci"]),
            ("0000:01:00.0", &["0000:01:00.0", "lspci"]),
            ("/dev/vfio/devices/vfio9", &["vfio9", "vfio-dev"]),
            ("/dev/vfio/99", &["/dev/vfio/99", "no such group"]),
            ("/dev/vfio/18", &["0000:65:00.2", "0000:65:00.3", "name one"]),
            ("83b8f4f2-509f-382f-3c1e-e6bfe0fa1002", &["1002", "create"]),
            ("/nonexistent/device", &["/nonexistent/device"]),
            ("/", &["no device's folder"]),
        ];
        for (spec, parts) in cases {
            let error = host.find(spec).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{spec}: {error}");
            }
        }
        let members = host.system.group_members(18);
        assert_eq!(members, ["0000:65:00.2 (mlx5_core)", "0000:65:00.3 (no driver)"]);
    }
}
