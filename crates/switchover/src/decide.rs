//! The decision: estimate, budget, bounds and counters in, verdict out. Pure functions.

use crate::estimate::Estimate;
use crate::handover::source::{Point, Verdict};
use crate::time::Time;

/// How hard the limit is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Keep the limit if it can be kept, complete anyway.
    #[default]
    BestEffort,
    /// Keep the limit, or do not migrate.
    Strict,
}

/// What the guest may stand still, and has stood so far in this attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// The downtime limit.
    pub limit: Time,
    /// Time since the request to pause.
    pub elapsed: Time,
}

/// What cannot be interrupted, by the bounds of its calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// The step that a Go lets begin.
    pub step: Time,
    /// The way back to a running guest from after it; 0 where there is none.
    pub back: Time,
}

/// Bounds on switchovers that are taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RevocationLimits {
    /// How many.
    pub count: u32,
    /// How much standing still in all.
    pub pause: Time,
}

/// What chance there is that the limit is kept, in permille: at the level of the promise it cannot be, and
/// best effort goes all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Odds {
    /// By going on.
    pub now: u32,
    /// By taking it back and trying again.
    pub again: u32,
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
    /// The migration has taken all the time it may.
    pub out_of_time: bool,
    /// The limit is out of reach at the level of the promise, however long one waits.
    pub odds: Option<Odds>,
    /// Initial data was absorbed so often in this pause that there will be more the next time.
    pub absorbed_out: bool,
}

impl Facts {
    /// No switchover may be taken back any more.
    pub fn used_up(&self, limits: RevocationLimits) -> bool {
        self.revocations >= limits.count || self.revoked_pause >= limits.pause
    }
}

/// Whether the estimate fits, at the level of the promise, into what is left of the limit. Unknown parts
/// do not fit in strict mode; in best-effort mode they count as nothing, and the report says so.
pub fn fits(estimate: &Estimate, budget: Budget, mode: Mode) -> bool {
    let unknown = estimate.unknown && mode == Mode::Strict;
    !unknown && budget.elapsed + estimate.known_upper <= budget.limit
}

/// Odds of another try that are better by less are no reason to stand still once more.
const BETTER_PERMILLE: u32 = 50;

/// The verdict at `point`.
///
/// | best effort | fits | does not fit |
/// |---|---|---|
/// | Look, Quiesce; no unread initial data | go | revoke; go once revocations are used up, or it gains nothing |
/// | Look, Quiesce; unread initial data | absorb | revoke; absorb once they are used up, or it gains nothing |
/// | later | go | go: the way back costs more than the rest |
///
/// Taking it back gains nothing where the way back misses the limit as well, nor, once the limit is known to be
/// out of reach, where another try has no better odds. What was absorbed over and over is taken back: it will not
/// end the next time either.
///
/// Strict, a step is entered only if it and the way back from after it fit by their bounds, however likely
/// it is that the rest fits; Commit, which has no way back, only if it and the start fit. A switchover that
/// is taken back too often ends the migration, which is not decided here.
pub fn decide(
    point: Point,
    estimate: &Estimate,
    budget: Budget,
    bounds: Bounds,
    facts: Facts,
    limits: RevocationLimits,
    mode: Mode,
) -> Verdict {
    let revocable = matches!(point, Point::Look | Point::Quiesce);
    let go = match facts.unread_initial && revocable {
        true if facts.absorbed_out => return Verdict::Revoke,
        true => Verdict::Absorb,
        false => Verdict::Go,
    };
    match mode {
        Mode::BestEffort if !revocable => go,
        Mode::BestEffort if facts.out_of_time || facts.used_up(limits) => go,
        Mode::BestEffort if fits(estimate, budget, mode) => go,
        Mode::BestEffort if budget.elapsed + bounds.back > budget.limit => go,
        Mode::BestEffort => match facts.odds {
            Some(odds) if odds.now + BETTER_PERMILLE >= odds.again => go,
            _ => Verdict::Revoke,
        },
        Mode::Strict => {
            let enforced = budget.elapsed + bounds.step + bounds.back <= budget.limit;
            let likely = match point {
                Point::Look | Point::Quiesce => fits(estimate, budget, mode),
                // The devices stand: what is as likely to fit as not is worth going on for.
                Point::FinalSync | Point::MachineState => {
                    budget.elapsed + estimate.known <= budget.limit
                }
                Point::Commit => true,
            };
            if enforced && likely { go } else { Verdict::Revoke }
        }
    }
}

