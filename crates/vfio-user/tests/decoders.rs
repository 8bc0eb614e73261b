//! Every decoder: arbitrary bytes never panic and never make it answer more than it was given; what
//! is encoded is decoded to the same.

use proptest::prelude::*;
use vfio_migration::{DmaRange, IrqInfo, MmapArea, RawPrecopyInfo, RegionFlags};
use vfio_user::codec::device::{
    AREAS_MAX, DeviceInfo, IrqInfoPayload, RegionInfoReply, RegionInfoRequest,
};
use vfio_user::codec::dma::{DmaMap, DmaTransfer, DmaUnmap};
use vfio_user::codec::feature::{
    DataSizeData, DeviceStateData, Feature, FeatureOp, FixedData, LOGGING_RANGES_MAX,
    LoggingReportData, LoggingStart, MigrationData,
};
use vfio_user::codec::irq::{IrqAction, IrqData, SetIrqs};
use vfio_user::codec::migration::{
    MigData, decode_digest, decode_precopy_info, encode_precopy_info,
};
use vfio_user::codec::region::RegionAccess;
use vfio_user::codec::version::{Capabilities, MigrationCapabilities, TwinSocket, Version};
use vfio_user::codec::{Command, Header, MessageKind};

fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

/// Runs every decoder on `bytes` and checks what must hold of any answer.
fn decode_all(bytes: &[u8]) {
    if let Ok(head) = bytes[..bytes.len().min(16)].try_into() {
        for limit in [0, 16, 1 << 20, usize::MAX] {
            if let Ok(header) = Header::decode(head, limit) {
                assert!(header.payload_bytes + 16 <= limit);
                if let MessageKind::ErrorReply { errno } = header.kind {
                    assert!(errno > 0);
                }
            }
        }
    }
    let _ = Version::decode(bytes);
    if let Ok(map) = DmaMap::decode(bytes) {
        assert!(map.size > 0 && map.address.checked_add(map.size).is_some());
        assert!(map.offset.checked_add(map.size).is_some());
    }
    if let Ok(unmap) = DmaUnmap::decode(bytes) {
        assert!(unmap.size > 0 && unmap.address.checked_add(unmap.size).is_some());
    }
    let _ = DmaTransfer::decode(bytes);
    if let Ok((transfer, data)) = DmaTransfer::decode_with_data(bytes) {
        assert_eq!(transfer.count, data.len() as u64);
        assert!(data.len() <= bytes.len());
    }
    let _ = DeviceInfo::decode(bytes);
    let _ = RegionInfoRequest::decode(bytes);
    if let Ok(reply) = RegionInfoReply::decode(bytes) {
        for area in reply.areas.iter().flatten() {
            assert!(area.size > 0 && area.offset + area.size <= reply.size);
        }
    }
    if let Ok(info) = IrqInfoPayload::decode(bytes) {
        let _ = info.info();
    }
    if let Ok(set) = SetIrqs::decode(bytes) {
        assert!(set.start.checked_add(set.count).is_some());
        if let IrqData::Bool(data) = set.data {
            assert_eq!(data.len(), set.count as usize);
        }
    }
    let _ = RegionAccess::decode(bytes);
    if let Ok((access, data)) = RegionAccess::decode_with_data(bytes) {
        assert_eq!(access.count as usize, data.len());
    }
    let _ = Feature::decode(bytes);
    let _ = MigrationData::decode(bytes);
    let _ = DeviceStateData::decode(bytes);
    let _ = DataSizeData::decode(bytes);
    if let Ok(report) = LoggingReportData::decode(bytes) {
        for page_size_min in [1, 4096] {
            if let Ok(bitmap_bytes) = report.bitmap_bytes(page_size_min) {
                assert_eq!(bitmap_bytes % 8, 0);
                assert!(
                    u128::from(bitmap_bytes) * 8 * u128::from(report.page_size)
                        >= u128::from(report.length)
                );
            }
        }
    }
    if let Ok(start) = LoggingStart::decode(bytes) {
        assert!(start.ranges.len() * 16 <= bytes.len());
    }
    let _ = MigData::decode_request(bytes);
    let _ = MigData::decode(bytes);
    if let Ok((request, data)) = MigData::decode_with_data(bytes) {
        assert_eq!(request.size as usize, data.len());
    }
    let _ = decode_precopy_info(bytes);
    let _ = decode_digest(bytes);
}

