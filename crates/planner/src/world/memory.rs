//! A guest's memory: how much of it is dirty.

use switchover::Time;

use crate::scenario::Memory;

/// Pages that are written again and again: after so many writes, so many different ones.
#[derive(Clone, Debug)]
pub(super) struct DirtyMemory {
    memory: Memory,
    /// Shifts the bursts.
    phase: Time,
    runs: bool,
    /// So many percent of the time no vCPU executes.
    throttle_percent: u8,
    since: Time,
    /// Bytes written since the last collection.
    written: f64,
    /// Collected and not sent.
    pub(super) collected_bytes: u64,
}

impl DirtyMemory {
    pub(super) fn new(memory: Memory, phase: Time) -> Self {
        Self {
            memory,
            phase,
            runs: true,
            throttle_percent: 0,
            since: Time(0),
            written: 0.0,
            collected_bytes: memory.bytes,
        }
    }

    /// The guest runs, or stands, from `now` on.
    pub(super) fn set_runs(&mut self, runs: bool, now: Time) {
        self.pass(now);
        self.runs = runs;
    }

    /// The guest writes so many percent less from `now` on.
    pub(super) fn set_throttle(&mut self, percent: u8, now: Time) {
        self.pass(now);
        self.throttle_percent = percent.min(100);
    }

    /// It is slowed down.
    pub(super) fn is_throttled(&self) -> bool {
        self.throttle_percent > 0
    }

    /// Collects what was written; what was collected before and not sent stays.
    pub(super) fn collect(&mut self, now: Time) -> u64 {
        self.pass(now);
        let set = self.memory.working_set_bytes.min(self.memory.bytes) as f64;
        let unique = if set > 0.0 { set * (1.0 - (-self.written / set).exp()) } else { 0.0 };
        self.written = 0.0;
        let pages = (unique as u64).div_ceil(4096) * 4096;
        self.collected_bytes = (self.collected_bytes + pages).min(self.memory.bytes);
        self.collected_bytes
    }

    /// So much of what was collected is sent.
    pub(super) fn sent(&mut self, bytes: u64) {
        self.collected_bytes = self.collected_bytes.saturating_sub(bytes);
    }

    /// What was sent in an attempt that does not count is dirty again.
    pub(super) fn restore(&mut self, bytes: u64) {
        self.collected_bytes = self.collected_bytes.max(bytes.min(self.memory.bytes));
    }

    fn pass(&mut self, now: Time) {
        let (from, to) = (self.since + self.phase, now + self.phase);
        self.since = now;
        if !self.runs || to <= from {
            return;
        }
        let mut seconds = to.since(from).0 as f64 / 1e9;
        if let Some(burst) = self.memory.burst {
            let on = |at: Time| {
                let period = burst.period.0.max(1);
                let (whole, rest) = (at.0 / period, at.0 % period);
                let lasts = burst.lasts.0.min(period);
                (whole * lasts + rest.min(lasts)) as f64 / 1e9
            };
            seconds += (on(to) - on(from)) * (burst.times - 1.0);
        }
        let share = f64::from(100 - self.throttle_percent) / 100.0;
        self.written += seconds.max(0.0) * self.memory.dirty_bytes_per_s as f64 * share;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Burst;

    const MEMORY: Memory = Memory {
        bytes: 1 << 30,
        dirty_bytes_per_s: 100_000_000,
        working_set_bytes: 50_000_000,
        burst: None,
    };

    #[test]
    fn the_working_set_is_the_most_that_gets_dirty() {
        let mut dirty = DirtyMemory::new(MEMORY, Time(0));
        assert_eq!(dirty.collected_bytes, 1 << 30, "the first pass takes all");
        dirty.sent(1 << 30);
        let short = dirty.collect(Time::from_ms(10));
        assert!((980_000..1_010_000).contains(&short), "{short}");
        dirty.sent(short);
        let long = dirty.collect(Time::from_ms(60_000));
        assert!((49_900_000..50_010_000).contains(&long), "{long}");
        dirty.set_runs(false, Time::from_ms(60_000));
        assert_eq!(dirty.collect(Time::from_ms(90_000)), long, "it stands");
    }

    #[test]
    fn bursts_write_more_while_they_last() {
        let burst = Burst { period: Time::from_ms(1000), lasts: Time::from_ms(100), times: 5.0 };
        let mut dirty = DirtyMemory::new(Memory { burst: Some(burst), ..MEMORY }, Time(0));
        dirty.sent(1 << 30);
        let within = dirty.collect(Time::from_ms(10));
        dirty.sent(within);
        dirty.collect(Time::from_ms(500));
        dirty.sent(1 << 30);
        let outside = dirty.collect(Time::from_ms(510));
        assert!(within > outside * 4, "{within} and {outside}");
    }
}
