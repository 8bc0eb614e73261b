//! What goes wrong before Commit: the source's guest goes on, `status` tells why, and the next migration
//! works. Every phase is asserted as reached by holding the migration in it.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::relay::Relay;
use common::{Daemon, Lab, any_guest, guests, number, vmferry};
use serde_json::{Value, json};
use vmferry::api::Client;

/// The phases of the source before Commit, in order.
const SOURCE_PHASES: [&str; 6] =
    ["setup", "precopy", "look", "quiesce", "stop-copy", "await-ready"];

/// Starts a migration and holds it in `phase` of the source.
fn hold(source: &Daemon, address: &str, phase: &str) {
    source.migrate(address, json!({"hold": [phase]}));
    let held = source.wait("held");
    assert_eq!(held["held"], json!({"side": "source", "phase": phase}));
}

/// The migration failed with a reason that `status` shows, and the guest lives on here.
fn assert_failed_and_alive(source: &Daemon) -> Value {
    let report = source.report();
    assert_eq!(report["status"], "failed", "{report:#}");
    assert!(!report["failure"]["what"].as_str().unwrap().is_empty(), "{report:#}");
    let status = source.status();
    assert_eq!(status["state"], "running", "{status:#}");
    assert_eq!(status["failure"], report["failure"]);
    source.assert_guest_lives();
    report
}

/// Another migration, to a new destination, works.
fn assert_next_works(lab: &mut Lab, source: &Daemon) {
    let device = lab.device(&[]);
    let (destination, address) = lab.destination("tcp", &[&device], &[]);
    source.migrate_verified(&address);
    destination.wait("running");
    destination.assert_guest_lives();
}

#[test]
fn a_destination_killed_in_each_phase() {
    for guest in guests() {
        for phase in SOURCE_PHASES {
            let mut lab = Lab::new(guest);
            let (here, there) = (lab.device(&[]), lab.device(&[]));
            let source = lab.source(&[&here], &[]);
            let (mut destination, address) = lab.destination("tcp", &[&there], &[]);
            hold(&source, &address, phase);
            destination.process.kill();
            source.call("release", json!({}));
            assert_failed_and_alive(&source);
            assert_next_works(&mut lab, &source);
        }
    }
}

#[test]
fn a_destination_killed_in_each_of_its_own_phases() {
    let Some(guest) = any_guest() else { return };
    for phase in ["setup", "loading", "prepared"] {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        let (mut destination, address) = lab.destination("unix", &[&there], &[]);
        destination.call("hold", json!({"phases": [phase]}));
        source.migrate(&address, json!({}));
        let held = destination.wait("held");
        assert_eq!(held["held"], json!({"side": "destination", "phase": phase}));
        destination.process.kill();
        assert_failed_and_alive(&source);
        assert_next_works(&mut lab, &source);
    }
}

#[test]
fn a_connection_cut_in_each_phase() {
    for guest in guests() {
        for phase in SOURCE_PHASES {
            let mut lab = Lab::new(guest);
            let (here, there) = (lab.device(&[]), lab.device(&[]));
            let source = lab.source(&[&here], &[]);
            let (destination, address) = lab.destination("tcp", &[&there], &[]);
            let relay = Relay::start(&address, None);
            if phase == "setup" {
                // Cut once it is there: the destination is held before it answers.
                destination.call("hold", json!({"phases": ["setup"]}));
                source.migrate(relay.address(), json!({}));
                destination.wait("held");
                relay.cut();
                destination.call("release", json!({}));
            } else {
                hold(&source, relay.address(), phase);
                relay.cut();
                source.call("release", json!({}));
            }
            assert_failed_and_alive(&source);
            let state = destination.status()["state"].clone();
            assert_ne!(state, "running", "the guest must not run twice");
            // The same destination takes the next one.
            source.migrate_verified(&address);
            destination.wait("running");
            destination.assert_guest_lives();
        }
    }
}

