//! Frames: what goes in comes out, and nothing else gets through.

mod common;

use migration::Section;
use migration::wire::{
    Attach, CONTROL_MAX, DESCRIBE_MAX, DataClass, DeviceHead, FRAME_DEVICE_MAX, FrameHeader,
    HEADER_LEN, IGNORABLE, MAGIC, RamRange, SECTION_MAX, SectionHead, WireError, decode_message,
    decode_section, device_header, encode_message, encode_section, kind, payload_limit,
};
use proptest::prelude::*;
use switchover::message::*;

fn header_of(frame: &[u8]) -> Result<FrameHeader, WireError> {
    FrameHeader::decode(frame[..HEADER_LEN].try_into().unwrap())
}

fn decode(frame: &[u8]) -> Result<Option<Message>, WireError> {
    decode_message(&header_of(frame)?, &frame[HEADER_LEN..])
}

/// A frame with another payload, and a header that fits it.
fn with_payload(kind: u16, payload: &[u8]) -> Vec<u8> {
    let payload_checksum = Some(crc32fast::hash(payload));
    let length = payload.len() as u32;
    let header = FrameHeader { kind, length, payload_checksum, ..FrameHeader::default() };
    [&header.encode()[..], payload].concat()
}

fn id() -> impl Strategy<Value = Id> {
    any::<u128>().prop_map(Id)
}

fn failure() -> impl Strategy<Value = Failure> {
    let text = || prop::option::of(".{0,20}");
    (any::<bool>(), ".{0,20}", text(), text(), any::<Option<i32>>(), ".{0,60}", text()).prop_map(
        |(source, phase, device, call, errno, what, remedy)| Failure {
            side: if source { Side::Source } else { Side::Destination },
            phase,
            device,
            call,
            errno,
            what,
            remedy,
        },
    )
}

fn features() -> impl Strategy<Value = Features> {
    any::<[bool; 8]>().prop_map(
        |[verify, ram_checksum, device_checksum, telemetry, lz4, zstd, local, echo]| Features {
            verify,
            ram_checksum,
            device_checksum,
            telemetry,
            lz4,
            zstd,
            local,
            echo,
        },
    )
}

fn session() -> impl Strategy<Value = (DeviceIndex, Session, u64)> {
    any::<(u16, u64, u64)>().prop_map(|(d, s, o)| (DeviceIndex(d), Session(s), o))
}

fn attempt() -> impl Strategy<Value = Attempt> {
    any::<u64>().prop_map(Attempt)
}

fn state_end() -> impl Strategy<Value = Message> {
    let channels = prop::collection::vec(any::<(u64, u64)>(), 0..8);
    let devices = prop::collection::vec(any::<(u16, u64, u32)>(), 0..8);
    (attempt(), channels, devices, any::<u32>()).prop_map(
        |(attempt, channels, devices, sections)| {
            let channel = |(frames, bytes)| ChannelEnd { frames, bytes };
            let device = |(device, bytes, checksum)| DeviceEnd {
                device: DeviceIndex(device),
                bytes,
                checksum,
            };
            Message::StateEnd {
                attempt,
                channels: channels.into_iter().map(channel).collect(),
                devices: devices.into_iter().map(device).collect(),
                sections,
            }
        },
    )
}

fn telemetry() -> impl Strategy<Value = Message> {
    let devices = prop::collection::vec(any::<(u16, u64, u64, Option<u64>)>(), 0..8);
    let memory = any::<(Option<u64>, u64, Option<u64>, u64)>();
    let boot_id = prop::option::of("[0-9a-f-]{36}");
    (devices, any::<u64>(), memory, any::<Option<u64>>(), boot_id).prop_map(
        |(devices, ram_bytes, memory, first_heartbeat_ns, boot_id)| {
            let (populated_bytes, populate_ns, mapped_bytes, map_ns) = memory;
            let device = |(device, loaded_bytes, load_ns, start_ns)| DeviceTelemetry {
                device: DeviceIndex(device),
                loaded_bytes,
                load_ns,
                validate_ns: start_ns,
                start_ns,
            };
            let devices = devices.into_iter().map(device).collect();
            Message::Telemetry {
                devices,
                ram_bytes,
                populated_bytes,
                populate_ns,
                mapped_bytes,
                map_ns,
                first_heartbeat_ns,
                boot_id,
            }
        },
    )
}

