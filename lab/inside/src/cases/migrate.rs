//! Whole migrations of a guest with ferrydev, between daemons in the lab: each host has a device of its own,
//! made anew. The guest drives it by its registers, takes its interrupts and its DMA.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::case::{Case, Outcome};
use crate::hosts::{Daemon, Guest, LIMIT, Way};
use crate::lab::{Lab, Mdev, Parent, wait_until_for};

/// State of each device.
const STATE_BYTES: u64 = 4 << 20;
/// A limit within which a switchover fits, on an emulated machine that hashes nothing.
const LIMIT_MS: f64 = 3000.0;
/// New initial data that fits.
const SMALL_KIB: u64 = 256;
/// New initial data that is too large takes so many times what the link carries within the limit.
const TOO_LARGE: f64 = 2.0;
/// A limit that new initial data of [`MOST_KIB`] cannot meet even on loopback.
const TIGHT_LIMIT_MS: f64 = 400.0;
/// The most new initial data that is asked for.
const MOST_KIB: u64 = 256 << 10;

/// The cases of this part.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("migrate-process-guest-by-cdev", |lab| twice(lab, Guest::Process, Way::Cdev))
            .limit_s(180),
        Case::new("migrate-process-guest-by-group", |lab| twice(lab, Guest::Process, Way::Group))
            .limit_s(180),
        Case::new("migrate-kvm-guest-by-cdev", |lab| twice(lab, Guest::Kvm, Way::Cdev))
            .limit_s(180),
        Case::new("migrate-kvm-guest-by-group", |lab| twice(lab, Guest::Kvm, Way::Group))
            .limit_s(180),
        Case::new("migrate-from-cdev-to-group", across_ways).limit_s(120),
        Case::new("migrate-several-devices", several).limit_s(180),
        Case::new("migrate-device-reset-in-the-stream", |lab| reset(lab, "reset-device"))
            .limit_s(180),
        Case::new("migrate-guest-reset-in-the-stream", |lab| reset(lab, "reset-machine"))
            .limit_s(180),
        Case::new("migrate-source-killed-in-precopy", |lab| source_killed(lab, "precopy"))
            .limit_s(180),
        Case::new("migrate-source-killed-in-stop-copy", |lab| source_killed(lab, "stop-copy"))
            .limit_s(180),
        Case::new("migrate-destination-killed-in-precopy", |lab| {
            destination_killed(lab, "precopy")
        })
        .limit_s(180),
        Case::new("migrate-destination-killed-in-stop-copy", |lab| {
            destination_killed(lab, "stop-copy")
        })
        .limit_s(180),
        Case::new("migrate-without-the-devices-log-is-found-out", log_ignored).limit_s(120),
    ]
}

fn device(lab: &Lab) -> anyhow::Result<Mdev> {
    let device = lab.create(Parent::Ferrydev)?;
    device.set("state_bytes", STATE_BYTES)?;
    Ok(device)
}

/// Over three hosts, each time with new initial data after the decision: too much of it, then little.
fn twice(lab: &Lab, guest: Guest, way: Way) -> anyhow::Result<Outcome> {
    let (a, b, c) = (device(lab)?, device(lab)?, device(lab)?);
    let mut first = lab.source("first", guest, &[way.device(&a, "nic0")])?;
    ensure_device_works(&first, 0)?;
    let (mut second, address) = lab.destination("second", guest, &[way.device(&b, "nic0")])?;

    let arguments = json!({"verify": true, "downtime-limit-ms": LIMIT_MS});
    first.migrate_and_hold(&address, "look", arguments.clone())?;
    let progress = first.call("progress", json!({}))?;
    let rate = progress["progress"]["rate-bytes-per-s"].as_f64().unwrap_or(0.0);
    let kib = (rate * TIGHT_LIMIT_MS / 1e3 * TOO_LARGE / 1024.0) as u64;
    reconfigure(&first, 2, kib.clamp(SMALL_KIB, MOST_KIB))?;
    first.call("set", json!({"downtime-limit-ms": TIGHT_LIMIT_MS}))?;
    first.call("release", json!({}))?;
    wait_until_for("the switchover is taken back", LIMIT, || {
        let answer = first.call("progress", json!({}))?;
        ensure!(answer["done"] != true, "it was not taken back: {}", answer["report"]);
        Ok(answer["progress"]["switchover-revocations"].as_u64() >= Some(1))
    })?;
    first.call("set", json!({"downtime-limit-ms": LIMIT_MS}))?;
    let report = first.report_of_identical()?;
    ensure!(number(&report["switchover-revocations"])? >= 1, "nothing was revoked: {report}");
    ensure_late_reinit(&report)?;
    arrived(&mut first, &second)?;

    let (mut third, address) = lab.destination("third", guest, &[way.device(&c, "nic0")])?;
    second.migrate_and_hold(&address, "look", arguments)?;
    reconfigure(&second, 3, SMALL_KIB)?;
    second.call("release", json!({}))?;
    let report = second.report_of_identical()?;
    ensure!(number(&report["switchover-absorptions"])? >= 1, "nothing was absorbed: {report}");
    ensure_late_reinit(&report)?;
    arrived(&mut second, &third)?;
    third.kill()?;
    Ok(Outcome::Passed)
}

