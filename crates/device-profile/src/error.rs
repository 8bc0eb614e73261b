//! Why a profile was refused.

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// No profile of that name comes along.
    #[error("no device profile is named {name:?}; there are {}", crate::BUILTIN_NAMES.join(", "))]
    UnknownName {
        /// The name asked for.
        name: String,
    },
    /// Not TOML, a value of the wrong type, or one missing or unknown; the text names line and key.
    #[error("the device profile does not parse: {0}")]
    Syntax(#[from] toml::de::Error),
    /// A value that cannot be.
    #[error("device profile {profile:?}: {key} {problem}")]
    Invalid {
        /// The profile's name.
        profile: String,
        /// The key, as a dotted path.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The text is longer than any profile.
    #[error("the device profile has {len} bytes, more than the {max} allowed")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
}
