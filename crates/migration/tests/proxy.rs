//! The fault proxy does what it is asked, at the frame it is asked for, and nothing else.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{Kept, LIMIT, PAGE, memory, region};
use migration::channel::{
    Address, Attach, ChannelError, ControlLimits, ControlReceiver, ControlSender, DataClass,
    DataReceiver, DataSender, Listener, OpeningFrame, Stream, connect, read_attach_ok,
    read_opening, send_attach, send_attach_ok,
};
use migration::testing::proxy::{Action, At, Channel, Direction, Fault, Proxy};
use migration::wire::{encode_message, kind};
use switchover::message::{Attempt, Connection, DeviceIndex, Features, Id, Message, Session};

const CHECKED: Features = Features {
    verify: false,
    ram_checksum: true,
    device_checksum: true,
    telemetry: false,
    lz4: false,
    zstd: false,
    local: false,
    echo: false,
};

struct Hosts {
    proxy: Proxy,
    listener: Listener,
    _dir: tempfile::TempDir,
}

impl Hosts {
    fn new(tcp: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = |name: &str| match tcp {
            true => "tcp:127.0.0.1:0".parse().unwrap(),
            false => Address::Unix(dir.path().join(name)),
        };
        let listener = Listener::bind(&address("destination")).unwrap();
        let proxy = Proxy::start(&address("proxy"), listener.local_address()).unwrap();
        Self { proxy, listener, _dir: dir }
    }

    fn control(&self) -> (Stream, Stream) {
        let hello = Message::Hello {
            features: CHECKED,
            migration: Id(1),
            instance: Id(2),
            connection: Connection(1),
            secret: None,
        };
        let mut source = connect(self.proxy.address(), LIMIT).unwrap();
        std::io::Write::write_all(&mut source, &encode_message(&hello).unwrap()).unwrap();
        let mut destination = self.listener.accept_timeout(LIMIT).unwrap().unwrap();
        let opening = read_opening(&mut destination, LIMIT).unwrap();
        assert_eq!(opening, OpeningFrame::Hello(hello));
        (source, destination)
    }

    fn data(&self, channel: u16) -> (Stream, Stream) {
        let attach = Attach { migration: Id(1), secret: Id(3), channel, connection: Connection(1) };
        let mut source = connect(self.proxy.address(), LIMIT).unwrap();
        send_attach(&mut source, &attach).unwrap();
        let mut destination = self.listener.accept_timeout(LIMIT).unwrap().unwrap();
        let opening = read_opening(&mut destination, LIMIT).unwrap();
        assert_eq!(opening, OpeningFrame::Attach(attach));
        send_attach_ok(&mut destination, &attach).unwrap();
        read_attach_ok(&mut source, &attach, LIMIT).unwrap();
        (source, destination)
    }
}

fn commit(attempt: u64) -> Message {
    Message::Commit { attempt: Attempt(attempt) }
}

/// Sends commits 0..6 over a proxy that does `action` at the third; returns what arrives, and the end.
fn commits_over(action: Action, tcp: bool) -> (Vec<Message>, ChannelError) {
    let hosts = Hosts::new(tcp);
    let fault = Fault {
        channel: Channel::Control,
        direction: Direction::ToDestination,
        at: At::Kind(kind::COMMIT, 2),
        action,
    };
    hosts.proxy.add(fault);
    let (source, destination) = hosts.control();
    let sender = ControlSender::new(source);
    let silence = if action == Action::Stall { Duration::from_millis(200) } else { LIMIT };
    let limits = ControlLimits { silence, ..ControlLimits::default() };
    let mut receiver = ControlReceiver::with_limits(destination, limits);
    for attempt in 0..6 {
        // The connection may be gone already.
        let _ = sender.send(commit(attempt));
    }
    if matches!(action, Action::Drop | Action::Delay(_)) {
        sender.close();
    }
    let mut arrived = vec![];
    let end = loop {
        match receiver.recv() {
            Ok(message) => arrived.push(message),
            Err(end) => break end,
        }
    };
    assert_eq!(hosts.proxy.struck(), [fault]);
    (arrived, end)
}

#[test]
fn each_fault_strikes_at_its_frame() {
    for tcp in [false, true] {
        let first = |count| (0..count).map(commit).collect::<Vec<_>>();
        let closed = |end| assert!(matches!(end, ChannelError::Closed { .. }), "{end}");
        for action in [Action::Cut, Action::LinkDown] {
            let (arrived, end) = commits_over(action, tcp);
            assert_eq!(arrived, first(2));
            closed(end);
        }
        for action in [Action::CutAfter, Action::LinkDownAfter] {
            let (arrived, end) = commits_over(action, tcp);
            assert_eq!(arrived, first(3), "{action:?}");
            closed(end);
        }
        let (arrived, end) = commits_over(Action::CutWithin, tcp);
        assert_eq!(arrived, first(2));
        assert!(matches!(end, ChannelError::Truncated { .. }), "{end}");
        for byte in [8, 20, 45] {
            let (arrived, end) = commits_over(Action::Corrupt { byte, mask: 0x80 }, tcp);
            assert_eq!(arrived, first(2));
            assert!(matches!(end, ChannelError::Wire { .. }), "byte {byte}: {end}");
        }
        let (arrived, end) = commits_over(Action::Stall, tcp);
        assert_eq!(arrived, first(2));
        assert!(matches!(end, ChannelError::Silent { .. }), "{end}");
        let (arrived, end) = commits_over(Action::Delay(Duration::from_millis(30)), tcp);
        assert_eq!(arrived, first(6), "late, and in order");
        closed(end);
        let (arrived, end) = commits_over(Action::Drop, tcp);
        assert_eq!(arrived, [commit(0), commit(1), commit(3), commit(4), commit(5)]);
        closed(end);
    }
}

