//! `vmferry migrate`: asks a daemon for a migration, shows how it goes and prints its report.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::bail;
use migration::channel::Address;
use migration::report::{Progress, Report};
use serde_json::{Value, json};

use crate::api::{CallError, Client};
use crate::cli::{DowntimeMode, MigrateArgs};
use crate::query::DOUBT;
use crate::report;
use crate::signals::Signals;
use crate::units::{as_ms, show_bytes, show_ms};

/// How often the progress line is renewed.
const STEP: Duration = Duration::from_millis(100);
/// The same where the line cannot be overwritten.
const STEP_PLAIN: Duration = Duration::from_secs(1);

/// Migrates; answers whether what was asked for was reached.
pub fn run(args: &MigrateArgs, signals: &Signals) -> anyhow::Result<bool> {
    if args.local && !matches!(args.destination, Address::Unix(_)) {
        bail!(
            "--local hands memory over by a UNIX socket: have the destination listen on one, and name it unix:PATH"
        );
    }
    let mut client = Client::connect_patiently(&args.api)?;
    while client.call("status", json!({}))?["state"] == "starting" && !signals.any() {
        std::thread::sleep(STEP);
    }
    let policy = switchover::policy::Policy::from(args.policy);
    let arguments = json!({
        "destination": args.destination.to_string(),
        "downtime-limit-ms": as_ms(args.downtime_limit),
        "downtime-mode": match args.downtime_mode {
            DowntimeMode::BestEffort => "best-effort",
            DowntimeMode::Strict => "strict",
        },
        "max-total-time-ms": args.max_total_time.map(as_ms),
        "policy": policy.name(),
        "rehearse": args.rehearse,
        "auto-converge": args.auto_converge,
        "profiles": profiles(args)?,
        "allow-unbounded": args.allow_unbounded,
        "channels": args.channels,
        "record": args.record.as_ref().map(std::path::absolute).transpose()?,
        "compression": clap::ValueEnum::to_possible_value(&args.compression)
            .map(|value| value.get_name().to_owned()),
        "max-bandwidth": args.max_bandwidth,
        "avail-switchover-bandwidth": args.avail_switchover_bandwidth,
        "verify": args.verify,
        "dry-run": args.dry_run,
        "local": args.local,
    });
    client.call("migrate", arguments)?;
    let report = follow(&mut client, args, signals)?;
    let parsed: Report = serde_json::from_value(report.clone())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report::text(&parsed, report["guest"].as_str()));
    }
    Ok(reached(&parsed, args.verify))
}

/// By device: the name of a profile that comes along, or the text of one from a file here.
fn profiles(args: &MigrateArgs) -> anyhow::Result<Value> {
    let mut profiles = serde_json::Map::new();
    for (id, name) in &args.profiles {
        // Looked at here, where a mistake is told at once.
        crate::device::profile(name)?;
        let is_file = name.contains('/') || name.ends_with(".toml");
        let text = if is_file { std::fs::read_to_string(name)? } else { name.clone() };
        profiles.insert(id.clone(), text.into());
    }
    Ok(Value::Object(profiles))
}

/// The guest runs there, with what was to be verified verified; or a dry run found that it fits.
fn reached(report: &Report, verify: bool) -> bool {
    match report.status.as_str() {
        "completed" => !verify || report::is_identical(report),
        "dry-run" => report.failure.is_none(),
        _ => false,
    }
}

