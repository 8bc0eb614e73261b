//! What a migration came to, as it is kept and judged.

use std::path::Path;

use anyhow::Context;
use bench::host::Host;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// One migration. Times in ms.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// Of which campaign.
    pub campaign: String,
    /// What happened on the way.
    pub scenario: String,
    /// Whose rule decided.
    pub policy: String,
    /// Its number in the chain of one guest, from 0.
    pub number: usize,
    /// `kvm` or `process`.
    pub guest: String,
    /// As reported; `gave up` when it was cancelled since it took too long.
    pub status: String,
    /// The limit.
    pub limit_ms: f64,
    /// The blackout of a completed migration.
    pub downtime_ms: Option<f64>,
    /// The same, as the guest's heartbeats show it.
    pub guest_observed_ms: Option<f64>,
    /// The middle of what was predicted before the pause.
    pub expected_ms: Option<f64>,
    /// Its upper quantile.
    pub expected_upper_ms: Option<f64>,
    /// From its start to its end.
    pub total_ms: f64,
    /// Blackouts that came to nothing.
    pub pauses_ms: Vec<f64>,
    /// Switchovers tried.
    pub attempts: u64,
    /// Switchovers revoked.
    pub revocations: u64,
    /// Those of them that were rolled back.
    pub roll_backs: u64,
    /// Switchovers that took new initial data along.
    pub absorptions: u64,
    /// New initial data after the decision.
    pub late_reinits: u64,
    /// Calls that took longer than the promise could know.
    pub overruns: Vec<String>,
    /// Pages sent, with content or as zeros.
    pub sent_pages: u64,
    /// Pages found dirty, all of memory at first included.
    pub dirtied_pages: u64,
    /// Bytes of the devices' streams.
    pub device_bytes: u64,
    /// Bytes the guest's reconfigurations added to them.
    pub reconfigured_bytes: u64,
    /// Why it failed.
    pub failure: Option<String>,
    /// Expected and measured parts of the blackout.
    pub terms: Value,
}

impl Run {
    /// Of the report of `vmferry`.
    pub fn of(campaign: &str, scenario: &str, guest: &str, number: usize, report: &Value) -> Self {
        let count = |key: &str| report[key].as_u64().unwrap_or_default();
        let devices = || report["devices"].as_array().into_iter().flatten();
        let sum = |keys: &[&str]| {
            devices().flat_map(|d| keys.iter().map(|key| d[*key].as_u64().unwrap_or(0))).sum()
        };
        let overruns = report["overruns"].as_array().into_iter().flatten();
        let ram = |key: &str| report["ram"][key].as_u64().unwrap_or_default();
        let gave_up = report["gave-up"] == true && report["status"] != "completed";
        Self {
            campaign: campaign.into(),
            scenario: scenario.into(),
            policy: String::new(),
            number,
            guest: guest.into(),
            status: if gave_up { "gave up" } else { report["status"].as_str().unwrap_or("?") }
                .into(),
            limit_ms: report["downtime-limit-ms"].as_f64().unwrap_or_default(),
            downtime_ms: report["downtime-ms"].as_f64(),
            guest_observed_ms: report["guest-observed-downtime-ms"].as_f64(),
            expected_ms: report["expected-downtime-ms"].as_f64(),
            expected_upper_ms: report["expected-downtime-upper-ms"].as_f64(),
            total_ms: report["total-time-ms"].as_f64().unwrap_or_default(),
            pauses_ms: serde_json::from_value(report["source-blackouts-ms"].clone())
                .unwrap_or_default(),
            attempts: count("switchover-attempts"),
            revocations: count("switchover-revocations"),
            roll_backs: count("switchover-roll-backs"),
            absorptions: count("switchover-absorptions"),
            late_reinits: sum(&["late-reinits"]),
            overruns: overruns.map(Value::to_string).collect(),
            sent_pages: ram("normal") + ram("duplicate"),
            dirtied_pages: ram("dirtied"),
            device_bytes: sum(&["initial-bytes", "dirty-bytes", "stop-copy-bytes"]),
            reconfigured_bytes: 0,
            failure: report["failure"]["what"].as_str().map(String::from),
            terms: report["terms"].clone(),
        }
    }

    /// It moved.
    pub fn completed(&self) -> bool {
        self.status == "completed"
    }

