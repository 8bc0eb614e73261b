//! P: PRECOPY_INFO v1, without the opt-in.

use vfio_migration::DeviceState::*;

use super::must_refuse;
use crate::context::{Context, Info, Stop, fail, skip};
use crate::rule::Proof::*;
use crate::rule::{Rule, checked, untestable};
use crate::stream::{self, Saved};

const INFO: &str = "Linux uAPI, VFIO_MIG_GET_PRECOPY_INFO";
const CHECK: &str = "Linux 7.2, vfio_check_precopy_ioctl";

pub(super) const RULES: &[Rule] = &[
    checked(
        "P1",
        "PRECOPY_INFO is there with PRE_COPY; any other command on the fd is ENOTTY",
        INFO,
        "implement VFIO_MIG_GET_PRECOPY_INFO in the saving file's ioctl, and ENOTTY for the rest",
        p1,
        &[Quirk("info-fails")],
    ),
    checked(
        "P2",
        "PRECOPY_INFO is valid in PRE_COPY and PRE_COPY_P2P and EINVAL in any other state",
        INFO,
        "check the device's state under the state lock; PRE_COPY_P2P counts as PRE_COPY",
        p2,
        &[Quirk("no-info-in-p2p")],
    )
    .limit_s(30),
    checked(
        "P3",
        "argsz < 24 is EINVAL, a bad pointer EFAULT",
        CHECK,
        "check argsz against the struct (vfio_check_precopy_ioctl does)",
        p3,
        &[Quirk("break-P3")],
    ),
    checked(
        "P4",
        "initial_bytes begins above 0, never grows, and falls to 0 as data is read",
        INFO,
        "count what of the initial data is unread; new data is dirty_bytes without the opt-in",
        p4,
        &[Quirk("size=garbage")],
    )
    .limit_s(60),
    checked(
        "P5",
        "dirty_bytes begins at 0",
        INFO,
        "count change against what was read already; before the first read nothing has changed",
        p5,
        &[Quirk("break-P5")],
    ),
    checked(
        "P6",
        "without the opt-in flags are reserved: 0, or what the caller sent",
        "kvm list, 24 Feb 2026 (opt-in of PRECOPY_INFO v2)",
        "set no flag without the opt-in",
        p6,
        &[Quirk("break-P6")],
    ),
    untestable(
        "P7",
        "the two sizes say nothing of the STOP_COPY size",
        "kvm list, 12 Mar 2026",
        "an obligation of the user of the device, not of the device",
    ),
    checked(
        "P8",
        "PRE_COPY may be left with initial_bytes above 0, at the cost of time only",
        INFO,
        "send what was not read in STOP_COPY",
        p8,
        &[Quirk("break-P8")],
    )
    .limit_s(60),
    checked(
        "P9",
        "both size fields are assigned: the caller's bytes do not come back in one of them",
        "Linux 7.2, vfio_check_precopy_ioctl and the drivers",
        "assign initial_bytes and dirty_bytes on every path; the struct holds the caller's bytes",
        p9,
        &[Quirk("one-size-field")],
    )
    .limit_s(60),
];

/// PRE_COPY with a session that is not opted in.
fn enter(c: &mut Context) -> Result<(), Stop> {
    c.need_precopy()?;
    c.without_opt_in()?;
    c.go(PreCopy)
}

fn p1(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    if let Err(errno) = c.info()? {
        return fail("PRECOPY_INFO in PRE_COPY: success", errno.to_string());
    }
    if c.is_wire() {
        return Ok(());
    }
    let other = c.on_fd("ioctl()", |s, stream| s.other_ioctl(stream));
    must_refuse(other, &[libc::ENOTTY], "another ioctl on the data_fd")
}

fn p2(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    if let Err(errno) = c.info()? {
        return skip(format!("PRECOPY_INFO in PRE_COPY: {errno} (rule P1)"));
    }
    if c.flags()?.p2p() {
        c.go(PreCopyP2p)?;
        match c.info()? {
            Ok(_) => {}
            Err(errno) if errno.0 == libc::ENODEV => {
                return skip("the session is dead in PRE_COPY_P2P (rule X2)");
            }
            Err(errno) => return fail("PRECOPY_INFO in PRE_COPY_P2P: success", errno.to_string()),
        }
    }
    c.go(StopCopy)?;
    must_refuse(c.info(), &[libc::EINVAL], "PRECOPY_INFO in STOP_COPY after PRE_COPY")?;
    c.go_anew(StopCopy)?;
    must_refuse(c.info(), &[libc::EINVAL], "PRECOPY_INFO in STOP_COPY")?;
    if c.is_wire() {
        for state in [Running, Stop, Resuming] {
            c.go_anew(state)?;
            must_refuse(c.info(), &[libc::EINVAL], &format!("PRECOPY_INFO in {state}"))?;
        }
    }
    Ok(())
}