fn timeline() -> impl Strategy<Value = Message> {
    let spans = prop::collection::vec(("[a-z-]{0,30}", any::<(u64, u64, u64)>()), 0..8);
    (attempt(), prop::option::of("[0-9a-f-]{36}"), spans).prop_map(|(attempt, boot_id, spans)| {
        let span = |(name, (begin_ns, end_ns, work_ns))| Span { name, begin_ns, end_ns, work_ns };
        Message::Timeline { attempt, boot_id, spans: spans.into_iter().map(span).collect() }
    })
}

fn cost() -> impl Strategy<Value = Message> {
    any::<(u64, u64, u64, u64, u64)>().prop_map(
        |(control_ns, data_ns, devices_ns, populate_ns, memory_peak_bytes)| Message::Cost {
            control_ns,
            data_ns,
            devices_ns,
            populate_ns,
            memory_peak_bytes,
        },
    )
}

/// Every message there is.
fn message() -> impl Strategy<Value = Message> {
    let hello = (features(), id(), id(), any::<u64>(), prop::option::of(id())).prop_map(
        |(features, migration, instance, connection, secret)| Message::Hello {
            features,
            migration,
            instance,
            connection: Connection(connection),
            secret,
        },
    );
    let accept = (features(), id(), id())
        .prop_map(|(features, instance, secret)| Message::Accept { features, instance, secret });
    let hashes = (attempt(), "[0-9a-f]{64}", prop::collection::vec(any::<Option<String>>(), 0..4))
        .prop_map(|(attempt, memory, devices)| Message::Hashes { attempt, memory, devices });
    let opening = prop_oneof![
        hello,
        accept,
        failure().prop_map(|reason| Message::Refuse { reason }),
        ".{0,200}".prop_map(|body| Message::Describe { body }),
        Just(Message::DescribeOk),
        prop::collection::vec(".{0,40}", 0..5).prop_map(|list| Message::Mismatch { list }),
    ];
    let precopy = prop_oneof![
        session().prop_map(|(device, session, _)| Message::SessionBegin { device, session }),
        session().prop_map(|(device, session, offset)| Message::InitialDataSent {
            device,
            session,
            offset
        }),
        session().prop_map(|(device, session, _)| Message::SwitchoverAck { device, session }),
        session().prop_map(|(device, session, offset)| Message::Reinit { device, session, offset }),
        any::<(u64, u64)>().prop_map(|(number, bytes)| Message::Pass { number, bytes }),
        telemetry(),
        timeline(),
        Just(Message::KeepAlive),
        any::<u64>().prop_map(|number| Message::Echo { number }),
        any::<u64>().prop_map(|number| Message::Echoed { number }),
        cost(),
    ];
    let switchover = prop_oneof![
        attempt().prop_map(|attempt| Message::StopCopyBegin { attempt }),
        attempt().prop_map(|attempt| Message::Revoked { attempt }),
        attempt().prop_map(|attempt| Message::RollBack { attempt }),
        attempt().prop_map(|attempt| Message::RolledBack { attempt }),
        state_end(),
        (attempt(), any::<u64>())
            .prop_map(|(attempt, window_ms)| Message::Ready { attempt, window_ms }),
        attempt().prop_map(|attempt| Message::Commit { attempt }),
        attempt().prop_map(|attempt| Message::Running { attempt }),
        (attempt(), failure()).prop_map(|(attempt, reason)| Message::Never { attempt, reason }),
        attempt().prop_map(|attempt| Message::Query { attempt }),
        (attempt(), proptest::option::of(failure()))
            .prop_map(|(attempt, reason)| Message::Unknown { attempt, reason }),
        attempt().prop_map(|attempt| Message::Abort { attempt }),
        attempt().prop_map(|attempt| Message::HashRequest { attempt }),
        hashes,
        Just(Message::Cancel),
        failure().prop_map(|reason| Message::Failed { reason }),
    ];
    prop_oneof![opening, precopy, switchover]
}

