//! Scenarios x policies on the same engine, devices and guest.

use std::time::Duration;

use bench::stats::Summary;
use bench::table::Table;
use serde_json::{Value, json};

use crate::Setting;
use crate::lab::{Chain, Device, Host, Spec};
use crate::outcome::{Run, Verdict, percentile, shown};

const POLICIES: [&str; 4] = ["bounded", "qemu-11", "qemu-10", "ram-only"];
/// Of each scenario and policy.
const RUNS: usize = 10;
const LIMIT_MS: f64 = 300.0;
/// Whoever has not switched over by then has given up.
const PATIENCE: Duration = Duration::from_secs(15);

const MLX5: &[Device] = &[Device { profile: "mlx5-vf", size: "64M" }];
const SLOW: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/profiles/slow-destination.toml");
const PLAIN: Spec =
    Spec { memory: "256M", working_set: "64M", dirty_rate: "2000", dma_rate: "200", devices: MLX5 };

struct Scenario {
    name: &'static str,
    spec: Spec,
    /// What the guest's reconfiguration right after the decision adds to the device, in KiB.
    late_kib: Option<u32>,
}

const SCENARIOS: [Scenario; 5] = [
    Scenario { name: "plain", spec: PLAIN, late_kib: None },
    // 256 MiB of new initial data right after the decision.
    Scenario { name: "late-reinit", spec: PLAIN, late_kib: Some(256 << 10) },
    Scenario {
        name: "under-reported",
        spec: Spec { devices: &[Device { profile: "liar-under", size: "512M" }], ..PLAIN },
        late_kib: None,
    },
    // Each pass finds as much dirty again as fits into the limit by the link alone.
    Scenario {
        name: "busy-guest",
        spec: Spec { memory: "768M", working_set: "512M", dirty_rate: "150000", ..PLAIN },
        late_kib: None,
    },
    Scenario {
        name: "slow-load",
        spec: Spec { devices: &[Device { profile: SLOW, size: "64M" }], ..PLAIN },
        late_kib: None,
    },
];

pub fn run(setting: &Setting<'_>, runs: &mut Vec<Run>) -> anyhow::Result<()> {
    let chosen =
        |wanted: &[String], name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    for scenario in SCENARIOS.iter().filter(|s| chosen(&setting.args.scenarios, s.name)) {
        for policy in POLICIES.iter().filter(|p| chosen(&setting.args.policies, p)) {
            let mut chain = Chain::start(setting, scenario.spec)?;
            for number in 0..setting.args.runs.unwrap_or(RUNS) {
                if setting.signals.any() {
                    return Ok(());
                }
                let mut arguments = json!({"downtime-limit-ms": LIMIT_MS, "policy": policy});
                if scenario.late_kib.is_some() {
                    arguments["hold"] = json!(["look"]);
                }
                let report = chain.migrate(arguments, PATIENCE, |source, _| {
                    scenario.late_kib.map_or(Ok(()), |kib| reconfigure_late(source, kib))
                })?;
                let mut run =
                    Run::of("compare", scenario.name, setting.guest.name(), number, &report);
                run.policy = (*policy).into();
                eprintln!("{}", run.line());
                runs.push(run);
            }
        }
    }
    Ok(())
}

/// The decision has fallen, the vCPUs still run.
fn reconfigure_late(source: &mut Host, kib: u32) -> anyhow::Result<()> {
    if source.wait_held()? {
        source.workload(
            json!({"command": "reconfigure", "device": 0, "generation": kib, "kib": kib}),
        )?;
        source.call("release", Value::Object(Default::default()))?;
    }
    Ok(())
}

pub fn judge(runs: &[&Run]) -> (Table, Vec<Verdict>) {
    let mut table = Table::new([
        "scenario",
        "policy",
        "completed",
        "limit kept",
        "P50 ms",
        "P99 ms",
        "max ms",
        "pauses for nothing",
        "longest ms",
        "total ms",
    ]);
    let mut verdicts = Vec::new();
    for scenario in &SCENARIOS {
        let mut kept_by = Vec::new();
        for policy in POLICIES {
            let here =
                || runs.iter().filter(move |r| r.scenario == scenario.name && r.policy == policy);
            let count = here().count();
            if count == 0 {
                continue;
            }
            let kept = here().filter(|run| run.kept()).count();
            kept_by.push((policy, kept as f64 / count as f64));
            let blackouts = || here().filter_map(|run| run.downtime_ms);
            let pauses = || here().flat_map(|run| run.pauses_ms.iter().copied());
            table.row([
                scenario.name.to_owned(),
                policy.to_owned(),
                format!("{} of {count}", here().filter(|run| run.completed()).count()),
                format!("{kept} of {count}"),
                shown(percentile(blackouts(), 50.0)),
                shown(percentile(blackouts(), 99.0)),
                shown(percentile(blackouts(), 100.0)),
                pauses().count().to_string(),
                shown(percentile(pauses(), 100.0)),
                format!("{:.0}", Summary::of(here().map(|run| run.total_ms)).median),
            ]);
        }
        if let Some(((_, ours), peers)) =
            kept_by.split_first().filter(|((p, _), _)| *p == "bounded")
        {
            let best = peers.iter().map(|(_, kept)| *kept).fold(0.0, f64::max);
            let what = format!(
                "{}: bounded keeps the limit in {:.0} %, the best of the peers in {:.0} %",
                scenario.name,
                ours * 100.0,
                best * 100.0,
            );
            // Whether a limit in ms is kept is the machine's doing, too.
            verdicts.push(Verdict::time(what, *ours >= best));
        }
    }
    let failed =
        runs.iter().filter(|run| run.policy == "bounded" && run.status == "failed").count();
    verdicts.push(Verdict::count(format!("bounded: {failed} migrations failed"), failed == 0));
    (table, verdicts)
}
