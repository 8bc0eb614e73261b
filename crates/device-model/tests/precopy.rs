//! PRECOPY_INFO v1 and v2 (rules P and R), MIG_DATA_SIZE (rules Z).

mod common;

use common::*;
use device_model::quirks::SizeClaim;
use device_model::{DeviceCore, RawRead, Session, regs};
use device_profile::{DirtyModel, ReinitPolicy};
use vfio_migration::DeviceState::{self, *};
use vfio_migration::{PrecopyInfo, RawPrecopyInfo};

fn info(core: &mut DeviceCore) -> (u64, u64, bool) {
    let info = core.precopy_info(0).unwrap();
    (info.initial_bytes(), info.dirty_bytes(), info.reinit())
}

/// Reads exactly `bytes`, or to the temporary end.
fn read(core: &mut DeviceCore, session: Session, bytes: u64) -> u64 {
    let mut got = 0;
    while got < bytes {
        let mut buf = vec![0; (bytes - got).min(5000) as usize];
        match core.read(session, &mut buf, 0).unwrap() {
            RawRead::Data(len) => got += len as u64,
            _ => break,
        }
    }
    got
}

fn opted_in(mut core: DeviceCore) -> DeviceCore {
    core.opt_in_precopy_info_v2().unwrap();
    core
}

#[test]
fn p2_valid_in_the_precopy_states_alone() {
    for state in DeviceState::ALL.into_iter().filter(|state| *state != Error) {
        let mut core = core();
        core.set_state(state, 0).unwrap();
        match state.is_precopy() {
            true => assert!(core.precopy_info(0).is_ok(), "{state}"),
            false => assert_eq!(errno(core.precopy_info(0)), libc::EINVAL, "{state}"),
        }
    }
    // Also on a session that was in PRE_COPY before.
    let mut core = core();
    set(&mut core, PreCopy);
    set(&mut core, StopCopy);
    assert_eq!(errno(core.precopy_info(0)), libc::EINVAL);
}

#[test]
fn p3_a_short_argsz_is_einval() {
    let mut core = core();
    set(&mut core, PreCopy);
    let request = RawPrecopyInfo { argsz: 23, ..RawPrecopyInfo::request() };
    assert_eq!(errno(core.precopy_info_raw(request, 0)), libc::EINVAL);
}

#[test]
fn p4_initial_bytes_start_non_zero_never_grow_in_v1_and_fall_by_what_is_read() {
    for dirty in [DirtyModel::Tracked, DirtyModel::Reread, DirtyModel::Never] {
        let mut core = core_with_dirty(dirty);
        let session = set(&mut core, PreCopy).unwrap();
        let (mut initial, _, _) = info(&mut core);
        assert!(initial > 0);
        let mut generation = 0;
        while initial > 0 {
            let got = read(&mut core, session, 4001.min(initial));
            generation += 1;
            reconfigure(&mut core, generation, 64);
            poke(&mut core, regs::FILL_KIB, 8);
            let (now, _, _) = info(&mut core);
            assert_eq!(now, initial - got, "{dirty:?}");
            initial = now;
        }
        // What the guest reconfigured is not initial without the opt-in.
        reconfigure(&mut core, 99, 64);
        assert_eq!(info(&mut core).0, 0);
    }
}

#[test]
fn p5_dirty_bytes_start_at_zero_rise_with_fills_and_fall_with_reads() {
    let mut core = core();
    let session = set(&mut core, PreCopy).unwrap();
    let (initial, dirty, _) = info(&mut core);
    assert_eq!(dirty, 0);
    poke(&mut core, regs::FILL_KIB, 4);
    let (_, dirty, _) = info(&mut core);
    assert_eq!(dirty, 4096 + 32);
    read(&mut core, session, initial);
    let (initial, mut dirty, _) = info(&mut core);
    assert_eq!(initial, 0);
    assert!(dirty > 900_000, "the bulk is to be read now: {dirty}");
    while dirty > 0 {
        let got = read(&mut core, session, 50_000.min(dirty));
        let (_, now, _) = info(&mut core);
        assert_eq!(now, dirty - got);
        dirty = now;
    }
    assert_eq!(read(&mut core, session, 1), 0);
    poke(&mut core, regs::FILL_KIB, 128);
    // 32 blocks from the second one on: three groups.
    assert_eq!(info(&mut core).1, 32 * 4096 + 3 * 32);
}

