//! Client and server against each other over a real socket, with a compact device behind the server.

mod common;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use common::{PATIENCE, Ram, Served, memfd, open, options, serve, wait_until};
use vfio_migration::DeviceState::*;
use vfio_migration::precopy::PRECOPY_INFO_REINIT;
use vfio_migration::{
    DeviceError, DeviceState, DmaAccess, DmaBacking, DmaPermissions, DmaRange, IrqIndex,
    MigratableDevice, MmapArea, PciFunction, PrecopyInfo, RawPrecopyInfo, ReadOutcome, path,
};
use vfio_user::{Options, ServedDevice, Server, ServerOptions, VfioUserDevice, VfioUserMigration};
use vmm_sys_util::eventfd::EventFd;

const RW: DmaPermissions = DmaPermissions { read: true, write: true };

fn plain(set: impl FnOnce(&mut ServerOptions)) -> ServerOptions {
    let mut options = ServerOptions { dma_timeout: PATIENCE, ..ServerOptions::default() };
    set(&mut options);
    options
}

fn compat() -> ServerOptions {
    plain(|options| options.libvfio_user_compat = true)
}

fn migration(served: &Served) -> VfioUserMigration {
    open(served).migration().unwrap()
}

/// Reads until nothing now or the end; `piece` bytes at a time.
fn drain(device: &mut VfioUserMigration, piece: usize) -> (Vec<u8>, ReadOutcome) {
    let mut all = Vec::new();
    let mut buf = vec![0; piece];
    loop {
        match device.read(&mut buf).unwrap() {
            ReadOutcome::Data(count) => all.extend(&buf[..count]),
            other => return (all, other),
        }
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, DeviceError>) -> i32 {
    result.unwrap_err().errno().unwrap()
}

// ---------------------------------------------------------------- shape and regions

#[test]
fn the_shape_of_the_function_arrives_whole() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let info = pci.info();
    let original = served.device.pci();
    assert_eq!(info, original.info());
    assert!(info.reset);
    let areas = [0x1000, 0x3000].map(|offset| MmapArea { offset, size: 0x1000 });
    assert_eq!(info.regions[1].mmap, areas);
    assert!(pci.region_fd(0).is_none() && pci.region_fd(99).is_none());
}

#[test]
fn a_mapped_region_is_the_devices_own_memory() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let (fd, offset) = pci.region_fd(1).unwrap();
    let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    file.write_all_at(b"mapped", offset + 0x1000).unwrap();
    let mut got = [0; 6];
    pci.region_read(1, 0x1000, &mut got).unwrap();
    assert_eq!(&got, b"mapped");
    pci.region_write(1, 0x3000, b"called").unwrap();
    file.read_exact_at(&mut got, offset + 0x3000).unwrap();
    assert_eq!(&got, b"called");
}

#[test]
fn region_accesses_reach_the_device_and_never_leave_the_region() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let mut word = [0; 4];
    pci.region_write(0, 0x44, &[1, 2, 3, 4]).unwrap();
    pci.region_read(0, 0x44, &mut word).unwrap();
    assert_eq!(word, [1, 2, 3, 4]);
    for (region, offset) in [(0, 0xffd), (0, u64::MAX), (3, 0), (9, 0), (u32::MAX, 0)] {
        assert_eq!(errno(pci.region_read(region, offset, &mut word)), libc::EINVAL);
        assert_eq!(errno(pci.region_write(region, offset, &word)), libc::EINVAL);
    }
    assert_eq!(errno(pci.region_write(7, 4, &word)), libc::EPERM, "the device's own refusal");
}

#[test]
fn accesses_above_the_message_limit_are_cut_in_pieces() {
    let served = serve(plain(|options| options.max_data_xfer_bytes = 1000), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let pattern: Vec<u8> = (0..3500u32).map(|i| i as u8).collect();
    let mut got = vec![0; pattern.len()];
    pci.region_write(1, 0x100, &pattern).unwrap();
    pci.region_read(1, 0x100, &mut got).unwrap();
    assert_eq!(got, pattern);
}

// ---------------------------------------------------------------- interrupts

fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

/// Both kinds of server, and both ways to say "no fd": ours unwires, libvfio-user gets a dummy.
#[test]
fn eventfds_are_wired_beyond_one_messages_worth_and_unwired() {
    for options in [plain(|options| options.max_msg_fds = 7), compat()] {
        let served = serve(options, |_| {});
        let device = open(&served);
        let pci = device.pci();
        let eventfds: Vec<EventFd> = (0..20).map(|_| eventfd()).collect();
        let mut wires: Vec<_> = eventfds.iter().map(|fd| Some(borrow(fd))).collect();
        (wires[3], wires[4]) = (None, None);
        pci.set_irq_eventfds(IrqIndex::Msix, 10, &wires).unwrap();
        for vector in 0..100 {
            served.device.raise(IrqIndex::Msix, vector);
        }
        for (i, fd) in eventfds.iter().enumerate() {
            let expected = if matches!(i, 3 | 4) { None } else { Some(1) };
            assert_eq!(fd.read().ok(), expected, "vector {}", 10 + i);
        }

        pci.set_irq_eventfds(IrqIndex::Msix, 12, &[None]).unwrap();
        served.device.raise(IrqIndex::Msix, 12);
        assert!(eventfds[2].read().is_err(), "unwired");
        pci.set_irq_eventfds(IrqIndex::Msix, 0, &[]).unwrap();
        assert!(served.device.lock().eventfds.is_empty(), "the whole index");
    }
}

#[test]
fn vectors_are_masked_and_unmasked_and_bad_ones_refused() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let fd = eventfd();
    pci.set_irq_eventfds(IrqIndex::Intx, 0, &[Some(borrow(&fd))]).unwrap();
    pci.set_irq_masked(IrqIndex::Intx, 0, true).unwrap();
    served.device.raise(IrqIndex::Intx, 0);
    assert!(fd.read().is_err(), "masked");
    pci.set_irq_masked(IrqIndex::Intx, 0, false).unwrap();
    served.device.raise(IrqIndex::Intx, 0);
    assert_eq!(fd.read().unwrap(), 1);

    assert_eq!(errno(pci.set_irq_masked(IrqIndex::Intx, 1, true)), libc::EINVAL);
    let one = [Some(borrow(&fd))];
    assert_eq!(errno(pci.set_irq_eventfds(IrqIndex::Msi, 0, &one)), libc::EINVAL);
    assert_eq!(errno(pci.set_irq_eventfds(IrqIndex::Msix, 100, &one)), libc::EINVAL);
    assert_eq!(errno(pci.set_irq_eventfds(IrqIndex::Msix, 1, &[])), libc::EINVAL);
}

