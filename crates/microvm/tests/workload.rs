//! The built-in workload, on KVM and as a process guest: it runs, stands still, is tracked, and moves to
//! another VM of the same process with nothing lost.

use std::time::{Duration, Instant};

use microvm::workload::StartPage;
use microvm::{
    Command, Counters, DirtyRing, DirtyTracking, GuestKind, Lifecycle, SerialConfig, Vm, VmConfig,
};
use migration::{Completeness, DirtyBitmap, DirtyTracker, GuestEvent, PAGE_SIZE, Section, Vmm};

const PATIENCE: Duration = Duration::from_secs(60);

/// The kinds of guest this host can run; says why not of the others.
fn guests() -> Vec<GuestKind> {
    let kinds = [
        (GuestKind::Kvm, microvm::kvm::available()),
        (GuestKind::Process, microvm::process::available()),
    ];
    let mut guests = Vec::new();
    for (kind, available) in kinds {
        match available {
            Ok(()) => guests.push(kind),
            Err(why) => println!("skipped for {kind:?}: {why}"),
        }
    }
    guests
}

fn config(guest: GuestKind) -> VmConfig {
    let mut config = VmConfig { guest, memory_bytes: 32 << 20, ..VmConfig::default() };
    config.workload.working_set_pages = Some(200);
    config
}

/// The smallest ring, which only full vCPUs harvest.
const SMALLEST_RING: DirtyRing = DirtyRing { entries: DirtyRing::ENTRIES_MIN, harvester: false };

/// Every way in which a guest's writes are tracked here; says why not of the others.
fn tracked() -> Vec<VmConfig> {
    let mut configs: Vec<_> = guests().into_iter().map(config).collect();
    match microvm::dirty_ring_available() {
        Ok(()) => configs.extend([DirtyRing::default(), SMALLEST_RING].map(|ring| VmConfig {
            dirty_tracking: DirtyTracking::Ring(ring),
            ..config(GuestKind::Kvm)
        })),
        Err(why) => println!("skipped for rings: {why}"),
    }
    configs
}

fn wait_for(vm: &Vm, what: &str, mut holds: impl FnMut(&Counters) -> bool) -> Counters {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let counters = vm.workload_counters().unwrap();
        if holds(&counters) {
            return counters;
        }
        let alive = vm.status().ended.is_none();
        assert!(alive && Instant::now() < deadline, "{what}: {counters:?}, {:?}", vm.status());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs until each vCPU went through its part of the working set again.
fn run_a_round(vm: &Vm) -> Counters {
    let before = vm.workload_counters().unwrap();
    let pages = u64::from(vm.config().workload.working_set_pages.unwrap());
    let share = pages / u64::from(vm.config().vcpus) + 1;
    wait_for(vm, "a round", |now| {
        now.vcpus.len() == vm.config().vcpus as usize
            && now.vcpus.iter().enumerate().all(|(index, vcpu)| {
                vcpu.writes >= before.vcpus.get(index).map_or(0, |v| v.writes) + share
            })
    })
}

#[test]
fn the_workload_runs_and_stands_still_when_paused() {
    for guest in guests() {
        let vm = Vm::new(config(guest)).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running && now.beats > 10);
        run_a_round(&vm);
        let second = run_a_round(&vm);
        assert_eq!(second.errors, 0);
        assert_eq!(second.devices, 0);
        let last_beat = vm.last_heartbeat_ns().unwrap();
        assert!(vm.first_heartbeat_ns().unwrap() <= last_beat);

        vm.pause().unwrap();
        let paused = vm.workload_counters().unwrap();
        let digest = vm.memory_digest().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(vm.workload_counters().unwrap(), paused);
        assert_eq!(vm.memory_digest().unwrap(), digest);
        let command = Command::SetDirtyRate { pages_per_s: 1 };
        assert!(vm.workload_command(command, PATIENCE).is_err(), "nothing writes paused memory");

        vm.resume().unwrap();
        wait_for(&vm, "goes on", |now| now.writes > paused.writes && now.beats > paused.beats);
        assert!(vm.first_heartbeat_ns().unwrap() > last_beat);
    }
}

#[test]
fn pausing_and_resuming_many_times_loses_nothing() {
    for guest in guests() {
        let vm = Vm::new(VmConfig { vcpus: 2, ..config(guest) }).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        let faster = Command::SetDirtyRate { pages_per_s: u32::MAX };
        vm.workload_command(faster, PATIENCE).unwrap();
        for _ in 0..200 {
            vm.pause().unwrap();
            vm.resume().unwrap();
        }
        let after = run_a_round(&vm);
        assert_eq!(after.errors, 0);
    }
}

