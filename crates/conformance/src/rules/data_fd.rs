//! X: the data fd. On vfio-user the session is part of the connection; rules about the fd itself do not
//! apply there, those about the session do.

use vfio_migration::DeviceState::{self, *};

use super::{UAPI, must_fail, must_refuse, must_succeed};
use crate::context::{Context, Stop, fail, not_applicable, show, skip, state_name};
use crate::errno::Errno;
use crate::rule::Proof::*;
use crate::rule::{Rule, checked, untestable};
use crate::stream::{self, Saved, Written};
use crate::subject::FdAnswer;

const MIG: &str = "Linux uAPI, enum vfio_device_mig_state";
const USER: &str = "an obligation of the user of the device, not of the device";

pub(super) const RULES: &[Rule] = &[
    checked(
        "X1",
        "a new fd comes of the four arcs that begin a session; everything else answers -1, GET always",
        MIG,
        "return a file from migration_set_state only where a session begins",
        x1,
        &[Ferrydev("break-X1")],
    )
    .limit_s(30),
    checked(
        "X2",
        "moves inside of the saving group neither return nor disturb the fd",
        MIG,
        "PRE_COPY, PRE_COPY_P2P and STOP_COPY share one session",
        x2,
        &[Quirk("break-X2")],
    )
    .limit_s(60),
    checked(
        "X3",
        "the fd is O_CLOEXEC, O_RDONLY for saving, O_WRONLY for resuming, and a stream (ESPIPE)",
        UAPI,
        "anon_inode_getfile with O_RDONLY or O_WRONLY, and stream_open()",
        x3,
        &[Ferrydev("break-X3")],
    ),
    checked(
        "X4",
        "after its session ended, read and write of the fd are ENODEV",
        MIG,
        "mark the file as disabled when its session ends, and check that under its lock",
        x4,
        &[Quirk("break-X4")],
    )
    .limit_s(30),
    checked(
        "X5",
        "the wrong direction is refused (EBADF)",
        "Linux, file modes of the data_fd",
        "open the file in one direction only",
        x5,
        &[Quirk("break-X5")],
    ),
    checked(
        "X6",
        "the stream is bytes in order: how it is cut into writes does not matter",
        UAPI,
        "keep what a write ends in the middle of, and go on with the next one",
        x6,
        &[Quirk("break-X6")],
    )
    .limit_s(60),
    untestable(
        "X7",
        "data of RESUMING comes from one saving fd of one compatible device",
        UAPI,
        USER,
    ),
    checked(
        "X8",
        "RESUMING-STOP fails where the data is incomplete, inconsistent or invalid",
        MIG,
        "know when the state is complete, and refuse anything else on RESUMING-STOP (or in write)",
        x8,
        &[Quirk("break-X8")],
    )
    .limit_s(60)
    .destructive(),
    checked(
        "X9",
        "after a reset a held session is dead, and a later SET begins a fresh one",
        "Linux uAPI, VFIO_DEVICE_RESET; reset_done of the drivers",
        "end the session in reset_done, under the state lock",
        x9,
        &[Quirk("reset-keeps-state")],
    )
    .limit_s(30),
    untestable("X10", "after a failed SET a held fd is dropped", MIG, USER),
];

fn x1(c: &mut Context) -> Result<(), Stop> {
    let flags = c.flags()?;
    if c.is_wire() {
        return not_applicable("vfio-user has no data_fd");
    }
    let arcs = [
        (Running, PreCopy, true),
        (RunningP2p, PreCopyP2p, true),
        (Stop, StopCopy, true),
        (Stop, Resuming, true),
        (Running, RunningP2p, false),
        (RunningP2p, Running, false),
        (RunningP2p, Stop, false),
        (Stop, RunningP2p, false),
        (PreCopy, Running, false),
        (PreCopyP2p, RunningP2p, false),
        (StopCopy, Stop, false),
    ];
    for (from, to, begins) in arcs {
        if !flags.has_state(from) || !flags.has_state(to) {
            continue;
        }
        c.go_anew(from)?;
        let what = format!("SET {to} in {from}");
        match (c.set(to)?, begins) {
            (Ok(FdAnswer::Stream(_)), true) | (Ok(FdAnswer::None), false) => {}
            (Ok(fd), true) => return fail(format!("{what}: a new fd"), format!("{what}: {fd:?}")),
            (Ok(fd), false) => {
                return fail(format!("{what}: data_fd -1"), format!("{what}: {fd:?}"));
            }
            (Err(errno), _) => return skip(format!("{what}: {errno} (rule F8)")),
        }
        let (_, fd) = c.state_and_fd()?;
        if fd != FdAnswer::None {
            return fail(format!("GET in {to}: data_fd -1"), format!("{fd:?}"));
        }
    }
    Ok(())
}

