//! Local moves by real processes: memory is handed over, and whoever is killed, exactly one guest goes on with it.

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use common::{Daemon, Lab, any_guest, guests, number, until, vmferry};
use serde_json::{Value, json};

const MEMORY_BYTES: u64 = 64 << 20;

fn migrate_local(source: &Daemon, destination: &str) -> Value {
    source.migrate(destination, json!({"verify": true, "local": true}));
    let report = source.report();
    assert_eq!(report["status"], "completed", "{report:#}\n{}", source.process.log());
    assert_eq!(report["memory-identical"], true, "{report:#}");
    assert_eq!(report["device-state-identical"], true, "{report:#}");
    let ram = &report["ram"];
    assert_eq!(number(&ram["handed-over"]), MEMORY_BYTES, "{ram}");
    assert!(ram["map-time-ms"].as_f64().unwrap() > 0.0, "{ram}");
    for sent in ["transferred", "normal", "duplicate", "dirtied", "dirty-sync-count"] {
        assert_eq!(ram[sent], 0, "{ram}");
    }
    report
}

/// The files of guest memory that a process has mapped or open, by inode.
fn reached_memory(process: u32) -> BTreeSet<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let memory = maps.lines().filter(|line| line.contains("memfd:vmferry-ram"));
    let mut reached: BTreeSet<u64> =
        memory.filter_map(|line| line.split_whitespace().nth(4)?.parse().ok()).collect();
    for entry in std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().contains("memfd:vmferry-ram") {
            reached.extend(std::fs::metadata(entry.path()).map(|about| about.ino()).ok());
        }
    }
    reached
}

/// Bytes of shared memory in pages that this process has mapped.
fn shared_bytes(daemon: &Daemon) -> u64 {
    let status = format!("/proc/{}/status", daemon.process.id());
    let status = std::fs::read_to_string(status).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_guest_moves_on_and_on_and_can_then_be_sent() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let devices = [lab.device(&[]), lab.device(&[]), lab.device(&[]), lab.device(&[])];
        let cpus = ["--cpus", "2"];
        let mut here = lab.source(&[&devices[0]], &cpus);
        for device in &devices[1..3] {
            let (next, address) = lab.destination("unix", &[device], &cpus);
            here.workload(json!({"command": "doorbell", "device": 0, "stamps": 5, "vector": 1}));
            let before = here.counters();
            migrate_local(&here, &address);
            next.wait("running");
            let after = next.counters();
            for counter in ["writes", "beats"] {
                assert!(number(&after[counter]) >= number(&before[counter]), "{counter} went back");
            }
            assert!(here.process.wait_ended().success(), "{}", here.process.log());
            next.assert_guest_lives();
            next.workload(json!({"command": "fill", "device": 0, "kib": 32}));
            next.assert_guest_lives();
            here = next;
        }
        // What writes here after two hand-overs is tracked as ever.
        let (last, address) = lab.destination("tcp", &[&devices[3]], &cpus);
        let report = here.migrate_verified(&address);
        assert!(number(&report["ram"]["normal"]) > 0, "{report:#}");
        last.wait("running");
        last.assert_guest_lives();
    }
}

#[test]
fn both_reach_the_memory_before_the_blackout_and_nobody_of_the_source_afterwards() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &["--keep"]);
        let memory = reached_memory(source.process.id());
        assert!(memory.is_superset(&reached_memory(here.process.id())) && !memory.is_empty());
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        assert!(memory.is_disjoint(&reached_memory(destination.process.id())));
        source.migrate(&address, json!({"local": true, "hold": ["look"]}));
        source.wait("held");
        for process in [&destination.process, &there.process] {
            let reached = reached_memory(process.id());
            assert!(!memory.is_disjoint(&reached), "{guest}: not mapped before the blackout");
        }
        let device = reached_memory(there.process.id());
        assert!(memory.is_superset(&device), "its own memory is not reached any more");
        source.call("release", json!({}));
        assert_eq!(source.report()["status"], "completed");
        destination.wait("running");
        destination.assert_guest_lives();
        for process in [&source.process, &here.process] {
            let reached = reached_memory(process.id());
            assert!(memory.is_disjoint(&reached), "{guest}: the source has it still");
        }
        assert!(memory.is_subset(&reached_memory(destination.process.id())), "{guest}");
    }
}