#[test]
fn a_throttled_guest_writes_for_its_part_of_the_time_and_a_pause_does_not_wait() {
    for guest in guests() {
        let vm = Vm::new(config(guest)).unwrap();
        vm.set_cpu_throttle(30).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up, throttled", |now| now.running);
        let fast = Command::SetDirtyRate { pages_per_s: u32::MAX };
        vm.workload_command(fast, PATIENCE).unwrap();
        // Turn and turn about, so that a busy machine slows both down.
        let mut written = [0; 2];
        for turn in 0..20 {
            vm.set_cpu_throttle([0, 95][turn % 2]).unwrap();
            let before = vm.workload_counters().unwrap().writes;
            std::thread::sleep(Duration::from_millis(40));
            written[turn % 2] += vm.workload_counters().unwrap().writes - before;
        }
        println!("{guest:?}: {} writes free, {} at 95 %", written[0], written[1]);
        assert!(written[1] > 0, "it still lives");
        assert!(written[1] * 3 < written[0], "{guest:?}: {written:?}");
        vm.set_cpu_throttle(99).unwrap();
        for _ in 0..20 {
            vm.pause().unwrap();
            let paused = vm.workload_counters().unwrap();
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(vm.workload_counters().unwrap(), paused, "{guest:?}: it is paused");
            vm.resume().unwrap();
        }
        assert_eq!(run_a_round(&vm).errors, 0);
        (0..10).for_each(|turn| vm.set_cpu_throttle([0, 50][turn % 2]).unwrap());
        vm.stop();
    }
}

#[test]
fn commands_are_answered() {
    for guest in guests() {
        let vm = Vm::new(config(guest)).unwrap();
        assert!(vm.workload_command(Command::PowerOff, PATIENCE).is_err(), "not started");
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        vm.workload_command(Command::SetDirtyRate { pages_per_s: 0 }, PATIENCE).unwrap();
        // The write under way is the last one.
        std::thread::sleep(Duration::from_millis(20));
        let still = vm.workload_counters().unwrap();
        wait_for(&vm, "ticks", |now| now.timer_ticks > still.timer_ticks + 20);
        assert_eq!(vm.workload_counters().unwrap().writes, still.writes);
        vm.workload_command(Command::SetDirtyRate { pages_per_s: 10_000 }, PATIENCE).unwrap();
        wait_for(&vm, "writes", |now| now.writes > still.writes);
        let no_such = Command::RingDoorbell { device: 0, stamps: 1, vector: 0 };
        let error = vm.workload_command(no_such, PATIENCE).unwrap_err();
        assert!(error.to_string().contains("no such device"), "{error}");
    }
}

#[test]
fn the_dirty_log_names_exactly_the_pages_that_were_written() {
    for mut config in tracked() {
        config.workload.dirty_pages_per_s = 0;
        let vm = Vm::new(config).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        let memory = vm.memory();
        let start = StartPage::read(&memory).unwrap();
        let mut trackers = vm.dirty_trackers().unwrap();
        let tracker = &mut trackers[0];
        tracker.start().unwrap();
        let mut dirty = DirtyBitmap::new(&memory.layout());
        let working_set = |dirty: &DirtyBitmap| {
            let first = start.working_set_base / PAGE_SIZE;
            let pages = first..first + u64::from(start.working_set_pages);
            pages
                .filter(|page| dirty.region(0)[(page / 64) as usize] >> (page % 64) & 1 != 0)
                .count()
        };

        vm.pause().unwrap();
        assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
        assert_eq!(working_set(&dirty), 0, "nothing was written since the start");
        assert!(dirty.count() < 16, "mailbox, blocks and stacks: {}", dirty.count());

        // Some writes: as many pages as the guest counts.
        let before = vm.workload_counters().unwrap().writes;
        vm.resume().unwrap();
        vm.workload_command(Command::SetDirtyRate { pages_per_s: 1000 }, PATIENCE).unwrap();
        wait_for(&vm, "some writes", |now| now.writes >= before + 50);
        vm.pause().unwrap();
        dirty.clear();
        assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
        let written = vm.workload_counters().unwrap().writes - before;
        // It counts a write once it is done: the last one may be there and not counted yet.
        let found = working_set(&dirty) as u64;
        assert!(found == written.min(200) || found == (written + 1).min(200), "{found}, {written}");
        assert!(dirty.count() - working_set(&dirty) as u64 <= 16);

        // Paused: nothing new, and what was reported is forgotten.
        dirty.clear();
        assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
        assert!(dirty.is_empty(), "{}", dirty.count());

        // A whole round: all of them, and no page beyond.
        vm.resume().unwrap();
        run_a_round(&vm);
        vm.pause().unwrap();
        assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
        assert_eq!(working_set(&dirty), 200);
        assert!(dirty.count() <= 216, "{}", dirty.count());
        tracker.stop().unwrap();
        assert!(
            tracker.collect(&mut dirty).is_err(),
            "a stopped log must not pass for a quiet guest"
        );
    }
}

