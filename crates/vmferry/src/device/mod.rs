//! `vmferry device …`.
//!
//! | module | holds |
//! |---|---|
//! | `serve` | a software device as its own process |
//! | `open` | a device of either backend, for the rest |
//! | `info` | what a device is and can do |
//! | `state_file` | the format of a saved state |
//! | `transfer` | `save` and `load` |
//! | `apart` | work that a driver may not hold up |
//! | `check` | the conformance check, for people and CI |

mod apart;
mod check;
mod info;
mod open;
mod serve;
mod state_file;
mod transfer;

pub use check::check_apart;
pub use info::info;
pub use serve::{profile, serve};
pub use transfer::{load, save};