proptest! {
    #[test]
    fn every_message_comes_out_as_it_went_in(message in message()) {
        let frame = encode_message(&message).unwrap();
        prop_assert_eq!(decode(&frame).unwrap(), Some(message));
    }

    #[test]
    fn one_flipped_bit_of_a_message_is_seen(message in message(), at in any::<prop::sample::Index>()) {
        let mut frame = encode_message(&message).unwrap();
        let bit = at.index(8 * frame.len());
        frame[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode(&frame).is_err());
    }

    #[test]
    fn a_header_comes_out_as_it_went_in(
        number in prop::sample::select(KINDS),
        length in any::<u32>(),
        payload_checksum in any::<Option<u32>>(),
        (a, b, c) in any::<(u64, u64, u32)>(),
    ) {
        let length = length % (payload_limit(number).unwrap() as u32 + 1);
        let header = FrameHeader { kind: number, length, payload_checksum, a, b, c };
        prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    }

    /// Arbitrary bytes with a checksum that fits: what is decoded keeps every limit, and encodes to itself.
    #[test]
    fn no_header_panics_or_breaks_a_limit(mut bytes in any::<[u8; HEADER_LEN]>(), number in any::<u16>()) {
        let _ = FrameHeader::decode(&bytes);
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&number.to_le_bytes());
        bytes[6..8].copy_from_slice(&(number & 1).to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..36]);
        bytes[36..].copy_from_slice(&checksum.to_le_bytes());
        if let Ok(header) = FrameHeader::decode(&bytes) {
            let limit = payload_limit(header.kind).unwrap_or(CONTROL_MAX);
            prop_assert!(header.length as usize <= limit);
            prop_assert!(header.is_known() || header.kind & IGNORABLE != 0);
            // None of these may panic, whatever the fields say.
            let _ = RamRange::decode(&header);
            let _ = DeviceHead::decode(&header);
            let _ = Attach::decode(&header, &[0; 32]);
        }
    }

    #[test]
    fn no_payload_panics(
        number in prop::sample::select(KINDS),
        payload in prop::collection::vec(any::<u8>(), 0..200),
        text in "[\\[\\]{}:,\"a-z0-9-]{0,40}",
    ) {
        for payload in [&payload[..], text.as_bytes()] {
            let frame = with_payload(number, payload);
            let Ok(header) = header_of(&frame) else { continue };
            let _ = decode_message(&header, payload);
            let _ = Attach::decode(&header, payload);
            let _ = decode_section(&header, payload.to_vec());
        }
    }

    #[test]
    fn an_attach_comes_out_as_it_went_in(
        migration in id(), secret in id(), channel in any::<u16>(), connection in any::<u64>(),
    ) {
        let attach = Attach { migration, secret, channel, connection: Connection(connection) };
        let (header, payload) = attach.encode();
        let header = FrameHeader::decode(&header.encode()).unwrap();
        prop_assert_eq!(Attach::decode(&header, &payload), Ok(attach));
    }

    #[test]
    fn a_device_head_comes_out_as_it_went_in(
        (device, session, offset) in session(),
        class in prop::sample::select(&[DataClass::Initial, DataClass::Dirty, DataClass::StopCopy][..]),
        data in prop::collection::vec(any::<u8>(), 0..100),
        checksum in any::<bool>(),
    ) {
        let head = DeviceHead { device, session, class, offset };
        let header = device_header(&head, &data, checksum).unwrap();
        prop_assert_eq!(header.payload_checksum.is_some(), checksum);
        let header = FrameHeader::decode(&header.encode()).unwrap();
        let wraps = offset.checked_add(data.len() as u64).is_none();
        match DeviceHead::decode(&header) {
            Ok(decoded) => prop_assert_eq!(decoded, head),
            Err(_) => prop_assert!(wraps),
        }
    }

    #[test]
    fn a_section_comes_out_as_it_went_in(
        (attempt, index, version) in any::<(u64, u32, u32)>(),
        name in ".{0,40}", section_kind in ".{0,40}",
        payload in prop::collection::vec(any::<u8>(), 0..300),
        flip in any::<prop::sample::Index>(),
    ) {
        let section = Section { name, kind: section_kind, version, payload };
        let head = SectionHead { attempt: Attempt(attempt), index };
        let (header, names) = encode_section(head, &section).unwrap();
        let mut payload = [&names[..], &section.payload].concat();
        prop_assert_eq!(decode_section(&header, payload.clone()), Ok((head, section)));
        let bit = flip.index(8 * payload.len());
        payload[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode_section(&header, payload).is_err());
    }
}

