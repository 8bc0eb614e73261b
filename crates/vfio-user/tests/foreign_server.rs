//! The client against scripted servers: libvfio-user with its quirks, and servers that break the
//! protocol in every way the client could meet. Nothing here uses the crate's own codec on the
//! server's side.

mod common;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use common::raw::{
    self, DEVICE_GET_INFO, LIBVFIO_USER_CAPS, MIG_DATA_READ, MIG_DATA_WRITE, Msg, fake_server,
    play_libvfio_user, words,
};
use common::{PATIENCE, Ram, memfd, options, socket};
use vfio_migration::DeviceState::*;
use vfio_migration::{
    DeviceError, DmaBacking, DmaPermissions, IrqIndex, MigratableDevice, PrecopyInfo, ReadOutcome,
};
use vfio_user::{Options, VfioUserDevice, VfioUserError, VfioUserMigration};

const OWN_CAPS: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"migration":{"precopy_info":true,"reinit":true,"data_size":true,"whole_messages":true}}}"#;

fn open(path: &Path) -> VfioUserDevice {
    VfioUserDevice::open(path, options()).unwrap()
}

/// A reply to MIG_DATA_READ with `data`, padded with 0xee to `msg_bytes` of payload.
fn data_reply(ask: &Msg, data: &[u8], payload_bytes: usize) -> Msg {
    let mut payload = words(&[8 + data.len() as u32, data.len() as u32]);
    payload.extend(data);
    payload.resize(payload_bytes.max(payload.len()), 0xee);
    ask.reply(&payload)
}

/// A client in `state` on a scripted libvfio-user; `other` gets what is not a state or a feature.
fn libvfio_user(
    state: vfio_migration::DeviceState,
    mut other: impl FnMut(&mut UnixStream, &Msg) -> bool + Send + 'static,
) -> (tempfile::TempDir, VfioUserDevice, VfioUserMigration) {
    let (dir, path) = socket();
    fake_server(&path, LIBVFIO_USER_CAPS, move |stream| {
        play_libvfio_user(stream, |stream, msg, _| other(stream, msg));
    });
    let device = open(&path);
    let mut engine = device.migration().unwrap();
    engine.set_state(state).unwrap();
    (dir, device, engine)
}

// ---------------------------------------------------------------- libvfio-user's quirks

#[test]
fn s8_padded_and_short_replies_are_trusted_by_their_size_and_end_nothing() {
    // Reads as the device gives them; 0 is nothing now in PRE_COPY.
    let (dir, _device, mut engine) = {
        let mut sizes = [100, 7, 0, 4096, 1, 0].into_iter();
        libvfio_user(PreCopy, move |stream, ask| {
            assert_eq!(ask.command, MIG_DATA_READ);
            let asked = ask.word(4) as usize;
            assert!(ask.word(0) as usize >= 8 + asked, "libvfio-user checks argsz");
            let size = sizes.next().unwrap();
            data_reply(ask, &vec![size as u8; size], 8 + asked).send(stream);
            true
        })
    };
    let mut buf = vec![0; 10_000];
    for size in [100usize, 7] {
        assert_eq!(engine.read(&mut buf).unwrap(), ReadOutcome::Data(size));
        assert!(buf[..size].iter().all(|byte| *byte == size as u8));
    }
    assert_eq!(engine.read(&mut buf).unwrap(), ReadOutcome::NothingNow);
    assert_eq!(engine.read(&mut buf).unwrap(), ReadOutcome::Data(4096));
    engine.set_state(StopCopy).unwrap();
    assert_eq!(engine.read(&mut buf).unwrap(), ReadOutcome::Data(1));
    assert_eq!(engine.read(&mut buf).unwrap(), ReadOutcome::End, "only a size of 0 ends STOP_COPY");
    drop(dir);
}