#[test]
fn p6_p9_what_comes_back_is_the_callers_where_drivers_do_that() {
    let dirty_request = RawPrecopyInfo { argsz: 24, flags: 0x50, initial_bytes: 7, dirty_bytes: 8 };
    // (quirks, flags, dirty while initial is unread, initial once it is read)
    let cases: [(&[&str], u32, u64, u64); 3] =
        [(&[], 0, 0, 0), (&["caller-flags-back"], 0x50, 0, 0), (&["one-size-field"], 0, 8, 7)];
    for (quirks, flags, dirty, initial) in cases {
        let mut core = core_with(quirks);
        let session = set(&mut core, PreCopy).unwrap();
        let answer = core.precopy_info_raw(dirty_request, 0).unwrap();
        assert_eq!((answer.flags, answer.dirty_bytes), (flags, dirty), "{quirks:?}");
        assert!(answer.initial_bytes > 8);
        read(&mut core, session, answer.initial_bytes);
        let answer = core.precopy_info_raw(dirty_request, 0).unwrap();
        assert_eq!(answer.initial_bytes, initial, "{quirks:?}");
        assert!(answer.dirty_bytes > 8);
    }
}

#[test]
fn p7_the_stop_copy_part_is_in_neither_field() {
    let mut core = core();
    let session = set(&mut core, PreCopy).unwrap();
    drain(&mut core, session);
    assert_eq!(info(&mut core), (0, 0, false));
    let stop_only = profile().sizes.stop_only_bytes.typical;
    assert!(core.stop_copy_length().unwrap() > stop_only);
}

#[test]
fn p8_precopy_may_be_left_with_initial_data_unread() {
    let mut source = core();
    let session = set(&mut source, PreCopy).unwrap();
    assert!(info(&mut source).0 > 0);
    let mut destination = core();
    finish_into(&mut source, session, Vec::new(), &mut destination).unwrap();
    assert_eq!(source.digest(), destination.digest());
}

#[test]
fn r1_r8_the_opt_in_needs_precopy_and_lasts_until_close() {
    let mut without = core_with_flags(true, false);
    assert_eq!(errno(without.opt_in_precopy_info_v2()), libc::EINVAL);

    let mut core = opted_in(core());
    for state in [PreCopy, Running, Stop, Running] {
        core.set_state(state, 0).unwrap();
        assert!(core.capabilities().precopy_info_v2);
    }
    core.reset().unwrap();
    assert!(core.capabilities().precopy_info_v2);
    core.close();
    assert!(!core.capabilities().precopy_info_v2);
}

#[test]
fn r2_input_flags_do_not_come_back_after_the_opt_in() {
    let mut core = opted_in(core_with(&["caller-flags-back"]));
    set(&mut core, PreCopy);
    let request = RawPrecopyInfo { flags: u32::MAX, ..RawPrecopyInfo::request() };
    assert_eq!(core.precopy_info_raw(request, 0).unwrap().flags, 0);
}

#[test]
fn r3_reinit_only_after_the_opt_in_and_r10_once() {
    for opt_in in [false, true] {
        let mut core = core();
        if opt_in {
            core = opted_in(core);
        }
        let session = set(&mut core, PreCopy).unwrap();
        drain(&mut core, session);
        assert!(!info(&mut core).2);
        reconfigure(&mut core, 1, 16);
        let answers = [info(&mut core).2, info(&mut core).2];
        assert_eq!(answers, [opt_in, false]);
        assert!(matches!(
            (core.precopy_info(0).unwrap(), opt_in),
            (PrecopyInfo::V1(_), false) | (PrecopyInfo::V2(_), true)
        ));
    }
}

/// CONFIG record and data of `kib` KiB, as stream bytes.
fn config_stream_bytes(kib: u64) -> u64 {
    36 + kib * 1024 + (kib * 1024).div_ceil(65_536) * 32
}

