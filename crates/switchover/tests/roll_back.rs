//! Rolled back from StopCopy and AwaitReady: the guest runs here again, both sides begin anew, and the same
//! migration succeeds later.

mod common;

use common::ways::*;
use common::{World, failure};
use switchover::handover::destination::{self as dst, State as There};
use switchover::handover::source::{self as src, Notice, Point, State as Here, TimeLimit, Verdict};
use switchover::handover::{Decision, DeviceCall, DeviceState, DeviceTraits, Outcome};
use switchover::message::{Attempt, Connection, Message, Session};

const BOTH: [Here; 2] = [Here::StopCopy, Here::AwaitReady];

fn take_back(world: &mut World) {
    world.tell_source(src::Event::TakeBack(failure("does not fit")));
}

/// In precopy again, with nothing of the attempt left, and able to move.
fn assert_tries_again(world: &mut World) {
    assert_stays(world);
    assert_eq!(world.source.state(), Here::Precopy, "{}", world.tail());
    assert_eq!(world.destination.state(), There::Loading, "{}", world.tail());
    assert_eq!(world.source_outcome, None);
    assert!(world.tracking, "dirty pages are still counted");
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(world);
    assert_eq!(world.source.attempt(), Attempt(2));
}

#[test]
fn taken_back_in_each_state_the_guest_runs_on_and_moves_with_the_next_attempt() {
    for traits in [&[ALL][..], &[PRE_COPY], &[P2P], &[STOP_COPY], &[ALL, ALL], &[]] {
        for state in BOTH {
            let mut world = on_the_way(traits, state);
            take_back(&mut world);
            world.settle();
            assert!(world.notices.contains(&Notice::RolledBack(Attempt(1))), "{state:?}");
            assert_tries_again(&mut world);
        }
    }
}

#[test]
fn a_verdict_may_roll_back_before_each_step_that_takes_time() {
    for (before, point) in [(2, Point::FinalSync), (3, Point::MachineState), (4, Point::Commit)] {
        let mut world = precopy(&[ALL]);
        world.verdicts = std::iter::repeat_n(Verdict::Go, before).collect();
        world.verdicts.push_back(Verdict::Revoke);
        world.tell_source(src::Event::Switchover);
        world.settle();
        assert!(world.verdicts.is_empty(), "{point:?} was not judged");
        let taken_back = [(Decision::Committing, Attempt(1)), (Decision::Never, Attempt(1))];
        let records = if point == Point::Commit { &taken_back[..] } else { &[] };
        assert_eq!(world.source_records, records, "{point:?}");
        assert_tries_again(&mut world);
    }
}

#[test]
fn where_the_switchover_can_be_revoked_taking_back_is_a_revocation() {
    for state in [Here::Look, Here::Quiesce] {
        let mut world = on_the_way(&[ALL], state);
        take_back(&mut world);
        world.settle();
        assert!(world.notices.contains(&Notice::Revoked(Attempt(1))));
        assert_eq!(world.source_devices[0].stream, Session(1), "no session ended");
        assert_tries_again(&mut world);
    }
}

#[test]
fn where_nothing_is_to_be_taken_back_nothing_happens() {
    let mut world = precopy(&[ALL]);
    take_back(&mut world);
    assert_eq!(world.source.state(), Here::Precopy);
    let mut world = on_the_way(&[ALL], Here::Committed);
    take_back(&mut world);
    world.settle();
    assert_moved(&world);
}

#[test]
fn devices_go_over_p2p_to_running_before_the_vcpus_resume_and_memory_is_dirty_again() {
    let traits = [ALL, ALL];
    let mut world = on_the_way(&traits, Here::AwaitReady);
    let from = world.log.len();
    take_back(&mut world);
    world.settle();
    let at = |what: &str| {
        let found = world.log[from..].iter().position(|line| line.contains(what));
        found.unwrap_or_else(|| panic!("no {what}\n{}", world.tail()))
    };
    let last = |what: &str| world.log[from..].iter().rposition(|line| line.contains(what));
    let p2p = last("S < CallDone { device: DeviceIndex(1), call: SetState(RunningP2p)")
        .max(last("S < CallDone { device: DeviceIndex(0), call: SetState(RunningP2p)"));
    assert!(p2p < Some(at("S > Call(DeviceIndex(0), SetState(Running))")));
    let running = last("S < CallDone { device: DeviceIndex(1), call: SetState(Running)")
        .max(last("S < CallDone { device: DeviceIndex(0), call: SetState(Running)"));
    assert!(running.is_some() && at("S > RestoreDirty") < at("S > Resume"));
    assert!(at("S > Reattach") < at("S > Resume"), "interrupts first");
    // The destination's devices were reset and load a session of their own.
    assert!(world.log[from..].iter().any(|line| line.contains("D > Call(DeviceIndex(1), Reset)")));
    assert!(world.destination_devices.iter().all(|d| d.stream == Session(2)));
}

