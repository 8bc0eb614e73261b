//! [`recover`]: the named state, then a reset, then lost. Against a device that fails as it is told.

use std::collections::VecDeque;

use vfio_migration::DeviceState::{self, *};
use vfio_migration::recovery::{Recovery, recover};
use vfio_migration::{
    DeviceCapabilities, DeviceError, DeviceResult, MigratableDevice, MigrationFlags, PrecopyInfo,
    ReadOutcome,
};

/// What the device is asked, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Set(DeviceState),
    Reset,
    State,
}

/// A device whose calls go as scripted: each entry is the errno of the next call, 0 = it succeeds.
struct Scripted {
    state: DeviceState,
    /// Where a reset leads: RUNNING, but for devices that keep their state.
    after_reset: DeviceState,
    script: VecDeque<i32>,
    asked: Vec<Asked>,
}

impl Scripted {
    fn next(&mut self, asked: Asked, call: &'static str) -> DeviceResult<()> {
        self.asked.push(asked);
        match self.script.pop_front().expect("a call beyond the script") {
            0 => Ok(()),
            errno => Err(DeviceError::Errno { call, errno }),
        }
    }
}

impl MigratableDevice for Scripted {
    fn capabilities(&self) -> DeviceCapabilities {
        DeviceCapabilities {
            flags: MigrationFlags::new(true, true),
            precopy_info: true,
            precopy_info_v2: false,
            data_size: false,
            dma_logging: false,
            reset_runs: true,
            max_write_bytes: None,
        }
    }
    fn state(&mut self) -> DeviceResult<DeviceState> {
        self.next(Asked::State, "GET")?;
        Ok(self.state)
    }
    fn set_state(&mut self, target: DeviceState) -> DeviceResult<()> {
        self.next(Asked::Set(target), "SET")?;
        self.state = target;
        Ok(())
    }
    fn precopy_info(&mut self) -> DeviceResult<PrecopyInfo> {
        Err(DeviceError::Unsupported { call: "PRECOPY_INFO" })
    }
    fn stop_copy_length(&mut self) -> DeviceResult<u64> {
        Err(DeviceError::Unsupported { call: "MIG_DATA_SIZE" })
    }
    fn read(&mut self, _buf: &mut [u8]) -> DeviceResult<ReadOutcome> {
        Err(DeviceError::Unsupported { call: "read" })
    }
    fn write(&mut self, _buf: &[u8]) -> DeviceResult<usize> {
        Err(DeviceError::Unsupported { call: "write" })
    }
    fn reset(&mut self) -> DeviceResult<()> {
        self.next(Asked::Reset, "RESET")?;
        self.state = self.after_reset;
        Ok(())
    }
}

/// Name, state after a reset, wanted state, script, what is asked, outcome with its cause's errno.
type Case = (
    &'static str,
    DeviceState,
    DeviceState,
    &'static [i32],
    &'static [Asked],
    (&'static str, Option<i32>),
);

const SET_RUNNING: Asked = Asked::Set(Running);
const SET_STOP: Asked = Asked::Set(Stop);
const SET_RESUMING: Asked = Asked::Set(Resuming);

const CASES: &[Case] = &[
    ("the named state is reached", Running, Running, &[0], &[SET_RUNNING], ("recovered", None)),
    (
        "a reset leads to the named state",
        Running,
        Running,
        &[5, 0, 0],
        &[SET_RUNNING, Asked::Reset, Asked::State],
        ("reset", Some(5)),
    ),
    (
        "a reset, and from RUNNING to the named state",
        Running,
        Resuming,
        &[22, 0, 0, 0],
        &[SET_RESUMING, Asked::Reset, Asked::State, SET_RESUMING],
        ("reset", Some(22)),
    ),
    (
        "a reset that keeps the state, and a SET from there",
        StopCopy,
        Running,
        &[5, 0, 0, 0],
        &[SET_RUNNING, Asked::Reset, Asked::State, SET_RUNNING],
        ("reset", Some(5)),
    ),
    (
        "not even a reset works",
        Running,
        Running,
        &[5, 6],
        &[SET_RUNNING, Asked::Reset],
        ("lost", Some(6)),
    ),
    (
        "after the reset the state cannot be asked",
        Running,
        Running,
        &[5, 0, 7],
        &[SET_RUNNING, Asked::Reset, Asked::State],
        ("lost", Some(7)),
    ),
    (
        "after the reset the named state is still out of reach",
        Running,
        Stop,
        &[5, 0, 0, 8],
        &[SET_STOP, Asked::Reset, Asked::State, SET_STOP],
        ("lost", Some(8)),
    ),
];

#[test]
fn f10_x10_a_failed_transition_is_recovered_by_name_then_by_reset_or_the_device_is_lost() {
    for (name, after_reset, wanted, script, asked, expected) in CASES {
        let mut device = Scripted {
            state: PreCopy,
            after_reset: *after_reset,
            script: script.iter().copied().collect(),
            asked: Vec::new(),
        };
        let outcome = match recover(&mut device, *wanted) {
            Recovery::Recovered => ("recovered", None),
            Recovery::Reset { cause } => ("reset", cause.errno()),
            Recovery::Lost { cause } => ("lost", cause.errno()),
        };
        assert_eq!(outcome, *expected, "{name}");
        assert_eq!(device.asked, *asked, "{name}");
        assert!(device.script.is_empty(), "{name}");
        if expected.0 != "lost" {
            assert_eq!(device.state, *wanted, "{name}");
        }
    }
}
