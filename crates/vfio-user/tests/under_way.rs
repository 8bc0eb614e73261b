//! Reads and writes that stay under way between two calls: nothing is lost, reordered or called done too early.

mod common;

use std::time::Duration;

use common::{PATIENCE, Served, open, options, serve, wait_until};
use vfio_migration::DeviceState::*;
use vfio_migration::{DeviceError, DeviceResult, MigratableDevice, ReadOutcome};
use vfio_user::{Options, ServerOptions, VfioUserDevice, VfioUserMigration};

const PIECE: usize = 1 << 20;

fn server() -> ServerOptions {
    ServerOptions { dma_timeout: PATIENCE, ..ServerOptions::default() }
}

fn image(bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| ((i * i) >> 7) as u8).collect()
}

/// A device of `bytes`, served, in STOP_COPY.
fn stopped(bytes: usize, options: Options) -> (Served, VfioUserDevice, VfioUserMigration) {
    let served = serve(server(), |inner| inner.image = image(bytes));
    let device = VfioUserDevice::open(&served.path, options).unwrap();
    let mut engine = device.migration().unwrap();
    engine.set_state(StopCopy).unwrap();
    (served, device, engine)
}

/// The same, in RESUMING.
fn resuming() -> (Served, VfioUserDevice, VfioUserMigration) {
    let served = serve(server(), |_| {});
    let device = open(&served);
    let mut engine = device.migration().unwrap();
    engine.set_state(Resuming).unwrap();
    (served, device, engine)
}

/// What a device of that image says in STOP_COPY.
fn stream(bytes: usize) -> Vec<u8> {
    let mut stream = vec![b'F'];
    stream.extend((bytes as u32).to_le_bytes());
    stream.extend(image(bytes));
    stream
}

fn errno<T: std::fmt::Debug>(result: DeviceResult<T>) -> i32 {
    result.unwrap_err().errno().unwrap()
}

/// Reads ahead to the first answer that is no data.
fn read_on(engine: &mut VfioUserMigration, all: &mut Vec<u8>) -> DeviceResult<ReadOutcome> {
    let mut buf = vec![0; PIECE];
    loop {
        match engine.read_ahead(&mut buf)? {
            ReadOutcome::Data(count) => all.extend(&buf[..count]),
            other => return Ok(other),
        }
        assert_eq!(buf.len(), PIECE, "exchanged for one of the same length");
    }
}

// ---------------------------------------------------------------- reads

#[test]
fn one_read_stays_under_way_and_only_for_who_reads_ahead() {
    let (served, _device, mut engine) = stopped(8 * PIECE, options());
    let reads = || served.device.lock().reads;
    let mut buf = vec![0; PIECE];
    assert_eq!(engine.read(&mut buf).unwrap(), ReadOutcome::Data(PIECE));
    engine.state().unwrap();
    assert_eq!(reads(), 1, "read() asks for nothing more");
    assert_eq!(engine.read_ahead(&mut buf).unwrap(), ReadOutcome::Data(PIECE));
    wait_until("the next one is read", || reads() == 3);
    // The server works in order: whatever else was asked for would have been read before.
    engine.state().unwrap();
    assert_eq!(reads(), 3);
}

#[test]
fn nothing_is_read_ahead_while_the_guest_runs() {
    let served = serve(server(), |inner| inner.initial = vec![7; 3 * PIECE]);
    let mut engine = open(&served).migration().unwrap();
    engine.set_state(PreCopy).unwrap();
    let mut buf = vec![0; 1000];
    for reads in 1..4 {
        assert_eq!(engine.read_ahead(&mut buf).unwrap(), ReadOutcome::Data(1000));
        let unread = 5 + 3 * PIECE - reads * 1000;
        assert_eq!(engine.precopy_info().unwrap().initial_bytes(), unread as u64);
        assert_eq!(served.device.lock().reads, reads);
    }
}

#[test]
fn nothing_is_read_ahead_from_a_libvfio_user_server() {
    let options = ServerOptions { libvfio_user_compat: true, ..server() };
    let served = serve(options, |inner| inner.image = image(8 * PIECE));
    let mut engine = open(&served).migration().unwrap();
    engine.set_state(StopCopy).unwrap();
    engine.read_ahead(&mut vec![0; PIECE]).unwrap();
    engine.state().unwrap();
    assert_eq!(served.device.lock().reads, 1);
}