#[test]
fn r4_reinit_takes_any_value_larger_or_smaller_and_dirty_restarts_from_zero() {
    for kib in [1, 200] {
        let mut core = opted_in(core_with_reinit(ReinitPolicy::Recount));
        let session = set(&mut core, PreCopy).unwrap();
        let (before, _, _) = info(&mut core);
        read(&mut core, session, before);
        assert!(info(&mut core).1 > 0);
        poke(&mut core, regs::FILL_KIB, 64);
        reconfigure(&mut core, 1, kib as u32);
        assert_eq!(info(&mut core), (config_stream_bytes(kib), 0, true));
        // Relative to the new initial data.
        poke(&mut core, regs::FILL_KIB, 4);
        assert_eq!(info(&mut core), (config_stream_bytes(kib), 4096 + 32, false));
    }
}

#[test]
fn r5_r6_then_it_falls_to_zero_as_it_is_read_and_comes_again_and_again() {
    for policy in [ReinitPolicy::Flush, ReinitPolicy::Recount] {
        let mut core = opted_in(core_with_reinit(policy));
        let session = set(&mut core, PreCopy).unwrap();
        for generation in 1..5 {
            drain(&mut core, session);
            assert_eq!(info(&mut core), (0, 0, false), "{policy:?}");
            reconfigure(&mut core, generation, 30);
            let (mut initial, dirty, reinit) = info(&mut core);
            assert!(reinit && initial > 30 << 10 && dirty == 0, "{policy:?}");
            while initial > 0 {
                let got = read(&mut core, session, 7000.min(initial));
                let (now, _, reinit) = info(&mut core);
                assert_eq!((now, reinit), (initial - got, false), "{policy:?}");
                initial = now;
            }
        }
    }
}

#[test]
fn r7_where_unread_dirty_bytes_are_flushed_the_value_covers_them() {
    let mut core = opted_in(core_with_reinit(ReinitPolicy::Flush));
    let session = set(&mut core, PreCopy).unwrap();
    let (initial, _, _) = info(&mut core);
    read(&mut core, session, initial + 1000);
    let (initial, dirty, _) = info(&mut core);
    assert_eq!(initial, 0);
    reconfigure(&mut core, 1, 16);
    assert_eq!(info(&mut core), (dirty + config_stream_bytes(16), 0, true));
    // Old data first, the new configuration last.
    read(&mut core, session, dirty);
    assert_eq!(info(&mut core), (config_stream_bytes(16), 0, false));
}

#[test]
fn r7_unread_initial_bytes_are_kept_by_flushing_and_dropped_by_recounting() {
    for (policy, kept) in [(ReinitPolicy::Flush, true), (ReinitPolicy::Recount, false)] {
        let mut core = opted_in(core_with_reinit(policy));
        reconfigure(&mut core, 1, 200);
        let session = set(&mut core, PreCopy).unwrap();
        // Into the second record of configuration data.
        let (initial, _, _) = info(&mut core);
        read(&mut core, session, 48 + 36 + 65_568 + 10);
        let (unread, _, _) = info(&mut core);
        assert_eq!(unread, initial - (48 + 36 + 65_568 + 10));
        reconfigure(&mut core, 2, 10);
        let (now, _, reinit) = info(&mut core);
        let rest_of_record = 65_568 - 10;
        let expected = config_stream_bytes(10) + if kept { unread } else { rest_of_record };
        assert_eq!((now, reinit), (expected, true), "{policy:?}");
    }
}

#[test]
fn a_guest_that_reconfigures_all_the_time_does_not_make_the_plan_grow() {
    for policy in [ReinitPolicy::Flush, ReinitPolicy::Recount, ReinitPolicy::Never] {
        let mut core = opted_in(core_with_reinit(policy));
        set(&mut core, PreCopy);
        for generation in 0..1000 {
            reconfigure(&mut core, generation, 100);
            poke(&mut core, regs::FILL_KIB, 16);
            info(&mut core);
        }
        let all = core.stop_copy_length().unwrap();
        assert!(all < 2 << 20, "{policy:?}: {all} bytes are planned of 1 MiB of state");
    }
}