/// The two ways to open a device need not be the same on both sides.
fn across_ways(lab: &Lab) -> anyhow::Result<Outcome> {
    let (a, b) = (device(lab)?, device(lab)?);
    let mut source = lab.source("source", Guest::Kvm, &[Way::Cdev.device(&a, "nic0")])?;
    let (destination, address) =
        lab.destination("destination", Guest::Kvm, &[Way::Group.device(&b, "nic0")])?;
    migrate(&source, &address)?;
    arrived(&mut source, &destination)?;
    Ok(Outcome::Passed)
}

fn several(lab: &Lab) -> anyhow::Result<Outcome> {
    const COUNT: usize = 3;
    let mut sides = Vec::new();
    let mut made = Vec::new();
    for _ in 0..2 {
        let mut names = Vec::new();
        for place in 0..COUNT {
            let device = lab.create(Parent::Ferrydev)?;
            // Each of another size, so that a mix-up shows.
            device.set("state_bytes", STATE_BYTES + (place as u64) * (1 << 20))?;
            let way = if place == 1 { Way::Group } else { Way::Cdev };
            names.push(way.device(&device, &format!("nic{place}")));
            made.push(device);
        }
        sides.push(names);
    }
    let mut source = lab.source("source", Guest::Kvm, &sides[0])?;
    let (destination, address) = lab.destination("destination", Guest::Kvm, &sides[1])?;
    for place in 0..COUNT {
        ensure_device_works(&source, place)?;
    }
    let report = migrate(&source, &address)?;
    let devices = report["devices"].as_array().map_or(0, Vec::len);
    ensure!(devices == COUNT, "the report has {devices} devices");
    arrived(&mut source, &destination)?;
    for place in 0..COUNT {
        ensure_device_works(&destination, place)?;
    }
    Ok(Outcome::Passed)
}

/// The guest resets its device, or itself, when all initial data had arrived.
fn reset(lab: &Lab, command: &str) -> anyhow::Result<Outcome> {
    let (a, b) = (device(lab)?, device(lab)?);
    let mut source = lab.source("source", Guest::Kvm, &[Way::Cdev.device(&a, "nic0")])?;
    let (destination, address) =
        lab.destination("destination", Guest::Kvm, &[Way::Cdev.device(&b, "nic0")])?;
    // Nothing fits into no time at all: precopy goes on.
    source.migrate(&address, json!({"verify": true, "downtime-limit-ms": 0.0}))?;
    acknowledged(&source, 1)?;
    match command {
        "reset-device" => source.workload(json!({"command": command, "device": 0}))?,
        _ => source.workload(json!({"command": command}))?,
    };
    // The old acknowledgement is void, and a new one comes.
    acknowledged(&source, 2)?;
    source.call("set", json!({"downtime-limit-ms": LIMIT_MS}))?;
    source.report_of_identical()?;
    arrived(&mut source, &destination)?;
    Ok(Outcome::Passed)
}

/// The source's process is gone: nobody runs the guest, and both devices are there for the next one.
fn source_killed(lab: &Lab, phase: &str) -> anyhow::Result<Outcome> {
    let (a, b) = (device(lab)?, device(lab)?);
    let (here, there) = (Way::Cdev.device(&a, "nic0"), Way::Cdev.device(&b, "nic0"));
    let mut source = lab.source("source", Guest::Kvm, std::slice::from_ref(&here))?;
    let (mut destination, address) =
        lab.destination("destination", Guest::Kvm, std::slice::from_ref(&there))?;
    source.migrate_and_hold(&address, phase, json!({"downtime-limit-ms": LIMIT_MS}))?;
    source.kill()?;
    // It was never told to run.
    let status = destination.call("status", json!({}))?;
    ensure!(status["state"] == "incoming", "the destination is {}", status["state"]);
    destination.kill()?;
    start_over(lab, &here, &there)
}

/// The destination's process is gone: the guest lives on at the source, and moves to a new process with the
/// same device.
fn destination_killed(lab: &Lab, phase: &str) -> anyhow::Result<Outcome> {
    let (a, b) = (device(lab)?, device(lab)?);
    let (here, there) = (Way::Cdev.device(&a, "nic0"), Way::Cdev.device(&b, "nic0"));
    let mut source = lab.source("source", Guest::Kvm, &[here])?;
    let (mut destination, address) =
        lab.destination("destination", Guest::Kvm, std::slice::from_ref(&there))?;
    source.migrate_and_hold(&address, phase, json!({"downtime-limit-ms": LIMIT_MS}))?;
    destination.kill()?;
    source.call("release", json!({}))?;
    let report = source.report()?;
    ensure!(report["status"] == "failed", "the migration is {}", report["status"]);
    source.ensure_guest_lives()?;
    ensure_device_works(&source, 0)?;
    let (destination, address) = lab.destination("another", Guest::Kvm, &[there])?;
    migrate(&source, &address)?;
    arrived(&mut source, &destination)?;
    Ok(Outcome::Passed)
}

