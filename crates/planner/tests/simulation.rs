//! Thousands of migrations with every profile: nobody runs twice or nowhere, and strict keeps its limit.
//!
//! A seed that fails is printed and repeats itself:
//! `VMFERRY_SIMULATION_SEED=profile:seed cargo test -p planner --test simulation`. Once understood it goes
//! into `seeds.txt`. `VMFERRY_SIMULATION_SEEDS=10000` runs so many for each profile.

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use device_profile::{ADVERSARIAL_NAMES, BUILTIN_NAMES, Profile};
use planner::{Ended, Faults, RunResult, Scenario, run};
use switchover::Time;
use switchover::decide::Mode;
use switchover::policy::Policy;

fn names() -> Vec<&'static str> {
    BUILTIN_NAMES.iter().chain(ADVERSARIAL_NAMES).copied().collect()
}

fn kept(profile: &str, mode: &str) -> Vec<u64> {
    let lines = include_str!("seeds.txt").lines().filter(|line| !line.starts_with('#'));
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let ours = words.next()? == profile && words.next()? == mode;
        ours.then(|| words.next()?.parse().ok())?
    };
    lines.filter_map(parse).collect()
}

/// The seeds of a profile: those asked for, else those that once failed and the first so many.
fn seeds_of(profile: &str, mode: &str, default: u64) -> Vec<u64> {
    if let Ok(asked) = std::env::var("VMFERRY_SIMULATION_SEED") {
        let one = asked.split_once(':').filter(|(name, _)| *name == profile);
        return one.and_then(|(_, seed)| seed.parse().ok()).into_iter().collect();
    }
    kept(profile, mode).into_iter().chain(0..common::seeds(default)).collect()
}

/// Runs every seed of a profile on two threads.
fn each(
    profile: &str,
    seeds: &[u64],
    scenario: impl Fn(u64) -> Scenario + Sync,
    check: impl Fn(&Scenario, RunResult) + Sync,
) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let scenario = scenario(*seed);
                    let result = run(&scenario, *seed, Default::default()).unwrap();
                    assert_eq!(result.broken, None, "{profile}:{seed}: {result:?}");
                    check(&scenario, result);
                }
            });
        }
    });
}

#[derive(Default)]
struct Counts {
    completed: AtomicU64,
    refused: AtomicU64,
    stayed: AtomicU64,
    taken_back: AtomicU64,
    broke_a_bound: AtomicU64,
    /// The most that a call took beyond its bound, and that a guest stood still beyond its limit, in ns.
    beyond_bound: AtomicU64,
    over: AtomicU64,
    beyond_limit: AtomicU64,
    /// Each call that broke a bound: how often.
    calls: Mutex<BTreeMap<String, u64>>,
}

impl Counts {
    fn count(&self, scenario: &Scenario, result: &RunResult) {
        let add = |counter: &AtomicU64, n: u64| counter.fetch_add(n, Ordering::Relaxed);
        match result.ended {
            Ended::Completed => add(&self.completed, 1),
            Ended::Refused => add(&self.refused, 1),
            _ => add(&self.stayed, 1),
        };
        add(&self.taken_back, result.revocations.into());
        add(&self.over, u64::from(!result.kept(scenario.limit)));
        add(&self.broke_a_bound, u64::from(!result.overruns.is_empty()));
        let beyond = result.worst_blackout().unwrap_or_default().since(scenario.limit);
        self.beyond_limit.fetch_max(beyond.0, Ordering::Relaxed);
        for overrun in &result.overruns {
            let beyond = overrun.took.since(overrun.bound);
            self.beyond_bound.fetch_max(beyond.0, Ordering::Relaxed);
            *self.calls.lock().unwrap().entry(overrun.call.clone()).or_default() += 1;
        }
    }

    /// A row of the tables in docs/downtime.md.
    fn print(&self, what: &str, profile: &str) {
        let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let beyond = |counter: &AtomicU64| match n(counter) {
            0 => String::new(),
            ns => format!(", by {:.0} ms at most", Time(ns).as_ms()),
        };
        println!(
            "| {what} {profile} | {} | {} | {} | {} | {}{} | {}{} |",
            n(&self.completed),
            n(&self.refused),
            n(&self.stayed),
            n(&self.taken_back),
            n(&self.broke_a_bound),
            beyond(&self.beyond_bound),
            n(&self.over),
            beyond(&self.beyond_limit),
        );
        for (call, times) in &*self.calls.lock().unwrap() {
            println!("    {call}: {times} times");
        }
    }
}

