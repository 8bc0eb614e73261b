//! The promise, where a directed look says more than a simulation (those are in `planner`).

use switchover::Time;
use switchover::decide::Mode;
use switchover::estimate::{DeviceBounds, DeviceKnowledge, Knowledge};
use switchover::handover::DeviceTraits;
use switchover::message::{Features, Id};
use switchover::policy::Policy;
use switchover::source::{Config, Setup, Source};

fn source(config: Config, devices: Vec<DeviceKnowledge>) -> Source {
    let traits = DeviceTraits { pre_copy: true, p2p: true };
    let setup = Setup {
        migration: Id(1),
        instance: Id(2),
        features: Features::default(),
        description: String::new(),
        devices: vec![traits; devices.len()],
        dry_run: false,
    };
    Source::with(setup, config, 1 << 30, Knowledge { devices, ..Knowledge::default() })
}

fn bounded(name: &str, ms: u64) -> DeviceKnowledge {
    let ms = Some(Time::from_ms(ms));
    let bounds =
        DeviceBounds { quiesce: ms, unquiesce: ms, stop: ms, run: ms, start: ms, read: ms };
    DeviceKnowledge { name: name.into(), bounds, ..DeviceKnowledge::default() }
}

fn strict(limit_ms: u64) -> Config {
    Config { downtime_limit: Time::from_ms(limit_ms), mode: Mode::Strict, ..Config::default() }
}

#[test]
fn strict_names_the_device_that_nobody_knows_a_bound_of() {
    let mut lacking = bounded("nic0", 5);
    lacking.bounds.run = None;
    let devices = vec![bounded("gpu0", 5), lacking.clone()];
    let refused = source(strict(300), devices.clone()).admission().unwrap_err();
    assert_eq!(refused.device.as_deref(), Some("nic0"));
    assert!(refused.what.contains("from STOP_COPY back into RUNNING"), "{refused}");
    assert!(refused.remedy.unwrap().contains("--allow-unbounded nic0"));
    let best_effort = Config { mode: Mode::BestEffort, ..strict(300) };
    assert_eq!(source(best_effort, devices).admission(), Ok(()));
    lacking.allow_unbounded = true;
    assert_eq!(source(strict(300), vec![bounded("gpu0", 5), lacking]).admission(), Ok(()));
}

#[test]
fn strict_refuses_a_limit_below_the_bounds_alone_and_a_device_that_cannot_be_rolled_back() {
    // Into STOP_COPY 100, a read 100, back 100, and what the hosts need: 40 ms.
    assert!(source(strict(340), vec![bounded("nic0", 100)]).admission().is_ok());
    let refused = source(strict(339), vec![bounded("nic0", 100)]).admission().unwrap_err();
    assert!(refused.what.contains("need 340.000 ms"), "{refused}");
    let mut keeps = bounded("nic0", 1);
    keeps.reset_keeps_state = true;
    let refused = source(strict(300), vec![keeps]).admission().unwrap_err();
    assert!(refused.what.contains("nic0 is not RUNNING after a reset"), "{refused}");
}

#[test]
fn peers_know_no_strict_mode() {
    for policy in [Policy::Qemu10, Policy::Qemu11, Policy::RamOnly] {
        let refused = source(Config { policy, ..strict(300) }, Vec::new()).admission().unwrap_err();
        assert!(refused.what.contains(policy.name()), "{refused}");
    }
}
