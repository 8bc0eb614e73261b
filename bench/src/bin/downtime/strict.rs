//! Strict mode with two mlx5-like devices that the guest reconfigures at bad moments, at the smallest limit that
//! `vmferry plan` calls feasible.

use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use bench::table::Table;
use serde_json::{Value, json};

use crate::Setting;
use crate::lab::{Chain, Device, Host, Spec};
use crate::outcome::{Run, Verdict, percentile, shown};

const RUNS: usize = 100;
const PATIENCE: Duration = Duration::from_secs(30);
/// What a reconfiguration makes of the device's initial data, in KiB, in turn: a little, which fits, and so much
/// that the switchover has to be taken back when it comes late.
const KIB: [u32; 2] = [1 << 10, 256 << 10];
/// What is asked of the plan.
const CONFIDENCE_PERCENT: &str = "99.9";
const PLANNED_RUNS: &str = "2000";
/// Limits that are tried, in ms.
const LIMITS_MS: [u32; 12] = [200, 300, 400, 500, 600, 700, 800, 900, 1_000, 1_200, 1_500, 2_000];
/// The guest's heartbeat and the report agree within so much, or so many percent.
const AGREE_MS: f64 = 10.0;
const AGREE_PERCENT: f64 = 10.0;

const SPEC: Spec = Spec {
    memory: "256M",
    working_set: "64M",
    dirty_rate: "2000",
    dma_rate: "200",
    devices: &[
        Device { profile: "mlx5-vf", size: "32M" },
        Device { profile: "mlx5-vf", size: "32M" },
    ],
};

/// When the guest reconfigures a device.
const MOMENTS: [&str; 4] = ["in-precopy", "after-decision", "while-pausing", "on-arrival"];

pub fn run(setting: &Setting<'_>, runs: &mut Vec<Run>) -> anyhow::Result<()> {
    let limit_ms = setting.args.limit_ms.map_or_else(|| feasible(setting), Ok)?;
    let mut chain = Chain::start(setting, SPEC)?;
    let count = setting.args.runs.unwrap_or(RUNS);
    for number in 0..count {
        if setting.signals.any() {
            break;
        }
        let moment = MOMENTS[number % MOMENTS.len()];
        let device = number / MOMENTS.len() % 2;
        let kib = KIB[number / MOMENTS.len() / 2 % 2];
        let mut arguments = json!({
            "downtime-limit-ms": limit_ms,
            "downtime-mode": "strict",
            "profiles": {"nic0": "mlx5-vf", "nic1": "mlx5-vf"},
        });
        match moment {
            "in-precopy" => arguments["hold"] = json!(["precopy"]),
            "after-decision" | "while-pausing" => arguments["hold"] = json!(["look"]),
            _ => {}
        }
        let command = json!({
            "command": "reconfigure", "device": device, "generation": number + 1, "kib": kib,
        });
        let report =
            chain.migrate(arguments, PATIENCE, |source, _| act(source, moment, &command))?;
        let mut run = Run::of("strict", moment, setting.guest.name(), number, &report);
        if moment == "on-arrival" && run.completed() {
            chain.here().workload(command)?;
        }
        run.policy = "strict".into();
        eprintln!("{}", run.line());
        runs.push(run);
    }
    Ok(())
}

fn act(source: &mut Host, moment: &str, command: &Value) -> anyhow::Result<()> {
    if moment == "on-arrival" || !source.wait_held()? {
        return Ok(());
    }
    if moment == "while-pausing" {
        // The guest has its order while it is being paused; the device may obey after the look.
        let order = source.workload_aside(command.clone())?;
        source.call("release", json!({}))?;
        // Whether the guest came to it before it stood still is what varies here.
        drop(order);
    } else {
        source.workload(command.clone())?;
        source.call("release", json!({}))?;
    }
    Ok(())
}

