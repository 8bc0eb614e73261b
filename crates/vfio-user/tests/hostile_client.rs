//! A client that sends garbage, or stops in the middle, closes its own connection at most: the next one
//! is served, and the device is as before.

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::raw::{self, Msg, words};
use common::{PATIENCE, Served, open, serve};
use vfio_migration::{DmaBacking, MigratableDevice};
use vfio_user::ServerOptions;

fn server() -> Served {
    let options = ServerOptions { dma_timeout: PATIENCE, ..ServerOptions::default() };
    serve(options, |_| {})
}

fn still_served(served: &Served) {
    let device = open(served);
    let mut got = [0; 4];
    device.pci().region_write(0, 0x40, b"fine").unwrap();
    device.pci().region_read(0, 0x40, &mut got).unwrap();
    assert_eq!(&got, b"fine");
    device.migration().unwrap().state().unwrap();
}

fn closed(stream: &mut UnixStream) {
    while let Some(message) = Msg::receive(stream) {
        assert_eq!(message.flags & 0x21, 0x21, "only refusals come before the end: {message:?}");
    }
}

#[test]
fn what_is_not_a_version_first_is_refused() {
    let served = server();
    let version = raw::version("{}");
    let mut other_major = version.clone();
    other_major[0] = 1;
    let first: Vec<(&str, Vec<u8>)> = vec![
        ("another command", Msg::command(1, 9, &[0; 16]).bytes()),
        ("a reply", Msg::command(1, 1, &version).reply(&version).bytes()),
        ("another major version", Msg::command(1, 1, &other_major).bytes()),
        ("no payload", Msg::command(1, 1, &[]).bytes()),
        ("no NUL", Msg::command(1, 1, b"\0\0\x01\0{}").bytes()),
        ("no JSON", Msg::command(1, 1, &raw::version("capabilities")).bytes()),
        (
            "a wrong type",
            Msg::command(1, 1, &raw::version(r#"{"capabilities":{"max_msg_fds":[]}}"#)).bytes(),
        ),
        ("deep JSON", Msg::command(1, 1, &raw::version(&"[".repeat(16_000))).bytes()),
        ("long JSON", Msg::command(1, 1, &raw::version(&" ".repeat(60_000))).bytes()),
        ("a huge size", [1, 0, 1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0].to_vec()),
        ("a size below the header", [1, 0, 1, 0, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec()),
        ("text", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
    ];
    for (name, bytes) in first {
        let mut stream = UnixStream::connect(&served.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&bytes).unwrap();
        closed(&mut stream);
        println!("{name}: closed");
    }
    still_served(&served);
}

#[test]
fn unreadable_headers_close_the_connection_and_only_that() {
    let served = server();
    let header = |size: u32, flags: u32| {
        let mut bytes = vec![5, 0, 9, 0];
        bytes.extend(size.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes
    };
    for (name, bytes) in [
        ("size 0", header(0, 0)),
        ("size 15", header(15, 0)),
        ("size 4 GiB", header(u32::MAX, 0)),
        ("one above the limit", header((1 << 20) + 64 + 1, 0)),
        ("a type that is none", header(16, 7)),
        ("a reply to nothing", header(16, 1)),
        ("an error reply to nothing", header(16, 0x21)),
    ] {
        let (mut stream, _) = raw::connect(&served.path, "{}");
        stream.write_all(&bytes).unwrap();
        closed(&mut stream);
        println!("{name}: closed");
    }
    still_served(&served);
}

#[test]
fn truncation_at_every_byte_closes_the_connection() {
    let served = server();
    let message = Msg::command(7, 10, &[0; 20]).bytes();
    for cut in 0..message.len() {
        let (mut stream, _) = raw::connect(&served.path, "{}");
        stream.write_all(&message[..cut]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        closed(&mut stream);
    }
    still_served(&served);
}

#[test]
fn a_client_that_stops_inside_of_a_message_is_given_up() {
    let options =
        ServerOptions { stall_timeout: Duration::from_millis(50), ..ServerOptions::default() };
    let served = serve(options, |_| {});
    let message = Msg::command(7, 10, &[0; 20]).bytes();
    for cut in [1, 15, 16, 35] {
        let (mut stream, _) = raw::connect(&served.path, "{}");
        stream.write_all(&message[..cut]).unwrap();
        closed(&mut stream);
    }
    // Before VERSION silence is not allowed either: others wait.
    let mut silent = UnixStream::connect(&served.path).unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    closed(&mut silent);
    // Between messages it is.
    let device = open(&served);
    std::thread::sleep(Duration::from_millis(200));
    device.pci().region_write(0, 0x40, b"fine").unwrap();
}

#[test]
fn malformed_payloads_are_refused_and_the_connection_goes_on() {
    let served = server();
    let (mut stream, _) = raw::connect(&served.path, "{}");
    let big = u32::MAX;
    let malformed: Vec<(u16, Vec<u32>)> = vec![
        // VERSION again, and commands that are not for a server.
        (1, vec![0x0001_0000, 0]),
        (6, vec![16, 0, 0, 0]),
        (11, vec![0, 0, 16, 0]),
        (14, vec![]),
        (19, vec![]),
        (0x7fff, vec![]),
        // DMA_MAP: short, argsz, unknown flags, both modes, size 0, wrapping, an fd mode without fd.
        (2, vec![32, 3, 0, 0, 0, 0, 0x1000]),
        (2, vec![31, 3, 0, 0, 0, 0, 0x1000, 0]),
        (2, vec![32, 0x13, 0, 0, 0, 0, 0x1000, 0]),
        (2, vec![32, 12, 0, 0, 0, 0, 0x1000, 0]),
        (2, vec![32, 3, 0, 0, 0, 0, 0, 0]),
        (2, vec![32, 3, 0, 0, 0x1000, 0, big, big]),
        (2, vec![32, 3, big, big, 0, 0, 0x1000, 0]),
        (2, vec![32, 7, 0, 0, 0, 0, 0x1000, 0]),
        // DMA_UNMAP of what is not there, and with flags.
        (3, vec![24, 0, 0, 0, 0x1000, 0]),
        (3, vec![24, 2, 0, 0, 0x1000, 0]),
        // Information: argsz, index.
        (4, vec![15, 0, 0, 0]),
        (5, vec![31, 0, 0, 0, 0, 0, 0, 0]),
        (5, vec![32, 0, 9, 0, 0, 0, 0, 0]),
        (7, vec![16, 0, 5, 0]),
        (7, vec![12, 0, 0, 0]),
        // SET_IRQS: flags, index, ranges, missing data, trigger from outside.
        (8, vec![20, 0, 2, 0, 1]),
        (8, vec![20, 7 | 32, 2, 0, 1]),
        (8, vec![20, 1 | 8 | 16, 2, 0, 1]),
        (8, vec![20, 1 | 8, 5, 0, 1]),
        (8, vec![20, 1 | 8, 2, 100, 1]),
        (8, vec![20, 1 | 8, 2, 1, big]),
        (8, vec![20, 1 | 8, 2, big, 1]),
        (8, vec![20, 1 | 8, 2, 0, 0]),
        (8, vec![20, 2 | 8, 2, 0, 50]),
        (8, vec![20, 1 | 32, 2, 0, 1]),
        (8, vec![20, 4 | 8, 2, 0, 1]),
        // Regions: beyond, wrapping, absurd counts, missing data.
        (9, vec![0xffc, 0, 0, 5]),
        (9, vec![big, big, 0, big]),
        (9, vec![0, 0, 0, big]),
        (9, vec![0, 0, 0, 0]),
        (9, vec![0, 0, big, 4]),
        (10, vec![0, 0, 0, 8, 0]),
        (10, vec![0, 0, 0, big, 0]),
        // DEVICE_FEATURE: short, argsz, no operation, two, unknown bits, wrong operation.
        (16, vec![8]),
        (16, vec![7, 0x1_0001]),
        (16, vec![16, 1]),
        (16, vec![16, 0x3_0001]),
        (16, vec![16, 0x9_0001]),
        (16, vec![16, 0x2_0001, 0, 0]),
        (16, vec![16, 0x2_0009, 0, 0]),
        (16, vec![16, 0x1_000c]),
        (16, vec![15, 0x1_0001]),
        (16, vec![16, 0x2_0002, 1]),
        (16, vec![16, 0x2_0002, 0, 0]),
        (16, vec![16, 0x2_0002, 8, 0]),
        (16, vec![16, 0x2_0002, big, 0]),
        (16, vec![16, 0x1_ffff]),
        // Logging: too many ranges, missing ranges, a wrapping one, report without start.
        (16, vec![24, 0x2_0006, 4096, 0, big, 0]),
        (16, vec![24, 0x2_0006, 4096, 0, 1, 0]),
        (16, vec![40, 0x2_0006, 4096, 0, 1, 0, 0, big, 0, big]),
        (16, vec![24, 0x2_0006, 4095, 0, 0, 0]),
        (16, vec![big, 0x1_0008, 0, 0, big, big, 4096, 0]),
        (16, vec![8, 0x2_0007]),
        // The data stream: argsz, size, missing data; precopy information in RUNNING, and short.
        (17, vec![16, 16]),
        (17, vec![big, big]),
        (17, vec![8, big]),
        (18, vec![24, 16, 0]),
        (18, vec![big, big]),
        (0x8001, vec![24, 0, 0, 0, 0, 0]),
        (0x8001, vec![24, 0]),
    ];
    for (i, (command, payload)) in malformed.iter().enumerate() {
        let id = i as u16 + 100;
        Msg::command(id, *command, &words(payload)).send(&mut stream);
        let reply = Msg::receive(&mut stream).expect("the connection goes on");
        let about = format!("command {command} {payload:x?}: {reply:?}");
        assert_eq!((reply.id, reply.command), (id, *command), "{about}");
        assert_eq!(reply.flags, 0x21, "{about}");
        assert!(reply.errno > 0 && reply.errno < 4096, "{about}");
        assert!(reply.payload.is_empty(), "{about}");
    }
    assert!(served.device.lock().mappings.is_empty());
    drop(stream);
    still_served(&served);
}

#[test]
fn a_report_is_bounded_by_the_negotiated_size() {
    let served = server();
    let (mut stream, _) =
        raw::connect(&served.path, r#"{"capabilities":{"max_data_xfer_size":4096}}"#);
    Msg::command(1, 16, &words(&[24, 0x2_0006, 4096, 0, 0, 0])).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    let report = |pages: u32| {
        let length = u64::from(pages) * 4096;
        words(&[u32::MAX, 0x1_0008, 0, 0, length as u32, (length >> 32) as u32, 4096, 0])
    };
    Msg::command(2, 16, &report(4096 * 8)).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().payload.len(), 32 + 4096);
    Msg::command(3, 16, &report(4096 * 8 + 1)).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().errno, libc::EINVAL as u32);
}

#[test]
fn no_reply_is_obeyed_and_later_replies_come_in_order() {
    let served = server();
    let (mut stream, _) = raw::connect(&served.path, "{}");
    let mut write = Msg::command(5, 10, &words(&[0x40, 0, 0, 4, 0xabcd]));
    write.flags = 0x10;
    write.send(&mut stream);
    // A refused one is silent too.
    let mut bad = Msg::command(6, 10, &words(&[0x40, 0, 99, 4, 0xabcd]));
    bad.flags = 0x10;
    bad.send(&mut stream);
    for id in 7..30 {
        Msg::command(id, 9, &words(&[0x40, 0, 0, 4])).send(&mut stream);
    }
    for id in 7..30 {
        let reply = Msg::receive(&mut stream).unwrap();
        assert_eq!((reply.id, reply.word(16)), (id, 0xabcd));
    }
}

/// Sends one message with as many copies of an fd.
fn send_with_fds(stream: &UnixStream, bytes: &[u8], count: usize) {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let fds = vec![stream.as_raw_fd(); count];
    assert_eq!(stream.send_with_fds(&[bytes], &fds).unwrap(), bytes.len());
}

#[test]
fn fds_where_none_belong_are_closed_and_too_many_end_the_connection() {
    let served = server();
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (mut stream, _) = raw::connect(&served.path, "{}");
    let before = fds();
    for _ in 0..20 {
        send_with_fds(&stream, &Msg::command(1, 9, &words(&[0x40, 0, 0, 4])).bytes(), 60);
        assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    }
    assert!(fds() < before + 60 * 10, "{} fds, {before} before", fds());
    // Two fds for one mapping.
    send_with_fds(&stream, &Msg::command(2, 2, &words(&[32, 3, 0, 0, 0, 0, 0x1000, 0])).bytes(), 2);
    assert_eq!(Msg::receive(&mut stream).unwrap().errno, libc::EINVAL as u32);
    send_with_fds(&stream, &Msg::command(3, 9, &words(&[0x40, 0, 0, 4])).bytes(), 65);
    closed(&mut stream);
    still_served(&served);
}

/// The same, a few at a time over a body that comes in pieces.
#[test]
fn fds_are_counted_over_the_whole_message() {
    let served = server();
    let (mut stream, _) = raw::connect(&served.path, "{}");
    let message = Msg::command(1, 9, &[0; 4000]).bytes();
    stream.write_all(&message[..16]).unwrap();
    for piece in message[16..].chunks(100).take(4) {
        send_with_fds(&stream, piece, 20);
    }
    closed(&mut stream);
    still_served(&served);
}

#[test]
fn progress_byte_by_byte_is_a_stall() {
    let options =
        ServerOptions { stall_timeout: Duration::from_millis(50), ..ServerOptions::default() };
    let served = serve(options, |_| {});
    let (mut stream, _) = raw::connect(&served.path, "{}");
    let message = Msg::command(1, 9, &[0; 60_000]).bytes();
    let mut sent = 0;
    for byte in message {
        if stream.write_all(&[byte]).is_err() {
            break;
        }
        sent += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(sent < 60_000);
    still_served(&served);
}

/// A client that pipelines without end while a command waits for DMA to it: the queue is bounded.
#[test]
fn a_flood_behind_a_waiting_command_ends_the_connection() {
    let served = server();
    let (mut stream, _) = raw::connect(&served.path, "{}");
    Msg::command(1, 2, &words(&[32, 3, 0, 0, 0, 0, 0x1000, 0])).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    // The test device writes 16 bytes at address 0 and so waits for the client.
    Msg::command(2, 10, &words(&[8, 0, 0, 4, 1])).send(&mut stream);
    let read = Msg::command(3, 9, &words(&[0x40, 0, 0, 4])).bytes();
    let mut sent = 0;
    while sent < 100_000 && stream.write_all(&read).is_ok() {
        sent += 1;
    }
    assert!(sent < 100_000, "everything was taken");
    drop(stream);
    still_served(&served);
}

/// The same with few but large ones.
#[test]
fn a_flood_of_bytes_behind_a_waiting_command_ends_the_connection() {
    let served = server();
    let (mut stream, _) = raw::connect(&served.path, "{}");
    Msg::command(1, 2, &words(&[32, 3, 0, 0, 0, 0, 0x1000, 0])).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    Msg::command(2, 10, &words(&[8, 0, 0, 4, 1])).send(&mut stream);
    let write = Msg::command(3, 18, &vec![0; 1 << 20]).bytes();
    let sent = (0..100).take_while(|_| stream.write_all(&write).is_ok()).count();
    assert!(sent < 100, "everything was taken");
    drop(stream);
    still_served(&served);
}

#[test]
fn the_number_of_mappings_is_bounded() {
    let served = server();
    let (mut stream, _) = raw::connect(&served.path, "{}");
    let mut errors = Vec::new();
    for i in 0..65_537u32 {
        let map = words(&[32, 3, 0, 0, i << 12, i >> 20, 0x1000, 0]);
        Msg::command(1, 2, &map).send(&mut stream);
        let reply = Msg::receive(&mut stream).unwrap();
        if reply.flags != 1 {
            errors.push((i, reply.errno as i32));
        }
    }
    assert_eq!(errors, [(65_535, libc::ENOSPC), (65_536, libc::ENOSPC)]);
    drop(stream);
    still_served(&served);
    assert!(served.device.lock().mappings.is_empty());
}

/// Wrong answers to the server's own commands.
#[test]
fn bad_replies_to_dma_commands_harm_nobody() {
    let served = server();
    let access = |mappings: &std::collections::BTreeMap<u64, _>| match &mappings[&0] {
        (_, _, DmaBacking::Calls(access)) => std::sync::Arc::clone(access),
        other => panic!("{other:?}"),
    };
    type Answer = fn(&Msg) -> Msg;
    let answers: [(&str, bool, Answer); 6] = [
        ("refused", true, |ask| ask.refusal(libc::EFAULT, &[])),
        ("refused without errno", true, |ask| ask.refusal(0, &[1, 2, 3])),
        ("short", true, |ask| ask.reply(&ask.payload[..15])),
        ("less data than asked for", true, |ask| ask.reply(&ask.payload)),
        ("another address", true, |ask| ask.reply(&words(&[1, 0, 16, 0, 0, 0, 0, 0]))),
        ("another command", false, |ask| Msg { command: 12, ..ask.reply(&[0; 32]) }),
    ];
    for (name, goes_on, answer) in answers {
        let (mut stream, _) = raw::connect(&served.path, "{}");
        Msg::command(1, 2, &words(&[32, 3, 0, 0, 0, 0, 0x1000, 0])).send(&mut stream);
        assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
        let access = access(&served.device.lock().mappings);
        let reader = std::thread::spawn(move || access.dma_read(0, &mut [0; 16]));
        let ask = Msg::receive(&mut stream).unwrap();
        assert_eq!((ask.command, ask.word(8)), (11, 16), "{name}");
        answer(&ask).send(&mut stream);
        assert!(reader.join().unwrap().is_err(), "{name}");
        if goes_on {
            Msg::command(9, 9, &words(&[0x40, 0, 0, 4])).send(&mut stream);
            assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1, "{name}");
        } else {
            closed(&mut stream);
        }
    }
    still_served(&served);
}

#[test]
fn dma_to_a_client_that_does_not_answer_times_out_and_its_late_reply_is_dropped() {
    let options =
        ServerOptions { dma_timeout: Duration::from_millis(50), ..ServerOptions::default() };
    let served = serve(options, |_| {});
    let (mut stream, _) = raw::connect(&served.path, "{}");
    Msg::command(1, 2, &words(&[32, 3, 0, 0, 0, 0, 0x1000, 0])).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    assert!(served.device.dma_read(0, &mut [0; 16]).is_err());
    let ask = Msg::receive(&mut stream).unwrap();
    ask.reply(&[0; 32]).send(&mut stream);
    Msg::command(9, 9, &words(&[0x40, 0, 0, 4])).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    ask.reply(&[0; 32]).send(&mut stream);
    closed(&mut stream);
    still_served(&served);
}

/// libvfio-user's failure on large commands, which a client must never provoke.
#[test]
fn the_compatibility_mode_dies_of_large_writes() {
    let options = ServerOptions { libvfio_user_compat: true, ..ServerOptions::default() };
    let served = serve(options, |_| {});
    let (mut stream, _) = raw::connect(&served.path, "{}");
    Msg::command(1, 16, &words(&[16, 0x2_0002, 4, 0])).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    let write = |size: usize| {
        let mut payload = words(&[8 + size as u32, size as u32]);
        payload.resize(8 + size, 0);
        Msg::command(2, 18, &payload)
    };
    write(32_768).send(&mut stream);
    assert_eq!(Msg::receive(&mut stream).unwrap().flags, 1);
    write(65_536).send(&mut stream);
    closed(&mut stream);
}

/// Random bytes, many times, from a fixed seed.
#[test]
fn noise_never_takes_the_server_down() {
    let served = server();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..200 {
        let (mut stream, _) = raw::connect(&served.path, "{}");
        for _ in 0..20 {
            let mut bytes: Vec<u8> = (0..random() % 80).map(|_| random() as u8).collect();
            if round % 2 == 0 {
                // A sound header around noise, so that the decoders see it.
                let commands = [2, 3, 4, 5, 7, 8, 9, 10, 13, 16, 17, 18];
                let command = commands[random() as usize % commands.len()];
                bytes = Msg::command(random() as u16, command, &bytes).bytes();
            }
            if stream.write_all(&bytes).is_err() {
                break;
            }
        }
        // A device that noise drove into ERROR is the device's matter.
        let _ = stream.shutdown(Shutdown::Both);
    }
    served.device.migration().reset().unwrap();
    still_served(&served);
}
