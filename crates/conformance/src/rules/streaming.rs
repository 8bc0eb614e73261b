//! S: streaming.

use vfio_migration::DeviceState::*;

use super::UAPI;
use crate::context::{Context, Stop, fail, not_applicable, skip};
use crate::errno::Errno;
use crate::rule::Proof::*;
use crate::rule::{Rule, checked, untestable};
use crate::stream::{self, Ended, Saved};

const MIG: &str = "Linux uAPI, enum vfio_device_mig_state, data_fd";
/// How long poll() is given to say that there is nothing.
const POLL_MS: u32 = 100;

pub(super) const RULES: &[Rule] = &[
    checked(
        "S1",
        "at the temporary end of PRE_COPY read() is ENOMSG, not 0",
        MIG,
        "return -ENOMSG from read() in PRE_COPY when nothing is there now; 0 says that all was read",
        s1,
        &[Mtty, Ferrydev("zero-at-temporary-end")],
    )
    .limit_s(60),
    checked(
        "S2",
        "poll() waits at the temporary end of PRE_COPY instead of saying that there is data",
        MIG,
        "implement poll: readable when data is there, at the end of STOP_COPY, and on errors",
        s2,
        &[Mtty, Ferrydev("no-poll")],
    )
    .limit_s(60),
    checked(
        "S3",
        "at the end of STOP_COPY read() is 0 for ever and poll() says readable",
        MIG,
        "keep answering 0 once everything was read; never ENOMSG in STOP_COPY",
        s3,
        &[Quirk("break-S3")],
    )
    .limit_s(60),
    checked(
        "S4",
        "what PRE_COPY produced and nobody read comes first in STOP_COPY: one stream, and it loads",
        MIG,
        "do not drop unread data when PRE_COPY is left",
        s4,
        &[Quirk("break-S4")],
    )
    .limit_s(60),
    checked(
        "S5",
        "the end of STOP_COPY means that the entire state was transferred",
        MIG,
        "everything the guest can see of the device belongs to the stream",
        s5,
        &[Quirk("corrupt-save")],
    )
    .limit_s(60),
    untestable(
        "S6",
        "(driver-specific) O_NONBLOCK: EAGAIN while STOP_COPY data is being prepared",
        "Linux 7.2, drivers/vfio/pci/mlx5/main.c",
        "driver-specific: other answers are as good",
    ),
    untestable(
        "S7",
        "(driver-specific) a device error on the fd: read ENODEV, poll readable and hung up",
        "Linux 7.2, drivers/vfio/pci/mlx5/main.c",
        "a device error cannot be caused from outside",
    ),
    checked(
        "S8",
        "reads may be short and may be small: the rest follows, and nothing is lost",
        UAPI,
        "keep what did not fit into the caller's buffer for its next read",
        s8,
        &[Quirk("break-S8")],
    )
    .limit_s(60),
];

/// PRE_COPY, drained to its temporary end; with the kind of end.
fn at_temporary_end(c: &mut Context) -> Result<Ended, Stop> {
    c.need_precopy()?;
    if c.is_wire() {
        return not_applicable("on vfio-user size 0 stands for both, and there is no poll()");
    }
    c.go(PreCopy)?;
    let (ended, _) = match stream::drain(c, None)? {
        Ok(ended) => ended,
        Err(errno) => return fail("read() in PRE_COPY: data or ENOMSG", errno.to_string()),
    };
    Ok(ended)
}

/// Nothing is to be read, by PRECOPY_INFO too.
fn surely_nothing(c: &mut Context) -> Result<(), Stop> {
    for _ in 0..3 {
        let Ok(info) = c.info()? else { return Ok(()) };
        if info.initial_bytes == 0 && info.dirty_bytes == 0 {
            return Ok(());
        }
        // Data that came since is no end.
        if stream::drain_precopy(c, None)? == 0 {
            return skip(format!("nothing can be read, and still {info} (rule P4)"));
        }
    }
    skip("the device never stops making new data")
}

fn s1(c: &mut Context) -> Result<(), Stop> {
    match at_temporary_end(c)? {
        Ended::NoMessage => Ok(()),
        Ended::Zero => fail("read() with nothing to read in PRE_COPY: ENOMSG", "0"),
    }
}

fn s2(c: &mut Context) -> Result<(), Stop> {
    at_temporary_end(c)?;
    surely_nothing(c)?;
    let readable = c.on_fd("poll()", |s, stream| s.poll(stream, POLL_MS))?;
    match readable {
        Err(errno) => fail("poll() works on the data_fd", errno.to_string()),
        Ok(false) => Ok(()),
        Ok(true) => {
            // Perhaps there is data by now.
            let mut byte = [0; 1];
            match c.read(&mut byte)? {
                Ok(1..) => Ok(()),
                answer => {
                    let read = answer.map_or_else(|errno| errno.to_string(), |got| got.to_string());
                    fail(
                        format!(
                            "poll() waits {POLL_MS} ms while there is nothing to read in PRE_COPY"
                        ),
                        format!(
                            "readable at once, and read() then is {read}: waiting by poll spins"
                        ),
                    )
                }
            }
        }
    }
}