fn x2(c: &mut Context) -> Result<(), Stop> {
    c.need_precopy()?;
    let p2p = c.flags()?.p2p();
    c.go(PreCopy)?;
    let mut saved = Saved::default();
    let first = read_some(c, &mut saved)?;
    if let Err(errno) = first {
        return skip(format!("the first read in PRE_COPY: {errno} (rule P4)"));
    }
    let mut from = PreCopy;
    // The way back from PRE_COPY_P2P is F13's.
    for to in [PreCopyP2p, StopCopy] {
        if !p2p && to != StopCopy {
            continue;
        }
        let what = format!("SET {to} in {from}");
        match c.set(to)? {
            Ok(FdAnswer::None | FdAnswer::Absent) => {}
            Ok(fd) => return fail(format!("{what}: no new fd"), format!("{what}: {fd:?}")),
            Err(errno) => return skip(format!("{what}: {errno} (rule F8)")),
        }
        match read_some(c, &mut saved)? {
            Ok(_) | Err(Errno(libc::ENOMSG)) => {}
            Err(errno) => {
                let read = c.name_of_read();
                return fail(
                    format!("the session goes on after {what}"),
                    format!("{read}: {errno}"),
                );
            }
        }
        from = to;
    }
    Ok(())
}

fn read_some(c: &mut Context, saved: &mut Saved) -> Result<Result<usize, Errno>, Stop> {
    let mut buffer = [0; 512];
    let answer = c.read(&mut buffer)?;
    if let Ok(got) = answer {
        saved.push(buffer.get(..got).unwrap_or_default())?;
    }
    Ok(answer)
}

fn x3(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    for (state, access, name) in
        [(StopCopy, libc::O_RDONLY, "O_RDONLY"), (Resuming, libc::O_WRONLY, "O_WRONLY")]
    {
        c.go_anew(state)?;
        let flags = must_succeed(c.on_fd("fcntl()", |s, stream| s.fd_flags(stream)), "fcntl()")?;
        if !flags.cloexec {
            return fail(format!("FD_CLOEXEC on the fd of {state}"), "it is not set");
        }
        if flags.access != access {
            let got = match flags.access {
                libc::O_RDONLY => "O_RDONLY",
                libc::O_WRONLY => "O_WRONLY",
                _ => "O_RDWR",
            };
            return fail(format!("{name} on the fd of {state}"), got);
        }
        let write = state == Resuming;
        let what = if write { "pwrite()" } else { "pread()" };
        let answer = c.on_fd(what, |s, stream| s.positioned(stream, write));
        must_refuse(answer, &[libc::ESPIPE], what)?;
    }
    Ok(())
}

fn x4(c: &mut Context) -> Result<(), Stop> {
    let flags = c.flags()?;
    let enodev: &[i32] = if c.is_wire() { &[] } else { &[libc::ENODEV] };
    let mut buffer = [0; 64];
    for (saving, after) in [(StopCopy, Stop), (PreCopy, Running)] {
        if !flags.has_state(saving) {
            continue;
        }
        c.go_anew(saving)?;
        c.go(after)?;
        let what = format!("{} in {after} after {saving} was left", c.name_of_read());
        let answer = c.read(&mut buffer);
        dead(answer, enodev, &what)?;
    }
    if c.is_wire() {
        // Leaving RESUMING needs a whole state; here the session may also never have begun.
        return dead(c.write(&[0; 1]), enodev, "MIG_DATA_WRITE in RUNNING");
    }
    let mut saved = stream::save(c)?;
    c.go_anew(Resuming)?;
    let held = c.stream()?;
    if stream::write(c, &mut saved, u64::MAX, |_| usize::MAX)? != Written::All
        || c.set(Stop)?.is_err()
    {
        return skip("the device does not load its own state (rule S5)");
    }
    dead(c.write_to(held, &[0; 1]), enodev, "write() in STOP after RESUMING was left")
}

/// One of these errnos; any where none is named.
fn dead<T>(answer: crate::context::Answer<T>, errnos: &[i32], what: &str) -> Result<(), Stop> {
    if errnos.is_empty() { must_fail(answer, what) } else { must_refuse(answer, errnos, what) }
}

