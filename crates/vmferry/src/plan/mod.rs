//! `vmferry plan`: simulates migrations and says whether the limit can be kept.

mod table;

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use device_profile::Profile;
use planner::{Burst, Device, Memory, Options, Plan, Scenario, scenario};
use serde_json::json;
use switchover::Time;
use switchover::estimate::HostKnowledge;
use switchover::policy::Policy;

use crate::cli::{PlanArgs, PlannedDevice, Sweep};
use crate::signals::Signals;

/// The link where nobody says: 10 Gbit/s.
const LINK_BYTES_PER_S: u64 = 1_250_000_000;
/// How often progress is shown and a stop is looked for.
const STEP: Duration = Duration::from_millis(100);

/// One row of the answer.
struct Row {
    /// What was varied, and its value.
    what: String,
    plan: Plan,
}

/// Plans; answers whether what was asked for was reached, in the first row.
pub fn run(args: &PlanArgs, signals: &Signals) -> anyhow::Result<bool> {
    let base = scenario_of(args)?;
    let title = title(args, &base);
    let cases = cases(args, &base)?;
    let options = Options { runs: args.runs, seed: args.seed, threads: 0, warm_up: args.history };
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let all = args.runs.saturating_mul(cases.len() as u64);
    let rows = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&done, &stop, all, signals));
        let rows: Result<Vec<Row>, _> = cases
            .into_iter()
            .take_while(|_| !stop.load(Ordering::Relaxed))
            .map(|(what, scenario)| {
                planner::plan(&scenario, options, &done, &stop).map(|plan| Row { what, plan })
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        drop(watcher.join());
        rows
    })?;
    if let Some(file) = &args.svg {
        let plans: Vec<_> =
            rows.iter().map(|row| Plan { policy: row.what.clone(), ..row.plan.clone() }).collect();
        let picture = planner::picture::svg(&title, &plans);
        std::fs::write(file, picture).with_context(|| format!("{}", file.display()))?;
    }
    if args.json {
        let rows: Vec<_> =
            rows.iter().map(|row| json!({"what": row.what, "plan": row.plan})).collect();
        println!("{}", serde_json::to_string_pretty(&json!({"asked": title, "rows": rows}))?);
    } else {
        print!("{}", table::text(&title, rows.iter().map(|row| (row.what.as_str(), &row.plan))));
    }
    let reached = |plan: &Plan| plan.runs > 0 && plan.success() * 100.0 >= args.confidence;
    Ok(rows.first().is_some_and(|row| reached(&row.plan)))
}

/// Shows how far it is, and asks for an end when somebody wants one.
fn watch(done: &AtomicU64, stop: &AtomicBool, all: u64, signals: &Signals) {
    let terminal = std::io::stderr().is_terminal();
    let mut shown = false;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(STEP);
        let done = done.load(Ordering::Relaxed);
        if terminal && done < all {
            eprint!("\r{done} of {all} migrations simulated ");
            // A line that is shown late is still shown.
            let _ = std::io::stderr().flush();
            shown = true;
        }
        if signals.any() {
            stop.store(true, Ordering::Relaxed);
        }
    }
    if shown {
        eprint!("\r{:50}\r", "");
    }
}

/// What is planned, in a line.
fn title(args: &PlanArgs, scenario: &Scenario) -> String {
    let size = crate::units::show_bytes;
    let device = |(place, device): (usize, &Device)| {
        let name = match &args.trace {
            Some(_) => device.profile.models.as_str(),
            None => device.profile.name.as_str(),
        };
        match args.devices.get(place).is_none_or(|planned| planned.size.is_some()) {
            true => format!("{name} ({})", size(device.profile.sizes.total_bytes.typical)),
            false => name.to_owned(),
        }
    };
    let devices: Vec<_> = scenario.devices.iter().enumerate().map(device).collect();
    let memory = &scenario.memory;
    let over = match &args.trace {
        Some(_) => format!(" over {}", size(memory.working_set_bytes)),
        None => String::new(),
    };
    format!(
        "{} of memory, {}/s written{over}, {}; {:.1} Gbit/s",
        size(memory.bytes),
        size(memory.dirty_bytes_per_s),
        if devices.is_empty() { "no device".to_owned() } else { devices.join(" + ") },
        scenario.hosts.link.max as f64 * 8.0 / 1e9
    )
}

