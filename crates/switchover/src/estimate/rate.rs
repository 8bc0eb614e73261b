//! Rates: of a device's stream, and of the link.
//!
//! A rate is kept as the time for a MiB: times of parts add up, rates do not.

use super::spread::{Draws, Order, Range, Spread};
use super::term::Basis;
use crate::time::Time;

/// Samples of a device's rate that are kept.
const RATE_SAMPLES: usize = 32;
/// A sample of fewer bytes says more of wake-ups than of the device.
const RATE_SAMPLE_MIN_BYTES: u64 = 64 * 1024;
/// Samples of the link that are kept.
const LINK_SAMPLES: usize = 8;
/// A sample of fewer bytes says more of wake-ups than of the link.
const LINK_SAMPLE_MIN_BYTES: u64 = 1 << 20;

/// The time for a MiB at that rate, in ns; at least 1.
pub(crate) fn ns_per_mib(bytes_per_s: u64) -> u64 {
    let ns = (1u128 << 20) * 1_000_000_000 / u128::from(bytes_per_s.max(1));
    ns.clamp(1, u128::from(u64::MAX)) as u64
}

/// The time for a MiB, from a measurement.
fn measured_ns_per_mib(bytes: u64, time: Time) -> u64 {
    let ns = u128::from(time.0) * (1 << 20) / u128::from(bytes.max(1));
    ns.clamp(1, u128::from(u64::MAX)) as u64
}

/// At least 1, at most what fits.
fn bytes_per_s(bytes: u64, time: Time) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / u128::from(time.0.max(1));
    rate.clamp(1, u128::from(u64::MAX)) as u64
}

/// A range of rates, in bytes per second, as times for a MiB.
pub(crate) fn as_times(rates: Range) -> Range {
    let (min, typical, max) =
        (ns_per_mib(rates.max), ns_per_mib(rates.typical), ns_per_mib(rates.min));
    Range { min, typical, max }
}

fn time_for(bytes: u64, ns_per_mib: u64) -> u64 {
    if let Some(product) = bytes.checked_mul(ns_per_mib) {
        return product >> 20;
    }
    let ns = (u128::from(bytes) * u128::from(ns_per_mib)) >> 20;
    ns.min(u128::from(u64::MAX)) as u64
}

/// What a device reads or loads: bytes over time of the recent samples without the one that slows them
/// down most. One stands out where a device does something once (the first configuration that it loads
/// makes it allocate what it needs): that time does not come again with every byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rate {
    count: u32,
    recent: [Sample; RATE_SAMPLES],
    history: u32,
    /// Before anything is measured: for all bytes. Then: for as many as a sample had.
    spread: Spread,
    /// Of all samples that count, in ns per MiB.
    mean: u64,
    sample_bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sample {
    bytes: u64,
    time: Time,
}

impl Rate {
    /// `prior` in bytes per second, `history` in ns per MiB.
    pub(crate) fn new(prior: Range, history: &[u64]) -> Self {
        let prior = as_times(prior);
        let spread = if history.is_empty() {
            Spread::of_range(prior)
        } else {
            let assumed = [(prior.min, 1), (prior.typical, 1), (prior.max, 1)];
            let seen = history.iter().map(|ns| (*ns, 2));
            Spread::of_weighted(assumed.into_iter().chain(seen).collect())
        };
        Self {
            count: 0,
            recent: [Sample::default(); RATE_SAMPLES],
            history: history.len() as u32,
            mean: spread.quantile(500),
            spread,
            sample_bytes: 0,
        }
    }

    pub(crate) fn note(&mut self, bytes: u64, time: Time) {
        if bytes < RATE_SAMPLE_MIN_BYTES || time.0 == 0 {
            return;
        }
        self.recent[self.count as usize % RATE_SAMPLES] = Sample { bytes, time };
        self.count = self.count.saturating_add(1);
        self.update();
    }

    fn update(&mut self) {
        let there = &self.recent[..(self.count as usize).min(RATE_SAMPLES)];
        let (bytes, time) = there.iter().fold((0u64, Time(0)), |(bytes, time), sample| {
            (bytes.saturating_add(sample.bytes), time + sample.time)
        });
        let without = |left_out: &Sample| {
            measured_ns_per_mib(bytes - left_out.bytes, time.since(left_out.time))
        };
        let worst = (there.len() > 1)
            .then(|| (0..there.len()).min_by_key(|index| without(&there[*index])))
            .flatten();
        self.mean =
            worst.map_or_else(|| measured_ns_per_mib(bytes, time), |worst| without(&there[worst]));
        self.sample_bytes = bytes / there.len() as u64;
        let kept = there.iter().enumerate().filter(|(index, _)| Some(*index) != worst);
        let times = kept.map(|(_, sample)| (measured_ns_per_mib(sample.bytes, sample.time), 1));
        self.spread = Spread::of_weighted(times.collect());
    }