/// With deferred clearing what is reported stays so until it is forgotten, as a roll-back needs it, and what is
/// written after that is reported again.
#[test]
fn what_a_deferred_log_reports_is_forgotten_when_that_is_said() {
    for config in tracked() {
        let what = (config.guest, config.dirty_tracking);
        let vm = Vm::new(config).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        let mut tracker = vm.dirty_trackers().unwrap().remove(0);
        let Some(clearer) = tracker.defer() else {
            println!("skipped for {what:?}: it cannot, or KVM has no manual protection here");
            continue;
        };
        tracker.start().unwrap();
        assert!(tracker.defer().is_none(), "too late");
        let layout = vm.memory().layout();
        let found = |tracker: &mut dyn DirtyTracker| {
            let mut dirty = DirtyBitmap::new(&layout);
            assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
            dirty
        };
        // As a first pass does, all of memory, in blocks.
        for (region, at) in layout.iter().enumerate() {
            for first in (0..at.pages()).step_by(512) {
                let pages = (at.pages() - first).min(512);
                let words: Vec<u64> = (0..pages.div_ceil(64)).map(|_| !0).collect();
                clearer.clear(region, first, &words).unwrap();
            }
        }
        run_a_round(&vm);
        vm.pause().unwrap();
        let written = found(&mut *tracker);
        assert!(written.count() >= 200, "{}", written.count());
        assert!(written.count() <= 232, "only what was written: {}", written.count());
        assert_eq!(found(&mut *tracker), written, "it stays reported");
        // All but the first 64 pages.
        for (region, words) in (0..layout.len()).map(|region| (region, written.region(region))) {
            for (number, words) in words.chunks(8).enumerate() {
                let mut words = words.to_vec();
                if (region, number) == (0, 0) {
                    words[0] = 0;
                }
                clearer.clear(region, number as u64 * 512, &words).unwrap();
            }
        }
        let mut first = DirtyBitmap::new(&layout);
        first.region_mut(0)[0] = written.region(0)[0];
        assert_eq!(found(&mut *tracker), first);
        vm.resume().unwrap();
        run_a_round(&vm);
        vm.pause().unwrap();
        let mut all = written.clone();
        all.union(&found(&mut *tracker));
        assert!(all.count() <= written.count() + 16, "{} and {}", all.count(), written.count());
        tracker.stop().unwrap();
    }
}

#[test]
fn a_newer_tracker_takes_the_turn() {
    for config in tracked().into_iter().filter(|config| config.guest == GuestKind::Kvm) {
        let vm = Vm::new(config).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        let mut dirty = DirtyBitmap::new(&vm.memory().layout());
        let mut old = vm.dirty_trackers().unwrap().remove(0);
        old.start().unwrap();
        let mut new = vm.dirty_trackers().unwrap().remove(0);
        new.start().unwrap();
        assert!(old.collect(&mut dirty).is_err());
        drop(old);
        run_a_round(&vm);
        assert_eq!(new.collect(&mut dirty).unwrap(), Completeness::Complete);
        assert!(dirty.count() >= 200, "the old one's end does not stop the new one");
    }
}

