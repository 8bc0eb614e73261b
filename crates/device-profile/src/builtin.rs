//! The profiles that come along, as TOML files compiled in.

use crate::{Profile, ProfileError};

const BUILTIN: [(&str, &str); 3] = [
    ("mlx5-vf", include_str!("../profiles/mlx5-vf.toml")),
    ("virtio-vf", include_str!("../profiles/virtio-vf.toml")),
    ("qat", include_str!("../profiles/qat.toml")),
];

/// The names [`Profile::builtin`] knows.
pub const BUILTIN_NAMES: [&str; BUILTIN.len()] = [BUILTIN[0].0, BUILTIN[1].0, BUILTIN[2].0];

impl Profile {
    /// The profile `name` of those that come along.
    pub fn builtin(name: &str) -> Result<Self, ProfileError> {
        match BUILTIN.iter().find(|(builtin, _)| *builtin == name) {
            Some((_, text)) => Self::from_toml(text),
            None => Err(ProfileError::UnknownName { name: name.into() }),
        }
    }
}