#[test]
fn r9_with_the_guest_stopped_the_answer_is_stable() {
    let mut core = opted_in(core());
    let session = set(&mut core, PreCopy).unwrap();
    drain(&mut core, session);
    reconfigure(&mut core, 1, 64);
    let (initial, dirty, _) = info(&mut core);
    for _ in 0..3 {
        assert_eq!(info(&mut core), (initial, dirty, false));
    }
}

#[test]
fn reinit_in_pre_copy_p2p_where_the_device_can_and_not_where_it_is_like_mlx5() {
    for seen in [true, false] {
        let mut profile = profile();
        profile.precopy.reinit_in_p2p.value = seen;
        let mut core = opted_in(core_of(profile));
        let session = set(&mut core, PreCopy).unwrap();
        drain(&mut core, session);
        set(&mut core, PreCopyP2p);
        reconfigure(&mut core, 1, 8);
        assert_eq!(info(&mut core).2, seen);
        if !seen {
            assert_eq!(core.read(session, &mut [0; 8], 0).unwrap(), RawRead::NoMessage);
            set(&mut core, PreCopy);
            assert!(info(&mut core).2, "back in PRE_COPY it is told");
        }
    }
}

#[test]
fn a_drained_read_finds_the_new_initial_data_and_the_edge_is_told_afterwards() {
    let mut core = opted_in(core());
    let session = set(&mut core, PreCopy).unwrap();
    drain(&mut core, session);
    reconfigure(&mut core, 1, 8);
    // ENOMSG would have said that there is none.
    assert_eq!(read(&mut core, session, 36), 36);
    assert_eq!(info(&mut core), (config_stream_bytes(8) - 36, 0, true));
}

#[test]
fn info_drives_the_device_as_on_mlx5() {
    let mut core = core_with(&["info-drives-device"]);
    let session = set(&mut core, PreCopy).unwrap();
    let (initial, _, _) = info(&mut core);
    assert_eq!(read(&mut core, session, u64::MAX), initial);
    assert_eq!(read(&mut core, session, 1), 0, "nobody asked");
    let (_, dirty, _) = info(&mut core);
    assert!(dirty > 0);
    assert_eq!(read(&mut core, session, u64::MAX), dirty);
    poke(&mut core, regs::FILL_KIB, 4);
    assert_eq!(read(&mut core, session, 1), 0);
    assert_eq!(info(&mut core).1, 4096 + 32);
    assert_eq!(read(&mut core, session, u64::MAX), 4096 + 32);
}

#[test]
fn virtio_reads_everything_again_at_most_once_a_second() {
    let mut core = core_with_dirty(DirtyModel::Reread);
    let session = set(&mut core, PreCopy).unwrap();
    let first = drain(&mut core, session).len() as u64;
    let dirty = |core: &mut DeviceCore, now_ms: u64| {
        core.precopy_info(now_ms * 1_000_000).unwrap().dirty_bytes()
    };
    poke(&mut core, regs::FILL_KIB, 4);
    assert_eq!(dirty(&mut core, 900), 0);
    let again = dirty(&mut core, 1000);
    assert_eq!(again, first - 48, "all but the stream's header");
    assert_eq!(drain(&mut core, session).len() as u64, again);
    assert_eq!(dirty(&mut core, 1500), 0);
    assert_eq!(dirty(&mut core, 2000), again);
}

#[test]
fn qat_never_has_dirty_bytes() {
    let mut core = core_with_dirty(DirtyModel::Never);
    let session = set(&mut core, PreCopy).unwrap();
    let (initial, dirty, _) = info(&mut core);
    assert_eq!((drain(&mut core, session).len() as u64, dirty), (initial, 0));
    poke(&mut core, regs::FILL_KIB, 100);
    reconfigure(&mut core, 1, 8);
    assert_eq!(info(&mut core), (0, 0, false));
    assert!(core.stop_copy_length().unwrap() > 100 << 10);
}

#[test]
fn hidden_save_failure_shows_nothing_and_sends_the_full_image() {
    let mut source = core_with(&["hidden-save-failure"]);
    let session = set(&mut source, PreCopy).unwrap();
    let carried = drain(&mut source, session);
    poke(&mut source, regs::FILL_KIB, 64);
    assert_eq!(info(&mut source), (0, 0, false));
    let mut destination = core();
    finish_into(&mut source, session, carried, &mut destination).unwrap();
    assert_eq!(source.digest(), destination.digest());
}

