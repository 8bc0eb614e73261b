//! Whole migrations by real processes that go well: daemons by hand, over both kinds of sockets, on and
//! on, with what the guest itself finds.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use common::relay::Relay;
use common::{Daemon, Device, Lab, Load, any_guest, guests, number, vmferry};
use microvm::witness::Witness;
use migration::{GuestMemory, PageSizes, RegionLayout};
use serde_json::{Value, json};

/// `vmferry migrate --verify --json`, which must succeed; answers its report.
fn migrate_by_hand(source: &Daemon, destination: &str) -> Value {
    let api = source.api.to_str().unwrap();
    let output = vmferry(&["migrate", "--api", api, destination, "--verify", "--json"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}\n{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn assert_completed(report: &Value) {
    assert_eq!(report["status"], "completed", "{report:#}");
    assert_eq!(report["memory-identical"], true, "{report:#}");
    assert_eq!(report["device-state-identical"], true, "{report:#}");
}

/// The guest never ran in two processes at once: once it has left one, it never comes back.
fn assert_never_twice(witness: &Path, processes: usize) {
    let stamps = Witness::open(witness).unwrap().stamps();
    let mut left = BTreeSet::new();
    let mut current = stamps[0].process;
    for stamp in &stamps {
        if stamp.process != current {
            left.insert(std::mem::replace(&mut current, stamp.process));
            assert!(!left.contains(&stamp.process), "process {} ran it again", stamp.process);
        }
    }
    assert_eq!(left.len() + 1, processes, "the guest ran in each");
}

#[test]
fn by_hand_over_tcp_then_over_unix_to_a_third() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let devices = [lab.device(&[]), lab.device(&[]), lab.device(&[])];
        let mut first = lab.source(&[&devices[0]], &[]);
        let (mut second, to_second) = lab.destination("tcp", &[&devices[1]], &[]);
        let (third, to_third) = lab.destination("unix", &[&devices[2]], &[]);
        first.workload(json!({"command": "reconfigure", "device": 0, "generation": 1, "kib": 64}));

        let report = migrate_by_hand(&first, &to_second);
        assert_completed(&report);
        assert_eq!(report["guest"], guest);
        assert!(report["downtime-ms"].as_f64().unwrap() > 0.0, "{report:#}");
        assert!(number(&report["devices"][0]["acks"]) >= 1, "{report:#}");
        assert!(first.process.wait_ended().success(), "{}", first.process.log());
        second.wait("running");
        second.assert_guest_lives();

        assert_completed(&migrate_by_hand(&second, &to_third));
        assert!(second.process.wait_ended().success(), "{}", second.process.log());
        third.wait("running");
        third.assert_guest_lives();
        third.workload(json!({"command": "doorbell", "device": 0, "stamps": 1, "vector": 1}));
        third.assert_guest_lives();
    }
}

#[test]
fn with_dirty_rings_on_and_back() {
    if let Err(why) = microvm::dirty_ring_available() {
        println!("skipped: {why}");
        return;
    }
    let mut lab = Lab::new("kvm");
    let devices = [lab.device(&[]), lab.device(&[]), lab.device(&[])];
    let ring = ["--dirty-tracking", "ring", "--dirty-rate", "5000"];
    let source = lab.source(&[&devices[0]], &ring);
    assert_eq!(source.status()["dirty-tracking"], "ring");
    assert_eq!(source.status()["dirty-ring"], json!({"harvested": 0, "full-exits": 0}));
    // A migration that comes to nothing leaves nothing on.
    let (other, to_other) = lab.destination("tcp", &[&devices[1]], &ring);
    source.migrate(&to_other, json!({"downtime-limit-ms": 0.0}));
    common::until("it is harvested", || number(&source.status()["dirty-ring"]["harvested"]) > 1000);
    source.call("cancel", json!({}));
    let report = source.report();
    assert_eq!(
        (&report["status"], &report["dirty-tracking"]),
        (&json!("cancelled"), &json!("ring"))
    );
    source.assert_guest_lives();
    drop(other);
    // Kinds of tracking need not be the same on both sides.
    let (log, to_log) = lab.destination("unix", &[&devices[2]], &[]);
    let report = migrate_by_hand(&source, &to_log);
    assert_completed(&report);
    assert_eq!(report["dirty-tracking"], "ring");
    log.wait("running");
    assert_eq!(log.status()["dirty-tracking"], "log");
    assert_eq!(log.status()["dirty-ring"], Value::Null);
    log.assert_guest_lives();
    let device = lab.device(&[]);
    let (back, to_back) = lab.destination("tcp", &[&device], &ring);
    assert_completed(&migrate_by_hand(&log, &to_back));
    back.wait("running");
    back.assert_guest_lives();
}

#[test]
fn dirty_rings_of_a_process_guest_are_refused() {
    let output = vmferry(&["run", "--guest", "process", "--dirty-tracking", "ring"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let cause = microvm::process_guest_available().err();
    assert!(!output.status.success());
    assert!(cause.is_some() || said.contains("--dirty-tracking ring is KVM's"), "{said}");
}

#[test]
fn ten_in_a_row_with_a_witness() {
    guests().into_iter().for_each(|guest| ten_in_a_row(guest, &[]));
}

#[test]
fn ten_in_a_row_of_a_guest_that_writes_while_every_core_is_busy() {
    for guest in guests() {
        let load = Load::start();
        ten_in_a_row(guest, &["--dirty-rate", "2000"]);
        load.assert_it_ran();
    }
}

/// Moves one guest through eleven processes: verified each time, never in two at once, its stamps whole.
fn ten_in_a_row(guest: &'static str, extra: &[&str]) {
    let mut lab = Lab::new(guest);
    let witness = lab.path("witness");
    let witness_args = ["--witness", witness.to_str().unwrap()];
    let device = lab.device(&[]);
    let mut kept: Vec<(Daemon, Device)> = Vec::new();
    let daemon = lab.source(&[&device], &[&witness_args, extra].concat());
    kept.push((daemon, device));
    for round in 0..10 {
        let transport = ["tcp", "unix"][round % 2];
        let device = lab.device(&[]);
        let (next, address) = lab.destination(transport, &[&device], &witness_args);
        let (mut last, _device) = kept.pop().unwrap();
        let before = last.counters();
        last.migrate_verified(&address);
        next.wait("running");
        next.assert_guest_lives();
        let after = next.counters();
        for counter in ["writes", "beats"] {
            assert!(number(&after[counter]) >= number(&before[counter]), "{counter} went back");
        }
        assert!(last.process.wait_ended().success());
        kept.push((next, device));
    }
    assert_never_twice(&witness, 11);
}

#[test]
fn two_vcpus_and_three_kinds_of_device() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let profiles = ["mlx5-vf", "virtio-vf", "qat"];
        let here = profiles.map(|profile| lab.device_of(profile, &[]));
        let there = profiles.map(|profile| lab.device_of(profile, &[]));
        let source = lab.source(&here.each_ref(), &["--cpus", "2"]);
        let (destination, address) = lab.destination("tcp", &there.each_ref(), &["--cpus", "2"]);
        for device in 0..3 {
            source.workload(json!({"command": "fill", "device": device, "kib": 32}));
        }
        source.migrate_verified(&address);
        destination.wait("running");
        destination.assert_guest_lives();
        let before = destination.counters();
        assert_eq!(before["vcpus"].as_array().unwrap().len(), 2, "{before}");
        for vcpu in 0..2 {
            while destination.counters()["vcpus"][vcpu]["writes"] == before["vcpus"][vcpu]["writes"]
            {
                std::thread::yield_now();
            }
        }
    }
}

/// From huge pages to small ones and back: what a page is made of is each side's own business.
#[test]
fn a_guest_in_huge_pages_moves() {
    let layout = [RegionLayout { gpa: 0, len: 2 << 20 }];
    if let Err(why) = GuestMemory::with_pages(&layout, PageSizes::Huge) {
        return println!("skipped: {why}");
    }
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let devices = [lab.device(&[]), lab.device(&[]), lab.device(&[])];
        let first = lab.source(&[&devices[0]], &["--hugepages"]);
        let (second, to_second) = lab.destination("tcp", &[&devices[1]], &[]);
        let (third, to_third) = lab.destination("unix", &[&devices[2]], &["--hugepages"]);
        assert_completed(&migrate_by_hand(&first, &to_second));
        assert_completed(&migrate_by_hand(&second, &to_third));
        third.assert_guest_lives();
    }
}

