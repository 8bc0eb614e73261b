//! The promise: who is admitted, what is enforced, when it is hopeless.
//!
//! ```text
//!   admission ─▶ every device bounded? ─▶ precopy ─▶ needed ≤ limit, and a good moment? ─▶ switchover
//!                                            │                                              │
//!                                            └── out of reach for long ─▶ give up    before every step:
//!                                                                                    elapsed + step + back ≤ limit
//!                                                                                    timer at limit − back
//! ```

use super::*;
use crate::decide::Bounds;
use crate::message::Side;

/// Overruns that are kept.
const OVERRUNS_MAX: usize = 32;

/// A call in a blackout that took longer than the bound the brain was given for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Overrun {
    /// The device that was called; `None` for a call of the host.
    pub device: Option<String>,
    /// The call.
    pub call: String,
    /// How long it took.
    pub took: Time,
    /// How long it might have taken.
    pub bound: Time,
}

/// What the promise keeps in mind.
#[derive(Clone, Debug, Default)]
pub(super) struct Promise {
    /// What the last tries would have taken, and since when a moment that fits is waited over.
    pub(super) recent: VecDeque<Time>,
    pub(super) fits_since: Option<Time>,
    /// The limit is out of reach since, and the least that was needed then.
    pub(super) hopeless_since: Option<(Time, Time)>,
    /// No memory left to send would not do either.
    pub(super) floor_over: bool,
    /// Best effort: waiting does not bring the limit into reach, for this reason.
    pub(super) settled: Option<String>,
    /// With what odds of keeping it the switchover began then, in permille.
    pub(super) odds: Option<u32>,
    /// Some device has not been ready since, and when that last came closer to an end.
    pub(super) unready: Option<(Time, Time)>,
    pub(super) ready_since: Option<Time>,
    /// Absorptions since the vCPUs stand.
    pub(super) absorbed: u32,
    /// Dry looks in a row that found a device with initial data once more.
    pub(super) looks_in_vain: u32,
    /// New initial data since then: what is read of it brings no end closer.
    pub(super) reinit_unready: bool,
    pub(super) floor_at: Time,
    /// The least that was ever needed, and when.
    pub(super) least: Option<(Time, Time)>,
    /// Why the last switchover was taken back.
    pub(super) taken_back: Option<String>,
    pub(super) begun_at: Option<Time>,
    pub(super) out_of_time: bool,
    /// The last verdict let Commit go.
    pub(super) committing: bool,
    pub(super) commit_sent_at: Option<Time>,
    pub(super) resume_at: Option<Time>,
    /// New initial data was announced since the vCPUs stand.
    pub(super) late_reinit: bool,
    pub(super) rehearsing: bool,
    pub(super) rehearsed: bool,
    /// Stretches of the blackout under way: what was expected of them, and when they began.
    pub(super) stretches: Vec<(Ahead, Time, Time)>,
    /// Those that ended well.
    pub(super) ended: Vec<Stretch>,
    pub(super) overruns: Vec<Overrun>,
    /// A peer's bandwidth.
    pub(super) window_bytes: u64,
    pub(super) window_begun: Time,
    pub(super) bytes_per_s: u64,
}

/// What a switchover needs.
pub(super) struct Need {
    pub(super) time: Time,
    /// What asks for it, where that is a step that cannot be interrupted.
    pub(super) step: Option<&'static str>,
}

impl Source {
    /// What keeps a strict migration from beginning at all. The brain itself refuses too, once connected.
    pub fn admission(&self) -> Result<(), Failure> {
        if self.config.mode != Mode::Strict {
            return Ok(());
        }
        let refused = |what: String| Failure::new(Side::Source, what);
        if self.config.policy != Policy::Bounded {
            let what = format!("the policy {} knows no strict mode", self.config.policy.name());
            return Err(refused(what).remedy("use --policy bounded, or best effort"));
        }
        if let Some(unbounded) = self.estimator.unbounded() {
            let name = self.estimator.device_name(unbounded.device).to_owned();
            let what = format!(
                "device {name} has no bound for its way {}, and the mode is strict",
                unbounded.call
            );
            let remedy = format!("give it a profile, or allow it with --allow-unbounded {name}");
            return Err(refused(what).device(name).remedy(remedy));
        }
        let keeps = |d: &&estimate::DeviceKnowledge| d.reset_keeps_state;
        if let Some(device) = self.estimator.knowledge().devices.iter().find(keeps) {
            let what = format!(
                "device {} is not RUNNING after a reset, so the destination cannot roll it back",
                device.name
            );
            return Err(refused(what).device(device.name.clone()).remedy("use best effort"));
        }
        // However fast everything else is.
        let least = self.need(&Estimate { reached_upper: vec![Time(0); 5], ..Estimate::default() });
        if least.time > self.config.downtime_limit {
            let what = format!(
                "the bounds of the calls alone need {}, and the limit is {}",
                least.time, self.config.downtime_limit
            );
            let step = least.step.unwrap_or_default();
            return Err(refused(what).remedy(format!("raise the limit; what needs it is {step}")));
        }
        Ok(())
    }

