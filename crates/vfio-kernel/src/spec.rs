//! How a device is named: [`DeviceSpec`].

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Which of the kernel's two ways to open a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Access {
    /// Character device and iommufd where the kernel has both, else group and container.
    #[default]
    Best,
    /// Character device and iommufd.
    Cdev,
    /// Group and container (type1).
    Group,
}

/// What a user writes to name a device; forms and meaning:
///
/// | written | names |
/// |---|---|
/// | `/dev/vfio/devices/vfio3` | its character device |
/// | `/dev/vfio/17` | the only device of that group, opened by group |
/// | `/sys/...` | its folder in sysfs |
/// | `0000:65:00.1`, `65:00.1` | its PCI address |
/// | `83b8f4f2-509f-382f-3c1e-e6bfe0fa1001` | the UUID of a mediated device |
///
/// `cdev:` or `group:` before any of them says how it has to be opened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceSpec {
    /// How it is to be opened.
    pub access: Access,
    /// Which device.
    pub name: DeviceName,
}

/// Which device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeviceName {
    /// `/dev/vfio/devices/vfioN`: N.
    Cdev(u32),
    /// `/dev/vfio/N`: N.
    Group(u32),
    /// A folder of sysfs.
    Sysfs(PathBuf),
    /// A PCI address with its domain, in lower case.
    Pci(String),
    /// The UUID of a mediated device, in lower case.
    Mdev(String),
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (access, rest) = if let Some(rest) = text.strip_prefix("group:") {
            (Access::Group, rest)
        } else if let Some(rest) = text.strip_prefix("cdev:") {
            (Access::Cdev, rest)
        } else {
            (Access::Best, text)
        };
        let name = parse_name(rest).ok_or_else(|| {
            format!(
                "{text:?} names no device; write /dev/vfio/devices/vfioN, a sysfs path, a PCI address \
                 (0000:65:00.1) or the UUID of a mediated device, with cdev: or group: before it to say \
                 how it is opened"
            )
        })?;
        match (&name, access) {
            (DeviceName::Group(_), Access::Cdev) => {
                Err(format!("{text:?}: a group is not opened by character device"))
            }
            (DeviceName::Group(_), _) => Ok(Self { access: Access::Group, name }),
            _ => Ok(Self { access, name }),
        }
    }
}

fn parse_name(text: &str) -> Option<DeviceName> {
    if let Some(rest) = text.strip_prefix("/dev/vfio/") {
        if let Some(number) = rest.strip_prefix("devices/vfio") {
            return decimal(number).map(DeviceName::Cdev);
        }
        return decimal(rest).map(DeviceName::Group);
    }
    if text.starts_with('/') {
        return Some(DeviceName::Sysfs(text.into()));
    }
    let text = text.to_ascii_lowercase();
    if is_uuid(&text) {
        return Some(DeviceName::Mdev(text));
    }
    pci_address(&text).map(DeviceName::Pci)
}

fn decimal(text: &str) -> Option<u32> {
    // `parse` alone would take a sign.
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_uuid(text: &str) -> bool {
    let mut parts = text.split('-');
    [8, 4, 4, 4, 12].iter().all(|&len| parts.next().is_some_and(|part| is_hex(part, len)))
        && parts.next().is_none()
}

/// `[domain:]bus:device.function`, given back with its domain.
fn pci_address(text: &str) -> Option<String> {
    let (front, function) = text.split_once('.')?;
    let is_function = matches!(function.as_bytes(), [b'0'..=b'7']);
    let (bus, device) = front.rsplit_once(':')?;
    let (domain, bus) = bus.rsplit_once(':').unwrap_or(("0000", bus));
    // Domains above ffff exist (VMD), with up to eight digits.
    let is_domain = (4..=8).any(|len| is_hex(domain, len));
    let is_device = is_hex(device, 2) && u8::from_str_radix(device, 16).is_ok_and(|n| n < 32);
    (is_domain && is_hex(bus, 2) && is_device && is_function)
        .then(|| format!("{domain}:{bus}:{device}.{function}"))
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.access {
            Access::Best => {}
            Access::Cdev => f.write_str("cdev:")?,
            // The path says it already.
            Access::Group if matches!(self.name, DeviceName::Group(_)) => {}
            Access::Group => f.write_str("group:")?,
        }
        match &self.name {
            DeviceName::Cdev(number) => write!(f, "/dev/vfio/devices/vfio{number}"),
            DeviceName::Group(number) => write!(f, "/dev/vfio/{number}"),
            DeviceName::Sysfs(path) => write!(f, "{}", path.display()),
            DeviceName::Pci(address) => f.write_str(address),
            DeviceName::Mdev(uuid) => f.write_str(uuid),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

    #[test]
    fn every_form_names_its_device() {
        let pci = |address: &str| DeviceName::Pci(address.into());
        let cases = [
            ("/dev/vfio/devices/vfio3", Access::Best, DeviceName::Cdev(3)),
            ("/dev/vfio/17", Access::Group, DeviceName::Group(17)),
            ("group:/dev/vfio/17", Access::Group, DeviceName::Group(17)),
            ("group:/dev/vfio/devices/vfio3", Access::Group, DeviceName::Cdev(3)),
            ("0000:65:00.1", Access::Best, pci("0000:65:00.1")),
            ("65:1F.7", Access::Best, pci("0000:65:1f.7")),
            ("cdev:10000:01:00.0", Access::Cdev, pci("10000:01:00.0")),
            (UUID, Access::Best, DeviceName::Mdev(UUID.into())),
            (&UUID.to_uppercase(), Access::Best, DeviceName::Mdev(UUID.into())),
            (
                "/sys/bus/pci/devices/x",
                Access::Best,
                DeviceName::Sysfs("/sys/bus/pci/devices/x".into()),
            ),
        ];
        for (text, access, name) in cases {
            assert_eq!(text.parse(), Ok(DeviceSpec { access, name }), "{text}");
        }
    }

    #[test]
    fn what_names_nothing_is_refused_with_the_forms() {
        let wrong = [
            "",
            "group:",
            "vfio3",
            "/dev/vfio/vfio",
            "/dev/vfio/devices/vfio",
            "/dev/vfio/+1",
            "/dev/vfio/devices/vfio99999999999",
            "cdev:/dev/vfio/17",
            "65:00",
            "65:20.0",
            "65:00.8",
            "000:65:00.0",
            "65:00.0.0",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
            "group:cdev:65:00.0",
        ];
        for text in wrong {
            let error = text.parse::<DeviceSpec>().unwrap_err();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_and_reads_back_as_itself(text in ".{0,60}") {
            if let Ok(spec) = text.parse::<DeviceSpec>() {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
    }
}
