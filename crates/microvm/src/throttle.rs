//! Slows the guest down: in each period of 20 ms no vCPU executes for a part of it.
//!
//! ```text
//!   |<-------- 20 ms -------->|
//!   |  held   |     runs      |  held   |     runs      |      30 %
//! ```
//!
//! Short periods, so that a guest at 99 % still lives: it executes for 0.2 ms of every 20. The phase follows
//! from the clock alone; who executes the guest asks [`Throttle::rest`] and keeps off meanwhile. A pause does
//! not wait for it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// Most percent of the time that the guest is held.
pub(crate) const PERCENT_MAX: u8 = 99;
const PERIOD_NS: u64 = 20_000_000;

/// How much the guest is slowed down.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    percent: AtomicU8,
}

impl Throttle {
    /// Holds the guest for so many percent of the time from now on; capped.
    pub(crate) fn set(&self, percent: u8) {
        self.percent.store(percent.min(PERCENT_MAX), Ordering::Release);
    }

    /// So many percent.
    pub(crate) fn percent(&self) -> u8 {
        self.percent.load(Ordering::Acquire)
    }

    /// How long the guest must still keep off, if it must.
    pub(crate) fn rest(&self, now_ns: u64) -> Option<Duration> {
        let held_ns = PERIOD_NS / 100 * u64::from(self.percent());
        let phase_ns = now_ns % PERIOD_NS;
        (phase_ns < held_ns).then(|| Duration::from_nanos(held_ns - phase_ns))
    }

    /// How long until the next period begins.
    pub(crate) fn until_period(now_ns: u64) -> Duration {
        Duration::from_nanos(PERIOD_NS - now_ns % PERIOD_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_keeps_off_for_its_part_of_every_period() {
        for percent in [0, 1, 20, 50, 99, 100] {
            let throttle = Throttle::default();
            throttle.set(percent);
            let step_ns = 50_000;
            let held = (0..4_000).filter(|i| throttle.rest(i * step_ns).is_some()).count();
            assert_eq!(held, 40 * usize::from(percent.min(PERCENT_MAX)), "{percent} %");
        }
    }

    #[test]
    fn a_rest_ends_where_the_guest_may_go_on() {
        let throttle = Throttle::default();
        throttle.set(30);
        let now_ns = 7 * PERIOD_NS + 1_000_000;
        let rest = throttle.rest(now_ns).unwrap();
        assert_eq!(rest, Duration::from_millis(5));
        assert_eq!(throttle.rest(now_ns + rest.as_nanos() as u64), None);
        assert_eq!(Throttle::until_period(now_ns), Duration::from_millis(19));
    }
}