#[test]
fn data_channels_are_known_by_their_number_and_damage_is_seen() {
    let hosts = Hosts::new(false);
    // Frame 0 is the Attach.
    hosts.proxy.add(Fault {
        channel: Channel::Data(1),
        direction: Direction::ToDestination,
        at: At::Frame(3),
        action: Action::Corrupt { byte: 1000, mask: 1 },
    });
    let guest = memory(&[region(0, PAGE)]);
    let kept = Arc::new(Kept::default());
    let (mut senders, mut receivers) = (vec![], vec![]);
    for channel in 0..2 {
        let (source, destination) = hosts.data(channel);
        senders.push(DataSender::new(source, CHECKED));
        let receiver = DataReceiver::new(destination, CHECKED, Arc::clone(&guest));
        let kept = Arc::clone(&kept);
        receivers.push(thread::spawn(move || receiver.run(&*kept)));
    }
    for i in 0..5 {
        for (device, sender) in (0..).zip(&senders) {
            let (device, session) = (DeviceIndex(device), Session(1));
            // The second channel ends early.
            let _ = sender.send_device(device, session, DataClass::Dirty, i, &[7; 2000]);
        }
    }
    senders.iter().for_each(DataSender::shutdown);
    let ends: Vec<_> = receivers.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(ends[0].is_ok());
    let error = ends[1].as_ref().unwrap_err().to_string();
    assert!(error.contains("payload of frame kind 0x0210 damaged"), "{error}");
    let arrived = |device| {
        let frames = kept.frames.lock().unwrap();
        frames.iter().filter(|frame| frame.device == DeviceIndex(device)).count()
    };
    assert_eq!((arrived(0), arrived(1)), (5, 2));
    let seen =
        |channel| hosts.proxy.seen(Channel::Data(channel), Direction::ToDestination, kind::DEVICE);
    assert_eq!(seen(0), 5);
    assert!(seen(1) >= 3);
    let answered = hosts.proxy.seen(Channel::Data(0), Direction::ToSource, kind::ATTACH_OK);
    assert_eq!(answered, 1);
}

#[test]
fn faults_have_a_direction_and_strike_once() {
    let hosts = Hosts::new(true);
    hosts.proxy.add(Fault {
        channel: Channel::Control,
        direction: Direction::ToSource,
        at: At::Frame(0),
        action: Action::CutAfter,
    });
    for round in 0..2 {
        let (source, destination) = hosts.control();
        let to_source = ControlSender::new(destination.try_clone().unwrap());
        let mut at_destination = ControlReceiver::new(destination);
        let to_destination = ControlSender::new(source.try_clone().unwrap());
        let mut at_source = ControlReceiver::new(source);
        to_destination.send(commit(round)).unwrap();
        assert_eq!(at_destination.recv().unwrap(), commit(round));
        to_source.send(Message::Running { attempt: Attempt(round) }).unwrap();
        assert_eq!(at_source.recv().unwrap(), Message::Running { attempt: Attempt(round) });
        if round == 0 {
            assert!(at_source.recv().is_err() && at_destination.recv().is_err());
        } else {
            to_destination.send(commit(9)).unwrap();
            assert_eq!(at_destination.recv().unwrap(), commit(9));
        }
    }
    let (control, to) = (Channel::Control, Direction::ToDestination);
    assert!(hosts.proxy.wait_seen(control, to, kind::COMMIT, 3, LIMIT));
    assert!(!hosts.proxy.wait_seen(control, to, kind::COMMIT, 4, Duration::from_millis(1)));
}

#[test]
fn the_link_goes_down_and_comes_back() {
    let hosts = Hosts::new(false);
    let (source, destination) = hosts.control();
    let (_data_source, data_destination) = hosts.data(0);
    hosts.proxy.refuse(true);
    hosts.proxy.link_down();
    assert!(ControlReceiver::new(source).recv().is_err());
    assert!(ControlReceiver::new(destination).recv().is_err());
    let receiver = DataReceiver::new(data_destination, CHECKED, memory(&[region(0, PAGE)]));
    receiver.run(&Kept::default()).unwrap();
    let mut refused = connect(hosts.proxy.address(), LIMIT).unwrap();
    let error = read_opening(&mut refused, LIMIT).unwrap_err();
    assert!(matches!(error, ChannelError::Closed { .. }), "{error}");
    assert!(hosts.listener.accept_timeout(Duration::from_millis(5)).unwrap().is_none());
    hosts.proxy.refuse(false);
    let (source, destination) = hosts.control();
    ControlSender::new(source).send(commit(1)).unwrap();
    assert_eq!(ControlReceiver::new(destination).recv().unwrap(), commit(1));
}