/// Copies memory while the guest runs, as a migration does, and moves the guest: answers the new VM, paused.
fn move_while_it_runs(source: &Vm, tracker: &mut dyn DirtyTracker) -> Vm {
    let destination = Vm::new(source.config().clone()).unwrap();
    let (from, to) = (source.memory(), destination.memory());
    let layout = from.layout();
    let clearer = tracker.defer();
    tracker.start().unwrap();
    from.set_tracking(true);
    let mut dirty = DirtyBitmap::new(&layout);
    dirty.set_all();
    let mut page = vec![0; PAGE_SIZE as usize];
    const PASSES: usize = 6;
    for pass in 0..=PASSES {
        for (region, at) in layout.iter().enumerate() {
            for first in (0..at.pages()).step_by(64) {
                let word = dirty.region(region)[(first / 64) as usize];
                if let Some(clearer) = clearer.as_ref().filter(|_| word != 0) {
                    clearer.clear(region, first, &[word]).unwrap();
                }
                for page_number in (first..first + 64).filter(|page| word >> (page % 64) & 1 != 0) {
                    let gpa = at.gpa + page_number * PAGE_SIZE;
                    from.read(gpa, &mut page).unwrap();
                    to.write(gpa, &page).unwrap();
                }
            }
        }
        if pass == PASSES {
            break;
        }
        run_a_round(source);
        if pass + 1 == PASSES {
            source.pause().unwrap();
        }
        dirty.clear();
        if tracker.collect(&mut dirty).unwrap() == Completeness::Incomplete {
            // A hypervisor that emulates in batches may overrun the smallest ring.
            println!("{:?}: an answer is incomplete", source.config().dirty_tracking);
            dirty.set_all();
        }
        from.take_dirty(&mut dirty);
    }
    from.set_tracking(false);
    tracker.stop().unwrap();
    destination.load_machine_state(&source.save_machine_state().unwrap()).unwrap();
    destination
}

#[test]
fn a_guest_that_is_copied_while_it_runs_moves_and_its_stamps_hold() {
    for mut config in tracked() {
        let what = (config.guest, config.dirty_tracking);
        config.vcpus = 2;
        // More than the smallest ring has entries.
        config.workload.working_set_pages = Some(3000);
        let mut vm = Vm::new(config).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        vm.workload_command(Command::SetDirtyRate { pages_per_s: 10_000 }, PATIENCE).unwrap();
        for _ in 0..2 {
            let mut tracker = vm.dirty_trackers().unwrap().remove(0);
            let destination = move_while_it_runs(&vm, &mut *tracker);
            assert_eq!(
                vm.memory_digest().unwrap(),
                destination.memory_digest().unwrap(),
                "{what:?}"
            );
            if let Some(counters) = vm.ring_counters() {
                assert!(counters.harvested >= 3000, "{what:?}: {counters:?}");
                let full_exits = what.1 == DirtyTracking::Ring(SMALLEST_RING);
                assert_eq!(counters.full_exits > 0, full_exits, "{what:?}: {counters:?}");
            }
            vm.stop();
            destination.resume().unwrap();
            vm = destination;
            assert_eq!(run_a_round(&vm).errors, 0, "{what:?}");
        }
    }
}

/// Moves the guest of `source` into a new VM: memory by copy, machine state by sections.
fn move_to_new_vm(source: &Vm, config: VmConfig) -> Vm {
    move_with(source, config, |_| {})
}

/// As [`move_to_new_vm`], with the sections changed on the way.
fn move_with(source: &Vm, config: VmConfig, change: impl FnOnce(&mut Vec<Section>)) -> Vm {
    let destination = Vm::new(config).unwrap();
    assert_eq!(source.description(), destination.description());
    source.pause().unwrap();
    let mut sections = source.save_machine_state().unwrap();
    change(&mut sections);
    let (from, to) = (source.memory(), destination.memory());
    let mut page = vec![0; PAGE_SIZE as usize];
    for region in from.layout() {
        for gpa in (region.gpa..region.gpa + region.len).step_by(page.len()) {
            from.read(gpa, &mut page).unwrap();
            to.write(gpa, &page).unwrap();
        }
    }
    destination.load_machine_state(&sections).unwrap();
    assert_eq!(source.memory_digest().unwrap(), destination.memory_digest().unwrap());
    destination
}

