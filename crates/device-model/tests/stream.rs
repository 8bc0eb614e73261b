//! The data stream (rules S and X): one stream, whole or refused.

mod common;

use common::*;
use device_model::{RawRead, regs};
use device_profile::{DirtyModel, ReinitPolicy};
use vfio_migration::DeviceState::{self, *};
use vfio_migration::IrqIndex;

#[test]
fn a_state_saved_and_loaded_has_the_same_digest_with_and_without_precopy() {
    for name in device_profile::BUILTIN_NAMES.iter().copied() {
        for precopy in [false, true] {
            let profile = device_model::Profile::builtin(name).unwrap().scaled_to(200 << 10);
            if precopy && !profile.features.pre_copy.value {
                continue;
            }
            let mut ram = Ram::new(16);
            let mut source = worked(core_of(profile.clone()), &mut ram);
            let mut destination = core_of(profile);
            assert_ne!(source.digest(), destination.digest());
            let first = if precopy { PreCopy } else { StopCopy };
            let session = set(&mut source, first).unwrap();
            let carried = drain(&mut source, session);
            if precopy {
                poke(&mut source, regs::FILL_KIB, 12);
                poke(&mut source, regs::SCRATCH, 5);
            }
            finish_into(&mut source, session, carried, &mut destination).unwrap();
            assert_eq!(destination.digest(), source.digest(), "{name}, precopy {precopy}");
            // And once more from there.
            let mut third =
                core_of(device_model::Profile::builtin(name).unwrap().scaled_to(200 << 10));
            load(&mut third, &whole_stream(&mut destination)).unwrap();
            assert_eq!(third.digest(), source.digest());
            destination.set_state(Running, 0).unwrap();
        }
    }
}

#[test]
fn equal_histories_have_equal_digests_whatever_was_migrated_meanwhile() {
    let (mut ram, mut other_ram) = (Ram::new(16), Ram::new(16));
    let one = worked(core(), &mut ram);
    let mut other = core();
    let session = set(&mut other, PreCopy).unwrap();
    drain(&mut other, session);
    let mut other = worked(other, &mut other_ram);
    other.opt_in_precopy_info_v2().unwrap();
    other.precopy_info(0).unwrap();
    drain(&mut other, session);
    other.set_state(Stop, 0).unwrap();
    other.set_state(PreCopy, 0).unwrap();
    assert_eq!(one.digest(), other.digest());
    poke(&mut other, regs::SCRATCH, 1);
    assert_ne!(one.digest(), other.digest());
}

#[test]
fn every_part_of_the_state_enters_the_digest() {
    let changes: [(u64, u32); 9] = [
        (regs::CONTROL, 1),
        (regs::CONFIG_KIB, 9),
        (regs::CONFIG_GEN, 1),
        (regs::DMA_LO, 0x1000),
        (regs::DMA_HI, 1),
        (regs::DMA_PAGES, 1),
        (regs::VECTOR, 1),
        (regs::FILL_KIB, 4),
        (regs::SCRATCH, 1),
    ];
    let fresh = core().digest();
    for (register, value) in changes {
        let mut core = core();
        poke(&mut core, register, value);
        assert_ne!(core.digest(), fresh, "register {register:#x}");
    }
    let mut pending = core();
    poke(&mut pending, regs::CONTROL, regs::CONTROL_IRQ);
    let before = pending.digest();
    poke(&mut pending, regs::DOORBELL, 0);
    assert_ne!(pending.digest(), before, "a pending interrupt");
}

#[test]
fn f8_resuming_leads_to_stop_copy_in_one_set_and_the_state_is_the_loaded_one() {
    let mut ram = Ram::new(16);
    let mut source = worked(core(), &mut ram);
    let stream = whole_stream(&mut source);
    let mut middle = core();
    let loading = set(&mut middle, Resuming).unwrap();
    middle.write(loading, &stream).unwrap();
    let session = set(&mut middle, StopCopy).unwrap();
    assert_ne!(session, loading);
    let mut last = core();
    load(&mut last, &drain(&mut middle, session)).unwrap();
    assert_eq!(last.digest(), source.digest());
}

#[test]
fn s1_the_temporary_end_is_enomsg_and_zero_by_quirk() {
    for (quirks, expected) in
        [(&[][..], RawRead::NoMessage), (&["zero-at-temporary-end"][..], RawRead::Zero)]
    {
        let mut core = core_with(quirks);
        let session = set(&mut core, PreCopy).unwrap();
        drain(&mut core, session);
        assert_eq!(core.read(session, &mut [0; 64], 0).unwrap(), expected);
        let info = core.precopy_info(0).unwrap();
        assert_eq!((info.initial_bytes(), info.dirty_bytes()), (0, 0));
        // More may come (S2).
        poke(&mut core, regs::FILL_KIB, 4);
        assert!(matches!(core.read(session, &mut [0; 64], 0).unwrap(), RawRead::Data(64)));
    }
}