// ---------------------------------------------------------------- DMA

fn start_dma(pci: &dyn PciFunction, iova: u64, command: u32) -> i32 {
    pci.region_write(0, 0, &iova.to_le_bytes()).unwrap();
    pci.region_write(0, 8, &command.to_le_bytes()).unwrap();
    let mut result = [0; 4];
    pci.region_read(0, 0x0c, &mut result).unwrap();
    i32::from_le_bytes(result)
}

#[test]
fn dma_by_mapped_fd_shares_the_memory() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let ram = memfd(0x10000);
    ram.write_all_at(b"guest wrote this", 0x5000).unwrap();
    let fd = Arc::new(OwnedFd::from(ram.try_clone().unwrap()));
    pci.dma_map(0x10_0000, 0x8000, RW, DmaBacking::Fd { fd, offset: 0x4000 }).unwrap();
    assert_eq!(start_dma(&*pci, 0x10_0000, 1), 0);
    let mut got = [0; 16];
    ram.read_exact_at(&mut got, 0x4000).unwrap();
    assert_eq!(got, [0xd5; 16]);
    assert_eq!(start_dma(&*pci, 0x10_1000, 2), 0);
    pci.region_read(0, 0x20, &mut got).unwrap();
    assert_eq!(&got, b"guest wrote this");
}

/// DMA in the middle of a region write, whose reply comes only after it: over the twin socket, and over
/// the one socket there is without it.
#[test]
fn dma_by_messages_is_served_between_a_request_and_its_reply() {
    for (twin_offered, twin_asked) in [(true, true), (false, true), (true, false)] {
        let served = serve(plain(|options| options.twin_socket = twin_offered), |_| {});
        let options = Options { twin_socket: twin_asked, ..options() };
        let device = VfioUserDevice::open(&served.path, options).unwrap();
        let pci = device.pci();
        let ram = Ram::new(0x20_0000, 0x2000);
        ram.bytes.lock().unwrap()[0x1000..0x1010].copy_from_slice(b"guest wrote this");
        pci.dma_map(0x20_0000, 0x2000, RW, DmaBacking::Calls(ram.clone())).unwrap();
        assert_eq!(start_dma(&*pci, 0x20_0000, 1), 0);
        assert_eq!(ram.peek(0x20_0000, 16), [0xd5; 16]);
        assert_eq!(*ram.written.lock().unwrap(), [(0x20_0000, 16)], "the client sees the write");
        assert_eq!(start_dma(&*pci, 0x20_1000, 2), 0);
        let mut got = [0; 16];
        pci.region_read(0, 0x20, &mut got).unwrap();
        assert_eq!(&got, b"guest wrote this");
    }
}

#[test]
fn the_client_refuses_dma_outside_of_what_it_mapped() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let ram = Ram::new(0x1000, 0x3000);
    let read_only = DmaPermissions { read: true, write: false };
    pci.dma_map(0x1000, 0x1000, read_only, DmaBacking::Calls(ram.clone())).unwrap();
    // Past what the test device checks: straight to the client.
    let access = match &served.device.lock().mappings[&0x1000].2 {
        DmaBacking::Calls(access) => Arc::clone(access),
        other => panic!("{other:?}"),
    };
    let mut buf = [0; 16];
    assert!(access.dma_read(0x1ff0, &mut buf).is_ok());
    assert_eq!(errno(access.dma_read(0x1ff8, &mut buf)), libc::EFAULT);
    assert_eq!(errno(access.dma_read(0x8000, &mut buf)), libc::EFAULT);
    assert_eq!(errno(access.dma_write(0x1000, &buf)), libc::EACCES);
    pci.dma_unmap(0x1000, 0x1000).unwrap();
    assert_eq!(errno(access.dma_read(0x1000, &mut buf)), libc::EFAULT);
    assert!(ram.written.lock().unwrap().is_empty());
}

#[test]
fn large_dma_is_cut_in_messages_and_many_threads_may_do_it() {
    for twin_socket in [true, false] {
        let served = serve(
            plain(|options| {
                options.twin_socket = twin_socket;
                options.max_data_xfer_bytes = 4096;
            }),
            |_| {},
        );
        let device = open(&served);
        let pci = device.pci();
        let ram = Ram::new(0, 0x40000);
        pci.dma_map(0, 0x40000, RW, DmaBacking::Calls(ram.clone())).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let test_device = served.device.clone();
                scope.spawn(move || {
                    let base = thread * 0x10000;
                    let data: Vec<u8> = (0..0x10000u64).map(|i| (i * (thread + 1)) as u8).collect();
                    test_device.dma_write(base, &data).unwrap();
                    let mut back = vec![0; data.len()];
                    test_device.dma_read(base, &mut back).unwrap();
                    assert!(back == data);
                });
            }
            // Region accesses meanwhile.
            for i in 0..200u32 {
                pci.region_write(0, 0x100, &i.to_le_bytes()).unwrap();
                let mut got = [0; 4];
                pci.region_read(0, 0x100, &mut got).unwrap();
                assert_eq!(u32::from_le_bytes(got), i);
            }
        });
        assert!(ram.written.lock().unwrap().iter().all(|(_, len)| *len <= 4096));
    }
}

