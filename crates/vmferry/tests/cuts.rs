//! The link is cut before and after every single message between two real processes, and real processes are
//! killed at every door of the handover. Whatever is cut or killed: the guest runs in one process, never in
//! two (the run witness says so), and never in none for good; doubt ends by a new connection, or by
//! `vmferry resolve` where the link stays down.
//!
//! ```text
//!   source ──▶ proxy (this process; cuts at the n-th message of a kind) ──▶ destination
//!      └────────────── witness: a file both stamp at each heartbeat ─────────────┘
//! ```
//!
//! Which messages there are is found out by migrations without a cut; so one that is added to the protocol
//! is cut, too.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Daemon, Device, LIMIT, Lab, any_guest, guests, vmferry};
use microvm::witness;
use migration::testing::proxy::{Action, At, Channel, Direction, Fault, Proxy};
use migration::wire::kind;
use serde_json::{Value, json};

const TO: Direction = Direction::ToDestination;
const FROM: Direction = Direction::ToSource;
/// Migrations side by side; most of each is waiting.
const SIDE_BY_SIDE: usize = 4;
/// A source that is in doubt for so long with the link down has heard nothing.
const SETTLED: Duration = Duration::from_millis(300);

/// What is done to a migration on its way, so that it has more to say than a plain one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Script {
    Plain,
    /// The guest reconfigures its device after the decision, and the switchover is revoked.
    Revoked,
    RolledBack,
    CancelledLate,
    /// The link was lost before Commit arrived; the source asks over a new connection.
    InDoubtBeforeCommit,
    /// The same once it had arrived.
    InDoubtAfterCommit,
}

impl Script {
    const ALL: [Self; 6] = [
        Self::Plain,
        Self::Revoked,
        Self::RolledBack,
        Self::CancelledLate,
        Self::InDoubtBeforeCommit,
        Self::InDoubtAfterCommit,
    ];

    /// Where the source is held so that it is done.
    fn door(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Revoked => Some("look"),
            Self::RolledBack | Self::CancelledLate => Some("await-ready"),
            Self::InDoubtBeforeCommit | Self::InDoubtAfterCommit => Some("committed"),
        }
    }

    /// The fault that is a part of it.
    fn own_fault(self) -> Option<Fault> {
        let action = match self {
            Self::InDoubtBeforeCommit => Action::LinkDown,
            Self::InDoubtAfterCommit => Action::LinkDownAfter,
            _ => return None,
        };
        let at = At::Kind(kind::COMMIT, 0);
        Some(Fault { channel: Channel::Control, direction: TO, at, action })
    }

    /// Its messages are those of a second connection.
    fn reconnects(self) -> bool {
        self.own_fault().is_some()
    }
}

/// One cut.
#[derive(Clone, Copy, Debug)]
struct Case {
    script: Script,
    fault: Fault,
    /// The link stays down, so that only the operator is left.
    for_good: bool,
}

/// Two daemons with the proxy between them.
struct Hosts {
    source: Daemon,
    destination: Daemon,
    proxy: Proxy,
    witness: PathBuf,
    records: [PathBuf; 2],
    _devices: [Device; 2],
    lab: Lab,
}

impl Hosts {
    fn new(guest: &'static str) -> Self {
        let mut lab = Lab::new(guest);
        let witness = lab.path("witness");
        let records = ["here", "there"].map(|name| lab.path(name));
        let devices = [lab.device(&["--state-size", "1M"]), lab.device(&["--state-size", "1M"])];
        let args = |records: &PathBuf| {
            ["--memory", "16M", "--witness"]
                .map(String::from)
                .into_iter()
                .chain([witness.display().to_string(), "--state-dir".into()])
                .chain([records.display().to_string()])
                .collect::<Vec<_>>()
        };
        let (here, there) = (args(&records[0]), args(&records[1]));
        let here: Vec<&str> = here.iter().map(String::as_str).chain(["--keep"]).collect();
        let there: Vec<&str> = there.iter().map(String::as_str).collect();
        let source = lab.source(&[&devices[0]], &here);
        let (destination, address) = lab.destination("tcp", &[&devices[1]], &there);
        let listen = "tcp:127.0.0.1:0".parse().unwrap();
        let proxy = Proxy::start(&listen, &address.parse().unwrap()).unwrap();
        Self { source, destination, proxy, witness, records, _devices: devices, lab }
    }

    fn migrate(&self, arguments: Value) {
        self.source.migrate(&self.proxy.address().to_string(), arguments);
    }