/// A blackout is over the limit by no more than its calls were over their bounds, and these are named.
fn explains(scenario: &Scenario, result: &RunResult) -> bool {
    let over = result.worst_blackout().unwrap_or_default().since(scenario.limit);
    let beyond = result.overruns.iter().map(|o| o.took.since(o.bound));
    over <= beyond.fold(Time(0), |sum, beyond| sum + beyond)
}

#[test]
fn strict_keeps_its_limit_or_names_the_call_that_broke_its_bound() {
    for name in names() {
        let profile = Profile::builtin(name).unwrap();
        let counts = Counts::default();
        let scenario = |seed| common::drawn(&profile, Mode::Strict, seed);
        each(name, &seeds_of(name, "strict", 500), scenario, |scenario, result| {
            counts.count(scenario, &result);
            let at = format!("{name}:{}", result.seed);
            assert!(explains(scenario, &result), "{at}: {result:?}");
            // Only what is made to break bounds does.
            assert!(result.overruns.is_empty() || name == "stuck-stop", "{at}: {result:?}");
            assert!(result.ended != Ended::InDoubt, "{at}: {result:?}");
            assert!(result.ended != Ended::Endless, "{at}: {result:?}");
            let reason = result.reason.unwrap_or_default();
            assert_eq!(reason.is_empty(), result.ended == Ended::Completed, "{at}: {reason}");
        });
        counts.print("strict", name);
    }
}

#[test]
fn best_effort_always_ends_with_one_guest() {
    for name in names() {
        let profile = Profile::builtin(name).unwrap();
        let counts = Counts::default();
        let scenario = |seed| common::drawn(&profile, Mode::BestEffort, seed);
        each(name, &seeds_of(name, "best-effort", 150), scenario, |scenario, result| {
            counts.count(scenario, &result);
            let at = format!("{name}:{}", result.seed);
            assert!(matches!(result.ended, Ended::Completed | Ended::Stayed), "{at}: {result:?}");
        });
        counts.print("best effort", name);
    }
}

#[test]
fn a_link_cut_between_commit_and_running_leaves_one_guest_and_names_the_wait() {
    let profile = Profile::builtin("virtio-vf").unwrap();
    let counts = Counts::default();
    let scenario = |seed| {
        let faults = Faults {
            cut_after_commit_permille: 1_000,
            cut_lasts: Time::from_ms(100 * (seed % 80)),
        };
        Scenario { faults, ..common::drawn(&profile, Mode::Strict, seed) }
    };
    each("virtio-vf", &seeds_of("virtio-vf", "cut", 800), scenario, |scenario, result| {
        counts.count(scenario, &result);
        let named = result.overruns.iter().any(|overrun| overrun.call.contains("ommit"));
        let doubt = result.ended == Ended::InDoubt;
        assert!(explains(scenario, &result) && (named || !doubt), "{result:?}");
    });
    counts.print("strict, link cut after Commit,", "virtio-vf");
    assert!(counts.broke_a_bound.load(Ordering::Relaxed) > 0, "a cut that nobody noticed");
}

#[test]
fn peers_on_the_same_seeds_miss_and_nobody_runs_twice() {
    let mut missed = 0;
    for policy in [Policy::Qemu11, Policy::Qemu10, Policy::RamOnly] {
        for name in names() {
            let profile = Profile::builtin(name).unwrap();
            let counts = Counts::default();
            let scenario =
                |seed| Scenario { policy, ..common::drawn(&profile, Mode::BestEffort, seed) };
            each(name, &seeds_of(name, policy.name(), 60), scenario, |scenario, result| {
                counts.count(scenario, &result);
            });
            missed += counts.over.load(Ordering::Relaxed);
            counts.print(policy.name(), name);
        }
    }
    // Or the scenarios are too easy to show anything.
    assert!(std::env::var("VMFERRY_SIMULATION_SEED").is_ok() || missed > 0);
}

#[test]
fn a_seed_repeats_itself() {
    let profile = Profile::builtin("mlx5-vf").unwrap();
    for seed in 0..5 {
        let scenario = common::drawn(&profile, Mode::BestEffort, seed);
        let (once, again) =
            (run(&scenario, seed, Default::default()), run(&scenario, seed, Default::default()));
        assert_eq!(format!("{:?}", once.unwrap()), format!("{:?}", again.unwrap()));
    }
}
