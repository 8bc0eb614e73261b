//! What doubt leaves open: the operator's decisions, and machines made of the records of a process that died.

mod common;

use common::ways::*;
use common::{World, failure};
use switchover::handover::destination::{self as dst, Destination, State as There};
use switchover::handover::source::{self as src, Notice, Source, State as Here, TimeLimit};
use switchover::handover::{Decision, Outcome, Resolve};
use switchover::message::{Attempt, Connection, Features, Id, Message};

const RUN_HERE: Resolve = Resolve::RunHere { force: false };
const FORCE: Resolve = Resolve::RunHere { force: true };

/// The Commit is lost with its connection, the source in doubt, the destination prepared.
fn in_doubt() -> World {
    let mut world = until_there(There::Prepared);
    assert!(world.run_until(|w| w.source.state() == Here::Committed));
    world.cut(1);
    world.links.get_mut(&1).unwrap().to_destination.clear();
    assert!(world.run_until(|w| w.source.state() == Here::InDoubt));
    world.reconnect = false;
    assert_eq!(world.destination.state(), There::Prepared, "{}", world.tail());
    world
}

fn refused(world: &World) -> bool {
    matches!(world.notices.last(), Some(Notice::ResolveRefused(_)))
}

#[test]
fn resumed_here_once_the_window_is_surely_over() {
    let mut world = in_doubt();
    world.tell_source(src::Event::Operator(RUN_HERE));
    assert!(refused(&world) && world.source.state() == Here::InDoubt);
    world.tell_destination(dst::Event::WindowEnded);
    world.tell_source(src::Event::Timeout(TimeLimit::Answer));
    assert_eq!(world.source.state(), Here::InDoubt, "time alone resolves nothing");
    world.tell_source(src::Event::Operator(RUN_HERE));
    world.settle();
    assert_stays(&world);
    assert!(matches!(world.source_outcome, Some(Outcome::Failed(_))));
    assert_eq!(world.source_records.last(), Some(&(Decision::Never, Attempt(1))));
}

#[test]
fn with_force_it_does_not_wait_and_says_when_the_guest_runs_there_too() {
    let mut world = in_doubt();
    world.tell_source(src::Event::Operator(FORCE));
    assert!(world.notices.contains(&Notice::Resolved(FORCE)));
    while !world.source_answers.is_empty() && world.step() {}
    assert!(world.source_runs);
    // The destination had obeyed after all.
    let running = Message::Running { attempt: Attempt(1) };
    let mut actions = Vec::new();
    world.source.handle(src::Event::Message(Connection(1), running), &mut actions);
    assert!(actions.contains(&src::Action::Report(Notice::RunsThereToo(Attempt(1)))));
}

#[test]
fn abandoned_the_guest_is_gone_from_here() {
    let mut world = in_doubt();
    world.tell_source(src::Event::Operator(Resolve::Discard));
    world.settle();
    assert_eq!(world.source_outcome, Some(Outcome::Abandoned));
    assert!(!world.source_runs);
    assert_eq!(world.source_records.last(), Some(&(Decision::Gone, Attempt(1))));
}

#[test]
fn without_doubt_there_is_nothing_to_resolve_at_the_source() {
    for state in REVOCABLE {
        for resolve in [FORCE, Resolve::Discard] {
            let mut world = match state {
                Here::Precopy => precopy(&[ALL]),
                state => on_the_way(&[ALL], state),
            };
            world.tell_source(src::Event::Operator(resolve));
            assert!(refused(&world), "{state:?} {resolve:?}");
            assert_eq!(world.source.state(), state);
        }
    }
}

#[test]
fn a_complete_destination_is_started_by_its_operator_in_the_window_and_after_it() {
    for expired in [false, true] {
        let mut world = in_doubt();
        if expired {
            world.tell_destination(dst::Event::WindowEnded);
        }
        world.tell_destination(dst::Event::Operator(RUN_HERE));
        world.settle();
        assert!(world.destination_runs, "{}", world.tail());
        assert_eq!(world.resolved_there, [(RUN_HERE, Ok(()))]);
        assert_eq!(world.destination.decision(), Some(Decision::Running));
        // The source was not dead after all: it hears of it.
        world.connect();
        world.settle();
        assert_moved(&world);
    }
}

#[test]
fn what_the_operator_could_not_start_is_kept_and_can_be_started_later() {
    let mut world = in_doubt();
    world.tell_destination(dst::Event::Operator(RUN_HERE));
    world.destination_answers.clear();
    world.tell_destination(dst::Event::Wired(Err(failure("no vectors"))));
    assert_eq!(world.destination.state(), There::Expired);
    assert!(matches!(world.resolved_there.last(), Some((RUN_HERE, Err(_)))));
    world.tell_destination(dst::Event::Operator(RUN_HERE));
    world.settle();
    assert!(world.destination_runs);
}