/// Mapping beyond the end of a file succeeds, and kills whoever touches it.
#[test]
fn a_file_that_is_shorter_than_its_mapping_is_refused() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let map = |offset, size| {
        let fd = Arc::new(OwnedFd::from(memfd(0x3000)));
        pci.dma_map(0, size, RW, DmaBacking::Fd { fd, offset })
    };
    for (offset, size) in [(0, 0x4000), (0x3000, 0x1000), (0x2000, 0x1001), (u64::MAX, 0x1000)] {
        assert_eq!(errno(map(offset, size)), libc::EINVAL, "{offset:#x} {size:#x}");
    }
    map(0x1000, 0x2000).unwrap();
}

#[test]
fn mappings_must_not_overlap_and_unmap_exactly() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let pci = device.pci();
    let ram: Arc<dyn DmaAccess> = Ram::new(0, 0x10000);
    let map = |iova, size| pci.dma_map(iova, size, RW, DmaBacking::Calls(Arc::clone(&ram)));
    map(0x1000, 0x2000).unwrap();
    map(0x3000, 0x1000).unwrap();
    for (iova, size) in [(0x1000, 0x2000), (0x2fff, 1), (0, 0x1001), (0, 0x10000)] {
        assert_eq!(errno(map(iova, size)), libc::EEXIST, "{iova:#x} {size:#x}");
    }
    assert_eq!(errno(map(0x8000, 0)), libc::EINVAL);
    assert_eq!(errno(pci.dma_unmap(0x1000, 0x1000)), libc::ENOENT);
    assert_eq!(errno(pci.dma_unmap(0x2000, 0x1000)), libc::ENOENT);
    pci.dma_unmap(0x1000, 0x2000).unwrap();
    map(0x2000, 0x1000).unwrap();
    let there: Vec<u64> = served.device.lock().mappings.keys().copied().collect();
    assert_eq!(there, [0x2000, 0x3000]);
}

/// A device that does DMA by messages inside of a state change, while more commands than one are queued
/// behind it on the same socket.
#[test]
fn dma_inside_a_state_change_finds_its_reply_behind_queued_commands() {
    let served = serve(plain(|options| options.twin_socket = false), |_| {});
    let device = open(&served);
    let mut engine = device.migration().unwrap();
    let pci = device.pci();
    let ram = Ram::new(0, 0x1000);
    pci.dma_map(0, 0x1000, RW, DmaBacking::Calls(ram.clone())).unwrap();
    served.device.lock().dma_in_set = Some(0x800);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for i in 0..50u32 {
                    pci.region_write(0, 0x200, &i.to_le_bytes()).unwrap();
                }
            });
        }
        for _ in 0..20 {
            engine.set_state(Stop).unwrap();
            engine.set_state(Running).unwrap();
        }
    });
    assert_eq!(ram.peek(0x800, 16), [0x5e; 16]);
    assert_eq!(ram.written.lock().unwrap().len(), 40);
}

// ---------------------------------------------------------------- states

/// F1 to F8 over the wire, for every pair and every set of flags: the device ends where the table says,
/// and a refused pair leaves it where it was.
#[test]
fn every_pair_of_states_behaves_as_the_table_says() {
    for (p2p, pre_copy) in [(true, true), (true, false), (false, true), (false, false)] {
        let served = serve(
            plain(|options| {
                options.p2p = p2p;
                options.pre_copy = pre_copy;
            }),
            |_| {},
        );
        let mut device = migration(&served);
        let flags = device.capabilities().flags;
        assert_eq!((flags.p2p(), flags.pre_copy()), (p2p, pre_copy));
        for from in DeviceState::ALL.into_iter().filter(|state| flags.has_state(*state)) {
            for to in DeviceState::ALL {
                if from == Error {
                    continue;
                }
                device.reset().unwrap();
                device.set_state(from).unwrap();
                if from == Resuming {
                    let image = [b'F', 1, 0, 0, 0, 42];
                    device.write(&image).unwrap();
                }
                match (path(from, to, flags), device.set_state(to)) {
                    (Some(_), Ok(())) => assert_eq!(device.state().unwrap(), to),
                    (None, Err(DeviceError::Transition { target, state, errno })) => {
                        assert_eq!((target, state, errno), (to, Some(from), libc::EINVAL));
                    }
                    (expected, got) => panic!("{from} -> {to}: {expected:?}, {got:?}"),
                }
            }
        }
    }
}

#[test]
fn x10_after_a_failed_set_the_session_is_dropped() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    let mut buf = [0; 64];
    device.set_state(PreCopy).unwrap();
    assert!(matches!(device.read(&mut buf), Ok(ReadOutcome::Data(64))));
    served.device.lock().fail_set = Some((libc::EIO, PreCopy));
    let failed = device.set_state(StopCopy).unwrap_err();
    assert!(
        matches!(failed, DeviceError::Transition { state: Some(PreCopy), errno: libc::EIO, .. }),
        "F10: the state was asked for, {failed}"
    );
    assert_eq!(errno(device.read(&mut buf)), libc::ENODEV);
    assert_eq!(errno(device.precopy_info()), libc::ENODEV);
    // Moves inside of the saving group give no new session (X2).
    device.set_state(StopCopy).unwrap();
    assert_eq!(errno(device.read(&mut buf)), libc::ENODEV);
    device.set_state(Running).unwrap();
    device.set_state(PreCopy).unwrap();
    assert!(matches!(device.read(&mut buf), Ok(ReadOutcome::Data(64))));
}

