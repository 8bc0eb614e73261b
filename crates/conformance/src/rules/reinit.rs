//! R: PRECOPY_INFO v2 and REINIT.

use vfio_migration::DeviceState::*;

use super::{must_refuse, must_succeed};
use crate::context::{Context, Info, Stop, fail, not_applicable, skip};
use crate::errno::Errno;
use crate::rule::Proof::*;
use crate::rule::{Rule, checked, untestable};
use crate::stream;
use crate::subject::feature::*;

const V2: &str = "Linux uAPI, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 and VFIO_PRECOPY_INFO_REINIT";
/// A reconfiguration's size, where it can be said, in KiB.
const CONFIG_KIB: u32 = 64;

pub(super) const RULES: &[Rule] = &[
    checked(
        "R1",
        "SET INFOv2 needs no payload and ignores one; GET is EINVAL; without PRE_COPY all are EINVAL",
        "Linux 7.2, drivers/vfio/vfio_main.c",
        "nothing is read from the payload; check for PRE_COPY first",
        r1,
        &[Quirk("break-R1")],
    ),
    checked(
        "R2",
        "after the opt-in flags of the request do not come back",
        V2,
        "flags are an output after the opt-in: begin with 0 (vfio_check_precopy_ioctl does)",
        r2,
        &[Quirk("break-R2")],
    ),
    checked(
        "R3",
        "REINIT comes only after the opt-in",
        V2,
        "look at the opt-in (precopy_info_v2) before setting the flag",
        r3,
        &[Quirk("break-R3")],
    ),
    checked(
        "R4",
        "with REINIT initial_bytes is a new value and dirty_bytes restarts from 0",
        V2,
        "count dirty_bytes against the new initial data",
        r4,
        &[Quirk("break-R4")],
    )
    .limit_s(30),
    checked(
        "R5",
        "after REINIT initial_bytes falls to 0 as the stream is read, and REINIT may come again",
        V2,
        "each reconfiguration is a new REINIT",
        r5,
        &[Quirk("break-R5")],
    )
    .limit_s(60),
    checked(
        "R6",
        "REINIT may come after initial_bytes was 0 and after reads of dirty data",
        V2,
        "a device whose initial data was read must still report new one",
        r6,
        &[Quirk("break-R6")],
    )
    .limit_s(60),
    checked(
        "R7",
        "initial_bytes with REINIT covers unread data that must be read before the new one",
        "Linux 7.2, drivers/vfio/pci/mlx5/main.c",
        "count every unread byte that comes before the new initial data's end",
        r7,
        &[Quirk("break-R7")],
    )
    .limit_s(30),
    checked(
        "R8",
        "the opt-in lasts until the device is closed: a reset does not end it",
        "Linux 7.2, drivers/vfio/vfio_main.c",
        "clear the opt-in at the last close only",
        r8,
        &[Quirk("break-R8")],
    )
    .limit_s(30),
    untestable(
        "R9",
        "readiness is evaluated anew on each REINIT; with stopped vCPUs the answer is stable",
        "kvm list, 12 Mar 2026",
        "an obligation of the user of the device, not of the device",
    ),
    untestable(
        "R10",
        "REINIT is an edge: a second query may not repeat it",
        "derived from the drivers",
        "both answers of a second query are right",
    ),
];

