//! The state machine of a device (rules F, X, H, D7), with every set of features.

mod common;

use common::*;
use device_model::core::{Direction, Hop};
use device_model::{RawRead, regs};
use vfio_migration::DeviceState::{self, *};
use vfio_migration::{SessionEffect, path};

/// Brings a fresh device to `state`, if it has it.
fn device_in(state: DeviceState, p2p: bool, pre_copy: bool) -> Option<device_model::DeviceCore> {
    let mut core = core_with_flags(p2p, pre_copy);
    match state {
        Error => {
            core.quirks_mut().switch_on("fail-arc=stop-stop_copy:5:error:1").unwrap();
            core.set_state(StopCopy, 0).unwrap_err();
        }
        _ => {
            core.set_state(state, 0).ok()?;
        }
    }
    (core.state() == state).then_some(core)
}

#[test]
fn d7_a_device_opens_in_running() {
    assert_eq!(core().state(), Running);
}

#[test]
fn d1_d2_the_flags_are_one_of_the_four_sets() {
    for flags in ALL_FLAGS {
        let core = core_with_flags(flags.p2p(), flags.pre_copy());
        assert_eq!(core.capabilities().flags, flags);
        assert_eq!(core.capabilities().flags.as_raw() & 1, 1);
    }
}

#[test]
fn f1_to_f9_every_pair_with_every_feature_set() {
    for flags in ALL_FLAGS {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let Some(mut core) = device_in(from, flags.p2p(), flags.pre_copy()) else {
                    continue;
                };
                let context = format!("{from} -> {to} with {flags:?}");
                let result = core.set_state(to, 0);
                match path(from, to, flags) {
                    // RESUMING is left over STOP, where nothing was loaded (F14).
                    Some(hops) if from == Resuming && to != Resuming => {
                        assert_eq!(hops[0], Stop);
                        assert_eq!(errno(result), libc::EINVAL, "{context}");
                        assert_eq!(core.state(), Resuming, "{context}");
                    }
                    Some(_) => {
                        result.unwrap_or_else(|error| panic!("{context}: {error}"));
                        assert_eq!(core.state(), to, "{context}");
                    }
                    None => {
                        assert_eq!(errno(result), libc::EINVAL, "{context}");
                        assert_eq!(core.state(), from, "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn f3_set_to_the_current_state_runs_no_arc() {
    for state in [Running, Stop, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p] {
        let mut core = device_in(state, true, true).unwrap();
        let before = core.session();
        let outcome = core.set_state(state, 0).unwrap();
        assert_eq!((outcome.session, outcome.took_ns), (None, 0));
        assert_eq!(core.session(), before);
    }
}

#[test]
fn f5_stop_copy_does_not_lead_back_to_precopy() {
    for target in [PreCopy, PreCopyP2p] {
        let mut core = device_in(StopCopy, true, true).unwrap();
        let session = core.session();
        assert_eq!(errno(core.set_state(target, 0)), libc::EINVAL);
        assert_eq!((core.state(), core.session()), (StopCopy, session));
    }
}

#[test]
fn f6_only_a_reset_leaves_error() {
    let mut core = device_in(Error, true, true).unwrap();
    for target in DeviceState::ALL {
        assert_eq!(errno(core.set_state(target, 0)), libc::EINVAL);
        assert_eq!(core.state(), Error);
    }
    core.reset().unwrap();
    assert_eq!(core.state(), Running);
    core.set_state(StopCopy, 0).unwrap();
}

#[test]
fn f10_f11_after_a_failed_arc_the_device_is_on_the_path_and_hands_out_nothing() {
    // (arc that fails, SET, where the device is afterwards)
    let cases = [
        ("running_p2p-stop", Running, StopCopy, RunningP2p),
        ("stop-stop_copy", Running, StopCopy, Stop),
        ("pre_copy-pre_copy_p2p", PreCopy, StopCopy, PreCopy),
        ("pre_copy_p2p-stop_copy", PreCopy, StopCopy, PreCopyP2p),
        ("running_p2p-running", Stop, Running, RunningP2p),
    ];
    for (arc, from, target, after) in cases {
        let mut core = device_in(from, true, true).unwrap();
        core.quirks_mut().switch_on(&format!("fail-arc={arc}:16:1")).unwrap();
        let error = core.set_state(target, 0).unwrap_err();
        assert_eq!(error.errno(), Some(16), "{arc}");
        assert_eq!(state_of(&error), Some(after), "{arc}");
        assert_eq!(core.state(), after, "{arc}");
        // It fails once; the next SET goes through.
        core.set_state(target, 0).unwrap();
    }
}

#[test]
fn f12_x1_only_the_four_arcs_hand_out_a_session() {
    let flags = ALL_FLAGS[3];
    for from in DeviceState::ALL {
        for to in DeviceState::ALL {
            let Some(mut core) = device_in(from, true, true) else { continue };
            let Some(hops) = path(from, to, flags).filter(|_| from != Resuming) else { continue };
            let mut at = from;
            for hop in hops {
                let taken = core.next_hop(to).unwrap().unwrap();
                assert_eq!((taken.from, taken.to), (at, hop));
                let session = core.take_hop(taken, 0).unwrap();
                let expected = match vfio_migration::arcs::session_effect(at, hop) {
                    SessionEffect::BeginsSaving => Some(Direction::Saving),
                    SessionEffect::BeginsResuming => Some(Direction::Resuming),
                    _ => None,
                };
                assert_eq!(session.map(|s| s.direction), expected, "{at} -> {hop}");
                // In the middle of a combination nothing begins.
                assert!(session.is_none() || hop == to, "{from} -> {to} at {hop}");
                at = hop;
            }
        }
    }
}

#[test]
fn f13_x2_moves_inside_the_saving_group_keep_session_and_data() {
    let mut core = core();
    let session = set(&mut core, PreCopy).unwrap();
    let mut first = [0; 100];
    assert_eq!(core.read(session, &mut first, 0).unwrap(), RawRead::Data(48));
    for state in [PreCopyP2p, PreCopy, PreCopyP2p, StopCopy] {
        assert_eq!(set(&mut core, state), None);
        assert_eq!(core.session(), Some(session));
        assert!(matches!(core.read(session, &mut first, 0).unwrap(), RawRead::Data(_)));
    }
}

#[test]
fn f14_resuming_is_aborted_only_by_reset() {
    let mut core = core();
    let session = set(&mut core, Resuming).unwrap();
    for target in [Running, RunningP2p, Stop, StopCopy, PreCopy] {
        assert_eq!(errno(core.set_state(target, 0)), libc::EINVAL);
        assert_eq!(core.state(), Resuming);
    }
    core.reset().unwrap();
    assert_eq!(core.state(), Running);
    assert_eq!(errno(core.write(session, &[0])), libc::ENODEV);
}

#[test]
fn x4_a_session_that_ended_is_enodev() {
    let ways: [&[DeviceState]; 4] = [
        &[PreCopy, Running],
        &[PreCopy, PreCopyP2p, RunningP2p],
        &[StopCopy, Stop],
        &[PreCopy, StopCopy, Resuming],
    ];
    for way in ways {
        let mut core = core();
        let session = set(&mut core, way[0]).unwrap();
        for state in &way[1..] {
            set(&mut core, *state);
        }
        assert_eq!(errno(core.read(session, &mut [0; 8], 0)), libc::ENODEV, "{way:?}");
    }
}

#[test]
fn x5_the_wrong_direction_is_ebadf() {
    let mut core = core();
    let saving = set(&mut core, StopCopy).unwrap();
    assert_eq!(errno(core.write(saving, &[0])), libc::EBADF);
    let resuming = set(&mut core, Resuming).unwrap();
    assert_eq!(errno(core.read(resuming, &mut [0], 0)), libc::EBADF);
}

#[test]
fn x9_after_a_reset_a_held_session_is_dead_and_a_new_one_is_another() {
    for reset_by_guest in [false, true] {
        let mut core = core();
        let held = set(&mut core, PreCopy).unwrap();
        if reset_by_guest {
            write_config(&mut core, 0x58, &0x8000u16.to_le_bytes());
        } else {
            core.reset().unwrap();
        }
        assert_eq!(core.state(), Running);
        assert_eq!(errno(core.read(held, &mut [0; 8], 0)), libc::ENODEV);
        let fresh = set(&mut core, PreCopy).unwrap();
        assert_ne!(fresh, held);
        assert_eq!(errno(core.read(held, &mut [0; 8], 0)), libc::ENODEV);
        assert!(matches!(core.read(fresh, &mut [0; 8], 0).unwrap(), RawRead::Data(8)));
    }
}

#[test]
fn x10_a_set_that_fails_into_error_kills_the_session() {
    let mut core = core_with(&["fail-arc=pre_copy_p2p-stop_copy:5:error"]);
    let session = set(&mut core, PreCopy).unwrap();
    let error = core.set_state(StopCopy, 0).unwrap_err();
    assert_eq!(state_of(&error), Some(Error));
    assert_eq!(errno(core.read(session, &mut [0; 8], 0)), libc::ENODEV);
}

#[test]
fn h1_background_dma_goes_on_in_p2p_states_and_h2_stops_where_it_cannot_be_told_apart() {
    for full_stop in [false, true] {
        let mut profile = profile();
        profile.precopy.p2p_stops_dma.value = full_stop;
        let mut ram = Ram::new(16);
        let mut core = worked(core_of(profile), &mut ram);
        poke(&mut core, regs::CONTROL, regs::CONTROL_DMA);
        for state in [RunningP2p, PreCopyP2p] {
            core.set_state(state, 0).unwrap();
            let before = ram.writes;
            core.advance(0, 1000, &mut ram);
            core.advance(10_000_000, 1000, &mut ram);
            let expected = if full_stop { 0 } else { 10 };
            assert_eq!(ram.writes - before, expected, "{state}");
        }
    }
}

#[test]
fn h3_stopped_states_write_no_memory_raise_no_interrupt_and_ignore_registers() {
    for state in [Stop, StopCopy, Resuming] {
        let mut ram = Ram::new(16);
        let mut core = worked(core(), &mut ram);
        poke(&mut core, regs::CONTROL, regs::CONTROL_DMA | regs::CONTROL_IRQ);
        core.set_state(state, 0).unwrap();
        let (digest, writes) = (core.digest(), ram.writes);
        poke_ram(&mut core, regs::DOORBELL, 3, &mut ram);
        poke_ram(&mut core, regs::CONFIG_GEN, 99, &mut ram);
        poke_ram(&mut core, regs::FILL_KIB, 64, &mut ram);
        core.set_wired(vfio_migration::IrqIndex::Msix, 2, true).unwrap();
        for now_ns in [0, 1_000_000_000] {
            core.advance(now_ns, 1000, &mut ram);
            assert_eq!(core.next_due_ns(now_ns), None);
        }
        assert_eq!(core.digest(), digest, "{state}");
        assert_eq!(ram.writes, writes, "{state}");
        assert!(core.take_fired().is_empty(), "{state}");
        // Configuration space answers and takes writes.
        write_config(&mut core, 4, &[0, 4]);
    }
}

#[test]
fn h5_reset_leads_to_running_from_every_state() {
    for state in DeviceState::ALL {
        let mut core = device_in(state, true, true).unwrap();
        core.reset().unwrap();
        assert_eq!((core.state(), core.session()), (Running, None));
    }
}

#[test]
fn h6_after_a_reset_bus_mastering_and_wiring_are_gone() {
    let mut ram = Ram::new(16);
    let mut core = worked(core(), &mut ram);
    core.set_wired(vfio_migration::IrqIndex::Msix, 0, true).unwrap();
    core.take_fired();
    core.reset().unwrap();
    assert_eq!(core.digest(), common::core().digest(), "power-on state");
    let before = ram.writes;
    for (register, value) in [(regs::CONTROL, 2), (regs::DMA_PAGES, 1), (regs::DOORBELL, 1)] {
        poke_ram(&mut core, register, value, &mut ram);
    }
    assert_eq!(ram.writes, before);
    assert_eq!(peek(&core, regs::STATUS) & regs::STATUS_DMA_FAILED, regs::STATUS_DMA_FAILED);
    assert_eq!(peek(&core, regs::RAISED), 1);
    assert!(core.take_fired().is_empty());
}

#[test]
fn reset_that_keeps_the_state_as_libvfio_user() {
    let mut core = core_with(&["reset-keeps-state"]);
    assert!(!core.capabilities().reset_runs);
    for state in [Stop, StopCopy] {
        core.set_state(state, 0).unwrap();
        assert_eq!(errno(core.reset()), libc::EINVAL);
        assert_eq!(core.state(), state);
    }
    core.set_state(PreCopy, 0).unwrap_err();
    core.set_state(Running, 0).unwrap();
    let session = set(&mut core, PreCopy).unwrap();
    let carried = drain(&mut core, session);
    poke(&mut core, regs::FILL_KIB, 8);
    core.reset().unwrap();
    assert_eq!((core.state(), core.session()), (PreCopy, Some(session)));
    let mut destination = common::core();
    finish_into(&mut core, session, carried, &mut destination).unwrap();
    assert_eq!(destination.digest(), core.digest());
}

#[test]
fn a_hop_from_a_state_that_was_left_meanwhile_is_refused() {
    let mut core = core();
    set(&mut core, PreCopy);
    let hop: Hop = core.next_hop(StopCopy).unwrap().unwrap();
    core.reset().unwrap();
    assert_eq!(errno(core.take_hop(hop, 0)), libc::EAGAIN);
    assert_eq!(core.state(), Running);
}

#[test]
fn stay_in_resuming_a_dwell_in_stop_costs_the_loaded_device_its_dma() {
    for dwell in [false, true] {
        let mut ram = Ram::new(16);
        let stream = whole_stream(&mut worked(core(), &mut ram));
        let mut core = core_with(&["stay-in-resuming"]);
        let session = set(&mut core, Resuming).unwrap();
        core.write(session, &stream).unwrap();
        if dwell {
            core.set_state(Stop, 0).unwrap();
        }
        core.set_state(Running, 0).unwrap();
        bus_master(&mut core);
        let before = ram.writes;
        poke_ram(&mut core, regs::DOORBELL, 1, &mut ram);
        assert_eq!(ram.writes - before, u64::from(!dwell));
    }
}