#[test]
fn x9_a_reset_from_either_side_ends_the_session() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let mut engine = device.migration().unwrap();
    let mut buf = [0; 64];
    for through_function in [true, false] {
        engine.set_state(PreCopy).unwrap();
        assert!(matches!(engine.read(&mut buf), Ok(ReadOutcome::Data(_))));
        match through_function {
            true => device.pci().reset_function().unwrap(),
            false => engine.reset().unwrap(),
        }
        assert_eq!(errno(engine.read(&mut buf)), libc::ENODEV);
        assert_eq!(engine.state().unwrap(), Running);
    }
    assert_eq!(served.device.lock().resets, 2);
}

#[test]
fn x9_a_session_begun_beside_a_reset_is_dead_only_where_the_device_says_so() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let mut engine = device.migration().unwrap();
    let pci = device.pci();
    let mut buf = [0; 64];
    for round in 0..500 {
        std::thread::scope(|scope| {
            let reset = scope.spawn(|| pci.reset_function().unwrap());
            engine.set_state(Running).unwrap();
            engine.set_state(PreCopy).unwrap();
            reset.join().unwrap();
        });
        let read = engine.read(&mut buf);
        match engine.state().unwrap() {
            PreCopy => assert!(matches!(read, Ok(ReadOutcome::Data(_))), "{round}: {read:?}"),
            _ => assert_eq!(errno(read), libc::ENODEV, "{round}"),
        }
    }
}

#[test]
fn f14_loaded_data_is_validated_when_resuming_is_left() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    device.set_state(Resuming).unwrap();
    device.write(b"F\x08\0\0\0half").unwrap();
    let failed = device.set_state(Stop).unwrap_err();
    assert!(matches!(failed, DeviceError::Transition { state: Some(Error), .. }), "{failed}");
    assert_eq!(errno(device.set_state(Running)), libc::EINVAL, "F6");
    device.reset().unwrap();
    assert_eq!(device.state().unwrap(), Running);
}

// ---------------------------------------------------------------- the stream

/// A whole migration, with each kind of server, short reads and small writes of the device, and pieces
/// that do not fit the chunks.
#[test]
fn a_device_migrates_to_an_equal_one() {
    type Make = fn() -> ServerOptions;
    let servers: [(&str, Make); 4] = [
        ("own", || plain(|_| {})),
        ("own, one socket", || plain(|options| options.twin_socket = false)),
        ("own, small messages", || plain(|options| options.max_data_xfer_bytes = 3000)),
        ("libvfio-user", compat),
    ];
    for (name, options) in servers {
        for (read_max, piece) in [(usize::MAX, 1 << 20), (777, 50_001), (100_000, 10)] {
            let source = serve(options(), |inner| inner.read_max = read_max);
            let write_max = if name == "libvfio-user" { usize::MAX } else { 1234 };
            let target = serve(options(), |inner| {
                inner.write_max = write_max;
                inner.image.clear();
            });
            let (mut from, mut to) = (migration(&source), migration(&target));
            to.set_state(Resuming).unwrap();
            from.set_state(PreCopy).unwrap();
            let (initial, outcome) = drain(&mut from, piece);
            assert_eq!(outcome, ReadOutcome::NothingNow);
            source.device.lock().dirty(20_000);
            let (dirty, outcome) = drain(&mut from, piece);
            assert_eq!(outcome, ReadOutcome::NothingNow);
            source.device.lock().image.extend(b"changed at last");
            source.device.lock().dirty(30_000);
            from.set_state(StopCopy).unwrap();
            let (rest, outcome) = drain(&mut from, piece);
            assert_eq!(outcome, ReadOutcome::End);
            assert_eq!((initial.len(), dirty.len()), (5005, 20_005), "{name}");
            for data in [initial, dirty, rest] {
                for piece in data.chunks(piece) {
                    assert_eq!(to.write(piece).unwrap(), piece.len());
                }
            }
            to.set_state(Stop).unwrap();
            let (image, loaded) =
                (source.device.lock().image.clone(), target.device.lock().image.clone());
            assert!(image == loaded, "{name}, reads of at most {read_max}, pieces of {piece}");
            assert_eq!(from.state_digest().unwrap(), to.state_digest().unwrap());
            assert_eq!(from.state_digest().unwrap().is_some(), name != "libvfio-user");
        }
    }
}

#[test]
fn data_is_not_read_or_written_in_the_wrong_state() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    let mut buf = [0; 8];
    assert_eq!(errno(device.read(&mut buf)), libc::ENODEV);
    assert_eq!(errno(device.write(&buf)), libc::ENODEV);
    device.set_state(Resuming).unwrap();
    assert_eq!(errno(device.read(&mut buf)), libc::ENODEV);
}

