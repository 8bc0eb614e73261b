//! Scenarios drawn from seeds.

use device_profile::Profile;
use planner::{Burst, Device, Faults, Memory, Random, Scenario, scenario};
use switchover::Time;
use switchover::decide::Mode;

/// How many seeds a profile gets; `VMFERRY_SIMULATION_SEEDS` asks for more, or for less.
#[allow(dead_code, reason = "each test uses its part")]
pub fn seeds(default: u64) -> u64 {
    let asked = std::env::var("VMFERRY_SIMULATION_SEEDS").ok();
    asked.and_then(|seeds| seeds.parse().ok()).unwrap_or(default)
}

/// Anything: limits that are easy and hopeless, guests that are idle, busy or breathe, one device or
/// several, links of all kinds.
#[allow(dead_code, reason = "each test uses its part")]
pub fn drawn(profile: &Profile, mode: Mode, seed: u64) -> Scenario {
    let mut random = Random::new(seed ^ 0x5eed);
    let mut pick = |values: &[u64]| values[random.below(values.len() as u64) as usize];
    let count = pick(&[1, 1, 1, 2, 3]);
    let devices = (0..count).map(|number| Device {
        reconfigured_every: [None, Some(Time::from_ms(2_000)), Some(Time::from_ms(300))]
            [pick(&[0, 0, 1, 2]) as usize],
        late_permille: pick(&[0, 0, 300, 900]),
        ..Device::new(format!("dev{number}"), profile.clone())
    });
    let devices = devices.collect();
    let gib = 1 << 30;
    let bytes = pick(&[gib / 4, gib, 2 * gib]);
    let burst = Burst {
        period: Time::from_ms(pick(&[400, 1_500])),
        lasts: Time::from_ms(pick(&[50, 300])),
        times: pick(&[5, 20]) as f64,
    };
    Scenario {
        memory: Memory {
            bytes,
            dirty_bytes_per_s: pick(&[0, 10_000_000, 100_000_000, 600_000_000]),
            working_set_bytes: pick(&[bytes / 64, bytes / 8]),
            burst: (pick(&[0, 0, 1]) == 1).then_some(burst),
        },
        hosts: scenario::hosts(
            pick(&[125_000_000, 1_250_000_000, 3_000_000_000]),
            Time::from_us(pick(&[50, 100, 400])),
        ),
        limit: Time::from_ms(pick(&[60, 120, 200, 300, 500, 1_000, 3_000])),
        mode,
        rehearse: pick(&[0, 0, 1]) == 1,
        max_total_time: Some(Time::from_ms(15_000)),
        faults: Faults::default(),
        ..Scenario::new(devices)
    }
}
