//! Records outlive the process, and a decision never changes.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;

use migration::record::{Binding, Record, RecordStore};
use switchover::handover::Decision;
use switchover::message::{Attempt, Connection, Failure, Id, Side};

fn record(role: Side, migration: u128, attempt: u64, decision: Decision) -> Record {
    let (migration, attempt) = (Id(migration), Attempt(attempt));
    Record { role, migration, attempt, decision, reason: None, binding: None }
}

#[test]
fn what_was_written_is_read_by_the_next_process() {
    for durable in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("state/of/vmferry");
        let store = RecordStore::new(place.clone(), durable).unwrap();
        assert!(store.outlives_process());
        let never = Record {
            reason: Some(Failure::new(Side::Destination, "no \"Commit\" in time\n").device("nic0")),
            ..record(Side::Destination, 7, 1, Decision::Never)
        };
        let all = [
            record(Side::Source, 7, 2, Decision::Committing),
            never,
            record(Side::Destination, 7, 2, Decision::Running),
            record(Side::Destination, u128::MAX, u64::MAX, Decision::Prepared),
        ];
        store.write(&record(Side::Destination, 7, 2, Decision::Prepared)).unwrap();
        all.iter().for_each(|record| store.write(record).unwrap());
        let next = RecordStore::new(place.clone(), durable).unwrap();
        let found = next.read_all().unwrap();
        assert_eq!(found.records, all);
        assert!(found.corrupt.is_empty());
        assert_eq!(next.find(Side::Destination, Id(7), Attempt(1)).as_ref(), Some(&all[1]));
        assert_eq!(next.find(Side::Source, Id(7), Attempt(1)), None);
        let names = fs::read_dir(&place).unwrap().map(|entry| entry.unwrap());
        for entry in names {
            let mode = entry.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{entry:?} is for its owner");
            assert!(entry.file_name().to_str().unwrap().ends_with(".record"), "{entry:?}");
        }
    }
}

/// handover.md: a recorded decision never changes; in every kind of store, and after a restart.
#[test]
fn a_decision_never_changes() {
    use Decision::{Committing, Never, Prepared, Running};
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (Prepared, Running, true),
        (Prepared, Never, true),
        (Prepared, Prepared, true),
        (Running, Never, false),
        (Never, Running, false),
        (Never, Prepared, false),
        (Running, Prepared, false),
        (Running, Running, true),
        (Never, Never, true),
        (Committing, Committing, true),
    ];
    for (attempt, (first, second, allowed)) in cases.into_iter().enumerate() {
        let [first, second] =
            [first, second].map(|d| record(Side::Destination, 1, attempt as u64, d));
        let stored = RecordStore::new(dir.path().into(), false).unwrap();
        stored.write(&first).unwrap();
        let again = RecordStore::new(dir.path().into(), false).unwrap();
        let kept = RecordStore::in_memory();
        kept.write(&first).unwrap();
        for store in [&stored, &again, &kept] {
            let result = store.write(&second);
            assert_eq!(result.is_ok(), allowed, "{:?} → {:?}", first.decision, second.decision);
            if let Err(error) = result {
                assert_eq!(error.kind(), ErrorKind::AlreadyExists);
                let found = store.find(Side::Destination, Id(1), first.attempt);
                assert_eq!(found.as_ref(), Some(&first));
            }
        }
    }
}

#[test]
fn the_first_reason_stays() {
    let store = RecordStore::in_memory();
    let because = |what: &str| Record {
        reason: Some(Failure::new(Side::Destination, what)),
        ..record(Side::Destination, 1, 1, Decision::Never)
    };
    store.write(&because("first")).unwrap();
    store.write(&because("second")).unwrap();
    assert_eq!(store.read_all().unwrap().records, [because("first")]);
    assert!(!store.outlives_process());
}

/// The longest reason that a peer can send is no way to keep a decision from being recorded.
#[test]
fn a_long_reason_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let store = RecordStore::new(dir.path().into(), false).unwrap();
    let long = Record {
        reason: Some(Failure::new(Side::Source, "\"\\\n".repeat(migration::wire::CONTROL_MAX / 3))),
        ..record(Side::Destination, 1, 1, Decision::Never)
    };
    store.write(&long).unwrap();
    assert_eq!(store.read_all().unwrap().records, [long]);
}