    /// The source stands at a door; false if the migration ended before.
    fn is_held(&self) -> bool {
        let begin = Instant::now();
        loop {
            if !self.source.status()["held"].is_null() {
                return true;
            }
            if self.source.call("progress", json!({}))["done"] == true {
                return false;
            }
            assert!(begin.elapsed() < LIMIT, "neither held nor over: {}", self.source.status());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Migrates by the script; answers the report, or that it is in doubt with the link down.
    fn perform(&self, script: Script, case: Option<&Case>) -> Option<Value> {
        if let Some(fault) = script.own_fault() {
            self.proxy.add(fault);
        }
        // The script's own cut is one as well: the source must come back after that.
        let last = 1 + usize::from(script.reconnects());
        if case.is_some_and(|case| case.for_good) {
            self.proxy.refuse_after(last);
        }
        let strike = || case.into_iter().for_each(|case| self.proxy.add(case.fault));
        if !script.reconnects() {
            strike();
        }
        let hold: Vec<&str> = script.door().into_iter().collect();
        self.migrate(json!({"verify": true, "hold": hold, "downtime-limit-ms": 5_000}));
        if script.door().is_some() && self.is_held() {
            match script {
                Script::Plain => {}
                Script::Revoked => {
                    self.source.workload(json!({
                        "command": "reconfigure", "device": 0, "generation": 1, "kib": 64,
                    }));
                    self.source.call("take-back", json!({}));
                }
                Script::RolledBack => drop(self.source.call("take-back", json!({}))),
                Script::CancelledLate => drop(self.source.call("cancel", json!({}))),
                // The messages of the second connection are cut.
                Script::InDoubtBeforeCommit | Script::InDoubtAfterCommit => strike(),
            }
            self.source.call("release", json!({}));
        }
        let (begin, mut in_doubt_since) = (Instant::now(), None);
        loop {
            let mut answer = self.source.call("progress", json!({}));
            if answer["done"] == true {
                return Some(answer["report"].take());
            }
            let down = case.is_some_and(|c| c.for_good) && self.proxy.struck().len() >= last;
            let doubts = down && answer["progress"]["status"] == "in-doubt";
            // What was passed on before the link went may still be on its way.
            if doubts && in_doubt_since.get_or_insert_with(Instant::now).elapsed() > SETTLED {
                return None;
            }
            assert!(begin.elapsed() < LIMIT, "no end: {}", self.source.status());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn resolve(&self, daemon: &Daemon, words: &[&str]) {
        let api = daemon.api.display().to_string();
        let output = vmferry(&[&["resolve", "--api", &api], words].concat());
        assert!(output.status.success(), "{words:?}: {output:?}");
    }

    /// The operator looks at both sides and says who runs the guest; answers whether that is the destination.
    fn operator(&self) -> bool {
        let begin = Instant::now();
        let state = loop {
            let status = self.destination.status();
            let state = status["incoming"]["state"].as_str().unwrap_or_default().to_owned();
            if ["running", "prepared", "expired", "listening", "aborted"].contains(&state.as_str())
            {
                break state;
            }
            assert!(begin.elapsed() < LIMIT, "{status:#}");
            std::thread::sleep(Duration::from_millis(5));
        };
        if state == "running" {
            self.resolve(&self.source, &["--abandon"]);
            assert_eq!(self.source.report()["status"], "abandoned");
            return true;
        }
        if state == "prepared" || state == "expired" {
            self.resolve(&self.destination, &["--discard"]);
        }
        // It will never run there, as its own status says, so there is nothing to wait for.
        self.resolve(&self.source, &["--resume-here", "--force"]);
        assert_eq!(self.source.report()["status"], "failed");
        false
    }

    /// It runs in exactly one place, which is this one, and the witness saw it nowhere else since.
    fn assert_one_runs(&self, there: bool, what: &str) {
        if there {
            self.destination.wait("running");
            self.destination.assert_guest_lives();
            assert_eq!(self.source.status()["state"], "migrated", "{what}");
        } else {
            self.source.assert_guest_lives();
            let status = self.destination.status();
            assert_eq!(status["state"], "incoming", "{what}: {status:#}");
        }
        self.assert_witness(there, what);
    }

    fn assert_witness(&self, there: bool, what: &str) {
        let order = witness::order_of_running(&witness::read(&self.witness).unwrap());
        let ran: Vec<u32> = order.iter().map(|(process, _)| *process).collect();
        let mut expected = vec![self.source.process.id()];
        expected.extend(there.then(|| self.destination.process.id()));
        assert_eq!(ran, expected, "{what}: processes in the order in which the guest ran in them");
    }

    /// A guest that stayed moves with the next try, to the same destination.
    fn assert_moves_now(&self, what: &str) {
        self.proxy.refuse(false);
        self.migrate(json!({"verify": true, "downtime-limit-ms": 5_000}));
        let report = self.source.report();
        assert_eq!(report["status"], "completed", "{what}: {report:#}");
        assert_eq!(report["memory-identical"], true, "{what}: {report:#}");
        assert_eq!(report["device-state-identical"], true, "{what}: {report:#}");
        self.assert_one_runs(true, what);
    }
}

/// How the cases ended.
#[derive(Default)]
struct Tally {
    completed: AtomicUsize,
    stayed: AtomicUsize,
    doubt_ended_by_reconnect: AtomicUsize,
    doubt_ended_by_operator: AtomicUsize,
}

fn run(guest: &'static str, case: &Case, tally: &Tally) {
    let what = format!("{case:?}");
    let hosts = Hosts::new(guest);
    let report = hosts.perform(case.script, Some(case));
    let struck = hosts.proxy.struck();
    assert!(struck.contains(&case.fault), "{what}: it was never cut: {report:#?}");
    let there = match &report {
        Some(report) => {
            let status = report["status"].as_str().unwrap_or_default();
            assert!(["completed", "failed", "cancelled"].contains(&status), "{what}: {report:#}");
            status == "completed"
        }
        None => hosts.operator(),
    };
    hosts.assert_one_runs(there, &what);
    let phases = hosts.source.status()["phases"].clone();
    let doubted = phases.as_array().unwrap().iter().any(|phase| phase["phase"] == "in-doubt");
    let counter = match (report.is_some(), doubted) {
        (false, _) => &tally.doubt_ended_by_operator,
        (true, true) => &tally.doubt_ended_by_reconnect,
        (true, false) if there => &tally.completed,
        (true, false) => &tally.stayed,
    };
    counter.fetch_add(1, Ordering::Relaxed);
    if !there {
        hosts.assert_moves_now(&what);
    }
}

/// How many of a kind are cut one by one; of what a clock or the guest's doing makes any number of, the first.
fn cut_max(kind: u16) -> u64 {
    match kind {
        kind::KEEP_ALIVE => 0,
        kind::PASS
        | kind::TELEMETRY
        | kind::ECHO
        | kind::ECHOED
        | kind::RAM_PAGES
        | kind::RAM_ZERO
        | kind::DEVICE => 1,
        _ => u64::MAX,
    }
}

/// From here on the guest stands still.
fn is_handover(kind: u16) -> bool {
    matches!(
        kind,
        kind::STOP_COPY_BEGIN
            | kind::SECTION
            | kind::STATE_END
            | kind::READY
            | kind::HASH_REQUEST
            | kind::HASHES
            | kind::COMMIT
            | kind::RUNNING
            | kind::NEVER
            | kind::QUERY
            | kind::ROLL_BACK
            | kind::ROLLED_BACK
            | kind::REVOKED
            | kind::ABORT
    )
}

/// Every cut there is, by migrations that show which messages there are.
fn cases(guest: &'static str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut plain = BTreeMap::new();
    for script in Script::ALL {
        let hosts = Hosts::new(guest);
        let report = hosts.perform(script, None).unwrap();
        let expected = match script {
            Script::InDoubtBeforeCommit => "failed",
            Script::CancelledLate => "cancelled",
            _ => "completed",
        };
        assert_eq!(report["status"], expected, "{script:?}: {report:#}");
        let seen = hosts.proxy.all_seen();
        for (&(channel, direction, kind), &count) in &seen {
            let said = plain.get(&(channel, direction, kind)).copied().unwrap_or(0);
            // Nobody waits for the answer to Abort: whether it comes before the source has gone is chance.
            if script == Script::CancelledLate && kind == kind::NEVER {
                continue;
            }
            // What a plain one says is cut there; of a second connection it is what ends the doubt.
            let (before, end) = match (script.reconnects(), kind) {
                (false, _) => (said, count.min(cut_max(kind))),
                (true, kind::HELLO | kind::ACCEPT) => (said, said + 1),
                (true, kind::QUERY | kind::NEVER | kind::RUNNING) => (0, 1),
                (true, _) => continue,
            };
            for n in before..end {
                let downs = [(Action::Cut, false), (Action::CutAfter, false)];
                let goods = [(Action::LinkDown, true), (Action::LinkDownAfter, true)];
                let goods = goods.into_iter().filter(|_| is_handover(kind));
                for (action, for_good) in downs.into_iter().chain(goods) {
                    let fault = Fault { channel, direction, at: At::KindOfAll(kind, n), action };
                    cases.push(Case { script, fault, for_good });
                }
            }
        }
        if script == Script::Plain {
            plain = seen;
        }
    }
    cases
}

fn has(cases: &[Case], direction: Direction, kind: u16) -> bool {
    cases.iter().any(|case| {
        case.fault.direction == direction
            && matches!(case.fault.at, At::KindOfAll(of_case, _) if of_case == kind)
    })
}

#[test]
fn cut_before_and_after_every_message() {
    let every = std::env::var_os("VMFERRY_ALL_GUESTS").is_some();
    let of_host = if every { guests() } else { any_guest().into_iter().collect() };
    for guest in of_host {
        let cases = cases(guest);
        // The list is made from what was seen; these are the words the handover cannot do without.
        let to = [
            kind::HELLO,
            kind::DESCRIBE,
            kind::SESSION_BEGIN,
            kind::INITIAL_DATA_SENT,
            kind::REINIT,
            kind::STOP_COPY_BEGIN,
            kind::REVOKED,
            kind::ROLL_BACK,
            kind::STATE_END,
            kind::COMMIT,
            kind::QUERY,
        ];
        let from = [
            kind::ACCEPT,
            kind::DESCRIBE_OK,
            kind::SWITCHOVER_ACK,
            kind::ROLLED_BACK,
            kind::READY,
            kind::RUNNING,
            kind::NEVER,
        ];
        for kind in to {
            assert!(has(&cases, TO, kind), "{kind:#x} is never cut");
        }
        for kind in from {
            assert!(has(&cases, FROM, kind), "{kind:#x} is never cut");
        }
        let (next, tally) = (AtomicUsize::new(0), Tally::default());
        std::thread::scope(|scope| {
            for _ in 0..SIDE_BY_SIDE {
                scope.spawn(|| {
                    while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                        run(guest, case, &tally);
                    }
                });
            }
        });
        let counts = [
            ("completed all the same", &tally.completed),
            ("stayed", &tally.stayed),
            ("in doubt until a new connection", &tally.doubt_ended_by_reconnect),
            ("in doubt until the operator's word", &tally.doubt_ended_by_operator),
        ];
        let shown = counts.map(|(what, count)| format!("{} {what}", count.load(Ordering::Relaxed)));
        println!("{guest} guest: {} cuts: {}", cases.len(), shown.join(", "));
        for (what, count) in &counts[1..] {
            assert!(count.load(Ordering::Relaxed) > 0, "none {what}");
        }
    }
}

// --- killed ---------------------------------------------------------------------------------------

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dies {
    Source,
    Destination,
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The source goes on by itself.
    SourceRuns,
    /// The source is in doubt until its operator, who knows that the destination is dead, says so.
    SourceRunsByOperator,
    /// The destination goes on by itself.
    DestinationRuns,
    /// The destination holds all of the guest until its operator, who knows that the source is dead, says so.
    DestinationRunsByOperator,
    /// The guest died with the host that ran it; the other one does not bring an old copy back.
    Gone,
}

/// Kills at a door, and asserts what is left. `side` is whose door it is.
fn killed_at(
    guest: &'static str,
    script: Script,
    (side, door): (&str, &str),
    dies: Dies,
    then: Then,
) {
    let what = format!("{dies:?} killed at {side} {door}, {script:?}");
    println!("{what}: {then:?}");
    let mut hosts = Hosts::new(guest);
    let source_doors: Vec<&str> =
        script.door().into_iter().chain((side == "source").then_some(door)).collect();
    if side == "destination" {
        hosts.destination.call("hold", json!({"phases": [door]}));
    }
    hosts.migrate(json!({"hold": source_doors, "downtime-limit-ms": 5_000}));
    if script.door().is_some() {
        assert!(hosts.is_held(), "{what}");
        let command = if script == Script::CancelledLate { "cancel" } else { "take-back" };
        hosts.source.call(command, json!({}));
        hosts.source.call("release", json!({}));
    }
    let held = if side == "source" { &hosts.source } else { &hosts.destination };
    let held = held.wait("held");
    assert_eq!(held["held"], json!({"side": side, "phase": door}), "{what}");
    match dies {
        Dies::Source => hosts.source.process.kill(),
        Dies::Destination => hosts.destination.process.kill(),
    }
    let released = if side == "source" { &hosts.source } else { &hosts.destination };
    // Who was killed cannot be released.
    let _ = released.try_call("release", json!({}));
    match then {
        Then::SourceRuns => {
            let status = hosts.source.report()["status"].clone();
            assert!(status == "failed" || status == "cancelled", "{what}: {status}");
        }
        Then::SourceRunsByOperator => {
            let in_doubt = || hosts.source.status()["migration"]["status"] == "in-doubt";
            common::until("in doubt", in_doubt);
            hosts.resolve(&hosts.source, &["--resume-here", "--force"]);
            assert_eq!(hosts.source.report()["status"], "failed", "{what}");
        }
        Then::DestinationRuns => drop(hosts.destination.wait("running")),
        Then::DestinationRunsByOperator => {
            assert_eq!(hosts.destination.status()["state"], "incoming", "{what}: by itself");
            hosts.resolve(&hosts.destination, &["--run-here"]);
            hosts.destination.wait("running");
        }
        Then::Gone => {}
    }
    match then {
        Then::SourceRuns | Then::SourceRunsByOperator => {
            hosts.source.assert_guest_lives();
            hosts.assert_witness(false, &what);
            let device = hosts.lab.device(&["--state-size", "1M"]);
            let memory = ["--memory", "16M"];
            let (next, address) = hosts.lab.destination("tcp", &[&device], &memory);
            hosts.source.migrate_verified(&address);
            next.wait("running");
            next.assert_guest_lives();
        }
        Then::DestinationRuns | Then::DestinationRunsByOperator => {
            hosts.destination.assert_guest_lives();
            hosts.assert_witness(true, &what);
        }
        Then::Gone => {
            let made = witness::read(&hosts.witness).unwrap().len();
            std::thread::sleep(SETTLED);
            assert_eq!(witness::read(&hosts.witness).unwrap().len(), made, "{what}: it runs");
            let left = match dies {
                Dies::Source => &hosts.destination,
                Dies::Destination => &hosts.source,
            };
            let state = left.status()["state"].clone();
            assert!(state == "incoming" || state == "migrated", "{what}: {state}");
        }
    }
}

/// The phases before Commit are in `faults.rs`; these are the ways back, and from Commit on.
#[test]
fn killed_on_the_way_back_and_from_commit_on() {
    let Some(guest) = any_guest() else { return };
    use Dies::{Destination, Source};
    use Script::{CancelledLate, Plain, Revoked, RolledBack};
    for (script, door, dies, then) in [
        (Revoked, ("source", "revoking"), Destination, Then::SourceRuns),
        (RolledBack, ("source", "rolling-back"), Destination, Then::SourceRuns),
        (CancelledLate, ("source", "rolling-back"), Destination, Then::SourceRuns),
        // The guest ran in the process that died, or was about to again.
        (Revoked, ("source", "revoking"), Source, Then::Gone),
        (RolledBack, ("source", "rolling-back"), Source, Then::Gone),
        (Plain, ("source", "committed"), Destination, Then::SourceRunsByOperator),
        (Plain, ("source", "committed"), Source, Then::DestinationRunsByOperator),
        (Plain, ("destination", "starting"), Destination, Then::SourceRunsByOperator),
        (Plain, ("destination", "starting"), Source, Then::DestinationRuns),
        (Plain, ("destination", "running"), Source, Then::DestinationRuns),
        (Plain, ("source", "done"), Source, Then::DestinationRuns),
        (Plain, ("source", "done"), Destination, Then::Gone),
    ] {
        killed_at(guest, script, door, dies, then);
    }
}

/// What its records are for: a destination that died with the decision, begun anew, does not run the guest, and
/// a source that died in doubt knows of it.
#[test]
fn records_of_both_sides_outlive_the_processes() {
    let Some(guest) = any_guest() else { return };
    let mut hosts = Hosts::new(guest);
    hosts.migrate(json!({"hold": ["committed"], "downtime-limit-ms": 5_000}));
    assert!(hosts.is_held());
    hosts.source.process.kill();
    let records = hosts.records[0].display().to_string();
    let asked = vmferry(&["resolve", "--state-dir", &records, "--ask"]);
    let shown = String::from_utf8_lossy(&asked.stdout).into_owned();
    assert!(!shown.contains("nothing is in doubt"), "{asked:?}");
    hosts.resolve(&hosts.destination, &["--run-here"]);
    hosts.destination.wait("running");
    hosts.destination.assert_guest_lives();
    hosts.assert_witness(true, "records");
}