/// A vCPU's access is not held up by more than the data reads that were asked for before it: while one
/// thread reads as fast as it can from a slow device, another's accesses all come in between.
#[test]
fn region_accesses_come_in_between_the_chunks_of_a_long_read() {
    let served = serve(plain(|_| {}), |inner| {
        inner.initial = vec![7; 4 << 20];
        inner.read_delay = Duration::from_millis(2);
    });
    let device = open(&served);
    let mut engine = device.migration().unwrap();
    engine.set_state(PreCopy).unwrap();
    let mut buf = vec![0; 4 << 20];
    let (done, is_done) = mpsc::channel();
    let (reads_before, accesses) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut left = (4 << 20) + 5;
            while left > 0 {
                let ReadOutcome::Data(count) = engine.read(&mut buf).unwrap() else { panic!() };
                left -= count;
            }
            done.send(()).unwrap();
        });
        let mut longest = 0;
        let mut accesses = 0;
        let pci = device.pci();
        while is_done.try_recv().is_err() {
            let before = served.device.lock().reads;
            pci.region_read(0, 0, &mut [0; 4]).unwrap();
            longest = longest.max(served.device.lock().reads - before);
            accesses += 1;
        }
        (longest, accesses)
    });
    // Two chunks may be under way before the access, and one more begin before it is counted here.
    assert!(reads_before <= 4, "{reads_before} reads came first");
    assert!(accesses >= 8, "{accesses}");
}

// ---------------------------------------------------------------- PRECOPY_INFO

fn v2(info: PrecopyInfo) -> (u64, u64, bool) {
    match info {
        PrecopyInfo::V2(info) => (info.initial_bytes, info.dirty_bytes, info.reinit),
        other => panic!("{other:?}"),
    }
}

#[test]
fn precopy_information_follows_the_stream() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    assert_eq!(errno(device.precopy_info()), libc::EINVAL, "P2: not in RUNNING");
    device.set_state(PreCopy).unwrap();
    assert_eq!(v2(device.precopy_info().unwrap()), (5005, 0, false));
    served.device.lock().dirty(95);
    device.read(&mut [0; 1000]).unwrap();
    assert_eq!(v2(device.precopy_info().unwrap()), (4005, 100, false));
    device.set_state(PreCopyP2p).unwrap();
    assert_eq!(v2(device.precopy_info().unwrap()), (4005, 100, false));
    device.set_state(StopCopy).unwrap();
    assert_eq!(errno(device.precopy_info()), libc::EINVAL, "P2: not in STOP_COPY");
    assert_eq!(device.stop_copy_length().unwrap(), 123_456);
}

#[test]
fn r3_without_the_opt_in_there_is_no_reinit() {
    let served = serve(plain(|options| options.reinit = false), |_| {});
    let mut device = migration(&served);
    let capabilities = device.capabilities();
    assert!(capabilities.precopy_info && !capabilities.precopy_info_v2);
    device.set_state(PreCopy).unwrap();
    served.device.lock().reconfigure(100);
    assert!(matches!(device.precopy_info().unwrap(), PrecopyInfo::V1(_)));
    // P6: what the caller sends may come back; REINIT that the caller did not send must not come.
    let raw = RawPrecopyInfo { flags: 0xff, ..RawPrecopyInfo::request() };
    assert_eq!(device.precopy_info_raw(raw).unwrap().flags, 0xff);
    let raw = device.precopy_info_raw(RawPrecopyInfo::request()).unwrap();
    assert_eq!(raw.flags, 0);
}

#[test]
fn r2_after_the_opt_in_input_flags_do_not_come_back() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    device.set_state(PreCopy).unwrap();
    let raw = RawPrecopyInfo { flags: u32::MAX, ..RawPrecopyInfo::request() };
    assert_eq!(device.precopy_info_raw(raw).unwrap().flags, 0);
    let short = RawPrecopyInfo { argsz: 23, ..RawPrecopyInfo::request() };
    assert_eq!(errno(device.precopy_info_raw(short)), libc::EINVAL, "P3");
}

/// R10 on the wire: the server repeats REINIT until it knows that the client has it.
#[test]
fn r10_reinit_stays_in_replies_until_acknowledged_or_data_is_read() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    device.set_state(PreCopy).unwrap();
    served.device.lock().reconfigure(300);
    let ask = |device: &mut VfioUserMigration, flags| {
        let request = RawPrecopyInfo { flags, ..RawPrecopyInfo::request() };
        device.precopy_info_raw(request).unwrap().flags
    };
    // A client that knows nothing of acknowledgements.
    for _ in 0..3 {
        assert_eq!(ask(&mut device, 0), PRECOPY_INFO_REINIT);
    }
    device.read(&mut [0; 8]).unwrap();
    assert_eq!(ask(&mut device, 0), 0, "the data read acknowledged it");
    // One that does.
    served.device.lock().reconfigure(400);
    assert_eq!(ask(&mut device, 0), PRECOPY_INFO_REINIT);
    assert_eq!(ask(&mut device, PRECOPY_INFO_REINIT), 0);
    assert_eq!(ask(&mut device, 0), 0);
    // Another edge in the same moment as the acknowledgement is news again.
    served.device.lock().reconfigure(500);
    assert_eq!(ask(&mut device, 0), PRECOPY_INFO_REINIT);
    served.device.lock().reconfigure(600);
    assert_eq!(ask(&mut device, PRECOPY_INFO_REINIT), PRECOPY_INFO_REINIT);
}

#[test]
fn r5_each_reinit_is_told_once_to_our_client() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    device.set_state(PreCopy).unwrap();
    for round in 0..3u64 {
        served.device.lock().reconfigure(1000);
        assert_eq!(v2(device.precopy_info().unwrap()), (5005 + 1005 * (round + 1), 0, true));
        assert!(!device.precopy_info().unwrap().reinit());
        assert!(!device.precopy_info().unwrap().reinit());
    }
    served.device.lock().reconfigure(1000);
    device.set_state(Running).unwrap();
    device.set_state(PreCopy).unwrap();
    assert!(!device.precopy_info().unwrap().reinit(), "it went with its session");
}

