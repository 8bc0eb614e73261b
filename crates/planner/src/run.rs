//! One simulated migration.

use switchover::Time;
use switchover::estimate::{Estimate, History};
use switchover::source::Overrun;
use switchover::trace::Trace;

use crate::scenario::Scenario;
use crate::world::World;

/// How it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ended {
    /// The guest runs at the destination.
    Completed,
    /// It was refused before it began.
    Refused,
    /// The guest stayed, for the reason given.
    Stayed,
    /// Commit was sent and never answered.
    InDoubt,
    /// It went on until nobody waited any more.
    #[default]
    Endless,
}

/// What a simulated migration showed.
#[derive(Clone, Debug, Default)]
pub struct RunResult {
    /// Its seed.
    pub seed: u64,
    /// How it ended.
    pub ended: Ended,
    /// Why it did not complete.
    pub reason: Option<String>,
    /// Best effort: why the limit was out of reach at the level of the promise, and went all the same.
    pub out_of_reach: Option<String>,
    /// From the request to pause to the arrival of Running.
    pub downtime: Option<Time>,
    /// Blackouts that ended on the source.
    pub blackouts: Vec<Time>,
    /// What the last switchover was expected to take when it began, and its upper quantile.
    pub expected: Option<(Time, Time)>,
    /// The terms of that, each as expected.
    pub terms: Vec<(&'static str, Time)>,
    /// From the first connection to the end.
    pub total: Time,
    /// Switchovers tried.
    pub attempts: u64,
    /// Switchovers taken back.
    pub revocations: u32,
    /// Those of them that were rolled back.
    pub roll_backs: u32,
    /// Switchovers that took new initial data along.
    pub absorptions: u32,
    /// The most by which the guest was slowed down, in percent.
    pub throttle_percent: u8,
    /// Calls that broke the bound the brain was given.
    pub overruns: Vec<Overrun>,
    /// What the next migration may learn from it.
    pub history: Option<History>,
    /// Events that were simulated.
    pub events: u64,
    /// An invariant that did not hold.
    pub broken: Option<String>,
}

impl RunResult {
    pub(crate) fn tried(&mut self, estimate: &Estimate) {
        self.expected = Some((estimate.known, estimate.known_upper));
        self.terms = estimate.terms.iter().filter_map(|t| Some((t.name, t.time?))).collect();
    }

    /// The longest time the guest stood still at once.
    pub fn worst_blackout(&self) -> Option<Time> {
        self.blackouts.iter().copied().chain(self.downtime).max()
    }

    /// Whether every blackout was within `limit`; a guest in doubt has stood still for too long.
    pub fn kept(&self, limit: Time) -> bool {
        self.ended != Ended::InDoubt && self.worst_blackout().is_none_or(|worst| worst <= limit)
    }
}

/// As [`run`], with a trace of the migration as the source's host would have recorded it.
///
/// # Errors
/// As [`run`].
pub fn run_traced(
    scenario: &Scenario,
    seed: u64,
    history: History,
) -> Result<(RunResult, Trace), device_model::ModelError> {
    Ok(World::new(scenario, seed, history)?.run_traced())
}

/// Simulates one migration. The same scenario, seed and history give the same result.
///
/// # Errors
/// A profile with deviations that the device model does not know.
pub fn run(
    scenario: &Scenario,
    seed: u64,
    history: History,
) -> Result<RunResult, device_model::ModelError> {
    Ok(World::new(scenario, seed, history)?.run())
}