fn moves(guest: GuestKind, vcpus: u32) {
    let dir = tempfile::tempdir().unwrap();
    let witness = dir.path().join("witness");
    let config = VmConfig { vcpus, witness: Some(witness.clone()), ..config(guest) };
    let mut vm = Vm::new(config.clone()).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "up", |now| now.running);
    vm.workload_command(Command::SetDirtyRate { pages_per_s: 20_000 }, PATIENCE).unwrap();
    const MOVES: usize = 5;
    for round in 0..MOVES {
        run_a_round(&vm);
        let destination = move_to_new_vm(&vm, config.clone());
        let before = vm.workload_counters().unwrap();
        assert_eq!(destination.status().lifecycle, Lifecycle::Loaded);
        vm.stop();
        destination.resume().unwrap();
        vm = destination;
        let after = run_a_round(&vm);
        assert_eq!(after.errors, 0, "move {round}");
        wait_for(&vm, "all timers tick", |now| {
            now.vcpus.len() == vcpus as usize
                && now.vcpus.iter().zip(&before.vcpus).all(|(now, then)| now.ticks > then.ticks + 5)
        });
        assert!(after.beats > before.beats);
        let command = Command::SetDirtyRate { pages_per_s: 20_001 + round as u32 };
        vm.workload_command(command, PATIENCE).unwrap();
    }
    let stamps = microvm::witness::read(&witness).unwrap();
    assert!(stamps.is_sorted_by_key(|stamp| stamp.time_ns));
    assert_eq!(microvm::witness::order_of_running(&stamps).len(), MOVES + 1);
}

#[test]
fn a_guest_moves_to_another_vm_and_its_stamps_hold() {
    guests().into_iter().for_each(|guest| moves(guest, 1));
}

#[test]
fn a_guest_with_two_vcpus_moves_to_another_vm() {
    guests().into_iter().for_each(|guest| moves(guest, 2));
}

#[test]
fn a_source_that_goes_on_after_saving_loses_nothing() {
    for guest in guests() {
        let vm = Vm::new(VmConfig { vcpus: 2, ..config(guest) }).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        assert!(vm.save_machine_state().is_err(), "not while it runs");
        for _ in 0..3 {
            vm.pause().unwrap();
            vm.save_machine_state().unwrap();
            vm.reattach().unwrap();
            vm.resume().unwrap();
            assert_eq!(run_a_round(&vm).errors, 0);
        }
    }
}

#[test]
fn a_lost_page_shows_in_the_guests_own_check() {
    for guest in guests() {
        let vm = Vm::new(config(guest)).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        run_a_round(&vm);
        vm.pause().unwrap();
        let start = StartPage::read(&vm.memory()).unwrap();
        // As if a page had been left as it was before its last write.
        vm.memory().write(start.working_set_base + 7 * PAGE_SIZE + 8, &[0; 8]).unwrap();
        vm.resume().unwrap();
        run_a_round(&vm);
        assert_eq!(wait_for(&vm, "an error", |now| now.errors > 0).errors, 1);
    }
}

#[test]
fn the_serial_console_and_its_state_move_along() {
    for guest in guests() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let vm =
            Vm::new(VmConfig { serial: SerialConfig::File(one.clone()), ..config(guest) }).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        if guest == GuestKind::Kvm {
            let said = || std::fs::read_to_string(&one).unwrap();
            wait_for(&vm, "the console", |_| said() == "vmferry workload: ready\r\n");
        }
        vm.serial_input(b"not read by this guest");
        let other = VmConfig { serial: SerialConfig::File(two.clone()), ..config(guest) };
        let moved = move_to_new_vm(&vm, other);
        let serial = |vm: &Vm| {
            vm.pause().unwrap();
            let sections = vm.save_machine_state().unwrap();
            sections.into_iter().find(|section| section.name == "serial").unwrap()
        };
        let before = serial(&vm);
        moved.resume().unwrap();
        assert_eq!(serial(&moved), before);
        assert!(before.payload.ends_with(b"not read by this guest"));
    }
}

/// Collects events.
fn events_of(vm: &Vm) -> std::sync::mpsc::Receiver<GuestEvent> {
    let (sender, receiver) = std::sync::mpsc::channel();
    vm.set_guest_event_sink(Some(std::sync::Arc::new(move |event| {
        let _ = sender.send(event);
    })));
    receiver
}