fn x5(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    // On vfio-user: valid in the other states only, and the errno is not said.
    let ebadf: &[i32] = if c.is_wire() { &[] } else { &[libc::EBADF] };
    c.go(StopCopy)?;
    dead(c.write(&[0; 16]), ebadf, "writing while saving")?;
    c.go_anew(Resuming)?;
    let mut buffer = [0; 16];
    dead(c.read(&mut buffer), ebadf, "reading while resuming")
}

fn x6(c: &mut Context) -> Result<(), Stop> {
    stream::need_loading(c)?;
    let mut saved = stream::save(c)?;
    c.go_anew(Resuming)?;
    // Small and odd pieces at the beginning, where headers are; then pieces that do not wait for ever.
    let pieces = |at: u64| match at {
        0..64 => 1,
        64..4096 => 7 + (at % 61) as usize,
        4096..65_536 => 1021,
        _ => 262_147,
    };
    match stream::write(c, &mut saved, u64::MAX, pieces)? {
        Written::All => {}
        Written::Refused(at, errno) => {
            let size = pieces(at);
            return fail(
                "the device's own state is taken in pieces of any size",
                format!("{errno} at offset {at}, in a write of up to {size} bytes"),
            );
        }
    }
    let answer = c.set(Stop)?;
    match answer {
        Ok(_) => Ok(()),
        Err(_) => fail(
            "SET STOP succeeds after the device's own state came in small pieces",
            show(&answer),
        ),
    }
}

fn x8(c: &mut Context) -> Result<(), Stop> {
    c.need_reset()?;
    let mut saved = stream::save(c)?;
    if let Err(why) = stream::load(c, &mut saved)? {
        return skip(format!("the device does not load its own state: {why} (rules S4, X6)"));
    }
    let cases: [(&str, u64, bool); 4] = [
        ("no data at all", 0, false),
        ("half of a state", saved.bytes / 2, false),
        ("a state without its last byte", saved.bytes - 1, false),
        ("a state whose first 64 bytes are 0xa5", saved.bytes, true),
    ];
    for (what, bytes, spoilt) in cases {
        c.go_anew(Resuming)?;
        let mut refused = false;
        if spoilt {
            let mut garbage = Saved::default();
            let head = bytes.min(64) as usize;
            garbage.push(&vec![0xa5; head])?;
            let rest = saved.part(head as u64, (bytes as usize - head).min(1 << 20))?;
            garbage.push(&rest)?;
            refused = stream::write(c, &mut garbage, u64::MAX, |_| usize::MAX)? != Written::All;
        } else if bytes > 0 {
            refused = stream::write(c, &mut saved, bytes, |_| usize::MAX)? != Written::All;
        }
        let answer = c.set(Stop)?;
        if answer.is_ok() {
            let write = if refused { " (a write had failed)" } else { "" };
            return fail(
                format!("SET STOP in RESUMING with {what}: an error"),
                format!("success{write}"),
            );
        }
        let at = c.state()?;
        if !matches!(DeviceState::from_raw(at), Some(Resuming | Stop | Error)) {
            return skip(format!("{} after a failed SET (rule F10)", state_name(at)));
        }
    }
    Ok(())
}

fn x9(c: &mut Context) -> Result<(), Stop> {
    let flags = c.flags()?;
    let enodev: &[i32] = if c.is_wire() { &[] } else { &[libc::ENODEV] };
    let mut buffer = [0; 64];
    for state in [PreCopy, StopCopy] {
        if !flags.has_state(state) {
            continue;
        }
        c.go_anew(state)?;
        let held = c.stream()?;
        if let Err(errno) = c.reset()? {
            let what = format!("reset in {state}");
            return fail(
                format!("{what}: success, and its session dead"),
                format!("{what}: {errno}"),
            );
        }
        let what = format!("{} of a session that was reset in {state}", c.name_of_read());
        dead(c.read_of(held, &mut buffer), enodev, &what)?;
        c.go(state)?;
        let what_new = "reading the session begun after a reset";
        match c.read(&mut buffer)? {
            Ok(_) | Err(Errno(libc::ENOMSG)) => {}
            Err(errno) => {
                return fail(format!("{what_new}: data"), format!("{what_new}: {errno}"));
            }
        }
        if !c.is_wire() {
            dead(c.read_of(held, &mut buffer), enodev, &format!("{what}, with a new one begun"))?;
        }
    }
    Ok(())
}