#[test]
fn a_reinit_is_not_lost_with_its_connection() {
    let served = serve(plain(|_| {}), |_| {});
    let mut device = migration(&served);
    device.set_state(PreCopy).unwrap();
    served.device.lock().reconfigure(300);
    // The reply that told it may never have arrived.
    let request = RawPrecopyInfo::request();
    assert_eq!(device.precopy_info_raw(request).unwrap().flags, PRECOPY_INFO_REINIT);
    drop(device);
    let mut device = migration(&served);
    assert_eq!(device.state().unwrap(), PreCopy, "the server keeps the device's state");
    assert!(device.precopy_info().unwrap().reinit());
    assert!(!device.precopy_info().unwrap().reinit());
    drop(device);
    // Nothing is pending at the server now; the client assumes it all the same.
    let mut device = migration(&served);
    assert!(device.precopy_info().unwrap().reinit());
    assert!(!device.precopy_info().unwrap().reinit());
}

// ---------------------------------------------------------------- features on and off

#[test]
fn hidden_features_are_unsupported_and_the_rest_works() {
    type Hide = fn(&mut ServerOptions);
    let hide: [(&str, Hide); 7] = [
        ("pre_copy", |options| options.pre_copy = false),
        ("p2p", |options| options.p2p = false),
        ("precopy_info", |options| options.precopy_info = false),
        ("reinit", |options| options.reinit = false),
        ("data_size", |options| options.data_size = false),
        ("dma_logging", |options| options.dma_logging = false),
        ("state_digest", |options| options.state_digest = false),
    ];
    for (hidden, set) in hide {
        let served = serve(plain(set), |_| {});
        let mut device = migration(&served);
        let have = device.capabilities();
        assert_eq!(have.flags.pre_copy(), hidden != "pre_copy", "{hidden}");
        assert_eq!(have.flags.p2p(), hidden != "p2p", "{hidden}");
        let info = !matches!(hidden, "pre_copy" | "precopy_info");
        assert_eq!(have.precopy_info, info, "{hidden}");
        assert_eq!(have.precopy_info_v2, info && hidden != "reinit", "{hidden}");
        assert_eq!(have.data_size, hidden != "data_size", "{hidden}");
        assert_eq!(have.dma_logging, hidden != "dma_logging", "{hidden}");
        assert!(have.reset_runs);
        assert_eq!(device.state_digest().unwrap().is_some(), hidden != "state_digest");
        assert_eq!(device.stop_copy_length().is_ok(), hidden != "data_size");
        device.set_state(StopCopy).unwrap();
        let (data, outcome) = drain(&mut device, 1 << 20);
        assert_eq!((data.len(), outcome), (100_005, ReadOutcome::End), "{hidden}");
    }
}

#[test]
fn a_server_without_migration_says_so() {
    for compat in [false, true] {
        let options = plain(|options| {
            options.migration = false;
            options.libvfio_user_compat = compat;
        });
        let served = serve(options, |_| {});
        let device = open(&served);
        let refused = device.migration().err().unwrap();
        assert!(matches!(refused, DeviceError::Unsupported { .. }), "{refused}");
        device.pci().region_write(0, 0x40, &[1; 4]).unwrap();
        device.pci().reset_function().unwrap();
    }
}

#[test]
fn a_libvfio_user_server_is_degraded_to_as_documented() {
    let served = serve(compat(), |_| {});
    let device = open(&served);
    let mut engine = device.migration().unwrap();
    let have = engine.capabilities();
    assert_eq!((have.flags.p2p(), have.flags.pre_copy()), (false, true));
    assert!(!have.precopy_info && !have.precopy_info_v2 && !have.data_size && !have.reset_runs);
    assert!(have.dma_logging);
    assert_eq!(have.max_write_bytes, Some(32_000));
    assert!(matches!(engine.precopy_info(), Err(DeviceError::Unsupported { .. })));
    assert!(matches!(engine.stop_copy_length(), Err(DeviceError::Unsupported { .. })));

    // The filter in STOP, and a reset that keeps the state.
    engine.set_state(Stop).unwrap();
    let pci = device.pci();
    let ram: Arc<dyn DmaAccess> = Ram::new(0, 0x1000);
    let map = |pci: &dyn PciFunction| pci.dma_map(0, 0x1000, RW, DmaBacking::Calls(ram.clone()));
    assert_eq!(errno(map(&*pci)), libc::EINVAL);
    assert_eq!(errno(engine.reset()), libc::EINVAL);
    pci.region_write(0, 0x40, &[1; 4]).unwrap();
    engine.set_state(PreCopy).unwrap();
    map(&*pci).unwrap();
    engine.reset().unwrap();
    assert_eq!(engine.state().unwrap(), PreCopy);
    assert_eq!(served.device.lock().resets, 1);
}

// ---------------------------------------------------------------- DMA logging

