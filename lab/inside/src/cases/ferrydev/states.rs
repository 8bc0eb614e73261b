//! The state machine, reset, and what outlives what.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, ensure};
use vfio_kernel::raw;
use vfio_migration::DeviceState::{self, *};
use vfio_migration::MigrationFlags;
use vfio_migration::arcs::{self, SessionEffect};

use super::rig::{self, Rig, WAYS, errno, reg};
use super::with_ferrydev;
use crate::case::{Case, Outcome};
use crate::lab::{self, Lab};
use crate::setup;

/// Long enough that another thread surely gets in.
const SLOW_MS: u64 = 400;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("ferrydev-opens-by-cdev-and-by-group", opens_both_ways),
        Case::new("ferrydev-f-walks-every-pair-of-states", every_pair).limit_s(120),
        Case::new("ferrydev-h5-reset-in-every-state", reset_everywhere),
        Case::new("ferrydev-h5-reset-is-deferred-by-a-set", reset_during_set),
        Case::new("ferrydev-x4-data-fd-outlives-its-device", data_fd_outlives),
        Case::new("ferrydev-is-unloaded-when-not-in-use", unloaded_when_not_in_use),
        Case::new("ferrydev-stands-calls-from-all-sides", all_sides).limit_s(120),
    ]
}

fn opens_both_ways(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        for way in WAYS {
            let rig = Rig::with(lab, way, &[])?;
            ensure!(raw::migration_flags(rig.fd())? == 7, "{way:?}: S, P2P and PRE_COPY");
            ensure!(rig.read(reg::ID)? == 0x5946_4d56, "{way:?}: ID");
            ensure!(rig.state()? == Running, "{way:?}: D7");
            let clean = rig.digest()?;
            rig.write(reg::SCRATCH, 7)?;
            ensure!(rig.digest()? != clean, "{way:?}: the digest sees a register");
            rig.walk(&[Stop])?;
            // A closed device is a device switched off.
            let rig = rig.reopen(lab, way)?;
            ensure!(rig.state()? == Running && rig.digest()? == clean, "{way:?}: opened again");
        }
        Ok(())
    })
}

/// Brings a fresh device to a state; answers the data fd there.
fn reach(rig: &Rig, state: DeviceState) -> anyhow::Result<Option<std::os::fd::OwnedFd>> {
    rig.reset()?;
    rig.set(state).with_context(|| format!("reach {state}"))
}

fn every_pair(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        for (quirks, p2p, pre_copy) in [
            ("", true, true),
            ("no-p2p", false, true),
            ("no-precopy", true, false),
            ("no-p2p no-precopy", false, false),
        ] {
            let flags = MigrationFlags::new(p2p, pre_copy);
            let rig = Rig::new(lab, quirks)?;
            ensure!(raw::migration_flags(rig.fd())? == flags.as_raw(), "{quirks:?}: flags");
            let present = |state: &DeviceState| *state != Error && flags.has_state(*state);
            for from in DeviceState::ALL.into_iter().filter(present) {
                for to in DeviceState::ALL {
                    pair(&rig, from, to, flags)
                        .with_context(|| format!("{quirks:?} {from} to {to}"))?;
                }
                reach(&rig, from)?;
                let unknown = raw::set_migration_state(rig.fd(), 8).map(drop);
                ensure!(errno(unknown) == libc::EINVAL, "F7 in {from}");
                ensure!(rig.state()? == from, "F7 leaves {from}");
            }
        }
        Ok(())
    })
}