#[test]
fn a_prepared_or_expired_destination_goes_back_to_loading() {
    for expired in [false, true] {
        let mut world = until_there(There::Prepared);
        if expired {
            world.tell_destination(dst::Event::WindowEnded);
            assert_eq!(world.destination.state(), There::Expired);
        }
        take_back(&mut world);
        world.settle();
        assert_eq!(world.destination.decision(), None);
        assert_tries_again(&mut world);
    }
}

#[test]
fn a_ready_of_the_attempt_that_was_rolled_back_does_not_commit_it_nor_the_next() {
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    let ready = |m: &Message| matches!(m, Message::Ready { .. });
    assert!(world.run_until(|w| w.links[&1].to_source.iter().any(ready)));
    take_back(&mut world);
    world.settle();
    world.tell_source(src::Event::Switchover);
    let late = Message::Ready { attempt: Attempt(1), window_ms: 5000 };
    assert!(world.run_until(|w| w.source.state() == Here::AwaitReady));
    world.tell_source(src::Event::Message(Connection(1), late));
    assert!(world.source_writes.is_empty(), "an old Ready committed");
    world.settle();
    assert_moved(&world);
}

#[test]
fn taken_back_while_committing_is_recorded_nothing_is_sent_and_the_record_is_taken_back() {
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    let recording = (Decision::Committing, Attempt(1));
    assert!(world.run_until(|w| w.source_writes.contains(&recording)));
    take_back(&mut world);
    world.settle();
    let records = [(Decision::Committing, Attempt(1)), (Decision::Never, Attempt(1))];
    assert_eq!(world.source_records, records);
    assert_tries_again(&mut world);
}

#[test]
fn cancel_and_a_lost_link_end_the_migration_while_it_rolls_back() {
    for cut in [false, true] {
        for state in BOTH {
            let mut world = on_the_way(&[ALL], state);
            take_back(&mut world);
            if cut {
                world.cut(1);
            } else {
                world.tell_source(src::Event::Cancel);
            }
            world.settle();
            assert_stays(&world);
            assert!(world.source_outcome.is_some(), "{state:?}, cut {cut}: {}", world.tail());
            assert!(world.destination_outcome.is_some(), "{state:?}, cut {cut}");
            assert!(!world.tracking);
        }
    }
}

#[test]
fn a_destination_that_cannot_roll_back_ends_the_migration_with_the_guest_here() {
    // A device that cannot be reset there.
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    world.fail_calls.1.push((NIC, DeviceCall::Reset));
    take_back(&mut world);
    world.settle();
    assert_stays(&world);
    assert!(matches!(world.source_outcome, Some(Outcome::Failed(_))), "{}", world.tail());
    // No answer at all.
    let mut world = on_the_way(&[ALL], Here::AwaitReady);
    take_back(&mut world);
    assert!(world.armed.contains(&TimeLimit::RolledBack));
    assert!(world.run_until(|w| w.source_runs));
    world.tell_source(src::Event::Timeout(TimeLimit::RolledBack));
    world.settle();
    assert_stays(&world);
    assert!(matches!(world.source_outcome, Some(Outcome::Failed(_))), "{}", world.tail());
}

#[test]
fn a_device_that_fails_on_the_way_back_is_reset_and_moves_with_the_next_attempt() {
    for traits in [ALL, PRE_COPY] {
        let first = match traits {
            DeviceTraits { p2p: true, .. } => DeviceState::RunningP2p,
            _ => DeviceState::Running,
        };
        let mut world = on_the_way(&[traits], Here::AwaitReady);
        world.fail_calls.0.push((NIC, DeviceCall::SetState(first)));
        take_back(&mut world);
        world.settle();
        let lost = |n: &Notice| matches!(n, Notice::DeviceStateLost { .. });
        assert!(world.notices.iter().any(lost));
        assert_tries_again(&mut world);
    }
}

#[test]
fn what_was_ready_too_late_is_rolled_back_however_often() {
    let mut world = precopy(&[ALL]);
    for attempt in 1..=5 {
        world.verdicts = std::iter::repeat_n(Verdict::Go, 4).collect();
        world.verdicts.push_back(Verdict::Revoke);
        world.tell_source(src::Event::Switchover);
        world.settle();
        assert_eq!(world.source.state(), Here::Precopy);
        assert_eq!(world.source.attempt(), Attempt(attempt));
    }
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(&world);
    assert_eq!(world.source.session(NIC), Session(6));
}
