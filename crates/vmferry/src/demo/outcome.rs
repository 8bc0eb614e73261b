//! What came of the demonstration's migrations.

use migration::report::{DeviceReport, Report};
use serde_json::{Value, json};

use crate::cli::Scenario;
use crate::report::is_identical;

/// One migration and what it had to show.
pub struct Outcome {
    /// For people.
    pub title: &'static str,
    /// The migration's own report.
    pub report: Report,
    /// What it had to show.
    pub demands: Vec<Demand>,
}

/// Something that had to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// What, for people.
    pub what: String,
    /// It did.
    pub met: bool,
}

impl Demand {
    /// A demand.
    pub fn new(what: impl Into<String>, met: bool) -> Self {
        Self { what: what.into(), met }
    }
}

impl Outcome {
    /// `report` and the demands that every migration has; `of_scenario` come on top. Hashes count where the
    /// migration was to make them.
    pub fn new(
        title: &'static str,
        report: Report,
        hashed: bool,
        of_scenario: Vec<Demand>,
    ) -> Self {
        let what = match &report.failure {
            Some(failure) => format!("the migration is {}: {failure}", report.status),
            None => format!("the migration is {}", report.status),
        };
        let mut demands = vec![Demand::new(what, report.status == "completed")];
        if hashed && report.status == "completed" {
            demands.push(Demand::new(
                "memory is identical, by hashes both sides made from scratch",
                report.memory_identical == Some(true),
            ));
            demands.push(Demand::new(
                "device state is identical, by the devices' own digests",
                report.device_state_identical == Some(true),
            ));
        }
        demands.extend(of_scenario);
        Self { title, report, demands }
    }

    /// Everything was shown.
    pub fn is_met(&self) -> bool {
        self.demands.iter().all(|demand| demand.met)
    }
}

/// All of it. With one migration the keys are its report's. With several the counters are sums, and times
/// are those of the longest downtime; each is there in full under `migrations`.
pub fn json(outcomes: &[Outcome], guest: &str, scenario: Scenario) -> Value {
    let mut value = match outcomes {
        [one] => json!(one.report),
        several => summed(several),
    };
    let demands = outcomes.iter().flat_map(|outcome| &outcome.demands);
    value["guest"] = json!(guest);
    value["scenario"] = match scenario {
        Scenario::Plain => json!("plain"),
        Scenario::LateReinit => json!("late-reinit"),
    };
    value["demands"] = demands.map(|d| json!({"what": d.what, "met": d.met})).collect();
    value
}

fn summed(outcomes: &[Outcome]) -> Value {
    let reports = || outcomes.iter().map(|outcome| &outcome.report);
    let longest = reports().max_by(|a, b| {
        let ms = |report: &Report| report.downtime_ms.unwrap_or(-1.0);
        ms(a).total_cmp(&ms(b))
    });
    let mut sum = longest.cloned().unwrap_or_default();
    if let Some(bad) = reports().find(|report| report.status != "completed") {
        sum.status = bad.status.clone();
        sum.failure = bad.failure.clone();
    }
    let all = |compared: fn(&Report) -> Option<bool>| {
        let any = reports().any(|report| compared(report).is_some());
        any.then(|| reports().all(|report| compared(report) == Some(true)))
    };
    sum.memory_identical = all(|report| report.memory_identical);
    sum.device_state_identical = all(|report| report.device_state_identical);
    sum.total_time_ms = reports().map(|r| r.total_time_ms).sum();
    sum.switchover_attempts = reports().map(|r| r.switchover_attempts).sum();
    sum.switchover_revocations = reports().map(|r| r.switchover_revocations).sum();
    sum.switchover_roll_backs = reports().map(|r| r.switchover_roll_backs).sum();
    sum.switchover_absorptions = reports().map(|r| r.switchover_absorptions).sum();
    sum.ram.transferred = reports().map(|r| r.ram.transferred).sum();
    sum.ram.normal = reports().map(|r| r.ram.normal).sum();
    sum.ram.duplicate = reports().map(|r| r.ram.duplicate).sum();
    sum.ram.dirty_sync_count = reports().map(|r| r.ram.dirty_sync_count).sum();
    for device in &mut sum.devices {
        let same = || reports().flat_map(|r| &r.devices).filter(|d| d.id == device.id);
        *device = DeviceReport {
            id: device.id.clone(),
            initial_bytes: same().map(|d| d.initial_bytes).sum(),
            dirty_bytes: same().map(|d| d.dirty_bytes).sum(),
            stop_copy_bytes: same().map(|d| d.stop_copy_bytes).sum(),
            reinits: same().map(|d| d.reinits).sum(),
            late_reinits: same().map(|d| d.late_reinits).sum(),
            acks: same().map(|d| d.acks).sum(),
            ..device.clone()
        };
    }
    let mut value = json!(sum);
    value["migrations"] = outcomes
        .iter()
        .map(|outcome| {
            let mut report = json!(outcome.report);
            report["title"] = json!(outcome.title);
            report["identical"] = json!(is_identical(&outcome.report));
            report
        })
        .collect();
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(downtime_ms: f64, revocations: u32, absorptions: u32) -> Report {
        Report {
            status: "completed".into(),
            downtime_ms: Some(downtime_ms),
            switchover_revocations: revocations,
            switchover_absorptions: absorptions,
            memory_identical: Some(true),
            device_state_identical: Some(true),
            devices: vec![DeviceReport { id: "a".into(), reinits: 1, ..DeviceReport::default() }],
            ..Report::default()
        }
    }

    #[test]
    fn two_migrations_are_summed_and_kept() {
        let outcomes = [
            Outcome::new("large", report(90.0, 1, 0), true, Vec::new()),
            Outcome::new("small", report(80.0, 0, 1), true, Vec::new()),
        ];
        let value = json(&outcomes, "kvm", Scenario::LateReinit);
        assert_eq!(value["status"], "completed");
        assert_eq!(value["downtime-ms"], 90.0);
        assert_eq!(value["switchover-revocations"], 1);
        assert_eq!(value["switchover-absorptions"], 1);
        assert_eq!(value["devices"][0]["reinits"], 2);
        assert_eq!(value["migrations"][1]["downtime-ms"], 80.0);
        assert_eq!(value["guest"], "kvm");
    }

    #[test]
    fn what_was_not_to_be_hashed_is_not_asked_for() {
        let unknown = Report { memory_identical: None, ..report(1.0, 0, 0) };
        assert!(Outcome::new("a", unknown.clone(), false, Vec::new()).is_met());
        assert!(!Outcome::new("a", unknown, true, Vec::new()).is_met());
    }

    #[test]
    fn one_that_was_not_compared_spoils_the_sum() {
        let unknown = Report { memory_identical: None, ..report(1.0, 0, 0) };
        let failed = Report { status: "failed".into(), ..report(1.0, 0, 0) };
        let outcomes = [
            Outcome::new("a", unknown, true, Vec::new()),
            Outcome::new("b", failed, true, Vec::new()),
        ];
        assert!(outcomes.iter().all(|outcome| !outcome.is_met()));
        let value = json(&outcomes, "kvm", Scenario::LateReinit);
        assert_eq!(value["memory-identical"], false);
        assert_eq!(value["status"], "failed");
    }
}
