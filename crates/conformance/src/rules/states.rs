//! F: the state machine.

use vfio_migration::DeviceState::{self, *};
use vfio_migration::{MigrationFlags, next_hop, path};

use super::{must_refuse, must_succeed};
use crate::context::{Context, Stop, fail, not_applicable, show, skip, state_name};
use crate::rule::Proof::*;
use crate::rule::{Rule, checked};
use crate::stream::{self, Saved, Written};
use crate::subject::FdAnswer;

const MIG: &str = "Linux uAPI, enum vfio_device_mig_state";
const CORE: &str = "Linux 7.2, drivers/vfio/vfio_main.c, vfio_mig_get_next_state";
const SET_FD: &str =
    "Linux 7.2, drivers/vfio/vfio_main.c, vfio_ioctl_device_feature_mig_device_state";

pub(super) const RULES: &[Rule] = &[
    checked(
        "F1",
        "SET completes the whole transition before it returns",
        MIG,
        "wait for the device inside of migration_set_state; GET must tell the target right after",
        f1,
        &[Quirk("break-F1")],
    )
    .limit_s(30),
    checked(
        "F2",
        "the state changes by SET and reset alone",
        MIG,
        "do not leave a state when its data was read or a query was answered",
        f2,
        &[Quirk("break-F2")],
    )
    .limit_s(60),
    checked(
        "F3",
        "SET to the current state succeeds, runs no arc, and hands out no fd",
        CORE,
        "compare with the current state first, and return no file",
        f3,
        &[Quirk("break-F3")],
    )
    .limit_s(30),
    checked(
        "F4",
        "a state that the device lacks is EINVAL as a target",
        CORE,
        "refuse targets that migration_flags do not offer (vfio_mig_get_next_state does it)",
        f4,
        &[Quirk("break-F4")],
    ),
    checked(
        "F5",
        "STOP_COPY to PRE_COPY or PRE_COPY_P2P is EINVAL and changes nothing",
        MIG,
        "a stopped device cannot go back to saving while running",
        f5,
        &[Quirk("break-F5")],
    )
    .limit_s(30),
    checked(
        "F6",
        "ERROR as a target is EINVAL; from ERROR every target is, until a reset gives RUNNING",
        MIG,
        "ERROR is entered by failure alone and left by reset alone",
        f6,
        &[Quirk("break-F6")],
    ),
    checked(
        "F7",
        "a state number that is not known is EINVAL",
        CORE,
        "refuse numbers beyond PRE_COPY_P2P (7)",
        f7,
        &[Quirk("break-F7")],
    ),
    checked(
        "F8",
        "every pair of states goes the shortest way with no saving state inside, or is EINVAL",
        MIG,
        "walk the arcs with vfio_mig_get_next_state and implement each direct arc",
        f8,
        &[Quirk("break-F8"), Quirk("fail-arc=resuming-stop")],
    )
    .limit_s(120),
    checked(
        "F9",
        "states that the device lacks are passed over on the way",
        CORE,
        "without P2P implement RUNNING-STOP and PRE_COPY-STOP_COPY as direct arcs",
        f9,
        &[Quirk("break-F9")],
    )
    .limit_s(30),
    checked(
        "F10",
        "after a failed SET the state is the original, one on the path, or ERROR",
        MIG,
        "keep the state of the last arc that succeeded when one fails",
        f10,
        &[Quirk("break-F10")],
    )
    .limit_s(60)
    .destructive(),
    checked(
        "F11",
        "after a failed SET data_fd is -1",
        SET_FD,
        "set data_fd to -1 before anything can fail",
        f11,
        &[],
    ),
    checked(
        "F12",
        "no arc inside of a combination hands out an fd",
        MIG,
        "return the file of the last arc only",
        f12,
        &[Ferrydev("break-F12")],
    )
    .limit_s(30),
    checked(
        "F13",
        "PRE_COPY_P2P to PRE_COPY keeps session and fd",
        MIG,
        "do not end or restart the saving session on this arc",
        f13,
        &[Quirk("break-F13")],
    )
    .limit_s(30),
    checked(
        "F14",
        "every SET out of RESUMING passes through STOP, where the loaded data is validated",
        MIG,
        "validate on RESUMING-STOP also where the target is beyond STOP",
        f14,
        &[Quirk("break-F14"), Quirk("break-X8")],
    )
    .limit_s(60)
    .destructive(),
];