#[test]
fn discarded_it_never_runs_and_the_source_is_told() {
    let mut world = in_doubt();
    world.tell_destination(dst::Event::Operator(Resolve::Discard));
    world.settle();
    assert_eq!(world.destination.decision(), Some(Decision::Never));
    world.tell_destination(dst::Event::Operator(RUN_HERE));
    assert!(matches!(world.resolved_there.last(), Some((RUN_HERE, Err(_)))), "never is never");
    world.connect();
    world.settle();
    assert_stays(&world);
}

#[test]
fn nothing_incomplete_is_started_or_discarded_by_the_operator() {
    let mut world = precopy(&[ALL]);
    for resolve in [RUN_HERE, FORCE, Resolve::Discard] {
        world.tell_destination(dst::Event::Operator(resolve));
        assert!(matches!(world.resolved_there.last(), Some((_, Err(_)))));
    }
    world.tell_source(src::Event::Switchover);
    world.settle();
    assert_moved(&world);
    world.tell_destination(dst::Event::Operator(Resolve::Discard));
    assert!(matches!(world.resolved_there.last(), Some((_, Err(_)))), "a guest that runs");
}

// --- records of a process that died ---------------------------------------------------------------

/// The destination's process dies in doubt and another one takes over its records.
fn destination_begins_anew(world: &mut World, decision: Decision) {
    world.destination = Destination::recovered(Id(1), Id(33), Id(4), Attempt(1), decision);
    world.destination_answers.clear();
    world.destination_writes.clear();
}

#[test]
fn a_destination_that_died_prepared_says_never_when_asked() {
    let mut world = in_doubt();
    destination_begins_anew(&mut world, Decision::Prepared);
    world.connect();
    world.settle();
    assert_stays(&world);
    assert!(world.destination_records.contains(&(Decision::Never, Attempt(1))));
}

#[test]
fn a_destination_that_died_with_never_on_record_says_so_by_itself() {
    let mut world = in_doubt();
    world.destination_records.push((Decision::Never, Attempt(1)));
    destination_begins_anew(&mut world, Decision::Never);
    world.connect();
    world.settle();
    assert_stays(&world);
}

#[test]
fn a_destination_that_lost_a_running_guest_does_not_end_doubt_but_says_what_it_knows() {
    let mut world = in_doubt();
    world.destination_records.push((Decision::Running, Attempt(1)));
    destination_begins_anew(&mut world, Decision::Running);
    world.connect();
    world.settle();
    assert_eq!(world.source.state(), Here::InDoubt, "{}", world.tail());
    let told = |n: &Notice| matches!(n, Notice::NoAnswer(Some(why)) if why.what.contains("lost"));
    assert!(world.notices.iter().any(told), "{:?}", world.notices);
    world.tell_source(src::Event::Operator(FORCE));
    world.settle();
    assert_stays(&world);
}

/// The source's process dies in doubt: its guest is gone.
fn source_begins_anew(world: &mut World) {
    let setup = src::Setup {
        migration: Id(1),
        instance: Id(22),
        features: Features::default(),
        description: String::new(),
        devices: Vec::new(),
        dry_run: false,
    };
    world.source = Source::recovered(setup, Id(4), Attempt(1), Connection(1));
    world.source_answers.clear();
}

#[test]
fn a_source_that_died_in_doubt_asks_nothing_so_that_the_prepared_guest_can_be_started() {
    let mut world = in_doubt();
    source_begins_anew(&mut world);
    world.connect();
    world.settle();
    assert_eq!(world.source.state(), Here::InDoubt);
    assert_eq!(world.destination.state(), There::Prepared, "{}", world.tail());
    world.tell_source(src::Event::Operator(FORCE));
    assert!(refused(&world), "there is nothing to resume");
    world.tell_destination(dst::Event::Operator(RUN_HERE));
    world.settle();
    assert!(world.destination_runs);
    assert_eq!(world.source_outcome, Some(Outcome::Completed));
}

#[test]
fn a_source_that_died_in_doubt_hears_what_was_decided_meanwhile() {
    for running in [true, false] {
        let mut world = in_doubt();
        let resolve = if running { RUN_HERE } else { Resolve::Discard };
        world.tell_destination(dst::Event::Operator(resolve));
        world.settle();
        source_begins_anew(&mut world);
        world.connect();
        world.settle();
        let completed = world.source_outcome == Some(Outcome::Completed);
        assert_eq!(completed, running, "{}", world.tail());
        let decision = if running { Decision::Gone } else { Decision::Never };
        assert_eq!(world.source_records.last(), Some(&(decision, Attempt(1))));
    }
}
