//! The handover when something fails: every call, record, message and connection, in every state. What
//! must hold is that exactly one side runs the guest and that people are told why.

mod common;

use common::ways::*;
use common::{World, failure};
use switchover::handover::destination::{self as dst, State as There};
use switchover::handover::source::{self as src, Notice, State as Here, TimeLimit, Verdict};
use switchover::handover::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome};
use switchover::message::{Attempt, Connection, DeviceEnd, DeviceIndex, Message, Session};

const ONE: Attempt = Attempt(1);

fn set(state: DeviceState) -> DeviceCall {
    DeviceCall::SetState(state)
}

/// A world that has not begun.
fn fresh(traits: &[DeviceTraits], verify: bool) -> World {
    World::new(7, traits, verify)
}

/// From the first connection through a switchover to rest.
fn whole(world: &mut World) {
    world.connect();
    world.settle();
    world.tell_source(src::Event::Switchover);
    world.settle();
}

fn assert_failed(world: &World) {
    assert_stays(world);
    assert!(matches!(world.source_outcome, Some(Outcome::Failed(_))), "{}", world.tail());
    assert!(matches!(world.destination_outcome, Some(Outcome::Failed(_))), "{}", world.tail());
}

/// Exactly one side runs, and both say the same of it.
fn assert_one_runs(world: &World) {
    assert!(world.source_runs != world.destination_runs, "{}", world.tail());
    let completed = matches!(world.source_outcome, Some(Outcome::Completed));
    assert_eq!(completed, world.destination_runs, "{}", world.tail());
}

fn state_lost(notice: &Notice) -> bool {
    matches!(notice, Notice::DeviceStateLost { device: NIC, .. })
}

// --- device calls ---------------------------------------------------------------------------------

#[test]
fn a_device_call_that_fails_at_the_source_is_mended_by_a_reset_and_the_guest_goes_on() {
    let table = [
        (ALL, DeviceState::PreCopy),
        (ALL, DeviceState::PreCopyP2p),
        (ALL, DeviceState::StopCopy),
        (PRE_COPY, DeviceState::StopCopy),
        (P2P, DeviceState::RunningP2p),
        (STOP_COPY, DeviceState::StopCopy),
    ];
    for (traits, state) in table {
        let mut world = fresh(&[traits, ALL], false);
        world.fail_calls.0 = vec![(NIC, set(state))];
        whole(&mut world);
        assert_failed(&world);
        assert!(world.fail_calls.0.is_empty(), "{state:?} was asked for");
        assert!(world.notices.iter().any(state_lost), "{state:?}: people know\n{}", world.tail());
        assert!(world.source_devices.iter().all(|d| d.state == DeviceState::Running), "{state:?}");
    }
}

#[test]
fn a_device_that_cannot_even_be_reset_is_lost_and_the_guest_goes_on() {
    let mut world = fresh(&[ALL, ALL], false);
    world.fail_calls.0 = vec![(NIC, set(DeviceState::StopCopy)), (NIC, DeviceCall::Reset)];
    whole(&mut world);
    assert_failed(&world);
    let lost = |notice: &Notice| matches!(notice, Notice::DeviceLost { device: NIC, .. });
    assert!(world.notices.iter().any(lost));
    assert_eq!(world.source_devices[1].state, DeviceState::Running);
}

#[test]
fn a_device_call_that_fails_on_the_way_back_is_mended_by_a_reset() {
    for (state, target) in [
        (Here::StopCopy, DeviceState::RunningP2p),
        (Here::StopCopy, DeviceState::Running),
        (Here::AwaitReady, DeviceState::RunningP2p),
        (Here::AwaitReady, DeviceState::Running),
    ] {
        let mut world = on_the_way(&[ALL, ALL], state);
        world.fail_calls.0 = vec![(NIC, set(target))];
        world.tell_source(src::Event::Cancel);
        world.settle();
        assert_stays(&world);
        assert_eq!(world.source_outcome, Some(Outcome::Cancelled));
        assert!(world.notices.iter().any(state_lost), "{state:?} {target:?}\n{}", world.tail());
        assert!(world.source_devices.iter().all(|d| d.state == DeviceState::Running));
    }
}

