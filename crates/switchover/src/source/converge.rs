//! Auto-converge: the vCPUs are slowed down, step by step, while memory alone keeps the limit out of reach.
//!
//! ```text
//!   sync ─▶ dirtied ≥ threshold of what was sent, twice in a row?
//!             └▶ does not fit, and would without memory left to send? ─▶ throttle a step more
//! ```
//!
//! The steps are QEMU's (initial 20 %, then 10 % more, at most 99 %); its trigger looks at the bytes of two
//! syncs alone, and throttles a guest whose switchover fits already or never will because of a device.
//! Nothing is lifted before the end: a guest that is let go would undo what was gained.

use super::*;

/// A step needs so long to show what it does.
const STEP_INTERVAL: Time = Time::from_ms(300);
/// So many syncs in a row.
const STALLED_SYNCS: u32 = 2;

/// How the vCPUs are slowed down. Names are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AutoConverge {
    /// First step (`cpu-throttle-initial`): so many percent of the time no vCPU executes.
    pub initial_percent: u8,
    /// Each further step (`cpu-throttle-increment`).
    pub increment_percent: u8,
    /// The most (`max-cpu-throttle`).
    pub max_percent: u8,
    /// A sync stalls that finds so many percent of what was sent since the last one
    /// (`throttle-trigger-threshold`).
    pub threshold_percent: u8,
}

impl Default for AutoConverge {
    fn default() -> Self {
        Self { initial_percent: 20, increment_percent: 10, max_percent: 99, threshold_percent: 50 }
    }
}

/// How the vCPUs are throttled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Throttle {
    /// So many percent of the time no vCPU executes.
    pub percent: u8,
    /// The most it was in this migration.
    pub most_percent: u8,
    /// Why the VMM does not throttle, where it does not.
    pub refused: Option<String>,
}

/// What auto-converge keeps in mind.
#[derive(Clone, Debug, Default)]
pub(super) struct Converge {
    pub(super) throttle: Throttle,
    sent_bytes: u64,
    stalled: u32,
    stepped_at: Option<Time>,
}

impl Converge {
    /// Memory went out.
    pub(super) fn sent(&mut self, bytes: u64) {
        self.sent_bytes = self.sent_bytes.saturating_add(bytes);
    }

    /// A sync found so many dirty bytes.
    pub(super) fn synced(&mut self, dirty_bytes: u64, config: AutoConverge) {
        let sent = std::mem::take(&mut self.sent_bytes);
        let threshold = u128::from(sent) * u128::from(config.threshold_percent) / 100;
        let stalls = sent > 0 && u128::from(dirty_bytes) >= threshold.max(1);
        self.stalled = if stalls { self.stalled.saturating_add(1) } else { 0 };
    }

    /// The next step, where one is due.
    fn due(&self, now: Time, config: AutoConverge) -> Option<u8> {
        let at = self.throttle.percent;
        let next = match at {
            0 => config.initial_percent,
            _ => at.saturating_add(config.increment_percent),
        };
        let next = next.min(config.max_percent).min(99);
        let early = self.stepped_at.is_some_and(|then| now.since(then) < STEP_INTERVAL);
        let stalled = self.stalled >= STALLED_SYNCS && self.throttle.refused.is_none();
        (stalled && !early && next > at).then_some(next)
    }

    fn set(&mut self, percent: u8) {
        self.throttle.percent = percent;
        self.throttle.most_percent = self.throttle.most_percent.max(percent);
        self.stalled = 0;
    }

    /// The VMM answered.
    pub(super) fn answered(&mut self, answer: &Answer) {
        if let Err(failure) = answer {
            self.throttle.percent = 0;
            self.throttle.most_percent = 0;
            self.throttle.refused = Some(failure.to_string());
        }
    }
}

impl Source {
    /// No switchover is tried after this sync: slows the guest down where that is what helps.
    pub(super) fn slow_down(&mut self, now: Time, out: &mut Vec<Action>) {
        let Some(config) = self.config.auto_converge else { return };
        let Some(percent) = self.converge.due(now, config) else { return };
        if self.memory_is_to_blame(now) {
            self.converge.set(percent);
            self.converge.stepped_at = Some(now);
            out.push(Action::SetThrottle { percent });
        }
    }

    fn memory_is_to_blame(&self, now: Time) -> bool {
        if !self.handover.all_ready() || now < self.not_before || self.promise.out_of_time {
            return false;
        }
        if let Some(wants) = self.config.policy.wants(&self.view()) {
            return !wants;
        }
        // It fits, and waits for a better moment.
        if self.promise.fits_since.is_some() {
            return false;
        }
        let floor = self.estimator.floor_totals();
        !floor.unknown && self.need(&floor).time <= self.config.downtime_limit
    }

    /// The guest stays, or runs elsewhere: it is slowed down no more.
    pub(super) fn let_go(&mut self, out: &mut Vec<Action>) {
        let state = self.handover.state();
        if self.converge.throttle.percent > 0 && (state.is_end() || state == State::Cancelling) {
            self.converge.set(0);
            out.push(Action::SetThrottle { percent: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: AutoConverge = AutoConverge {
        initial_percent: 20,
        increment_percent: 10,
        max_percent: 99,
        threshold_percent: 50,
    };

    fn sync(converge: &mut Converge, sent: u64, dirty: u64) {
        converge.sent(sent);
        converge.synced(dirty, CONFIG);
    }

    #[test]
    fn two_stalled_syncs_in_a_row_make_a_step() {
        let now = Time::from_ms(10_000);
        let mut converge = Converge::default();
        sync(&mut converge, 1_000, 500);
        assert_eq!(converge.due(now, CONFIG), None, "one");
        sync(&mut converge, 1_000, 499);
        sync(&mut converge, 1_000, 900);
        assert_eq!(converge.due(now, CONFIG), None, "one after one that converged");
        sync(&mut converge, 900, 900);
        assert_eq!(converge.due(now, CONFIG), Some(20));
        // Nothing was sent, so nothing can be said; and a guest that writes nothing converges.
        sync(&mut converge, 0, 900);
        assert_eq!(converge.due(now, CONFIG), None);
        (0..2).for_each(|_| sync(&mut converge, 1, 0));
        assert_eq!(converge.due(now, CONFIG), None);
    }

    #[test]
    fn steps_go_up_to_the_most_and_no_faster_than_they_show() {
        let mut converge = Converge::default();
        let mut steps = Vec::new();
        for ms in 0..10_000 {
            sync(&mut converge, 10, 10);
            if let Some(percent) = converge.due(Time::from_ms(ms), CONFIG) {
                converge.set(percent);
                converge.stepped_at = Some(Time::from_ms(ms));
                steps.push((percent, ms));
            }
        }
        let percents: Vec<_> = steps.iter().map(|(percent, _)| *percent).collect();
        assert_eq!(percents, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        assert!(steps.windows(2).all(|pair| pair[1].1 - pair[0].1 >= 300), "{steps:?}");
    }

    #[test]
    fn a_vmm_that_does_not_throttle_is_asked_once() {
        let mut converge = Converge::default();
        (0..2).for_each(|_| sync(&mut converge, 10, 10));
        converge.set(20);
        let failure = Failure::new(crate::message::Side::Source, "this VMM does not throttle");
        converge.answered(&Err(failure));
        (0..2).for_each(|_| sync(&mut converge, 10, 10));
        assert_eq!(converge.due(Time::from_ms(60_000), CONFIG), None);
        assert_eq!((converge.throttle.percent, converge.throttle.most_percent), (0, 0));
        assert!(converge.throttle.refused.unwrap().contains("does not throttle"));
    }
}