#[test]
fn a_device_server_of_the_destination_killed_in_each_phase() {
    let Some(guest) = any_guest() else { return };
    for phase in SOURCE_PHASES {
        let mut lab = Lab::new(guest);
        let (here, mut there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        let (_destination, address) = lab.destination("tcp", &[&there], &[]);
        // Held on the destination as well, so that Ready cannot have been sent before.
        _destination.call("hold", json!({"phases": ["prepared"]}));
        hold(&source, &address, phase);
        there.process.kill();
        _destination.call("hold", json!({"phases": []}));
        source.call("release", json!({}));
        // Held before Ready: it goes on whether the device is missed there or before.
        let _ = _destination.try_call("release", json!({}));
        let report = wait_end_releasing(&source, &_destination);
        if phase != "await-ready" {
            assert_eq!(report["status"], "failed", "{phase}: {report:#}");
            let failure = report["failure"].to_string();
            assert!(failure.contains("nic0"), "{phase}: {failure}");
        }
        if report["status"] == "failed" {
            assert_failed_and_alive(&source);
            assert_next_works(&mut lab, &source);
        }
    }
}

/// The report, with whatever the destination is held in let go.
fn wait_end_releasing(source: &Daemon, destination: &Daemon) -> Value {
    loop {
        let mut answer = source.call("wait", json!({"for": "migration-end", "timeout-ms": 20}));
        if answer["done"] == true {
            return answer["report"].take();
        }
        let _ = destination.try_call("release", json!({}));
    }
}

#[test]
fn a_device_server_of_the_source_killed_in_each_phase() {
    let Some(guest) = any_guest() else { return };
    for phase in ["precopy", "look", "quiesce", "stop-copy"] {
        let mut lab = Lab::new(guest);
        let (mut here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        hold(&source, &address, phase);
        here.process.kill();
        source.call("release", json!({}));
        let report = source.report();
        assert_eq!(report["status"], "failed", "{phase}: {report:#}");
        // The guest goes on without its device, which is named.
        source.assert_guest_lives();
        let status = source.status();
        assert_eq!(status["devices"][0]["id"], "nic0");
        assert!(status["devices"][0]["lost"].is_string(), "{phase}: {status:#}");
        assert_ne!(destination.status()["state"], "running");
    }
}

#[test]
fn a_source_killed_before_commit_leaves_a_destination_that_does_not_run() {
    let Some(guest) = any_guest() else { return };
    for phase in SOURCE_PHASES {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let mut source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("tcp", &[&there], &[]);
        hold(&source, &address, phase);
        source.process.kill();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(destination.status()["state"], "incoming", "{phase}");
    }
}

#[test]
fn cancelled_in_each_phase() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("tcp", &[&there], &[]);
        for phase in SOURCE_PHASES {
            hold(&source, &address, phase);
            let output = vmferry(&["cancel", "--api", source.api.to_str().unwrap()]);
            assert!(output.status.success());
            source.call("release", json!({}));
            let report = source.report();
            assert_eq!(report["status"], "cancelled", "{phase}: {report:#}");
            source.assert_guest_lives();
            assert_eq!(destination.status()["state"], "incoming", "{phase}");
        }
        // From the other side too.
        hold(&source, &address, "look");
        destination.call("cancel", json!({}));
        source.call("release", json!({}));
        let report = source.report();
        assert_ne!(report["status"], "completed", "{report:#}");
        source.assert_guest_lives();
        // After all of this it still works, to the same destination.
        source.migrate_verified(&address);
        destination.wait("running");
        destination.assert_guest_lives();
    }
}

#[test]
fn a_cancel_at_commit_changes_nothing() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("tcp", &[&there], &[]);
    hold(&source, &address, "committed");
    source.call("cancel", json!({}));
    source.call("release", json!({}));
    assert_eq!(source.report()["status"], "completed");
    destination.wait("running");
    destination.assert_guest_lives();
}

#[test]
fn after_commit_it_is_too_late_to_cancel() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("tcp", &[&there], &[]);
    destination.call("hold", json!({"phases": ["starting"]}));
    source.migrate(&address, json!({}));
    destination.wait("held");
    // Commit is there, so the source has sent it; what it shows follows within a moment.
    std::thread::sleep(Duration::from_millis(300));
    let output = vmferry(&["cancel", "--api", source.api.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("too late"), "{output:?}");
    destination.call("release", json!({}));
    assert_eq!(source.report()["status"], "completed");
    destination.wait("running");
    destination.assert_guest_lives();
}

#[test]
fn without_dma_logs_verification_says_not_identical() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        source.workload(json!({"command": "dma-rate", "device": 0, "stamps-per-s": 5000}));
        let arguments = json!({"verify": true, "controls": {"ignore-dma-log": true}});
        source.migrate(&address, arguments);
        let report = assert_failed_and_alive(&source);
        assert_eq!(report["memory-identical"], false, "{report:#}");
        assert_eq!(report["device-state-identical"], true, "{report:#}");
        // With the log it is.
        source.migrate_verified(&address);
        destination.wait("running");
        destination.assert_guest_lives();
    }
}

/// A page that nobody but the host writes: between the workload's image and its rings.
const HOST_PAGE: u64 = 0x30_0000;