#[test]
fn the_ways_a_guest_ends_are_told() {
    for guest in guests() {
        type IsIt = fn(&GuestEvent) -> bool;
        let cases: [(Command, IsIt); 2] = [
            (Command::PowerOff, |event| *event == GuestEvent::PowerOff),
            (Command::TripleFault, |event| matches!(event, GuestEvent::Crashed { .. })),
        ];
        for (command, is_it) in cases {
            let vm = Vm::new(VmConfig { vcpus: 2, ..config(guest) }).unwrap();
            vm.start().unwrap();
            wait_for(&vm, "up", |now| now.running);
            let events = events_of(&vm);
            vm.workload_command(command, PATIENCE).unwrap();
            let event = events.recv_timeout(PATIENCE).unwrap();
            assert!(is_it(&event), "{command:?}: {event:?}");
            assert_eq!(vm.status().ended, Some(event.clone()));
            // It has ended where it is moved to, too.
            let moved = move_to_new_vm(&vm, VmConfig { vcpus: 2, ..config(guest) });
            moved.resume().unwrap();
            assert_eq!(moved.status().ended, Some(event));
            let still = moved.workload_counters().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(moved.workload_counters().unwrap(), still);
        }
    }
}

#[test]
fn a_machine_reset_starts_the_guest_anew() {
    for guest in guests() {
        let vm = Vm::new(VmConfig { vcpus: 2, ..config(guest) }).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        run_a_round(&vm);
        let events = events_of(&vm);
        for _ in 0..2 {
            wait_for(&vm, "some time", |now| now.beats > 100);
            vm.workload_command(Command::ResetMachine, PATIENCE).unwrap();
            assert_eq!(events.recv_timeout(PATIENCE).unwrap(), GuestEvent::Reset);
            let anew = wait_for(&vm, "up again", |now| now.running && now.beats > 1);
            assert!(anew.beats < 100_000);
            assert_eq!(run_a_round(&vm).errors, 0);
        }
    }
}

#[test]
fn a_section_that_is_not_whole_is_refused() {
    for guest in guests() {
        let vm = Vm::new(config(guest)).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        vm.pause().unwrap();
        let sections = vm.save_machine_state().unwrap();
        let destination = Vm::new(config(guest)).unwrap();
        for index in 0..sections.len() {
            let name = &sections[index].name;
            let mut cut = sections.clone();
            cut[index].payload.pop();
            assert!(destination.load_machine_state(&cut).is_err(), "{name} cut short");
            let mut long = sections.clone();
            long[index].payload.push(0);
            assert!(destination.load_machine_state(&long).is_err(), "{name} with one byte more");
            let mut newer = sections.clone();
            newer[index].version += 1;
            assert!(destination.load_machine_state(&newer).is_err(), "{name} of a newer version");
            let mut missing = sections.clone();
            missing.remove(index);
            assert!(destination.load_machine_state(&missing).is_err(), "{name} missing");
        }
        assert!(destination.resume().is_err(), "nothing was loaded");
        destination.load_machine_state(&sections).unwrap();
    }
}

#[test]
fn memory_above_the_32_bit_hole_is_there_and_tracked() {
    for guest in guests() {
        let vm = Vm::new(VmConfig { memory_bytes: (3 << 30) + (64 << 20), ..config(guest) });
        let vm = vm.unwrap();
        vm.start().unwrap();
        wait_for(&vm, "up", |now| now.running);
        let memory = vm.memory();
        let mut tracker = vm.dirty_trackers().unwrap().remove(0);
        tracker.start().unwrap();
        memory.set_tracking(true);
        memory.write((1 << 32) + 5 * PAGE_SIZE, b"host").unwrap();
        run_a_round(&vm);
        vm.pause().unwrap();
        let mut dirty = DirtyBitmap::new(&memory.layout());
        assert_eq!(tracker.collect(&mut dirty).unwrap(), Completeness::Complete);
        assert!(dirty.region(0).iter().any(|word| *word != 0));
        assert!(dirty.region(1).iter().all(|word| *word == 0), "the host's write is the host's");
        memory.take_dirty(&mut dirty);
        assert_eq!(dirty.region(1)[0], 1 << 5);
    }
}

#[test]
fn a_reset_asked_for_in_the_last_moment_is_performed_on_the_other_side() {
    for guest in guests() {
        let vm = Vm::new(config(guest)).unwrap();
        vm.start().unwrap();
        wait_for(&vm, "some time", |now| now.running && now.beats > 200);
        run_a_round(&vm);
        let moved = move_with(&vm, config(guest), |sections| {
            let machine = sections.iter_mut().find(|section| section.name == "machine").unwrap();
            assert_eq!(machine.payload[0], 0, "no reset is pending");
            machine.payload[0] = 1;
        });
        let before = moved.workload_counters().unwrap();
        moved.resume().unwrap();
        wait_for(&moved, "anew", |now| now.running && now.beats < before.beats);
        assert_eq!(run_a_round(&moved).errors, 0);
    }
}