#[test]
fn a_source_that_is_kept_stays_stopped() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &["--keep"]);
    let (destination, address) = lab.destination("unix", &[&there], &[]);
    source.migrate_verified(&address);
    destination.wait("running");
    assert_eq!(source.status()["state"], "migrated");
    let beats = source.counters()["beats"].clone();
    destination.assert_guest_lives();
    assert_eq!(source.counters()["beats"], beats);
    let error = source.try_call("migrate", json!({"destination": address})).unwrap_err();
    assert!(error.to_string().contains("moved away"), "{error}");
}

#[test]
fn an_interrupt_of_the_last_moment_is_delivered_on_the_other_side() {
    for guest in guests() {
        // From one that is raised before the guest stops to one that the device still owes when it does.
        for stamps in [1, 1_000, 100_000, 5_000_000] {
            let mut lab = Lab::new(guest);
            let (here, there) = (lab.device(&[]), lab.device(&[]));
            let source = lab.source(&[&here], &[]);
            let (destination, address) = lab.destination("unix", &[&there], &[]);
            source.migrate(&address, json!({"verify": true, "hold": ["look"]}));
            source.wait("held");
            source.workload(
                json!({"command": "doorbell", "device": 0, "stamps": stamps, "vector": 1}),
            );
            source.call("release", json!({}));
            assert_completed(&source.report());
            destination.wait("running");
            while number(&destination.counters()["interrupts"][0]["vectors"][1]) == 0 {
                destination.assert_guest_lives();
            }
        }
    }
}