#[test]
fn without_the_vmms_own_writes_verification_says_not_identical() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("unix", &[&there], &[]);
    for (ignored, identical) in [(true, false), (false, true)] {
        let arguments = json!({
            "verify": true, "hold": ["look"], "controls": {"ignore-vmm-writes": ignored},
        });
        source.migrate(&address, arguments);
        source.wait("held");
        let data = if ignored { "0123456789abcdef" } else { "fedcba9876543210" };
        source.call("poke", json!({"gpa": HOST_PAGE, "data": data}));
        source.call("release", json!({}));
        let report = source.report();
        assert_eq!(report["memory-identical"], identical, "{report:#}");
        assert_eq!(report["status"], if identical { "completed" } else { "failed" });
    }
    destination.wait("running");
    let data = destination.call("peek", json!({"gpa": HOST_PAGE, "bytes": 8}));
    assert_eq!(data["data"], "fedcba9876543210");
}

#[test]
fn a_flipped_byte_of_a_page_is_found() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("unix", &[&there], &[]);
    destination.call("hold", json!({"phases": ["prepared"]}));
    source.migrate(&address, json!({"verify": true}));
    destination.wait("held");
    destination.call("poke", json!({"gpa": HOST_PAGE + 77, "data": "5a"}));
    destination.call("release", json!({}));
    let report = assert_failed_and_alive(&source);
    assert_eq!(report["memory-identical"], false, "{report:#}");
    assert_eq!(report["device-state-identical"], true, "{report:#}");
    assert_ne!(destination.status()["state"], "running");
}

#[test]
fn a_flipped_bit_of_a_devices_state_is_found() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&["--quirk", "corrupt-save"]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (_destination, address) = lab.destination("unix", &[&there], &[]);
    source.migrate(&address, json!({"verify": true}));
    let report = assert_failed_and_alive(&source);
    assert_eq!(report["memory-identical"], true, "{report:#}");
    assert_eq!(report["device-state-identical"], false, "{report:#}");
}

#[test]
fn a_transition_that_fails_is_named_and_the_guest_goes_on() {
    let Some(guest) = any_guest() else { return };
    for (quirk, on_source) in [
        ("fail-arc=running-pre_copy:5::1", true),
        ("fail-arc=pre_copy-pre_copy_p2p:5", true),
        ("fail-arc=pre_copy_p2p-stop_copy:5", true),
        ("fail-arc=stop-resuming:5", false),
        ("fail-arc=resuming-stop:5", false),
    ] {
        let quirk = quirk.replace("::", ":");
        let mut lab = Lab::new(guest);
        let with = ["--quirk", quirk.as_str()];
        let none: [&str; 0] = [];
        let here = lab.device(if on_source { &with } else { &none });
        let there = lab.device(if on_source { &none } else { &with });
        let source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        source.migrate(&address, json!({}));
        let report = assert_failed_and_alive(&source);
        assert_eq!(report["failure"]["device"], "nic0", "{quirk}: {report:#}");
        assert_ne!(destination.status()["state"], "running");
    }
}

#[test]
fn a_dry_run_lists_every_mismatch_and_moves_nothing() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device_of("qat", &[]));
        let source = lab.source(&[&here], &["--cpus", "2"]);
        let (destination, address) =
            lab.destination("tcp", &[&there], &["--memory", "32M", "--cpus", "1"]);
        let api = source.api.to_str().unwrap();
        let output = vmferry(&["migrate", "--api", api, &address, "--dry-run", "--json"]);
        assert_eq!(output.status.code(), Some(1));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = report.to_string();
        for part in ["memory", "vCPUs", "nic0"] {
            assert!(text.contains(part), "{part} is not in {report:#}");
        }
        source.assert_guest_lives();
        assert_eq!(destination.status()["state"], "incoming");
        // One that fits says so, and still moves nothing.
        let device = lab.device(&[]);
        let (fitting, address) = lab.destination("tcp", &[&device], &["--cpus", "2"]);
        let output = vmferry(&["migrate", "--api", api, &address, "--dry-run"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert_eq!(fitting.status()["state"], "incoming");
        assert_eq!(source.status()["state"], "running");
        source.migrate_verified(&address);
        fitting.wait("running");
    }
}

#[test]
fn a_real_migration_refuses_a_mismatch_too() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let source = lab.source(&[], &[]);
    let (_destination, address) = lab.destination("tcp", &[], &["--memory", "32M"]);
    source.migrate(&address, json!({}));
    let report = assert_failed_and_alive(&source);
    assert!(report["failure"].to_string().contains("memory"), "{report:#}");
}