#[test]
fn a_foreign_server_gets_no_write_above_32_000_bytes_and_one_at_a_time() {
    let (tell, told) = mpsc::channel();
    let (_dir, _device, mut engine) = libvfio_user(Resuming, move |stream, ask| {
        assert_eq!(ask.command, MIG_DATA_WRITE);
        tell.send(ask.payload.len() - 8).unwrap();
        // Nothing more may be on the socket before the reply.
        std::thread::sleep(Duration::from_millis(5));
        stream.set_nonblocking(true).unwrap();
        let early = std::io::Read::read(stream, &mut [0; 1]);
        assert_eq!(early.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        stream.set_nonblocking(false).unwrap();
        ask.reply(&[]).send(stream);
        true
    });
    assert_eq!(engine.write(&vec![1; 100_000]).unwrap(), 100_000);
    drop(engine);
    let sizes: Vec<usize> = told.try_iter().collect();
    assert_eq!(sizes, [32_000, 32_000, 32_000, 4000]);
}

#[test]
fn region_writes_to_a_foreign_server_are_small_and_its_fd_count_is_bounded() {
    let caps = r#"{"capabilities":{"max_msg_fds":100000}}"#;
    let (_dir, path) = socket();
    let (tell, told) = mpsc::channel();
    fake_server(&path, caps, move |mut stream| {
        while let Some(ask) = Msg::receive(&mut stream) {
            tell.send((ask.command, ask.payload.len())).unwrap();
            ask.reply(&ask.payload[..ask.payload.len().min(16)]).send(&mut stream);
        }
    });
    let device = open(&path);
    device.pci().region_write(0, 0, &vec![0; 70_000]).unwrap();
    let fd = memfd(4096);
    device.pci().set_irq_eventfds(IrqIndex::Msix, 0, &vec![Some(fd.as_fd()); 300]).unwrap();
    assert_eq!(device.connection_lost(), None);
    drop(device);
    let messages: Vec<_> = told.iter().collect();
    assert_eq!(messages, [(10, 32_016), (10, 32_016), (10, 6016), (8, 20), (8, 20)]);
}

#[test]
fn a_number_that_means_something_else_is_no_offer_of_precopy_information() {
    for number in [1, 13, 18, 0x8002] {
        let caps = format!(
            r#"{{"capabilities":{{"migration":{{"precopy_info":true,"precopy_info_command":{number}}}}}}}"#
        );
        let (_dir, path) = socket();
        fake_server(&path, caps.leak(), |stream| {
            play_libvfio_user(stream, |_, msg, _| panic!("{msg:?}"));
        });
        let mut engine = open(&path).migration().unwrap();
        engine.set_state(PreCopy).unwrap();
        assert!(!engine.capabilities().precopy_info, "{number}");
        assert!(engine.precopy_info().is_err(), "{number}");
    }
}

#[test]
fn an_error_reply_with_a_body_is_consumed_whole() {
    let (dir, path) = socket();
    fake_server(&path, LIBVFIO_USER_CAPS, |mut stream| {
        let mut refused = false;
        while let Some(msg) = Msg::receive(&mut stream) {
            let reply = match msg.word(4) {
                0x1_0001 => msg.reply(&words(&[16, 0x1_0001, 5, 0])),
                0x1_0002 => msg.reply(&words(&[16, 0x1_0002, 2, 0])),
                0x2_0002 if !refused => {
                    refused = true;
                    msg.refusal(libc::EINVAL, &msg.payload)
                }
                0x2_0002 => msg.reply(&msg.payload),
                _ => msg.refusal(libc::EINVAL, &[]),
            };
            reply.send(&mut stream);
        }
    });
    let mut engine = open(&path).migration().unwrap();
    assert!(!engine.capabilities().dma_logging, "every probe was refused");
    let failed = engine.set_state(Stop).unwrap_err();
    assert!(
        matches!(failed, DeviceError::Transition { state: Some(Running), errno: libc::EINVAL, .. }),
        "{failed}"
    );
    engine.set_state(Stop).unwrap();
    drop(dir);
}

#[test]
fn missing_features_are_unknown_and_not_zero() {
    let (_dir, _device, mut engine) = libvfio_user(PreCopy, |_, msg| panic!("{msg:?}"));
    assert!(matches!(engine.precopy_info(), Err(DeviceError::Unsupported { .. })));
    assert!(matches!(engine.stop_copy_length(), Err(DeviceError::Unsupported { .. })));
    assert!(matches!(engine.opt_in_precopy_info_v2(), Err(DeviceError::Unsupported { .. })));
    assert_eq!(engine.state_digest().unwrap(), None);
}

/// D6 and reference section 8, rule 2: what is announced is probed all the same, and EINVAL and ENOTTY
/// both say no.
#[test]
fn d6_announced_features_that_the_probe_denies_are_unsupported() {
    for errno in [libc::EINVAL, libc::ENOTTY] {
        let (dir, path) = socket();
        fake_server(&path, OWN_CAPS, move |stream| {
            let mut stream = stream;
            while let Some(msg) = Msg::receive(&mut stream) {
                let reply = match (msg.command, msg.word(4)) {
                    (16, 0x1_0001) => msg.reply(&words(&[16, 0x1_0001, 7, 0])),
                    (16, 0x1_0002) => msg.reply(&words(&[16, 0x1_0002, 6, 0])),
                    (0x8001, _) => {
                        assert_eq!(msg.payload, words(&[24, 0, 0, 0, 0, 0]), "P9: all zero");
                        msg.reply(&words(&[24, 1, 5, 0, 6, 0]))
                    }
                    _ => msg.refusal(errno, &[]),
                };
                reply.send(&mut stream);
            }
        });
        let mut engine = open(&path).migration().unwrap();
        let have = engine.capabilities();
        assert!(have.precopy_info && !have.precopy_info_v2 && !have.data_size);
        match engine.precopy_info().unwrap() {
            PrecopyInfo::V1(info) => assert_eq!((info.initial_bytes, info.dirty_bytes), (5, 6)),
            other => panic!("flags have no meaning without the opt-in: {other:?}"),
        }
        drop(dir);
    }
}

#[test]
fn the_precopy_information_command_has_the_announced_number() {
    let caps =
        r#"{"capabilities":{"migration":{"precopy_info":true,"precopy_info_command":40000}}}"#;
    let (dir, path) = socket();
    fake_server(&path, caps, |stream| {
        play_libvfio_user(stream, |stream, msg, _| {
            assert_eq!(msg.command, 40_000);
            msg.reply(&words(&[24, 0, 9, 0, 0, 0])).send(stream);
            true
        });
    });
    let mut engine = open(&path).migration().unwrap();
    engine.set_state(PreCopy).unwrap();
    assert_eq!(engine.precopy_info().unwrap().initial_bytes(), 9);
    drop(dir);
}

#[test]
fn flags_of_a_migration_that_is_none_are_refused() {
    for flags in [0, 2, 4, 8, 9, 0xf] {
        let (_dir, path) = socket();
        fake_server(&path, LIBVFIO_USER_CAPS, move |mut stream| {
            let ask = Msg::receive(&mut stream).unwrap();
            ask.reply(&words(&[16, 0x1_0001, flags, 0])).send(&mut stream);
        });
        let refused = open(&path).migration().err().unwrap();
        assert!(
            matches!(refused, DeviceError::Protocol { .. }),
            "D1, D2: flags {flags}: {refused}"
        );
    }
}

#[test]
fn f10_unknown_states_are_tolerated() {
    let (_dir, _device, mut engine) = {
        let (dir, path) = socket();
        fake_server(&path, LIBVFIO_USER_CAPS, |mut stream| {
            let mut state = 2;
            while let Some(msg) = Msg::receive(&mut stream) {
                let reply = match msg.word(4) {
                    0x1_0001 => msg.reply(&words(&[16, 0x1_0001, 5, 0])),
                    0x1_0002 => msg.reply(&words(&[16, 0x1_0002, state, 0])),
                    0x2_0002 if msg.word(8) == 3 => {
                        state = 42;
                        msg.refusal(libc::EIO, &[])
                    }
                    0x2_0002 => {
                        state = msg.word(8);
                        msg.reply(&msg.payload)
                    }
                    _ => msg.refusal(libc::EINVAL, &[]),
                };
                reply.send(&mut stream);
            }
        });
        let device = open(&path);
        let engine = device.migration().unwrap();
        (dir, device, engine)
    };
    let failed = engine.set_state(StopCopy).unwrap_err();
    assert!(matches!(failed, DeviceError::Transition { state: None, .. }), "{failed}");
    assert!(matches!(engine.state(), Err(DeviceError::Protocol { .. })));
    engine.set_state(Running).unwrap();
    assert_eq!(engine.state().unwrap(), Running);
}

// ---------------------------------------------------------------- between a request and its reply

#[test]
fn server_commands_between_a_request_and_its_reply_are_served_in_place() {
    let (dir, path) = socket();
    let (tell, told) = mpsc::channel();
    fake_server(&path, LIBVFIO_USER_CAPS, move |mut stream| {
        let map = Msg::receive(&mut stream).unwrap();
        assert_eq!((map.command, map.payload.len()), (2, 32));
        map.reply(&[]).send(&mut stream);
        let region = Msg::receive(&mut stream).unwrap();
        let mut answers = Vec::new();
        let mut ask = |command, payload: Vec<u8>| {
            // The server's ids are its own: the same as the client's is no clash.
            Msg::command(region.id, command, &payload).send(&mut stream);
            answers.push(Msg::receive(&mut stream).unwrap());
        };
        let mut write = words(&[0x1008, 0, 4, 0]);
        write.extend(b"DATA");
        ask(12, write);
        ask(11, words(&[0x1000, 0, 16, 0]));
        // Beyond the mapping, absurd, wrapping, short, and no command for a client.
        ask(11, words(&[0x1ff8, 0, 16, 0]));
        ask(11, words(&[0x1000, 0, u32::MAX, 0]));
        ask(11, words(&[0x1000, 0, u32::MAX, u32::MAX]));
        ask(11, words(&[u32::MAX, u32::MAX, 16, 0]));
        ask(11, words(&[0x1000, 0, 0, 0]));
        ask(12, words(&[0x1000, 0, 16, 0]));
        ask(12, words(&[0x1000]));
        ask(13, vec![]);
        ask(99, vec![0; 5000]);
        // Without a reply wished there is none: the next message is the answer to the one after.
        let mut silent = Msg::command(1, 11, &words(&[0x1000, 0, 16, 0]));
        silent.flags = 0x10;
        silent.send(&mut stream);
        let payload = words(&[0, 0, 0, 4, 0x1234]);
        region.reply(&payload).send(&mut stream);
        tell.send(answers).unwrap();
        assert_eq!(Msg::receive(&mut stream), None);
    });
    let device = open(&path);
    let pci = device.pci();
    let ram = Ram::new(0x1000, 0x1000);
    ram.bytes.lock().unwrap()[..8].copy_from_slice(b"guest...");
    let rw = DmaPermissions { read: true, write: true };
    pci.dma_map(0x1000, 0x1000, rw, DmaBacking::Calls(ram.clone())).unwrap();
    let mut word = [0; 4];
    pci.region_read(0, 0, &mut word).unwrap();
    assert_eq!(u32::from_ne_bytes(word), 0x1234);
    let answers = told.recv_timeout(PATIENCE).unwrap();
    assert_eq!((answers[0].flags, answers[0].payload.len()), (1, 16));
    assert_eq!(ram.peek(0x1008, 4), b"DATA");
    assert_eq!(answers[1].payload[16..], *b"guest...DATA\0\0\0\0");
    for answer in &answers[2..] {
        assert_eq!(answer.flags, 0x21, "{answer:?}");
        assert!(answer.errno > 0 && answer.payload.is_empty());
    }
    assert_eq!(*ram.written.lock().unwrap(), [(0x1008, 4)]);
    assert_eq!(device.connection_lost(), None);
    drop(dir);
}

#[test]
fn replies_find_their_requests_whatever_their_order() {
    let (dir, path) = socket();
    fake_server(&path, LIBVFIO_USER_CAPS, |mut stream| {
        for _ in 0..10 {
            let mut asked: Vec<Msg> = (0..8).map(|_| Msg::receive(&mut stream).unwrap()).collect();
            asked.reverse();
            for ask in asked {
                let mut payload = ask.payload.clone();
                payload.extend(ask.word(0).to_ne_bytes());
                ask.reply(&payload).send(&mut stream);
            }
        }
    });
    let device = open(&path);
    let pci = device.pci();
    std::thread::scope(|scope| {
        for thread in 0..8u32 {
            let pci = Arc::clone(&pci);
            scope.spawn(move || {
                for _ in 0..10 {
                    let mut word = [0; 4];
                    pci.region_read(0, u64::from(thread), &mut word).unwrap();
                    assert_eq!(u32::from_ne_bytes(word), thread);
                }
            });
        }
    });
    drop(dir);
}

// ---------------------------------------------------------------- servers that break the protocol

/// What a server does instead of replying to a region read ends the connection, the call fails with
/// `Gone`, and the reason says what happened.
#[test]
fn what_breaks_the_stream_ends_the_connection_with_a_reason() {
    type Misdeed = fn(&mut UnixStream, &Msg);
    let misdeeds: [(&str, Misdeed, &str); 11] = [
        ("death", |_, _| {}, "closed the connection"),
        (
            "death in the header",
            |s, ask| s.write_all(&ask.reply(&[]).bytes()[..9]).unwrap(),
            "inside of a message",
        ),
        (
            "death in the body",
            |s, ask| s.write_all(&ask.reply(&[0; 20]).bytes()[..30]).unwrap(),
            "inside of a message",
        ),
        ("a size of 3", |s, _| s.write_all(&size(3)).unwrap(), "smaller than the header"),
        ("a size of 4 GiB", |s, _| s.write_all(&size(u32::MAX)).unwrap(), "above the limit"),
        (
            "a size above the limit",
            |s, _| s.write_all(&size((1 << 20) + 65)).unwrap(),
            "above the limit",
        ),
        (
            "a reply to nothing",
            |s, ask| Msg { id: ask.id.wrapping_add(7), ..ask.reply(&[]) }.send(s),
            "was not sent",
        ),
        (
            "a reply to another command",
            |s, ask| Msg { command: 10, ..ask.reply(&ask.payload) }.send(s),
            "a reply to command 10",
        ),
        (
            "a type that is none",
            |s, ask| Msg { flags: 9, ..ask.reply(&ask.payload) }.send(s),
            "neither command nor reply",
        ),
        ("text", |s, _| s.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap(), "garbage"),
        ("noise", |s, _| s.write_all(&[0xa5; 64]).unwrap(), "garbage"),
    ];
    for (name, misdeed, reason) in misdeeds {
        let (_dir, path) = socket();
        fake_server(&path, LIBVFIO_USER_CAPS, move |mut stream| {
            let ask = Msg::receive(&mut stream).unwrap();
            misdeed(&mut stream, &ask);
        });
        let device = open(&path);
        let failed = device.pci().region_read(0, 0, &mut [0; 4]).unwrap_err();
        assert!(failed.is_gone(), "{name}: {failed}");
        let lost = device.connection_lost().unwrap();
        assert!(lost.contains(reason), "{name}: {lost}");
    }
}

fn size(msg_size: u32) -> Vec<u8> {
    let mut bytes = Msg::command(0, 9, &[]).reply(&[]).bytes();
    bytes[4..8].copy_from_slice(&msg_size.to_ne_bytes());
    bytes
}

/// What is wrong inside of a whole reply fails that call alone.
#[test]
fn malformed_replies_fail_their_call_only() {
    type Answer = fn(&Msg) -> Msg;
    let answers: [(&str, Answer); 7] = [
        ("empty", |ask| ask.reply(&[])),
        ("short", |ask| ask.reply(&ask.payload[..15])),
        ("without data", |ask| ask.reply(&ask.payload)),
        ("less data", |ask| ask.reply(&words(&[0, 0, 0, 4, 0])[..18])),
        ("another region", |ask| ask.reply(&words(&[0, 0, 5, 4, 0]))),
        ("a larger count", |ask| ask.reply(&words(&[0, 0, 0, 8, 0, 0]))),
        ("an absurd count", |ask| ask.reply(&words(&[0, 0, 0, u32::MAX, 0, 0]))),
    ];
    let (_dir, path) = socket();
    fake_server(&path, LIBVFIO_USER_CAPS, move |mut stream| {
        for (_, answer) in answers {
            let ask = Msg::receive(&mut stream).unwrap();
            answer(&ask).send(&mut stream);
        }
        let ask = Msg::receive(&mut stream).unwrap();
        ask.refusal(0, &[1, 2, 3]).send(&mut stream);
        let ask = Msg::receive(&mut stream).unwrap();
        ask.reply(&words(&[0, 0, 0, 4, 77])).send(&mut stream);
    });
    let device = open(&path);
    let pci = device.pci();
    let mut word = [0; 4];
    for (name, _) in answers {
        let failed = pci.region_read(0, 0, &mut word).unwrap_err();
        assert!(matches!(failed, DeviceError::Protocol { .. }), "{name}: {failed}");
    }
    let failed = pci.region_read(0, 0, &mut word).unwrap_err();
    assert_eq!(failed.errno(), Some(libc::EIO), "an error bit without errno is an error");
    pci.region_read(0, 0, &mut word).unwrap();
    assert_eq!(u32::from_ne_bytes(word), 77);
}

#[test]
fn a_data_reply_larger_than_asked_for_never_reaches_the_buffer() {
    for claim in [17, 1000, u32::MAX] {
        let (_dir, device, mut engine) = libvfio_user(PreCopy, move |stream, ask| {
            let mut payload = words(&[8, claim]);
            payload.resize(8 + 2000, 0xee);
            ask.reply(&payload).send(stream);
            true
        });
        let mut buf = [0; 16];
        assert!(engine.read(&mut buf).unwrap_err().is_gone());
        assert_eq!(buf, [0; 16]);
        let lost = device.connection_lost().unwrap();
        assert!(lost.contains("MIG_DATA_READ of 16"), "{lost}");
    }
    // More than the reply itself holds.
    let (_dir, _device, mut engine) = libvfio_user(PreCopy, |stream, ask| {
        ask.reply(&words(&[24, 16, 0])).send(stream);
        true
    });
    assert!(engine.read(&mut [0; 16]).unwrap_err().is_gone());
}

#[test]
fn the_server_dies_in_the_middle_of_data() {
    let (_dir, _device, mut engine) = libvfio_user(PreCopy, |stream, ask| {
        let reply = data_reply(ask, &[1; 1000], 0).bytes();
        stream.write_all(&reply[..500]).unwrap();
        false
    });
    let failed = engine.read(&mut [0; 1000]).unwrap_err();
    assert!(failed.is_gone(), "{failed}");
    assert!(engine.set_state(Running).unwrap_err().is_gone());
}

#[test]
fn a_server_that_stops_inside_of_a_message_is_given_up() {
    let (_dir, path) = socket();
    let (release, released) = mpsc::channel::<()>();
    fake_server(&path, LIBVFIO_USER_CAPS, move |mut stream| {
        let ask = Msg::receive(&mut stream).unwrap();
        stream.write_all(&ask.reply(&[0; 20]).bytes()[..20]).unwrap();
        let _ = released.recv_timeout(PATIENCE);
    });
    let options = Options { stall_timeout: Duration::from_millis(50), ..options() };
    let device = VfioUserDevice::open(&path, options).unwrap();
    assert!(device.pci().region_read(0, 0, &mut [0; 4]).unwrap_err().is_gone());
    assert!(device.connection_lost().unwrap().contains("stopped inside"));
    drop(release);
}

// ---------------------------------------------------------------- time limits

#[test]
fn a_region_access_times_out_and_its_late_reply_is_dropped() {
    let (_dir, path) = socket();
    let (go_on, wait) = mpsc::channel::<()>();
    fake_server(&path, LIBVFIO_USER_CAPS, move |mut stream| {
        let late = Msg::receive(&mut stream).unwrap();
        wait.recv_timeout(PATIENCE).unwrap();
        late.reply(&words(&[0, 0, 0, 4, 1])).send(&mut stream);
        let next = Msg::receive(&mut stream).unwrap();
        assert_ne!(next.id, late.id, "not used again while unanswered");
        next.reply(&words(&[0, 0, 0, 4, 2])).send(&mut stream);
    });
    let options = Options { region_timeout: Duration::from_millis(50), ..options() };
    let device = VfioUserDevice::open(&path, options.clone()).unwrap();
    let pci = device.pci();
    let mut word = [0; 4];
    let failed = pci.region_read(0, 0, &mut word).unwrap_err();
    assert!(matches!(failed, DeviceError::TimedOut { limit_ms: 50, .. }), "{failed}");
    go_on.send(()).unwrap();
    // The second may itself run into the limit on a loaded machine; it must never see the first's reply.
    match pci.region_read(0, 0, &mut word) {
        Ok(()) => assert_eq!(u32::from_ne_bytes(word), 2),
        Err(failed) => assert!(matches!(failed, DeviceError::TimedOut { .. }), "{failed}"),
    }
    assert!(device.connection_lost().is_none_or(|lost| lost.contains("closed")));
}

#[test]
fn state_changes_and_data_have_limits_of_their_own_and_a_late_read_kills_the_session() {
    let (_dir, path) = socket();
    let (late, mut waiting) = (Duration::from_millis(50), None);
    fake_server(&path, LIBVFIO_USER_CAPS, move |stream| {
        play_libvfio_user(stream, |stream, ask, _| {
            // The first read is answered only after the second one was asked.
            if waiting.is_none() {
                waiting = Some(ask.clone());
                return true;
            }
            data_reply(ask, b"never", 0).send(stream);
            true
        });
    });
    let options = Options { data_timeout: Some(late), ..options() };
    let mut engine = VfioUserDevice::open(&path, options).unwrap().migration().unwrap();
    engine.set_state(PreCopy).unwrap();
    let failed = engine.read(&mut [0; 64]).unwrap_err();
    assert!(matches!(failed, DeviceError::TimedOut { .. }), "{failed}");
    let failed = engine.read(&mut [0; 64]).unwrap_err();
    assert_eq!(failed.errno(), Some(libc::ENODEV), "bytes are missing: {failed}");
    engine.set_state(Running).unwrap();
    assert_eq!(engine.state().unwrap(), Running);
}

#[test]
fn a_state_change_that_hangs_is_bounded_where_a_limit_is_set() {
    let (_dir, path) = socket();
    fake_server(&path, LIBVFIO_USER_CAPS, move |mut stream| {
        let mut hung = None;
        while let Some(msg) = Msg::receive(&mut stream) {
            let reply = match msg.word(4) {
                0x1_0001 => msg.reply(&words(&[16, 0x1_0001, 5, 0])),
                0x1_0002 => msg.reply(&words(&[16, 0x1_0002, 2, 0])),
                0x2_0002 => {
                    hung = Some(msg);
                    continue;
                }
                _ => msg.refusal(libc::EINVAL, &[]),
            };
            reply.send(&mut stream);
        }
        assert!(hung.is_some());
    });
    let options = Options { state_timeout: Some(Duration::from_millis(50)), ..options() };
    let mut engine = VfioUserDevice::open(&path, options).unwrap().migration().unwrap();
    let failed = engine.set_state(Stop).unwrap_err();
    assert!(matches!(failed, DeviceError::TimedOut { limit_ms: 50, .. }), "{failed}");
    assert_eq!(engine.state().unwrap(), Running, "the connection goes on");
}

#[test]
fn opening_a_server_that_says_nothing_is_bounded() {
    let (_dir, path) = socket();
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let options = Options { setup_timeout: Duration::from_millis(50), ..options() };
    let failed = VfioUserDevice::open(&path, options).unwrap_err();
    assert!(matches!(failed, VfioUserError::Version(_)), "{failed}");
}

// ---------------------------------------------------------------- opening

#[test]
fn a_bad_answer_to_version_refuses_the_server() {
    type Answer = fn(&Msg) -> Vec<u8>;
    let answers: [(&str, Answer); 9] = [
        ("a refusal", |ask| ask.refusal(libc::EINVAL, &[]).bytes()),
        ("another major", |ask| ask.reply(&[1, 0, 0, 0]).bytes()),
        ("a higher minor", |ask| ask.reply(&[0, 0, 2, 0]).bytes()),
        ("no payload", |ask| ask.reply(&[]).bytes()),
        ("no JSON", |ask| ask.reply(&raw::version("{")).bytes()),
        ("a command", |ask| ask.bytes()),
        ("another id", |ask| Msg { id: 9, ..ask.reply(&raw::version("{}")) }.bytes()),
        ("a twin socket that is not there", |ask| {
            let caps = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;
            ask.reply(&raw::version(caps)).bytes()
        }),
        ("a huge size", |ask| {
            let mut bytes = ask.reply(&[]).bytes();
            bytes[4..8].fill(0xff);
            bytes
        }),
    ];
    for (name, answer) in answers {
        let (_dir, path) = socket();
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let ask = Msg::receive(&mut stream).unwrap();
            stream.write_all(&answer(&ask)).unwrap();
        });
        let failed = VfioUserDevice::open(&path, options()).unwrap_err();
        assert!(matches!(failed, VfioUserError::Version(_)), "{name}: {failed}");
        server.join().unwrap();
    }
}

