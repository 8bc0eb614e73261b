//! Random walks of both machines: any order of answers, any verdict, faults at any moment. A seed
//! replays its walk; one that fails prints itself.

mod common;

use common::ways::*;
use common::{Random, World, failure};
use switchover::handover::destination as dst;
use switchover::handover::source::{self as src, TimeLimit};
use switchover::handover::{Decision, DeviceState, DeviceTraits, Outcome};
use switchover::message::DeviceIndex;

/// Seeds that once failed.
///
/// 193991: a device that was lost on the way back was left out of the next attempt.
const KEPT: &[u64] = &[193_991];
const WALKS: u64 = 50_000;

fn devices(random: &mut Random) -> Vec<DeviceTraits> {
    let kinds = [ALL, PRE_COPY, STOP_COPY, P2P];
    (0..random.below(4)).map(|_| kinds[random.below(4)]).collect()
}

fn meddle(world: &mut World, faults: &mut u32) {
    if *faults == 0 || !world.random.once_in(12) {
        return;
    }
    *faults -= 1;
    let device = DeviceIndex(world.random.below(world.source_devices.len()) as u16);
    let exists = !world.source_devices.is_empty();
    let running = world.source_runs;
    match world.random.below(12) {
        0 => world.cut(world.newest()),
        1 => world.tell_source(src::Event::Cancel),
        2 if exists && running => {
            // The guest resets its device: its session is dead, and the news may come late.
            world.source_devices[usize::from(device.0)].state = DeviceState::Running;
            world.source_answers.push(src::Event::DeviceReset(device));
        }
        3 | 4 if exists => {
            let device = &mut world.source_devices[usize::from(device.0)];
            if matches!(device.state, DeviceState::PreCopy | DeviceState::PreCopyP2p) {
                (device.unread, device.reinit) = (device.unread + 2, true);
            }
        }
        5 => {
            let limits = [
                TimeLimit::Setup,
                TimeLimit::Look,
                TimeLimit::Absorb,
                TimeLimit::Ready,
                TimeLimit::Answer,
            ];
            let limit = limits[world.random.below(limits.len())];
            if world.armed.contains(&limit) {
                world.armed.retain(|armed| *armed != limit);
                world.tell_source(src::Event::Timeout(limit));
            }
        }
        6 if world.window => {
            world.window = false;
            world.tell_destination(dst::Event::WindowEnded);
        }
        7 if running => world.tell_source(src::Event::GuestEnded(failure("power-off"))),
        8 => world.tell_destination(dst::Event::Cancel),
        9 => world.tell_destination(dst::Event::Fail(failure("out of memory"))),
        10 => world.tell_source(src::Event::Fail(failure("out of memory"))),
        _ => {}
    }
}

fn walk(seed: u64) -> World {
    let mut random = Random::new(seed);
    let mut world = World::new(seed, &devices(&mut random), random.once_in(2));
    world.fault_in = if random.once_in(3) { 0 } else { 4 };
    let mut faults = random.below(5) as u32;
    world.connect();
    for _ in 0..400 {
        meddle(&mut world, &mut faults);
        if world.source.state() == src::State::Precopy && world.random.once_in(3) {
            world.poll();
            world.tell_source(src::Event::Switchover);
        }
        if !world.step() && world.source_outcome.is_some() {
            break;
        }
    }
    // From here on nothing goes wrong any more, and everything must come to a good end.
    world.fault_in = 0;
    for _ in 0..200 {
        world.settle();
        if world.source_outcome.is_some() {
            break;
        }
        match world.source.state() {
            src::State::InDoubt => world.connect(),
            src::State::Precopy => {
                world.poll();
                world.settle();
                world.tell_source(src::Event::Switchover);
            }
            _ => {
                if let Some(limit) = world.armed.pop() {
                    world.tell_source(src::Event::Timeout(limit));
                } else if world.source.connection().is_none() {
                    world.connect();
                } else {
                    world.tell_source(src::Event::Cancel);
                }
            }
        }
    }
    world.settle();
    world
}

fn assert_good_end(world: &World, seed: u64) {
    let story = || format!("seed {seed}, {:?}\n{}", world.source.state(), world.tail());
    let outcome = world.source_outcome.as_ref();
    assert!(outcome.is_some(), "no end: {}", story());
    let completed = matches!(outcome, Some(Outcome::Completed));
    assert_eq!(completed, world.destination_runs, "the sides disagree: {}", story());
    assert_eq!(completed, !world.source_runs, "nobody runs, or both: {}", story());
    assert!(completed || !world.tracking, "dirty tracking goes on: {}", story());
    if completed {
        let running = |(decision, _): &(Decision, _)| *decision == Decision::Running;
        assert!(world.destination_records.iter().any(running), "no record: {}", story());
    }
}

#[test]
fn every_walk_keeps_the_invariants_and_comes_to_a_good_end() {
    let (mut completed, mut revoked, mut doubted) = (0, 0, 0);
    for seed in KEPT.iter().copied().chain(1..=WALKS) {
        let world = std::panic::catch_unwind(|| walk(seed));
        let world = world.unwrap_or_else(|panic| {
            eprintln!("seed {seed} failed");
            std::panic::resume_unwind(panic)
        });
        assert_good_end(&world, seed);
        completed += u32::from(world.destination_runs);
        revoked += u32::from(world.states.contains(&src::State::Revoking));
        doubted += u32::from(world.states.contains(&src::State::InDoubt));
    }
    // A walk that never gets anywhere proves nothing.
    let enough = WALKS as u32 / 50;
    assert!(completed > enough && revoked > enough, "{completed} completed, {revoked} revoked");
    assert!(doubted > 10, "{doubted} in doubt");
}

#[test]
fn without_faults_every_walk_completes() {
    for seed in 1..=500 {
        let mut random = Random::new(seed);
        let mut world = World::new(seed, &devices(&mut random), false);
        world.connect();
        world.settle();
        assert_eq!(world.source.state(), src::State::Precopy, "{}", world.tail());
        world.tell_source(src::Event::Switchover);
        world.settle();
        assert_eq!(world.source_outcome, Some(Outcome::Completed), "seed {seed}\n{}", world.tail());
        assert!(world.destination_runs && !world.source_runs);
    }
}