#[test]
fn a_device_that_fails_while_revoking_begins_a_stream_of_its_own_and_can_still_move() {
    let mut world = precopy(&[ALL]);
    world.fail_calls.0 = vec![(NIC, set(DeviceState::PreCopy))];
    world.verdicts = [Verdict::Go, Verdict::Revoke].into();
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_stays(&world);
    assert_eq!(world.source.state(), Here::Precopy);
    assert!(world.notices.iter().any(state_lost));
    assert_eq!(world.source_devices[0].stream, Session(2));
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(&world);
}

#[test]
fn a_device_call_that_fails_at_the_destination_before_ready_ends_it() {
    for (traits, state) in [
        (ALL, DeviceState::Resuming),
        // Leaving RESUMING validates what was loaded.
        (ALL, DeviceState::Stop),
        (STOP_COPY, DeviceState::Stop),
    ] {
        let mut world = fresh(&[traits], false);
        world.fail_calls.1 = vec![(NIC, set(state))];
        whole(&mut world);
        assert_failed(&world);
        assert!(world.fail_calls.1.is_empty());
        let prepared = (Decision::Prepared, ONE);
        assert!(!world.destination_records.contains(&prepared), "{state:?}");
    }
}

#[test]
fn a_device_that_cannot_be_started_does_not_stop_the_guest_once_running_is_recorded() {
    for state in [DeviceState::RunningP2p, DeviceState::Running] {
        let mut world = fresh(&[ALL, ALL], false);
        world.fail_calls.1 = vec![(NIC, set(state))];
        // The way to RESUMING does not ask for it.
        whole(&mut world);
        assert_moved(&world);
        assert_eq!(world.lost_there, [NIC], "{state:?}: told once");
    }
}

// --- records --------------------------------------------------------------------------------------

#[test]
fn without_the_record_committing_no_commit_leaves() {
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    world.fail_records.0 = true;
    world.settle();
    assert_failed(&world);
    assert!(!world.states.contains(&Here::Committed));
}

#[test]
fn without_the_record_prepared_there_is_no_ready() {
    // Whether `never` can be written or not: the source hears why, and at once.
    for never_too in [true, false] {
        let mut world = on_the_way(&[ALL], Here::AwaitReady);
        world.fail_records.1 = true;
        assert!(world.run_until(|w| !w.destination_writes.is_empty()));
        if !never_too {
            world.fail_records.1 = false;
        }
        world.settle();
        assert_failed(&world);
        assert_eq!(world.destination_records.is_empty(), never_too);
    }
}

#[test]
fn without_the_record_running_nothing_starts_and_doubt_ends_once_never_is_written() {
    let mut world = until_there(There::Starting);
    world.fail_records.1 = true;
    world.settle();
    assert!(!world.source_runs && !world.destination_runs, "nobody may guess");
    assert_eq!(world.destination.state(), There::Aborted);
    // The disk is back, the source asks again.
    world.fail_records.1 = false;
    world.tell_source(src::Event::Timeout(TimeLimit::Query));
    world.settle();
    assert_stays(&world);
    assert_eq!(world.destination_records.last(), Some(&(Decision::Never, ONE)));
}

#[test]
fn never_is_said_after_it_was_written_though_it_overtook_prepared() {
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    assert!(world.run_until(|w| !w.destination_writes.is_empty()));
    world.tell_destination(dst::Event::Cancel);
    let prepared = world.destination_answers.remove(0);
    world.tell_destination(prepared);
    assert_eq!(world.destination.decision(), None, "only `prepared` was written so far");
    assert_eq!(world.destination.state(), There::Loading);
    world.settle();
    assert_stays(&world);
    assert_eq!(world.destination.decision(), Some(Decision::Never));
}

// --- connections ----------------------------------------------------------------------------------

#[test]
fn a_commit_that_is_lost_with_its_connection_ends_in_never() {
    let mut world = on_the_way(&[ALL], Here::Committed);
    world.links.get_mut(&1).unwrap().to_destination.clear();
    world.cut(1);
    world.settle();
    assert_stays(&world);
    assert!(world.states.contains(&Here::InDoubt));
    assert_eq!(world.destination_records.last(), Some(&(Decision::Never, ONE)));
}