#[test]
fn s8_every_byte_comes_once_and_in_order_whoever_reads_it() {
    let bytes = 2 * PIECE + 12_345;
    // How much the device gives at once, how much a message carries, and the pieces, 0 for read() of 999.
    let cases: [(usize, usize, &[usize]); 7] = [
        (usize::MAX, PIECE, &[PIECE]),
        (70_001, PIECE, &[PIECE]),
        (usize::MAX, 4096, &[PIECE]),
        (3001, 4096, &[PIECE, PIECE, 0]),
        (usize::MAX, PIECE, &[PIECE, 0]),
        (usize::MAX, PIECE, &[PIECE, 5000, 0, 5000, 5000]),
        (70_001, 65_536, &[5000, 5000, PIECE, 300_000, 300_000]),
    ];
    for (case, (read_max, max_data_xfer_bytes, pieces)) in cases.into_iter().enumerate() {
        let (served, _device, mut engine) =
            stopped(bytes, Options { max_data_xfer_bytes, ..options() });
        served.device.lock().read_max = read_max;
        let (mut all, mut buffer): (Vec<u8>, Vec<u8>) = Default::default();
        for piece in pieces.iter().cycle() {
            let outcome = if *piece == 0 {
                buffer.resize(999, 0);
                engine.read(&mut buffer)
            } else {
                buffer.resize(*piece, 0);
                engine.read_ahead(&mut buffer)
            };
            match outcome.unwrap() {
                ReadOutcome::Data(count) => all.extend(&buffer[..count]),
                other => {
                    assert_eq!(other, ReadOutcome::End);
                    break;
                }
            }
        }
        assert!(all == stream(bytes), "case {case}: {} of {bytes} bytes", all.len());
        assert_eq!(engine.read_ahead(&mut buffer).unwrap(), ReadOutcome::End, "case {case}: again");
    }
}

#[test]
fn z_what_is_read_ahead_counts_as_to_be_read() {
    let (served, _device, mut engine) = stopped(8 * PIECE, options());
    let said = served.device.lock().stop_copy_length;
    assert_eq!(engine.stop_copy_length().unwrap(), said);
    let mut buf = vec![0; PIECE];
    engine.read_ahead(&mut buf).unwrap();
    assert_eq!(engine.stop_copy_length().unwrap(), said + PIECE as u64, "one is held");
    engine.read(&mut buf[..1000]).unwrap();
    assert_eq!(engine.stop_copy_length().unwrap(), said + PIECE as u64 - 1000);
}

#[test]
fn f3_setting_the_same_state_keeps_what_was_read_ahead() {
    let (_served, _device, mut engine) = stopped(4 * PIECE, options());
    let mut buf = vec![0; PIECE];
    engine.read_ahead(&mut buf).unwrap();
    let mut all = buf.clone();
    engine.set_state(StopCopy).unwrap();
    assert_eq!(read_on(&mut engine, &mut all).unwrap(), ReadOutcome::End);
    assert!(all == stream(4 * PIECE));
}

#[test]
fn a_session_that_ends_takes_what_was_read_ahead_with_it() {
    type End = fn(&VfioUserDevice, &mut VfioUserMigration);
    let ends: [(&str, End); 3] = [
        ("stop", |_, engine| engine.set_state(Stop).unwrap()),
        ("reset", |_, engine| engine.reset().unwrap()),
        ("the guest's reset", |device, _| device.pci().reset_function().unwrap()),
    ];
    for (what, end) in ends {
        let (served, device, mut engine) = stopped(4 * PIECE, options());
        served.device.lock().read_delay = Duration::from_millis(2);
        let mut buf = vec![0; PIECE];
        engine.read_ahead(&mut buf).unwrap();
        end(&device, &mut engine);
        assert_eq!(errno(engine.read_ahead(&mut buf)), libc::ENODEV, "{what}");
        assert_eq!(errno(engine.read(&mut buf)), libc::ENODEV, "{what}");
        engine.set_state(StopCopy).unwrap();
        let mut all = Vec::new();
        assert_eq!(read_on(&mut engine, &mut all).unwrap(), ReadOutcome::End, "{what}");
        assert!(all == stream(4 * PIECE), "{what}: from the beginning");
    }
}

#[test]
fn an_error_comes_behind_the_data_before_it_and_before_the_data_behind_it() {
    for number in 1..=5 {
        let (served, _device, mut engine) = stopped(8 * PIECE, options());
        served.device.lock().fail_read = Some((number, libc::EIO));
        let mut all = Vec::new();
        assert_eq!(errno(read_on(&mut engine, &mut all)), libc::EIO);
        assert_eq!(all.len(), (number - 1) * PIECE, "read {number}");
        // As if the next had been asked for now: the device lost nothing.
        assert_eq!(read_on(&mut engine, &mut all).unwrap(), ReadOutcome::End);
        assert!(all == stream(8 * PIECE), "read {number}");
    }
}

#[test]
fn s_data_behind_the_end_is_no_end() {
    let (served, _device, mut engine) = stopped(8 * PIECE, options());
    served.device.lock().false_end = Some(3);
    let error = read_on(&mut engine, &mut Vec::new()).unwrap_err();
    assert!(matches!(error, DeviceError::Protocol { .. }), "{error}");
    assert_eq!(errno(engine.read(&mut [0; 8])), libc::ENODEV, "its place in the stream is lost");
}

