//! D: discovery and ioctl hygiene.

use vfio_migration::{DeviceState, MigrationFlags};

use super::{UAPI, must_refuse, must_succeed};
use crate::context::{Context, Stop, fail, not_applicable, show, skip, state_name};
use crate::errno::Errno;
use crate::rule::Proof::*;
use crate::rule::{Rule, checked};
use crate::subject::feature::*;

const CORE: &str = "Linux 7.2, drivers/vfio/vfio_main.c, vfio_ioctl_device_feature";

pub(super) const RULES: &[Rule] = &[
    checked(
        "D1",
        "GET MIGRATION has STOP_COPY set; RUNNING always exists",
        UAPI,
        "set VFIO_MIGRATION_STOP_COPY in migration_flags: no other set is defined without it",
        d1,
        &[Quirk("break-D1")],
    ),
    checked(
        "D2",
        "the flags are STOP_COPY, perhaps with P2P and PRE_COPY; all other bits are reserved",
        UAPI,
        "clear every bit of migration_flags beyond STOP_COPY (1), P2P (2) and PRE_COPY (4)",
        d2,
        &[Quirk("break-D2"), Quirk("break-D1")],
    ),
    checked(
        "D3",
        "features 1, 2 and 9 are there or all ENOTTY, and so are 6, 7 and 8",
        CORE,
        "offer all operations of migration, or of DMA logging, or none of them",
        d3,
        &[Quirk("break-D3")],
    ),
    checked(
        "D4",
        "EINVAL for argsz < 8, unknown flag bits, GET with SET, and none of GET, SET and PROBE",
        CORE,
        "check argsz and flags before looking at the feature",
        d4,
        &[Quirk("break-D4")],
    ),
    checked(
        "D5",
        "EINVAL for an operation that is not offered and for a short payload; PROBE does nothing",
        CORE,
        "check operations and payload size (vfio_check_feature) before doing anything",
        d5,
        &[Quirk("break-D5")],
    ),
    checked(
        "D6",
        "an unknown feature is ENOTTY (EINVAL on old kernels)",
        CORE,
        "answer ENOTTY to feature indices that are not known",
        d6,
        &[Quirk("break-D6")],
    ),
    checked(
        "D7",
        "a device opens in RUNNING",
        UAPI,
        "enter RUNNING in open_device, whatever was left behind at the last close",
        d7,
        &[Ferrydev("break-D7")],
    ),
];

fn claimed(c: &mut Context) -> Result<u64, Stop> {
    match c.get_u64(MIGRATION)? {
        Ok(flags) => Ok(flags),
        Err(Errno(libc::ENOTTY | libc::EINVAL)) => {
            not_applicable("the device has no migration support")
        }
        Err(errno) => fail("GET MIGRATION: success, or ENOTTY", format!("GET MIGRATION: {errno}")),
    }
}

fn d1(c: &mut Context) -> Result<(), Stop> {
    let flags = claimed(c)?;
    if flags & MigrationFlags::STOP_COPY == 0 {
        return fail("flags with STOP_COPY (1)", format!("flags {flags:#x}"));
    }
    c.go(DeviceState::Stop)?;
    c.go(DeviceState::Running)
}

fn d2(c: &mut Context) -> Result<(), Stop> {
    let flags = claimed(c)?;
    match MigrationFlags::from_raw(flags) {
        Some(_) => Ok(()),
        None => fail("flags 0x1, 0x3, 0x5 or 0x7", format!("flags {flags:#x}")),
    }
}

fn d3(c: &mut Context) -> Result<(), Stop> {
    // MIG_DATA_SIZE is younger than the others, and on vfio-user an extension.
    let age = c.is_wire();
    let migration = [(MIGRATION, GET), (MIG_DEVICE_STATE, GET | SET), (MIG_DATA_SIZE, GET)];
    let logging = [(DMA_LOGGING_START, SET), (DMA_LOGGING_STOP, SET), (DMA_LOGGING_REPORT, GET)];
    for group in [migration, logging] {
        let mut answers = Vec::new();
        for (index, operations) in group {
            let answer = c.probe(index, operations)?.map(drop);
            let known = match answer {
                Ok(()) | Err(Errno(libc::ENOTTY)) => true,
                Err(errno) => age && errno.0 == libc::EINVAL,
            };
            if !known {
                let what = format!("PROBE of feature {index}");
                return fail(
                    format!("{what}: success or ENOTTY"),
                    format!("{what}: {}", show(&answer)),
                );
            }
            answers.push((index, answer.is_ok()));
        }
        let there = answers.iter().filter(|(_, there)| *there).count();
        let only_size_missing = age && there == 2 && !answers[2].1 && group[2].0 == MIG_DATA_SIZE;
        if there != 0 && there != answers.len() && !only_size_missing {
            let list = |wanted| {
                let indices = answers.iter().filter(|(_, there)| *there == wanted);
                indices.map(|(index, _)| index.to_string()).collect::<Vec<_>>().join(", ")
            };
            let indices = group.map(|(index, _)| index.to_string()).join(", ");
            return fail(
                format!("features {indices} all there or all ENOTTY"),
                format!("there: {}; not there: {}", list(true), list(false)),
            );
        }
    }
    Ok(())
}