/// The smallest limit that is kept in 99.9 % of planned migrations.
fn feasible(setting: &Setting<'_>) -> anyhow::Result<f64> {
    for limit_ms in LIMITS_MS {
        let limit = format!("{limit_ms}ms");
        let args = [
            "plan",
            "--json",
            "--memory",
            "256M",
            "--working-set",
            "64M",
            "--dirty-rate",
            "8M",
            "--device",
            "mlx5-vf,size=32M",
            "--device",
            "mlx5-vf,size=32M",
            "--downtime-mode",
            "strict",
            "--late-reinit",
            "50",
            "--runs",
            PLANNED_RUNS,
            "--confidence",
            CONFIDENCE_PERCENT,
            "--downtime-limit",
            &limit,
        ];
        let output =
            Command::new(&setting.vmferry).args(args).output().context("run vmferry plan")?;
        eprintln!("vmferry plan, limit {limit}: feasible at P99.9: {}", output.status.success());
        if output.status.success() {
            return Ok(f64::from(limit_ms));
        }
    }
    anyhow::bail!("vmferry plan calls none of these limits feasible")
}

/// The heartbeats stop after the request and begin before the word of it is here, or a beat apart.
fn agrees(run: &Run) -> Option<bool> {
    let (reported, seen) = (run.downtime_ms?, run.guest_observed_ms?);
    Some((reported - seen).abs() <= AGREE_MS.max(reported * AGREE_PERCENT / 100.0))
}

pub fn judge(runs: &[&Run]) -> (Table, Vec<Verdict>) {
    let mut table = Table::new([
        "REINIT",
        "migrations",
        "completed",
        "limit ms",
        "P50 ms",
        "P99 ms",
        "max ms",
        "seen by the guest P50 ms",
        "max ms",
        "taken back",
        "longest ms",
        "late REINITs",
        "absorbed",
        "overruns",
    ]);
    for moment in MOMENTS.into_iter().chain(["all"]) {
        let here = || runs.iter().filter(move |run| moment == "all" || run.scenario == moment);
        let downtimes = || here().filter_map(|run| run.downtime_ms);
        let seen = || here().filter_map(|run| run.guest_observed_ms);
        let pauses = || here().flat_map(|run| run.pauses_ms.iter().copied());
        table.row([
            moment.to_owned(),
            here().count().to_string(),
            here().filter(|run| run.completed()).count().to_string(),
            shown(percentile(here().map(|run| run.limit_ms), 100.0)),
            shown(percentile(downtimes(), 50.0)),
            shown(percentile(downtimes(), 99.0)),
            shown(percentile(downtimes(), 100.0)),
            shown(percentile(seen(), 50.0)),
            shown(percentile(seen(), 100.0)),
            pauses().count().to_string(),
            shown(percentile(pauses(), 100.0)),
            here().map(|run| run.late_reinits).sum::<u64>().to_string(),
            here().map(|run| run.absorptions).sum::<u64>().to_string(),
            here().map(|run| run.overruns.len()).sum::<usize>().to_string(),
        ]);
    }
    let missed = |run: &&&Run| run.blackouts_ms().any(|ms| ms > run.limit_ms);
    let unexplained = runs.iter().filter(missed).filter(|run| run.overruns.is_empty()).count();
    let over = runs.iter().filter(missed).count();
    let agreeing: Vec<bool> = runs.iter().filter_map(|run| agrees(run)).collect();
    let (agree, compared) = (agreeing.iter().filter(|agrees| **agrees).count(), agreeing.len());
    let completed = runs.iter().filter(|run| run.completed()).count();
    let late: u64 = runs.iter().map(|run| run.late_reinits).sum();
    let absorbed: u64 = runs.iter().map(|run| run.absorptions).sum();
    let revoked: u64 = runs.iter().map(|run| run.revocations).sum();
    let verdicts = vec![
        Verdict::count(
            format!(
                "{unexplained} blackouts over the limit without an overrun that names the call"
            ),
            unexplained == 0,
        ),
        Verdict::time(format!("{over} of {} over the limit: at most 1", runs.len()), over <= 1),
        Verdict::count(format!("{completed} of {} completed", runs.len()), completed > 0),
        Verdict::count(
            format!(
                "{late} REINITs came after the decision; {absorbed} absorbed, {revoked} revoked"
            ),
            late > 0,
        ),
        Verdict::time(
            format!(
                "the guest saw what was reported, within 10 ms or 10 %, in {agree} of {compared} completed"
            ),
            agree == compared && compared == completed,
        ),
    ];
    (table, verdicts)
}
