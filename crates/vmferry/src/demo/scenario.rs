//! What the demonstration shows: when its guest reconfigures its device, and what must come of it.
//!
//! In strict mode nothing is hashed before the guest starts, since it would stand still for that; then the guest's
//! own check of its memory is what is left.

use anyhow::Context;
use device_profile::Profile;
use migration::report::Report;
use serde_json::{Value, json};

use super::host::{Host, Lab};
use super::outcome::{Demand, Outcome};
use super::say;
use crate::cli::DowntimeMode;
use crate::units::{as_ms, show_bytes, show_ms};

/// New initial data of the plain scenario, and of what is small enough, in KiB.
const SMALL_KIB: u32 = 256;
/// Where it is small enough the limit is so many times as long.
const SMALL_TIMES: u32 = 2;
/// New initial data that is too large takes so many times what the link carries within the limit.
const TOO_LARGE: f64 = 2.0;

/// The guest reconfigures its device while it migrates, before anything is decided.
pub fn plain(lab: &mut Lab<'_>, reinit: bool) -> anyhow::Result<Outcome> {
    say("starting source and destination, a daemon and its device servers each");
    let mut source = lab.start_source()?;
    let (mut destination, address) = lab.start_destination()?;
    if is_strict(lab) {
        // A limit that cannot be kept is refused at once, so it must be the real one from the start.
        start(lab, &mut source, &address, as_ms(lab.args().downtime_limit), &[])?;
        let report = finish(&mut source)?;
        let demands = arrived(&mut source, &mut destination, &report)?;
        return Ok(outcome(lab, "within the limit, or not at all", report, demands));
    }
    // Nothing fits into no time at all, so the switchover waits until the limit is the real one.
    start(lab, &mut source, &address, 0.0, &[])?;
    source.wait_progress("all initial data was acknowledged", |progress| {
        progress["state"] == json!("precopy")
            && devices(progress).all(|device| device["acks"].as_u64() >= Some(1))
    })?;
    say("all devices' initial data has arrived; now the guest reconfigures its device");
    reconfigure(&mut source, 1, SMALL_KIB)?;
    if reinit {
        source.wait_progress("the device announced new initial data", |progress| {
            devices(progress).next().is_some_and(|device| device["reinits"].as_u64() >= Some(1))
        })?;
    }
    let limit_ms = as_ms(lab.args().downtime_limit);
    source.call("set", json!({"downtime-limit-ms": limit_ms}))?;
    let report = finish(&mut source)?;
    let mut demands = Vec::new();
    if reinit {
        let met = report.devices.first().is_some_and(|d| d.reinits > d.late_reinits);
        demands.push(Demand::new("the device announced new initial data during precopy", met));
    }
    demands.extend(arrived(&mut source, &mut destination, &report)?);
    Ok(outcome(lab, "the guest reconfigures its device during precopy", report, demands))
}

fn is_strict(lab: &Lab<'_>) -> bool {
    lab.args().downtime_mode == DowntimeMode::Strict
}

/// A migration with what it had to show: in strict mode that the limit was kept, whatever became of it.
fn outcome(
    lab: &Lab<'_>,
    title: &'static str,
    report: Report,
    mut demands: Vec<Demand>,
) -> Outcome {
    let strict = is_strict(lab);
    if strict {
        let own = report.downtime_ms.map(|all| all - report.verification_ms.unwrap_or(0.0));
        let worst = report.source_blackouts_ms.iter().copied().chain(own).fold(0.0, f64::max);
        let limit = report.downtime_limit_ms;
        let shown = (show_ms(Some(limit)), show_ms(Some(worst)));
        let what = format!("no blackout was longer than {}; the longest: {}", shown.0, shown.1);
        demands.insert(0, Demand::new(what, worst <= limit));
    }
    Outcome::new(title, report, !strict, demands)
}

/// The guest reconfigures its device after the decision to switch over fell, on each of two migrations.
pub fn late_reinit(lab: &mut Lab<'_>, profile: &Profile) -> anyhow::Result<Vec<Outcome>> {
    say("starting the source, a daemon and its device servers");
    let source = lab.start_source()?;
    let (large, middle) = late_large(lab, source, profile)?;
    let Some(middle) = middle else { return Ok(vec![large]) };
    Ok(vec![large, late_small(lab, middle)?])
}

fn late_large<'a>(
    lab: &mut Lab<'a>,
    mut source: Host<'a>,
    profile: &Profile,
) -> anyhow::Result<(Outcome, Option<Host<'a>>)> {
    let (mut destination, address) = lab.start_destination()?;
    let Some(progress) = hold_at_look(lab, &mut source, &address)? else {
        let report = finish(&mut source)?;
        let demands = arrived(&mut source, &mut destination, &report)?;
        return Ok((outcome(lab, "nothing was decided", report, demands), None));
    };
    let rate = progress["rate-bytes-per-s"].as_f64().unwrap_or(0.0);
    let bytes = (rate * lab.args().downtime_limit.as_secs_f64() * TOO_LARGE) as u64;
    let most = profile.sizes.initial_max_bytes.typical;
    let kib = u32::try_from(bytes.min(most) / 1024).unwrap_or(u32::MAX).max(SMALL_KIB);
    say(&format!(
        "the switchover is decided and the guest still runs: it reconfigures its device, with {} of new \
         initial data",
        show_bytes(u64::from(kib) * 1024)
    ));
    reconfigure(&mut source, 2, kib)?;
    source.call("release", json!({}))?;
    let report = finish(&mut source)?;
    let mut demands = vec![
        late(&report),
        Demand::new(
            format!(
                "the switchover was revoked while it could be ({} times), because the new data did not fit",
                report.switchover_revocations
            ),
            report.switchover_revocations >= 1,
        ),
    ];
    let completed = report.status == "completed";
    demands.extend(arrived(&mut source, &mut destination, &report)?);
    let title = "new initial data after the decision, too large for the limit";
    Ok((outcome(lab, title, report, demands), completed.then_some(destination)))
}

