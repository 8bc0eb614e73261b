//! Why a device could not be made.

/// A failure outside of any device call; those fail with
/// [`DeviceError`](vfio_migration::DeviceError).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The profile has more state than the model keeps.
    #[error(
        "profile {profile:?} has {what} of {bytes} bytes, more than the {max_bytes} a software device keeps"
    )]
    TooLarge {
        /// The profile's name.
        profile: String,
        /// Which part.
        what: &'static str,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        max_bytes: u64,
    },
    /// No quirk of that name.
    #[error("no quirk is named {name:?}; there are {known}")]
    UnknownQuirk {
        /// The name asked for.
        name: String,
        /// All names.
        known: String,
    },
    /// A quirk's argument is missing or does not parse.
    #[error("quirk {name:?}: {problem}")]
    QuirkArgument {
        /// The quirk as given.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The system refused a thread or a file.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The profile cannot be used.
    #[error(transparent)]
    Profile(#[from] device_profile::ProfileError),
    /// The device cannot be served.
    #[cfg(feature = "serve")]
    #[error(transparent)]
    Serve(#[from] vfio_user::VfioUserError),
}
