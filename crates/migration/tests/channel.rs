//! Addresses, connecting, the first frames, and the control channel, over real sockets.

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use common::{Kind, LIMIT, pair};
use migration::channel::{
    Address, Attach, ChannelError, ControlLimits, ControlReceiver, ControlSender, Listener,
    OpeningFrame, Stream, connect, read_attach_ok, read_opening, send_attach, send_attach_ok,
    send_attach_refused,
};
use migration::wire::{FrameHeader, IGNORABLE, WireError, encode_message, kind};
use proptest::prelude::*;
use switchover::message::{Attempt, Connection, Features, Id, Message, Side};

const SHORT: Duration = Duration::from_millis(60);

fn hello() -> Message {
    Message::Hello {
        features: Features { verify: true, ..Features::default() },
        migration: Id(1),
        instance: Id(2),
        connection: Connection(1),
        secret: None,
    }
}

fn attach() -> Attach {
    Attach { migration: Id(1), secret: Id(u128::MAX), channel: 3, connection: Connection(9) }
}

fn commit(attempt: u64) -> Message {
    Message::Commit { attempt: Attempt(attempt) }
}

#[test]
fn addresses_are_read_and_written() {
    let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
    let cases = [
        ("tcp:host.example:4444", tcp("host.example", 4444), false),
        ("tcp:127.0.0.1:0", tcp("127.0.0.1", 0), true),
        ("tcp:127.7.7.7:1", tcp("127.7.7.7", 1), true),
        ("tcp:localhost:1", tcp("localhost", 1), true),
        ("tcp:[::1]:4444", tcp("::1", 4444), true),
        ("tcp:[fe80::2]:65535", tcp("fe80::2", 65535), false),
        ("tcp:0.0.0.0:1", tcp("0.0.0.0", 1), false),
        ("unix:/run/vmferry.sock", Address::Unix("/run/vmferry.sock".into()), true),
        ("unix:a:b", Address::Unix("a:b".into()), true),
    ];
    for (text, address, loopback) in cases {
        assert_eq!(text.parse::<Address>().unwrap(), address);
        assert_eq!(address.to_string(), text);
        assert_eq!(address.is_loopback(), loopback, "{text}");
    }
    let wrong = [
        "",
        "host:4444",
        "tcp:",
        "tcp:host",
        "tcp:host:",
        "tcp:host:65536",
        "tcp:host:-1",
        "tcp::4444",
        "tcp:::1:4444",
        "tcp:[::1:4444",
        "tcp:[]:4444",
        "tcp:[::1]",
        "unix:",
        "unix:a\0b",
        "exec:rm",
    ];
    for text in wrong {
        let error = text.parse::<Address>().unwrap_err().to_string();
        assert!(error.contains("tcp:HOST:PORT"), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn no_text_panics_and_what_is_read_is_written_back(text in "(tcp:|unix:)?\\PC{0,20}(:[0-9]{0,6})?") {
        if let Ok(address) = text.parse::<Address>() {
            prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
    }
}

#[test]
fn a_listener_names_its_real_port_and_waits_no_longer_than_asked() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    assert!(!matches!(listener.local_address(), Address::Tcp { port: 0, .. }));
    assert!(listener.accept_timeout(Duration::ZERO).unwrap().is_none());
    assert!(listener.accept_timeout(Duration::from_millis(5)).unwrap().is_none());
    let mut source = connect(listener.local_address(), LIMIT).unwrap();
    let mut destination = listener.accept_timeout(LIMIT).unwrap().unwrap();
    source.write_all(b"there").unwrap();
    destination.write_all(b"back").unwrap();
    let (mut there, mut back) = ([0; 5], [0; 4]);
    destination.read_exact(&mut there).unwrap();
    source.read_exact(&mut back).unwrap();
    assert_eq!((&there, &back), (b"there", b"back"));
}

#[test]
fn a_unix_socket_is_replaced_only_when_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let address = Address::Unix(path.clone());
    let first = Listener::bind(&address).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "whoever connects can hand over a guest");
    let error = Listener::bind(&address).unwrap_err().to_string();
    assert!(error.contains("somebody listens there already"), "{error}");
    assert!(connect(&address, LIMIT).is_ok(), "the first one still listens");
    drop(first);
    assert!(!path.exists(), "removed with its listener");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind, as by a killed process");
    let second = Listener::bind(&address).unwrap();
    // Somebody else's socket is not removed with ours.
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(second);
    assert!(path.exists());
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = Listener::bind(&Address::Unix(file.clone())).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");
}

