//! The ways of directed tests: a world brought to where its rule is asked.

use switchover::handover::destination::State as There;
use switchover::handover::source::{self as src, State as Here};
use switchover::handover::{DeviceTraits, Outcome};
use switchover::message::DeviceIndex;

use super::World;

pub const ALL: DeviceTraits = DeviceTraits { pre_copy: true, p2p: true };
pub const PRE_COPY: DeviceTraits = DeviceTraits { pre_copy: true, p2p: false };
pub const P2P: DeviceTraits = DeviceTraits { pre_copy: false, p2p: true };
pub const STOP_COPY: DeviceTraits = DeviceTraits { pre_copy: false, p2p: false };
pub const NIC: DeviceIndex = DeviceIndex(0);

/// A world at rest in precopy, everything acknowledged.
pub fn precopy(traits: &[DeviceTraits]) -> World {
    let mut world = World::new(7, traits, false);
    world.connect();
    world.settle();
    assert_eq!(world.source.state(), Here::Precopy);
    assert!(world.source.all_ready());
    world
}

/// The same, on the way until the source is in `state`.
pub fn on_the_way(traits: &[DeviceTraits], state: Here) -> World {
    let mut world = precopy(traits);
    world.tell_source(src::Event::Switchover);
    assert!(world.run_until(|w| w.source.state() == state), "{}", world.tail());
    world
}

/// The same, until the destination is in `state`.
pub fn until_there(state: There) -> World {
    let mut world = precopy(&[ALL]);
    world.tell_source(src::Event::Switchover);
    assert!(world.run_until(|w| w.destination.state() == state), "{}", world.tail());
    world
}

pub fn assert_stays(world: &World) {
    assert!(world.source_runs && !world.destination_runs, "{}", world.tail());
}

pub fn assert_moved(world: &World) {
    assert_eq!(world.source_outcome, Some(Outcome::Completed), "{}", world.tail());
    assert!(!world.source_runs && world.destination_runs, "{}", world.tail());
}

pub const REVOCABLE: [Here; 5] =
    [Here::Precopy, Here::Look, Here::Quiesce, Here::StopCopy, Here::AwaitReady];
