//! Rules D1 and D2, and precopy information: P6, R2 to R4 as far as types can show them.

use vfio_migration::precopy::PRECOPY_INFO_REINIT;
use vfio_migration::{
    DeviceError, DeviceState, MigrationFlags, PrecopyInfo, PrecopyInfoV1, PrecopyInfoV2,
    RawPrecopyInfo,
};

#[test]
fn d1_d2_only_four_sets_of_flags_are_valid() {
    let mut valid = Vec::new();
    for raw in 0..256 {
        if let Some(flags) = MigrationFlags::from_raw(raw) {
            assert_eq!(flags.as_raw(), raw);
            valid.push((raw, flags.p2p(), flags.pre_copy()));
        }
    }
    assert_eq!(
        valid,
        [(1, false, false), (3, true, false), (5, false, true), (7, true, true)],
        "without STOP_COPY, or with a reserved bit, there is no set"
    );
    for bit in 3..64 {
        assert_eq!(MigrationFlags::from_raw(1 | 1 << bit), None);
    }
}

#[test]
fn d1_running_stop_and_error_always_exist_and_the_rest_follows_the_flags() {
    use DeviceState::*;
    for (p2p, pre_copy) in [(false, false), (true, false), (false, true), (true, true)] {
        let flags = MigrationFlags::new(p2p, pre_copy);
        for state in DeviceState::ALL {
            let expected = match state {
                Error | Stop | Running | StopCopy | Resuming => true,
                RunningP2p => p2p,
                PreCopy => pre_copy,
                PreCopyP2p => p2p && pre_copy,
            };
            assert_eq!(flags.has_state(state), expected, "{flags:?}: {state}");
        }
    }
}

#[test]
fn p6_r3_without_the_opt_in_flags_mean_nothing() {
    for flags in [0, PRECOPY_INFO_REINIT, u32::MAX] {
        let info = PrecopyInfo::from_raw(false, flags, 10, 20);
        assert_eq!(info, PrecopyInfo::V1(PrecopyInfoV1 { initial_bytes: 10, dirty_bytes: 20 }));
        assert!(!info.reinit());
    }
}

#[test]
fn r4_with_the_opt_in_reinit_is_told_and_other_bits_are_ignored() {
    for (flags, reinit) in [(0, false), (PRECOPY_INFO_REINIT, true), (!1, false), (u32::MAX, true)]
    {
        let info = PrecopyInfo::from_raw(true, flags, u64::MAX, 0);
        let (initial_bytes, dirty_bytes) = (u64::MAX, 0);
        assert_eq!(info, PrecopyInfo::V2(PrecopyInfoV2 { initial_bytes, dirty_bytes, reinit }));
        assert_eq!(info.reinit(), reinit);
        assert_eq!((info.initial_bytes(), info.dirty_bytes()), (u64::MAX, 0));
    }
}

#[test]
fn p3_p9_a_request_has_its_size_and_nothing_else() {
    let request = RawPrecopyInfo::request();
    assert_eq!(request.argsz, 24);
    assert_eq!((request.flags, request.initial_bytes, request.dirty_bytes), (0, 0, 0));
}

#[test]
fn errors_keep_their_errno_and_say_which_call() {
    let target = DeviceState::StopCopy;
    let state = Some(DeviceState::PreCopy);
    let failed = DeviceError::Transition { target, state, errno: 22 };
    assert_eq!(failed.errno(), Some(22));
    assert_eq!(failed.call(), "SET MIG_DEVICE_STATE");
    let text = failed.to_string();
    assert!(text.contains("SET STOP_COPY") && text.contains("is in PRE_COPY"), "{text}");
    let unknown = DeviceError::Transition { target, state: None, errno: 5 };
    assert!(unknown.to_string().contains("an unknown state"));
    let gone = DeviceError::Gone { call: "REGION_READ", reason: "it died".into() };
    assert!(gone.is_gone() && gone.errno().is_none() && !failed.is_gone());
}