#[test]
fn errors_of_connecting_name_the_address_and_the_errno() {
    let missing = Address::Unix(PathBuf::from("/nonexistent/socket"));
    let error = connect(&missing, LIMIT).unwrap_err();
    assert!(error.to_string().contains("unix:/nonexistent/socket"), "{error}");
    assert_eq!(error.failure(Side::Source).errno, Some(libc::ENOENT));
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_address().clone();
    drop(listener);
    let error = connect(&address, LIMIT).unwrap_err();
    assert_eq!(error.failure(Side::Source).errno, Some(libc::ECONNREFUSED));
    let error = Listener::bind(&"tcp:203.0.113.1:1".parse().unwrap()).unwrap_err();
    assert!(matches!(error, ChannelError::Listen { .. }), "{error}");
}

/// A UNIX socket whose backlog is full makes connect(2) wait.
#[test]
fn connecting_to_a_listener_that_does_not_accept_has_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("socket"));
    let listener = Listener::bind(&address).unwrap();
    let mut waiting = vec![];
    let error = loop {
        match connect(&address, SHORT) {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ChannelError::Connect { .. }), "{error}");
    assert!(!waiting.is_empty());
    drop(listener);
}

#[test]
fn the_first_frame_says_what_a_connection_is() {
    for kind in [Kind::Unix, Kind::Tcp] {
        let (mut source, mut destination) = pair(kind);
        source.write_all(&encode_message(&hello()).unwrap()).unwrap();
        // What follows is not taken away from the channel.
        source.write_all(&encode_message(&commit(1)).unwrap()).unwrap();
        assert_eq!(read_opening(&mut destination, LIMIT).unwrap(), OpeningFrame::Hello(hello()));
        assert_eq!(ControlReceiver::new(destination).recv().unwrap(), commit(1));

        let (mut source, mut destination) = pair(kind);
        send_attach(&mut source, &attach()).unwrap();
        assert_eq!(read_opening(&mut destination, LIMIT).unwrap(), OpeningFrame::Attach(attach()));
        send_attach_ok(&mut destination, &attach()).unwrap();
        read_attach_ok(&mut source, &attach(), LIMIT).unwrap();
        send_attach_refused(&mut destination, &attach(), "unknown secret").unwrap();
        let error = read_attach_ok(&mut source, &attach(), LIMIT).unwrap_err();
        assert!(error.to_string().contains("unknown secret"), "{error}");
        send_attach_refused(&mut destination, &attach(), &"ü".repeat(4000)).unwrap();
        let error = read_attach_ok(&mut source, &attach(), LIMIT).unwrap_err();
        assert!(matches!(error, ChannelError::Refused { .. }), "{error}");
        let other = Attach { channel: 4, ..attach() };
        send_attach_ok(&mut destination, &other).unwrap();
        let error = read_attach_ok(&mut source, &attach(), LIMIT).unwrap_err();
        assert!(error.to_string().contains("was not asked for"), "{error}");
    }
}

#[test]
fn a_connection_that_says_nothing_or_nonsense_is_not_waited_for() {
    let garbage: [Vec<u8>; 5] = [
        b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n".to_vec(),
        vec![0; 64],
        encode_message(&commit(1)).unwrap(),
        FrameHeader { kind: kind::SECTION, length: 1 << 20, ..Default::default() }.encode().into(),
        FrameHeader { kind: kind::ATTACH, length: 0, ..Default::default() }.encode().into(),
    ];
    for bytes in garbage {
        let (mut source, mut destination) = pair(Kind::Unix);
        source.write_all(&bytes).unwrap();
        let error = read_opening(&mut destination, LIMIT).unwrap_err();
        assert!(matches!(error, ChannelError::Wire { .. }), "{error}");
    }
    let frame = encode_message(&hello()).unwrap();
    for part in [0, 1, 39, 40, frame.len() - 1] {
        let (mut source, mut destination) = pair(Kind::Tcp);
        source.write_all(&frame[..part]).unwrap();
        let error = read_opening(&mut destination, SHORT).unwrap_err();
        assert!(matches!(error, ChannelError::Late { .. }), "{part} bytes: {error}");
        drop(source);
        let error = read_opening(&mut destination, LIMIT).unwrap_err();
        assert!(matches!(error, ChannelError::Closed { .. }), "{error}");
    }
    // One byte at a time does not extend the limit.
    let (mut source, mut destination) = pair(Kind::Unix);
    let dripping = thread::spawn(move || {
        for byte in frame.iter().cycle() {
            thread::sleep(Duration::from_millis(5));
            if source.write_all(&[*byte]).is_err() {
                return;
            }
        }
    });
    let error = read_opening(&mut destination, SHORT).unwrap_err();
    assert!(matches!(error, ChannelError::Late { .. }), "{error}");
    drop(destination);
    dripping.join().unwrap();
}

