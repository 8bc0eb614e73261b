//! Many seeds of a scenario: quantiles, reasons, and what the brain says beforehand.
//!
//! Simulations run on all cores. Progress can be watched, and a stop gives what is there.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::Serialize;
use switchover::Time;
use switchover::estimate::History;

use crate::run::{Ended, RunResult, run};
use crate::scenario::Scenario;

/// Reasons that are told apart.
const REASONS_MAX: usize = 8;
/// Bars of the distribution.
const BARS: usize = 60;

/// How a plan is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Migrations to simulate.
    pub runs: u64,
    /// The first seed.
    pub seed: u64,
    /// Threads; 0 = as many as there are cores.
    pub threads: usize,
    /// Migrations that teach, before those that count: what a pair of hosts knows that has moved such guests.
    pub warm_up: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { runs: 1_000, seed: 1, threads: 0, warm_up: 0 }
    }
}

/// Quantiles of something, in ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Quantiles {
    /// Of so many.
    pub count: u64,
    /// Half are below.
    pub p50_ms: f64,
    /// 90 of 100 are below.
    pub p90_ms: f64,
    /// 99 of 100 are below.
    pub p99_ms: f64,
    /// 999 of 1000 are below; of fewer than 1000 this is the most.
    pub p999_ms: f64,
    /// The most.
    pub max_ms: f64,
}

impl Quantiles {
    fn of(mut values: Vec<Time>) -> Option<Self> {
        values.sort_unstable();
        let last = values.len().checked_sub(1)?;
        let at = |permille: usize| {
            let rank = (values.len() * permille).div_ceil(1000).clamp(1, values.len());
            values[rank - 1].as_ms()
        };
        Some(Self {
            count: values.len() as u64,
            p50_ms: at(500),
            p90_ms: at(900),
            p99_ms: at(990),
            p999_ms: at(999),
            max_ms: values[last].as_ms(),
        })
    }
}

/// A term of the blackout, on average over the runs that tried to switch over.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TermShare {
    /// Its name.
    pub name: String,
    /// As expected at the try, in ms.
    pub expected_ms: f64,
}

/// What simulated migrations showed.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// Whose rule decided.
    pub policy: String,
    /// How hard the limit was: `best-effort` or `strict`.
    pub mode: String,
    /// The limit.
    pub limit_ms: f64,
    /// Migrations simulated.
    pub runs: u64,
    /// First seed; the others follow.
    pub seed: u64,
    /// The guest runs at the destination.
    pub completed: u64,
    /// It was refused before it began.
    pub refused: u64,
    /// The guest stayed.
    pub stayed: u64,
    /// Commit was not answered.
    pub in_doubt: u64,
    /// No blackout was longer than the limit.
    pub kept: u64,
    /// A call broke its bound.
    pub overruns: u64,
    /// Blackouts of completed migrations.
    pub downtime: Option<Quantiles>,
    /// Blackouts that ended on the source.
    pub blackouts: Option<Quantiles>,
    /// From the first connection to the end.
    pub total_time: Option<Quantiles>,
    /// Upper quantiles that the brain predicted when it began to switch over.
    pub predicted: Option<Quantiles>,
    /// Switchovers taken back, on average.
    pub revocations: f64,
    /// The guest was slowed down in so many.
    pub throttled: u64,
    /// The most by which it was slowed down, in percent.
    pub throttle_percent: u8,
    /// The terms of the blackout.
    pub terms: Vec<TermShare>,
    /// Downtimes in equal steps from 0 to the longest: how many.
    pub histogram: Vec<u64>,
    /// Width of a step of it, in ms.
    pub step_ms: f64,
    /// Why migrations did not complete, the most frequent first, with a seed that shows it.
    pub reasons: Vec<(String, u64, u64)>,
    /// It was stopped before all were simulated.
    pub stopped: bool,
}

impl Plan {
    /// Completed with the limit kept, of all, in 0..1.
    pub fn success(&self) -> f64 {
        let both = self.completed.saturating_sub(self.runs.saturating_sub(self.kept));
        both as f64 / self.runs.max(1) as f64
    }
}

#[derive(Default)]
struct Tally {
    plan: Plan,
    downtimes: Vec<Time>,
    blackouts: Vec<Time>,
    totals: Vec<Time>,
    predicted: Vec<Time>,
    revocations: u64,
    /// By name: its place, the sum in ns, and of how many.
    terms: BTreeMap<&'static str, (usize, u64, u64)>,
    /// By its words: how often, the first seed, and what that one said.
    reasons: BTreeMap<String, (u64, u64, String)>,
}