fn time(duration: Duration) -> Time {
    Time(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}

/// The guest, devices, hosts and limit: traced, or as they are described.
fn base_of(args: &PlanArgs) -> anyhow::Result<Scenario> {
    if let Some(file) = &args.trace {
        let trace = migration::trace::load(file)?;
        return planner::fit::scenario(&trace).with_context(|| format!("{}", file.display()));
    }
    let burst = args.burst.map(|(period, lasts, times)| Burst {
        period: time(period),
        lasts: time(lasts),
        times: f64::from(times),
    });
    let device = |(place, planned): (usize, &PlannedDevice)| -> anyhow::Result<Device> {
        let profile = crate::device::profile(&planned.profile)?;
        let profile = planned.size.map_or_else(|| profile.clone(), |size| profile.scaled_to(size));
        let name = planned.id.clone().unwrap_or_else(|| format!("dev{place}"));
        Ok(Device {
            reconfigured_every: args.reconfigure.map(time),
            late_permille: u64::from(args.late_reinit) * 10,
            ..Device::new(name, profile)
        })
    };
    let devices = args.devices.iter().enumerate().map(device).collect::<anyhow::Result<_>>()?;
    let memory = Memory {
        bytes: args.memory,
        dirty_bytes_per_s: args.dirty_rate,
        working_set_bytes: args.working_set.unwrap_or(args.memory / 16),
        burst,
    };
    Ok(Scenario { memory, ..Scenario::new(devices) })
}

fn scenario_of(args: &PlanArgs) -> anyhow::Result<Scenario> {
    let base = base_of(args)?;
    let mut hosts = base.hosts.clone();
    let trip = args.round_trip.map(time);
    if args.trace.is_none() {
        let link = args.link.unwrap_or(LINK_BYTES_PER_S);
        hosts = scenario::hosts(link, trip.unwrap_or(Time::from_us(100)));
    } else {
        if let Some(link) = args.link {
            hosts.link = scenario::hosts(link, Time(0)).link;
        }
        if let Some(trip) = trip {
            hosts.round_trip = scenario::hosts(LINK_BYTES_PER_S, trip).round_trip;
        }
    }
    Ok(Scenario {
        hosts,
        limit: args.downtime_limit.map_or(base.limit, time),
        mode: args.downtime_mode.into(),
        policy: args.policy.into(),
        max_total_time: Some(time(args.max_total_time)),
        rehearse: args.rehearse,
        auto_converge: args.auto_converge,
        ..base
    })
}

/// What is simulated: one scenario, or what is compared or varied.
fn cases(args: &PlanArgs, base: &Scenario) -> anyhow::Result<Vec<(String, Scenario)>> {
    let policies: Vec<Policy> = if args.compare { Policy::ALL.to_vec() } else { vec![base.policy] };
    let varied: Vec<(String, Scenario)> = match &args.sweep {
        None => vec![(String::new(), base.clone())],
        Some(Sweep::Limit(limits)) => limits
            .iter()
            .map(|limit| {
                let what =
                    format!("limit {}", crate::units::show_ms(Some(crate::units::as_ms(*limit))));
                (what, Scenario { limit: time(*limit), ..base.clone() })
            })
            .collect(),
        Some(Sweep::Link(links)) => links
            .iter()
            .map(|link| {
                let what = format!("link {:.1} Gbit/s", *link as f64 * 8.0 / 1e9);
                let link = scenario::hosts(*link, Time(0)).link;
                let hosts = HostKnowledge { link, ..base.hosts.clone() };
                (what, Scenario { hosts, ..base.clone() })
            })
            .collect(),
        Some(Sweep::DeviceSize(sizes)) => sizes
            .iter()
            .map(|size| {
                let devices = base.devices.iter().map(|device| {
                    let profile: Profile = device.profile.scaled_to(*size);
                    Device { profile, ..device.clone() }
                });
                let what = format!("devices of {}", crate::units::show_bytes(*size));
                (what, Scenario { devices: devices.collect(), ..base.clone() })
            })
            .collect(),
    };
    Ok(varied
        .iter()
        .flat_map(|(what, scenario)| {
            policies.iter().map(move |policy| {
                // Peers know no strict mode.
                let mode = match policy {
                    Policy::Bounded => scenario.mode,
                    _ => switchover::decide::Mode::BestEffort,
                };
                let what = if what.is_empty() {
                    policy.name().to_owned()
                } else if args.compare {
                    format!("{what}, {}", policy.name())
                } else {
                    what.clone()
                };
                (what, Scenario { policy: *policy, mode, ..scenario.clone() })
            })
        })
        .collect())
}
