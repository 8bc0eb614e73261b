//! Who runs the guest, with both bodies of the engine: attempts that are rolled back and succeed later, links
//! cut around every message, destinations that begin anew from their records, and the operator's word.

#[path = "engine/hosts.rs"]
mod hosts;
#[path = "engine/toy.rs"]
mod toy;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hosts::*;
use migration::record::{Record, RecordStore};
use migration::testing::proxy::{Action, At, Channel, Direction};
use migration::wire::kind;
use migration::{Incoming, IncomingConfig, Outgoing, OutgoingConfig, RecoverConfig, Report, Vmm};
use switchover::handover::{Decision, Resolve};
use switchover::message::Side;
use toy::ToyVm;

const RUN_HERE: Resolve = Resolve::RunHere { force: false };
const FORCE: Resolve = Resolve::RunHere { force: true };
const TO: Direction = Direction::ToDestination;
const FROM: Direction = Direction::ToSource;

fn has(report: &Report, event: &str) -> bool {
    report.timeline.iter().any(|entry| entry.event == event)
}

// --- rolled back ----------------------------------------------------------------------------------

fn assert_second_attempt(hosts: &Hosts, report: &Report, what: &str) {
    hosts.assert_moved(report, what);
    assert_eq!(report.switchover_attempts, 2, "{what}");
    assert_eq!(report.source_blackouts_ms.len(), 1, "{what}: the guest ran in between");
}

#[test]
fn taken_back_in_each_phase_the_same_migration_succeeds_later() {
    for phase in ["look", "quiesce", "stop-copy", "await-ready"] {
        for devices in [0, 2] {
            let what = format!("{phase}, {devices} devices");
            let hosts = Hosts::new(PAGES, devices, false);
            if phase == "quiesce" && devices == 0 {
                continue;
            }
            let report = hosts.migrate_holding(phase, Outgoing::take_back);
            assert_second_attempt(&hosts, &report, &what);
            let rolled_back = matches!(phase, "stop-copy" | "await-ready");
            assert_eq!(has(&report, "rolled-back"), rolled_back, "{what}");
            assert_eq!(report.switchover_revocations, 1, "{what}");
            assert_eq!(report.switchover_roll_backs, u32::from(rolled_back), "{what}");
            assert_eq!(has(&report, "revoked"), !rolled_back, "{what}");
            for device in report.devices.iter().filter(|_| rolled_back) {
                assert_eq!(device.acks, 2, "{what}: a session of its own for each attempt");
            }
        }
    }
}

#[test]
fn taken_back_over_tcp_and_with_much_under_way() {
    for tcp in [false, true] {
        let hosts = Hosts::new(8192, 2, tcp);
        let (observer, reached, let_go) = hold(&hosts, "stop-copy");
        let outgoing = hosts.start(OutgoingConfig { observer, ..hosts.config() });
        reached.recv_timeout(LIMIT).unwrap();
        // The last memory of the attempt is all there is, and is cut off while it is being sent.
        hosts.source.dirty_all();
        drop(let_go);
        let pages = hosts.proxy.seen(Channel::Data(0), TO, kind::RAM_PAGES);
        until("the last memory is being sent", || {
            hosts.proxy.seen(Channel::Data(0), TO, kind::RAM_PAGES) > pages
                || outgoing.report().is_some()
        });
        outgoing.take_back();
        let report = report(&outgoing);
        hosts.assert_moved(&report, &format!("tcp {tcp}"));
    }
}