impl Tally {
    fn add(&mut self, scenario: &Scenario, result: RunResult) {
        let plan = &mut self.plan;
        plan.runs += 1;
        match result.ended {
            Ended::Completed => plan.completed += 1,
            Ended::Refused => plan.refused += 1,
            Ended::InDoubt => plan.in_doubt += 1,
            Ended::Stayed | Ended::Endless => plan.stayed += 1,
        }
        plan.kept += u64::from(result.kept(scenario.limit));
        plan.overruns += u64::from(!result.overruns.is_empty());
        plan.throttled += u64::from(result.throttle_percent > 0);
        plan.throttle_percent = plan.throttle_percent.max(result.throttle_percent);
        self.downtimes.extend(result.downtime);
        self.blackouts.extend(&result.blackouts);
        self.totals.push(result.total);
        self.predicted.extend(result.expected.map(|(_, upper)| upper));
        self.revocations += u64::from(result.revocations);
        for (place, (name, time)) in result.terms.iter().enumerate() {
            let (_, sum, count) = self.terms.entry(name).or_insert((place, 0, 0));
            (*sum, *count) = (sum.saturating_add(time.0), *count + 1);
        }
        if let Some(reason) = result.reason {
            let words: String = reason.chars().filter(|c| !c.is_ascii_digit()).collect();
            if self.reasons.contains_key(&words) || self.reasons.len() < 1_000 {
                let entry = self.reasons.entry(words).or_insert((0, u64::MAX, String::new()));
                entry.0 += 1;
                if result.seed < entry.1 {
                    (entry.1, entry.2) = (result.seed, reason);
                }
            }
        }
    }

    fn finish(self, scenario: &Scenario, options: Options) -> Plan {
        let mut plan = self.plan;
        plan.policy = scenario.policy.name().to_owned();
        plan.mode = match scenario.mode {
            switchover::decide::Mode::BestEffort => "best-effort".to_owned(),
            switchover::decide::Mode::Strict => "strict".to_owned(),
        };
        (plan.limit_ms, plan.seed) = (scenario.limit.as_ms(), options.seed);
        plan.stopped = plan.runs < options.runs;
        plan.revocations = self.revocations as f64 / plan.runs.max(1) as f64;
        let most = self.downtimes.iter().copied().max().unwrap_or_default();
        if most.0 > 0 {
            let step = most.0.div_ceil(BARS as u64).max(1);
            plan.step_ms = Time(step).as_ms();
            plan.histogram = vec![0; BARS];
            for downtime in &self.downtimes {
                plan.histogram[((downtime.0.saturating_sub(1)) / step) as usize % BARS] += 1;
            }
        }
        plan.downtime = Quantiles::of(self.downtimes);
        plan.blackouts = Quantiles::of(self.blackouts);
        plan.total_time = Quantiles::of(self.totals);
        plan.predicted = Quantiles::of(self.predicted);
        let mut terms: Vec<_> = self.terms.into_iter().collect();
        terms.sort_by_key(|(_, (place, _, _))| *place);
        plan.terms = terms
            .into_iter()
            .map(|(name, (_, sum, count))| TermShare {
                name: name.to_owned(),
                expected_ms: Time(sum / count.max(1)).as_ms(),
            })
            .collect();
        let mut reasons: Vec<_> =
            self.reasons.into_values().map(|(times, seed, reason)| (reason, times, seed)).collect();
        reasons.sort_by_key(|(_, times, _)| std::cmp::Reverse(*times));
        reasons.truncate(REASONS_MAX);
        plan.reasons = reasons;
        plan
    }
}

/// Simulates `options.runs` migrations. `done` counts them; `stop` ends it with what is there.
///
/// # Errors
/// A profile with deviations that the device model does not know.
pub fn plan(
    scenario: &Scenario,
    options: Options,
    done: &AtomicU64,
    stop: &AtomicBool,
) -> Result<Plan, device_model::ModelError> {
    let history = warm_up(scenario, options, stop)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads == 0 { cores } else { options.threads };
    let next = AtomicU64::new(0);
    let tally = Mutex::new(Tally::default());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, 256) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= options.runs {
                        break;
                    }
                    match run(scenario, options.seed.wrapping_add(number), history.clone()) {
                        Ok(result) => lock(&tally).add(scenario, result),
                        Err(error) => {
                            *lock(&failed) = Some(error);
                            break;
                        }
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(error);
    }
    let tally = tally.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(tally.finish(scenario, options))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What the hosts know after moving such guests, without regard for the limit.