fn pair(
    rig: &Rig,
    from: DeviceState,
    to: DeviceState,
    flags: MigrationFlags,
) -> anyhow::Result<()> {
    let held = reach(rig, from)?;
    let path = arcs::path(from, to, flags).filter(|_| to != Error && flags.has_state(to));
    let answer = rig.set(to);
    // Nothing was written to a resuming session, so it cannot be left (X8, F14).
    let judged = from == Resuming && to != Resuming;
    let Some(path) = path.filter(|_| !judged) else {
        ensure!(errno(answer) == libc::EINVAL, "must be EINVAL");
        ensure!(rig.state()? == from, "leaves the state");
        return Ok(());
    };
    let begun = answer?;
    ensure!(rig.state()? == to, "F1: is in {}", rig.state()?);
    let mut last = from;
    let mut effect = SessionEffect::Keeps;
    let mut over = false;
    for hop in path {
        effect = arcs::session_effect(last, hop);
        over |= effect == SessionEffect::Ends;
        last = hop;
    }
    let begins = matches!(effect, SessionEffect::BeginsSaving | SessionEffect::BeginsResuming);
    ensure!(begun.is_some() == begins, "X1: a data fd came: {}", begun.is_some());
    if let Some(data) = held.filter(|_| from.is_saving()) {
        let read = raw::read(data.as_fd(), &mut [0; 16]);
        ensure!((errno(read) == libc::ENODEV) == over, "X2, X4: the session that was held");
    }
    Ok(())
}

fn reset_everywhere(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "fail-arc=running_p2p-stop:5:error:1")?;
        let clean = rig.digest()?;
        for state in DeviceState::ALL {
            rig.write(reg::SCRATCH, 9)?;
            let data = if state == Error {
                ensure!(errno(rig.set(Stop)) == libc::EIO, "the arc fails");
                ensure!(errno(rig.set(Running)) == libc::EINVAL, "F6: nothing leaves ERROR");
                None
            } else {
                rig.set(state)?
            };
            ensure!(rig.state()? == state, "in {state}");
            rig.reset()?;
            ensure!(rig.state()? == Running, "after a reset in {state}");
            ensure!(rig.digest()? == clean, "power-on state after a reset in {state}");
            let Some(data) = data else { continue };
            let dead = match state {
                Resuming => errno(raw::write(data.as_fd(), &[0; 8])),
                _ => errno(raw::read(data.as_fd(), &mut [0; 8])),
            };
            ensure!(dead == libc::ENODEV, "X9: errno {dead} after a reset in {state}");
            let hang = if state == Resuming { libc::POLLERR } else { libc::POLLRDHUP };
            ensure!(rig::poll(&data)? & hang != 0, "S7: poll after a reset in {state}");
        }
        Ok(())
    })
}

fn reset_during_set(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let slow = format!("slow-arc=stop_copy:{SLOW_MS}");
        let rig = Rig::new(lab, &slow)?;
        rig.write(reg::SCRATCH, 9)?;
        let data = std::thread::scope(|scope| {
            let set = scope.spawn(|| rig.begin(StopCopy));
            std::thread::sleep(Duration::from_millis(SLOW_MS / 2));
            // The SET has the state lock: the reset does not wait for it.
            rig.reset()?;
            ensure!(!set.is_finished(), "the reset waited for the SET");
            set.join().map_err(|_| anyhow::anyhow!("the SET panicked"))?
        })?;
        // "Out of sync": the SET handed out an fd, and the reset came after it.
        ensure!(rig.state()? == Running, "the reset is done when the SET is");
        ensure!(errno(raw::read(data.as_fd(), &mut [0; 8])) == libc::ENODEV, "X9");
        ensure!(rig.read(reg::SCRATCH)? == 0, "the device was reset at once");
        Ok(())
    })
}

fn data_fd_outlives(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        for way in WAYS {
            for state in [PreCopy, StopCopy, Resuming] {
                let rig = Rig::with(lab, way, &[])?;
                let data = rig.begin(state)?;
                let mdev = rig.close();
                let path = mdev.sysfs();
                drop(mdev);
                lab::wait_until("the device is gone", || Ok(!path.exists()))?;
                let answer = match state {
                    Resuming => raw::write(data.as_fd(), &[0; 8]),
                    _ => raw::read(data.as_fd(), &mut [0; 8]),
                };
                ensure!(errno(answer) == libc::ENODEV, "{way:?} {state}");
                let asked = errno(rig::info(&data));
                let expected = if state == Resuming { libc::ENOTTY } else { libc::EINVAL };
                ensure!(asked == expected, "{way:?} {state}: PRECOPY_INFO {asked}");
            }
        }
        Ok(())
    })
}