#[test]
fn a_running_that_is_lost_with_its_connection_is_said_again() {
    let mut world = on_the_way(&[ALL], Here::Committed);
    assert!(world.run_until(|w| w.destination.state() == There::Running));
    world.links.get_mut(&1).unwrap().to_source.clear();
    world.cut(1);
    world.settle();
    assert_moved(&world);
    assert!(world.states.contains(&Here::InDoubt));
}

#[test]
fn an_answer_that_does_not_come_leads_to_doubt_and_a_new_connection() {
    let mut world = on_the_way(&[ALL], Here::Committed);
    // Both directions are silent, and nobody is told.
    world.links.clear();
    world.tell_source(src::Event::Timeout(TimeLimit::Answer));
    assert_eq!(world.source.state(), Here::InDoubt);
    world.settle();
    assert_stays(&world);
}

#[test]
fn a_connection_cut_anywhere_leaves_one_guest() {
    use There::{Loading, Prepared, Running, Starting};
    for state in [Loading, Prepared, Starting, Running] {
        for seed in 0..200 {
            let mut world = until_there(state);
            world.random = common::Random::new(seed);
            world.cut(1);
            world.settle();
            // A doubt is ended by asking, however often the connection goes.
            for _ in 0..3 {
                world.cut(world.newest());
                world.settle();
            }
            assert_one_runs(&world);
            let moved = world.destination_runs;
            assert!(!moved || state != Loading, "{state:?}");
            assert!(moved || state < Starting, "{state:?} {}", world.tail());
        }
    }
}

#[test]
fn a_connection_that_is_cut_in_setup_ends_both() {
    let mut world = fresh(&[ALL], false);
    world.connect();
    assert!(world.run_until(|w| !w.destination_answers.is_empty()));
    world.cut(1);
    world.settle();
    assert_failed(&world);
}

// --- what the other side says ---------------------------------------------------------------------

#[test]
fn a_refusal_or_failure_of_the_destination_is_the_source_s_reason() {
    for message in
        [Message::Refuse { reason: failure("why") }, Message::Failed { reason: failure("why") }]
    {
        for state in [Here::Setup, Here::Precopy, Here::Look, Here::StopCopy, Here::AwaitReady] {
            let mut world = match state {
                Here::Setup => fresh(&[ALL], false),
                Here::Precopy => precopy(&[ALL]),
                state => on_the_way(&[ALL], state),
            };
            if state == Here::Setup {
                world.connect();
            }
            world.tell_source(src::Event::Message(Connection(1), message.clone()));
            world.settle();
            assert_stays(&world);
            let told = |outcome: &Option<Outcome>| matches!(outcome, Some(Outcome::Failed(why)) if why.what == "why" && why.phase == state.name());
            assert!(told(&world.source_outcome), "{state:?}: {:?}", world.source_outcome);
        }
    }
}

#[test]
fn a_cancel_at_the_destination_is_heard_until_a_commit_is_obeyed() {
    for state in [There::Loading, There::Prepared, There::Starting, There::Running] {
        let mut world = until_there(state);
        world.tell_destination(dst::Event::Cancel);
        world.settle();
        if state < There::Starting {
            assert_stays(&world);
            assert!(matches!(world.destination_outcome, Some(Outcome::Failed(_))));
            // From Prepared on, Ready came first and the source has committed: Never says why.
            let told = |why: &switchover::message::Failure| why.what.contains("cancelled");
            match &world.source_outcome {
                Some(Outcome::Cancelled) => {}
                Some(Outcome::Failed(why)) if state == There::Prepared && told(why) => {}
                other => panic!("{state:?}: {other:?}"),
            }
        } else {
            assert_moved(&world);
        }
    }
    let mut world = until_there(There::Prepared);
    world.links.get_mut(&1).unwrap().to_source.clear();
    world.tell_destination(dst::Event::WindowEnded);
    world.tell_destination(dst::Event::Cancel);
    world.settle();
    assert_stays(&world);
    assert_eq!(world.destination.decision(), Some(Decision::Never));
}