#[test]
fn s3_the_end_of_stop_copy_is_zero_for_ever_and_never_enomsg() {
    let mut core = core();
    let session = set(&mut core, StopCopy).unwrap();
    drain(&mut core, session);
    for _ in 0..3 {
        assert_eq!(core.read(session, &mut [0; 64], 0).unwrap(), RawRead::Zero);
    }
}

#[test]
fn s4_data_of_precopy_that_was_not_read_comes_first_and_in_one_stream() {
    // Stopping after every possible number of bytes of the first record and some more.
    for read_first in (0..200).chain([70_000, 150_000]) {
        let mut source = core();
        let session = set(&mut source, PreCopy).unwrap();
        let mut carried = Vec::new();
        while carried.len() < read_first {
            let mut buf = vec![0; read_first - carried.len()];
            match source.read(session, &mut buf, 0).unwrap() {
                RawRead::Data(len) => carried.extend_from_slice(&buf[..len]),
                other => panic!("{other:?}"),
            }
        }
        source.set_state(PreCopyP2p, 0).unwrap();
        let mut destination = core();
        finish_into(&mut source, session, carried, &mut destination).unwrap();
        assert_eq!(destination.digest(), source.digest(), "after {read_first} bytes");
    }
}

#[test]
fn s5_stop_copy_carries_everything_whatever_precopy_info_said() {
    let mut source = core();
    source.opt_in_precopy_info_v2().unwrap();
    let session = set(&mut source, PreCopy).unwrap();
    let carried = drain(&mut source, session);
    reconfigure(&mut source, 5, 33);
    poke(&mut source, regs::FILL_KIB, 100);
    // Nobody asks, nobody reads: the rest carries it.
    let mut destination = core();
    finish_into(&mut source, session, carried, &mut destination).unwrap();
    assert_eq!(destination.digest(), source.digest());
    assert_eq!(peek(&destination, regs::CONFIG_ACK), 5);
}

#[test]
fn s8_short_reads_are_not_an_end() {
    let mut source = core_with(&["short-reads=1000"]);
    let session = set(&mut source, StopCopy).unwrap();
    let mut carried = Vec::new();
    let mut buf = vec![0; 1 << 20];
    while let RawRead::Data(len) = source.read(session, &mut buf, 0).unwrap() {
        assert!(len <= 1000);
        carried.extend_from_slice(&buf[..len]);
    }
    let mut destination = core();
    load(&mut destination, &carried).unwrap();
    assert_eq!(destination.digest(), source.digest());
}

#[test]
fn x6_write_segmentation_is_free() {
    let mut ram = Ram::new(16);
    let stream = whole_stream(&mut worked(core(), &mut ram));
    let mut whole = core();
    load(&mut whole, &stream).unwrap();
    for parts in [1, 31, 32, 33, 4096, 65_568, usize::MAX] {
        let part = &stream[..stream.len().min(200_000)];
        // One byte at a time is slow, so only the beginning of the stream is cut that fine.
        let (fine, rest) =
            if parts == 1 { stream.split_at(part.len()) } else { (&stream[..], &[][..]) };
        let mut destination = core();
        let session = set(&mut destination, Resuming).unwrap();
        for part in fine.chunks(parts) {
            destination.write(session, part).unwrap();
        }
        destination.write(session, rest).unwrap();
        set(&mut destination, Stop);
        assert_eq!(destination.digest(), whole.digest(), "in parts of {parts}");
    }
}

#[test]
fn x7_a_device_of_another_shape_refuses_and_names_both_values() {
    let stream = whole_stream(&mut core());
    let mut other = core_of(profile().scaled_to(2 << 20));
    let session = set(&mut other, Resuming).unwrap();
    assert_eq!(errno(other.write(session, &stream)), libc::EINVAL);
    assert_eq!(errno(other.set_state(Stop, 0)), libc::EINVAL);
}

#[test]
fn x8_every_truncation_fails_the_set() {
    let mut ram = Ram::new(16);
    let mut small = core_of(profile().scaled_to(24 << 10));
    small = worked(small, &mut ram);
    let stream = whole_stream(&mut small);
    let cuts =
        (0..64).chain((64..stream.len()).step_by(997)).chain(stream.len() - 64..stream.len());
    for cut in cuts {
        let mut destination = core_of(profile().scaled_to(24 << 10));
        assert_eq!(errno(load(&mut destination, &stream[..cut])), libc::EINVAL, "cut at {cut}");
        assert_eq!(destination.state(), Resuming);
    }
}

