//! The rate of a data channel: bytes over time while there was always something to send.
//!
//! A burst of sends is one without a gap between them. What fills the socket at its start goes as fast as
//! memory, so once the socket was full only what follows counts; of a burst that never fills it the sender
//! itself is the slowest part, and all of it counts. Samples are short, so that a moment in which the
//! destination holds the channel up for a slow device does not spoil them all.

use std::collections::VecDeque;

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

/// One send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) began: Time,
    pub(super) ended: Time,
    pub(super) bytes: u64,
    /// When the socket was full for the first time, and how many of the bytes went out after that.
    pub(super) full: Option<(Time, u64)>,
}

/// Makes samples of sends.
#[derive(Debug, Default)]
pub(super) struct RateMeter {
    burst: Option<Burst>,
    samples: VecDeque<RateSample>,
}

#[derive(Debug)]
struct Burst {
    since: Time,
    bytes: u64,
    was_full: bool,
    ended: Time,
}

impl RateMeter {
    pub(super) fn note(&mut self, sent: Sent) {
        let fresh = Burst { since: sent.began, bytes: 0, was_full: false, ended: sent.began };
        let burst = self.burst.take().filter(|burst| sent.began.since(burst.ended) <= GAP);
        let mut burst = burst.unwrap_or(fresh);
        match sent.full {
            Some((since, bytes)) if !burst.was_full => {
                burst = Burst { since, bytes, was_full: true, ended: sent.ended };
            }
            _ => burst.bytes = burst.bytes.saturating_add(sent.bytes),
        }
        burst.ended = sent.ended;
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

    pub(super) fn take(&mut self) -> Vec<RateSample> {
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
            meter.note(Sent { began, ended, bytes: mib * MIB, full });
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
    fn samples_that_nobody_takes_are_bounded_and_the_latest_stay() {
        let mut meter = RateMeter::default();
        send(&mut meter, 0, 16 * SAMPLES_MAX as u64, (1, 1), None);
        send(&mut meter, 16 * SAMPLES_MAX as u64, 16, (1, 2), None);
        let rates = rates(&mut meter);
        assert_eq!((rates.len(), rates[SAMPLES_MAX - 1]), (SAMPLES_MAX, 500));
    }
}