    /// Every blackout it had, the one of the move last.
    pub fn blackouts_ms(&self) -> impl Iterator<Item = f64> + '_ {
        self.pauses_ms.iter().copied().chain(self.downtime_ms)
    }

    /// It moved, and the guest never stood longer than the limit.
    pub fn kept(&self) -> bool {
        self.completed() && self.blackouts_ms().all(|ms| ms <= self.limit_ms)
    }

    /// One line for whoever watches.
    pub fn line(&self) -> String {
        let ms = |ms: Option<f64>| ms.map_or("-".into(), |ms| format!("{ms:.1}"));
        let mut line = format!(
            "{} {} {} #{}: {}, {} ms of {:.0} (expected {}, at most {}), {:.0} ms in all",
            self.campaign,
            self.scenario,
            self.policy,
            self.number,
            self.status,
            ms(self.downtime_ms),
            self.limit_ms,
            ms(self.expected_ms),
            ms(self.expected_upper_ms),
            self.total_ms,
        );
        for pause in &self.pauses_ms {
            line += &format!(", {pause:.1} ms for nothing");
        }
        for text in self.overruns.iter().chain(&self.failure) {
            line += &format!("; {text}");
        }
        line
    }
}

/// A demand and whether it was met.
pub struct Verdict {
    /// What, with the numbers.
    pub what: String,
    /// It was.
    pub met: bool,
    /// It is about times, which depend on the machine.
    pub time: bool,
}

impl Verdict {
    /// Of counts or ratios.
    pub fn count(what: impl Into<String>, met: bool) -> Self {
        Self { what: what.into(), met, time: false }
    }

    /// All came to their end.
    pub fn all_completed(runs: &[&Run]) -> Self {
        let completed = runs.iter().filter(|run| run.completed()).count();
        Self::count(format!("{completed} of {} completed", runs.len()), completed == runs.len())
    }

    /// Of times.
    pub fn time(what: impl Into<String>, met: bool) -> Self {
        Self { what: what.into(), met, time: true }
    }
}

/// The smallest value that so many percent of all do not exceed; NaN of nothing.
pub fn percentile(values: impl IntoIterator<Item = f64>, percent: f64) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * percent / 100.0).ceil() as usize;
    values.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// `12.3`, or `-` of nothing.
pub fn shown(ms: f64) -> String {
    if ms.is_nan() { "-".into() } else { format!("{ms:.1}") }
}

/// The runs of a file.
pub fn read(file: &Path) -> anyhow::Result<Vec<Run>> {
    let text = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let mut value: Value = serde_json::from_slice(&text)?;
    serde_json::from_value(value["runs"].take())
        .with_context(|| format!("{} holds no runs", file.display()))
}

/// Writes all of them.
pub fn write(file: &Path, runs: &[Run]) -> anyhow::Result<()> {
    let value = json!({"host": Host::here(), "runs": runs});
    std::fs::write(file, serde_json::to_string_pretty(&value)?)
        .with_context(|| format!("write {}", file.display()))
}

/// A Markdown table with its columns below each other.
pub fn aligned(markdown: &str) -> String {
    let rows: Vec<Vec<&str>> = markdown
        .lines()
        .filter(|line| !line.starts_with("|-"))
        .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
        .collect();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let line = |row: &Vec<&str>| {
        let cells = row.iter().enumerate().map(|(i, cell)| format!("{cell:<w$}", w = width(i)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        for (percent, value) in [(50.0, 2.0), (99.0, 4.0), (1.0, 1.0), (75.0, 3.0)] {
            assert_eq!(percentile([4.0, 1.0, 3.0, 2.0], percent), value, "{percent}");
        }
        assert!(percentile([], 50.0).is_nan());
    }

    #[test]
    fn a_blackout_that_came_to_nothing_counts() {
        let kept = |downtime_ms, pauses_ms: &[f64]| {
            let status = "completed".into();
            Run {
                status,
                limit_ms: 10.0,
                downtime_ms,
                pauses_ms: pauses_ms.into(),
                ..Run::default()
            }
            .kept()
        };
        assert!(kept(Some(9.0), &[1.0]));
        assert!(!kept(Some(9.0), &[11.0]));
        assert!(!kept(Some(11.0), &[]));
    }

    #[test]
    fn a_report_is_understood() {
        let report = json!({
            "status": "completed", "downtime-limit-ms": 300.0, "downtime-ms": 12.5,
            "source-blackouts-ms": [3.0], "switchover-revocations": 1,
            "ram": {"normal": 3, "duplicate": 2, "dirtied": 5},
            "devices": [{"initial-bytes": 1, "dirty-bytes": 2, "stop-copy-bytes": 3, "late-reinits": 1}],
            "overruns": [{"device": "nic0"}],
        });
        let run = Run::of("strict", "x", "kvm", 3, &report);
        assert_eq!((run.sent_pages, run.dirtied_pages, run.device_bytes), (5, 5, 6));
        assert_eq!((run.downtime_ms, run.late_reinits, run.overruns.len()), (Some(12.5), 1, 1));
        assert!(run.kept());
    }

    #[test]
    fn a_table_can_be_read_without_markdown() {
        assert_eq!(aligned("| a | bb |\n|---|---|\n| ccc | d |\n"), "a    bb\nccc  d\n");
    }
}
