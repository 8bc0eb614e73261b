//! The verdict at each point of a switchover: estimate, bounds and counters are put together here and judged
//! in [`decide`].

use super::*;
use crate::decide::{Bounds, Odds};
use crate::message::Side;

/// A device whose initial data was absorbed so often in one pause will not be done the next time.
const ABSORBED_MAX: u32 = 8;

impl Source {
    pub(super) fn host(&self) -> estimate::HostBounds {
        self.estimator.knowledge().host.bounds
    }

    pub(super) fn facts(&self) -> Facts {
        Facts {
            unread_initial: self.handover.unread_initial(),
            revocations: self.revocations,
            revoked_pause: self.revoked_pause,
            out_of_time: self.promise.out_of_time,
            odds: None,
            absorbed_out: self.promise.absorbed >= ABSORBED_MAX,
        }
    }

    pub(super) fn judge(&mut self, now: Time, point: Point, out: &mut Vec<Action>) -> Verdict {
        let ahead = match point {
            Point::Look => Ahead::FromQuiesce,
            Point::Quiesce | Point::FinalSync => Ahead::FromStop,
            Point::MachineState | Point::Commit => Ahead::FromCommit,
        };
        let estimate = self.estimator.estimate(ahead, Time(0));
        let elapsed = self.pause_requested_at.map_or(Time(0), |at| now.since(at));
        let budget = Budget { limit: self.config.downtime_limit, elapsed };
        let mut facts = self.facts();
        let verdict = match (self.config.policy, point) {
            (Policy::Bounded, Point::Quiesce) if self.promise.rehearsing => Verdict::Revoke,
            (Policy::Bounded, Point::Look) if self.promise.rehearsing && facts.unread_initial => {
                Verdict::Revoke
            }
            (Policy::Bounded, Point::Look) if self.promise.rehearsing => Verdict::Go,
            (Policy::Bounded, _) => {
                let (mode, limits) = (self.config.mode, self.config.revocations);
                let bounds = match mode {
                    Mode::Strict => self.bounds_at(point),
                    Mode::BestEffort => {
                        let back = self.estimator.back_expected(point == Point::Quiesce);
                        Bounds { back, ..Bounds::default() }
                    }
                };
                facts.odds = self.promise.odds.map(|again| {
                    let left = budget.limit.since(elapsed);
                    Odds { now: self.estimator.odds_permille(ahead, Time(0), left), again }
                });
                decide::decide(point, &estimate, budget, bounds, facts, limits, mode)
            }
            (_, Point::Look | Point::Quiesce) if facts.unread_initial => Verdict::Absorb,
            _ => Verdict::Go,
        };
        self.note_verdict(point, verdict, &estimate, elapsed);
        let whole = ahead != Ahead::FromStop || point == Point::Quiesce;
        if verdict == Verdict::Go && whole && point != Point::MachineState {
            self.promise.stretches.push((ahead, estimate.modelled, now));
        }
        if point == Point::Quiesce && verdict == Verdict::Go {
            let claim = |d: &Device| (d.status.remaining_bytes.unwrap_or(0), 0);
            self.claimed_bytes = self.devices.iter().map(claim).collect();
        }
        out.push(Action::Judged { point, verdict, estimate, elapsed });
        verdict
    }

    /// New initial data that cannot be taken along, now that the guest stands, ends the migration.
    pub(super) fn fails_late(&self, point: Point) -> Option<Failure> {
        if !matches!(point, Point::Look | Point::Quiesce) {
            return None;
        }
        let failure = |what: &str| Some(Failure::new(Side::Source, what));
        // Once announced a peer fails, even where all of it was read and loaded since.
        let late = self.promise.late_reinit
            || self.handover.unread_initial()
            || self.handover.unknown_answer();
        if self.config.policy.fails_on_late_initial_data() && late {
            return failure("a device has new initial data after the decision to switch over");
        }
        let ever_more = self.handover.unread_initial() && self.promise.absorbed >= ABSORBED_MAX;
        let taken_back = self.config.policy == Policy::Bounded
            && !self.promise.out_of_time
            && !self.facts().used_up(self.config.revocations);
        if ever_more && !taken_back {
            return failure("a device goes on having initial data while the guest stands still");
        }
        None
    }
}