#[test]
fn dma_by_mapped_fd_is_logged_reported_once_and_cleared() {
    for options in [plain(|options| options.max_data_xfer_bytes = 64), compat()] {
        let compat = options.libvfio_user_compat;
        let served = serve(options, |_| {});
        let device = open(&served);
        let (pci, mut engine) = (device.pci(), device.migration().unwrap());
        let (base, size) = (0x10_0000, 4096 * 2000u64);
        let fd = Arc::new(OwnedFd::from(memfd(size)));
        pci.dma_map(base, size, RW, DmaBacking::Fd { fd, offset: 0 }).unwrap();
        let range = DmaRange { iova: base, length: size };
        assert_eq!(engine.start_dma_logging(&[range], 4096).unwrap(), 4096);
        let pages = [0, 1, 63, 64, 511, 512, 1000, 1999];
        for page in pages {
            served.device.dma_write(base + page * 4096, b"dirty").unwrap();
        }
        // L7: bits are added, none is cleared.
        let mut bitmap = vec![0; 32];
        bitmap[1] = 1 << 63;
        engine.report_dma_log(range, 4096, &mut bitmap).unwrap();
        let set: Vec<u64> =
            (0..2048).filter(|page| bitmap[*page as usize / 64] >> (page % 64) & 1 == 1).collect();
        assert_eq!(set, [0, 1, 63, 64, 127, 511, 512, 1000, 1999]);
        let mut again = vec![0; 32];
        engine.report_dma_log(range, 4096, &mut again).unwrap();
        assert!(again.iter().all(|word| *word == 0));

        assert!(engine.report_dma_log(range, 4096, &mut [0; 31]).is_err(), "bitmap too small");
        assert!(engine.report_dma_log(range, 4095, &mut bitmap).is_err());
        if !compat {
            // L3: the device's page size, not the wish.
            engine.stop_dma_logging().unwrap();
            assert_eq!(engine.start_dma_logging(&[range], 512).unwrap(), 4096);
            assert_eq!(errno(engine.start_dma_logging(&[range], 512)), libc::EINVAL, "L4");
        }
        engine.stop_dma_logging().unwrap();
        let late = engine.report_dma_log(range, 4096, &mut bitmap);
        assert_eq!(errno(late), libc::EINVAL, "L8");
        assert_eq!(errno(engine.start_dma_logging(&[], 4096)), libc::EINVAL, "L1");
    }
}

/// L11: what is mapped after START has no log. Calling it clean would lose its pages.
#[test]
fn l9_a_report_of_memory_that_is_not_logged_is_refused() {
    let served = serve(plain(|_| {}), |_| {});
    let device = open(&served);
    let (pci, mut engine) = (device.pci(), device.migration().unwrap());
    let map = |iova| {
        let fd = Arc::new(OwnedFd::from(memfd(0x1_0000)));
        pci.dma_map(iova, 0x1_0000, RW, DmaBacking::Fd { fd, offset: 0 }).unwrap();
    };
    map(0);
    map(0x1_0000);
    let ranges = [0u64, 0x1_0000].map(|iova| DmaRange { iova, length: 0x1_0000 });
    engine.start_dma_logging(&ranges, 4096).unwrap();
    let mut bitmap = [0; 2];
    let whole = DmaRange { iova: 0, length: 0x4_0000 };
    engine.report_dma_log(whole, 4096, &mut bitmap).unwrap();
    map(0x2_0000);
    assert_eq!(errno(engine.report_dma_log(whole, 4096, &mut bitmap)), libc::EINVAL);
    let old = DmaRange { iova: 0x8000, length: 0x1_0000 };
    engine.report_dma_log(old, 4096, &mut bitmap).unwrap();
}

/// A report over memory with holes and with a mapping that the server reaches by messages: libvfio-user
/// would refuse it in one piece.
#[test]
fn reports_to_a_foreign_server_are_cut_at_its_mappings() {
    let served = serve(compat(), |_| {});
    let device = open(&served);
    let (pci, mut engine) = (device.pci(), device.migration().unwrap());
    for (iova, pages) in [(0x10_0000u64, 10u64), (0x20_0000, 5)] {
        let fd = Arc::new(OwnedFd::from(memfd(pages * 4096)));
        pci.dma_map(iova, pages * 4096, RW, DmaBacking::Fd { fd, offset: 0 }).unwrap();
    }
    let ram = Ram::new(0x18_0000, 0x1000);
    pci.dma_map(0x18_0000, 0x1000, RW, DmaBacking::Calls(ram.clone())).unwrap();
    let range = DmaRange { iova: 0x10_0000, length: 0x20_0000 };
    engine.start_dma_logging(&[range], 4096).unwrap();
    for iova in [0x10_3000, 0x18_0000, 0x20_4000] {
        served.device.dma_write(iova, b"dirty").unwrap();
    }
    let mut bitmap = vec![0u64; 8];
    engine.report_dma_log(range, 4096, &mut bitmap).unwrap();
    let bit = |iova: u64| 1u64 << ((iova - 0x10_0000) / 4096 % 64);
    assert_eq!(bitmap, [bit(0x10_3000), 0, 0, 0, bit(0x20_4000), 0, 0, 0]);
    assert_eq!(*ram.written.lock().unwrap(), [(0x18_0000, 5)], "that one the client saw itself");
    // Not from the start of a mapping: refused, and the caller treats all memory as dirty (L9).
    let middle = DmaRange { iova: 0x10_2000, length: 0x2000 };
    assert_eq!(errno(engine.report_dma_log(middle, 4096, &mut bitmap)), libc::EOPNOTSUPP);
}

// ---------------------------------------------------------------- connections

#[test]
fn a_disconnect_takes_memory_interrupts_and_log_and_leaves_the_state() {
    let served = serve(plain(|_| {}), |_| {});
    {
        let device = open(&served);
        let (pci, mut engine) = (device.pci(), device.migration().unwrap());
        let fd = Arc::new(OwnedFd::from(memfd(0x1000)));
        pci.dma_map(0, 0x1000, RW, DmaBacking::Fd { fd, offset: 0 }).unwrap();
        let ram = Ram::new(0x1000, 0x1000);
        pci.dma_map(0x1000, 0x1000, RW, DmaBacking::Calls(ram)).unwrap();
        let irq = eventfd();
        pci.set_irq_eventfds(IrqIndex::Msix, 5, &[Some(borrow(&irq))]).unwrap();
        engine.start_dma_logging(&[DmaRange { iova: 0, length: 0x1000 }], 4096).unwrap();
        pci.region_write(0, 0x40, b"kept").unwrap();
        engine.set_state(Stop).unwrap();
    }
    let device = open(&served);
    let mut engine = device.migration().unwrap();
    {
        let inner = served.device.lock();
        assert!(inner.mappings.is_empty() && inner.eventfds.is_empty());
        assert!(inner.logging.is_none());
    }
    assert_eq!(engine.state().unwrap(), Stop);
    let mut kept = [0; 4];
    device.pci().region_read(0, 0x40, &mut kept).unwrap();
    assert_eq!(&kept, b"kept");
}