/// Negative control: without the kernel device's dirty log, what it wrote by DMA is missing, and verification
/// says so.
fn log_ignored(lab: &Lab) -> anyhow::Result<Outcome> {
    let (a, b) = (device(lab)?, device(lab)?);
    let source = lab.source("source", Guest::Kvm, &[Way::Cdev.device(&a, "nic0")])?;
    let (_destination, address) =
        lab.destination("destination", Guest::Kvm, &[Way::Cdev.device(&b, "nic0")])?;
    let arguments = json!({
        "verify": true, "downtime-limit-ms": 0.0, "controls": {"ignore-dma-log": true},
    });
    source.migrate(&address, arguments)?;
    wait_until_for("memory was sent once", LIMIT, || {
        let answer = source.call("progress", json!({}))?;
        Ok(answer["progress"]["pass"].as_u64() >= Some(2))
    })?;
    ensure_device_works(&source, 0)?;
    source.call("set", json!({"downtime-limit-ms": LIMIT_MS}))?;
    let report = source.report()?;
    ensure!(report["status"] == "failed", "it is {}", report["status"]);
    ensure!(
        report["memory-identical"] == false,
        "memory-identical is {}",
        report["memory-identical"]
    );
    source.ensure_guest_lives()?;
    Ok(Outcome::Passed)
}

fn start_over(lab: &Lab, here: &str, there: &str) -> anyhow::Result<Outcome> {
    let mut source = lab.source("source-again", Guest::Kvm, &[here.to_owned()])?;
    ensure_device_works(&source, 0)?;
    let (destination, address) =
        lab.destination("destination-again", Guest::Kvm, &[there.to_owned()])?;
    migrate(&source, &address)?;
    arrived(&mut source, &destination)?;
    Ok(Outcome::Passed)
}

fn migrate(source: &Daemon, address: &str) -> anyhow::Result<Value> {
    source.migrate(address, json!({"verify": true, "downtime-limit-ms": LIMIT_MS}))?;
    source.report_of_identical()
}

/// The guest has its device write memory and raise an interrupt, and gets both.
fn ensure_device_works(daemon: &Daemon, place: usize) -> anyhow::Result<()> {
    const STAMPS: u64 = 40;
    const VECTOR: usize = 2;
    let taken = |counters: &Value| counters["interrupts"][place]["vectors"][VECTOR].as_u64();
    let before = taken(&daemon.counters()?).context("the guest does not count interrupts")?;
    daemon.workload(json!({
        "command": "doorbell", "device": place, "stamps": STAMPS, "vector": VECTOR,
    }))?;
    wait_until_for("the device's interrupt arrives", LIMIT, || {
        Ok(taken(&daemon.counters()?) > Some(before))
    })
}

fn reconfigure(daemon: &Daemon, generation: u32, kib: u64) -> anyhow::Result<()> {
    let arguments = json!({
        "command": "reconfigure", "device": 0, "generation": generation, "kib": kib,
        "timeout-ms": 30_000,
    });
    daemon.workload(arguments).map(drop).context("the guest reconfigures its device")
}

fn acknowledged(source: &Daemon, times: u64) -> anyhow::Result<()> {
    wait_until_for("all initial data is acknowledged", LIMIT, || {
        let answer = source.call("progress", json!({}))?;
        ensure!(answer["done"] != true, "it is over: {}", answer["report"]["failure"]);
        Ok(answer["progress"]["devices"][0]["acks"].as_u64() >= Some(times))
    })
}

fn ensure_late_reinit(report: &Value) -> anyhow::Result<()> {
    let late = number(&report["devices"][0]["late-reinits"])?;
    ensure!(late >= 1, "the device announced nothing after the decision: {report}");
    Ok(())
}

/// The guest runs at the destination, with its device; the source has ended by itself.
fn arrived(source: &mut Daemon, destination: &Daemon) -> anyhow::Result<()> {
    destination.wait("running")?;
    destination.ensure_guest_lives()?;
    ensure_device_works(destination, 0)?;
    let status = source.wait_ended()?;
    ensure!(status.success(), "the source ended with {status}: {}", source.log_tail());
    Ok(())
}

fn number(value: &Value) -> anyhow::Result<u64> {
    value.as_u64().with_context(|| format!("{value} is no number"))
}
