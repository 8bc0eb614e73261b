//! A limit of the bandwidth: a token bucket that all data channels of a migration share.
//!
//! Holds while the guest runs. While it stands still nothing is limited ([`BandwidthLimit::lift`]): every byte
//! that waits then is downtime, which is also how QEMU does it. Waiting counts as time of sending, so the rate
//! that the link is measured at is the limit while there is one: the estimate promises no more than was seen.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use switchover::Time;

use crate::clock;

/// So much may be saved up while nothing is sent, as time.
const BURST: Time = Time::from_ms(20);

/// The limit of a migration's data channels together.
#[derive(Clone, Debug, Default)]
pub struct BandwidthLimit(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// 0 = no limit.
    bytes_per_s: u64,
    lifted: bool,
    /// When all that was let through has had its time.
    paid_until: Time,
}

impl Bucket {
    /// Lets `bytes` through and answers how long they have to wait.
    fn take(&mut self, now: Time, bytes: u64) -> Time {
        if self.lifted || self.bytes_per_s == 0 {
            return Time(0);
        }
        let begin = self.paid_until.max(Time(now.0.saturating_sub(BURST.0)));
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s);
        self.paid_until = begin + Time(u64::try_from(ns).unwrap_or(u64::MAX));
        begin.since(now)
    }
}

impl BandwidthLimit {
    /// At most `bytes_per_s` from now on; 0 = no limit.
    pub fn set(&self, bytes_per_s: u64) {
        self.change(|bucket| {
            (bucket.bytes_per_s, bucket.paid_until) = (bytes_per_s, Time(0));
        });
    }

    /// Nothing is limited while this is so; whoever waits goes on at once.
    pub fn lift(&self, lifted: bool) {
        self.change(|bucket| (bucket.lifted, bucket.paid_until) = (lifted, Time(0)));
    }

    /// The guest stands still: see [`lift`](Self::lift).
    pub(super) fn is_lifted(&self) -> bool {
        self.0.bucket.lock().unwrap_or_else(PoisonError::into_inner).lifted
    }

    fn change(&self, change: impl FnOnce(&mut Bucket)) {
        change(&mut self.0.bucket.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.changed.notify_all();
    }

    /// Waits until `bytes` may be sent.
    pub(super) fn take(&self, bytes: u64) {
        let mut bucket = self.0.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::now();
        let until = now + bucket.take(now, bytes);
        let paid_until = bucket.paid_until;
        loop {
            let left = until.since(clock::now());
            // Another limit, or none: what was reckoned does not hold any more.
            let changed = bucket.paid_until < paid_until;
            if left == Time(0) || changed || bucket.lifted || bucket.bytes_per_s == 0 {
                return;
            }
            let waited = self.0.changed.wait_timeout(bucket, Duration::from_nanos(left.0));
            bucket = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn limited(bytes_per_s: u64) -> Bucket {
        Bucket { bytes_per_s, ..Bucket::default() }
    }

    #[test]
    fn over_time_exactly_the_limit_goes_through() {
        let mut bucket = limited(100 * MB);
        let begin = Time::from_ms(1_000);
        let mut now = begin;
        for _ in 0..1_000 {
            now = now + bucket.take(now, MB);
        }
        // A thousand MB in ten seconds; the first few were saved up.
        let took = now.since(begin);
        assert!((9_960..=10_000).contains(&(took.0 / 1_000_000)), "{took:?}");
    }

    #[test]
    fn no_more_is_saved_up_than_a_moments_worth() {
        let mut bucket = limited(100 * MB);
        bucket.take(Time::from_ms(1_000), MB);
        let now = Time::from_ms(60_000);
        // 20 ms hold 2 MB: the third has to wait for all three.
        assert_eq!(bucket.take(now, MB), Time(0));
        assert_eq!(bucket.take(now, MB), Time(0));
        assert_eq!(bucket.take(now, MB), Time(0));
        assert_eq!(bucket.take(now, MB), Time::from_ms(10));
    }

    #[test]
    fn without_a_limit_and_while_it_is_lifted_nothing_waits() {
        for mut bucket in [limited(0), Bucket { lifted: true, ..limited(1) }] {
            for _ in 0..10 {
                assert_eq!(bucket.take(Time::from_ms(5), u64::MAX), Time(0));
            }
        }
    }

    #[test]
    fn who_waits_goes_on_when_the_limit_is_lifted_or_raised() {
        for change in
            [|limit: &BandwidthLimit| limit.lift(true), |limit: &BandwidthLimit| limit.set(0)]
        {
            let limit = BandwidthLimit::default();
            limit.set(1);
            // So much that it would take for ever.
            limit.take(MB * MB);
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| limit.take(1));
                change(&limit);
                waiting.join().unwrap();
            });
        }
    }
}