#[test]
fn a_masked_vector_with_its_pending_bit_survives() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("tcp", &[&there], &[]);
        source.workload(json!({"command": "mask", "device": 0, "vector": 3, "masked": true}));
        source.workload(json!({"command": "doorbell", "device": 0, "stamps": 1, "vector": 3}));
        source.assert_guest_lives();
        assert_eq!(source.counters()["interrupts"][0]["vectors"][3], 0);
        source.migrate_verified(&address);
        destination.wait("running");
        destination.assert_guest_lives();
        assert_eq!(destination.counters()["interrupts"][0]["vectors"][3], 0);
        destination.workload(json!({"command": "mask", "device": 0, "vector": 3, "masked": false}));
        while number(&destination.counters()["interrupts"][0]["vectors"][3]) == 0 {
            destination.assert_guest_lives();
        }
    }
}

#[test]
fn intx_mode_moves_too() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        source.workload(json!({"command": "interrupt-mode", "device": 0, "msix": false}));
        source.migrate(&address, json!({"verify": true, "hold": ["look"]}));
        source.wait("held");
        source.workload(json!({"command": "doorbell", "device": 0, "stamps": 200_000}));
        source.call("release", json!({}));
        assert_completed(&source.report());
        destination.wait("running");
        while number(&destination.counters()["interrupts"][0]["intx"]) == 0 {
            destination.assert_guest_lives();
        }
    }
}

#[test]
fn a_late_reinit_is_revoked_or_absorbed_and_never_fails() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let devices = [lab.device(&[]), lab.device(&[]), lab.device(&[])];
        let first = lab.source(&[&devices[0]], &[]);
        let (second, to_second) = lab.destination("tcp", &[&devices[1]], &[]);
        let (_third, to_third) = lab.destination("tcp", &[&devices[2]], &[]);
        let reconfigured_late = |source: &Daemon, address: &str, limit_ms: u32, kib: u32| {
            let arguments =
                json!({"verify": true, "hold": ["look"], "downtime-limit-ms": limit_ms});
            source.migrate(address, arguments);
            source.wait("held");
            source.workload(
                json!({"command": "reconfigure", "device": 0, "generation": kib, "kib": kib}),
            );
            source.call("release", json!({}));
            let report = source.report();
            assert_completed(&report);
            assert!(number(&report["devices"][0]["late-reinits"]) >= 1, "{report:#}");
            report
        };
        let report = reconfigured_late(&first, &to_second, 150, 800 << 10);
        assert!(number(&report["switchover-revocations"]) >= 1, "{report:#}");
        second.wait("running");
        let report = reconfigured_late(&second, &to_third, 2_000, 64);
        assert!(number(&report["switchover-absorptions"]) >= 1, "{report:#}");
    }
}

#[test]
fn a_delayed_channel_changes_nothing_but_time() {
    let Some(guest) = any_guest() else { return };
    // The control connection comes first, the data channel second.
    for delayed in [0, 1] {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let mut source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("tcp", &[&there], &[]);
        let relay = Relay::start(&address, Some((delayed, Duration::from_millis(200))));
        // A round trip is a part of the blackout: with the usual limit it might rightly never fit.
        source.migrate(relay.address(), json!({"verify": true, "downtime-limit-ms": 3_000}));
        let report = source.report();
        assert_completed(&report);
        assert!(relay.connections() >= 2, "{report:#}");
        assert!(number(&report["devices"][0]["acks"]) >= 1, "{report:#}");
        if delayed == 1 {
            // An answer that did not wait for the data it speaks of would come sooner than the data can.
            for (before, answer) in [("precopy", "acknowledged"), ("await-ready", "ready")] {
                let waited = at_ms(&report, answer) - at_ms(&report, before);
                assert!(waited >= 150.0, "{answer} {waited} ms after {before}: {report:#}");
            }
        }
        destination.wait("running");
        destination.assert_guest_lives();
        assert!(source.process.wait_ended().success());
    }
}

