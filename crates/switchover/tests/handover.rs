//! The handover by the letter: each rule of who runs the guest, one by one.

mod common;

use common::ways::*;
use common::{World, failure};
use switchover::handover::destination::{self as dst, State as There};
use switchover::handover::source::{self as src, Notice, State as Here, TimeLimit, Verdict};
use switchover::handover::{Decision, DeviceState, Outcome};
use switchover::message::{Attempt, Connection, Message, Session};

fn reinit(world: &mut World) {
    let device = &mut world.source_devices[0];
    (device.unread, device.reinit) = (2, true);
}

#[test]
fn a_reinit_in_precopy_voids_the_acknowledgement_until_the_new_session_is_loaded() {
    let mut world = precopy(&[ALL]);
    reinit(&mut world);
    world.poll();
    assert!(world.run_until(|w| !w.source.all_ready()));
    world.tell_source(src::Event::Switchover);
    assert_eq!(world.source.state(), Here::Precopy, "no switchover without acknowledgement");
    world.settle();
    assert_eq!(world.source.session(NIC), Session(2));
    assert!(world.notices.contains(&Notice::Acked { device: NIC, session: Session(2) }));
    let late = |n: &Notice| matches!(n, Notice::Reinit { late: true, .. });
    assert!(!world.notices.iter().any(late));
}

#[test]
fn a_stale_acknowledgement_does_not_count() {
    let mut world = precopy(&[ALL]);
    reinit(&mut world);
    world.poll();
    // The new session is sent, only its own acknowledgement is missing.
    let sent =
        |message: &Message| matches!(message, Message::InitialDataSent { session: Session(2), .. });
    assert!(world.run_until(|w| w.links[&1].to_destination.iter().any(sent)));
    let ack = Message::SwitchoverAck { device: NIC, session: Session(1) };
    world.tell_source(src::Event::Message(Connection(1), ack));
    assert!(world.notices.contains(&Notice::StaleAck { device: NIC, session: Session(1) }));
    assert!(!world.source.all_ready());
}

#[test]
fn a_late_reinit_is_absorbed_with_the_vcpus_stopped_and_looked_at_again() {
    let mut world = precopy(&[ALL]);
    reinit(&mut world);
    world.verdicts = [Verdict::Absorb, Verdict::Go, Verdict::Go, Verdict::Go].into();
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(&world);
    assert!(world.notices.contains(&Notice::Absorbing(Attempt(1))));
    let late = Notice::Reinit { device: NIC, session: Session(2), late: true };
    assert!(world.notices.contains(&late));
    assert!(world.verdicts.is_empty(), "every step was judged");
}

#[test]
fn a_late_reinit_is_revoked_without_throwing_data_away() {
    let mut world = precopy(&[ALL]);
    let stream = world.source_devices[0].stream;
    reinit(&mut world);
    world.verdicts = [Verdict::Revoke].into();
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_stays(&world);
    assert_eq!(world.source.state(), Here::Precopy);
    assert_eq!(world.source_devices[0].stream, stream, "the data session goes on");
    assert_eq!(world.source_devices[0].state, DeviceState::PreCopy);
    assert!(world.notices.contains(&Notice::Revoked(Attempt(1))));
    // And the next attempt has a number of its own.
    world.poll();
    world.settle();
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(&world);
    assert_eq!(world.source.attempt(), Attempt(2));
}

#[test]
fn quiesce_is_revocable_too() {
    let mut world = precopy(&[ALL, ALL]);
    world.verdicts = [Verdict::Go, Verdict::Revoke].into();
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_stays(&world);
    assert!(world.states.contains(&Here::Quiesce));
    assert!(world.source_devices.iter().all(|d| d.state == DeviceState::PreCopy));
    assert_eq!(world.source_devices[0].stream, Session(1));
}

#[test]
fn a_verdict_to_go_does_not_take_known_unread_initial_data_along() {
    let mut world = precopy(&[ALL]);
    reinit(&mut world);
    world.verdicts = [Verdict::Go].into();
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_stays(&world);
    assert!(world.states.contains(&Here::Revoking));
}

#[test]
fn a_question_asked_before_the_pause_does_not_settle_the_look() {
    let mut world = precopy(&[ALL]);
    // The poll was answered by the device before the guest reconfigured it, and is still on its way.
    world.poll();
    world.tell_source(src::Event::Switchover);
    reinit(&mut world);
    world.verdicts = [Verdict::Revoke].into();
    world.settle();
    let late = Notice::Reinit { device: NIC, session: Session(2), late: true };
    assert!(world.notices.contains(&late), "{}", world.tail());
}

#[test]
fn a_device_that_does_not_answer_in_the_look_revokes() {
    let mut world = on_the_way(&[ALL], Here::Look);
    assert!(world.run_until(|w| !w.source_runs));
    let info = |event: &src::Event| matches!(event, src::Event::Info { .. });
    let (late, now): (Vec<_>, Vec<_>) = world.source_answers.drain(..).partition(info);
    world.source_answers = now;
    world.settle();
    world.tell_source(src::Event::Timeout(TimeLimit::Look));
    world.settle();
    assert_stays(&world);
    // Its answer comes after all.
    late.into_iter().for_each(|event| world.tell_source(event));
    world.settle();
    assert_eq!(world.source.state(), Here::Precopy);
}