#[test]
fn a_second_client_waits_for_its_turn() {
    let served = serve(plain(|_| {}), |_| {});
    let first = open(&served);
    let path = served.path.clone();
    let second = std::thread::spawn(move || VfioUserDevice::open(&path, options()).unwrap());
    first.pci().region_write(0, 0x40, b"1st!").unwrap();
    assert!(!second.is_finished());
    drop(first);
    let mut got = [0; 4];
    second.join().unwrap().pci().region_read(0, 0x40, &mut got).unwrap();
    assert_eq!(&got, b"1st!");
}

#[test]
fn when_the_server_is_gone_every_call_says_so_and_the_callback_is_called_once() {
    let served = serve(plain(|_| {}), |_| {});
    let (tell, told) = mpsc::channel();
    let on_loss = Arc::new(move |reason: &str| tell.send(reason.to_string()).unwrap());
    let options = Options { on_loss: Some(on_loss), ..options() };
    let device = VfioUserDevice::open(&served.path, options).unwrap();
    let (pci, mut engine) = (device.pci(), device.migration().unwrap());
    let ram = Ram::new(0, 0x1000);
    pci.dma_map(0, 0x1000, RW, DmaBacking::Calls(ram)).unwrap();
    assert_eq!(device.connection_lost(), None);
    served.server.stop().unwrap();
    let reason = told.recv_timeout(PATIENCE).unwrap();
    assert!(reason.contains("closed"), "{reason}");
    assert_eq!(device.connection_lost(), Some(reason));
    let gone = |result: Result<(), DeviceError>| assert!(result.unwrap_err().is_gone());
    gone(pci.region_read(0, 0, &mut [0; 4]));
    gone(pci.region_write(0, 0, &[0; 4]));
    gone(pci.set_irq_masked(IrqIndex::Intx, 0, true));
    gone(pci.dma_unmap(0, 0x1000));
    gone(pci.reset_function());
    gone(engine.state().map(drop));
    gone(engine.set_state(Stop));
    gone(engine.read(&mut [0; 4]).map(drop));
    gone(engine.reset());
    gone(engine.state_digest().map(drop));
    drop((pci, engine, device));
    assert!(told.try_recv().is_err(), "once");
}

#[test]
fn disconnecting_frees_a_caller_that_waits_and_calls_no_callback() {
    let served = serve(plain(|_| {}), |inner| inner.read_delay = Duration::from_millis(200));
    let (tell, told) = mpsc::channel();
    let on_loss = Arc::new(move |reason: &str| tell.send(reason.to_string()).unwrap());
    let options = Options { on_loss: Some(on_loss), ..options() };
    let device = VfioUserDevice::open(&served.path, options).unwrap();
    let mut engine = device.migration().unwrap();
    engine.set_state(PreCopy).unwrap();
    let waiting = std::thread::spawn(move || {
        let mut buf = vec![0; 1 << 20];
        loop {
            if let Err(error) = engine.read(&mut buf) {
                return error;
            }
        }
    });
    wait_until("a read is under way", || served.device.lock().reads > 0);
    device.disconnect();
    assert!(waiting.join().unwrap().is_gone());
    assert!(told.try_recv().is_err());
}

#[test]
fn a_server_stops_cleanly_and_gives_its_device_back() {
    let (_dir, path) = common::socket();
    let device = common::device::TestDevice::new();
    let served =
        ServedDevice { migration: Some(Box::new(device.migration())), pci: Arc::new(device.pci()) };
    let server = Server::bind(&path, plain(|_| {})).unwrap();
    // A live socket is not taken over, a stale one is.
    assert!(Server::bind(&path, plain(|_| {})).is_err());
    let server = server.spawn(served).unwrap();
    let client = VfioUserDevice::open(&path, options()).unwrap();
    client.pci().region_write(0, 0x40, b"kept").unwrap();
    let mut served = server.stop().unwrap();
    assert_eq!(served.migration.as_mut().unwrap().state().unwrap(), Running);
    assert!(!path.exists());
    wait_until("the client sees it", || client.connection_lost().is_some());

    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "stale");
    let server = Server::bind(&path, plain(|_| {})).unwrap().spawn(served).unwrap();
    let client = VfioUserDevice::open(&path, options()).unwrap();
    let mut got = [0; 4];
    client.pci().region_read(0, 0x40, &mut got).unwrap();
    assert_eq!(&got, b"kept");
    drop(server);
    std::fs::write(&path, "not a socket").unwrap();
    assert!(Server::bind(&path, plain(|_| {})).is_err());
}

#[test]
fn opening_nothing_names_the_path() {
    let (_dir, path) = common::socket();
    let error = VfioUserDevice::open(&path, options()).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}

#[test]
fn fds_are_not_leaked_over_connections() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    // Other tests run in this process: only a leak of many is one.
    let served = serve(plain(|_| {}), |_| {});
    drop(open(&served));
    let before = count();
    for _ in 0..200 {
        let device = open(&served);
        let fd = Arc::new(OwnedFd::from(memfd(0x1000)));
        device.pci().dma_map(0, 0x1000, RW, DmaBacking::Fd { fd: fd.clone(), offset: 0 }).unwrap();
        let wires = [Some(fd.as_fd()); 30];
        device.pci().set_irq_eventfds(IrqIndex::Msix, 0, &wires).unwrap();
    }
    assert!(count() < before + 200, "{} fds, {before} before", count());
}