#[test]
fn a_read_that_takes_too_long_ends_the_session_with_all_that_were_under_way() {
    let limits = Options { data_timeout: Some(Duration::from_millis(20)), ..options() };
    let (served, _device, mut engine) = stopped(4 * PIECE, limits);
    served.device.lock().read_delay = Duration::from_millis(500);
    let mut buf = vec![0; PIECE];
    let error = engine.read_ahead(&mut buf).unwrap_err();
    assert!(matches!(error, DeviceError::TimedOut { .. }), "{error}");
    assert_eq!(errno(engine.read_ahead(&mut buf)), libc::ENODEV);
    served.device.lock().read_delay = Duration::ZERO;
    // Their answers come to nobody.
    engine.set_state(Stop).unwrap();
    assert_eq!(engine.state().unwrap(), Stop);
}

#[test]
fn when_the_server_goes_reads_and_writes_under_way_say_so() {
    let (served, _device, mut engine) = stopped(4 * PIECE, options());
    let mut buf = vec![0; PIECE];
    engine.read_ahead(&mut buf).unwrap();
    served.device.lock().read_delay = Duration::from_millis(300);
    drop(served.server);
    let mut all = Vec::new();
    let error = read_on(&mut engine, &mut all).unwrap_err();
    assert!(error.is_gone(), "{error}");

    let (served, _device, mut engine) = resuming();
    served.device.lock().write_delay = Duration::from_millis(300);
    engine.write_behind(&[1; 100]).unwrap();
    drop(served.server);
    let told = engine.settle().and_then(|()| engine.set_state(Stop));
    assert!(told.unwrap_err().is_gone());
}

// ---------------------------------------------------------------- writes

#[test]
fn a_write_counts_as_loaded_only_when_it_was_answered() {
    let (served, _device, mut engine) = resuming();
    served.device.lock().write_delay = Duration::from_millis(20);
    let loaded = || served.device.lock().loaded.len();
    assert_eq!(engine.write_behind(&[1; 1000]).unwrap(), 1000);
    assert_eq!(engine.unsettled_bytes(), 1000, "nobody has looked for the answer");
    for handed in (2000..=11_000).step_by(1000) {
        engine.write_behind(&[1; 1000]).unwrap();
        let unsettled = engine.unsettled_bytes() as usize;
        assert!((1000..=2000).contains(&unsettled), "{unsettled}: bounded");
        assert!(handed - unsettled <= loaded(), "no answer is taken for granted");
    }
    engine.settle().unwrap();
    assert_eq!((engine.unsettled_bytes(), loaded()), (0, 11_000));
    assert_eq!(engine.write(&[2; 500]).unwrap(), 500);
    assert_eq!((engine.unsettled_bytes(), loaded()), (0, 11_500), "write() waits");
}

#[test]
fn f14_a_state_change_waits_for_the_writes_before_it() {
    let bytes = 3 * PIECE;
    let (served, _device, mut engine) = resuming();
    served.device.lock().write_delay = Duration::from_millis(5);
    for piece in stream(bytes).chunks(PIECE) {
        engine.write_behind(piece).unwrap();
    }
    engine.set_state(Stop).unwrap();
    assert_eq!(engine.unsettled_bytes(), 0);
    assert!(served.device.lock().image == image(bytes));
}

#[test]
fn a_failed_write_is_told_by_the_next_call_whichever_it_is() {
    type Next = fn(&mut VfioUserMigration) -> DeviceResult<()>;
    let nexts: [(&str, Next); 4] = [
        ("settle", |engine| engine.settle()),
        ("write", |engine| engine.write(&[1; 10]).map(drop)),
        ("write_behind", |engine| {
            // The answer may not be there yet; then it is told when one too many is under way.
            (0..3).try_for_each(|_| engine.write_behind(&[1; 10]).map(drop))
        }),
        ("SET", |engine| engine.set_state(Stop)),
    ];
    for (what, next) in nexts {
        let (served, _device, mut engine) = resuming();
        served.device.lock().fail_write = Some((2, libc::ENOSPC));
        engine.write_behind(&[1; 10]).unwrap();
        engine.write_behind(&[1; 10]).unwrap();
        assert_eq!(errno(next(&mut engine)), libc::ENOSPC, "{what}");
        assert_eq!(engine.unsettled_bytes(), 0, "{what}");
        assert_eq!(engine.state().unwrap(), Resuming, "{what}: no SET was made");
        assert_eq!(errno(engine.write(&[1; 10])), libc::ENODEV, "{what}: the session is over");
        engine.settle().unwrap();
        engine.reset().unwrap();
        engine.set_state(Resuming).unwrap();
        engine.write(&stream(5)).unwrap();
        engine.set_state(Stop).unwrap();
    }
}

#[test]
fn x9_writes_that_a_reset_overtook_are_not_called_loaded() {
    let (served, device, mut engine) = resuming();
    served.device.lock().write_delay = Duration::from_millis(5);
    engine.write_behind(&[1; 10]).unwrap();
    device.pci().reset_function().unwrap();
    assert_eq!(errno(engine.settle()), libc::ENODEV);
    engine.set_state(Resuming).unwrap();
    engine.write_behind(&stream(5)).unwrap();
    engine.settle().unwrap();
    engine.write_behind(&[1; 10]).unwrap();
    engine.reset().unwrap();
    engine.settle().unwrap();
    assert_eq!(engine.unsettled_bytes(), 0, "who resets it himself knows");
}