#[test]
fn corrupt_files_are_named_and_do_not_hide_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = RecordStore::new(dir.path().into(), false).unwrap();
    let good = record(Side::Destination, 1, 1, Decision::Running);
    store.write(&good).unwrap();
    let path = |name: &str| dir.path().join(name);
    let name = |attempt| format!("destination-{:032x}-{attempt}.record", 1);
    let text = fs::read_to_string(path(&name(1))).unwrap();
    fs::write(path(&name(2)), &text).unwrap(); // another's name
    fs::write(path(&name(3)), &text[..text.len() / 2]).unwrap(); // cut short
    fs::write(path(&name(4)), text.replace("running", "never")).unwrap(); // changed by hand
    fs::write(path(&name(5)), b"").unwrap();
    fs::write(path(&name(6)), vec![b'{'; (1 << 20) + 1]).unwrap();
    fs::create_dir(path(&name(7))).unwrap();
    fs::write(path("notes.txt"), "not ours").unwrap();
    fs::write(path(&format!("{}.unfinished", name(8))), "killed while writing").unwrap();
    let next = RecordStore::new(dir.path().into(), false).unwrap();
    let found = next.read_all().unwrap();
    assert_eq!(found.records, [good]);
    let named: Vec<_> = found.corrupt.iter().map(|(path, _)| path.file_name().unwrap()).collect();
    let expected: Vec<_> = (2..8).map(name).collect();
    assert_eq!(named, expected.iter().map(AsRef::as_ref).collect::<Vec<&std::ffi::OsStr>>());
    assert!(found.corrupt[2].1.contains("damaged"), "{:?}", found.corrupt[2]);
}

#[test]
fn a_store_that_cannot_write_says_so_and_remembers_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = RecordStore::new(dir.path().join("state"), false).unwrap();
    fs::remove_dir(dir.path().join("state")).unwrap();
    let running = record(Side::Destination, 1, 1, Decision::Running);
    assert_eq!(store.write(&running).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.find(Side::Destination, Id(1), Attempt(1)), None);
    assert!(RecordStore::new("/proc/no-such-place".into(), false).is_err());
}

#[test]
fn two_processes_with_one_folder_cannot_decide_differently() {
    use Decision::{Never, Prepared, Running};
    let dir = tempfile::tempdir().unwrap();
    let here = RecordStore::new(dir.path().to_owned(), false).unwrap();
    here.write(&record(Side::Destination, 7, 1, Prepared)).unwrap();
    // Each has read that it is prepared, and knows nothing of the other.
    let there = RecordStore::new(dir.path().to_owned(), false).unwrap();
    there.write(&record(Side::Destination, 7, 1, Never)).unwrap();
    let late = here.write(&record(Side::Destination, 7, 1, Running)).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::AlreadyExists);
    let newest = here.newest(Side::Destination, Id(7)).unwrap().unwrap();
    assert_eq!(newest.decision, Never);
}

#[test]
fn a_source_in_doubt_is_found_by_the_next_process_until_the_doubt_is_over() {
    use Decision::{Committing, Gone, Never};
    for ends in [Gone, Never] {
        let dir = tempfile::tempdir().unwrap();
        let store = RecordStore::new(dir.path().to_owned(), false).unwrap();
        let binding = Binding {
            secret: Id(9),
            connection: Connection(3),
            destination: Some("unix:/run/there".into()),
        };
        let committing = record(Side::Source, 7, 2, Committing);
        let committing = Record { binding: Some(binding), ..committing };
        store.write(&committing).unwrap();
        store.write(&record(Side::Destination, 8, 1, Decision::Prepared)).unwrap();
        let next = RecordStore::new(dir.path().to_owned(), false).unwrap();
        assert_eq!(next.in_doubt().unwrap(), [committing]);
        next.write(&record(Side::Source, 7, 2, ends)).unwrap();
        assert!(next.in_doubt().unwrap().is_empty());
        // And nothing changes that again.
        for other in [Committing, Gone, Never].into_iter().filter(|d| *d != ends) {
            assert!(next.write(&record(Side::Source, 7, 2, other)).is_err(), "{ends:?} {other:?}");
        }
    }
}
