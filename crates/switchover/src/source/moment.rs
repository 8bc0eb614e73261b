//! The moment: when a switchover is worth a try, by our rule or a peer's.

use super::*;
use crate::decide::is_local_minimum;
use crate::policy::{QEMU_UNKNOWN_BYTES, View};

/// Tries that are compared for the best moment.
const RECENT_MAX: usize = 32;
/// A peer measures its bandwidth over at least so long.
const WINDOW: Time = Time::from_ms(100);

impl Source {
    /// Now is a moment to try: it fits or never will, and a better one is not to be expected soon.
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
        let estimate = self.estimator.totals(Ahead::All, now.since(self.synced_at));
        let budget = Budget { limit: self.config.downtime_limit, elapsed: Time(0) };
        let need = self.need(&estimate);
        let fits = decide::fits(&estimate, budget, self.config.mode) && need.time <= budget.limit;
        self.remember(now, need.time);
        if !fits && self.promise.settled.is_none() {
            self.promise.fits_since = None;
            return false;
        }
        let since = *self.promise.fits_since.get_or_insert(now);
        let waited = now.since(since) >= self.config.patience;
        waited || is_local_minimum(self.promise.recent.make_contiguous())
    }

    pub(super) fn remember(&mut self, now: Time, need: Time) {
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
    pub(super) fn view(&self) -> View {
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
}
