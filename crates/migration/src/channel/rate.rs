//! The rate of the link: bytes of all data channels over time while there was always something to send.
//!
//! A burst of sends is one without a gap between them. What fills a socket at its start goes as fast as
//! memory, so once a socket was full only what follows counts; of a burst that never fills one the sender
//! itself is the slowest part, and all of it counts. Samples are short, so that a moment in which the
//! destination holds a channel up for a slow device does not spoil them all. The channels of a migration
//! share one meter: what one of them carries is not what the link does.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use switchover::Time;

/// Bytes of one sample.
const SAMPLE_BYTES: u64 = 16 << 20;
/// Samples that wait to be taken; older ones go.
const SAMPLES_MAX: usize = 64;
/// A longer pause between two sends ends a burst.
const GAP: Time = Time::from_ms(5);

/// So many bytes in so much time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateSample {
    /// Bytes sent.
    pub bytes: u64,
    /// The time for them.
    pub busy: Time,
}

impl RateSample {
    /// So many bytes at a rate that is known otherwise.
    pub(crate) fn at(self, bytes_per_s: u64) -> Self {
        let ns = u128::from(self.bytes) * 1_000_000_000 / u128::from(bytes_per_s.max(1));
        Self { busy: Time(u64::try_from(ns).unwrap_or(u64::MAX)), ..self }
    }
}

/// The link as the channels that share it measure it.
#[derive(Clone, Debug, Default)]
pub struct LinkMeter(Arc<Mutex<RateMeter>>);

impl LinkMeter {
    /// Takes the samples since the last call, oldest first.
    pub fn take(&self) -> Vec<RateSample> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn note(&self, sent: Sent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).note(sent);
    }
}

/// One send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    /// Which channel, from 0.
    pub(super) channel: u16,
    pub(super) began: Time,
    pub(super) ended: Time,
    pub(super) bytes: u64,
    /// When the socket was full for the first time, and how many of the bytes went out after that.
    pub(super) full: Option<(Time, u64)>,
}

/// Makes samples of sends.
#[derive(Debug, Default)]
struct RateMeter {
    burst: Option<Burst>,
    samples: VecDeque<RateSample>,
}

#[derive(Debug)]
struct Burst {
    since: Time,
    bytes: u64,
    /// Channels whose socket was full since the burst began, a bit for each.
    full: u64,
    ended: Time,
}

impl RateMeter {
    fn note(&mut self, sent: Sent) {
        let fresh = Burst { since: sent.began, bytes: 0, full: 0, ended: sent.began };
        let burst = self.burst.take().filter(|burst| sent.began.since(burst.ended) <= GAP);
        let mut burst = burst.unwrap_or(fresh);
        let channel = 1u64 << (sent.channel % 64);
        match sent.full {
            Some((since, bytes)) if burst.full & channel == 0 => {
                let full = burst.full | channel;
                burst = Burst { since, bytes, full, ended: burst.ended };
            }
            _ => burst.bytes = burst.bytes.saturating_add(sent.bytes),
        }
        burst.ended = burst.ended.max(sent.ended);
        if burst.bytes >= SAMPLE_BYTES {
            if self.samples.len() == SAMPLES_MAX {
                self.samples.pop_front();
            }
            let busy = sent.ended.since(burst.since);
            self.samples.push_back(RateSample { bytes: burst.bytes, busy });
            (burst.since, burst.bytes) = (sent.ended, 0);
        }
        self.burst = Some(burst);
    }

    fn take(&mut self) -> Vec<RateSample> {
        self.samples.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Sends `count` times `mib`, each in `ms`, one after the other from `at` on; the last `full_ms` of each
    /// send the socket is full, and takes in `full_mib`.
    fn send(
        meter: &mut RateMeter,
        at: u64,
        count: u64,
        (mib, ms): (u64, u64),
        full: Option<(u64, u64)>,
    ) {
        for i in 0..count {
            let (began, ended) = (Time::from_ms(at + i * ms), Time::from_ms(at + (i + 1) * ms));
            let full = full.map(|(mib, ms)| (Time(ended.0 - Time::from_ms(ms).0), mib * MIB));
            meter.note(Sent { channel: 0, began, ended, bytes: mib * MIB, full });
        }
    }

    fn rates(meter: &mut RateMeter) -> Vec<u64> {
        let samples = meter.take();
        samples.iter().map(|s| s.bytes / MIB * 1_000 / (s.busy.0 / 1_000_000)).collect()
    }

    #[test]
    fn what_fills_the_socket_does_not_count() {
        let mut meter = RateMeter::default();
        // 4 MiB in 1 ms, the socket's buffer; then 2 MiB in 20 ms, again and again: 100 MiB/s.
        send(&mut meter, 0, 1, (4, 1), None);
        send(&mut meter, 1, 32, (2, 20), Some((1, 10)));
        let rates = rates(&mut meter);
        assert_eq!(rates.len(), 3);
        assert!(rates.iter().all(|rate| (95..=105).contains(rate)), "{rates:?}");
    }

    /// Two channels that each get half of 200 MiB/s: the link is not what one of them carries, and what fills
    /// the second socket does not count either.
    #[test]
    fn channels_that_share_a_link_are_measured_together() {
        let mut meter = RateMeter::default();
        for i in 0..48u64 {
            for channel in 0..2u16 {
                let (began, ended) = (Time::from_ms(i * 20), Time::from_ms((i + 1) * 20));
                let (bytes, full) = match (i, channel) {
                    (0, 0) | (1, 1) => (6 * MIB, Some((began, 2 * MIB))),
                    _ => (2 * MIB, Some((began, 2 * MIB))),
                };
                meter.note(Sent { channel, began, ended, bytes, full });
            }
        }
        let rates = rates(&mut meter);
        assert!(rates.len() > 8, "{rates:?}");
        assert!(rates[1..].iter().all(|rate| (190..=210).contains(rate)), "{rates:?}");
        assert!((100..=210).contains(&rates[0]), "{rates:?}");
    }

    #[test]
    fn a_sender_that_is_slower_than_the_link_is_what_counts() {
        let mut meter = RateMeter::default();
        send(&mut meter, 0, 32, (1, 2), None);
        assert_eq!(rates(&mut meter), [500, 500]);
    }

    #[test]
    fn a_pause_is_no_time_of_sending_and_small_bursts_say_nothing() {
        let mut meter = RateMeter::default();
        for burst in 0..10 {
            send(&mut meter, burst * 1_000, 8, (1, 1), None);
        }
        assert_eq!(meter.take(), []);
        send(&mut meter, 20_000, 16, (1, 1), None);
        assert_eq!(rates(&mut meter), [1_000]);
    }

    #[test]
    fn a_rate_that_is_given_takes_the_place_of_what_was_measured() {
        let measured = RateSample { bytes: 16 * MIB, busy: Time::from_ms(160) };
        assert_eq!(measured.at(1_600 * MIB), RateSample { busy: Time::from_ms(10), ..measured });
        assert_eq!(RateSample { bytes: u64::MAX, ..measured }.at(0).busy, Time(u64::MAX));
    }

    #[test]
    fn samples_that_nobody_takes_are_bounded_and_the_latest_stay() {
        let mut meter = RateMeter::default();
        send(&mut meter, 0, 16 * SAMPLES_MAX as u64, (1, 1), None);
        send(&mut meter, 16 * SAMPLES_MAX as u64, 16, (1, 2), None);
        let rates = rates(&mut meter);
        assert_eq!((rates.len(), rates[SAMPLES_MAX - 1]), (SAMPLES_MAX, 500));
    }
}