#[test]
fn x8_every_flipped_byte_is_found() {
    let mut small = core_of(profile().scaled_to(24 << 10));
    let stream = whole_stream(&mut small);
    for at in (0..256).chain((256..stream.len()).step_by(331)).chain([stream.len() - 1]) {
        let mut damaged = stream.clone();
        damaged[at] ^= 0x10;
        let mut destination = core_of(profile().scaled_to(24 << 10));
        let session = set(&mut destination, Resuming).unwrap();
        let _ = destination.write(session, &damaged);
        assert_eq!(errno(destination.set_state(Stop, 0)), libc::EINVAL, "flipped at {at}");
    }
}

#[test]
fn x8_records_left_out_repeated_or_swapped_are_found() {
    let mut small = core_of(profile().scaled_to(24 << 10));
    let stream = whole_stream(&mut small);
    let mut records = Vec::new();
    let mut at = 0;
    while at < stream.len() {
        let len = 32 + u32::from_le_bytes(stream[at + 24..at + 28].try_into().unwrap()) as usize;
        records.push(stream[at..at + len].to_vec());
        at += len;
    }
    assert!(records.len() > 5);
    let mut variants = Vec::new();
    for i in 0..records.len() {
        let mut without = records.clone();
        without.remove(i);
        let mut twice = records.clone();
        twice.insert(i, records[i].clone());
        variants.extend([without, twice]);
        if i > 0 {
            let mut swapped = records.clone();
            swapped.swap(i - 1, i);
            variants.push(swapped);
        }
    }
    for (i, variant) in variants.iter().enumerate() {
        let mut destination = core_of(profile().scaled_to(24 << 10));
        let result = load(&mut destination, &variant.concat());
        assert_eq!(errno(result), libc::EINVAL, "variant {i}");
    }
}

#[test]
fn x8_data_behind_the_end_is_refused_and_a_refused_session_takes_nothing_more() {
    let stream = whole_stream(&mut core());
    let mut destination = core();
    let session = set(&mut destination, Resuming).unwrap();
    destination.write(session, &stream).unwrap();
    assert_eq!(errno(destination.write(session, &[0])), libc::EINVAL);
    assert_eq!(errno(destination.write(session, &stream)), libc::EINVAL);
    assert_eq!(errno(destination.set_state(Stop, 0)), libc::EINVAL);
    // A reset, and the next session is as good as new.
    destination.reset().unwrap();
    load(&mut destination, &stream).unwrap();
}

#[test]
fn x8_bad_data_leads_to_error_where_the_device_is_of_that_kind() {
    let mut destination = core_with(&["bad-load-errors"]);
    let error = load(&mut destination, &[]).unwrap_err();
    assert_eq!((error.errno(), state_of(&error)), (Some(libc::EINVAL), Some(Error)));
}