fn r1(c: &mut Context) -> Result<(), Stop> {
    let precopy = match c.flags() {
        Ok(flags) => flags.pre_copy(),
        Err(Stop::NotApplicable(_)) => false,
        Err(stop) => return Err(stop),
    };
    let probe = c.probe(MIG_PRECOPY_INFO_V2, SET)?;
    if !precopy {
        return match probe {
            // Older kernels do not know the feature.
            Err(Errno(libc::EINVAL | libc::ENOTTY)) => {
                let answer = c.set_opt_in(&[]);
                must_refuse(answer, &[libc::EINVAL, libc::ENOTTY], "SET INFOv2 without PRE_COPY")
            }
            Err(errno) => fail("PROBE of SET INFOv2 without PRE_COPY: EINVAL", errno.to_string()),
            Ok(_) => fail("PROBE of SET INFOv2 without PRE_COPY: EINVAL", "success"),
        };
    }
    match probe {
        Ok(_) => {}
        Err(Errno(libc::ENOTTY)) => return not_applicable("no INFOv2 (Linux before 7.1)"),
        Err(Errno(libc::EINVAL)) if c.is_wire() => {
            return not_applicable("the server does not offer INFOv2");
        }
        Err(errno) => return fail("PROBE of SET INFOv2: success", errno.to_string()),
    }
    must_refuse(c.feature(16, MIG_PRECOPY_INFO_V2 | GET, &[0; 8]), &[libc::EINVAL], "GET INFOv2")?;
    must_succeed(c.set_opt_in(&[]), "SET INFOv2 without payload")?;
    must_succeed(c.set_opt_in(&[0xff; 16]), "SET INFOv2 with a payload that does not matter")?;
    Ok(())
}

/// PRE_COPY, opted in.
fn enter(c: &mut Context) -> Result<(), Stop> {
    c.opt_in()?;
    c.go(PreCopy)
}

fn r2(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    c.need_info()?;
    flags_zeroed(c, "after the opt-in")
}

/// Flags of the request must not come back. REINIT has a meaning of its own on vfio-user.
fn flags_zeroed(c: &mut Context, when: &str) -> Result<(), Stop> {
    let sent = 0xffff_fffe;
    match c.info_raw(24, Info { flags: sent, initial_bytes: 0, dirty_bytes: 0 })? {
        Ok(info) if info.flags & sent == 0 => Ok(()),
        Ok(info) => {
            fail(format!("no flag of {sent:#x} back {when}"), format!("flags {:#x}", info.flags))
        }
        Err(errno) => {
            fail(format!("PRECOPY_INFO with flags {sent:#x}: success"), errno.to_string())
        }
    }
}

fn reconfigure(c: &mut Context, kib: u32) -> Result<(), Stop> {
    c.as_guest("a region write", |guest| guest.reconfigure(kib))
}

fn r3(c: &mut Context) -> Result<(), Stop> {
    c.need_precopy()?;
    c.without_opt_in()?;
    c.go(PreCopy)?;
    c.need_info()?;
    reconfigure(c, CONFIG_KIB)?;
    for _ in 0..2 {
        let info = c.need_info()?;
        if info.reinit() {
            return fail("no REINIT without the opt-in", info.to_string());
        }
        stream::drain_precopy(c, None)?;
    }
    Ok(())
}

/// Reconfigures, and answers the report with REINIT.
fn reinit(c: &mut Context, kib: u32) -> Result<Option<Info>, Stop> {
    reconfigure(c, kib)?;
    // A driver may need a moment to hear of it.
    for _ in 0..10 {
        let info = c.need_info()?;
        if info.reinit() {
            return Ok(Some(info));
        }
        c.wait(10);
    }
    Ok(None)
}

/// The first REINIT of a session.
fn first_reinit(c: &mut Context, kib: u32) -> Result<Info, Stop> {
    match reinit(c, kib)? {
        Some(info) => Ok(info),
        None => {
            not_applicable("no REINIT came of the reconfiguration: the device does not report it")
        }
    }
}

/// Makes dirty data, where it is known how.
fn dirty(c: &mut Context) -> Result<(), Stop> {
    if !c.guest()?.knows_device() {
        return Ok(());
    }
    c.as_guest("a region write", |guest| guest.dirty(16))
}

fn r4(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    let first = c.need_info()?;
    if first.initial_bytes > 0 && first.dirty_bytes > 0 {
        return skip(format!("dirty_bytes do not begin at 0 either: {first} (rule P5)"));
    }
    stream::drain_precopy(c, None)?;
    c.need_info()?;
    dirty(c)?;
    let info = first_reinit(c, CONFIG_KIB)?;
    if info.initial_bytes == 0 {
        return fail("initial_bytes above 0 with REINIT", info.to_string());
    }
    if info.dirty_bytes != 0 {
        return fail("dirty_bytes 0 with REINIT", info.to_string());
    }
    Ok(())
}

