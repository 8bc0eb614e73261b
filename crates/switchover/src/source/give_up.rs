//! The end: when a limit is out of reach, and what is said about it.

use super::*;
use crate::message::Side;

/// How often the floor is looked at while nothing fits.
const FLOOR_INTERVAL: Time = Time::from_ms(200);

impl Source {
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
        let floor = self.estimator.floor_totals();
        let out_of_reach = floor.unknown || self.need(&floor).time > limit;
        if out_of_reach {
            let since = *self.promise.hopeless_since.get_or_insert(now);
            let long = now.since(since) >= self.config.give_up_after;
            return long
                .then(|| failure(self.reason(&self.estimator.floor())).remedy("raise the limit"));
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
            let remedy = match self.config.auto_converge {
                None => "raise the limit, or slow the guest down (--auto-converge)",
                Some(_) => "raise the limit, or slow the guest down",
            };
            failure(what).remedy(remedy)
        })
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
        let fits = Time::from_ms(need.time.0.div_ceil(1_000_000));
        if need.time > limit {
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