fn control(kind: Kind, limits: ControlLimits) -> [(ControlSender, ControlReceiver); 2] {
    let (source, destination) = pair(kind);
    [source, destination].map(|stream| {
        let clone = stream.try_clone().unwrap();
        let sender = ControlSender::with_limits(stream, limits);
        (sender, ControlReceiver::with_limits(clone, limits))
    })
}

#[test]
fn messages_arrive_in_order_both_ways() {
    for kind in [Kind::Unix, Kind::Tcp] {
        let [mut source, mut destination] = control(kind, ControlLimits::default());
        let describe = Message::Describe { body: "d".repeat(3 << 20) };
        source.0.send(describe.clone()).unwrap();
        for attempt in 0..500 {
            source.0.send(commit(attempt)).unwrap();
            destination.0.send(Message::Running { attempt: Attempt(attempt) }).unwrap();
        }
        assert_eq!(destination.1.recv().unwrap(), describe);
        for attempt in 0..500 {
            assert_eq!(destination.1.recv().unwrap(), commit(attempt));
            let running = Message::Running { attempt: Attempt(attempt) };
            assert_eq!(source.1.recv().unwrap(), running);
        }
    }
}

#[test]
fn close_sends_what_is_queued_and_ends_both_directions() {
    for kind in [Kind::Unix, Kind::Tcp] {
        let [mut source, mut destination] = control(kind, ControlLimits::default());
        for attempt in 0..200 {
            source.0.send(commit(attempt)).unwrap();
        }
        source.0.close();
        let error = source.0.send(commit(0)).unwrap_err();
        assert!(matches!(error, ChannelError::ShutDown { .. }), "{error}");
        assert!(source.1.recv().is_err(), "this side's receiver ends too");
        for attempt in 0..200 {
            assert_eq!(destination.1.recv().unwrap(), commit(attempt));
        }
        let error = destination.1.recv().unwrap_err();
        assert!(matches!(error, ChannelError::Closed { .. }), "{error}");
        source.0.close();
    }
}

#[test]
fn dropping_every_sender_closes() {
    let [source, mut destination] = control(Kind::Unix, ControlLimits::default());
    let clone = source.0.clone();
    source.0.send(commit(1)).unwrap();
    drop(source.0);
    clone.send(commit(2)).unwrap();
    drop(clone);
    assert_eq!(destination.1.recv().unwrap(), commit(1));
    assert_eq!(destination.1.recv().unwrap(), commit(2));
    assert!(destination.1.recv().is_err());
}

#[test]
fn abort_does_not_wait() {
    let limits = ControlLimits { keep_alive: LIMIT, silence: LIMIT };
    let [source, _destination] = control(Kind::Unix, limits);
    // Nobody reads: the writer is stuck after a few of these.
    for _ in 0..20 {
        source.0.send(Message::Describe { body: "d".repeat(1 << 20) }).unwrap();
    }
    source.0.abort();
    assert!(source.0.send(commit(1)).is_err());
}

/// What a connection is its first frame says, however long that takes to come.
#[test]
fn no_keep_alive_comes_before_the_first_message() {
    let limits = ControlLimits { keep_alive: Duration::from_millis(5), silence: LIMIT };
    let (here, mut there) = std::os::unix::net::UnixStream::pair().unwrap();
    let source = ControlSender::with_limits(Stream::from_unix(here, "source").unwrap(), limits);
    thread::sleep(Duration::from_millis(100));
    source.send(commit(1)).unwrap();
    let mut first = vec![0; encode_message(&commit(1)).unwrap().len()];
    there.read_exact(&mut first).unwrap();
    assert_eq!(first, encode_message(&commit(1)).unwrap());
}

/// Keep-alives hold a channel open on which nothing else is said, for many times the silence that is borne.
#[test]
fn keep_alives_break_the_silence() {
    let limits =
        ControlLimits { keep_alive: Duration::from_millis(5), silence: Duration::from_millis(500) };
    let [source, mut destination] = control(Kind::Unix, limits);
    source.0.send(commit(0)).unwrap();
    assert_eq!(destination.1.recv().unwrap(), commit(0));
    let waiting = thread::spawn(move || destination.1.recv());
    thread::sleep(Duration::from_millis(1100));
    source.0.send(commit(1)).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), commit(1));
}

