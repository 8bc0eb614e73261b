//! The floor of the blackout: an idle guest, and nothing to carry.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::process::Process;
use crate::rival::{Ferry, Guest, Wish};
use crate::stats::Summary;

/// What several blackouts were made of.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Floor {
    /// Which guest.
    pub what: String,
    /// The blackouts in ms.
    pub downtime_ms: Summary,
    /// The part of each that its own account explains, in percent.
    pub explained_percent: Option<Summary>,
    /// The parts in µs, by side and name, as far as the report has them.
    pub parts_us: BTreeMap<String, Summary>,
}

/// Blackouts of an idle KVM guest with `devices` small devices, in processes of their own.
///
/// # Errors
/// A migration failed.
pub fn measure(vmferry: &Path, devices: usize, runs: usize) -> anyhow::Result<Floor> {
    let (mut downtimes, mut explained) = (Vec::new(), Vec::new());
    let mut parts: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..runs {
        let report = once(vmferry, devices)?;
        let downtime = report["downtime-ms"].as_f64().context("no downtime in the report")?;
        downtimes.push(downtime);
        if let Some(percent) =
            report.pointer("/blackout-timeline/accounted-percent").and_then(Value::as_f64)
        {
            explained.push(percent);
        }
        let entries = report.pointer("/blackout-timeline/parts").and_then(Value::as_array);
        for part in entries.into_iter().flatten() {
            if let (Some(name), Some(us)) = (part["name"].as_str(), part["us"].as_f64()) {
                let side = part["side"].as_str().unwrap_or_default();
                parts.entry(format!("{side} {name}")).or_default().push(us);
            }
        }
    }
    let what = match devices {
        0 => "idle guest, no device".to_owned(),
        1 => "idle guest, one small device".to_owned(),
        _ => format!("idle guest, {devices} small devices"),
    };
    Ok(Floor {
        what,
        downtime_ms: Summary::of(downtimes),
        explained_percent: (!explained.is_empty()).then(|| Summary::of(explained)),
        parts_us: parts.into_iter().map(|(name, us)| (name, Summary::of(us))).collect(),
    })
}

/// One migration's report.
fn once(vmferry: &Path, devices: usize) -> anyhow::Result<Value> {
    let dir = tempfile::tempdir()?;
    let mut servers = Vec::new();
    let (mut source_args, mut destination_args) = (Vec::new(), Vec::new());
    for place in 0..devices {
        for (side, args) in [("source", &mut source_args), ("destination", &mut destination_args)] {
            let socket = dir.path().join(format!("{side}{place}.sock"));
            let mut command = Command::new(vmferry);
            command.args(["device", "serve", "--profile", "qat", "--time-scale", "0", "--socket"]);
            command.arg(&socket);
            let mut server = Process::start(&format!("{side}{place}"), command, dir.path())?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while !socket.exists() {
                server.check_alive()?;
                if Instant::now() > deadline {
                    bail!("the device does not come up: {}", server.log());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            servers.push(server);
            args.push("--device".to_owned());
            args.push(format!("vfio-user:{},id=small{place}", socket.display()));
        }
    }
    let ferry = Ferry {
        executable: vmferry.into(),
        guest: Guest { memory_bytes: 64 << 20, working_set_pages: 256, pages_per_s: 0, seed: 1 },
        run_args: Vec::new(),
        source_args,
        destination_args,
        migrate_args: Default::default(),
    };
    let patience = Duration::from_secs(20);
    let wish = Wish { limit_ms: 300, patience, dir: dir.path().into() };
    let (outcome, report) = ferry.migrate(&wish)?;
    if !outcome.completed {
        bail!("the migration did not end within {} s", patience.as_secs());
    }
    Ok(report)
}
