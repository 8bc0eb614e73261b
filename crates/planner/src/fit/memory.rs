//! How much a guest writes, over how much memory, from what each sync found.
//!
//! A sync after `t` finds `W (1 − e^(−r t / W))` of a working set `W` that is written at `r`: what is written
//! twice counts once. Both are looked for on a grid, by the relative error over all syncs.

use switchover::trace::{Entry, What};

use crate::scenario::Memory;

/// Syncs that are looked at: the last ones, where the guest works as it does when it is moved.
const SYNCS_MAX: usize = 400;
/// Steps of the grid.
const STEPS: usize = 48;

/// Time since the sync before in s, and dirty bytes.
type Sync = (f64, f64);

pub(super) fn fit(bytes: u64, entries: &[Entry]) -> Memory {
    let syncs = syncs(entries);
    let (rate, set) = best(&syncs, bytes as f64);
    Memory {
        bytes,
        dirty_bytes_per_s: rate as u64,
        working_set_bytes: (set as u64).clamp(4096, bytes.max(4096)),
        burst: None,
    }
}

/// With the guest running and not slowed down all the time between two syncs.
fn syncs(entries: &[Entry]) -> Vec<Sync> {
    let mut last: Option<u64> = None;
    let mut throttled = false;
    let mut syncs = Vec::new();
    for Entry { at_us, what } in entries {
        match what {
            // The first pass takes all memory as it finds it: what is written meanwhile is in the next sync.
            What::Pass { number: 1, .. } => last = Some(*at_us),
            What::Throttle { percent } => (throttled, last) = (*percent > 0, None),
            What::PauseRequested | What::Left { .. } => last = None,
            What::PassSynced { dirty_bytes, exposed_us, took_us } => {
                // What the guest writes while the log is read is in the next sync for the most part.
                let read_at = at_us.saturating_sub(*took_us);
                if let Some(last) = last.filter(|_| !throttled) {
                    let us = exposed_us.unwrap_or(read_at.saturating_sub(last));
                    let seconds = us as f64 / 1e6;
                    syncs.push((seconds.max(1e-6), *dirty_bytes as f64));
                }
                last = Some(read_at);
            }
            _ => {}
        }
    }
    let surplus = syncs.len().saturating_sub(SYNCS_MAX);
    syncs.drain(..surplus);
    syncs
}

/// Rate in bytes/s and working set in bytes.
fn best(syncs: &[Sync], memory: f64) -> (f64, f64) {
    let most = syncs.iter().map(|(_, dirty)| *dirty).fold(0.0, f64::max);
    let fastest = syncs.iter().map(|(t, dirty)| dirty / t).fold(0.0, f64::max);
    if most <= 0.0 {
        return (0.0, 4096.0);
    }
    // Where the syncs do not tell rate and set apart, a guest that writes its memory a few times over.
    let usual = fastest * 3.0;
    let error = |rate: f64, set: f64| -> f64 {
        let unusual = 1e-4 * (rate / usual).ln().powi(2);
        let of = |(t, dirty): &Sync| {
            let expected = set * (1.0 - (-rate * t / set).exp());
            // A few pages more or less are no error; long intervals say more than short ones.
            let off = (expected - dirty) / (dirty.max(expected) + 64.0 * 4096.0);
            off * off * t.sqrt()
        };
        unusual + syncs.iter().map(of).sum::<f64>()
    };
    let grid = |from: f64, to: f64, step: usize| {
        from * (to.max(from) / from).powf(step as f64 / (STEPS - 1) as f64)
    };
    let mut best = (f64::INFINITY, fastest, memory);
    let top = memory.max(most);
    for set_step in 0..STEPS {
        let set = grid(most, top, set_step);
        for rate_step in 0..STEPS {
            let rate = grid((fastest / 1_000.0).max(1.0), fastest * 16.0, rate_step);
            let candidate = (error(rate, set), rate, set);
            if candidate.0 < best.0 {
                best = candidate;
            }
        }
    }
    // Around the best step once more, finer.
    let (_, rate, set) = best;
    for set_step in 0..STEPS {
        let set = grid((set / 1.2).max(most), set * 1.2, set_step).min(top);
        for rate_step in 0..STEPS {
            let rate = grid(rate / 1.3, rate * 1.3, rate_step);
            let candidate = (error(rate, set), rate, set);
            if candidate.0 < best.0 {
                best = candidate;
            }
        }
    }
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_working_set_are_found_again() {
        const MIB: f64 = 1_048_576.0;
        for (rate, set) in [(100.0 * MIB, 64.0 * MIB), (2_000.0 * MIB, 200.0 * MIB)] {
            let mut at_us = 0;
            let mut entries = vec![Entry { at_us, what: What::Pass { number: 1, bytes: 1 << 30 } }];
            for interval_ms in [500, 200, 100, 60, 40, 20, 20, 10, 10, 10] {
                at_us += interval_ms * 1_000;
                let t = interval_ms as f64 / 1e3;
                let dirty_bytes = (set * (1.0 - (-rate * t / set).exp())) as u64;
                entries.push(Entry {
                    at_us,
                    what: What::PassSynced { dirty_bytes, exposed_us: None, took_us: 0 },
                });
            }
            let memory = fit(1 << 30, &entries);
            let near = |found: u64, wanted: f64| (found as f64 / wanted - 1.0).abs() < 0.05;
            assert!(near(memory.dirty_bytes_per_s, rate), "{memory:?}");
            assert!(near(memory.working_set_bytes, set), "{memory:?}");
        }
    }

    #[test]
    fn an_idle_guest_writes_nothing_and_a_throttled_one_is_not_taken_for_it() {
        let sync = |at_us, dirty_bytes| Entry {
            at_us,
            what: What::PassSynced { dirty_bytes, exposed_us: None, took_us: 0 },
        };
        let idle = [sync(1_000, 0), sync(2_000, 0)];
        assert_eq!(fit(1 << 30, &idle).dirty_bytes_per_s, 0);
        let throttled = Entry { at_us: 15_000, what: What::Throttle { percent: 90 } };
        let slowed =
            [sync(0, 0), sync(10_000, 1 << 20), throttled, sync(20_000, 1), sync(30_000, 1)];
        let memory = fit(1 << 30, &slowed);
        assert!(memory.dirty_bytes_per_s > 50_000_000, "{memory:?}");
    }
}