#[test]
fn a_silent_peer_is_gone() {
    let limits = ControlLimits { keep_alive: LIMIT, silence: SHORT };
    let [_source, mut destination] = control(Kind::Tcp, limits);
    let error = destination.1.recv().unwrap_err();
    assert!(matches!(error, ChannelError::Silent { limit: SHORT, .. }), "{error}");
    assert!(error.to_string().contains("silent for 60 ms"), "{error}");
    // Silent in the middle of a frame.
    let (mut source, destination) = pair(Kind::Unix);
    source.write_all(&encode_message(&commit(1)).unwrap()[..45]).unwrap();
    let error = ControlReceiver::with_limits(destination, limits).recv().unwrap_err();
    assert!(matches!(error, ChannelError::Silent { .. }), "{error}");
    // A byte now and then is no sign of life.
    let (mut source, destination) = pair(Kind::Unix);
    let dripping = thread::spawn(move || {
        let frame = encode_message(&Message::Describe { body: "x".repeat(9999) }).unwrap();
        for byte in frame {
            thread::sleep(Duration::from_millis(5));
            if source.write_all(&[byte]).is_err() {
                return;
            }
        }
    });
    let mut receiver = ControlReceiver::with_limits(destination, limits);
    let error = receiver.recv().unwrap_err();
    assert!(matches!(error, ChannelError::Silent { .. }), "{error}");
    drop(receiver);
    dripping.join().unwrap();
}

#[test]
fn a_peer_that_does_not_read_is_seen_by_the_sender() {
    let limits = ControlLimits { keep_alive: LIMIT, silence: SHORT };
    let [source, destination] = control(Kind::Unix, limits);
    // The writer gives up after the silence that is borne; until then messages queue, so many and no more.
    let mut queued = 0;
    let error = loop {
        match source.0.send(Message::Describe { body: "d".repeat(64 << 10) }) {
            Ok(()) => queued += 1,
            Err(error) => break error,
        }
    };
    let bounded = matches!(error, ChannelError::Congested { .. } | ChannelError::ShutDown { .. });
    assert!(bounded && queued <= 1100, "{queued}: {error}");
    drop(destination);
}

#[test]
fn garbage_on_the_control_channel_is_an_error_that_names_it() {
    let commit_frame = encode_message(&commit(1)).unwrap();
    let mut damaged = commit_frame.clone();
    damaged[44] ^= 1;
    let unknown = FrameHeader { kind: 0x333, ..Default::default() }.encode().to_vec();
    let data = FrameHeader { kind: kind::RAM_PAGES, length: 4096, ..Default::default() };
    let cases: [(Vec<u8>, &str); 5] = [
        (vec![0xee; 400], "not a vmferry frame"),
        (damaged, "damaged"),
        (unknown, "unknown frame kind 0x0333"),
        (data.encode().to_vec(), "does not belong on a control channel"),
        (commit_frame[..50].to_vec(), "in the middle of a frame"),
    ];
    for (bytes, words) in cases {
        let (mut source, mut destination) = pair(Kind::Tcp);
        destination.set_label("control channel");
        source.write_all(&bytes).unwrap();
        drop(source);
        let error = ControlReceiver::new(destination).recv().unwrap_err().to_string();
        assert!(error.contains(words) && error.starts_with("control channel: "), "{error}");
    }
    let (mut source, destination) = pair(Kind::Unix);
    let payload = vec![1; 5000];
    let header = FrameHeader { kind: 0x333 | IGNORABLE, length: 5000, ..FrameHeader::default() };
    source.write_all(&header.encode()).unwrap();
    source.write_all(&payload).unwrap();
    source.write_all(&encode_message(&Message::KeepAlive).unwrap()).unwrap();
    source.write_all(&commit_frame).unwrap();
    let mut receiver = ControlReceiver::new(destination);
    assert_eq!(receiver.recv().unwrap(), commit(1), "what may be skipped is skipped");
    drop(source);
    assert!(matches!(receiver.recv(), Err(ChannelError::Closed { .. })));
}

#[test]
fn what_cannot_be_sent_is_refused_here_and_the_channel_goes_on() {
    let [source, mut destination] = control(Kind::Unix, ControlLimits::default());
    let error = source.0.send(Message::Mismatch { list: vec!["x".repeat(1 << 20)] }).unwrap_err();
    let too_long = matches!(error, ChannelError::Wire { source: WireError::TooLong { .. }, .. });
    assert!(too_long, "{error}");
    source.0.send(commit(1)).unwrap();
    assert_eq!(destination.1.recv().unwrap(), commit(1));
}

#[test]
fn shutdown_of_a_clone_frees_a_blocked_reader() {
    let (source, _destination) = pair(Kind::Unix);
    let clone = source.try_clone().unwrap();
    let reading = thread::spawn(move || {
        let limits = ControlLimits { keep_alive: LIMIT, silence: LIMIT };
        ControlReceiver::with_limits(source, limits).recv()
    });
    thread::sleep(Duration::from_millis(20));
    clone.shutdown();
    assert!(reading.join().unwrap().is_err());
    let broken = UnixStream::pair().unwrap().0;
    let sender = ControlSender::new(Stream::from_unix(broken, "broken").unwrap());
    // The writer finds out at its first message at the latest.
    while sender.send(commit(1)).is_ok() {
        thread::yield_now();
    }
}