const KINDS: &[u16] = &[
    kind::HELLO,
    kind::ACCEPT,
    kind::REFUSE,
    kind::DESCRIBE,
    kind::DESCRIBE_OK,
    kind::MISMATCH,
    kind::SESSION_BEGIN,
    kind::INITIAL_DATA_SENT,
    kind::SWITCHOVER_ACK,
    kind::REINIT,
    kind::PASS,
    kind::STOP_COPY_BEGIN,
    kind::REVOKED,
    kind::ROLL_BACK,
    kind::ROLLED_BACK,
    kind::STATE_END,
    kind::READY,
    kind::COMMIT,
    kind::RUNNING,
    kind::NEVER,
    kind::QUERY,
    kind::UNKNOWN,
    kind::ABORT,
    kind::TELEMETRY,
    kind::HASH_REQUEST,
    kind::HASHES,
    kind::CANCEL,
    kind::FAILED,
    kind::KEEP_ALIVE,
    kind::TIMELINE,
    kind::COST,
    kind::ATTACH,
    kind::ATTACH_OK,
    kind::ATTACH_REFUSED,
    kind::RAM_PAGES,
    kind::RAM_ZERO,
    kind::RAM_PACKED,
    kind::DEVICE,
    kind::SECTION,
];

/// The numbers are the protocol: a released one never changes.
#[test]
fn the_numbers_of_the_protocol_are_fixed() {
    let attempt = Attempt(3);
    let reason = || Failure::new(Side::Source, "x");
    let (device, session, offset) = (DeviceIndex(0), Session(1), 2);
    let id = Id(7);
    let features = Features::default();
    let connection = Connection(1);
    #[rustfmt::skip]
    let table = [
        (0x0001, Message::Hello { features, migration: id, instance: id, connection, secret: None }),
        (0x0002, Message::Accept { features, instance: id, secret: id }),
        (0x0003, Message::Refuse { reason: reason() }),
        (0x0004, Message::Describe { body: String::new() }),
        (0x0005, Message::DescribeOk),
        (0x0006, Message::Mismatch { list: vec![] }),
        (0x0007, Message::SessionBegin { device, session }),
        (0x0008, Message::InitialDataSent { device, session, offset }),
        (0x0009, Message::SwitchoverAck { device, session }),
        (0x000a, Message::Reinit { device, session, offset }),
        (0x800b, Message::Pass { number: 1, bytes: 2 }),
        (0x000c, Message::StopCopyBegin { attempt }),
        (0x000d, Message::Revoked { attempt }),
        (0x000e, Message::RollBack { attempt }),
        (0x000f, Message::RolledBack { attempt }),
        (0x0010, Message::StateEnd { attempt, channels: vec![], devices: vec![], sections: 0 }),
        (0x0011, Message::Ready { attempt, window_ms: 5000 }),
        (0x0012, Message::Commit { attempt }),
        (0x0013, Message::Running { attempt }),
        (0x0014, Message::Never { attempt, reason: reason() }),
        (0x0015, Message::Query { attempt }),
        (0x0016, Message::Unknown { attempt, reason: None }),
        (0x0017, Message::Abort { attempt }),
        (0x8018, Message::Telemetry { devices: vec![], ram_bytes: 0, populated_bytes: None, populate_ns: 0, mapped_bytes: None, map_ns: 0, first_heartbeat_ns: None, boot_id: None }),
        (0x0019, Message::HashRequest { attempt }),
        (0x001a, Message::Hashes { attempt, memory: String::new(), devices: vec![] }),
        (0x001b, Message::Cancel),
        (0x001c, Message::Failed { reason: reason() }),
        (0x801d, Message::KeepAlive),
        (0x801e, Message::Timeline { attempt, boot_id: None, spans: vec![] }),
        (0x8020, Message::Echo { number: 1 }),
        (0x8021, Message::Echoed { number: 1 }),
        (0x801f, Message::Cost { control_ns: 1, data_ns: 2, devices_ns: 3, populate_ns: 4, memory_peak_bytes: 5 }),
    ];
    for (number, message) in table {
        let frame = encode_message(&message).unwrap();
        assert_eq!(header_of(&frame).unwrap().kind, number, "{message:?}");
        assert_eq!(decode(&frame).unwrap(), Some(message));
    }
    let data = [0x100, 0x101, 0x102, 0x200, 0x201, 0x202, 0x210, 0x220];
    assert_eq!(KINDS[table_len()..], data);
}