fn f1(c: &mut Context) -> Result<(), Stop> {
    for target in c.states()? {
        c.go_anew(Running)?;
        if let Ok(_fd) = c.set(target)? {
            let at = c.state()?;
            if at != target.as_raw() {
                return fail(format!("{target} right after SET {target} returned"), state_name(at));
            }
        }
    }
    Ok(())
}

fn f2(c: &mut Context) -> Result<(), Stop> {
    for state in c.states()? {
        c.go_anew(state)?;
        if state.is_saving() {
            // To whichever end there is: reading must not move the device.
            let mut saved = Saved::default();
            let _ = stream::drain(c, Some(&mut saved))?;
        }
        if state.is_precopy() {
            let info = c.info();
            if let Err(Stop::Fail { .. }) = info {
                return info.map(drop);
            }
        }
        c.wait(10);
        for _ in 0..2 {
            c.expect_state(state, "after nothing but reading and asking")?;
        }
    }
    Ok(())
}

fn f3(c: &mut Context) -> Result<(), Stop> {
    for state in c.states()? {
        c.go_anew(state)?;
        let what = format!("SET {state} in {state}");
        let fd = must_succeed(c.set(state), &what)?;
        if !matches!(fd, FdAnswer::None | FdAnswer::Absent) {
            return fail(format!("{what}: data_fd -1"), format!("{what}: {fd:?}"));
        }
        c.expect_state(state, &format!("after {what}"))?;
    }
    Ok(())
}

fn f4(c: &mut Context) -> Result<(), Stop> {
    let flags = c.flags()?;
    let lacks: Vec<_> =
        DeviceState::ALL.into_iter().filter(|state| !flags.has_state(*state)).collect();
    if lacks.is_empty() {
        return not_applicable("the device has every state");
    }
    for from in [Running, Stop] {
        c.go_anew(from)?;
        for target in &lacks {
            must_refuse(c.set(*target), &[libc::EINVAL], &format!("SET {target} in {from}"))?;
            c.expect_state(from, &format!("after SET {target} was refused"))?;
        }
    }
    Ok(())
}

fn f5(c: &mut Context) -> Result<(), Stop> {
    c.need_precopy()?;
    let flags = c.flags()?;
    for target in [PreCopy, PreCopyP2p].into_iter().filter(|state| flags.has_state(*state)) {
        c.go_anew(StopCopy)?;
        must_refuse(c.set(target), &[libc::EINVAL], &format!("SET {target} in STOP_COPY"))?;
        c.expect_state(StopCopy, &format!("after SET {target} was refused"))?;
    }
    Ok(())
}

fn f6(c: &mut Context) -> Result<(), Stop> {
    for from in c.states()? {
        c.go_anew(from)?;
        let answer = c.set(Error)?;
        if answer.is_ok() {
            return fail(format!("SET ERROR in {from}: EINVAL"), "success");
        }
        must_refuse(Ok(answer), &[libc::EINVAL], &format!("SET ERROR in {from}"))?;
        c.expect_state(from, "after SET ERROR was refused")?;
    }
    if c.destructive && c.need_reset().is_ok() { from_error(c) } else { Ok(()) }
}

/// Some devices can be brought to ERROR by data that is no state.
fn from_error(c: &mut Context) -> Result<(), Stop> {
    c.go_anew(Resuming)?;
    let _ = c.write(&[0xa5; 64])?;
    let _ = c.set(Stop)?;
    if c.state()? != Error.as_raw() {
        return Ok(());
    }
    for target in c.states()? {
        must_refuse(c.set(target), &[libc::EINVAL], &format!("SET {target} in ERROR"))?;
    }
    must_succeed(c.reset(), "reset in ERROR")?;
    c.expect_state(Running, "after a reset in ERROR")
}

fn f7(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    for state in [8, 9, 0x100, u32::MAX] {
        must_refuse(c.set_raw(state), &[libc::EINVAL], &format!("SET of state {state:#x}"))?;
    }
    c.expect_state(Running, "after unknown states were refused")
}

