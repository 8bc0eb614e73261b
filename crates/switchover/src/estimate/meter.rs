//! A duration that is measured now and then.

use super::spread::{Range, Spread};
use super::term::Basis;
use crate::time::Time;

/// Measurements of this migration that are kept.
const RECENT: usize = 24;
/// Weight of a measurement of this migration; one of an earlier migration weighs 1.
const RECENT_WEIGHT: u32 = 4;
/// The prior as values of weight 1 among the measurements: it never vanishes, and fades with each.
const PRIOR_VALUES: u32 = 4;

/// The measurements of one thing: the prior among those of earlier migrations and of this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meter {
    prior: Range,
    history: Vec<u64>,
    recent: [u64; RECENT],
    count: u32,
    spread: Spread,
}

impl Meter {
    pub(crate) fn new(prior: Range, history: &[u64]) -> Self {
        let spread = Spread::of_range(prior);
        let mut meter =
            Self { prior, history: history.to_vec(), recent: [0; RECENT], count: 0, spread };
        if !history.is_empty() {
            meter.update();
        }
        meter
    }

    pub(crate) fn note(&mut self, value: u64) {
        self.recent[self.count as usize % RECENT] = value;
        self.count = self.count.saturating_add(1);
        self.update();
    }

    /// Time goes by without a new value: what was worse than anything expected is believed less and less.
    pub(crate) fn fade(&mut self) {
        let max = self.prior.max;
        let worse = |value: &&mut u64| **value > max;
        let mut faded = false;
        for value in self.recent_mut().iter_mut().filter(worse) {
            (*value, faded) = ((*value - *value / 4).max(max), true);
        }
        if faded {
            self.update();
        }
    }

    pub(crate) fn spread(&self) -> &Spread {
        &self.spread
    }

    pub(crate) fn basis(&self) -> Basis {
        Basis::of(self.count, self.history.len() as u32)
    }

    /// What this migration measured, for the next.
    pub(crate) fn recent(&self) -> &[u64] {
        &self.recent[..(self.count as usize).min(RECENT)]
    }

    /// The most that was ever seen, once it was seen often enough to mean something.
    pub(crate) fn worst(&self, least: usize) -> Option<Time> {
        let seen = self.history.iter().chain(self.recent());
        if self.history.len() + self.recent().len() < least {
            return None;
        }
        seen.max().map(|worst| Time(*worst))
    }

    fn recent_mut(&mut self) -> &mut [u64] {
        let there = (self.count as usize).min(RECENT);
        &mut self.recent[..there]
    }

    fn update(&mut self) {
        let mut values = Vec::with_capacity(RECENT + self.history.len() + PRIOR_VALUES as usize);
        let middle = |i: u32| (f64::from(i) + 0.5) / f64::from(PRIOR_VALUES);
        values.extend((0..PRIOR_VALUES).map(|i| (self.prior.at(middle(i)), 1)));
        values.extend(self.history.iter().map(|value| (*value, 1)));
        values.extend(self.recent().iter().map(|value| (*value, RECENT_WEIGHT)));
        self.spread = Spread::of_weighted(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIOR: Range = Range { min: 1_000, typical: 2_000, max: 10_000 };

    #[test]
    fn measurements_outweigh_the_prior_and_name_themselves() {
        let mut meter = Meter::new(PRIOR, &[]);
        assert_eq!((meter.basis(), meter.spread().quantile(500)), (Basis::Prior, 1_992));
        for _ in 0..RECENT {
            meter.note(500);
        }
        assert_eq!((meter.basis(), meter.spread().quantile(500)), (Basis::Measured(24), 500));
        // What was assumed at first is still thought possible, and hardly.
        assert!(meter.spread().quantile(990) > 500 && meter.spread().quantile(900) == 500);
    }

    #[test]
    fn history_counts_until_there_is_better() {
        let mut meter = Meter::new(PRIOR, &[9_000; 30]);
        assert_eq!((meter.basis(), meter.spread().quantile(500)), (Basis::History(30), 9_000));
        assert_eq!(meter.worst(8), Some(Time(9_000)));
        (0..RECENT).for_each(|_| meter.note(700));
        assert_eq!(meter.spread().quantile(500), 700);
    }

    #[test]
    fn what_was_slow_once_is_believed_less_and_less() {
        let mut meter = Meter::new(PRIOR, &[]);
        meter.note(1_000_000);
        assert_eq!(meter.spread().quantile(990), 1_000_000);
        (0..40).for_each(|_| meter.fade());
        assert_eq!(meter.spread().quantile(990), PRIOR.max);
    }
}
