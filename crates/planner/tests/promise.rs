//! What the promise says and does, on single scenarios.

use device_profile::Profile;
use planner::{Burst, Device, Ended, Memory, RunResult, Scenario, run};
use switchover::Time;
use switchover::decide::Mode;
use switchover::policy::Policy;

fn scenario(profile: &str, limit_ms: u64) -> Scenario {
    let profile = Profile::builtin(profile).unwrap();
    let devices = vec![Device::new("nic0", profile)];
    Scenario { limit: Time::from_ms(limit_ms), mode: Mode::Strict, ..Scenario::new(devices) }
}

fn seeds(scenario: &Scenario, count: u64) -> Vec<RunResult> {
    (0..count).map(|seed| run(scenario, seed, Default::default()).unwrap()).collect()
}

#[test]
fn a_limit_out_of_reach_is_given_up_soon_with_the_device_and_the_limit_that_would_fit() {
    let mut moved = 0;
    for result in seeds(&scenario("xe-vf", 300), 10) {
        assert_eq!(result.ended, Ended::Stayed);
        assert!(result.total < Time::from_ms(10_000) && result.blackouts.is_empty(), "{result:?}");
        let reason = result.reason.unwrap();
        assert!(reason.contains("device nic0 alone needs"), "{reason}");
        let fits = reason.split("a limit of ").nth(2).unwrap().split(' ').next().unwrap();
        // The floor has no memory to send, and there always is some.
        let limit_ms = fits.parse::<f64>().unwrap() as u64 + 200;
        let again = run(&scenario("xe-vf", limit_ms), result.seed, Default::default()).unwrap();
        assert!(again.kept(Time::from_ms(limit_ms)));
        moved += u32::from(again.ended == Ended::Completed);
    }
    assert!(moved >= 9, "what is said to fit does: {moved} of 10");
}

#[test]
fn a_rehearsal_is_one_short_pause_that_counts_as_one() {
    let scenario = Scenario { rehearse: true, ..scenario("virtio-vf", 400) };
    for result in seeds(&scenario, 20) {
        assert_eq!(result.ended, Ended::Completed, "{result:?}");
        assert!(result.revocations >= 1 && result.roll_backs == 0, "{result:?}");
        assert!(result.blackouts[0] < Time::from_ms(60), "{result:?}");
    }
    // Skipped where the profile says that it would not fit.
    let mlx5 =
        Scenario { rehearse: true, mode: Mode::BestEffort, ..self::scenario("mlx5-vf", 200) };
    assert!(seeds(&mlx5, 3).iter().all(|result| result.revocations == 0));
}

#[test]
fn a_breathing_workload_is_moved_when_it_breathes_out() {
    let burst = Burst { period: Time::from_ms(1_000), lasts: Time::from_ms(500), times: 40.0 };
    let memory = Memory {
        bytes: 1 << 30,
        dirty_bytes_per_s: 20_000_000,
        working_set_bytes: 200_000_000,
        burst: Some(burst),
    };
    let downtimes = |memory| {
        let scenario = Scenario { memory, ..scenario("qat", 150) };
        let mut all: Vec<_> = seeds(&scenario, 60).into_iter().filter_map(|r| r.downtime).collect();
        all.sort_unstable();
        assert!(all.len() >= 55, "{}", all.len());
        all[all.len() / 2]
    };
    let (breathing, at_rest) = (downtimes(memory), downtimes(Memory { burst: None, ..memory }));
    // At its height the working set alone takes 160 ms.
    assert!(breathing < at_rest + Time::from_ms(30), "{breathing}, at rest {at_rest}");
}

#[test]
fn best_effort_goes_when_its_time_is_over_and_strict_stays() {
    let hopeless =
        Scenario { max_total_time: Some(Time::from_ms(8_000)), ..scenario("xe-vf", 300) };
    let best_effort = Scenario { mode: Mode::BestEffort, ..hopeless.clone() };
    for result in seeds(&best_effort, 5) {
        assert_eq!(result.ended, Ended::Completed);
        assert!(result.total > Time::from_ms(8_000) && result.downtime > Some(Time::from_ms(300)));
    }
    let busy =
        Memory { dirty_bytes_per_s: 3_000_000_000, working_set_bytes: 1 << 30, ..hopeless.memory };
    let strict = Scenario { memory: busy, ..scenario("qat", 100) };
    for result in seeds(&Scenario { max_total_time: hopeless.max_total_time, ..strict }, 5) {
        assert_eq!(result.ended, Ended::Stayed);
        assert!(result.reason.unwrap().contains("took longer than 8000.000 ms"));
    }
}

#[test]
fn a_peer_fails_on_late_initial_data_where_we_absorb_or_take_it_back() {
    let late = |policy| {
        let mut scenario = scenario("mlx5-vf", 600);
        scenario.devices[0].late_permille = 1_000;
        seeds(&Scenario { policy, mode: Mode::BestEffort, ..scenario }, 10)
    };
    for result in late(Policy::Qemu11) {
        let reason = result.reason.clone().unwrap_or_default();
        assert!(reason.contains("new initial data after the decision"), "{result:?}");
    }
    for result in late(Policy::Bounded) {
        assert_eq!(result.ended, Ended::Completed, "{result:?}");
    }
}