fn r5(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    first_reinit(c, CONFIG_KIB)?;
    for round in 1..=2 {
        let read = stream::drain_precopy(c, None)?;
        let info = c.need_info()?;
        if read == 0 && info.initial_bytes != 0 {
            return skip(format!("nothing can be read, and still {info} (rule P4)"));
        }
        if !info.reinit() && info.initial_bytes != 0 {
            return fail("initial_bytes 0 once everything was read after REINIT", info.to_string());
        }
        if reinit(c, CONFIG_KIB / 2 * round)?.is_none() {
            return fail(
                format!("REINIT of reconfiguration {} in one session", round + 1),
                "none, while the first one was reported",
            );
        }
    }
    Ok(())
}

fn r6(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    first_reinit(c, CONFIG_KIB)?;
    // A session of its own, without a reset in between (rule R8).
    c.go(Running)?;
    c.go(PreCopy)?;
    stream::drain_precopy(c, None)?;
    dirty(c)?;
    stream::drain_precopy(c, None)?;
    let info = c.need_info()?;
    if info.initial_bytes != 0 {
        return skip(format!("everything was read, and still {info} (rule P4)"));
    }
    match reinit(c, CONFIG_KIB)? {
        Some(_) => Ok(()),
        None => fail(
            "REINIT of a reconfiguration after all initial and dirty data was read",
            "none, while it is reported before",
        ),
    }
}

fn r7(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    let mut buffer = [0; 256];
    let _ = c.read(&mut buffer)?;
    dirty(c)?;
    let info = first_reinit(c, CONFIG_KIB)?;
    if info.initial_bytes > c.stream_max_bytes {
        return skip(format!(
            "initial_bytes {} are too many to read (--stream-limit)",
            info.initial_bytes
        ));
    }
    let mut left = info.initial_bytes;
    let mut buffer = vec![0; 1 << 20];
    while left > 0 {
        let room = buffer.get_mut(..left.min(1 << 20) as usize).unwrap_or_default();
        match c.read(room)? {
            Ok(0) | Err(Errno(libc::ENOMSG)) => break,
            Ok(got) => left -= got as u64,
            Err(errno) => return skip(format!("reading after REINIT: {errno} (rule S1)")),
        }
    }
    let after = c.need_info()?;
    match after.initial_bytes {
        0 => Ok(()),
        more if left > 0 => skip(format!("nothing more can be read, and still {more} (rule P4)")),
        _ if after.reinit() => skip("the device was reconfigured again"),
        more => fail(
            format!(
                "initial_bytes 0 after the {} bytes of the REINIT were read",
                info.initial_bytes
            ),
            format!("{more} more"),
        ),
    }
}

fn r8(c: &mut Context) -> Result<(), Stop> {
    enter(c)?;
    c.need_info()?;
    if let Err(Stop::Fail { got, .. }) = flags_zeroed(c, "") {
        return skip(format!("flags come back: {got} (rule R2)"));
    }
    let reports = match first_reinit(c, CONFIG_KIB) {
        Ok(_) => true,
        Err(Stop::NotApplicable(_) | Stop::Skipped(_)) => false,
        Err(stop) => return Err(stop),
    };
    c.go_anew(PreCopy)?;
    flags_zeroed(c, "after a reset of an opted-in device")?;
    if reports && reinit(c, CONFIG_KIB)?.is_none() {
        return fail("REINIT after a reset, as before it", "none");
    }
    // And no longer than that.
    c.reopen()?;
    c.go_anew(PreCopy)?;
    if reports {
        reconfigure(c, CONFIG_KIB)?;
        let info = c.need_info()?;
        if info.reinit() {
            return skip("REINIT after the device was closed and opened (rule R3)");
        }
    }
    Ok(())
}