fn unloaded_when_not_in_use(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let unload = || {
            // SAFETY: the name ends with 0; a module in use is refused, not waited for.
            let result = unsafe {
                libc::syscall(libc::SYS_delete_module, c"ferrydev".as_ptr(), libc::O_NONBLOCK)
            };
            if result == 0 { 0 } else { errno::<()>(Err(std::io::Error::last_os_error())) }
        };
        let rig = Rig::new(lab, "")?;
        let data = rig.begin(PreCopy)?;
        ensure!(unload() == libc::EWOULDBLOCK, "unloaded with a device open");
        drop(rig);
        ensure!(unload() == libc::EWOULDBLOCK, "unloaded with a data fd open");
        // With devices, but none of them open, it goes.
        let mdev = lab.create(crate::lab::Parent::Ferrydev)?;
        drop(data);
        lab::wait_until("it is unloaded", || match unload() {
            0 => Ok(true),
            libc::EWOULDBLOCK => Ok(false),
            number => anyhow::bail!("errno {number}"),
        })?;
        ensure!(!mdev.sysfs().exists(), "its device is left");
        setup::load_ferrydev()?;
        ensure!(Rig::new(lab, "")?.state()? == Running, "loaded again");
        Ok(())
    })
}

/// SETs, reads, queries, registers, reports and resets from threads of their own: nothing hangs, the kernel does
/// not complain, and a reset puts the device right.
fn all_sides(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        for way in WAYS {
            let settings = [("dirty_bytes_per_s", "4000000"), ("state_bytes", "2000000")];
            let rig = Rig::with(lab, way, &settings)?;
            let clean = rig.digest()?;
            raw::precopy_info_v2(rig.fd())?;
            let until = std::time::Instant::now() + Duration::from_secs(4);
            let running = || std::time::Instant::now() < until;
            std::thread::scope(|scope| {
                scope.spawn(|| set_and_read(&rig, running));
                scope.spawn(|| {
                    for round in 0.. {
                        if !running() {
                            break;
                        }
                        let _ = rig.set_up_dma(8);
                        let _ = rig.program(&[
                            (reg::DMA_RATE, 20_000),
                            (reg::CONTROL, 3),
                            (reg::DOORBELL, 50),
                            (reg::CONFIG_KIB, round % 512),
                            (reg::CONFIG_GEN, round),
                            (reg::FILL_KIB, 64),
                        ]);
                    }
                });
                scope.spawn(|| {
                    while running() {
                        let _ = rig.reset();
                        let _ = rig.digest();
                        std::thread::sleep(Duration::from_millis(7));
                    }
                });
                scope.spawn(|| {
                    let range = super::function::log_range(0, 16);
                    let mut bitmap = [0; 1];
                    while running() {
                        let _ = raw::dma_logging_start(rig.fd(), 4096, &[range]);
                        for _ in 0..20 {
                            let (iova, length) = (range.iova, range.length);
                            let _ = raw::dma_logging_report(
                                rig.fd(),
                                40,
                                iova,
                                length,
                                4096,
                                &mut bitmap,
                            );
                            let _ = raw::migration_data_size(rig.fd());
                        }
                        let _ = raw::dma_logging_stop(rig.fd());
                    }
                });
            });
            rig.mdev().set("dirty_bytes_per_s", 0)?;
            rig.reset()?;
            ensure!(rig.state()? == Running && rig.digest()? == clean, "{way:?}: after all that");
        }
        Ok(())
    })
}

fn set_and_read(rig: &Rig, running: impl Fn() -> bool) {
    let mut buf = vec![0; 100_000];
    let states = [PreCopy, PreCopyP2p, PreCopy, PreCopyP2p, StopCopy, Stop, Running, Resuming];
    let mut held = None;
    for state in states.into_iter().cycle() {
        if !running() {
            break;
        }
        if let Ok(Some(data)) = rig.set(state) {
            held = Some(data);
        }
        let Some(data) = &held else { continue };
        for _ in 0..8 {
            let _ = raw::read(data.as_fd(), &mut buf);
            let _ = raw::write(data.as_fd(), &buf[..64]);
            let _ = rig::info(data);
            let _ = rig::poll(data);
        }
    }
}
