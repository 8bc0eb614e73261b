//! VFIO_DEVICE_FEATURE hygiene (rules D3 to D6, F7, F11, R1).

mod common;

use common::*;
use device_model::feature::*;
use device_model::{DeviceCore, feature};
use vfio_migration::DmaRange;

fn ask(core: &mut DeviceCore, argsz: u32, flags: u32, data: &[u8]) -> Answer {
    let request = Request { argsz, flags, data, ranges: &[], bitmap: &mut [] };
    device_feature(core, request, 0)
}

fn result(core: &mut DeviceCore, argsz: u32, flags: u32) -> Result<(), i32> {
    ask(core, argsz, flags, &[0; 64]).result
}

const EINVAL: Result<(), i32> = Err(libc::EINVAL);
const ENOTTY: Result<(), i32> = Err(libc::ENOTTY);

#[test]
fn d3_a_device_without_migration_has_none_of_its_features() {
    let mut core = core_with(&["no-migration"]);
    for index in [1, 2, 6, 7, 8, 9] {
        for operation in [GET, SET, PROBE | GET] {
            assert_eq!(result(&mut core, 64, index | operation), ENOTTY, "feature {index}");
        }
    }
    let mut profile = profile();
    profile.features.dma_logging.value = false;
    let mut core = core_of(profile);
    for index in [6, 7, 8] {
        assert_eq!(result(&mut core, 64, index | SET | PROBE), ENOTTY, "feature {index}");
    }
}

#[test]
fn d4_argsz_and_flags_are_checked_before_anything() {
    let mut core = core();
    for (argsz, flags) in [
        (0, MIGRATION | GET),
        (7, MIGRATION | GET),
        (16, MIGRATION | GET | 1 << 19),
        (16, MIG_DEVICE_STATE | GET | SET),
        (16, MIGRATION),
        (16, MIG_DEVICE_STATE),
    ] {
        assert_eq!(result(&mut core, argsz, flags), EINVAL, "argsz {argsz}, flags {flags:#x}");
    }
}

#[test]
fn d5_operations_that_are_not_offered_probes_and_short_payloads() {
    let mut core = core();
    // (index, GET offered, SET offered, least payload)
    let offers = [
        (MIGRATION, true, false, 8),
        (MIG_DEVICE_STATE, true, true, 8),
        (DMA_LOGGING_START, false, true, 24),
        (DMA_LOGGING_STOP, false, true, 0),
        (DMA_LOGGING_REPORT, true, false, 32),
        (MIG_DATA_SIZE, true, false, 8),
        (MIG_PRECOPY_INFO_V2, false, true, 0),
    ];
    for (index, get, set, least) in offers {
        for (operation, offered) in [(GET, get), (SET, set)] {
            let expected = if offered { Ok(()) } else { EINVAL };
            assert_eq!(result(&mut core, 8, index | operation | PROBE), expected, "{index}");
            if !offered {
                assert_eq!(result(&mut core, 64, index | operation), EINVAL, "{index}");
            } else if least > 0 {
                assert_eq!(result(&mut core, 7 + least, index | operation), EINVAL, "{index}");
            }
        }
        let both = result(&mut core, 8, index | GET | SET | PROBE);
        assert_eq!(both, if get && set { Ok(()) } else { EINVAL }, "{index}");
        assert_eq!(result(&mut core, 8, index | PROBE), Ok(()), "{index}");
    }
    // Nothing of that did anything.
    assert!(!core.capabilities().precopy_info_v2);
    assert_eq!(core.state(), vfio_migration::DeviceState::Running);
}

#[test]
fn d6_an_unknown_feature_is_enotty() {
    let mut core = core();
    for index in [0, 3, 4, 5, 10, 11, 13, 0xffff] {
        assert_eq!(result(&mut core, 64, index | GET), ENOTTY, "{index}");
        assert_eq!(result(&mut core, 64, index | SET | PROBE), ENOTTY, "{index}");
    }
}