#[test]
fn further_deviations_of_precopy_info() {
    let mut core = core_with(&["no-info-in-p2p"]);
    set(&mut core, PreCopy);
    assert!(core.precopy_info(0).is_ok());
    set(&mut core, PreCopyP2p);
    assert_eq!(errno(core.precopy_info(0)), libc::EINVAL);

    let mut core = core_with(&["info-fails"]);
    set(&mut core, PreCopy);
    assert_eq!(errno(core.precopy_info(0)), libc::EIO);

    let mut core = core_with(&["enomsg-forever"]);
    let session = set(&mut core, PreCopy).unwrap();
    assert!(info(&mut core).0 > 0);
    assert_eq!(core.read(session, &mut [0; 8], 0).unwrap(), RawRead::NoMessage);
    set(&mut core, StopCopy);
    assert!(matches!(core.read(session, &mut [0; 8], 0).unwrap(), RawRead::Data(8)));

    let mut core = opted_in(core_with(&["reinit-storm=3"]));
    let session = set(&mut core, PreCopy).unwrap();
    let mut reinits = 0;
    for _ in 0..30 {
        core.read(session, &mut [0; 1000], 0).unwrap();
        reinits += u64::from(info(&mut core).2);
    }
    assert_eq!(reinits, 10);
}

#[test]
fn z1_the_size_is_valid_in_every_state() {
    for state in DeviceState::ALL.into_iter().filter(|state| *state != Error) {
        let mut core = core();
        core.set_state(state, 0).unwrap();
        assert!(core.stop_copy_length().unwrap() > 1 << 20, "{state}");
    }
}

#[test]
fn z2_the_size_is_what_is_left_precopy_included() {
    let mut core = core();
    let whole = core.stop_copy_length().unwrap();
    let session = set(&mut core, PreCopy).unwrap();
    assert_eq!(core.stop_copy_length().unwrap(), whole);
    let carried = drain(&mut core, session).len() as u64;
    let left = core.stop_copy_length().unwrap();
    // The group at the border of the stop-only part costs a second record header.
    assert!((whole - carried..=whole - carried + 32).contains(&left), "{left}");
    set(&mut core, StopCopy);
    assert_eq!(core.stop_copy_length().unwrap(), left);
    assert_eq!(drain(&mut core, session).len() as u64, left);
    assert_eq!(core.stop_copy_length().unwrap(), 0);
}

#[test]
fn z2_the_size_without_precopy_is_the_stream() {
    let mut ram = Ram::new(16);
    let mut core = worked(core(), &mut ram);
    let claimed = core.stop_copy_length().unwrap();
    assert_eq!(whole_stream(&mut core).len() as u64, claimed);
}

#[test]
fn z3_the_size_may_be_garbage() {
    for (claim, low, high) in [
        (SizeClaim::Garbage, i64::MAX as u64 + 1, u64::MAX),
        (SizeClaim::Zero, 0, 0),
        (SizeClaim::Under, 100 << 10, 200 << 10),
    ] {
        let mut core = core();
        core.quirks_mut().size = claim;
        assert!((low..=high).contains(&core.stop_copy_length().unwrap()), "{claim:?}");
    }
    let mut core = core_with(&["size=fails"]);
    assert_eq!(errno(core.stop_copy_length()), libc::EIO);
}

#[test]
fn z4_asking_for_the_size_leaves_nothing_behind() {
    let mut core = core();
    let before = core.digest();
    core.stop_copy_length().unwrap();
    assert_eq!((core.state(), core.session(), core.digest()), (Running, None, before));
}

#[test]
fn grow_after_stop_adds_to_what_was_estimated() {
    let mut source = core_with(&["grow-after-stop=256"]);
    let session = set(&mut source, PreCopy).unwrap();
    let carried = drain(&mut source, session);
    let estimate = source.stop_copy_length().unwrap();
    set(&mut source, StopCopy);
    assert!(source.stop_copy_length().unwrap() >= estimate + (256 << 10));
    let mut destination = core();
    finish_into(&mut source, session, carried, &mut destination).unwrap();
    assert_eq!(source.digest(), destination.digest());
}
