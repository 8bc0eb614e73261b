//! Device data and sections, over real sockets: everything arrives once, and nothing else gets through.

mod common;

use std::io::Write;
use std::sync::Arc;
use std::thread;

use common::{Kept, Kind, LIMIT, Link, MIB, PAGE, allocated, memory, pair, region};
use migration::Section;
use migration::channel::{
    ChannelError, DataClass, DataReceiver, DataSender, DataSink, DeviceFrame,
};
use migration::ram::Codec;
use migration::wire::{
    DeviceHead, FRAME_DEVICE_MAX, FrameHeader, HEADER_LEN, IGNORABLE, RamRange, SECTION_MAX,
    SectionHead, device_header, encode_message, encode_section, kind, ram_packed_header,
    ram_pages_header, ram_zero_header,
};
use proptest::prelude::*;
use switchover::message::{Attempt, ChannelEnd, DeviceIndex, Features, Message, Session, Side};

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
const PLAIN: Features = Features {
    verify: false,
    ram_checksum: false,
    device_checksum: false,
    telemetry: false,
    lz4: false,
    zstd: false,
    local: false,
    echo: false,
};

fn section(name: &str, payload: Vec<u8>) -> Section {
    Section { name: name.into(), kind: "test".into(), version: 7, payload }
}

/// Gives raw bytes to a receiver; returns how it ended and what it took.
fn receive(features: Features, bytes: &[u8]) -> (Result<(), ChannelError>, Kept) {
    let memory = memory(&[region(0, 4 * MIB)]);
    let (mut source, mut destination) = pair(Kind::Unix);
    destination.set_label("data channel 0");
    let receiver = DataReceiver::new(destination, features, memory);
    let kept = Kept::default();
    let end = thread::scope(|scope| {
        let thread = scope.spawn(|| receiver.run(&kept));
        // The receiver may be gone before it has all.
        let _ = source.write_all(bytes);
        source.shutdown();
        thread.join().unwrap()
    });
    (end, kept)
}

/// One good frame of each kind.
fn frames(features: Features) -> Vec<(u16, Vec<u8>)> {
    let page = [0x5a; PAGE as usize];
    let range = RamRange { gpa: PAGE, len: PAGE };
    let checksum = features.ram_checksum.then(|| crc32fast::hash(&page));
    let pages = [&ram_pages_header(range, checksum).encode()[..], &page].concat();
    let zero = ram_zero_header(range).encode().to_vec();
    let head = DeviceHead {
        device: DeviceIndex(1),
        session: Session(2),
        class: DataClass::Dirty,
        offset: 3,
    };
    let data = b"state of the device";
    let device = device_header(&head, data, features.device_checksum).unwrap();
    let device = [&device.encode()[..], data].concat();
    let head = SectionHead { attempt: Attempt(1), index: 0 };
    let wanted = section("vcpu0", vec![1, 2, 3]);
    let (header, names) = encode_section(head, &wanted).unwrap();
    let section = [&header.encode()[..], &names, &wanted.payload].concat();
    vec![
        (kind::RAM_PAGES, pages),
        (kind::RAM_ZERO, zero),
        (kind::DEVICE, device),
        (kind::SECTION, section),
    ]
}

