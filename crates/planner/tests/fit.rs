//! A trace of one migration is enough to plan the next: what is fitted from one simulated run predicts the others.

use std::sync::atomic::{AtomicBool, AtomicU64};

use device_profile::Profile;
use planner::{Device, Ended, Memory, Options, Plan, Scenario, fit, plan, run_traced};
use switchover::Time;

fn simulate(scenario: &Scenario) -> Plan {
    let options = Options { runs: 60, seed: 1_000, ..Options::default() };
    plan(scenario, options, &AtomicU64::new(0), &AtomicBool::new(false)).unwrap()
}

fn scenario(profiles: &[&str], memory: Memory) -> Scenario {
    let device = |(place, name): (usize, &&str)| {
        Device::new(format!("dev{place}"), Profile::builtin(name).unwrap())
    };
    let devices = profiles.iter().enumerate().map(device).collect();
    Scenario { memory, limit: Time::from_ms(2_000), ..Scenario::new(devices) }
}

const MEMORY: Memory = Memory {
    bytes: 2 << 30,
    dirty_bytes_per_s: 200_000_000,
    working_set_bytes: 128 << 20,
    burst: None,
};

#[test]
fn what_one_run_showed_predicts_the_others() {
    for profiles in [
        &[][..],
        &["virtio-vf"],
        &["mlx5-vf"],
        &["qat"],
        &["pds"],
        &["hisi-acc"],
        &["nvme-vf"],
        &["mlx5-vf", "virtio-vf"],
    ] {
        let asked = scenario(profiles, MEMORY);
        let original = simulate(&asked).downtime.unwrap();
        let mut ratios = Vec::new();
        for seed in 1..=5 {
            let (result, trace) = run_traced(&asked, seed, Default::default()).unwrap();
            assert_eq!(result.ended, Ended::Completed, "{profiles:?}: {result:?}");
            let fitted = fit::scenario(&trace).unwrap();
            assert_eq!(fitted.limit, asked.limit);
            let again = simulate(&fitted);
            assert_eq!(again.completed, again.runs, "{profiles:?}: {:?}", again.reasons);
            ratios.push(again.downtime.unwrap().p50_ms / original.p50_ms);
        }
        ratios.sort_by(f64::total_cmp);
        println!(
            "{profiles:?}: P50 {:.1} ms, planned from one trace {ratios:.2?} of it",
            original.p50_ms
        );
        // One run is one draw of every time: the middle of five is near, and none is far.
        assert!((0.67..=1.5).contains(&ratios[2]), "{profiles:?}: {ratios:?}");
        assert!(ratios[0] > 0.4 && ratios[4] < 2.5, "{profiles:?}: {ratios:?}");
    }
}

#[test]
fn rates_and_sizes_are_found_again() {
    // A limit that needs a few passes: one sync alone does not tell how much is written again and again.
    let memory = Memory { working_set_bytes: 512 << 20, ..MEMORY };
    let asked = Scenario { limit: Time::from_ms(400), ..scenario(&["mlx5-vf"], memory) };
    let (_, trace) = run_traced(&asked, 3, Default::default()).unwrap();
    let fitted = fit::scenario(&trace).unwrap();
    let near = |what: &str, found: u64, wanted: u64, off: f64| {
        let ratio = found as f64 / wanted as f64;
        println!("{what}: {found} for {wanted}");
        assert!((ratio - 1.0).abs() <= off, "{what}: {found}, and not {wanted}");
    };
    near("dirty rate", fitted.memory.dirty_bytes_per_s, memory.dirty_bytes_per_s, 0.25);
    near("working set", fitted.memory.working_set_bytes, memory.working_set_bytes, 0.35);
    let (was, is) = (&asked.devices[0].profile, &fitted.devices[0].profile);
    near("total", is.sizes.total_bytes.typical, was.sizes.total_bytes.typical, 0.1);
    near("initial", is.sizes.initial_bytes.typical, was.sizes.initial_bytes.typical, 0.1);
    near("stop-only", is.sizes.stop_only_bytes.typical, was.sizes.stop_only_bytes.typical, 0.1);
    near("cold load", is.times.load_cold_us.typical, was.times.load_cold_us.typical, 0.2);
    assert!(is.features.p2p.value && is.features.data_size.value);
}