fn d4(c: &mut Context) -> Result<(), Stop> {
    let einval = &[libc::EINVAL];
    for argsz in [0, 7] {
        let answer = c.feature(argsz, MIGRATION | GET, &[0; 8]);
        must_refuse(answer, einval, &format!("GET MIGRATION with argsz {argsz}"))?;
    }
    for bit in [19, 24, 31] {
        let answer = c.feature(16, MIGRATION | GET | 1 << bit, &[0; 8]);
        must_refuse(answer, einval, &format!("GET MIGRATION with flag bit {bit}"))?;
    }
    let both = c.feature(16, MIG_DEVICE_STATE | GET | SET, &[2, 0, 0, 0, 0, 0, 0, 0]);
    must_refuse(both, einval, "GET and SET together without PROBE")?;
    c.flags()?;
    let none = c.feature(16, MIGRATION, &[0; 8]);
    must_refuse(none, einval, "none of GET, SET and PROBE")
}

fn d5(c: &mut Context) -> Result<(), Stop> {
    let einval = &[libc::EINVAL];
    let shape = c.shape()?;
    if shape.data_size {
        must_refuse(c.feature(16, MIG_DATA_SIZE | SET, &[0; 8]), einval, "SET MIG_DATA_SIZE")?;
    }
    must_refuse(
        c.feature(16, MIGRATION | SET, &[1, 0, 0, 0, 0, 0, 0, 0]),
        einval,
        "SET MIGRATION",
    )?;
    for argsz in [8, 15] {
        let what = format!("GET MIGRATION with argsz {argsz}");
        must_refuse(c.feature(argsz, MIGRATION | GET, &[0; 8]), einval, &what)?;
    }
    let stop = DeviceState::Stop.as_raw();
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&stop.to_ne_bytes());
    must_refuse(c.feature(8, MIG_DEVICE_STATE | SET, &payload), einval, "SET STOP with argsz 8")?;
    c.expect_state(DeviceState::Running, "after a SET that was refused")?;
    // A PROBE with a payload that a SET would obey.
    let probe = MIG_DEVICE_STATE | GET | SET | PROBE;
    must_succeed(c.feature(16, probe, &payload), "PROBE of GET and SET MIG_DEVICE_STATE")?;
    must_succeed(c.feature(16, MIG_DEVICE_STATE | SET | PROBE, &payload), "PROBE of SET")?;
    c.expect_state(DeviceState::Running, "after a PROBE of SET MIG_DEVICE_STATE")
}

fn d6(c: &mut Context) -> Result<(), Stop> {
    for index in [0x7ff0, 0xffff] {
        for operation in [GET | PROBE, SET | PROBE, GET] {
            let what = format!("flags {operation:#x} of the unknown feature {index:#x}");
            let answer = c.feature(16, index | operation, &[0; 8]);
            must_refuse(answer, &[libc::ENOTTY, libc::EINVAL], &what)?;
        }
    }
    Ok(())
}

fn d7(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    let running = DeviceState::Running.as_raw();
    if c.is_wire() {
        return match c.opened_in() {
            Some(at) if at == running => Ok(()),
            Some(at) => skip(format!(
                "it was found in {}: a vfio-user server keeps the state of its last client",
                state_name(at)
            )),
            None => skip("its state could not be asked"),
        };
    }
    // What is left behind must not be found again.
    c.go(DeviceState::Stop)?;
    c.reopen()?;
    match c.state()? {
        at if at == running => Ok(()),
        at => fail("RUNNING after open", state_name(at)),
    }
}