#[test]
fn nobody_there_is_a_failure_with_a_reason() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let source = lab.source(&[], &[]);
    let absent = format!("unix:{}", lab.path("absent").display());
    let api = source.api.to_str().unwrap();
    let output = vmferry(&["migrate", "--api", api, &absent]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("absent"), "{text}");
    source.assert_guest_lives();
}

#[test]
fn garbage_on_the_migration_port() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (mut destination, address) = lab.destination("tcp", &[&there], &[]);
    let before = destination.process.resident_bytes();
    let port = address.strip_prefix("tcp:").unwrap();
    let mut absurd = vec![0xff; 64];
    absurd.extend(vec![0x41; 1 << 20]);
    for bytes in [
        Vec::new(),
        vec![0],
        vec![0; 1 << 20],
        vec![0xff; 1 << 20],
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        absurd,
    ] {
        let mut stream = TcpStream::connect(port).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
        // It may be hung up on before all of it is written.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // Connections that say nothing do not keep others away.
    let _silent: Vec<_> = (0..8).map(|_| TcpStream::connect(port).unwrap()).collect();
    assert!(destination.process.ended().is_none(), "{}", destination.process.log());
    let grown = destination.process.resident_bytes().saturating_sub(before);
    assert!(grown < 32 << 20, "grew by {grown} bytes");
    source.migrate_verified(&address);
    destination.wait("running");
    destination.assert_guest_lives();
}

#[test]
fn garbage_in_the_middle_of_a_migration() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("tcp", &[&there], &[]);
    hold(&source, &address, "look");
    let port = address.strip_prefix("tcp:").unwrap();
    for bytes in [vec![0; 4096], vec![0xff; 4096]] {
        let mut stream = TcpStream::connect(port).unwrap();
        let _ = stream.write_all(&bytes);
    }
    source.call("release", json!({}));
    assert_eq!(source.report()["status"], "completed");
    destination.wait("running");
    destination.assert_guest_lives();
}

#[test]
fn a_guest_that_powers_off_on_the_way_ends_the_migration() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let mut source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("tcp", &[&there], &[]);
        source.migrate(&address, json!({"downtime-limit-ms": 0}));
        while number(&source.status()["migration"]["pass"]) < 2 {}
        // Connected before: the source waits for its clients to take the report, and then ends.
        let mut client = Client::connect(&source.api).unwrap();
        client.call("workload", json!({"command": "power-off"})).unwrap();
        let report = client.call("wait", json!({"for": "migration-end"})).unwrap()["report"].take();
        assert_eq!(report["status"], "failed", "{report:#}");
        assert!(report["failure"]["what"].as_str().unwrap().contains("powered off"), "{report:#}");
        assert!(source.process.wait_ended().success(), "{}", source.process.log());
        assert_eq!(destination.status()["state"], "incoming");
    }
}

#[test]
fn a_guest_that_resets_its_device_or_itself_on_the_way_still_arrives() {
    for guest in guests() {
        for command in
            [json!({"command": "reset-device", "device": 0}), json!({"command": "reset-machine"})]
        {
            let mut lab = Lab::new(guest);
            let (here, there) = (lab.device(&[]), lab.device(&[]));
            let source = lab.source(&[&here], &[]);
            let (destination, address) = lab.destination("tcp", &[&there], &[]);
            source.migrate(&address, json!({"downtime-limit-ms": 0, "verify": true}));
            while number(&source.status()["migration"]["devices"][0]["acks"]) < 1 {}
            source.workload(command.clone());
            source.call("set", json!({"downtime-limit-ms": 1000}));
            let report = source.report();
            assert_eq!(report["status"], "completed", "{command}: {report:#}");
            destination.wait("running");
            destination.wait("guest-up");
            destination.assert_guest_lives();
        }
    }
}

#[test]
fn a_second_migrate_while_one_is_under_way_is_refused() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("tcp", &[&there], &[]);
    hold(&source, &address, "precopy");
    let error = source.try_call("migrate", json!({"destination": address})).unwrap_err();
    assert!(error.to_string().contains("under way"), "{error}");
    // And a destination has no guest to migrate.
    let error = destination.try_call("migrate", json!({"destination": address})).unwrap_err();
    assert!(error.to_string().contains("no guest runs here yet"), "{error}");
    source.call("release", json!({}));
    assert_eq!(source.report()["status"], "completed");
}

#[test]
fn a_source_that_is_asked_to_end_cancels_first() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let mut source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("tcp", &[&there], &[]);
    source.migrate(&address, json!({"downtime-limit-ms": 0}));
    source.process.terminate();
    assert!(source.process.wait_ended().success(), "{}", source.process.log());
    assert_eq!(destination.status()["state"], "incoming");
}