#[test]
fn the_end_of_another_attempt_s_state_does_not_count() {
    let mut world = on_the_way(&[ALL], Here::StopCopy);
    assert!(world.run_until(|w| w.destination.attempt() == ONE));
    let end = |attempt| {
        let devices = vec![DeviceEnd { device: NIC, bytes: 0, checksum: 0 }];
        Message::StateEnd { attempt, channels: vec![], devices, sections: 0 }
    };
    for attempt in [Attempt(0), Attempt(2)] {
        world.tell_destination(dst::Event::Message(Connection(1), end(attempt)));
        world.tell_destination(dst::Event::StateComplete(attempt));
        assert!(world.awaited.is_none());
    }
    // Nor does one that was never announced.
    world.tell_destination(dst::Event::StateComplete(ONE));
    assert_eq!(world.destination_devices[0].state, DeviceState::Resuming);
    world.settle();
    assert_moved(&world);
}

#[test]
fn ready_counts_once_for_its_own_attempt_and_after_everything_was_sent() {
    let ready = |attempt| Message::Ready { attempt, window_ms: 1 };
    for (state, attempt) in [(Here::StopCopy, ONE), (Here::AwaitReady, Attempt(2))] {
        let mut world = on_the_way(&[ALL], state);
        world.tell_source(src::Event::Message(Connection(1), ready(attempt)));
        assert_eq!(world.source.state(), state);
        assert!(world.source_writes.is_empty());
        assert!(!world.source_answers.iter().any(|e| matches!(e, src::Event::Verdict(_))));
    }
}

#[test]
fn what_does_not_verify_is_rolled_back() {
    let mut world = fresh(&[ALL], true);
    world.connect();
    world.settle();
    world.tell_source(src::Event::Switchover);
    let verified = src::Event::Verified(Ok(()));
    assert!(world.run_until(|w| w.source_answers.contains(&verified)));
    world.source_answers.retain(|event| *event != verified);
    world.tell_source(src::Event::Verified(Err(failure("not identical"))));
    world.settle();
    assert_failed(&world);
    assert_eq!(world.destination.decision(), Some(Decision::Never));
}

// --- the guest and time ---------------------------------------------------------------------------

#[test]
fn a_guest_that_resets_a_device_loses_its_stream_in_every_state() {
    for traits in [ALL, PRE_COPY, P2P, STOP_COPY] {
        for state in [Here::Precopy, Here::Look, Here::StopCopy, Here::AwaitReady] {
            let mut world = match state {
                Here::Precopy => precopy(&[traits]),
                state => on_the_way(&[traits], state),
            };
            if state <= Here::Look {
                world.source_devices[0].state = DeviceState::Running;
            }
            world.tell_source(src::Event::DeviceReset(NIC));
            world.settle();
            assert_stays(&world);
            // From StopCopy on its data is on its way already: that is rolled back, and tried again.
            let rolled_back = world.states.contains(&Here::RollingBack);
            assert_eq!(rolled_back, state > Here::Look, "{traits:?} {state:?}");
            assert_eq!(world.source.state(), Here::Precopy, "{traits:?} {state:?}");
            assert_eq!(world.source_devices[0].stream, Session(2), "{traits:?} {state:?}");
            world.tell_source(src::Event::Switchover);
            world.settle();
            assert_moved(&world);
        }
    }
}

#[test]
fn every_limit_strikes_in_its_state_alone() {
    let limits =
        [TimeLimit::Setup, TimeLimit::Look, TimeLimit::Absorb, TimeLimit::Ready, TimeLimit::Answer];
    for state in [Here::Precopy, Here::StopCopy, Here::AwaitReady, Here::Committed] {
        for limit in limits {
            let mut world = match state {
                Here::Precopy => precopy(&[ALL]),
                state => on_the_way(&[ALL], state),
            };
            world.tell_source(src::Event::Timeout(limit));
            let after = world.source.state();
            match (state, limit) {
                (Here::AwaitReady, TimeLimit::Ready) => assert_eq!(after, Here::RollingBack),
                (Here::Committed, TimeLimit::Answer) => assert_eq!(after, Here::InDoubt),
                _ => assert_eq!(after, state, "{limit:?}"),
            }
        }
    }
    let mut world = fresh(&[ALL], false);
    world.connect();
    world.tell_source(src::Event::Timeout(TimeLimit::Setup));
    world.settle();
    assert_failed_at_source(&world);
}

