//! The handover explored exhaustively: every order of what may happen, and at every step everything that may
//! go wrong, a bounded number of times.
//!
//! Checked in every state: at most one runs, and no device on both sides (invariant 1); somebody has the
//! guest, unless its home died (2); at the first instruction memory, device bytes and machine state are those
//! of this attempt (3); no known unread initial data in STOP_COPY, and the device was asked after the pause
//! (5); acknowledged means loaded, and a Commit is obeyed of its attempt on the newest connection only (6);
//! no word and no step before its record. Checked over the whole graph: from every state a state with exactly
//! one runner can be reached without another fault, by itself while no process died, and with the operator
//! while one host has the guest (2).
//!
//! Bounds: one device or none, one page, and a number of faults, which bounds attempts, sessions and
//! connections. [`Faults`](model::Faults) says what a fault is. CI explores one fault of every kind with each
//! kind of device, and two of a kind; `VMFERRY_EXPLORE_FAULTS=2 cargo test -p switchover --test explore --
//! --ignored --nocapture` explores as many as it is told, of all kinds together.

#[path = "explore/model.rs"]
mod model;
#[path = "explore/search.rs"]
mod search;

use std::time::Instant;

use model::{Faults, Model};
use search::{Found, explore};
use switchover::handover::{DeviceTraits, Rules};

/// About 150 bytes each, and some kilobytes each while they wait: well below 4 GiB.
const STATES_MAX: usize = 8_000_000;

const ALL: DeviceTraits = DeviceTraits { pre_copy: true, p2p: true };
const PRE_COPY: DeviceTraits = DeviceTraits { pre_copy: true, p2p: false };
const P2P: DeviceTraits = DeviceTraits { pre_copy: false, p2p: true };
const STOP_COPY: DeviceTraits = DeviceTraits { pre_copy: false, p2p: false };

const LINKS: Faults = Faults { left: 2, links: true, devices: false, hosts: false };
const DEVICES: Faults = Faults { left: 2, links: false, devices: true, hosts: false };

fn search(traits: Option<DeviceTraits>, rules: Rules, faults: Faults) -> Found {
    explore(Model::in_precopy(traits, rules, faults), STATES_MAX)
}

fn holds(what: &str, start: Model, states_max: usize) {
    let begin = Instant::now();
    let found = explore(start, states_max);
    println!(
        "{what}: {} states, {} steps, {} levels, {} with exactly one runner, {} that must reach one; {:.1?}",
        found.states,
        found.steps,
        found.deepest,
        found.good,
        found.owing,
        begin.elapsed()
    );
    if let Some((harm, trace)) = found.harm {
        panic!("{what}: {harm}\n{}", trace.join("\n"));
    }
}

#[test]
fn one_fault_of_any_kind_from_the_first_connection_on() {
    let start = Model::new(Some(ALL), Rules::default(), Faults::any(1));
    holds("one fault from the start", start, STATES_MAX);
}

#[test]
fn one_fault_of_any_kind_with_each_kind_of_device() {
    for (what, traits) in [("PRE_COPY", PRE_COPY), ("P2P", P2P), ("STOP_COPY", STOP_COPY)] {
        let start = Model::in_precopy(Some(traits), Rules::default(), Faults::any(1));
        holds(&format!("one fault, a device with {what}"), start, STATES_MAX);
    }
}

#[test]
fn two_faults_of_any_kind_without_a_device() {
    let start = Model::in_precopy(None, Rules::default(), Faults::any(2));
    holds("two faults, no device", start, STATES_MAX);
}

#[test]
fn two_faults_of_links_and_processes() {
    let start = Model::in_precopy(Some(ALL), Rules::default(), LINKS);
    holds("two faults of links and processes", start, STATES_MAX);
}

#[test]
fn two_faults_of_the_device_and_what_the_guest_does_with_it() {
    let start = Model::in_precopy(Some(ALL), Rules::default(), DEVICES);
    holds("two faults of the device", start, STATES_MAX);
}

#[test]
#[ignore = "takes long; VMFERRY_EXPLORE_FAULTS says how many faults"]
fn as_many_faults_as_told() {
    let told = std::env::var("VMFERRY_EXPLORE_FAULTS").ok().and_then(|n| n.parse().ok());
    let faults = told.unwrap_or(2);
    let start = Model::in_precopy(Some(ALL), Rules::default(), Faults::any(faults));
    holds(&format!("{faults} faults of any kind"), start, 60_000_000);
}

// --- each rule is needed --------------------------------------------------------------------------

/// With one rule off the same search finds the harm that the rule is for.
#[test]
fn with_any_rule_off_the_harm_is_found() {
    type Off = fn(&mut Rules);
    type Case = (&'static str, Off, Option<DeviceTraits>, Faults, &'static [&'static str]);
    let cases: [Case; 16] = [
        ("commit_within_window", |r| r.commit_within_window = false, None, LINKS, &["invariant 1"]),
        ("resolve_after_window", |r| r.resolve_after_window = false, None, LINKS, &["invariant 1"]),
        (
            "doubt_ends_by_record",
            |r| r.doubt_ends_by_record = false,
            None,
            LINKS,
            &["invariant 1", "invariant 2"],
        ),
        (
            "commit_on_newest",
            |r| r.commit_on_newest_connection = false,
            None,
            LINKS,
            &["invariant 6"],
        ),
        ("commit_of_this", |r| r.commit_of_this_attempt = false, None, LINKS, &["invariant 6"]),
        ("query_in_doubt", |r| r.query_in_doubt = false, None, LINKS, &["no way"]),
        (
            "without_guest_no_query",
            |r| r.without_guest_no_query = false,
            None,
            LINKS,
            &["invariant 2"],
        ),
        (
            "lost_guest_is_unknown",
            |r| r.lost_guest_is_unknown = false,
            None,
            LINKS,
            &["invariant 2"],
        ),
        ("late_commit_is_kept", |r| r.late_commit_is_kept = false, None, LINKS, &["invariant 2"]),
        (
            "failed_start_is_kept",
            |r| r.failed_start_is_kept = false,
            None,
            Faults::any(2),
            &["invariant 2"],
        ),
        ("restore_dirty", |r| r.restore_dirty = false, None, LINKS, &["invariant 3"]),
        ("final_sync", |r| r.final_sync = false, Some(ALL), DEVICES, &["invariant 3"]),
        (
            "no_unread_into_stop_copy",
            |r| r.no_unread_into_stop_copy = false,
            Some(ALL),
            DEVICES,
            &["invariant 5"],
        ),
        ("look_asks_anew", |r| r.look_asks_anew = false, Some(PRE_COPY), DEVICES, &["invariant 5"]),
        (
            "acks_name_sessions",
            |r| r.acks_name_sessions = false,
            Some(ALL),
            DEVICES,
            &["invariant 6"],
        ),
        ("nothing", |_| (), None, LINKS, &[]),
    ];
    for (name, off, traits, faults, harms) in cases {
        let mut rules = Rules::default();
        off(&mut rules);
        let found = search(traits, rules, faults);
        let harm = found.harm.as_ref().map(|(harm, _)| harm.as_str());
        println!("without {name}: {harm:?} after {} states", found.states);
        match harms {
            [] => assert_eq!(harm, None),
            harms => {
                let harm = harm.unwrap_or_else(|| panic!("{name} is not needed"));
                assert!(harms.iter().any(|h| harm.starts_with(h)), "{name}: {harm}");
            }
        }
    }
}
