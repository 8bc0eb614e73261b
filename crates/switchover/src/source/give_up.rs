//! The end: when a limit is out of reach, and what is said about it.

use super::*;
use crate::message::Side;

/// How often the floor is looked at while nothing fits.
const FLOOR_INTERVAL: Time = Time::from_ms(200);

/// A device that has been ready for so long is.
const READY_FOR: Time = Time::from_ms(1_000);

impl Source {
    /// A reason to end the migration while the guest runs, if there is one.
    pub(super) fn hopeless(&mut self, now: Time, out: &mut Vec<Action>) -> Option<Failure> {
        let begun = self.promise.begun_at?;
        if let Some(failure) = self.over_time(now, begun) {
            return Some(failure);
        }
        let strict = self.config.mode == Mode::Strict;
        if strict && self.pass == 0 {
            return self.admission().err();
        }
        if strict && self.facts().used_up(self.config.revocations) {
            let (times, pause) = (self.revocations, self.revoked_pause);
            let last = self.promise.taken_back.clone().unwrap_or_default();
            let what =
                format!("taken back {times} times, {pause} of standing still in all: {last}");
            let failure = Failure::new(Side::Source, what);
            return Some(failure.remedy("raise the limit, or use best effort"));
        }
        if !self.handover.all_ready() {
            self.promise.ready_since = None;
            return self.never_ready(now);
        }
        // Ready for a moment only is not ready: a device that promises data and has none is acknowledged
        // over and over.
        let since = *self.promise.ready_since.get_or_insert(now);
        if self.promise.unready.is_some() && now.since(since) >= READY_FOR {
            (self.promise.unready, self.promise.reinit_unready) = (None, false);
            self.devices.iter_mut().for_each(|device| device.least_initial_bytes = None);
        }
        if self.config.policy != Policy::Bounded || self.promise.settled.is_some() {
            return None;
        }
        // No time at all is a wish: everything made ready, and no switchover before the limit is raised.
        if !strict && self.config.downtime_limit == Time(0) {
            return None;
        }
        let (what, remedy) = self.out_of_reach(now)?;
        if strict {
            return Some(Failure::new(Side::Source, what).remedy(remedy));
        }
        out.push(Action::OutOfReach(what.clone()));
        self.promise.settled = Some(what);
        None
    }

    /// All the time a migration may take is gone.
    fn over_time(&mut self, now: Time, begun: Time) -> Option<Failure> {
        let max = self.config.max_total_time?;
        let took = now.since(begun);
        let ready = self.handover.all_ready();
        if took >= max && !self.promise.out_of_time {
            if self.config.mode == Mode::Strict || !ready {
                let what = format!("the migration took longer than {max}");
                let why = self.reason(&self.estimator.floor());
                return Some(Failure::new(Side::Source, format!("{what}; {why}")));
            }
            self.promise.out_of_time = true;
        }
        // A device that is never done reading cannot be taken along, limit or not.
        (took >= max + self.config.stall_after).then(|| Failure::new(Side::Source, self.unready()))
    }

    /// Initial data comes to no end: none is read, or there is ever more of it.
    fn never_ready(&mut self, now: Time) -> Option<Failure> {
        let (_, closer) = *self.promise.unready.get_or_insert((now, now));
        // Best effort has the patience of somebody who wants to move all the same.
        let times = if self.config.mode == Mode::Strict { 1 } else { 3 };
        let late = now.since(closer).0 >= self.config.stall_after.0.saturating_mul(times);
        late.then(|| Failure::new(Side::Source, self.unready()))
    }

    /// Initial data has become less, or was loaded.
    pub(super) fn comes_closer(&mut self, now: Time) {
        if let (Some((_, closer)), false) = (&mut self.promise.unready, self.promise.reinit_unready)
        {
            *closer = now;
        }
    }

    /// The limit has been out of reach for long, or nothing has become better for long: why, and what to do.
    fn out_of_reach(&mut self, now: Time) -> Option<(String, &'static str)> {
        if now.since(self.promise.floor_at) < FLOOR_INTERVAL || self.pass < 2 {
            return None;
        }
        self.promise.floor_at = now;
        let limit = self.config.downtime_limit;
        let floor = self.estimator.floor_totals();
        let need = self.need(&floor).time;
        let unknown = floor.unknown && self.config.mode == Mode::Strict;
        // With little to gain from memory the best moment there was is as good as it gets.
        let (best, at) = self.promise.least.unwrap_or((need, now));
        let near = best > limit && need.0 > limit.0 - limit.0 / 5;
        self.promise.floor_over = unknown || need > limit;
        if self.promise.floor_over || near {
            let least = if need > limit { need } else { best };
            let (since, before) = *self.promise.hopeless_since.get_or_insert((now, least));
            // A device that is still being drained gets closer.
            if least.0 < before.0 - before.0 / 20 {
                self.promise.hopeless_since = Some((now, least));
                return None;
            }
            let long = now.since(since) >= self.config.give_up_after;
            return long.then(|| (self.reason(&self.estimator.floor()), "raise the limit"));
        }
        self.promise.hopeless_since = None;
        let stalled = best > limit && now.since(at) >= self.config.stall_after;
        stalled.then(|| {
            let mb = |bytes_per_s: u64| bytes_per_s / 1_000_000;
            let (dirties, carries) =
                (self.estimator.ram_dirty_bytes_per_s(), self.estimator.link_bytes_per_s());
            let what = format!(
                "a limit of {limit} is out of reach: the guest dirties {} MB/s, the link carries {} MB/s; \
                 the best moment needed {best}",
                mb(dirties),
                mb(carries)
            );
            let remedy = match self.config.auto_converge {
                None => "raise the limit, or slow the guest down (--auto-converge)",
                Some(_) => "raise the limit, or slow the guest down",
            };
            (what, remedy)
        })
    }

    /// The limit has changed: what was out of reach may not be any more.
    pub(super) fn limit_changed(&mut self) {
        (self.promise.settled, self.promise.hopeless_since) = (None, None);
        (self.promise.least, self.promise.odds) = (None, None);
    }

    /// Why a limit is out of reach, and what would fit.
    pub(super) fn reason(&self, floor: &Estimate) -> String {
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
        let best = self.promise.least.map_or(Time(0), |(best, _)| best);
        let fits = Time::from_ms(need.time.max(best).0.div_ceil(1_000_000));
        if fits > limit {
            format!(
                "a limit of {limit} is out of reach: {blame}; a limit of {fits} would fit at P{level}"
            )
        } else {
            format!("no moment fitted into a limit of {limit}; {blame}")
        }
    }

    pub(super) fn unready(&self) -> String {
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
}