fn p3(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    c.need_info()?;
    let zero = Info { flags: 0, initial_bytes: 0, dirty_bytes: 0 };
    for argsz in [0, 8, 16, 23] {
        let what = format!("PRECOPY_INFO with argsz {argsz}");
        must_refuse(c.info_raw(argsz, zero), &[libc::EINVAL], &what)?;
    }
    if let Err(errno) = c.info_raw(64, zero)? {
        return fail("PRECOPY_INFO with a larger argsz: success", errno.to_string());
    }
    if c.is_wire() {
        return Ok(());
    }
    let nowhere = c.on_fd("PRECOPY_INFO", |s, stream| s.precopy_info_nowhere(stream));
    must_refuse(nowhere, &[libc::EFAULT], "PRECOPY_INFO with a bad pointer")
}

fn p4(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    let first = c.need_info()?.initial_bytes;
    if first == 0 {
        return fail("initial_bytes above 0 when PRE_COPY begins", "0");
    }
    let mut last = first;
    let mut total = 0u64;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = c.read(&mut buffer)?;
        let now = c.need_info()?.initial_bytes;
        if now > last {
            return fail(
                format!("initial_bytes of at most {last}, as before"),
                format!("{now} after {total} bytes were read"),
            );
        }
        last = now;
        match read {
            Ok(0) => break,
            Ok(got) => total += got as u64,
            Err(errno) if errno.0 == libc::ENOMSG => break,
            Err(errno) => return skip(format!("reading in PRE_COPY: {errno} (rule S1)")),
        }
        if now == 0 {
            return Ok(());
        }
        if total > c.stream_max_bytes {
            return skip(format!("{total} bytes read and initial_bytes is {now} (--stream-limit)"));
        }
    }
    match last {
        0 => Ok(()),
        last => fail(
            "initial_bytes 0 once there is nothing to read in PRE_COPY",
            format!("{last} after {total} bytes were read, {first} at the beginning"),
        ),
    }
}

fn p5(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    let info = c.need_info()?;
    match info.dirty_bytes {
        0 => Ok(()),
        _ if info.initial_bytes == 0 => skip(format!("no initial data: {info} (rule P4)")),
        bytes => fail("dirty_bytes 0 when PRE_COPY begins", bytes.to_string()),
    }
}

fn p6(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    c.need_info()?;
    for sent in [0, 0xffff_fff0, u32::MAX] {
        let info = Info { flags: sent, initial_bytes: 0, dirty_bytes: 0 };
        match c.info_raw(24, info)? {
            // On vfio-user a server may keep its flag REINIT to itself.
            Ok(Info { flags, .. }) if flags & !sent == 0 => {}
            Ok(Info { flags, .. }) => {
                let expected = format!("flags 0 or {sent:#x} back for flags {sent:#x}");
                return fail(expected, format!("flags {flags:#x}"));
            }
            Err(errno) => {
                return fail(
                    format!("PRECOPY_INFO with flags {sent:#x}: success"),
                    errno.to_string(),
                );
            }
        }
    }
    Ok(())
}

fn p8(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    match c.set(StopCopy)? {
        Ok(_) => {}
        Err(errno) => {
            // Is it that nothing was read?
            c.go_anew(PreCopy)?;
            stream::drain_precopy(c, None)?;
            if let Err(errno) = c.set(StopCopy)? {
                return skip(format!("SET STOP_COPY in PRE_COPY: {errno} (rules F8, F9)"));
            }
            return fail("SET STOP_COPY in PRE_COPY with nothing read: success", errno.to_string());
        }
    }
    let mut saved = Saved::default();
    stream::drain_stop_copy(c, &mut saved)?;
    match stream::load(c, &mut saved)? {
        Ok(()) => Ok(()),
        Err(why) => skip(format!("what was saved does not load: {why} (rule S4)")),
    }
}

fn p9(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    c.need_info()?;
    // Neither a size nor a pattern that a device has.
    let mark =
        Info { flags: 0, initial_bytes: 0xa5a5_5a5a_1234_4321, dirty_bytes: 0x5a5a_a5a5_4321_1234 };
    for when in ["with initial data unread", "with everything read"] {
        match c.info_raw(24, mark)? {
            Ok(info) if info.initial_bytes == mark.initial_bytes => {
                return fail(
                    format!("initial_bytes assigned {when}"),
                    "the caller's bytes came back",
                );
            }
            Ok(info) if info.dirty_bytes == mark.dirty_bytes => {
                return fail(
                    format!("dirty_bytes assigned {when}"),
                    "the caller's bytes came back",
                );
            }
            Ok(_) => {}
            Err(errno) => {
                return fail("PRECOPY_INFO with sizes in the request: success", errno.to_string());
            }
        }
        stream::drain_precopy(c, None)?;
    }
    Ok(())
}