/// Shows progress until the report is there.
fn follow(client: &mut Client, args: &MigrateArgs, signals: &Signals) -> anyhow::Result<Value> {
    let mut line = ProgressLine::new();
    let mut seen = 0;
    let mut doubt_told = false;
    loop {
        let arguments = json!({"for": "migration-end", "timeout-ms": as_ms(STEP)});
        let mut answer = match client.call("wait", arguments) {
            Ok(answer) => answer,
            Err(error @ CallError::Gone { .. }) => {
                line.end();
                bail!("{error}; ask the destination (vmferry status) whether the guest runs there");
            }
            Err(error) => return Err(error.into()),
        };
        if answer["done"] == json!(true) {
            line.end();
            return Ok(answer["report"].take());
        }
        let progress: Progress = serde_json::from_value(answer["progress"].take())?;
        line.show(&progress);
        if progress.status == "in-doubt" && !std::mem::replace(&mut doubt_told, true) {
            line.end();
            eprintln!("{DOUBT}");
        }
        let count = signals.count();
        if count > seen {
            if seen > 0 {
                line.end();
                bail!(
                    "left alone; the migration goes on (vmferry status --api {})",
                    args.api.display()
                );
            }
            seen = count;
            line.end();
            match client.call("cancel", json!({})) {
                Ok(_) => eprintln!("cancelling; ^C again leaves the migration alone"),
                Err(CallError::Api(error)) => eprintln!("not cancelled: {error}"),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// One line on standard error, overwritten where that is a terminal.
struct ProgressLine {
    terminal: bool,
    shown: usize,
    next: Instant,
}

impl ProgressLine {
    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { terminal, shown: 0, next: Instant::now() }
    }

    fn show(&mut self, progress: &Progress) {
        let line = progress_text(progress);
        if !self.terminal {
            if Instant::now() >= self.next {
                eprintln!("{line}");
                self.next = Instant::now() + STEP_PLAIN;
            }
            return;
        }
        let width = line.chars().count();
        let blank = " ".repeat(self.shown.saturating_sub(width));
        eprint!("\r{line}{blank}");
        // A line that is shown late is still shown.
        let _ = std::io::stderr().flush();
        self.shown = width;
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.shown) > 0 {
            eprintln!();
        }
    }
}

/// `precopy  pass 3  87 %  left 12.3 MiB (devices 4.0 MiB)  1.2 GiB/s  expected 143 ms of 300 ms`
fn progress_text(progress: &Progress) -> String {
    let known = progress.devices.iter().map(|device| device.remaining);
    let devices = known.sum::<Option<u64>>().map_or("unknown".into(), show_bytes);
    let left = progress.remaining.map_or("unknown".into(), show_bytes);
    let mut line = format!(
        "{:<11} pass {} {:>3} %  left {left} (devices {devices})  {}/s  expected {} of {}",
        progress.state,
        progress.pass,
        percent(progress),
        show_bytes(progress.rate_bytes_per_s),
        show_ms(progress.expected_downtime_ms),
        show_ms(Some(progress.downtime_limit_ms)),
    );
    if progress.cpu_throttle_percentage > 0 {
        line += &format!("  throttled {} %", progress.cpu_throttle_percentage);
    }
    if progress.switchover_revocations > 0 {
        line += &format!("  revoked {}", progress.switchover_revocations);
    }
    if let Some(call) = &progress.slow_call {
        line += &format!("  waiting for {call}");
    }
    line
}

/// How much of the guest is there; 100 only once it is committed, because until then all of it may still
/// have been for nothing.
fn percent(progress: &Progress) -> u64 {
    if progress.status == "completed" {
        return 100;
    }
    let left = progress.remaining.unwrap_or(progress.ram.remaining);
    let devices: u64 =
        progress.devices.iter().map(|d| d.initial_bytes + d.dirty_bytes + d.stop_copy_bytes).sum();
    let total = progress.ram.total.saturating_add(devices).max(1);
    (total.saturating_sub(left).saturating_mul(100) / total).min(99)
}

#[cfg(test)]
mod tests {
    use migration::report::{DeviceReport, RamReport};

    use super::*;

    fn progress() -> Progress {
        Progress {
            status: "active".into(),
            state: "precopy".into(),
            pass: 3,
            remaining: Some(0),
            ram: RamReport { total: 1 << 30, ..RamReport::default() },
            devices: vec![DeviceReport { remaining: Some(0), ..DeviceReport::default() }],
            downtime_limit_ms: 300.0,
            ..Progress::default()
        }
    }

    #[test]
    fn nothing_is_complete_before_it_is_committed() {
        assert_eq!(percent(&progress()), 99);
        assert_eq!(percent(&Progress { status: "completed".into(), ..progress() }), 100);
        let half = Progress { remaining: Some(1 << 29), ..progress() };
        assert_eq!(percent(&half), 50);
        assert_eq!(percent(&Progress::default()), 99, "no memory at all is no division by it");
    }

    #[test]
    fn what_is_unknown_is_said_to_be() {
        let mut progress = progress();
        progress.devices.push(DeviceReport::default());
        progress.remaining = None;
        let line = progress_text(&progress);
        assert!(line.contains("left unknown (devices unknown)"), "{line}");
        assert!(line.contains("expected unknown of 300 ms"), "{line}");
    }

    #[test]
    fn only_a_completed_and_verified_migration_counts_when_it_was_to_be_verified() {
        let report = |status: &str, memory, devices| Report {
            status: status.into(),
            memory_identical: memory,
            device_state_identical: devices,
            devices: vec![DeviceReport::default()],
            ..Report::default()
        };
        assert!(reached(&report("completed", None, None), false));
        assert!(!reached(&report("completed", None, None), true));
        assert!(!reached(&report("completed", Some(true), None), true));
        assert!(!reached(&report("completed", Some(true), Some(false)), true));
        assert!(reached(&report("completed", Some(true), Some(true)), true));
        assert!(!reached(&report("failed", Some(true), Some(true)), true));
        assert!(!reached(&report("cancelled", None, None), false));
        assert!(reached(&report("dry-run", None, None), true));
        let no_device = Report { devices: Vec::new(), ..report("completed", Some(true), None) };
        assert!(reached(&no_device, true), "without devices, memory is all there is");
    }
}