#[test]
fn cancel_is_heard_in_every_state_before_commit() {
    for traits in [&[ALL][..], &[PRE_COPY], &[ALL, PRE_COPY]] {
        for state in REVOCABLE {
            if state == Here::Quiesce && !traits.contains(&ALL) {
                continue;
            }
            let mut world = match state {
                Here::Precopy => precopy(traits),
                state => on_the_way(traits, state),
            };
            world.tell_source(src::Event::Cancel);
            world.settle();
            assert_stays(&world);
            assert_eq!(world.source_outcome, Some(Outcome::Cancelled), "{state:?}");
            assert!(world.source_devices.iter().all(|d| d.state == DeviceState::Running));
            assert!(world.destination_outcome.is_some(), "{state:?}: the destination knows");
        }
    }
}

#[test]
fn after_commit_cancel_is_too_late() {
    let mut world = on_the_way(&[ALL], Here::Committed);
    world.tell_source(src::Event::Cancel);
    assert_eq!(world.notices.last(), Some(&Notice::CancelTooLate));
    world.settle();
    assert_moved(&world);
}

#[test]
fn cancel_between_the_record_and_commit_is_too_late() {
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    let recording = (Decision::Committing, Attempt(1));
    assert!(world.run_until(|w| w.source_writes.contains(&recording)));
    world.tell_source(src::Event::Cancel);
    world.settle();
    assert_moved(&world);
}

#[test]
fn a_link_lost_before_commit_lets_the_guest_go_on_at_once() {
    for state in REVOCABLE {
        let mut world = match state {
            Here::Precopy => precopy(&[ALL]),
            state => on_the_way(&[ALL], state),
        };
        world.cut(1);
        world.settle();
        assert_stays(&world);
        assert!(matches!(world.source_outcome, Some(Outcome::Failed(_))), "{state:?}");
    }
}

#[test]
fn a_link_lost_between_the_record_and_commit_leaves_no_doubt() {
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    let recording = (Decision::Committing, Attempt(1));
    assert!(world.run_until(|w| w.source_writes.contains(&recording)));
    world.tell_source(src::Event::LinkDown(Connection(1), failure("cut")));
    world.settle();
    assert_stays(&world);
    assert!(world.source_records.contains(&(Decision::Never, Attempt(1))));
}

#[test]
fn doubt_ends_by_a_recorded_answer_only() {
    let mut world = on_the_way(&[ALL], Here::Committed);
    world.tell_source(src::Event::LinkDown(Connection(1), failure("cut")));
    assert_eq!(world.source.state(), Here::InDoubt);
    // A connection that works, so that every word over it is heard.
    world.tell_source(src::Event::LinkUp(Connection(2)));
    let silence = [
        src::Event::Message(Connection(2), Message::Unknown { attempt: Attempt(1), reason: None }),
        src::Event::Message(Connection(2), Message::Refuse { reason: failure("no") }),
        src::Event::Message(Connection(2), Message::Failed { reason: failure("no") }),
        src::Event::Message(
            Connection(2),
            Message::Never { attempt: Attempt(9), reason: failure("") },
        ),
        src::Event::Message(Connection(2), Message::Running { attempt: Attempt(9) }),
        src::Event::Cancel,
        src::Event::Fail(failure("anything")),
        src::Event::Timeout(TimeLimit::Answer),
    ];
    for event in silence {
        world.tell_source(event);
        assert_eq!(world.source.state(), Here::InDoubt);
        assert!(!world.source_runs);
    }
    let never = Message::Never { attempt: Attempt(1), reason: failure("late") };
    world.tell_source(src::Event::Message(Connection(1), never));
    // Nothing else is told of the old connection: what is under way at the source finishes.
    world.cut(1);
    world.reconnect = false;
    world.links.clear();
    while !world.source_answers.is_empty() && world.step() {}
    assert!(world.source_runs);
}

#[test]
fn a_commit_after_the_window_is_answered_by_never_and_the_guest_stays() {
    let mut world = until_there(There::Prepared);
    world.tell_destination(dst::Event::WindowEnded);
    assert_eq!(world.destination.state(), There::Expired);
    world.settle();
    assert_stays(&world);
    assert_eq!(world.destination.decision(), Some(Decision::Never));
}

#[test]
fn a_commit_over_an_old_connection_or_of_another_attempt_is_not_obeyed() {
    for (connection, attempt, obeyed) in [(1, 1, false), (2, 9, false), (3, 1, false), (2, 1, true)]
    {
        let mut world = until_there(There::Prepared);
        let features = world.destination.features();
        world.tell_destination(dst::Event::LinkUp(Connection(2), features));
        let commit = Message::Commit { attempt: Attempt(attempt) };
        // The source stands still at its Commit, as it must.
        world.tell_destination(dst::Event::Message(Connection(connection), commit));
        while !world.destination_answers.is_empty() {
            let answer = world.destination_answers.remove(0);
            world.tell_destination(answer);
        }
        assert_eq!(world.destination_runs, obeyed, "{connection} {attempt}");
        let running = (Decision::Running, Attempt(1));
        assert_eq!(world.destination_records.contains(&running), obeyed);
        assert_eq!(world.destination.state() == There::Prepared, !obeyed);
    }
}

