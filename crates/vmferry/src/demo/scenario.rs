//! What the demonstration shows: when its guest reconfigures its device, and what must come of it.

use anyhow::Context;
use device_profile::Profile;
use migration::report::Report;
use serde_json::{Value, json};

use super::host::{Host, Lab};
use super::outcome::{Demand, Outcome};
use super::say;
use crate::units::{as_ms, show_bytes};

/// New initial data of the plain scenario, and of what is small enough, in KiB.
const SMALL_KIB: u32 = 256;
/// New initial data that is too large takes so many times what the link carries within the limit.
const TOO_LARGE: f64 = 2.0;

/// The guest reconfigures its device while it migrates, before anything is decided.
pub fn plain(lab: &mut Lab<'_>, reinit: bool) -> anyhow::Result<Outcome> {
    say("starting source and destination, a daemon and its device servers each");
    let mut source = lab.start_source()?;
    let (mut destination, address) = lab.start_destination()?;
    // Nothing fits into no time at all, so the switchover waits until the limit is the real one.
    start(&mut source, &address, 0.0, &[])?;
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
    Ok(Outcome::new("the guest reconfigures its device during precopy", report, demands))
}

/// The guest reconfigures its device after the decision to switch over fell, on each of two migrations.
pub fn late_reinit(lab: &mut Lab<'_>, profile: &Profile) -> anyhow::Result<Vec<Outcome>> {
    say("starting the source, a daemon and its device servers");
    let source = lab.start_source()?;
    let (outcome, middle) = late_large(lab, source, profile)?;
    let Some(middle) = middle else { return Ok(vec![outcome]) };
    Ok(vec![outcome, late_small(lab, middle)?])
}

fn late_large<'a>(
    lab: &mut Lab<'a>,
    mut source: Host<'a>,
    profile: &Profile,
) -> anyhow::Result<(Outcome, Option<Host<'a>>)> {
    let (mut destination, address) = lab.start_destination()?;
    let progress = hold_at_look(lab, &mut source, &address)?;
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
    Ok((Outcome::new(title, report, demands), completed.then_some(destination)))
}

fn late_small<'a>(lab: &mut Lab<'a>, mut source: Host<'a>) -> anyhow::Result<Outcome> {
    let (mut destination, address) = lab.start_destination()?;
    hold_at_look(lab, &mut source, &address)?;
    say(&format!(
        "on to a third host: the same, with {} of new initial data",
        show_bytes(u64::from(SMALL_KIB) * 1024)
    ));
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
    Ok(Outcome::new(title, report, demands))
}

fn late(report: &Report) -> Demand {
    let met = report.devices.first().is_some_and(|device| device.late_reinits >= 1);
    Demand::new("the device announced new initial data after the decision", met)
}

/// Starts a migration and holds it where the decision to switch over has fallen and the vCPUs still run;
/// answers its progress.
fn hold_at_look(lab: &Lab<'_>, source: &mut Host<'_>, address: &str) -> anyhow::Result<Value> {
    start(source, address, as_ms(lab.args().downtime_limit), &["look"])?;
    source.wait_long("held").context("the switchover was never decided")?;
    Ok(source.call("progress", json!({}))?["progress"].take())
}

fn start(source: &mut Host<'_>, to: &str, limit_ms: f64, hold: &[&str]) -> anyhow::Result<()> {
    let arguments = json!({
        "destination": to, "downtime-limit-ms": limit_ms, "verify": true, "hold": hold,
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

/// What must hold on both sides once the guest has arrived.
fn arrived(
    source: &mut Host<'_>,
    destination: &mut Host<'_>,
    report: &Report,
) -> anyhow::Result<Vec<Demand>> {
    if report.status != "completed" {
        return Ok(Vec::new());
    }
    destination.wait_long("running")?;
    let before = destination.call("workload", json!({"command": "counters"}))?;
    let mut after = before.clone();
    for _ in 0..500 {
        if after["beats"] != before["beats"] {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
        after = destination.call("workload", json!({"command": "counters"}))?;
    }
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

fn devices(progress: &Value) -> impl Iterator<Item = &Value> {
    progress["devices"].as_array().into_iter().flatten()
}