fn table_len() -> usize {
    KINDS.iter().position(|number| *number == kind::ATTACH).unwrap()
}

/// The bytes of one frame, as `docs/wire.md` shows them.
#[test]
fn the_layout_of_a_frame_is_fixed() {
    let frame = encode_message(&Message::Commit { attempt: Attempt(3) }).unwrap();
    #[rustfmt::skip]
    let expected = [
        0x56, 0x46, 0x59, 0x31, 0x12, 0x00, 0x01, 0x00, 0x0d, 0x00, 0x00, 0x00,
    ];
    assert_eq!(frame[..12], expected);
    let payload = br#"{"attempt":3}"#;
    assert_eq!(frame[12..16], crc32fast::hash(payload).to_le_bytes());
    assert_eq!(frame[16..36], [0; 20]);
    assert_eq!(frame[36..40], crc32fast::hash(&frame[..36]).to_le_bytes());
    assert_eq!(&frame[40..], payload);
}

#[test]
fn lengths_are_refused_before_memory_is_taken() {
    for number in KINDS {
        let limit = payload_limit(*number).unwrap();
        for (length, fits) in [(limit, true), (limit + 1, false), (u32::MAX as usize, false)] {
            let header =
                FrameHeader { kind: *number, length: length as u32, ..FrameHeader::default() };
            let decoded = FrameHeader::decode(&header.encode());
            assert_eq!(decoded.is_ok(), fits, "kind {number:#x}, {length} bytes");
            if let Err(error) = decoded {
                assert!(matches!(error, WireError::TooLong { .. }), "{error}");
            }
        }
    }
}

#[test]
fn unknown_kinds_are_skipped_only_where_they_say_so() {
    let frame = with_payload(0x0777, b"new");
    assert_eq!(decode(&frame), Err(WireError::UnknownKind(0x0777)));
    assert!(decode(&frame).unwrap_err().to_string().contains("0x0777"), "names the number");
    let frame = with_payload(0x0777 | IGNORABLE, b"new");
    assert_eq!(decode(&frame), Ok(None));
    let long = FrameHeader { kind: 0x0777 | IGNORABLE, length: 1 << 20, ..Default::default() };
    assert!(FrameHeader::decode(&long.encode()).is_err(), "what is skipped has a limit too");
}

#[test]
fn data_frames_are_no_messages() {
    for number in &KINDS[table_len()..] {
        let frame = with_payload(*number, b"");
        let error = decode(&frame).unwrap_err();
        assert!(matches!(error, WireError::WrongChannel { channel: "control", .. }), "{error}");
    }
}