#[test]
fn device_data_and_sections_arrive_as_they_were_sent() {
    for (kind, features) in [(Kind::Unix, PLAIN), (Kind::Tcp, CHECKED)] {
        let guest = memory(&[region(0, PAGE)]);
        let link = Link::new(kind, 1, features, &guest);
        let sender = &link.senders[0];
        let (device, session) = (DeviceIndex(65535), Session(u64::MAX));
        let mut sent = vec![];
        let mut offset = 0;
        let lengths = [0, 1, 4095, 70_000, FRAME_DEVICE_MAX, 1];
        let classes = [DataClass::Initial, DataClass::Dirty, DataClass::StopCopy];
        for (i, len) in lengths.into_iter().enumerate() {
            let (class, data) = (classes[i % 3], vec![i as u8 + 1; len]);
            sender.send_device(device, session, class, offset, &data).unwrap();
            let checksum = features.device_checksum.then(|| crc32fast::hash(&data));
            let data = data.into();
            sent.push(DeviceFrame { device, session, class, offset, checksum, data });
            offset += len as u64;
        }
        let sections = [
            section("", vec![]),
            section("größer", vec![9; 100_000]),
            section(&"n".repeat(255), vec![8; SECTION_MAX]),
        ];
        for (index, section) in sections.iter().enumerate() {
            sender.send_section(Attempt(4), index as u32, section).unwrap();
        }
        let kept = link.finish_well();
        assert_eq!(*kept.frames.lock().unwrap(), sent);
        let arrived = kept.sections.lock().unwrap();
        for (index, wanted) in sections.iter().enumerate() {
            assert_eq!(arrived[index], (Attempt(4), index as u32, wanted.clone()));
        }
    }
}

#[test]
fn frames_of_many_threads_stay_whole() {
    let guest = memory(&[region(0, PAGE)]);
    let link = Link::new(Kind::Unix, 1, CHECKED, &guest);
    let threads = 6u16;
    thread::scope(|scope| {
        for device in 0..threads {
            let sender = link.senders[0].clone();
            scope.spawn(move || {
                for i in 0..60u64 {
                    let data = vec![device as u8; 1 + (i as usize * 997) % 50_000];
                    let (device, session) = (DeviceIndex(device), Session(1));
                    sender.send_device(device, session, DataClass::Dirty, i, &data).unwrap();
                }
            });
        }
    });
    let kept = link.finish_well();
    let frames = kept.frames.lock().unwrap();
    assert_eq!(frames.len(), 60 * usize::from(threads));
    for device in 0..threads {
        let own: Vec<_> = frames.iter().filter(|f| f.device == DeviceIndex(device)).collect();
        for (i, frame) in own.iter().enumerate() {
            assert_eq!(frame.offset, i as u64, "in the order of their thread");
            assert_eq!(*frame.data, vec![device as u8; 1 + (i * 997) % 50_000]);
        }
    }
}

#[test]
fn what_a_peer_would_refuse_is_not_sent_and_the_channel_goes_on() {
    let guest = memory(&[region(0, PAGE)]);
    let link = Link::new(Kind::Unix, 1, PLAIN, &guest);
    let sender = &link.senders[0];
    let long = vec![0; FRAME_DEVICE_MAX + 1];
    let (device, session) = (DeviceIndex(0), Session(1));
    assert!(sender.send_device(device, session, DataClass::Dirty, 0, &long).is_err());
    assert!(sender.send_section(Attempt(1), 0, &section("x", vec![0; SECTION_MAX + 1])).is_err());
    assert!(sender.send_section(Attempt(1), 0, &section(&"x".repeat(256), vec![])).is_err());
    assert_eq!(sender.totals().frames, 0);
    sender.send_device(device, session, DataClass::Dirty, 0, &long[1..]).unwrap();
    assert_eq!(link.finish_well().frames.lock().unwrap().len(), 1);
}

#[test]
fn every_flipped_bit_of_a_checked_frame_is_seen() {
    for (kind, frame) in frames(CHECKED) {
        let (end, _) = receive(CHECKED, &frame);
        end.unwrap();
        // Every bit of header and names, some of a long payload.
        let bits = (0..8 * frame.len()).filter(|bit| *bit < 8 * 80 || bit % 509 == 0);
        for bit in bits {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let (end, kept) = receive(CHECKED, &damaged);
            let error = end.expect_err("a flipped bit is seen").to_string();
            assert!(error.starts_with("data channel 0: "), "{error}");
            assert!(kept.frames.lock().unwrap().is_empty(), "kind {kind:#x}, bit {bit}");
            assert!(kept.sections.lock().unwrap().is_empty(), "kind {kind:#x}, bit {bit}");
        }
    }
}

