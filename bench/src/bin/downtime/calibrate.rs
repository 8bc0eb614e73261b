//! Predicted beside measured: best effort without a limit, the same kind of VM again and again, what the
//! hosts learnt kept between migrations.

use std::time::Duration;

use bench::table::Table;
use serde_json::json;

use crate::Setting;
use crate::lab::{Chain, Device, Spec};
use crate::outcome::{Run, Verdict, percentile, shown};

/// So many, and those that only teach before them.
const RUNS: usize = 64 + LEARNT_AFTER;
/// From the n-th migration of a kind on its predictions are judged.
pub const LEARNT_AFTER: usize = 16;
/// No limit that any of them could come near.
const LIMIT_MS: f64 = 60_000.0;
const PATIENCE: Duration = Duration::from_secs(60);
/// Within so much of what was measured, or the other, whichever is more.
const RATIO_MAX: f64 = 0.2;
const DIFFERENCE_MAX_MS: f64 = 5.0;

const SPEC: Spec = Spec {
    memory: "256M",
    working_set: "64M",
    dirty_rate: "2000",
    dma_rate: "200",
    devices: &[Device { profile: "mlx5-vf", size: "64M" }],
};

pub fn run(setting: &Setting<'_>, runs: &mut Vec<Run>) -> anyhow::Result<()> {
    let mut chain = Chain::start(setting, SPEC)?;
    for number in 0..setting.args.runs.unwrap_or(RUNS) {
        if setting.signals.any() {
            break;
        }
        let arguments = json!({"downtime-limit-ms": LIMIT_MS});
        let report = chain.migrate(arguments, PATIENCE, |_, _| Ok(()))?;
        let run = Run::of("calibrate", "mlx5-vf", setting.guest.name(), number, &report);
        eprintln!("{}", run.line());
        runs.push(run);
    }
    Ok(())
}

pub fn judge(runs: &[&Run]) -> (Table, Vec<Verdict>) {
    let judged: Vec<_> = runs
        .iter()
        .filter(|run| run.number >= LEARNT_AFTER)
        .filter_map(|run| Some((run.expected_ms?, run.expected_upper_ms, run.downtime_ms?)))
        .collect();
    let count = judged.len();
    let errors = || judged.iter().map(|(expected, _, took)| (expected - took).abs());
    let share = |below: usize| below as f64 * 100.0 / count.max(1) as f64;
    let p50 = share(judged.iter().filter(|(expected, _, took)| took <= expected).count());
    let uppers = || judged.iter().filter_map(|(e, upper, took)| Some((*e, (*upper)?, *took)));
    let p99 = share(uppers().filter(|(_, upper, took)| took <= upper).count());
    let sharpness = percentile(uppers().map(|(expected, upper, _)| upper / expected), 50.0);
    let measured = || judged.iter().map(|(_, _, took)| *took);
    let median = percentile(measured(), 50.0);
    let error = percentile(errors(), 50.0);
    let relative =
        percentile(judged.iter().map(|(e, _, took)| (e - took).abs() / took * 100.0), 50.0);
    let mut table = Table::new([
        "judged",
        "measured P50 ms",
        "P99 ms",
        "predicted P50 ms",
        "predicted P99 ms",
        "median error ms",
        "median error",
        "P50 covers",
        "P99 covers",
        "P99/P50",
    ]);
    table.row([
        format!("{count} after the {LEARNT_AFTER}th"),
        shown(median),
        shown(percentile(measured(), 99.0)),
        shown(percentile(judged.iter().map(|(expected, _, _)| *expected), 50.0)),
        shown(percentile(uppers().map(|(_, upper, _)| upper), 50.0)),
        shown(error),
        format!("{relative:.1} %"),
        format!("{p50:.1} %"),
        format!("{p99:.1} %"),
        format!("{sharpness:.2}"),
    ]);
    let close = judged
        .iter()
        .map(|(e, _, took)| (e - took).abs() / (RATIO_MAX * took).max(DIFFERENCE_MAX_MS));
    let close = percentile(close, 50.0);
    let verdicts = vec![
        Verdict::all_completed(runs),
        Verdict::count(
            format!("{count} predictions after the {LEARNT_AFTER}th migration"),
            count > 0,
        ),
        Verdict::time(
            format!(
                "median |predicted P50 - measured| is {error:.1} ms ({relative:.1} %): within 20 % or 5 ms"
            ),
            close <= 1.0,
        ),
        Verdict::time(format!("predicted P99 covers {p99:.1} %: at least 95"), p99 >= 95.0),
    ];
    (table, verdicts)
}