#[test]
fn a_message_without_checksum_is_refused() {
    let payload = br#"{"attempt":3}"#;
    let header =
        FrameHeader { kind: kind::COMMIT, length: payload.len() as u32, ..FrameHeader::default() };
    let error = decode_message(&header, payload).unwrap_err();
    assert_eq!(error, WireError::ChecksumMissing { kind: kind::COMMIT });
}

/// A newer peer may add fields, not leave any out.
#[test]
fn new_fields_are_skipped_and_missing_ones_refused() {
    let commit = Message::Commit { attempt: Attempt(3) };
    let frame = with_payload(kind::COMMIT, br#"{"attempt":3,"urgency":"high"}"#);
    assert_eq!(decode(&frame), Ok(Some(commit)));
    let frame = with_payload(kind::DESCRIBE_OK, br#"{"reserved-bytes":1}"#);
    assert_eq!(decode(&frame), Ok(Some(Message::DescribeOk)));
    for payload in ["", "{}", "null", "[]", "3", r#"{"attempt":-1}"#, r#"{"attempt":3"#, "\u{7f}"] {
        let error = decode(&with_payload(kind::COMMIT, payload.as_bytes())).unwrap_err();
        assert!(matches!(error, WireError::Field { kind: kind::COMMIT, .. }), "{payload}: {error}");
    }
    let deep = format!("{}1{}", "[".repeat(30_000), "]".repeat(30_000));
    assert!(decode(&with_payload(kind::MISMATCH, deep.as_bytes())).is_err());
}

#[test]
fn what_a_peer_would_refuse_is_not_sent() {
    let long = Message::Mismatch { list: vec!["x".repeat(CONTROL_MAX)] };
    assert!(matches!(encode_message(&long), Err(WireError::TooLong { .. })));
    let describe = |len| Message::Describe { body: "x".repeat(len) };
    assert!(encode_message(&describe(DESCRIBE_MAX - 11)).is_ok());
    assert!(matches!(encode_message(&describe(DESCRIBE_MAX)), Err(WireError::TooLong { .. })));
    let head = DeviceHead {
        device: DeviceIndex(0),
        session: Session(1),
        class: DataClass::Initial,
        offset: 0,
    };
    assert!(device_header(&head, &vec![0; FRAME_DEVICE_MAX], false).is_ok());
    assert!(device_header(&head, &vec![0; FRAME_DEVICE_MAX + 1], false).is_err());
    let head = SectionHead { attempt: Attempt(1), index: 0 };
    let section = |name: usize, payload| Section {
        name: "n".repeat(name),
        kind: "k".into(),
        version: 1,
        payload: vec![0; payload],
    };
    assert!(encode_section(head, &section(255, SECTION_MAX)).is_ok());
    assert!(encode_section(head, &section(256, 0)).is_err());
    assert!(encode_section(head, &section(1, SECTION_MAX + 1)).is_err());
}

#[test]
fn other_protocols_are_named_as_such() {
    let error = header_of(b"GET / HTTP/1.1\r\nHost: example.org:4444\r\n\r\n").unwrap_err();
    assert_eq!(error, WireError::Magic(*b"GET "));
    assert!(error.to_string().contains("is the other side vmferry?"));
}

#[test]
fn unknown_flags_and_classes_are_refused() {
    let mut frame = with_payload(kind::COMMIT, br#"{"attempt":3}"#);
    frame[7] = 0x80;
    let checksum = crc32fast::hash(&frame[..36]);
    frame[36..40].copy_from_slice(&checksum.to_le_bytes());
    assert!(decode(&frame).unwrap_err().to_string().contains("unknown flags"));
    let header = FrameHeader { kind: kind::DEVICE, c: 3 << 16, ..FrameHeader::default() };
    assert!(DeviceHead::decode(&header).unwrap_err().to_string().contains("unknown class"));
}