/// When `event` first stands in the timeline.
fn at_ms(report: &Value, event: &str) -> f64 {
    let entries = report["timeline"].as_array().unwrap();
    let entry = entries.iter().find(|entry| entry["event"] == event);
    entry.unwrap_or_else(|| panic!("no {event} in {report:#}"))["at-ms"].as_f64().unwrap()
}

#[test]
fn the_limit_can_be_changed_while_it_runs() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let (here, there) = (lab.device(&[]), lab.device(&[]));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("unix", &[&there], &[]);
    let bandwidth = 1u64 << 30;
    let arguments = json!({"verify": true, "downtime-limit-ms": 0, "compression": "zstd", "max-bandwidth": bandwidth, "avail-switchover-bandwidth": bandwidth});
    source.migrate(&address, arguments);
    // With no time at all nothing fits: passes go on.
    while number(&source.status()["migration"]["pass"]) < 4 {
        assert_eq!(source.status()["migration"]["switchover-attempts"], 0);
    }
    let api = source.api.to_str().unwrap();
    assert_eq!(vmferry(&["set", "--api", api]).status.code(), Some(2), "nothing to set");
    let set = vmferry(&["set", "--api", api, "--max-bandwidth", "2G"]);
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
    let set = vmferry(&["set", "--api", api, "--downtime-limit", "1s", "--max-bandwidth", "0"]);
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));
    assert_completed(&source.report());
    destination.wait("running");
}

#[test]
fn devices_with_habits_migrate_as_their_drivers_do() {
    let Some(guest) = any_guest() else { return };
    for quirks in [
        vec!["as-driver"],
        vec!["zero-at-temporary-end"],
        vec!["one-size-field", "caller-flags-back"],
        vec!["info-drives-device"],
        vec!["no-info-in-p2p"],
        vec!["short-reads=700"],
        vec!["size=garbage"],
        vec!["size=fails"],
        vec!["size=zero"],
        vec!["size=under"],
        vec!["info-fails"],
        vec!["reinit-storm=50"],
        vec!["hidden-save-failure"],
        vec!["grow-after-stop=64"],
        vec!["reset-keeps-state"],
    ] {
        let mut lab = Lab::new(guest);
        let mut args = Vec::new();
        for quirk in &quirks {
            args.extend(["--quirk", quirk]);
        }
        let (here, there) = (lab.device(&args), lab.device(&args));
        let source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        println!("{quirks:?}");
        source.migrate(&address, json!({"verify": true}));
        let report = source.report();
        assert_eq!(report["status"], "completed", "{quirks:?}: {report:#}");
        assert_eq!(report["device-state-identical"], true, "{quirks:?}: {report:#}");
        destination.wait("running");
        destination.assert_guest_lives();
    }
}

#[test]
fn a_libvfio_user_server_migrates_without_our_additions() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let args = ["--quirk", "libvfio-user"];
    let (here, there) = (lab.device(&args), lab.device(&args));
    let source = lab.source(&[&here], &[]);
    let (destination, address) = lab.destination("tcp", &[&there], &[]);
    source.migrate(&address, json!({}));
    let report = source.report();
    assert_eq!(report["status"], "completed", "{report:#}");
    destination.wait("running");
    destination.assert_guest_lives();
}

/// `VMFERRY_FOREIGN_KERNEL` names a PVH kernel that somebody else made, such as Debian's
/// `grub-i386-xen_pvh.bin`.
#[test]
fn a_kernel_made_by_someone_else_boots_and_moves() {
    let Some(kernel) = std::env::var_os("VMFERRY_FOREIGN_KERNEL") else {
        return eprintln!("skipped: VMFERRY_FOREIGN_KERNEL names no kernel");
    };
    if let Err(why) = microvm::kvm_available() {
        return eprintln!("skipped: {why}");
    }
    let kernel = kernel.to_str().unwrap();
    let mut lab = Lab::new("kvm");
    let source = lab.daemon(&[], &["--kernel", kernel]);
    let (destination, address) = lab.destination("unix", &[], &["--kernel", kernel]);
    assert_eq!(source.status()["state"], "running");
    let report = migrate_by_hand(&source, &address);
    assert_eq!(report["status"], "completed", "{report:#}");
    assert_eq!(report["memory-identical"], true, "{report:#}");
    destination.wait("running");
    assert_eq!(destination.status()["state"], "running");
    // Its image at least: the zero pages are counted apart.
    let image_pages = std::fs::metadata(kernel).unwrap().len() / 4096;
    assert!(number(&report["ram"]["normal"]) >= image_pages / 2, "{report:#}");
}
