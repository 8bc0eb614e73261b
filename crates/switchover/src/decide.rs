//! The decision: estimate, budget and counters in, verdict out. A pure function.

use crate::estimate::Estimate;
use crate::handover::source::{Point, Verdict};
use crate::time::Time;

/// How hard the limit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Keep the limit if it can be kept, complete anyway.
    #[default]
    BestEffort,
}

/// What the guest may stand still, and has stood so far in this attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// The downtime limit.
    pub limit: Time,
    /// Time since the request to pause.
    pub elapsed: Time,
}

/// Bounds on switchovers that are taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RevocationLimits {
    /// How many.
    pub count: u32,
    /// How much standing still in all.
    pub pause: Time,
}

/// What the estimate does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Facts {
    /// Some device has unread initial data, or a session that is not acknowledged.
    pub unread_initial: bool,
    /// Revocations so far.
    pub revocations: u32,
    /// Time the guest stood still in them.
    pub revoked_pause: Time,
}

/// Whether the estimate fits into what is left of the limit. Unknown parts count as nothing in
/// best-effort mode; the report says that they are unknown.
pub fn fits(estimate: &Estimate, budget: Budget) -> bool {
    budget.elapsed + estimate.known_upper <= budget.limit
}

/// The verdict at `point`.
///
/// | | fits | does not fit |
/// |---|---|---|
/// | no unread initial data | go | revoke; go once revocations are used up |
/// | unread initial data | absorb | revoke; absorb once they are used up |
///
/// Once the devices have stopped best effort always goes: the way back costs more than the rest.
pub fn decide(
    point: Point,
    estimate: &Estimate,
    budget: Budget,
    facts: Facts,
    limits: RevocationLimits,
    mode: Mode,
) -> Verdict {
    let Mode::BestEffort = mode;
    if matches!(point, Point::FinalSync | Point::MachineState | Point::Commit) {
        return Verdict::Go;
    }
    let used_up = facts.revocations >= limits.count || facts.revoked_pause >= limits.pause;
    if !fits(estimate, budget) && !used_up {
        return Verdict::Revoke;
    }
    if facts.unread_initial { Verdict::Absorb } else { Verdict::Go }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(ms: u64) -> Estimate {
        Estimate { known_upper: Time::from_ms(ms), ..Estimate::default() }
    }

    #[test]
    fn the_table_of_verdicts() {
        let limits = RevocationLimits { count: 3, pause: Time::from_ms(1000) };
        let verdict = |point, ms, unread_initial, revocations| {
            let budget = Budget { limit: Time::from_ms(300), elapsed: Time::from_ms(100) };
            let facts = Facts { unread_initial, revocations, revoked_pause: Time(0) };
            decide(point, &estimate(ms), budget, facts, limits, Mode::BestEffort)
        };
        for point in [Point::Look, Point::Quiesce] {
            assert_eq!(verdict(point, 200, false, 0), Verdict::Go);
            assert_eq!(verdict(point, 201, false, 0), Verdict::Revoke);
            assert_eq!(verdict(point, 201, false, 3), Verdict::Go);
            assert_eq!(verdict(point, 200, true, 0), Verdict::Absorb);
            assert_eq!(verdict(point, 201, true, 2), Verdict::Revoke);
            assert_eq!(verdict(point, 201, true, 3), Verdict::Absorb);
        }
        for point in [Point::FinalSync, Point::MachineState, Point::Commit] {
            assert_eq!(verdict(point, 999, false, 0), Verdict::Go);
        }
    }

    #[test]
    fn revocations_are_bounded_in_total_pause_too() {
        let limits = RevocationLimits { count: 100, pause: Time::from_ms(50) };
        let budget = Budget { limit: Time::from_ms(10), elapsed: Time(0) };
        let facts = Facts { revoked_pause: Time::from_ms(50), ..Facts::default() };
        let verdict = decide(Point::Look, &estimate(99), budget, facts, limits, Mode::BestEffort);
        assert_eq!(verdict, Verdict::Go);
    }
}