#[test]
fn without_payload_checksums_headers_are_still_checked_and_sections_always() {
    for (kind, frame) in frames(PLAIN) {
        for byte in 0..frame.len().min(200) {
            let mut damaged = frame.clone();
            damaged[byte] ^= 0x40;
            let seen = receive(PLAIN, &damaged).0.is_err();
            assert_eq!(seen, byte < HEADER_LEN || kind == kind::SECTION, "{kind:#x}, {byte}");
        }
    }
}

#[test]
fn an_agreed_checksum_may_not_be_left_out() {
    for (kind, frame) in frames(PLAIN) {
        let refused = receive(CHECKED, &frame).0.is_err();
        assert_eq!(refused, matches!(kind, kind::RAM_PAGES | kind::DEVICE), "{kind:#x}");
    }
    for (_, frame) in frames(CHECKED) {
        receive(PLAIN, &frame).0.unwrap();
    }
}

#[test]
fn the_end_in_the_middle_of_a_frame_is_an_error() {
    for (kind, frame) in frames(CHECKED) {
        for part in [1, 39, 40, 41, frame.len() - 1] {
            if part >= frame.len() {
                continue;
            }
            let (end, _) = receive(CHECKED, &frame[..part]);
            let truncated = matches!(end, Err(ChannelError::Truncated { .. }));
            assert!(truncated, "{kind:#x}, {part} bytes: {end:?}");
        }
        receive(CHECKED, &[&frame[..], &frame].concat()).0.unwrap();
    }
    receive(CHECKED, &[]).0.unwrap();
}

#[test]
fn absurd_lengths_are_refused_without_waiting_for_them() {
    for kind in [kind::RAM_PAGES, kind::RAM_ZERO, kind::DEVICE, kind::SECTION, 0x777 | IGNORABLE] {
        for length in [17 << 20, u32::MAX] {
            let header = FrameHeader { kind, length, ..FrameHeader::default() };
            let error = receive(PLAIN, &header.encode()).0.unwrap_err();
            assert!(error.to_string().contains("the limit is"), "{kind:#x}: {error}");
        }
    }
}

#[test]
fn control_frames_and_unknown_kinds_do_not_belong_on_a_data_channel() {
    let message = encode_message(&Message::Commit { attempt: Attempt(1) }).unwrap();
    let error = receive(PLAIN, &message).0.unwrap_err().to_string();
    assert!(error.contains("does not belong on a data channel"), "{error}");
    let keep_alive = encode_message(&Message::KeepAlive).unwrap();
    assert!(receive(PLAIN, &keep_alive).0.is_err());
    let header = |kind| FrameHeader { kind, length: 9000, ..FrameHeader::default() };
    let unknown = [&header(0x777).encode()[..], &[1; 9000]].concat();
    let error = receive(PLAIN, &unknown).0.unwrap_err().to_string();
    assert!(error.contains("0x0777"), "{error}");
    let ignorable = [&header(0x777 | IGNORABLE).encode()[..], &[1; 9000]].concat();
    let device = frames(PLAIN).remove(2).1;
    let (end, kept) = receive(PLAIN, &[&ignorable[..], &device, &ignorable].concat());
    end.unwrap();
    assert_eq!(kept.frames.lock().unwrap().len(), 1);
}

#[test]
fn memory_that_was_handed_over_is_not_written_by_a_channel() {
    let local = Features { local: true, lz4: true, ..PLAIN };
    let range = RamRange { gpa: PAGE, len: PAGE };
    let packed = ram_packed_header(range, 100, Codec::Lz4, None).encode().to_vec();
    let ram = frames(local).into_iter().take(2).chain([(kind::RAM_PACKED, packed)]);
    for (kind, frame) in ram {
        let error = receive(local, &frame).0.unwrap_err().to_string();
        assert!(error.contains("handed over"), "{kind:#x}: {error}");
    }
    for (kind, frame) in frames(local).into_iter().skip(2) {
        assert!(receive(local, &frame).0.is_ok(), "{kind:#x}");
    }
}

