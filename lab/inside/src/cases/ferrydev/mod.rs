//! The test driver by itself, through the kernel's bare calls: what the other cases build on.
//!
//! | module | holds |
//! |---|---|
//! | `rig` | an open device and its streams |
//! | `states` | the state machine, reset, what outlives what |
//! | `streams` | saving, REINIT, loading |
//! | `function` | registers, DMA, DMA logging, interrupts |
//! | `quirks` | each deviation shows, and none upsets the kernel |

mod function;
mod quirks;
mod rig;
mod states;
mod streams;

use crate::case::{Case, Outcome};
use crate::lab::{Lab, Parent};

/// The cases of this part.
pub fn cases() -> Vec<Case> {
    [states::cases(), streams::cases(), function::cases(), quirks::cases()].concat()
}

/// Passed, or skipped where the driver was not built.
fn with_ferrydev(lab: &Lab, run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Outcome> {
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("there is no ferrydev".into()));
    }
    run().map(|()| Outcome::Passed)
}
