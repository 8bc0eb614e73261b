//! Real processes: switchovers that are rolled back and succeed later, and doubt that is resolved by records
//! and by `vmferry resolve`.

mod common;

use common::relay::Relay;
use common::{Daemon, Lab, any_guest, guests, number, vmferry};
use serde_json::{Value, json};

fn hold(source: &Daemon, address: &str, phase: &str, verify: bool) {
    source.migrate(address, json!({"hold": [phase], "verify": verify}));
    let held = source.wait("held");
    assert_eq!(held["held"], json!({"side": "source", "phase": phase}));
}

fn has(report: &Value, event: &str) -> bool {
    report["timeline"].as_array().unwrap().iter().any(|entry| entry["event"] == event)
}

#[test]
fn a_switchover_is_rolled_back_and_the_same_migration_completes() {
    let has_rings = microvm::dirty_ring_available().is_ok();
    let is_there = |case: &(&str, &str)| *case != ("kvm", "ring") || has_rings;
    let trackings = |guest| if guest == "kvm" { &["log", "ring"][..] } else { &["log"] };
    let cases =
        guests().into_iter().flat_map(|guest| trackings(guest).iter().map(move |t| (guest, *t)));
    for (guest, tracking) in cases.filter(is_there) {
        for phase in ["stop-copy", "await-ready"] {
            let mut lab = Lab::new(guest);
            let (here, there) =
                ([lab.device(&[]), lab.device(&[])], [lab.device(&[]), lab.device(&[])]);
            let tracking = ["--dirty-tracking", tracking, "--dirty-rate", "5000"];
            let source = lab.source(&[&here[0], &here[1]], &tracking);
            let (destination, address) = lab.destination("tcp", &[&there[0], &there[1]], &[]);
            hold(&source, &address, phase, true);
            source.call("take-back", json!({}));
            source.call("release", json!({}));
            let report = source.report();
            assert_eq!(report["status"], "completed", "{guest} {phase}: {report:#}");
            assert!(has(&report, "rolled-back"), "{guest} {phase}: {report:#}");
            assert!(number(&report["switchover-attempts"]) >= 2, "{guest} {phase}");
            assert_eq!(report["memory-identical"], true, "{guest} {phase}");
            assert_eq!(report["device-state-identical"], true, "{guest} {phase}");
            let blackouts = report["source-blackouts-ms"].as_array().unwrap().len() as u64;
            assert_eq!(blackouts, number(&report["switchover-revocations"]), "{guest} {phase}");
            let first = &report["source-blackouts"][0];
            assert_eq!(first["ended"], "rolled-back", "{guest} {phase}: {report:#}");
            assert!(first["cause"].as_str().unwrap().contains("taken back as wished"), "{first}");
            destination.wait("running");
            destination.assert_guest_lives();
        }
    }
}

/// Source in doubt: the Commit was lost, and no new connection comes through.
fn in_doubt(lab: &mut Lab, window: &str) -> (Daemon, Daemon, Vec<common::Device>) {
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let records = ["here", "there"].map(|name| lab.path(name).display().to_string());
    let source = lab.source(&[&here], &["--state-dir", &records[0], "--durable"]);
    let more = ["--state-dir", &records[1], "--durable", "--window", window];
    let (destination, address) = lab.destination("tcp", &[&there], &more);
    let relay = Relay::start(&address, None);
    hold(&source, relay.address(), "committed", false);
    relay.refuse();
    relay.cut();
    source.call("release", json!({}));
    common::until("in doubt", || source.status()["migration"]["status"] == "in-doubt");
    (source, destination, vec![here, there])
}

fn resolve(daemon: &Daemon, words: &[&str]) -> std::process::Output {
    let api = daemon.api.display().to_string();
    vmferry(&[&["resolve", "--api", &api], words].concat())
}

#[test]
fn a_source_in_doubt_resumes_by_its_operator_after_the_window() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (source, destination, _devices) = in_doubt(&mut lab, "100ms");
    let refused = resolve(&source, &["--run-here"]);
    assert!(!refused.status.success(), "that is the destination's");
    common::until("resumed", || resolve(&source, &["--resume-here"]).status.success());
    assert_eq!(source.report()["status"], "failed");
    source.assert_guest_lives();
    assert_eq!(destination.status()["incoming"]["state"], "expired");
    assert!(resolve(&destination, &["--discard"]).status.success());
}

#[test]
fn a_destination_whose_source_died_starts_the_guest_by_its_operator() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (mut source, destination, _devices) = in_doubt(&mut lab, "100ms");
    source.process.kill();
    let status = String::from_utf8(
        vmferry(&["status", "--api", &destination.api.display().to_string()]).stdout,
    );
    assert!(status.unwrap().contains("vmferry resolve --run-here"));
    let started = resolve(&destination, &["--run-here"]);
    assert!(started.status.success(), "{started:?}");
    destination.wait("running");
    destination.assert_guest_lives();
    assert!(!resolve(&destination, &["--discard"]).status.success(), "it runs");
    // The dead source's records still say that it was in doubt; somebody ends that.
    let records = lab.path("here").display().to_string();
    let asked = vmferry(&["resolve", "--state-dir", &records, "--abandon"]);
    assert!(asked.status.success(), "{asked:?}");
    let again = vmferry(&["resolve", "--state-dir", &records, "--ask"]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing is in doubt"), "{again:?}");
}

#[test]
fn a_source_that_gives_up_in_doubt_ends_and_its_guest_with_it() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (mut source, destination, _devices) = in_doubt(&mut lab, "600s");
    assert_eq!(destination.status()["incoming"]["state"], "prepared");
    assert!(resolve(&source, &["--abandon"]).status.success());
    assert!(source.process.wait_ended().success());
    assert!(resolve(&destination, &["--run-here"]).status.success());
    destination.wait("running");
    destination.assert_guest_lives();
}