fn assert_failed_at_source(world: &World) {
    assert_stays(world);
    assert!(matches!(world.source_outcome, Some(Outcome::Failed(_))));
}

#[test]
fn absorbed_data_that_is_not_acknowledged_in_time_is_revoked() {
    let mut world = precopy(&[ALL]);
    let device = &mut world.source_devices[0];
    (device.unread, device.reinit) = (2, true);
    world.verdicts = [Verdict::Absorb].into();
    world.tell_source(src::Event::Switchover);
    assert!(world.run_until(|w| w.notices.contains(&Notice::Absorbing(ONE))));
    assert!(world.armed.contains(&TimeLimit::Absorb));
    world.tell_source(src::Event::Timeout(TimeLimit::Absorb));
    world.settle();
    assert_stays(&world);
    assert!(world.notices.contains(&Notice::Revoked(ONE)));
    assert!(!world.armed.contains(&TimeLimit::Absorb));
    // Nothing was thrown away, and its acknowledgement counts when it comes.
    assert!(world.source.all_ready());
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(&world);
}

#[test]
fn a_device_that_does_not_answer_in_quiesce_revokes() {
    let mut world = on_the_way(&[ALL, ALL], Here::Quiesce);
    // Both are quiescent and asked; one answer stays out.
    let answer = |event: &src::Event| matches!(event, src::Event::Info { .. });
    assert!(world.run_until(|w| w.source_answers.iter().any(answer)));
    assert!(world.armed.contains(&TimeLimit::Look));
    world.tell_source(src::Event::Timeout(TimeLimit::Look));
    assert_eq!(world.source.state(), Here::Revoking);
    world.settle();
    assert_stays(&world);
    assert!(world.source_devices.iter().all(|d| d.state == DeviceState::PreCopy));
}

/// Going back would wait for the same call: the move ends, and the verdict at Quiesce judges how long it
/// took, within the bound on revocations.
#[test]
fn a_slow_move_into_the_p2p_state_is_judged_when_it_ends_and_not_cut_off() {
    let mut world = on_the_way(&[ALL, ALL], Here::Quiesce);
    let arrived =
        |w: &World, device| w.source.device_state(device) == Some(DeviceState::PreCopyP2p);
    let mut looked = 0;
    while ![DeviceIndex(0), DeviceIndex(1)].into_iter().all(|device| arrived(&world, device)) {
        assert!(world.armed.is_empty(), "nothing cuts a move off: {:?}", world.armed);
        assert!(world.step());
        looked += 1;
    }
    assert!(looked > 1, "both moves were out");
    world.verdicts = [Verdict::Revoke].into();
    world.settle();
    assert_stays(&world);
    assert!(world.notices.contains(&Notice::Revoked(ONE)));
}

#[test]
fn dirty_tracking_never_outlives_its_migration() {
    for early in [true, false] {
        let mut world = fresh(&[ALL], false);
        world.connect();
        let starts = src::Event::TrackingStarted(Ok(()));
        assert!(world.run_until(|w| w.source_answers.contains(&starts)));
        if !early {
            world.settle();
            assert!(world.tracking);
        }
        world.tell_source(src::Event::Cancel);
        world.settle();
        assert_eq!(world.source_outcome, Some(Outcome::Cancelled));
        assert!(!world.tracking, "{}", world.tail());
    }
    let mut world = fresh(&[ALL], false);
    world.connect();
    let starts = src::Event::TrackingStarted(Ok(()));
    assert!(world.run_until(|w| w.source_answers.contains(&starts)));
    world.source_answers.retain(|event| *event != starts);
    world.tell_source(src::Event::TrackingStarted(Err(failure("no dirty log"))));
    world.settle();
    assert_failed(&world);
}
