//! Revoked switchovers: two small devices, and a guest that reconfigures one right after the decision. How long
//! does it stand still for nothing, and is anything sent twice?
//!
//! While the migration is held after the decision the limit is taken down to nothing, so the look finds that the
//! new initial data does not fit; afterwards the limit is what it was, and the migration goes on.

use std::time::Duration;

use bench::table::Table;
use serde_json::json;

use crate::Setting;
use crate::lab::{Chain, Device, Host, Spec};
use crate::outcome::{Run, Verdict, percentile, shown};

/// Revoked switchovers.
const RUNS: usize = 36;
/// Of one migration.
const REVOKED_EACH: usize = 3;
const LIMIT_MS: f64 = 5_000.0;
/// Nothing fits into it.
const NO_TIME_MS: f64 = 0.0;
const PATIENCE: Duration = Duration::from_secs(30);
/// What a reconfiguration adds to the device, in KiB.
const KIB: u32 = 256;
const PAUSE_MAX_MS: f64 = 10.0;

const SPEC: Spec = Spec {
    memory: "256M",
    working_set: "64M",
    dirty_rate: "2000",
    dma_rate: "0",
    devices: &[
        Device { profile: "mlx5-vf", size: "1M" },
        Device { profile: "mlx5-vf", size: "1M" },
    ],
};

pub fn run(setting: &Setting<'_>, runs: &mut Vec<Run>) -> anyhow::Result<()> {
    let mut chain = Chain::start(setting, SPEC)?;
    // From now on a reconfiguration replaces as much as it brings, and a device is as large as before.
    for device in 0..SPEC.devices.len() {
        let command =
            json!({"command": "reconfigure", "device": device, "generation": 1, "kib": KIB});
        chain.here().workload(command)?;
    }
    // The first shows what a migration sends of which nothing is revoked.
    let rounds = setting.args.runs.unwrap_or(RUNS).div_ceil(REVOKED_EACH);
    for number in 0..=rounds {
        if setting.signals.any() {
            break;
        }
        let revoked = if number == 0 { 0 } else { REVOKED_EACH };
        let hold = if revoked > 0 { json!(["look"]) } else { json!([]) };
        let arguments = json!({
            "downtime-limit-ms": LIMIT_MS,
            // Best effort takes back only what another try does better, and with no time none does.
            "downtime-mode": "strict",
            "profiles": {"nic0": "mlx5-vf", "nic1": "mlx5-vf"},
            "hold": hold,
        });
        let report = chain.migrate(arguments, PATIENCE, |source, _| {
            (0..revoked).try_for_each(|round| revoke(source, round, number, revoked))
        })?;
        let scenario = if revoked > 0 { "revoked" } else { "plain" };
        let mut run = Run::of("revoke", scenario, setting.guest.name(), number, &report);
        run.reconfigured_bytes = revoked as u64 * u64::from(KIB) * 1024;
        eprintln!("{}", run.line());
        runs.push(run);
    }
    Ok(())
}

fn revoke(source: &mut Host, round: usize, number: usize, of: usize) -> anyhow::Result<()> {
    anyhow::ensure!(source.wait_held()?, "the migration ended before its switchover was revoked");
    let generation = number * of + round + 1;
    source.workload(json!({
        "command": "reconfigure", "device": round % 2, "generation": generation, "kib": KIB,
    }))?;
    source.call("set", json!({"downtime-limit-ms": NO_TIME_MS}))?;
    if round + 1 < of {
        source.call("hold", json!({"phases": ["look"]}))?;
    }
    source.call("release", json!({}))?;
    let revoked = round as u64 + 1;
    let there =
        |progress: &serde_json::Value| progress["switchover-revocations"].as_u64() >= Some(revoked);
    anyhow::ensure!(source.wait_progress(there)?, "the switchover was not revoked");
    source.call("set", json!({"downtime-limit-ms": LIMIT_MS}))?;
    Ok(())
}

pub fn judge(runs: &[&Run]) -> (Table, Vec<Verdict>) {
    let of = |scenario| runs.iter().filter(move |run| run.scenario == scenario);
    let pauses = || of("revoked").flat_map(|run| run.pauses_ms.iter().copied());
    let mut table = Table::new([
        "migrations",
        "revoked switchovers",
        "pause P50 ms",
        "P99 ms",
        "max ms",
        "pages sent",
        "pages found dirty",
        "device bytes sent",
        "of those, not in the plain one",
        "reconfigured",
    ]);
    let plain = of("plain").map(|run| run.device_bytes).max().unwrap_or(0);
    for scenario in ["plain", "revoked"] {
        let pauses = || of(scenario).flat_map(|run| run.pauses_ms.iter().copied());
        let sum = |value: fn(&Run) -> u64| of(scenario).map(|run| value(run)).sum::<u64>();
        let more: u64 = of(scenario).map(|run| run.device_bytes.saturating_sub(plain)).sum();
        table.row([
            format!("{} {scenario}", of(scenario).count()),
            pauses().count().to_string(),
            shown(percentile(pauses(), 50.0)),
            shown(percentile(pauses(), 99.0)),
            shown(percentile(pauses(), 100.0)),
            sum(|run| run.sent_pages).to_string(),
            sum(|run| run.dirtied_pages).to_string(),
            sum(|run| run.device_bytes).to_string(),
            more.to_string(),
            sum(|run| run.reconfigured_bytes).to_string(),
        ]);
    }
    let count = pauses().count();
    let median = percentile(pauses(), 50.0);
    let twice = runs.iter().filter(|run| run.sent_pages > run.dirtied_pages).count();
    // A stream's own framing of what is new: a header per reconfiguration.
    let framed = |run: &&&Run| {
        let more = run.device_bytes.saturating_sub(plain);
        more > run.reconfigured_bytes + run.reconfigured_bytes / 50
    };
    let again = of("revoked").filter(framed).count();
    let verdicts = vec![
        Verdict::all_completed(runs),
        Verdict::count(format!("{count} switchovers were revoked"), count > 0),
        Verdict::count(
            format!("{twice} migrations sent more pages than were found dirty"),
            twice == 0 && runs.iter().all(|run| run.dirtied_pages > 0),
        ),
        Verdict::count(
            format!(
                "{again} migrations sent more of their devices than a plain one and what was reconfigured"
            ),
            again == 0 && plain > 0,
        ),
        Verdict::time(
            format!("the median pause of a revoked switchover is {median:.1} ms: at most 10"),
            median <= PAUSE_MAX_MS,
        ),
    ];
    (table, verdicts)
}
