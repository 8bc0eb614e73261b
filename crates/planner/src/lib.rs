//! What-if for live migrations: will it fit, with what certainty, what dominates, what would help?
//!
//! The brain that ships (`switchover`, both sides, through the same `handle`) runs against modelled guests,
//! devices and links in virtual time: thousands of migrations a second, each from a seed that repeats it.
//!
//! ```
//! use planner::{Device, Scenario, run};
//!
//! let profile = device_profile::Profile::builtin("virtio-vf").unwrap();
//! let scenario = Scenario::new(vec![Device::new("nic0", profile)]);
//! let result = run(&scenario, 1, Default::default()).unwrap();
//! assert!(result.downtime.unwrap() <= scenario.limit);
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`scenario`] | what is asked |
//! | [`run`](mod@run) | one simulated migration |
//! | [`plan`](mod@plan) | many of them: quantiles, reasons |
//! | [`fit`] | a question made of the trace of a real migration |
//! | [`picture`] | a plan as SVG |
//! | `world` | guests, devices, links and hosts, modelled |
//! | [`random`] | seeds |

pub mod fit;
pub mod picture;
pub mod plan;
pub mod random;
pub mod run;
pub mod scenario;
mod world;

pub use plan::{Options, Plan, plan};
pub use random::Random;
pub use run::{Ended, RunResult, run, run_traced};
pub use scenario::{Burst, Device, Faults, Memory, Scenario};