#[test]
fn a_commit_that_comes_twice_starts_the_guest_once() {
    let mut world = until_there(There::Starting);
    let commit = || dst::Event::Message(Connection(1), Message::Commit { attempt: Attempt(1) });
    world.tell_destination(commit());
    world.settle();
    assert_moved(&world);
    world.tell_destination(commit());
    world.settle();
    let starts = world.log.iter().filter(|line| *line == "D > Start").count();
    assert_eq!(starts, 1);
}

#[test]
fn a_query_is_answered_by_the_record_and_where_there_is_none_by_never() {
    // Nothing was decided: only `never` is safe.
    let mut world = until_there(There::Prepared);
    world.links.get_mut(&1).unwrap().to_source.clear();
    let query = || dst::Event::Message(Connection(1), Message::Query { attempt: Attempt(1) });
    world.tell_destination(query());
    assert!(world.run_until(|w| w.destination.decision() == Some(Decision::Never)));
    let commit = Message::Commit { attempt: Attempt(1) };
    world.tell_destination(dst::Event::Message(Connection(1), commit));
    world.settle();
    assert_stays(&world);
    // It runs: both answers are repeated to whoever asks.
    let mut world = on_the_way(&[ALL], Here::Done);
    assert!(world.run_until(|w| w.destination.state() == There::Running));
    world.tell_destination(query());
    let answer = world.links[&1].to_source.back().cloned();
    assert_eq!(answer, Some(Message::Running { attempt: Attempt(1) }));
    // Another attempt: unknown, which ends no doubt.
    let other = Message::Query { attempt: Attempt(7) };
    world.tell_destination(dst::Event::Message(Connection(1), other));
    let answer = world.links[&1].to_source.back().cloned();
    assert_eq!(answer, Some(Message::Unknown { attempt: Attempt(7), reason: None }));
}

#[test]
fn a_guest_reset_of_a_device_begins_a_stream_of_its_own() {
    let mut world = precopy(&[ALL]);
    world.source_devices[0].state = DeviceState::Running;
    world.tell_source(src::Event::DeviceReset(NIC));
    world.settle();
    assert_eq!(world.source_devices[0].stream, Session(2));
    assert_eq!(world.destination_devices[0].stream, Session(2), "the destination loads anew");
    assert!(world.source.all_ready());
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(&world);
}

#[test]
fn a_guest_that_ends_ends_the_migration_in_every_state_before_commit() {
    for state in REVOCABLE {
        let mut world = match state {
            Here::Precopy => precopy(&[ALL]),
            state => on_the_way(&[ALL], state),
        };
        world.tell_source(src::Event::GuestEnded(failure("powered off")));
        world.settle();
        assert!(
            matches!(&world.source_outcome, Some(Outcome::Failed(why)) if why.what == "powered off")
        );
        assert!(!world.destination_runs);
        assert!(matches!(world.destination_outcome, Some(Outcome::Failed(_))), "{state:?}");
    }
}

#[test]
fn a_dry_run_moves_nothing() {
    let mut world = World::new(1, &[ALL], false);
    let setup = src::Setup {
        migration: switchover::message::Id(1),
        instance: switchover::message::Id(2),
        features: Default::default(),
        description: String::new(),
        devices: vec![ALL],
        dry_run: true,
    };
    world.source = src::Source::new(setup);
    world.connect();
    world.settle();
    assert_eq!(world.source_outcome, Some(Outcome::DryRun));
    assert_stays(&world);
    assert_eq!(world.source_devices[0].calls, 0);
}

#[test]
fn a_mismatch_is_told_on_both_sides() {
    let mut world = World::new(1, &[ALL], false);
    world.connect();
    assert!(world.run_until(|w| !w.destination_answers.is_empty()));
    world.destination_answers.clear();
    let list = vec!["vCPUs: source 1, destination 2".to_owned()];
    world.tell_destination(dst::Event::Compared(Err(list)));
    world.settle();
    let told = |outcome: &Option<Outcome>| matches!(outcome, Some(Outcome::Failed(why)) if why.what.contains("destination 2"));
    assert!(told(&world.source_outcome) && told(&world.destination_outcome));
    assert_stays(&world);
}

#[test]
fn another_migration_of_the_same_source_turns_a_prepared_guest_into_never() {
    let mut world = until_there(There::Prepared);
    world.links.get_mut(&1).unwrap().to_source.clear();
    world.tell_destination(dst::Event::Superseded);
    assert!(world.run_until(|w| w.destination.state() == There::Aborted));
    assert_eq!(world.destination.decision(), Some(Decision::Never));
}
