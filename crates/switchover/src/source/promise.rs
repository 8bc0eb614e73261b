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
use crate::decide::{Bounds, is_local_minimum};
use crate::message::Side;
use crate::policy::{QEMU_UNKNOWN_BYTES, View};

/// Tries that are compared for the best moment.
const RECENT_MAX: usize = 32;
/// How often the floor is looked at while nothing fits.
const FLOOR_INTERVAL: Time = Time::from_ms(200);
/// Overruns that are kept.
const OVERRUNS_MAX: usize = 32;
/// A peer measures its bandwidth over at least so long.
const WINDOW: Time = Time::from_ms(100);

/// A call in a blackout that took longer than the bound the brain was given for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Overrun {
    /// The call, with its device.
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
    recent: VecDeque<Time>,
    fits_since: Option<Time>,
    /// The limit is out of reach since.
    hopeless_since: Option<Time>,
    floor_at: Time,
    /// The least that was ever needed, and when.
    least: Option<(Time, Time)>,
    /// Why the last switchover was taken back.
    taken_back: Option<String>,
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
    window_bytes: u64,
    window_begun: Time,
    bytes_per_s: u64,
}

/// What a switchover needs.
struct Need {
    time: Time,
    /// What asks for it, where that is a step that cannot be interrupted.
    step: Option<&'static str>,
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
    fn need(&self, estimate: &Estimate) -> Need {
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
            self.promise.taken_back = Some(format!("{elapsed} gone at {point:?} and {to_come}"));
        }
    }

    // --- the moment ---------------------------------------------------------------------------

    /// Now is a moment to try: it fits, and a better one is not to be expected soon.
    pub(super) fn worth_a_try(&mut self, now: Time) -> bool {
        let ready = self.handover.all_ready();
        if self.promise.out_of_time {
            return ready;
        }
        if let Some(wants) = self.config.policy.wants(&self.view()) {
            return ready && now >= self.not_before && wants;
        }
        if now < self.not_before || !ready {
            return false;
        }
        let estimate = self.estimator.estimate(Ahead::All, now.since(self.synced_at));
        let budget = Budget { limit: self.config.downtime_limit, elapsed: Time(0) };
        let need = self.need(&estimate);
        let fits = decide::fits(&estimate, budget, self.config.mode) && need.time <= budget.limit;
        self.remember(now, need.time);
        if !fits {
            self.promise.fits_since = None;
            return false;
        }
        let since = *self.promise.fits_since.get_or_insert(now);
        let waited = now.since(since) >= self.config.patience;
        waited || is_local_minimum(self.promise.recent.make_contiguous())
    }

    fn remember(&mut self, now: Time, need: Time) {
        let recent = &mut self.promise.recent;
        if recent.len() == RECENT_MAX {
            recent.pop_front();
        }
        recent.push_back(need);
        let better = |(least, _): (Time, Time)| need.0 < least.0 - least.0 / 20;
        if self.promise.least.is_none_or(better) {
            self.promise.least = Some((need, now));
        }
    }

    /// What a peer's rule looks at.
    fn view(&self) -> View {
        let sum = |pick: fn(&Device) -> u64| {
            self.devices.iter().map(pick).fold(0u64, u64::saturating_add)
        };
        View {
            ram_bytes: self.estimator.ram_remaining_bytes(),
            precopy_bytes: sum(|d| {
                let bytes = d.status.initial_bytes.unwrap_or(0);
                bytes.saturating_add(d.status.dirty_bytes.unwrap_or(0))
            }),
            stop_copy_bytes: sum(|d| d.stop_copy_bytes.unwrap_or(QEMU_UNKNOWN_BYTES)),
            bytes_per_s: self.promise.bytes_per_s,
            limit: self.config.downtime_limit,
        }
    }

    /// Bytes went out; a pass may have ended.
    pub(super) fn note_sent(&mut self, now: Time, bytes: u64, pass_ended: bool) {
        let promise = &mut self.promise;
        promise.window_bytes = promise.window_bytes.saturating_add(bytes);
        let whole = self.config.policy == Policy::RamOnly;
        let took = now.since(promise.window_begun);
        if pass_ended && (whole || took >= WINDOW) && took.0 > 0 {
            let rate = u128::from(promise.window_bytes) * 1_000_000_000 / u128::from(took.0);
            promise.bytes_per_s = rate.min(u128::from(u64::MAX)) as u64;
            (promise.window_bytes, promise.window_begun) = (0, now);
        }
    }

    /// A pass begins: where the bandwidth is that of a pass, waiting for one does not count.
    pub(super) fn pass_begins(&mut self, now: Time) {
        if self.config.policy == Policy::RamOnly || self.pass <= 1 {
            (self.promise.window_bytes, self.promise.window_begun) = (0, now);
        }
    }

    // --- rehearsal ----------------------------------------------------------------------------

    /// A rehearsal is due: one pause in which every device goes into its P2P state and back.
    pub(super) fn rehearsal_due(&self, now: Time) -> bool {
        let bounds = self.bounds_at(Point::Look);
        let fits =
            self.estimator.pause_bound() + bounds.step + bounds.back <= self.config.downtime_limit;
        self.config.rehearse
            && !self.promise.rehearsed
            && self.pass > 0
            && now >= self.not_before
            && self.handover.all_ready()
            && fits
    }

    // --- the end ------------------------------------------------------------------------------

    /// A reason to end the migration while the guest runs, if there is one.
    pub(super) fn hopeless(&mut self, now: Time) -> Option<Failure> {
        let begun = self.promise.begun_at?;
        let limit = self.config.downtime_limit;
        let failure = |what: String| Failure::new(Side::Source, what);
        if let Some(max) = self.config.max_total_time
            && now.since(begun) >= max
            && !self.promise.out_of_time
        {
            let ready = self.handover.all_ready();
            if self.config.mode == Mode::Strict || !ready {
                let what = format!("the migration took longer than {max}");
                return Some(failure(format!("{what}; {}", self.reason(&self.estimator.floor()))));
            }
            self.promise.out_of_time = true;
        }
        if self.config.mode != Mode::Strict {
            // A device that is never done reading cannot be taken along, limit or not.
            let max = self.config.max_total_time.map(|max| max + self.config.stall_after);
            let never = max.is_some_and(|max| now.since(begun) >= max);
            return never.then(|| failure(self.unready()));
        }
        if self.pass == 0 {
            return self.admission().err();
        }
        if self.facts().used_up(self.config.revocations) {
            let (times, pause) = (self.revocations, self.revoked_pause);
            let last = self.promise.taken_back.clone().unwrap_or_default();
            let what =
                format!("taken back {times} times, {pause} of standing still in all: {last}");
            return Some(failure(what).remedy("raise the limit, or use best effort"));
        }
        if !self.handover.all_ready() {
            let since = self.promise.least.map_or(begun, |(_, at)| at);
            let late = now.since(since) >= self.config.stall_after;
            return late.then(|| failure(self.unready()));
        }
        if now.since(self.promise.floor_at) < FLOOR_INTERVAL || self.pass < 2 {
            return None;
        }
        self.promise.floor_at = now;
        let floor = self.estimator.floor();
        let out_of_reach = floor.unknown || self.need(&floor).time > limit;
        if out_of_reach {
            let since = *self.promise.hopeless_since.get_or_insert(now);
            let long = now.since(since) >= self.config.give_up_after;
            return long.then(|| failure(self.reason(&floor)).remedy("raise the limit"));
        }
        self.promise.hopeless_since = None;
        let (least, at) = self.promise.least?;
        let stalled = least > limit && now.since(at) >= self.config.stall_after;
        stalled.then(|| {
            let mb = |bytes_per_s: u64| bytes_per_s / 1_000_000;
            let (dirties, carries) =
                (self.estimator.ram_dirty_bytes_per_s(), self.estimator.link_bytes_per_s());
            let what = format!(
                "a limit of {limit} is out of reach: the guest dirties {} MB/s, the link carries {} MB/s; \
                 the best moment needed {least}",
                mb(dirties),
                mb(carries)
            );
            failure(what).remedy("raise the limit, or slow the guest down")
        })
    }

    /// Why a limit is out of reach, and what would fit.
    fn reason(&self, floor: &Estimate) -> String {
        let (need, limit) = (self.need(floor), self.config.downtime_limit);
        let level = f64::from(self.config.level_permille) / 10.0;
        if floor.unknown {
            let unknown = self.devices.iter().position(|d| d.status.remaining_bytes.is_none());
            let name =
                unknown.map_or("", |index| self.estimator.device_name(DeviceIndex(index as u16)));
            return format!(
                "nobody knows how much state device {name} has, so no limit can be promised"
            );
        }
        let alone = (0..self.devices.len() as u16)
            .map(DeviceIndex)
            .filter_map(|device| Some((self.estimator.alone(device)?, device)))
            .max();
        let blame = match (need.step, alone) {
            (_, Some((time, device))) if time.0 >= need.time.0 / 2 => {
                format!("device {} alone needs {time}", self.estimator.device_name(device))
            }
            (Some(step), _) => format!("{step} is bounded no lower"),
            (None, _) => match floor.dominating() {
                Some(term) => {
                    format!("{} needs {}", term.name, term.upper.unwrap_or_default())
                }
                None => String::new(),
            },
        };
        let fits = Time::from_ms(need.time.0.div_ceil(1_000_000));
        if need.time > limit {
            format!(
                "a limit of {limit} is out of reach: {blame}; a limit of {fits} would fit at P{level}"
            )
        } else {
            format!("no moment fitted into a limit of {limit}; {blame}")
        }
    }

    fn unready(&self) -> String {
        let unread = self.devices.iter().position(|d| d.status.initial_bytes != Some(0));
        match unread {
            Some(index) => format!(
                "device {} goes on having initial data, or does not say: {} bytes of it, and none is read",
                self.estimator.device_name(DeviceIndex(index as u16)),
                self.devices[index].status.initial_bytes.map_or("?".into(), |b| b.to_string())
            ),
            None => "the destination does not acknowledge the devices' initial data".to_owned(),
        }
    }

    // --- overruns -----------------------------------------------------------------------------

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
            let call = match device {
                Some(device) => format!("device {}: {call}", self.estimator.device_name(device)),
                None => call.to_owned(),
            };
            self.promise.overruns.push(Overrun { call, took, bound });
        }
    }
}