/// Words as peers that mean harm choose them.
fn word() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        0..64u32,
        Just(u32::MAX),
        Just(0x1_0001),
        Just(0x2_0002),
        Just(0x5_0008),
        Just(4096),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        decode_all(&bytes);
    }

    #[test]
    fn nearly_sensible_words_never_panic(
        words in prop::collection::vec(word(), 0..40),
        cut in 0..4usize,
    ) {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.truncate(bytes.len().saturating_sub(cut));
        decode_all(&bytes);
    }

    #[test]
    fn capability_text_never_panics(text in "[{}\\[\\]\",:a-z_0-9 ]{0,200}") {
        let payload = Version { major: 0, minor: 1, capabilities: Capabilities::default() };
        let _ = Version::decode(&payload.encode_with_text(text.as_bytes()));
        let nested = format!("{{\"capabilities\":{{\"migration\":{{{text}}}}}}}");
        let _ = Version::decode(&payload.encode_with_text(nested.as_bytes()));
    }

    #[test]
    fn headers_round_trip(
        msg_id: u16,
        command: u16,
        payload_bytes in 0..1usize << 20,
        kind in prop_oneof![
            any::<bool>().prop_map(|no_reply| MessageKind::Command { no_reply }),
            Just(MessageKind::Reply),
            (1..4096i32).prop_map(|errno| MessageKind::ErrorReply { errno }),
        ],
    ) {
        let header = Header { msg_id, command: Command(command), payload_bytes, kind };
        prop_assert_eq!(Header::decode(&header.encode(), 2 << 20), Ok(header));
    }

    #[test]
    fn versions_round_trip(
        minor: u16,
        max_msg_fds: Option<u64>,
        max_data_xfer_size: Option<u64>,
        max_dma_maps: Option<u64>,
        twin in prop::option::of((any::<bool>(), any::<Option<u64>>())),
        migration in prop::option::of((any::<[bool; 6]>(), any::<Option<u64>>(), any::<Option<u16>>())),
    ) {
        let capabilities = Capabilities {
            max_msg_fds,
            max_data_xfer_size,
            max_dma_maps,
            twin_socket: twin.map(|(supported, fd_index)| TwinSocket { supported, fd_index }),
            migration: migration.map(|(on, pgsize, command)| MigrationCapabilities {
                pgsize,
                precopy_info: on[0],
                precopy_info_command: command,
                reinit: on[1],
                data_size: on[2],
                state_digest: on[3],
                whole_messages: on[4],
                reset_runs: on[5],
            }),
        };
        let version = Version { major: 0, minor, capabilities };
        prop_assert_eq!(Version::decode(&version.encode()).unwrap(), version);
    }

    #[test]
    fn dma_payloads_round_trip(
        address in 0..1u64 << 62,
        size in 1..1u64 << 62,
        offset in 0..1u64 << 62,
        flags in prop_oneof![0..4u32, 4..8u32, 8..12u32],
        data in prop::collection::vec(any::<u8>(), 1..64),
    ) {
        let map = DmaMap { argsz: DmaMap::SIZE, flags, offset, address, size };
        prop_assert_eq!(DmaMap::decode(&encoded(|out| map.encode(out))), Ok(map));
        let unmap = DmaUnmap { argsz: DmaUnmap::SIZE, flags: 0, address, size };
        prop_assert_eq!(DmaUnmap::decode(&encoded(|out| unmap.encode(out))), Ok(unmap));
        let transfer = DmaTransfer { address, count: data.len() as u64 };
        let mut bytes = encoded(|out| transfer.encode(out));
        bytes.extend(&data);
        bytes.extend([0; 3]);
        prop_assert_eq!(DmaTransfer::decode_with_data(&bytes), Ok((transfer, &data[..])));
        prop_assert!(DmaTransfer::decode_with_data(&bytes[..bytes.len() - 4]).is_err());
    }

    #[test]
    fn region_information_round_trips_and_is_cut_to_argsz(
        index: u32,
        size in 1u64 << 20..1 << 40,
        offset: u64,
        rwm: [bool; 3],
        areas in prop::option::of(prop::collection::vec((0..1u64 << 19, 1..1u64 << 19), 0..AREAS_MAX)),
        room in 0..5000u32,
    ) {
        let areas: Option<Vec<MmapArea>> = areas.map(|areas| {
            areas.into_iter().map(|(offset, size)| MmapArea { offset, size }).collect()
        });
        let caps = areas.as_ref().map_or(0, |areas| 16 + 16 * areas.len() as u32);
        let reply = RegionInfoReply {
            argsz: 32 + caps,
            index,
            flags: RegionFlags { read: rwm[0], write: rwm[1], mmap: rwm[2] },
            size,
            offset,
            has_capabilities: areas.is_some(),
            areas,
        };
        let mut bytes = Vec::new();
        prop_assert!(reply.encode(reply.argsz, &mut bytes));
        prop_assert_eq!(bytes.len(), reply.argsz as usize);
        prop_assert_eq!(RegionInfoReply::decode(&bytes), Ok(reply.clone()));
        let mut bytes = Vec::new();
        let whole = reply.encode(32 + room, &mut bytes);
        prop_assert_eq!(whole, caps <= room);
        let cut = RegionInfoReply::decode(&bytes).unwrap();
        prop_assert_eq!(cut.argsz, reply.argsz, "so that the client can ask again");
        prop_assert_eq!(cut.areas, if whole { reply.areas } else { None });
    }

    #[test]
    fn interrupts_round_trip(
        index: u32,
        count in 1..1000u32,
        start: u16,
        eventfd: bool,
        maskable: bool,
        automasked: bool,
        action in prop_oneof![
            Just(IrqAction::Mask), Just(IrqAction::Unmask), Just(IrqAction::Trigger)
        ],
        kind in 0..3usize,
    ) {
        let info = IrqInfo { count, eventfd, maskable, automasked };
        let payload = encoded(|out| IrqInfoPayload::reply(index, info).encode(out));
        prop_assert_eq!(IrqInfoPayload::decode(&payload).unwrap().info(), info);
        let bytes = vec![1; count as usize];
        let data = [IrqData::None, IrqData::Eventfd, IrqData::Bool(&bytes)][kind];
        let set = SetIrqs { index, start: start.into(), count, action, data };
        let payload = encoded(|out| set.encode(out));
        prop_assert_eq!(SetIrqs::decode(&payload), Ok(set));
        prop_assert!(SetIrqs::decode(&payload[..payload.len() - 1]).is_err());
    }

    #[test]
    fn features_round_trip(
        argsz in 8..u32::MAX,
        index: u16,
        op in prop_oneof![
            Just(FeatureOp::Get),
            Just(FeatureOp::Set),
            any::<(bool, bool)>().prop_map(|(get, set)| FeatureOp::Probe { get, set }),
        ],
        page_size: u64,
        ranges in prop::collection::vec((0..1u64 << 62, 1..1u64 << 62), 0..50),
        data in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let feature = Feature { argsz, index, op };
        let mut bytes = encoded(|out| feature.encode(out));
        bytes.extend(&data);
        prop_assert_eq!(Feature::decode(&bytes), Ok((feature, &data[..])));
        let ranges = ranges.into_iter().map(|(iova, length)| DmaRange { iova, length }).collect();
        let start = LoggingStart { page_size, ranges };
        let bytes = encoded(|out| start.encode(out));
        prop_assert_eq!(LoggingStart::decode(&bytes), Ok(start));
        prop_assert!(LoggingStart::decode(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn stream_payloads_round_trip(
        argsz in 24..u32::MAX,
        flags: u32,
        initial_bytes: u64,
        dirty_bytes: u64,
        data in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let info = RawPrecopyInfo { argsz, flags, initial_bytes, dirty_bytes };
        let bytes = encoded(|out| encode_precopy_info(&info, out));
        prop_assert_eq!(bytes.len(), RawPrecopyInfo::SIZE as usize);
        prop_assert_eq!(decode_precopy_info(&bytes), Ok(info));
        let write = MigData::new(data.len() as u32);
        let mut bytes = encoded(|out| write.encode(out));
        bytes.extend(&data);
        prop_assert_eq!(MigData::decode_with_data(&bytes), Ok((write, &data[..])));
        prop_assert_eq!(MigData::decode_request(&bytes), Ok(write));
    }
}

#[test]
fn counts_above_their_limits_are_refused_before_anything_is_taken() {
    let ranges = vec![DmaRange { iova: 0, length: 4096 }; LOGGING_RANGES_MAX + 1];
    let too_many = encoded(|out| LoggingStart { page_size: 4096, ranges }.encode(out));
    assert!(LoggingStart::decode(&too_many).is_err());
    let areas = vec![MmapArea { offset: 0, size: 1 }; AREAS_MAX + 1];
    let reply = RegionInfoReply {
        argsz: 0,
        index: 0,
        flags: RegionFlags::default(),
        size: 4096,
        offset: 0,
        has_capabilities: true,
        areas: Some(areas),
    };
    let mut bytes = Vec::new();
    assert!(reply.encode(u32::MAX, &mut bytes));
    assert!(RegionInfoReply::decode(&bytes).is_err());
}
