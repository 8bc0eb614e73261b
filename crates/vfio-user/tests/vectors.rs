//! The byte vectors of the reference (section 6.1, measured against libvfio-user), to the letter:
//! against our server in its compatibility mode, and against the codec.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use common::raw::{self, hex};
use common::serve;
use vfio_user::ServerOptions;
use vfio_user::codec::feature::{DeviceStateData, Feature, FeatureOp, FixedData, LoggingStart};
use vfio_user::codec::migration::MigData;
use vfio_user::codec::{Command, Header, MessageKind};

/// Name, request, reply. A reply of `None` is not in the reference: the exchange only moves the state.
type Vector = (&'static str, &'static str, Option<&'static str>);

const VECTORS: &[Vector] = &[
    (
        "PROBE GET 1",
        "02001000 18000000 00000000 00000000 08000000 01000500",
        Some("02001000 18000000 01000000 00000000 08000000 01000500"),
    ),
    (
        "PROBE GET 9",
        "03001000 18000000 00000000 00000000 08000000 09000500",
        Some("03001000 10000000 21000000 16000000"),
    ),
    (
        "PROBE SET 12",
        "04001000 18000000 00000000 00000000 08000000 0c000600",
        Some("04001000 10000000 21000000 16000000"),
    ),
    (
        "GET 1",
        "06001000 18000000 00000000 00000000 10000000 01000100",
        Some("06001000 20000000 01000000 00000000 10000000 01000100 05000000 00000000"),
    ),
    (
        "GET 1, argsz 8",
        "07001000 18000000 00000000 00000000 08000000 01000100",
        Some("07001000 10000000 21000000 16000000"),
    ),
    (
        "GET 2",
        "08001000 18000000 00000000 00000000 10000000 02000100",
        Some("08001000 20000000 01000000 00000000 10000000 02000100 02000000 00000000"),
    ),
    (
        "SET 2 = 7",
        "09001000 20000000 00000000 00000000 10000000 02000200 07000000 00000000",
        Some("09001000 20000000 21000000 16000000 10000000 02000200 07000000 00000000"),
    ),
    (
        "SET 2, argsz 8",
        "0a001000 20000000 00000000 00000000 08000000 02000200 06000000 00000000",
        Some("0a001000 10000000 21000000 16000000"),
    ),
    (
        "READ in RUNNING",
        "0b001100 18000000 00000000 00000000 18000000 10000000",
        Some("0b001100 10000000 21000000 16000000"),
    ),
    (
        "SET 2 = 6",
        "0c001000 20000000 00000000 00000000 10000000 02000200 06000000 00000000",
        Some("0c001000 20000000 01000000 00000000 10000000 02000200 06000000 00000000"),
    ),
    (
        "READ 16",
        "0d001100 18000000 00000000 00000000 18000000 10000000",
        // The data is the test device's: an initial record of 5000 bytes 0x1a.
        Some(
            "0d001100 28000000 01000000 00000000 18000000 10000000 \
             49881300 001a1a1a 1a1a1a1a 1a1a1a1a",
        ),
    ),
    (
        "READ, argsz 8",
        "0e001100 18000000 00000000 00000000 08000000 10000000",
        Some("0e001100 10000000 21000000 16000000"),
    ),
    (
        "WRITE in PRE_COPY",
        "0f001200 1c000000 00000000 00000000 0c000000 04000000 00000000",
        Some("0f001200 10000000 21000000 16000000"),
    ),
    ("SET 2 = 3", "10001000 20000000 00000000 00000000 10000000 02000200 03000000 00000000", None),
    (
        "RESET in STOP_COPY",
        "11000d00 10000000 00000000 00000000",
        Some("11000d00 10000000 21000000 16000000"),
    ),
    (
        "GET 2: the state stays 3",
        "12001000 18000000 00000000 00000000 10000000 02000100",
        Some("12001000 20000000 01000000 00000000 10000000 02000100 03000000 00000000"),
    ),
    (
        "LOG START nr=0",
        "13001000 28000000 00000000 00000000 18000000 06000200 00100000 00000000 00000000 00000000",
        Some(
            "13001000 28000000 01000000 00000000 18000000 06000200 00100000 00000000 00000000 \
             00000000",
        ),
    ),
    (
        "LOG START other page size",
        "14001000 28000000 00000000 00000000 18000000 06000200 00000100 00000000 00000000 00000000",
        Some(
            "14001000 28000000 21000000 16000000 18000000 06000200 00000100 00000000 00000000 \
             00000000",
        ),
    ),
    (
        "LOG STOP",
        "15001000 18000000 00000000 00000000 08000000 07000200",
        Some("15001000 18000000 01000000 00000000 08000000 07000200"),
    ),
    (
        "command 19",
        "16001300 10000000 00000000 00000000",
        Some("16001300 10000000 21000000 16000000"),
    ),
];

fn exchange(stream: &mut UnixStream, request: &str) -> Vec<u8> {
    stream.write_all(&hex(request)).unwrap();
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    let mut reply = head.to_vec();
    reply.resize(raw::u32_at(&head, 4) as usize, 0);
    stream.read_exact(&mut reply[16..]).unwrap();
    reply
}

#[test]
fn compatibility_mode_answers_as_libvfio_user_to_the_byte() {
    let options = ServerOptions { libvfio_user_compat: true, ..ServerOptions::default() };
    let served = serve(options, |_| {});
    let (mut stream, version) = raw::connect(&served.path, "{}");
    assert_eq!(version.bytes().len(), 125);
    assert_eq!(version.payload[..4], [0, 0, 1, 0]);
    assert_eq!(&version.payload[4..108], raw::LIBVFIO_USER_CAPS.as_bytes());
    assert_eq!(version.payload[108..], [0]);

    for (name, request, expected) in VECTORS {
        let reply = exchange(&mut stream, request);
        if let Some(expected) = expected {
            assert_eq!(reply, hex(expected), "{name}");
        }
    }
}

/// Every refused vector leaves the connection usable: the sequence above went on. Here each is the
/// only message of a connection whose next command must still work.
#[test]
fn a_refusal_leaves_the_connection_in_step() {
    let options = ServerOptions { libvfio_user_compat: true, ..ServerOptions::default() };
    let served = serve(options, |_| {});
    for (name, request, expected) in VECTORS {
        if !expected.is_some_and(|reply| hex(reply)[8] == 0x21) {
            continue;
        }
        let (mut stream, _) = raw::connect(&served.path, "{}");
        exchange(&mut stream, request);
        let get_1 = exchange(&mut stream, VECTORS[3].1);
        assert_eq!(get_1, hex(VECTORS[3].2.unwrap()), "after {name}");
    }
}

#[test]
fn the_codec_reads_and_writes_the_vectors() {
    for (name, request, reply) in VECTORS {
        for bytes in [Some(*request), *reply].into_iter().flatten().map(hex) {
            let head: [u8; 16] = bytes[..16].try_into().unwrap();
            let header = Header::decode(&head, 1 << 20).unwrap();
            assert_eq!(header.payload_bytes, bytes.len() - 16, "{name}");
            assert_eq!(header.encode(), head, "{name}");
        }
    }
    let decode = |i: usize| {
        let bytes = hex(VECTORS[i].1);
        let header = Header::decode(bytes[..16].try_into().unwrap(), 1 << 20).unwrap();
        (header, bytes[16..].to_vec())
    };

    let (header, payload) = decode(0);
    assert_eq!((header.msg_id, header.command), (2, Command::DEVICE_FEATURE));
    assert_eq!(header.kind, MessageKind::Command { no_reply: false });
    let probe = Feature { argsz: 8, index: 1, op: FeatureOp::Probe { get: true, set: false } };
    assert_eq!(Feature::decode(&payload).unwrap(), (probe, &[][..]));

    let (_, payload) = decode(6);
    let (feature, data) = Feature::decode(&payload).unwrap();
    assert_eq!(feature, Feature { argsz: 16, index: 2, op: FeatureOp::Set });
    let state = DeviceStateData { device_state: 7, data_fd: 0 };
    assert_eq!(DeviceStateData::decode(data).unwrap(), state);

    let (_, payload) = decode(10);
    assert_eq!(MigData::decode_request(&payload).unwrap(), MigData::new(16));
    let (_, payload) = decode(11);
    assert!(MigData::decode_request(&payload).is_err(), "argsz 8");

    let (_, payload) = decode(16);
    let (_, data) = Feature::decode(&payload).unwrap();
    let start = LoggingStart { page_size: 4096, ranges: vec![] };
    assert_eq!(LoggingStart::decode(data).unwrap(), start);

    let error = hex(VECTORS[1].2.unwrap());
    let header = Header::decode(error[..16].try_into().unwrap(), 1 << 20).unwrap();
    assert_eq!(header.kind, MessageKind::ErrorReply { errno: libc::EINVAL });
}