/// Region information whose capabilities are hostile.
#[test]
fn hostile_region_information_is_refused_or_harmless() {
    let info =
        |argsz: u32, cap_offset: u32, size: u32| words(&[argsz, 15, 0, cap_offset, size, 0, 0, 0]);
    let with = |mut info: Vec<u8>, cap: &[u32]| {
        info.extend(words(cap));
        info
    };
    // Capability header: id 1, version 1 in one word, then next.
    let refused = [
        ("an offset into the fixed part", info(32, 4, 0x1000)),
        ("a loop", with(info(48, 32, 0x1000), &[0x1_0001, 32, 0, 0])),
        ("backwards", with(info(64, 40, 0x1000), &[0, 0, 0x1_0001, 32, 0, 0])),
        ("absurdly many areas", with(info(48, 32, 0x1000), &[0x1_0001, 0, u32::MAX, 0])),
        ("areas that are not there", with(info(48, 32, 0x1000), &[0x1_0001, 0, 2, 0, 0, 0, 16, 0])),
        (
            "an area beyond the region",
            with(info(64, 32, 0x1000), &[0x1_0001, 0, 1, 0, 0x800, 0, 0x801, 0]),
        ),
        (
            "an area that wraps",
            with(info(64, 32, 0x1000), &[0x1_0001, 0, 1, 0, u32::MAX, u32::MAX, 2, 0]),
        ),
        ("a cut capability", with(info(40, 32, 0x1000), &[0x1_0001])),
        ("never fitting", info(u32::MAX, 0, 0x1000)),
    ];
    for (name, payload) in refused {
        let (_dir, path) = socket();
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while let Some(ask) = Msg::receive(&mut stream) {
                let reply = match ask.command {
                    1 => ask.reply(&raw::version("{}")),
                    DEVICE_GET_INFO => ask.reply(&words(&[16, 3, u32::MAX, u32::MAX])),
                    _ => ask.reply(&payload),
                };
                reply.send(&mut stream);
            }
        });
        let failed = VfioUserDevice::open(&path, options()).unwrap_err();
        let why = DeviceError::Protocol { call: "", what: String::new() };
        match failed {
            VfioUserError::Device(error) => {
                let same = std::mem::discriminant(&error) == std::mem::discriminant(&why);
                assert!(same, "{name}: {error}");
            }
            other => panic!("{name}: {other}"),
        }
    }
}