    /// How long `bytes` and `more_bytes` take together: as many as a sample had by a draw, more by the mean,
    /// since what varies from sample to sample evens out over many.
    pub(crate) fn draws(&self, bytes: &Draws, more_bytes: u64, order: Order) -> Draws {
        let mut draws = self.spread.draws(order);
        for (drawn, bytes) in draws.iter_mut().zip(bytes) {
            *drawn = self.time_at(bytes.saturating_add(more_bytes), *drawn);
        }
        draws
    }

    fn time_at(&self, bytes: u64, drawn: u64) -> u64 {
        if self.count == 0 {
            return time_for(bytes, drawn);
        }
        let first = bytes.min(self.sample_bytes);
        time_for(first, drawn).saturating_add(time_for(bytes - first, self.mean))
    }

    /// How long so many take by the mean.
    pub(crate) fn time(&self, bytes: u64) -> Time {
        Time(time_for(bytes, self.mean))
    }

    pub(crate) fn basis(&self) -> Basis {
        Basis::of(self.count, self.history)
    }

    /// What this migration measured, in ns per MiB.
    pub(crate) fn measured(&self) -> Option<u64> {
        (self.count > 0).then_some(self.mean)
    }
}

/// What the link carries: the better half of its recent rates. A channel is also slow while the
/// destination holds it up for a slow device, so a low sample need not be the link's doing.
/// Without new samples the recent ones go one by one, and what is left is the average of all there were:
/// passes that have become small sample nothing, and must not leave a bad moment standing for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    count: u32,
    recent_bytes_per_s: [u64; LINK_SAMPLES],
    /// A sample came since the last fading.
    fresh: bool,
    total_bytes: u64,
    total_busy: Time,
    prior_bytes_per_s: u64,
    history: u32,
    spread: Spread,
}

impl Link {
    /// `prior` in bytes per second, `history` in ns per MiB.
    pub(crate) fn new(prior: Range, history: &[u64]) -> Self {
        let rate = Rate::new(prior, history);
        Self {
            count: 0,
            recent_bytes_per_s: [0; LINK_SAMPLES],
            fresh: false,
            total_bytes: 0,
            total_busy: Time(0),
            prior_bytes_per_s: bytes_per_s(1 << 20, Time(rate.mean)),
            history: rate.history,
            spread: rate.spread,
        }
    }

    pub(crate) fn note(&mut self, bytes: u64, busy: Time) {
        if bytes < LINK_SAMPLE_MIN_BYTES || busy.0 == 0 {
            return;
        }
        self.fresh = true;
        self.total_bytes = self.total_bytes.saturating_add(bytes);
        self.total_busy = self.total_busy + busy;
        let place = self.count as usize % LINK_SAMPLES;
        self.recent_bytes_per_s[place] = bytes_per_s(bytes, busy);
        self.count = self.count.saturating_add(1);
        self.update();
    }

    pub(crate) fn bytes_per_s(&self) -> u64 {
        match self.recent_bytes_per_s.iter().copied().max() {
            Some(best) if best > 0 => best,
            _ if self.total_busy.0 > 0 => bytes_per_s(self.total_bytes, self.total_busy),
            _ => self.prior_bytes_per_s,
        }
    }

    /// How long so many take, as expected.
    pub(crate) fn time(&self, bytes: u64) -> Time {
        Time(time_for(bytes, ns_per_mib(self.bytes_per_s())))
    }

    pub(crate) fn fade(&mut self) {
        if std::mem::take(&mut self.fresh) || self.count == 0 {
            return;
        }
        // From the place that is written next on, the first that is there is the oldest.
        let next = self.count as usize % LINK_SAMPLES;
        let (newer, older) = self.recent_bytes_per_s.split_at_mut(next);
        let oldest = older.iter_mut().chain(newer).find(|rate| **rate > 0);
        if let Some(oldest) = oldest {
            *oldest = 0;
            self.update();
        }
    }

