//! What an estimate costs: the brain makes one whenever something is decided, at most at 1 kHz.
//!
//! `cargo run --release -p switchover --example estimate_cost`

use std::time::Instant;

use switchover::Time;
use switchover::estimate::{Ahead, Estimator, Knowledge};
use switchover::message::DeviceIndex;

fn main() {
    const ROUNDS: u32 = 2_000;
    for devices in [0u16, 1, 2, 4, 8] {
        let mut estimator = Estimator::new(devices.into(), Knowledge::default(), 990);
        for device in (0..devices).map(DeviceIndex) {
            estimator.device_remaining(device, Some(20_000_000));
            (0..40).for_each(|_| estimator.device_read(device, 1 << 20, Time::from_ms(1)));
        }
        let mut best = |make: fn(&Estimator) -> u64| {
            let rounds = (0..5).map(|_| {
                let begun = Instant::now();
                let mut sum = 0;
                for round in 0..ROUNDS {
                    estimator.ram_dirty(u64::from(round), 1_000_000);
                    sum += make(&estimator);
                }
                assert!(sum > 0);
                begun.elapsed().as_nanos() / u128::from(ROUNDS)
            });
            rounds.min().unwrap_or(0) as f64 / 1e3
        };
        let totals = best(|e| e.totals(Ahead::All, Time::from_ms(1)).known_upper.0);
        let terms = best(|e| e.estimate(Ahead::All, Time::from_ms(1)).known_upper.0);
        println!("{devices} devices: {totals:.1} µs for the totals, {terms:.1} µs with every term");
    }
}