#[test]
fn absurd_claims_are_refused_before_memory_is_taken() {
    let stream = whole_stream(&mut core());
    let header = &stream[..48];
    // A CONFIG record that claims 2^60 bytes: right checksum, wrong size.
    let mut record = Vec::new();
    record.extend_from_slice(&stream[..4]);
    record.extend_from_slice(&[2, 0, 0, 0]);
    record.extend_from_slice(&1u64.to_le_bytes());
    record.extend_from_slice(&(1u64 << 60).to_le_bytes());
    record.extend_from_slice(&4u32.to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&record);
    crc.update(&[0; 4]);
    record.extend_from_slice(&crc.finalize().to_le_bytes());
    record.extend_from_slice(&[0; 4]);
    let mut destination = core();
    let session = set(&mut destination, Resuming).unwrap();
    destination.write(session, header).unwrap();
    assert_eq!(errno(destination.write(session, &record)), libc::EINVAL);

    // A record that claims 4 GiB of payload.
    let mut long = stream[48..80].to_vec();
    long[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut destination = core();
    let session = set(&mut destination, Resuming).unwrap();
    destination.write(session, header).unwrap();
    assert_eq!(errno(destination.write(session, &long)), libc::EINVAL);
}

#[test]
fn a_pending_interrupt_travels_and_is_delivered_on_the_other_side() {
    let mut source = core();
    source.set_wired(IrqIndex::Msix, 1, true).unwrap();
    source.set_masked(IrqIndex::Msix, 1, true).unwrap();
    poke(&mut source, regs::CONTROL, regs::CONTROL_IRQ);
    poke(&mut source, regs::VECTOR, 1);
    poke(&mut source, regs::DOORBELL, 0);
    assert_eq!(source.pending().msix, 2);

    let mut destination = core();
    destination.set_wired(IrqIndex::Msix, 1, true).unwrap();
    load(&mut destination, &whole_stream(&mut source)).unwrap();
    assert_eq!(destination.digest(), source.digest());
    assert!(destination.take_fired().is_empty(), "stopped");
    destination.set_state(Running, 0).unwrap();
    assert_eq!(destination.take_fired().msix, 2);
    assert!(destination.take_fired().is_empty(), "once");

    // The negative control.
    let mut forgetful = core_with(&["lose-interrupts"]);
    poke(&mut forgetful, regs::CONTROL, regs::CONTROL_IRQ);
    poke(&mut forgetful, regs::DOORBELL, 0);
    let mut destination = core();
    load(&mut destination, &whole_stream(&mut forgetful)).unwrap();
    assert_ne!(destination.digest(), forgetful.digest());
}

#[test]
fn a_doorbell_that_is_not_served_travels() {
    let mut source = core();
    bus_master(&mut source);
    let mut ram = Ram::new(64);
    for (register, value) in [(regs::CONTROL, 2), (regs::DMA_PAGES, 64), (regs::DOORBELL, 3000)] {
        poke_ram(&mut source, register, value, &mut ram);
    }
    assert_eq!(peek(&source, regs::COMPLETED), 1024);
    assert_eq!(peek(&source, regs::RAISED), 0);
    let mut destination = core();
    load(&mut destination, &whole_stream(&mut source)).unwrap();
    bus_master(&mut destination);
    destination.set_state(Running, 0).unwrap();
    assert_eq!(destination.next_due_ns(5), Some(5));
    destination.advance(5, 10_000, &mut ram);
    assert_eq!((peek(&destination, regs::COMPLETED), peek(&destination, regs::RAISED)), (3000, 1));
    assert_eq!(destination.next_due_ns(5), None);
}

#[test]
fn a_corrupted_save_passes_the_checksums_and_shows_in_the_digest() {
    let mut source = core_with(&["corrupt-save"]);
    let mut destination = core();
    load(&mut destination, &whole_stream(&mut source)).unwrap();
    assert_ne!(destination.digest(), source.digest());
}

#[test]
fn loading_costs_its_allocation_once_per_session_and_by_the_byte() {
    let stream = whole_stream(&mut core());
    let profile = profile();
    let timing = device_model::Timing::of_profile(&profile);
    let options = device_model::core::CoreOptions {
        timing: timing.clone(),
        ..device_model::core::CoreOptions::new(profile)
    };
    let mut destination = device_model::DeviceCore::new(options).unwrap();
    let session = set(&mut destination, Resuming).unwrap();
    let took: u64 =
        stream.chunks(4096).map(|part| destination.write(session, part).unwrap().took_ns).sum();
    let per_byte = timing.load_ns(stream.len() as u64);
    assert!((timing.load_cold_ns..=timing.load_cold_ns + per_byte).contains(&took), "{took}");
    let outcome = destination.set_state(Running, 0).unwrap();
    assert_eq!(outcome.took_ns, timing.load_warm_ns + 2 * timing.to_running_ns);
}

#[test]
fn every_reinit_policy_and_dirty_model_ends_in_the_same_state() {
    let devices: [fn() -> device_model::DeviceCore; 6] = [
        || core_with_reinit(ReinitPolicy::Flush),
        || core_with_reinit(ReinitPolicy::Recount),
        || core_with_reinit(ReinitPolicy::Never),
        || core_with_dirty(DirtyModel::Reread),
        || core_with_dirty(DirtyModel::Never),
        || core_with(&["info-drives-device"]),
    ];
    for device in devices {
        for opt_in in [false, true] {
            let (mut source, mut destination) = (device(), device());
            if opt_in {
                source.opt_in_precopy_info_v2().unwrap();
            }
            let session = set(&mut source, PreCopy).unwrap();
            let mut carried = Vec::new();
            for round in 1..6 {
                let mut some = vec![0; 3000 * round as usize];
                if let RawRead::Data(len) = source.read(session, &mut some, 0).unwrap() {
                    carried.extend_from_slice(&some[..len]);
                }
                reconfigure(&mut source, round, 7 * round);
                poke(&mut source, regs::FILL_KIB, 24);
                source.precopy_info(u64::from(round) * 2_000_000_000).unwrap();
            }
            source.set_state(DeviceState::PreCopyP2p, 0).unwrap();
            source.precopy_info(0).unwrap();
            finish_into(&mut source, session, carried, &mut destination).unwrap();
            assert_eq!(destination.digest(), source.digest());
        }
    }
}