fn late_small<'a>(lab: &mut Lab<'a>, mut source: Host<'a>) -> anyhow::Result<Outcome> {
    let (mut destination, address) = lab.start_destination()?;
    if hold_at_look(lab, &mut source, &address)?.is_none() {
        let report = finish(&mut source)?;
        let demands = arrived(&mut source, &mut destination, &report)?;
        return Ok(outcome(lab, "nothing was decided", report, demands));
    }
    // It is taken along only where that fits for all but certain, and what a host of many jobs measured a
    // moment ago makes "certain" wide: a limit that leaves no doubt shows the answer and not the weather.
    let limit = lab.args().downtime_limit * SMALL_TIMES;
    say(&format!(
        "on to a third host: the same, with {} of new initial data and a limit of {}",
        show_bytes(u64::from(SMALL_KIB) * 1024),
        show_ms(Some(as_ms(limit)))
    ));
    source.call("set", json!({"downtime-limit-ms": as_ms(limit)}))?;
    reconfigure(&mut source, 3, SMALL_KIB)?;
    source.call("release", json!({}))?;
    let report = finish(&mut source)?;
    let mut demands = vec![
        late(&report),
        Demand::new(
            format!(
                "the switchover took the new data along ({} times), because it fitted",
                report.switchover_absorptions
            ),
            report.switchover_absorptions >= 1,
        ),
    ];
    demands.extend(arrived(&mut source, &mut destination, &report)?);
    let title = "new initial data after the decision, small enough";
    Ok(outcome(lab, title, report, demands))
}

fn late(report: &Report) -> Demand {
    let met = report.devices.first().is_some_and(|device| device.late_reinits >= 1);
    Demand::new("the device announced new initial data after the decision", met)
}

/// Starts a migration and holds it where the decision to switch over has fallen and the vCPUs still run;
/// answers its progress, or nothing when it ended before.
fn hold_at_look(
    lab: &Lab<'_>,
    source: &mut Host<'_>,
    address: &str,
) -> anyhow::Result<Option<Value>> {
    start(lab, source, address, as_ms(lab.args().downtime_limit), &["look"])?;
    let held = source.wait_held_or_ended().context("the switchover was never decided")?;
    if !held {
        return Ok(None);
    }
    Ok(Some(source.call("progress", json!({}))?["progress"].take()))
}

fn start(
    lab: &Lab<'_>,
    source: &mut Host<'_>,
    to: &str,
    limit_ms: f64,
    hold: &[&str],
) -> anyhow::Result<()> {
    let args = lab.args();
    let strict = is_strict(lab);
    let arguments = json!({
        "destination": to, "downtime-limit-ms": limit_ms, "verify": !strict, "hold": hold,
        "downtime-mode": if strict { "strict" } else { "best-effort" },
        "max-total-time-ms": args.max_total_time.map(as_ms),
        "policy": switchover::policy::Policy::from(args.policy).name(),
        "auto-converge": args.auto_converge,
        // Only strict mode asks for what a profile declares.
        "profiles": if strict { lab.profiles() } else { json!({}) },
    });
    say(&format!("migrating to {to}"));
    source.call("migrate", arguments)?;
    Ok(())
}

/// Has the guest reconfigure its first device, and waits for its answer.
fn reconfigure(host: &mut Host<'_>, generation: u32, kib: u32) -> anyhow::Result<()> {
    let arguments = json!({
        "command": "reconfigure", "device": 0, "generation": generation, "kib": kib,
        "timeout-ms": 20_000,
    });
    host.second_client()?
        .call("workload", arguments)
        .context("the guest reconfigures its device")?;
    Ok(())
}

fn finish(source: &mut Host<'_>) -> anyhow::Result<Report> {
    let mut answer = source.wait_long("migration-end")?;
    Ok(serde_json::from_value(answer["report"].take())?)
}

/// What must hold on both sides once the guest has arrived; of one that stayed, that it lives.
fn arrived(
    source: &mut Host<'_>,
    destination: &mut Host<'_>,
    report: &Report,
) -> anyhow::Result<Vec<Demand>> {
    if report.status != "completed" {
        let (before, after) = watch(source)?;
        let lives = after["beats"] != before["beats"] && after["errors"] == json!(0);
        return Ok(vec![Demand::new("the guest lives on at the source, with its memory", lives)]);
    }
    destination.wait_long("running")?;
    let (before, after) = watch(destination)?;
    let ended = source.wait_ended()?;
    Ok(vec![
        Demand::new("the guest lives at the destination", after["beats"] != before["beats"]),
        Demand::new(
            format!("the guest finds its own memory as it left it ({} writes)", after["writes"]),
            after["errors"] == json!(0),
        ),
        Demand::new(format!("the source ended by itself ({ended})"), ended.success()),
    ])
}

/// The guest's counters, before and after a sign of life.
fn watch(host: &mut Host<'_>) -> anyhow::Result<(Value, Value)> {
    let before = host.call("workload", json!({"command": "counters"}))?;
    let mut after = before.clone();
    for _ in 0..500 {
        if after["beats"] != before["beats"] {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
        after = host.call("workload", json!({"command": "counters"}))?;
    }
    Ok((before, after))
}

fn devices(progress: &Value) -> impl Iterator<Item = &Value> {
    progress["devices"].as_array().into_iter().flatten()
}