/// An error of the sink ends the channel, and the frame does not count as arrived.
#[test]
fn what_the_sink_refuses_did_not_arrive() {
    struct Refusing;
    impl DataSink for Refusing {
        fn device(&self, frame: DeviceFrame) -> Result<(), ChannelError> {
            if frame.offset == 0 { Ok(()) } else { Err(ChannelError::sink("no such session")) }
        }
        fn section(&self, _: Attempt, _: u32, _: Section) -> Result<(), ChannelError> {
            Err(ChannelError::sink("no section is due"))
        }
    }
    let (source, destination) = pair(Kind::Unix);
    let receiver = DataReceiver::new(destination, PLAIN, memory(&[region(0, PAGE)]));
    let totals = receiver.totals();
    let sender = DataSender::new(source, PLAIN);
    for offset in [0, 5] {
        let (device, session) = (DeviceIndex(0), Session(1));
        sender.send_device(device, session, DataClass::Initial, offset, b"12345").unwrap();
    }
    let error = receiver.run(&Refusing).unwrap_err();
    assert_eq!(error.to_string(), "no such session");
    assert_eq!((totals.frames(), totals.bytes()), (1, HEADER_LEN as u64 + 5));
}

#[test]
fn the_end_mark_is_waited_for() {
    let guest = memory(&[region(0, PAGE)]);
    let link = Link::new(Kind::Unix, 1, PLAIN, &guest);
    let (sender, totals) = (link.senders[0].clone(), Arc::clone(&link.totals[0]));
    assert!(totals.wait_for(ChannelEnd::default(), LIMIT), "nothing was sent");
    let frame_bytes = HEADER_LEN as u64 + 10;
    let end = ChannelEnd { frames: 500, bytes: 500 * frame_bytes };
    let waiting = thread::spawn(move || totals.wait_for(end, LIMIT));
    for i in 0..500 {
        let (device, session) = (DeviceIndex(0), Session(1));
        sender.send_device(device, session, DataClass::Initial, 10 * i, &[0; 10]).unwrap();
    }
    assert!(waiting.join().unwrap());
    let totals = &link.totals[0];
    let short = std::time::Duration::from_millis(5);
    let more = ChannelEnd { frames: 501, bytes: 501 * frame_bytes };
    assert!(!totals.wait_for(more, short), "one frame is missing");
    let less = ChannelEnd { frames: 499, bytes: 499 * frame_bytes };
    assert!(!totals.wait_for(less, LIMIT), "more arrived than was sent");
    assert!(!totals.wait_for(ChannelEnd { frames: 500, bytes: 1 }, LIMIT), "other bytes arrived");
    link.finish_well();
}

#[test]
fn a_blocked_sender_is_freed_by_shutdown() {
    for kind in [Kind::Unix, Kind::Tcp] {
        let (source, _destination) = pair(kind);
        let sender = DataSender::new(source, PLAIN);
        let sending = {
            let sender = sender.clone();
            thread::spawn(move || {
                let data = vec![0; FRAME_DEVICE_MAX];
                let mut offset = 0;
                loop {
                    let (device, session) = (DeviceIndex(0), Session(1));
                    let class = DataClass::Dirty;
                    if let Err(error) = sender.send_device(device, session, class, offset, &data) {
                        return error;
                    }
                    offset += 1;
                }
            })
        };
        // Nobody reads: sooner or later the socket is full and the thread inside its call.
        let mut before = None;
        while before.is_none_or(|before| before != sender.totals()) {
            before = Some(sender.totals());
            thread::sleep(std::time::Duration::from_millis(100));
        }
        sender.shutdown();
        let error = sending.join().unwrap();
        assert!(matches!(error, ChannelError::Io { call: "write", .. }), "{error}");
        let (device, session) = (DeviceIndex(0), Session(1));
        let error = sender.send_device(device, session, DataClass::Dirty, 0, b"x").unwrap_err();
        assert!(matches!(error, ChannelError::ShutDown { .. }), "{error}");
    }
}