/// The way passes a state the device lacks.
fn passes_lacking(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> bool {
    let full = MigrationFlags::new(true, true);
    let mut at = from;
    while at != to {
        let Some(hop) = next_hop(at, to, full) else { return false };
        if !flags.has_state(hop) {
            return true;
        }
        at = hop;
    }
    false
}

/// Every pair whose way does, or does not, pass states that the device lacks.
fn walk_pairs(c: &mut Context, lacking: bool) -> Result<usize, Stop> {
    let flags = c.flags()?;
    let mut states = c.states()?;
    // Those nearest to RUNNING first: what fails is met before it is needed on the way.
    states.sort_by_key(|state| path(Running, *state, flags).map_or(usize::MAX, |path| path.len()));
    let mut walked = 0;
    for from in &states {
        for to in &states {
            if from == to || passes_lacking(*from, *to, flags) != lacking {
                continue;
            }
            // Loading nothing validates nowhere: the way out of RESUMING needs a state.
            match from {
                Resuming => resume(c)?,
                from => c.go_anew(*from)?,
            }
            if from.is_precopy() {
                // A device may be slow without its initial data being read, and P8 tests that.
                stream::drain_precopy(c, None)?;
            }
            let what = format!("SET {to} in {from}");
            let answer = c.set(*to)?;
            match (next_hop(*from, *to, flags), answer.is_ok()) {
                (Some(_), true) => c.expect_reached(*to, &what)?,
                (None, false) => must_refuse(Ok(answer), &[libc::EINVAL], &what)?,
                // F5 tells more of it.
                (None, true) => {}
                (Some(_), false) => {
                    let at = state_name(c.state()?);
                    return fail(
                        format!("{what}: success"),
                        format!("{what}: {}, the device is in {at}", show(&answer)),
                    );
                }
            }
            walked += 1;
        }
    }
    Ok(walked)
}

/// RESUMING with the device's own state loaded.
fn resume(c: &mut Context) -> Result<(), Stop> {
    c.go_anew(Running)?;
    let mut saved = stream::save(c)?;
    c.go_anew(Resuming)?;
    match stream::write(c, &mut saved, u64::MAX, |_| usize::MAX)? {
        Written::All => Ok(()),
        Written::Refused(at, errno) => skip(format!(
            "the device does not load its own state: {errno} at offset {at} (rules S4, X6)"
        )),
    }
}

fn f8(c: &mut Context) -> Result<(), Stop> {
    walk_pairs(c, false).map(drop)
}

fn f9(c: &mut Context) -> Result<(), Stop> {
    match walk_pairs(c, true)? {
        0 => not_applicable("the device has every state"),
        _ => Ok(()),
    }
}

fn f10(c: &mut Context) -> Result<(), Stop> {
    c.need_reset()?;
    let mut saved = stream::save(c)?;
    c.go_anew(Resuming)?;
    let half = saved.bytes / 2;
    if let Written::Refused(..) = stream::write(c, &mut saved, half, |_| usize::MAX)? {
        return skip("the device does not load its own state (rules S4, X6)");
    }
    // RESUMING, STOP: what is not whole must not pass.
    let answer = c.set(Stop)?;
    if answer.is_ok() {
        return skip(
            "the device accepts half of a state, so that no SET can be made to fail (rule X8)",
        );
    }
    let at = c.state()?;
    match DeviceState::from_raw(at) {
        Some(Resuming | Stop | Error) => Ok(()),
        _ => fail(
            "RESUMING, STOP or ERROR after SET STOP failed in RESUMING",
            format!("{} after {}", state_name(at), show(&answer)),
        ),
    }
}

fn f11(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    if c.is_wire() {
        return not_applicable("vfio-user has no data_fd");
    }
    for target in [Error.as_raw(), 8, u32::MAX] {
        let what = format!("SET {}", state_name(target));
        if c.set_raw(target)?.is_ok() {
            return skip(format!("{what} succeeded (rules F6, F7)"));
        }
        match c.failed_fd() {
            Some(FdAnswer::None) | None => {}
            Some(fd) => return fail(format!("{what} fails with data_fd -1"), format!("{fd:?}")),
        }
    }
    Ok(())
}

fn f12(c: &mut Context) -> Result<(), Stop> {
    let flags = c.flags()?;
    if c.is_wire() {
        return not_applicable("vfio-user has no data_fd");
    }
    let combinations = [
        (StopCopy, Running),
        (Running, Stop),
        (Stop, Running),
        (PreCopy, Stop),
        (PreCopyP2p, Stop),
        (PreCopy, RunningP2p),
    ];
    for (from, to) in combinations {
        if !flags.has_state(from) || !flags.has_state(to) {
            continue;
        }
        c.go_anew(from)?;
        let what = format!("SET {to} in {from}");
        match c.set(to)? {
            Ok(FdAnswer::None) => {}
            Ok(fd) => return fail(format!("{what}: data_fd -1"), format!("{what}: {fd:?}")),
            Err(errno) => return skip(format!("{what}: {errno} (rule F8)")),
        }
    }
    Ok(())
}

fn f13(c: &mut Context) -> Result<(), Stop> {
    c.need_precopy()?;
    c.need_p2p()?;
    c.without_opt_in()?;
    c.go(PreCopy)?;
    let mut buffer = [0; 4096];
    let first = c.read(&mut buffer)?;
    if let Err(errno) = first {
        return skip(format!("the first read in PRE_COPY: {errno} (rule P4)"));
    }
    let before = c.info();
    c.go(PreCopyP2p)?;
    match c.read(&mut buffer)? {
        Ok(_) => {}
        Err(errno) if errno.0 == libc::ENOMSG => {}
        Err(errno) => return skip(format!("reading in PRE_COPY_P2P: {errno} (rule X2)")),
    }
    let fd = match c.set(PreCopy)? {
        Ok(fd) => fd,
        Err(errno) => return skip(format!("SET PRE_COPY in PRE_COPY_P2P: {errno} (rule F8)")),
    };
    if !matches!(fd, FdAnswer::None | FdAnswer::Absent) {
        return fail("no new fd from SET PRE_COPY in PRE_COPY_P2P", format!("{fd:?}"));
    }
    if let (Ok(Ok(before)), Ok(Ok(after))) = (before, c.info())
        && after.initial_bytes > before.initial_bytes
    {
        return fail(
            format!(
                "initial_bytes of at most {} after PRE_COPY_P2P and back",
                before.initial_bytes
            ),
            format!("{}: the session began anew", after.initial_bytes),
        );
    }
    match c.read(&mut buffer)? {
        Ok(_) => Ok(()),
        Err(errno) if errno.0 == libc::ENOMSG => Ok(()),
        Err(errno) => fail(
            "the session goes on after PRE_COPY_P2P and back to PRE_COPY",
            format!("{}: {errno}", c.name_of_read()),
        ),
    }
}

fn f14(c: &mut Context) -> Result<(), Stop> {
    c.need_reset()?;
    let mut saved = stream::save(c)?;
    // Whole: straight to RUNNING.
    c.go_anew(Resuming)?;
    match stream::write(c, &mut saved, u64::MAX, |_| usize::MAX)? {
        Written::All => {}
        Written::Refused(at, errno) => {
            return skip(format!(
                "its own state is refused at offset {at}: {errno} (rules S4, X6)"
            ));
        }
    }
    match c.set(Running)? {
        Ok(_) => {}
        Err(errno) => return skip(format!("SET RUNNING in RESUMING: {errno} (rule F8)")),
    }
    // Half: it must not pass STOP.
    c.go_anew(Resuming)?;
    let half = saved.bytes / 2;
    if let Written::Refused(..) = stream::write(c, &mut saved, half, |_| usize::MAX)? {
        return Ok(());
    }
    let answer = c.set(Running)?;
    if answer.is_ok() {
        return fail("SET RUNNING in RESUMING with half of a state: an error", "success");
    }
    let at = c.state()?;
    match DeviceState::from_raw(at) {
        Some(Running | RunningP2p) => skip(format!(
            "the data was refused, and the device is in {} (rule F10)",
            state_name(at)
        )),
        _ => Ok(()),
    }
}