fn s3(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    c.go(StopCopy)?;
    let mut saved = Saved::default();
    let ended = match stream::drain(c, Some(&mut saved))? {
        Ok((ended, _)) => ended,
        Err(errno) => return fail("reading in STOP_COPY: data, then 0", errno.to_string()),
    };
    if ended == Ended::NoMessage {
        return fail("the end of STOP_COPY: read() is 0", "ENOMSG");
    }
    let mut buffer = [0; 64];
    for _ in 0..3 {
        match c.read(&mut buffer)? {
            Ok(0) => {}
            Ok(got) => return fail("0 again after the end of STOP_COPY", format!("{got} bytes")),
            Err(errno) => return fail("0 again after the end of STOP_COPY", errno.to_string()),
        }
    }
    if !c.is_wire() {
        let readable = c.on_fd("poll()", |s, stream| s.poll(stream, POLL_MS))?;
        if readable != Ok(true) {
            let got = readable.map_or_else(|errno| errno.to_string(), |_| "it waits".into());
            return fail("poll() says readable at the end of STOP_COPY", got);
        }
    }
    Ok(())
}

/// Reads `head` bytes in PRE_COPY and the rest in STOP_COPY.
fn save_over_precopy(c: &mut Context, head: usize) -> Result<Saved, Stop> {
    c.go(PreCopy)?;
    let mut saved = Saved::default();
    let mut buffer = vec![0; head];
    while saved.bytes < head as u64 {
        let room = buffer.get_mut(..head - saved.bytes as usize).unwrap_or_default();
        match c.read(room)? {
            Ok(0) | Err(Errno(libc::ENOMSG)) => break,
            Ok(got) => saved.push(buffer.get(..got).unwrap_or_default())?,
            Err(errno) => return skip(format!("reading in PRE_COPY: {errno} (rule S1)")),
        }
    }
    let session = c.stream()?;
    c.go(StopCopy)?;
    if c.stream()? != session {
        return skip("SET STOP_COPY in PRE_COPY began another session (rule X2)");
    }
    stream::drain_stop_copy(c, &mut saved)?;
    Ok(saved)
}

fn s4(c: &mut Context) -> Result<(), Stop> {
    c.need_precopy()?;
    stream::need_loading(c)?;
    for head in [0, 100, 1 << 16] {
        c.go_anew(Running)?;
        let mut saved = save_over_precopy(c, head)?;
        if saved.bytes == 0 {
            return fail("a stream", "PRE_COPY and STOP_COPY are empty");
        }
        if let Err(why) = stream::load(c, &mut saved)? {
            return fail(
                format!("{head} bytes read in PRE_COPY and the rest in STOP_COPY load again"),
                why,
            );
        }
    }
    Ok(())
}

fn s5(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    change_state(c)?;
    let mut saved = stream::save(c)?;
    let before = c.digest()?;
    c.wait(20);
    if c.digest()? != before {
        return skip("the device changes in STOP_COPY (rule H3)");
    }
    if let Err(why) = stream::load(c, &mut saved)? {
        return fail("the device loads the state it saved itself", why);
    }
    let after = c.digest()?;
    if let (Some(before), Some(after)) = (before, after) {
        return match before == after {
            true => Ok(()),
            false => fail(
                format!("state digest {} after loading", hex(&before)),
                format!("{}: the stream lacks part of the state", hex(&after)),
            ),
        };
    }
    // Without a side door: what is saved again should be the same.
    match c.set(StopCopy)? {
        Ok(_) => {}
        Err(errno) => return skip(format!("SET STOP_COPY after loading: {errno} (rule F8)")),
    }
    let mut again = Saved::default();
    stream::drain_stop_copy(c, &mut again)?;
    if again.bytes != saved.bytes {
        return skip(format!(
            "no digest to compare by, and saved again it has {} bytes instead of {}",
            again.bytes, saved.bytes
        ));
    }
    let mut at = 0;
    while at < saved.bytes {
        let (first, second) = (saved.part(at, 1 << 20)?, again.part(at, 1 << 20)?);
        if first != second {
            return skip("no digest to compare by, and saved again the stream differs");
        }
        at += first.len().max(1) as u64;
    }
    Ok(())
}

/// Makes the state another than that after a reset, where it is known how.
fn change_state(c: &mut Context) -> Result<(), Stop> {
    if !c.guest()?.knows_device() {
        return Ok(());
    }
    c.as_guest("region writes", |guest| {
        guest.reconfigure(8)?;
        guest.dirty(16)?;
        guest.raise()
    })
}

fn hex(digest: &[u8; 32]) -> String {
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>() + "…"
}

fn s8(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    stream::need_loading(c)?;
    c.go(StopCopy)?;
    let mut saved = Saved::default();
    let mut buffer = [0; 61];
    for size in [1, 1, 3, 7, 16, 33, 61].into_iter().cycle().take(280) {
        let room = buffer.get_mut(..size).unwrap_or_default();
        match c.read(room)? {
            Ok(0) => break,
            Ok(got) => saved.push(buffer.get(..got).unwrap_or_default())?,
            Err(errno) => {
                return fail(format!("a read of {size} bytes in STOP_COPY"), errno.to_string());
            }
        }
    }
    stream::drain_stop_copy(c, &mut saved)?;
    match stream::load(c, &mut saved)? {
        Ok(()) => Ok(()),
        Err(why) => fail("a state that was read in small pieces loads again", why),
    }
}