fn warm_up(
    scenario: &Scenario,
    options: Options,
    stop: &AtomicBool,
) -> Result<History, device_model::ModelError> {
    let mut history = History::default();
    let easy = Scenario {
        limit: Time::from_ms(3_600_000),
        mode: switchover::decide::Mode::BestEffort,
        policy: switchover::policy::Policy::Bounded,
        ..scenario.clone()
    };
    for number in 0..options.warm_up {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // Seeds of their own: what counts is not what was learnt from.
        let seed = options.seed.wrapping_add(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if let Some(new) = run(&easy, seed, history.clone())?.history {
            history = new;
        }
    }
    Ok(history)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Device;
    use device_profile::Profile;
    use switchover::decide::Mode;

    fn scenario(profile: &str, limit_ms: u64) -> Scenario {
        let profile = Profile::builtin(profile).unwrap();
        let devices = vec![Device::new("nic0", profile)];
        Scenario { limit: Time::from_ms(limit_ms), mode: Mode::Strict, ..Scenario::new(devices) }
    }

    fn simulate(scenario: &Scenario, options: Options) -> Plan {
        plan(scenario, options, &AtomicU64::new(0), &AtomicBool::new(false)).unwrap()
    }

    #[test]
    fn what_fits_is_kept_and_the_number_of_threads_changes_nothing() {
        let options = Options { runs: 60, threads: 1, ..Options::default() };
        let one = simulate(&scenario("virtio-vf", 400), options);
        assert_eq!((one.runs, one.completed, one.kept), (60, 60, 60));
        assert_eq!(one.success(), 1.0);
        assert_eq!(one.histogram.iter().sum::<u64>(), 60);
        assert!(one.downtime.unwrap().max_ms <= 400.0);
        assert_eq!(one, simulate(&scenario("virtio-vf", 400), Options { threads: 3, ..options }));
    }

    #[test]
    fn what_cannot_fit_says_why_and_what_would() {
        let plan = simulate(&scenario("xe-vf", 300), Options { runs: 5, ..Options::default() });
        assert_eq!((plan.completed, plan.kept), (0, 5));
        let (reason, times, _) = &plan.reasons[0];
        assert_eq!(*times, 5);
        assert!(reason.contains("device nic0 alone needs"), "{reason}");
        assert!(reason.contains("would fit at P99"), "{reason}");
    }

    #[test]
    fn a_guest_that_dirties_faster_than_the_link_converges_only_when_slowed_down() {
        // 2 GB/s over a gigabyte, on 10 Gbit/s.
        let memory = crate::Memory {
            bytes: 4 << 30,
            dirty_bytes_per_s: 2_000_000_000,
            working_set_bytes: 1 << 30,
            burst: None,
        };
        let options = Options { runs: 20, ..Options::default() };
        for mode in [Mode::Strict, Mode::BestEffort] {
            let without = Scenario { memory, mode, ..scenario("virtio-vf", 300) };
            let plan = simulate(&without, options);
            assert_eq!((plan.success(), plan.throttled), (0.0, 0), "{mode:?}: {plan:?}");
            let plan = simulate(&Scenario { auto_converge: true, ..without }, options);
            assert_eq!((plan.success(), plan.throttled), (1.0, 20), "{mode:?}: {plan:?}");
            assert!((30..=99).contains(&plan.throttle_percent), "{plan:?}");
        }
        // What fits is left alone, and so is what no throttle would make fit.
        for (profile, limit_ms) in [("virtio-vf", 400), ("xe-vf", 300)] {
            let scenario = Scenario { auto_converge: true, ..scenario(profile, limit_ms) };
            assert_eq!(simulate(&scenario, options).throttled, 0, "{profile}");
        }
    }

    #[test]
    fn a_stop_gives_what_is_there() {
        let scenario = scenario("qat", 300);
        let stopped =
            plan(&scenario, Options::default(), &AtomicU64::new(0), &AtomicBool::new(true));
        let stopped = stopped.unwrap();
        assert!(stopped.stopped && stopped.runs == 0 && stopped.downtime.is_none());
    }
}