#[test]
fn d1_migration_answers_the_flags_and_d7_the_state_is_running() {
    let mut core = core();
    assert_eq!(ask(&mut core, 16, MIGRATION | GET, &[0; 8]).data, 7u64.to_le_bytes());
    let state = ask(&mut core, 16, MIG_DEVICE_STATE | GET, &[9; 8]);
    assert_eq!(state.data[..4], 2u32.to_le_bytes());
    assert_eq!(state.data[4..], (-1i32).to_le_bytes(), "X1: GET hands out no fd");
}

#[test]
fn f7_f11_a_failed_set_hands_out_nothing() {
    let mut core = core();
    for state in [0u32, 8, 9, u32::MAX] {
        let mut data = state.to_le_bytes().to_vec();
        data.extend_from_slice(&[0; 4]);
        let answer = ask(&mut core, 16, MIG_DEVICE_STATE | SET, &data);
        assert_eq!((answer.result, answer.session), (EINVAL, None), "{state}");
        assert_eq!(answer.data[4..], (-1i32).to_le_bytes());
    }
    let answer = ask(&mut core, 16, MIG_DEVICE_STATE | SET, &[6, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(answer.result, Ok(()));
    assert_eq!(answer.session, core.session());
    assert_ne!(answer.data[4..], (-1i32).to_le_bytes());
}

#[test]
fn r1_the_opt_in_over_this_door() {
    let mut without = core_with_flags(true, false);
    let mut none = core_with(&["no-migration"]);
    for operation in [SET, SET | PROBE] {
        assert_eq!(result(&mut without, 8, MIG_PRECOPY_INFO_V2 | operation), EINVAL);
        assert_eq!(result(&mut none, 8, MIG_PRECOPY_INFO_V2 | operation), EINVAL);
    }
    let mut core = core();
    assert_eq!(result(&mut core, 8, MIG_PRECOPY_INFO_V2 | GET), EINVAL);
    assert_eq!(result(&mut core, 8, MIG_PRECOPY_INFO_V2 | SET | PROBE), Ok(()));
    assert!(!core.capabilities().precopy_info_v2);
    // Extra payload is ignored.
    assert_eq!(result(&mut core, 64, MIG_PRECOPY_INFO_V2 | SET), Ok(()));
    assert!(core.capabilities().precopy_info_v2);
}

#[test]
fn l1_logging_over_this_door() {
    let mut core = core();
    let mut start = 65_536u64.to_le_bytes().to_vec();
    start.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    start.extend_from_slice(&[0; 8]);
    let ranges = [DmaRange { iova: 0, length: 1 << 20 }];
    let mut with = |data: &[u8], ranges: &[DmaRange]| {
        let flags = DMA_LOGGING_START | SET;
        let request = Request { argsz: 32, flags, data, ranges, bitmap: &mut [] };
        feature::device_feature(&mut core, request, 0)
    };
    let mut none = start.clone();
    none[8] = 0;
    assert_eq!(with(&none, &ranges).result, EINVAL);
    let mut many = start.clone();
    many[9] = 2;
    assert_eq!(with(&many, &ranges).result, Err(libc::E2BIG));
    assert_eq!(with(&start, &[]).result, Err(libc::EFAULT));
    let answer = with(&start, &ranges);
    assert_eq!((answer.result, &answer.data[..8]), (Ok(()), &65_536u64.to_le_bytes()[..]));

    let mut report = 0u64.to_le_bytes().to_vec();
    for value in [1u64 << 20, 4096, 0] {
        report.extend_from_slice(&value.to_le_bytes());
    }
    let mut bitmap = [0; 4];
    let flags = DMA_LOGGING_REPORT | GET;
    let request = Request { argsz: 40, flags, data: &report, ranges: &[], bitmap: &mut bitmap };
    assert_eq!(device_feature(&mut core, request, 0).result, Ok(()));
    assert_eq!(result(&mut core, 8, DMA_LOGGING_STOP | SET), Ok(()));
    assert_eq!(result(&mut core, 8, DMA_LOGGING_STOP | SET), EINVAL);
}