/// A workload breathes when what a switchover would take goes up and down: then a moment that fits is not
/// the best one, and a little later is.
///
/// `recent` has what the last tries would have taken, the newest last. The answer is whether the newest is
/// close to the least of them; with too little to compare, or where nothing much changes, it is.
pub fn is_local_minimum(recent: &[Time]) -> bool {
    const LEAST: usize = 6;
    let (Some(newest), Some(least), Some(most)) =
        (recent.last(), recent.iter().min(), recent.iter().max())
    else {
        return true;
    };
    let breathes = recent.len() >= LEAST && most.0 >= least.0.saturating_mul(2);
    !breathes || newest.0 <= least.0 + (most.0 - least.0) / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RevocationLimits = RevocationLimits { count: 3, pause: Time::from_ms(1000) };
    const BUDGET: Budget = Budget { limit: Time::from_ms(300), elapsed: Time::from_ms(100) };

    fn estimate(ms: u64) -> Estimate {
        let known = Time::from_ms(ms);
        Estimate { known, known_upper: known, ..Estimate::default() }
    }

    #[test]
    fn the_table_of_best_effort() {
        let verdict = |point, ms, unread_initial, revocations| {
            let facts = Facts { unread_initial, revocations, ..Facts::default() };
            let bounds = Bounds { step: Time::from_ms(900), back: Time::from_ms(200) };
            decide(point, &estimate(ms), BUDGET, bounds, facts, LIMITS, Mode::BestEffort)
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
    fn best_effort_takes_nothing_back_where_that_gains_nothing() {
        let verdict = |back_ms, odds: Option<(u32, u32)>| {
            let odds = odds.map(|(now, again)| Odds { now, again });
            let facts = Facts { odds, ..Facts::default() };
            let bounds = Bounds { back: Time::from_ms(back_ms), ..Bounds::default() };
            decide(Point::Quiesce, &estimate(500), BUDGET, bounds, facts, LIMITS, Mode::BestEffort)
        };
        assert_eq!(verdict(200, None), Verdict::Revoke);
        assert_eq!(verdict(201, None), Verdict::Go, "the way back misses the limit too");
        assert_eq!(verdict(10, Some((940, 960))), Verdict::Go, "as good as it gets");
        assert_eq!(verdict(10, Some((0, 20))), Verdict::Go, "hopeless either way");
        assert_eq!(verdict(10, Some((300, 960))), Verdict::Revoke, "this one is a bad one");
    }

    #[test]
    fn what_never_ends_is_not_absorbed_for_ever() {
        for (absorbed_out, then) in [(false, Verdict::Absorb), (true, Verdict::Revoke)] {
            let facts = Facts { unread_initial: true, absorbed_out, ..Facts::default() };
            for mode in [Mode::BestEffort, Mode::Strict] {
                let (bounds, point) = (Bounds::default(), Point::Look);
                let verdict = decide(point, &estimate(1), BUDGET, bounds, facts, LIMITS, mode);
                assert_eq!(verdict, then, "{mode:?}");
            }
        }
    }

    #[test]
    fn the_table_of_strict() {
        let verdict = |point, ms, step_ms, back_ms| {
            let bounds = Bounds { step: Time::from_ms(step_ms), back: Time::from_ms(back_ms) };
            // However often it was taken back: strict never goes because of that.
            let facts = Facts { revocations: 99, out_of_time: true, ..Facts::default() };
            decide(point, &estimate(ms), BUDGET, bounds, facts, LIMITS, Mode::Strict)
        };
        for point in [Point::Look, Point::Quiesce, Point::FinalSync, Point::MachineState] {
            assert_eq!(verdict(point, 200, 120, 80), Verdict::Go, "{point:?}");
            assert_eq!(verdict(point, 201, 120, 80), Verdict::Revoke, "{point:?}: unlikely");
            assert_eq!(verdict(point, 10, 120, 81), Verdict::Revoke, "{point:?}: no way back");
        }
        assert_eq!(verdict(Point::Commit, 999, 200, 0), Verdict::Go, "only its bound counts");
        assert_eq!(verdict(Point::Commit, 1, 201, 0), Verdict::Revoke);
    }

    #[test]
    fn what_nobody_knows_does_not_fit_in_strict_mode() {
        let unknown = Estimate { unknown: true, ..estimate(1) };
        let verdict = |mode| {
            let (bounds, facts) = (Bounds::default(), Facts::default());
            decide(Point::Look, &unknown, BUDGET, bounds, facts, LIMITS, mode)
        };
        assert_eq!(verdict(Mode::Strict), Verdict::Revoke);
        assert_eq!(verdict(Mode::BestEffort), Verdict::Go);
    }

    #[test]
    fn revocations_are_bounded_in_total_pause_too() {
        let facts = Facts { revoked_pause: Time::from_ms(1000), ..Facts::default() };
        let verdict = |mode| {
            decide(Point::Look, &estimate(999), BUDGET, Bounds::default(), facts, LIMITS, mode)
        };
        assert_eq!(verdict(Mode::BestEffort), Verdict::Go);
        assert_eq!(verdict(Mode::Strict), Verdict::Revoke);
    }

    #[test]
    fn a_breathing_workload_is_caught_when_it_breathes_out() {
        let ms = |values: &[u64]| values.iter().map(|ms| Time::from_ms(*ms)).collect::<Vec<_>>();
        for (recent, now) in [
            (&[][..], true),
            (&[50][..], true),
            // Still converging: the newest is the least.
            (&[900, 700, 500, 300, 200, 100], true),
            // Steady.
            (&[100, 110, 95, 105, 100, 108], true),
            // Up and down: not at the top, at the bottom.
            (&[20, 60, 200, 60, 20, 60], false),
            (&[60, 200, 60, 20, 60, 200, 60, 20], true),
        ] {
            assert_eq!(is_local_minimum(&ms(recent)), now, "{recent:?}");
        }
    }
}