    /// The bounds of what a Go at `point` lets begin.
    pub(super) fn bounds_at(&self, point: Point) -> Bounds {
        let e = &self.estimator;
        let (step, back) = match point {
            Point::Look => (e.quiesce_bound(), e.back_from_quiesce_bound()),
            Point::Quiesce => (e.stop_bound(), e.back_from_stop_bound(false)),
            Point::FinalSync => (e.sync_bound(), e.back_from_stop_bound(false)),
            Point::MachineState => (e.machine_state_bound(), e.back_from_stop_bound(true)),
            Point::Commit => (e.commit_bound(), Time(0)),
        };
        Bounds { step, back }
    }

    /// What a switchover with this estimate needs of a limit: its upper quantile, and in strict mode at
    /// every point enough for the step and the way back from after it.
    pub(super) fn need(&self, estimate: &Estimate) -> Need {
        let mut need = Need { time: estimate.known_upper, step: None };
        if self.config.mode != Mode::Strict {
            return need;
        }
        let points = [
            (Point::Look, "quiesce, with its way back"),
            (Point::Quiesce, "stop, with its way back"),
            (Point::FinalSync, "final-sync, with its way back"),
            (Point::MachineState, "machine-state, with its way back"),
            (Point::Commit, "commit and start"),
        ];
        for ((point, step), reached) in points.into_iter().zip(&estimate.reached_upper) {
            let bounds = self.bounds_at(point);
            let mut time = *reached + bounds.step + bounds.back;
            if point == Point::Commit {
                // Until then the timer guards the way back.
                time = time.max(*reached + self.estimator.back_from_stop_bound(true));
            }
            if time > need.time {
                need = Need { time, step: Some(step) };
            }
        }
        need
    }

    /// When the switchover under way is taken back, whatever it waits for.
    pub(super) fn take_back_at(&self) -> Option<Time> {
        let requested = self.pause_requested_at?;
        if self.config.mode != Mode::Strict || self.promise.committing {
            return None;
        }
        let e = &self.estimator;
        let back = match self.handover.state() {
            State::Look => e.back_from_look_bound(),
            State::Quiesce => e.back_from_quiesce_bound(),
            State::StopCopy | State::AwaitReady => e.back_from_stop_bound(true),
            _ => return None,
        };
        Some(requested + self.config.downtime_limit.since(back))
    }

    /// The timer of the promise struck.
    pub(super) fn enforce(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.take_back_at().is_some_and(|at| at <= now) {
            let limit = self.config.downtime_limit;
            let state = self.handover.state().name();
            let what = format!("{state} lasts too long for a downtime limit of {limit}");
            self.promise.taken_back = Some(what.clone());
            self.blackouts.blame(|| what.clone());
            self.drive(now, handover::Event::TakeBack(Failure::new(Side::Source, what)), out);
        }
    }

    /// Notes a verdict that took the switchover back, for the reason of an end.
    pub(super) fn note_verdict(
        &mut self,
        point: Point,
        verdict: Verdict,
        estimate: &Estimate,
        elapsed: Time,
    ) {
        self.promise.committing = point == Point::Commit && verdict == Verdict::Go;
        if verdict == Verdict::Revoke {
            let to_come = match estimate.upper() {
                Some(upper) => format!("{upper} to come at the level of the promise"),
                None => "a device that does not say how much it has".to_owned(),
            };
            let what = format!("{elapsed} gone at {point:?} and {to_come}");
            self.blackouts.blame(|| what.clone());
            self.promise.taken_back = Some(what);
        }
    }

    /// Notes a call in a blackout that took longer than its bound.
    pub(super) fn check_bound(
        &mut self,
        call: &str,
        device: Option<DeviceIndex>,
        took: Time,
        bound: Option<Time>,
    ) {
        let Some(bound) = bound else { return };
        if self.pause_requested_at.is_none() || took <= bound {
            return;
        }
        if self.promise.overruns.len() < OVERRUNS_MAX {
            let device = device.map(|device| self.estimator.device_name(device).to_owned());
            let call = call.to_owned();
            self.promise.overruns.push(Overrun { device, call, took, bound });
        }
    }
}
