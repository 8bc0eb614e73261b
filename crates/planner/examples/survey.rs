//! Every profile in one table: `cargo run --release -p planner --example survey [SEEDS] [LIMIT-MS] [PROFILE…]`

use std::collections::BTreeMap;
use std::time::Instant;

use planner::{Device, Ended, Scenario, run};
use switchover::Time;
use switchover::decide::Mode;

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let number = |place: usize, default| {
        args.get(place).map_or(default, |arg| arg.parse().unwrap_or(default))
    };
    let (seeds, limit) = (number(0, 200), number(1, 300));
    let asked = args.get(2..).unwrap_or_default();
    let names = device_profile::BUILTIN_NAMES.iter().chain(device_profile::ADVERSARIAL_NAMES);
    for name in names.filter(|name| asked.is_empty() || asked.iter().any(|asked| asked == *name)) {
        for mode in [Mode::BestEffort, Mode::Strict] {
            let profile = device_profile::Profile::builtin(name).expect("it comes along");
            let scenario = Scenario {
                limit: Time::from_ms(limit),
                mode,
                ..Scenario::new(vec![Device::new("nic0", profile)])
            };
            let begun = Instant::now();
            let (mut ended, mut reasons) = (BTreeMap::new(), BTreeMap::<_, u64>::new());
            let (mut over, mut named, mut events) = (0, 0, 0);
            let mut downtimes = Vec::new();
            for seed in 0..seeds {
                let result = run(&scenario, seed, Default::default()).expect("known quirks");
                *ended.entry(result.ended).or_insert(0u64) += 1;
                events += result.events;
                if !result.kept(scenario.limit) {
                    over += 1;
                    named += u64::from(!result.overruns.is_empty());
                }
                if let Some(broken) = &result.broken {
                    println!("  {name} seed {seed}: {broken}");
                }
                if let Some(reason) = result.reason {
                    *reasons
                        .entry(reason.chars().filter(|c| !c.is_ascii_digit()).collect::<String>())
                        .or_default() += 1;
                }
                downtimes.extend(result.downtime);
            }
            downtimes.sort_unstable();
            let per_s = seeds as f64 / begun.elapsed().as_secs_f64();
            let middle = downtimes.get(downtimes.len() / 2).copied().unwrap_or_default();
            let completed = ended.get(&Ended::Completed).copied().unwrap_or(0);
            println!(
                "{name:22} {mode:?}: {completed}/{seeds} completed, {over} over ({named} named), P50 {middle}, max {}, \
                 {per_s:.0}/s, {} events each",
                downtimes.last().copied().unwrap_or_default(),
                events / seeds.max(1)
            );
            for (reason, times) in reasons {
                println!("    {times} × {ended:?} {reason}");
            }
        }
    }
}