/// TCP_USER_TIMEOUT strikes for a window that stays closed too, although the peer's kernel answers.
#[test]
fn a_tcp_peer_that_takes_nothing_in_is_gone_after_the_stall_limit() {
    let (source, _destination) = pair(Kind::Tcp);
    let sender = DataSender::with_stall(source, PLAIN, std::time::Duration::from_millis(300));
    let data = vec![0; FRAME_DEVICE_MAX];
    let error = loop {
        let (device, session) = (DeviceIndex(0), Session(1));
        if let Err(error) = sender.send_device(device, session, DataClass::Dirty, 0, &data) {
            break error;
        }
    };
    assert_eq!(error.failure(Side::Source).errno, Some(libc::ETIMEDOUT), "{error}");
}

#[test]
fn the_rate_is_that_of_the_channel_whoever_sends_and_a_sample_is_taken_once() {
    let (source, destination) = pair(Kind::Unix);
    let sender = DataSender::new(source, PLAIN);
    let receiver = DataReceiver::new(destination, PLAIN, memory(&[region(0, PAGE)]));
    let receiving = thread::spawn(move || receiver.run(&Kept::default()));
    let (session, class) = (Session(1), DataClass::Dirty);
    let data = vec![2; FRAME_DEVICE_MAX];
    thread::scope(|scope| {
        for device in 0..2 {
            let (sender, data) = (&sender, &data);
            scope.spawn(move || {
                let send = |i| sender.send_device(DeviceIndex(device), session, class, i, data);
                for i in 0..32 {
                    send(i).unwrap();
                }
            });
        }
    });
    let samples = sender.take_rate_samples();
    let bytes = samples.iter().map(|sample| sample.bytes).sum::<u64>();
    assert!(bytes > 0 && bytes <= sender.totals().bytes, "{samples:?}");
    assert!(samples.iter().all(|sample| sample.busy.0 > 0), "{samples:?}");
    assert!(sender.take_rate_samples().is_empty(), "a sample is taken once");
    sender.shutdown();
    receiving.join().unwrap().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Arbitrary bytes, and good frames with arbitrary bytes in between.
    #[test]
    fn no_bytes_panic_or_reach_memory_outside(
        garbage in prop::collection::vec(any::<u8>(), 0..300),
        pick in 0..4usize,
        cut in any::<prop::sample::Index>(),
    ) {
        let _ = receive(CHECKED, &garbage);
        let mut bytes = frames(PLAIN).remove(pick).1;
        let at = cut.index(bytes.len());
        bytes.splice(at..at, garbage);
        let _ = receive(PLAIN, &bytes);
    }

    /// Headers whose checksum fits and whose fields are arbitrary.
    #[test]
    fn no_fields_panic_or_reach_memory_outside(
        kind in prop::sample::select(&[kind::RAM_PAGES, kind::RAM_ZERO, kind::RAM_PACKED, kind::DEVICE, kind::SECTION][..]),
        pages in 0..5u32,
        (a, b, c) in prop_oneof![
            any::<(u64, u64, u32)>(),
            (0..2000u64, 0..2000u64, any::<u32>()).prop_map(|(a, b, c)| (a * PAGE, b * PAGE, c)),
        ],
    ) {
        let length = if kind == kind::RAM_ZERO { 0 } else { pages * PAGE as u32 };
        let header = FrameHeader { kind, length, payload_checksum: None, a, b, c };
        let mut bytes = header.encode().to_vec();
        bytes.resize(bytes.len() + length as usize, 0xcc);
        let layout = [region(MIB, MIB)];
        let guest = memory(&layout);
        let (mut source, destination) = pair(Kind::Unix);
        let receiver = DataReceiver::new(destination, PLAIN, Arc::clone(&guest));
        source.write_all(&bytes).unwrap();
        source.shutdown();
        let end = receiver.run(&Kept::default());
        if kind == kind::RAM_PAGES && end.is_ok() {
            prop_assert_eq!(allocated(&guest), u64::from(length));
            prop_assert!(a >= MIB && a + u64::from(length) <= 2 * MIB);
        } else {
            prop_assert_eq!(allocated(&guest), 0);
        }
    }
}