#[test]
fn by_hand_with_a_report_for_people_and_not_over_tcp() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let source = lab.source(&[], &[]);
    let api = source.api.to_str().unwrap();
    let refused = vmferry(&["migrate", "--api", api, "tcp:127.0.0.1:1", "--local"]);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("UNIX socket"), "{said}");
    let direct =
        source.try_call("migrate", json!({"destination": "tcp:127.0.0.1:1", "local": true}));
    assert!(direct.unwrap_err().to_string().contains("UNIX socket"));
    let (destination, address) = lab.destination("unix", &[], &[]);
    let dry = vmferry(&["migrate", "--api", api, &address, "--local", "--dry-run"]);
    assert!(dry.status.success(), "{}", String::from_utf8_lossy(&dry.stderr));
    source.assert_guest_lives();
    until("given back", || destination.status()["incoming"]["state"] == "listening");
    let moved = vmferry(&["migrate", "--api", api, &address, "--local"]);
    let said = String::from_utf8_lossy(&moved.stdout).into_owned();
    assert!(moved.status.success(), "{said}{}", String::from_utf8_lossy(&moved.stderr));
    assert!(said.contains("64.0 MiB handed over, mapped and pinned there in"), "{said}");
    destination.wait("running");
    destination.assert_guest_lives();
}

#[test]
fn a_destination_killed_in_each_phase_leaves_the_guest_its_memory() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let source = lab.source(&[&here], &[]);
        for phase in ["precopy", "look", "quiesce", "stop-copy", "await-ready"] {
            let (mut destination, address) = lab.destination("unix", &[&there], &[]);
            source.migrate(&address, json!({"local": true, "hold": [phase]}));
            source.wait("held");
            destination.process.kill();
            source.call("release", json!({}));
            let report = source.report();
            assert_eq!(report["status"], "failed", "{phase}: {report:#}");
            source.assert_guest_lives();
        }
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        migrate_local(&source, &address);
        destination.wait("running");
        destination.assert_guest_lives();
    }
}

#[test]
fn a_source_killed_in_each_phase_leaves_the_destination_its_own_memory() {
    let Some(guest) = any_guest() else { return };
    let mut lab = Lab::new(guest);
    let there = lab.device(&[]);
    let (destination, address) = lab.destination("unix", &[&there], &[]);
    for phase in ["precopy", "look", "stop-copy"] {
        let here = lab.device(&[]);
        let mut source = lab.source(&[&here], &[]);
        source.migrate(&address, json!({"local": true, "hold": [phase]}));
        source.wait("held");
        source.process.kill();
        until("listening", || destination.status()["incoming"]["state"] == "listening");
        assert!(shared_bytes(&destination) < MEMORY_BYTES / 4, "{phase}: still mapped");
    }
    let here = lab.device(&[]);
    let source = lab.source(&[&here], &[]);
    source.migrate_verified(&address);
    destination.wait("running");
    destination.assert_guest_lives();
}

#[test]
fn memory_outlives_a_source_that_is_killed_before_it_commits() {
    for guest in guests() {
        let mut lab = Lab::new(guest);
        let (here, there) = (lab.device(&[]), lab.device(&[]));
        let mut source = lab.source(&[&here], &[]);
        let (destination, address) = lab.destination("unix", &[&there], &[]);
        let before = source.counters();
        source.migrate(&address, json!({"local": true, "hold": ["committed"]}));
        source.wait("held");
        until("prepared", || {
            let state = destination.status()["incoming"]["state"].clone();
            state == "prepared" || state == "expired"
        });
        source.process.kill();
        let api = destination.api.to_str().unwrap();
        let resolved = vmferry(&["resolve", "--api", api, "--run-here"]);
        assert!(resolved.status.success(), "{}", String::from_utf8_lossy(&resolved.stderr));
        destination.wait("running");
        destination.assert_guest_lives();
        assert!(number(&destination.counters()["writes"]) >= number(&before["writes"]));
    }
}