#[test]
fn taken_back_while_the_destination_loads_machine_state() {
    let hosts = Arc::new(Hosts::small());
    let outgoing = Arc::new(std::sync::Mutex::new(None::<Outgoing>));
    let taking = Arc::clone(&outgoing);
    hosts.destination.on_load(Arc::new(move || {
        if let Some(outgoing) = &*taking.lock().unwrap() {
            outgoing.take_back();
        }
    }));
    let (observer, reached, let_go) = hold(&hosts, "precopy");
    *outgoing.lock().unwrap() = Some(hosts.start(OutgoingConfig { observer, ..hosts.config() }));
    reached.recv_timeout(LIMIT).unwrap();
    drop(let_go);
    let begin = std::time::Instant::now();
    let report = loop {
        if let Some(report) = outgoing.lock().unwrap().as_ref().and_then(Outgoing::report) {
            break report;
        }
        assert!(begin.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_second_attempt(&hosts, &report, "taken back in load");
    assert!(has(&report, "rolled-back"));
}

#[test]
fn a_device_that_the_guest_reset_too_late_rolls_back_and_moves() {
    let hosts = Hosts::small();
    let report = hosts.migrate_holding("stop-copy", |_| hosts.source.reset_device(0));
    hosts.assert_moved(&report, "a late reset");
    assert!(has(&report, "rolled-back"), "{:?}", report.timeline);
}

#[test]
fn rolled_back_many_times_in_a_row() {
    let hosts = Hosts::small();
    let outgoing = hosts.start(hosts.config());
    let mut taken = 0;
    while outgoing.report().is_none() && taken < 5 {
        let state = outgoing.progress().state;
        if matches!(state.as_str(), "stop-copy" | "await-ready") {
            outgoing.take_back();
            taken += 1;
            let past = |state: &str| !matches!(state, "stop-copy" | "await-ready" | "rolling-back");
            until("past it", || past(&outgoing.progress().state));
        }
        std::thread::yield_now();
    }
    let report = report(&outgoing);
    hosts.assert_moved(&report, &format!("taken back {taken} times"));
}

/// A migration whose first attempt is rolled back.
fn migrate_rolled_back(hosts: &Hosts) -> Report {
    let (observer, reached, let_go) = hold(hosts, "await-ready");
    let outgoing = hosts.start(OutgoingConfig { observer, ..hosts.config() });
    // A link that is cut before does not come that far.
    until("await-ready, or the end", || reached.try_recv().is_ok() || outgoing.report().is_some());
    outgoing.take_back();
    drop(let_go);
    report(&outgoing)
}

#[test]
fn cut_before_and_after_every_control_message_of_a_migration_that_is_rolled_back() {
    for (direction, action) in
        [(TO, Action::Cut), (TO, Action::CutAfter), (FROM, Action::Cut), (FROM, Action::CutAfter)]
    {
        cut_everywhere_of((Channel::Control, direction, action), 1, migrate_rolled_back);
    }
}

#[test]
fn the_link_goes_down_around_each_word_of_the_roll_back() {
    for (direction, word) in [(TO, kind::ROLL_BACK), (FROM, kind::ROLLED_BACK)] {
        for action in [Action::LinkDown, Action::LinkDownAfter, Action::CutWithin] {
            let what = format!("{action:?} of {word:#x}");
            let hosts = Hosts::small();
            hosts.fault(Channel::Control, direction, At::Kind(word, 0), action);
            let report = migrate_rolled_back(&hosts);
            assert_eq!(hosts.proxy.struck().len(), 1, "{what}");
            assert_one_runs(&hosts, &report, &what);
        }
    }
}

// --- in doubt -------------------------------------------------------------------------------------

#[test]
fn cut_before_and_after_every_word_of_the_handover() {
    let to = [kind::STOP_COPY_BEGIN, kind::STATE_END, kind::HASH_REQUEST, kind::COMMIT];
    let from = [kind::READY, kind::HASHES, kind::RUNNING];
    let words = to.map(|word| (TO, word)).into_iter().chain(from.map(|word| (FROM, word)));
    for (direction, word) in words {
        for action in [Action::Cut, Action::CutAfter, Action::LinkDown, Action::LinkDownAfter] {
            let what = format!("{action:?} of {word:#x}");
            let hosts = Hosts::small();
            hosts.fault(Channel::Control, direction, At::Kind(word, 0), action);
            let report = hosts.migrate();
            assert_eq!(hosts.proxy.struck().len(), 1, "{what}");
            assert_one_runs(&hosts, &report, &what);
        }
    }
}

/// In doubt, the link down: the Commit did not arrive.
fn in_doubt(window: Duration) -> (Hosts, Outgoing) {
    let hosts = Hosts::with(PAGES, 2, false, |config| config.window = window);
    hosts.fault(Channel::Control, TO, At::Kind(kind::COMMIT, 0), Action::LinkDown);
    let (observer, reached, let_go) = hold(&hosts, "committed");
    let config = OutgoingConfig { verify: false, observer, ..hosts.config() };
    let outgoing = hosts.start(config);
    reached.recv_timeout(LIMIT).unwrap();
    // Nobody answers who might end the doubt.
    hosts.proxy.refuse(true);
    drop(let_go);
    until("in doubt", || outgoing.progress().state == "in-doubt");
    (hosts, outgoing)
}

const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_millis(50);

#[test]
fn the_operator_resumes_a_source_in_doubt_after_the_window_and_not_before() {
    let (hosts, outgoing) = in_doubt(LONG);
    let refused = outgoing.resolve(RUN_HERE).unwrap_err();
    assert!(refused.contains("window"), "{refused}");
    assert!(!hosts.source.runs());
    let (hosts, outgoing) = in_doubt(SHORT);
    until("the window is over", || outgoing.resolve(RUN_HERE).is_ok());
    let report = report(&outgoing);
    assert_eq!(report.status, "failed");
    goes_on(&hosts.source, "resumed by the operator");
    assert!(!hosts.destination.runs());
    hosts.proxy.refuse(false);
    hosts.assert_moved(&hosts.migrate(), "resumed by the operator, later");
}

#[test]
fn with_force_the_operator_resumes_at_once_and_without_doubt_there_is_nothing_to_resolve() {
    let (hosts, outgoing) = in_doubt(LONG);
    outgoing.resolve(FORCE).unwrap();
    assert_eq!(report(&outgoing).status, "failed");
    goes_on(&hosts.source, "forced");
    let hosts = Hosts::small();
    let outgoing = hosts.start(hosts.config());
    assert!(outgoing.resolve(FORCE).is_err());
    assert!(outgoing.resolve(Resolve::Discard).is_err());
    hosts.assert_moved(&report(&outgoing), "nothing to resolve");
}

#[test]
fn the_operator_gives_the_guest_up_at_a_source_in_doubt() {
    let (hosts, outgoing) = in_doubt(LONG);
    outgoing.resolve(Resolve::Discard).unwrap();
    assert_eq!(report(&outgoing).status, "abandoned");
    assert!(!hosts.source.runs());
    assert_eq!(source_record(&hosts).decision, Decision::Gone);
}

#[test]
fn the_operator_starts_a_prepared_or_expired_destination_and_the_source_hears_of_it() {
    for (window, state) in [(LONG, "prepared"), (SHORT, "expired")] {
        let (hosts, outgoing) = in_doubt(window);
        until(state, || hosts.incoming.status().state == state);
        hosts.incoming.resolve(RUN_HERE).unwrap();
        hosts.assert_runs_there(state);
        assert!(hosts.incoming.resolve(Resolve::Discard).is_err(), "a guest that runs");
        hosts.proxy.refuse(false);
        assert_eq!(report(&outgoing).status, "completed", "{state}");
        assert_eq!(source_record(&hosts).decision, Decision::Gone);
    }
}

#[test]
fn discarded_at_the_destination_the_source_is_told_and_goes_on() {
    let (hosts, outgoing) = in_doubt(LONG);
    hosts.incoming.resolve(Resolve::Discard).unwrap();
    assert!(hosts.incoming.resolve(RUN_HERE).is_err(), "never is never");
    hosts.proxy.refuse(false);
    assert_eq!(report(&outgoing).status, "failed");
    hosts.assert_stayed("discarded");
    hosts.assert_moved(&hosts.migrate(), "discarded, later");
}

#[test]
fn an_expired_destination_says_never_to_a_source_that_comes_back() {
    let (hosts, outgoing) = in_doubt(SHORT);
    until("expired", || hosts.incoming.status().state == "expired");
    hosts.proxy.refuse(false);
    let report = report(&outgoing);
    assert_eq!(report.status, "failed");
    hosts.assert_stayed("expired");
    assert_eq!(destination_record(&hosts).decision, Decision::Never);
}

// --- records of a process that died ---------------------------------------------------------------

fn store(hosts: &Hosts, name: &str) -> RecordStore {
    RecordStore::new(hosts.dir.path().join(name), false).unwrap()
}

fn newest(hosts: &Hosts, name: &str, role: Side) -> Record {
    let found = store(hosts, name).read_all().unwrap();
    found.records.into_iter().rfind(|record| record.role == role).unwrap()
}

fn source_record(hosts: &Hosts) -> Record {
    newest(hosts, "records-here", Side::Source)
}

fn destination_record(hosts: &Hosts) -> Record {
    newest(hosts, "records-there", Side::Destination)
}

/// Another process takes the destination's place, with its records, and none of its memory.
fn destination_begins_anew(hosts: &mut Hosts) {
    let address = hosts.incoming.local_address();
    hosts.incoming.stop();
    until("the old one has ended", || hosts.incoming.status().state == "stopped");
    std::thread::sleep(Duration::from_millis(300));
    if let migration::channel::Address::Unix(path) = &address {
        let _ = std::fs::remove_file(path);
    }
    hosts.destination = ToyVm::new(false, PAGES, 2);
    let mut config = IncomingConfig::new(address);
    config.state_dir = Some(hosts.dir.path().join("records-there"));
    let vmm = Arc::clone(&hosts.destination) as Arc<dyn Vmm>;
    hosts.incoming = Incoming::start(vmm, config).unwrap();
}

#[test]
fn a_destination_that_died_prepared_says_never_and_the_guest_stays_and_moves_later() {
    let (mut hosts, outgoing) = in_doubt(LONG);
    assert_eq!(destination_record(&hosts).decision, Decision::Prepared);
    destination_begins_anew(&mut hosts);
    hosts.proxy.refuse(false);
    let report = report(&outgoing);
    assert_eq!(report.status, "failed", "{:?}", report.failure);
    hosts.assert_stayed("the destination died prepared");
    assert_eq!(destination_record(&hosts).decision, Decision::Never);
    hosts.assert_moved(&hosts.migrate(), "the destination died prepared, later");
}

#[test]
fn a_destination_that_died_with_the_guest_leaves_the_source_in_doubt_and_to_its_operator() {
    let (mut hosts, outgoing) = in_doubt(LONG);
    // It had recorded `running`, and died before anything was started or heard of.
    let record = Record { decision: Decision::Running, ..destination_record(&hosts) };
    store(&hosts, "records-there").write(&record).unwrap();
    destination_begins_anew(&mut hosts);
    hosts.proxy.refuse(false);
    until("it says what it knows, and the source shows it", || {
        outgoing.progress().failure.is_some_and(|failure| failure.what.contains("lost"))
    });
    assert_eq!(outgoing.progress().state, "in-doubt");
    assert!(!hosts.source.runs());
    outgoing.resolve(FORCE).unwrap();
    let report = report(&outgoing);
    assert!(has(&report, "no-answer"), "{:?}", report.timeline);
    goes_on(&hosts.source, "the destination died with the guest");
}

#[test]
fn a_destination_that_knows_another_secret_says_nothing() {
    let (mut hosts, outgoing) = in_doubt(LONG);
    let mut record = destination_record(&hosts);
    record.binding.as_mut().unwrap().secret.0 ^= 1;
    record.decision = Decision::Never;
    store(&hosts, "records-there").write(&record).unwrap();
    destination_begins_anew(&mut hosts);
    hosts.proxy.refuse(false);
    until("refused", || hosts.proxy.seen(Channel::Control, FROM, kind::REFUSE) > 1);
    assert_eq!(outgoing.progress().state, "in-doubt");
    outgoing.resolve(FORCE).unwrap();
    assert_eq!(report(&outgoing).status, "failed");
}

/// The source's process died in doubt: its record, and a place to go on from.
fn recover(hosts: &Hosts) -> (Outgoing, PathBuf) {
    // The one under test still lives; what a dead one left is its record.
    let state_dir = hosts.dir.path().join("records-of-the-dead");
    let left = RecordStore::new(state_dir.clone(), false).unwrap();
    left.write(&Record { decision: Decision::Committing, ..source_record(hosts) }).unwrap();
    let record = left.in_doubt().unwrap().pop().unwrap();
    let connect_limit = Duration::from_secs(1);
    let config = RecoverConfig { state_dir: state_dir.clone(), durable: true, connect_limit };
    (Outgoing::recover(record, config), state_dir)
}

fn recorded(state_dir: PathBuf) -> Decision {
    let store = RecordStore::new(state_dir, false).unwrap();
    store.read_all().unwrap().records.pop().unwrap().decision
}

#[test]
fn a_source_that_died_hears_that_the_guest_runs_there() {
    let hosts = Hosts::small();
    hosts.assert_moved(&hosts.migrate(), "moved");
    let (recovered, state_dir) = recover(&hosts);
    assert_eq!(report(&recovered).status, "completed");
    assert_eq!(recorded(state_dir), Decision::Gone);
}

#[test]
fn a_source_that_died_in_doubt_does_not_spoil_the_only_copy_and_its_operator_may_give_up() {
    let (hosts, _outgoing) = in_doubt(LONG);
    hosts.proxy.refuse(false);
    let (recovered, state_dir) = recover(&hosts);
    until("connected", || hosts.proxy.seen(Channel::Control, FROM, kind::ACCEPT) > 1);
    let resumed = recovered.resolve(FORCE).unwrap_err();
    assert!(resumed.contains("lost"), "{resumed}");
    recovered.resolve(Resolve::Discard).unwrap();
    assert_eq!(report(&recovered).status, "abandoned");
    assert_eq!(recorded(state_dir), Decision::Gone);
}
