//! Device profiles: what a kind of device costs to migrate.
//!
//! A profile is data: sizes, rates, times and habits of one kind of device, each value with its
//! provenance (`sourced` with the source, or `assumed`) so that nobody takes a guess for a
//! measurement. Software devices behave by it, simulators draw from it, and the engine takes its
//! first estimates from it.
//!
//! ```
//! let profile = device_profile::Profile::builtin("mlx5-vf").unwrap();
//! assert_eq!(profile.sizes.total_bytes.typical, 300_000_000);
//! let small = profile.scaled_to(4 << 20);
//! assert_eq!(small.sizes.total_bytes.typical, 4 << 20);
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`profile`] | [`Profile`] and its parts, parsing and checks |
//! | [`value`] | [`Fact`] and [`Quantity`]: values with provenance |
//! | [`builtin`] | the profiles that come along |

pub mod builtin;
pub mod error;
pub mod profile;
pub mod value;

pub use builtin::{ADVERSARIAL_NAMES, BUILTIN_NAMES};
pub use error::ProfileError;
pub use profile::{DirtyModel, Features, Precopy, Profile, Rates, ReinitPolicy, Sizes, Times};
pub use value::{Fact, Provenance, Quantity};
