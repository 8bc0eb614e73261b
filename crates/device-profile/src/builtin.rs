//! The profiles that come along, as TOML files compiled in.

use crate::{Profile, ProfileError};

macro_rules! profiles {
    ($names:ident, $texts:ident, $doc:literal, $($name:literal),* $(,)?) => {
        #[doc = $doc]
        pub const $names: &[&str] = &[$($name),*];
        const $texts: &[&str] = &[$(include_str!(concat!("../profiles/", $name, ".toml"))),*];
    };
}

profiles!(
    BUILTIN_NAMES,
    BUILTIN,
    "Kinds of devices that exist or are announced.",
    "mlx5-vf",
    "mlx5-vf-cx7-heavy",
    "mlx5-vdpa-16vq",
    "virtio-vf",
    "qat",
    "hisi-acc",
    "pds",
    "nvme-vf",
    "xe-vf",
    "vgpu-legacy",
    "vgpu-precopy",
);

profiles!(
    ADVERSARIAL_NAMES,
    ADVERSARIAL,
    "Devices that do what a migration engine must survive.",
    "liar-under",
    "grow-after-stop",
    "reinit-storm",
    "reinit-after-decision",
    "slow-read",
    "slow-load",
    "enomsg-forever",
    "stuck-stop",
    "size-garbage",
);

impl Profile {
    /// The profile `name` of those that come along.
    pub fn builtin(name: &str) -> Result<Self, ProfileError> {
        let known = BUILTIN_NAMES.iter().zip(BUILTIN);
        match known.chain(ADVERSARIAL_NAMES.iter().zip(ADVERSARIAL)).find(|(n, _)| **n == name) {
            Some((_, text)) => Self::from_toml(text),
            None => Err(ProfileError::UnknownName { name: name.into() }),
        }
    }
}