    fn update(&mut self) {
        let mut rates = self.recent_bytes_per_s;
        rates.sort_unstable_by(|a, b| b.cmp(a));
        let there = rates.iter().filter(|rate| **rate > 0).count();
        let kept = rates[..there.div_ceil(2)].iter().map(|rate| (ns_per_mib(*rate), 1));
        let mut times: Vec<_> = kept.collect();
        if times.is_empty() {
            times.push((ns_per_mib(self.bytes_per_s()), 1));
        }
        self.spread = Spread::of_weighted(times);
    }

    pub(crate) fn draws(&self, bytes: &Draws, order: Order) -> Draws {
        let mut draws = self.spread.draws(order);
        for (drawn, bytes) in draws.iter_mut().zip(bytes) {
            *drawn = time_for(*bytes, *drawn);
        }
        draws
    }

    pub(crate) fn basis(&self) -> Basis {
        Basis::of(self.count, self.history)
    }

    /// What this migration measured, in ns per MiB.
    pub(crate) fn measured(&self) -> Option<u64> {
        (self.count > 0).then(|| ns_per_mib(self.bytes_per_s()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: Range = Range::exactly(1_000_000_000);
    const ORDER: Order = Order::new(0);

    #[test]
    fn a_bad_moment_of_the_link_does_not_stand_for_ever() {
        let mut link = Link::new(GB, &[]);
        link.note(64 << 20, Time::from_ms(100));
        for _ in 0..LINK_SAMPLES {
            link.note(1 << 20, Time::from_ms(100));
        }
        let bad = 10 << 20;
        assert_eq!(link.bytes_per_s(), bad);
        link.fade();
        // A link that goes on being sampled is what its samples say.
        link.note(1 << 20, Time::from_ms(100));
        link.fade();
        assert_eq!(link.bytes_per_s(), bad);
        for _ in 0..LINK_SAMPLES - 1 {
            link.fade();
            assert_eq!(link.bytes_per_s(), bad);
        }
        link.fade();
        assert_eq!(link.bytes_per_s(), 73 << 20, "73 MiB in a second");
        assert!(link.draws(&[73 << 20; _], ORDER)[0].abs_diff(1_000_000_000) < 1_000);
    }

    #[test]
    fn a_channel_held_up_by_a_slow_device_does_not_slow_the_link() {
        let mut link = Link::new(GB, &[]);
        link.note(64 << 20, Time::from_ms(32));
        let rate = link.bytes_per_s();
        link.note(2 << 20, Time::from_ms(1_400));
        assert_eq!(link.bytes_per_s(), rate);
        assert!(link.draws(&[64 << 20; _], ORDER).iter().all(|ns| *ns < 33_000_000));
        // A link that became slow shows once its better days are forgotten.
        for _ in 0..LINK_SAMPLES {
            link.note(10_000_000, Time::from_ms(1_000));
        }
        assert_eq!(link.bytes_per_s(), 10_000_000);
    }

    #[test]
    fn what_a_device_does_once_is_no_rate_and_a_device_that_has_become_slow_is_believed() {
        let chunk = 1 << 20;
        let mut rate = Rate::new(GB, &[]);
        for number in 1..=40 {
            // The fourth and the last but one are held up, by far.
            rate.note(chunk, Time::from_ms(if number == 4 || number == 39 { 320 } else { 1 }));
        }
        let worst = |rate: &Rate| rate.draws(&[28 * chunk; _], 0, ORDER).into_iter().max();
        assert!(worst(&rate) < Some(40_000_000), "{:?}", worst(&rate));
        // What goes on is no exception.
        (0..16).for_each(|_| rate.note(chunk, Time::from_ms(100)));
        assert!(worst(&rate) > Some(500_000_000), "{:?}", worst(&rate));
    }

    #[test]
    fn before_anything_is_measured_history_speaks_and_before_that_the_prior() {
        let slow = Range { min: 10_000_000, typical: 100_000_000, max: 1_000_000_000 };
        let mut draws = Rate::new(slow, &[]).draws(&[1 << 20; _], 0, ORDER);
        draws.sort_unstable();
        assert!((10_000_000..11_500_000).contains(&draws[128]), "{}", draws[128]);
        assert!(draws[255] > 80_000_000, "{}", draws[255]);
        let known = Rate::new(slow, &[1_000_000; 20]);
        assert_eq!(known.basis(), Basis::History(20));
        assert_eq!(known.spread.quantile(500), 1_000_000);
    }
}
