//! States, data fd and stream.

use std::io;
use std::os::fd::OwnedFd;

use anyhow::{Context, ensure};
use vfio_kernel::{KernelDevice, KernelMigration, raw};
use vfio_migration::DeviceState::{self, *};
use vfio_migration::pci::REGION_BAR0;
use vfio_migration::{DeviceError, MigratableDevice, PciFunction, ReadOutcome, path};

use super::each_way;
use crate::case::{Case, Outcome};
use crate::lab::{Lab, Mdev, Parent};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("kernel-mtty-walks-through-all-states", |lab| walk(lab, Parent::Mtty)),
        Case::new("kernel-ferrydev-walks-through-all-states", |lab| walk(lab, Parent::Ferrydev)),
        Case::new("kernel-the-data-fd-lives-as-long-as-its-session", data_fd),
        Case::new("kernel-nothing-now-and-the-end-are-told-apart", ends),
        Case::new("kernel-mtty-carries-its-state-over", |lab| carry(lab, Parent::Mtty)),
        Case::new("kernel-ferrydev-carries-its-state-over", |lab| carry(lab, Parent::Ferrydev)),
        Case::new("kernel-a-failed-state-change-drops-the-session", failed_set),
        Case::new("kernel-a-reset-ends-the-stream-in-its-middle", reset_in_the_middle),
        Case::new("kernel-a-call-that-takes-long-is-seen-while-it-lasts", slow_call),
    ]
}

const USED: [DeviceState; 7] = [Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p];

/// Reads until there is nothing now or the end; answers the bytes and which of the two.
fn drain(device: &mut KernelMigration) -> anyhow::Result<(Vec<u8>, ReadOutcome)> {
    let mut bytes = Vec::new();
    let mut buf = vec![0; 1 << 16];
    loop {
        match device.read(&mut buf)? {
            ReadOutcome::Data(count) => bytes.extend_from_slice(&buf[..count]),
            end => return Ok((bytes, end)),
        }
    }
}

fn load(device: &mut KernelMigration, mut bytes: &[u8]) -> anyhow::Result<()> {
    while !bytes.is_empty() {
        let count = device.write(bytes)?;
        bytes = &bytes[count..];
    }
    Ok(())
}

/// Brings a device to `to`: resuming ends by a reset, since nothing valid was loaded.
fn bring(device: &mut KernelMigration, to: DeviceState) -> anyhow::Result<()> {
    if device.state()? != Running {
        device.reset()?;
    }
    Ok(device.set_state(to)?)
}

/// F8, F5, F3, X1, X2: from every state to every other, by the kernel and by our table.
fn walk(lab: &Lab, parent: Parent) -> anyhow::Result<Outcome> {
    each_way(lab, parent, |_, opened| {
        let mut device = opened.migration()?;
        let capabilities = device.capabilities();
        let flags = capabilities.flags;
        ensure!(flags.p2p() && flags.pre_copy(), "{capabilities:?}");
        ensure!(capabilities.precopy_info_v2 && capabilities.data_size, "{capabilities:?}");
        ensure!(capabilities.dma_logging && capabilities.reset_runs, "{capabilities:?}");
        ensure!(device.state()? == Running, "it opens in {} (D7)", device.state()?);
        for from in USED {
            for to in USED {
                bring(&mut device, from)?;
                let had_session = device.data_fd().is_some();
                ensure!(
                    had_session == (from.is_saving() || from == Resuming),
                    "a data fd in {from}: {had_session}"
                );
                let allowed = path(from, to, flags).is_some();
                let outcome = device.set_state(to);
                // RESUMING is left over STOP, which validates what was loaded: nothing (X8).
                let unloaded = from == Resuming && to != Resuming;
                ensure!(
                    outcome.is_ok() == (allowed && !unloaded),
                    "{from} to {to} gave {outcome:?}"
                );
                let now = device.state()?;
                match outcome {
                    Ok(()) => {
                        ensure!(now == to, "{from} to {to} ended in {now}");
                        let session = device.data_fd().is_some();
                        ensure!(
                            session == (to.is_saving() || to == Resuming),
                            "{from} to {to}: a data fd: {session}"
                        );
                    }
                    Err(_) if !allowed => {
                        ensure!(now == from, "{from} to {to} was refused in {now} (F5)");
                        ensure!(device.data_fd().is_none(), "a held fd is dropped (X10)");
                    }
                    Err(_) => {}
                }
            }
        }
        for raw in [0, 8, u32::MAX] {
            let set = raw::set_migration_state(opened.fd(), raw);
            ensure!(errno(&set) == Some(libc::EINVAL), "SET {raw} gave {set:?} (F6, F7)");
        }
        Ok(())
    })
}

fn errno<T>(result: &io::Result<T>) -> Option<i32> {
    result.as_ref().err().and_then(io::Error::raw_os_error)
}

fn keep(device: &KernelMigration) -> anyhow::Result<OwnedFd> {
    Ok(device.data_fd().context("there is no data fd")?.try_clone_to_owned()?)
}

/// X3, X4, X5, X9.
fn data_fd(lab: &Lab) -> anyhow::Result<Outcome> {
    use std::os::fd::AsFd;
    each_way(lab, Parent::Mtty, |_, opened| {
        let mut device = opened.migration()?;
        for (state, mode) in [(PreCopy, libc::O_RDONLY), (Resuming, libc::O_WRONLY)] {
            bring(&mut device, state)?;
            let held = keep(&device)?;
            let fd = device.data_fd().context("there is no data fd")?;
            let flags = raw::file_flags(fd)?;
            ensure!(flags & libc::O_ACCMODE == mode, "{state}: flags {flags:#o} (X3)");
            ensure!(raw::fd_flags(fd)? & libc::FD_CLOEXEC != 0, "{state}: not O_CLOEXEC (X3)");
            let mut buf = [0; 8];
            let (own, wrong, seek) = match state {
                PreCopy => (
                    raw::read(fd, &mut buf).map(drop),
                    raw::write(fd, &buf),
                    raw::pread(fd, &mut [0; 8], 0),
                ),
                _ => (Ok(()), raw::read(fd, &mut buf), raw::pwrite(fd, &[0; 8], 0)),
            };
            ensure!(own.is_ok(), "{state}: {own:?}");
            ensure!(errno(&wrong) == Some(libc::EBADF), "{state}: {wrong:?} (X5)");
            ensure!(errno(&seek) == Some(libc::ESPIPE), "{state}: {seek:?} (X3)");
            // The session ends; a copy that is still held is dead.
            opened.pci()?.reset_function()?;
            ensure!(device.data_fd().is_some(), "it has not been told yet");
            ensure!(device.state()? == Running, "a reset leads to {}", device.state()?);
            ensure!(device.data_fd().is_none(), "the fd outlived the reset");
            let dead = match state {
                PreCopy => raw::read(held.as_fd(), &mut buf),
                _ => raw::write(held.as_fd(), &buf),
            };
            ensure!(errno(&dead) == Some(libc::ENODEV), "{state}: {dead:?} (X4)");
            // A fresh one while the old is held.
            device.set_state(state)?;
            let fresh = device.data_fd().context("no fresh fd (X9)")?;
            ensure!(raw::poll(fresh, libc::POLLIN | libc::POLLOUT, 0).is_ok(), "no poll");
        }
        Ok(())
    })
}

/// S1, S3: mtty answers 0 at the temporary end, ferrydev ENOMSG, and with its quirk 0 as well.
fn ends(lab: &Lab) -> anyhow::Result<Outcome> {
    let check = |opened: &KernelDevice, enomsg: bool| -> anyhow::Result<()> {
        let mut device = opened.migration()?;
        device.set_state(PreCopy)?;
        let info = device.precopy_info()?;
        ensure!(info.initial_bytes() > 0, "{info:?} at the start (P4)");
        let (head, end) = drain(&mut device)?;
        ensure!(end == ReadOutcome::NothingNow, "{end:?} in PRE_COPY");
        ensure!(!head.is_empty(), "nothing at all in PRE_COPY");
        let bare = raw::read(device.data_fd().context("no fd")?, &mut [0; 8]);
        match enomsg {
            true => ensure!(errno(&bare) == Some(libc::ENOMSG), "{bare:?} (S1)"),
            false => ensure!(matches!(bare, Ok(0)), "{bare:?}"),
        }
        let info = device.precopy_info()?;
        ensure!(info.initial_bytes() == 0, "{info:?} at the temporary end");
        device.set_state(StopCopy)?;
        let (tail, end) = drain(&mut device)?;
        ensure!(end == ReadOutcome::End && !tail.is_empty(), "{end:?} after {} bytes", tail.len());
        let info = device.precopy_info();
        let errno = info.as_ref().err().and_then(DeviceError::errno);
        ensure!(errno == Some(libc::EINVAL), "{info:?} in STOP_COPY (P2)");
        Ok(())
    };
    each_way(lab, Parent::Mtty, |_, opened| check(&opened, false))?;
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("there is no ferrydev".into()));
    }
    each_way(lab, Parent::Ferrydev, |_, opened| check(&opened, true))?;
    let quirky = lab.create(Parent::Ferrydev)?;
    quirky.set("quirks", "zero-at-temporary-end")?;
    check(&super::open(&quirky, super::WAYS[0])?, false)?;
    Ok(Outcome::Passed)
}

/// What a guest wrote to one device is found on another after save and load.
fn carry(lab: &Lab, parent: Parent) -> anyhow::Result<Outcome> {
    each_way(lab, parent, |_, opened| {
        let device = lab.create(parent)?;
        // Declared after its device, so that it is closed before that is taken away.
        let other = super::open(&device, opened.opened().access)?;
        let (from, to) = (opened.pci()?, other.pci()?);
        write_mark(&*from, parent, 0x5a)?;
        write_mark(&*to, parent, 0x11)?;
        let (mut source, mut destination) = (opened.migration()?, other.migration()?);
        source.set_state(PreCopy)?;
        let (mut bytes, _) = drain(&mut source)?;
        let length = source.stop_copy_length()?;
        source.set_state(StopCopy)?;
        bytes.extend(drain(&mut source)?.0);
        ensure!(length <= 1 << 40, "MIG_DATA_SIZE {length}");
        destination.set_state(Resuming)?;
        load(&mut destination, &bytes)?;
        destination.set_state(Stop)?;
        let digests = (source.state_digest()?, destination.state_digest()?);
        ensure!(digests.0 == digests.1, "the digests differ");
        ensure!(digests.0.is_some() == (parent == Parent::Ferrydev), "digest: {digests:?}");
        destination.set_state(Running)?;
        source.set_state(Running)?;
        ensure!(read_mark(&*to, parent)? == 0x5a, "the mark is {:#x}", read_mark(&*to, parent)?);
        Ok(())
    })
}

/// A register that keeps what is written: the scratch register of a serial port, or ferrydev's.
fn mark_at(parent: Parent) -> u64 {
    match parent {
        Parent::Mtty => 7,
        Parent::Ferrydev => device_model::regs::SCRATCH,
    }
}

fn write_mark(function: &dyn PciFunction, parent: Parent, mark: u8) -> anyhow::Result<()> {
    let at = mark_at(parent);
    match parent {
        Parent::Mtty => function.region_write(REGION_BAR0, at, &[mark])?,
        Parent::Ferrydev => {
            super::function::enable(function)?;
            function.region_write(REGION_BAR0, at, &u32::from(mark).to_le_bytes())?;
        }
    }
    Ok(())
}

fn read_mark(function: &dyn PciFunction, parent: Parent) -> anyhow::Result<u8> {
    let mut word = [0; 4];
    let len = if parent == Parent::Mtty { 1 } else { 4 };
    function.region_read(REGION_BAR0, mark_at(parent), &mut word[..len])?;
    Ok(word[0])
}

/// X10, F10, F11.
fn failed_set(lab: &Lab) -> anyhow::Result<Outcome> {
    each_way(lab, Parent::Mtty, |_, opened| {
        let mut device = opened.migration()?;
        device.set_state(StopCopy)?;
        let error = device.set_state(PreCopy).err().context("F5 does not hold")?;
        let DeviceError::Transition { target, state, errno } = error else {
            anyhow::bail!("{error:?}");
        };
        ensure!((target, state, errno) == (PreCopy, Some(StopCopy), libc::EINVAL), "{error}");
        ensure!(device.data_fd().is_none(), "the fd was kept");
        let read = device.read(&mut [0; 8]).err().and_then(|error| error.errno());
        ensure!(read == Some(libc::ENODEV), "a read without a session gave {read:?}");
        device.set_state(Resuming)?;
        load(&mut device, &[0x55; 4096]).err().context("it takes anything")?;
        ensure!(device.data_fd().is_none(), "the fd was kept after a failed write");
        let left = device.set_state(Stop);
        ensure!(left.is_err(), "RESUMING was left with nothing loaded (X8)");
        device.reset()?;
        ensure!(device.state()? == Running, "a reset leads to {}", device.state()?);
        Ok(())
    })
}

/// X9, H5: also while another thread reads.
fn reset_in_the_middle(lab: &Lab) -> anyhow::Result<Outcome> {
    each_way(lab, Parent::Ferrydev, |_, opened| {
        let mut device = opened.migration()?;
        let function = opened.pci()?;
        for state in [PreCopy, StopCopy] {
            device.set_state(state)?;
            let mut buf = [0; 4096];
            ensure!(matches!(device.read(&mut buf)?, ReadOutcome::Data(_)), "no data");
            std::thread::scope(|scope| {
                let reset = scope.spawn(|| function.reset_function());
                let ended = loop {
                    match device.read(&mut buf) {
                        Ok(ReadOutcome::Data(_)) => {}
                        other => break other,
                    }
                };
                let dead = ended.as_ref().err().and_then(DeviceError::errno);
                // The reset may have come after the last byte.
                ensure!(ended.is_ok() || dead == Some(libc::ENODEV), "{ended:?} (X4)");
                reset.join().map_err(|_| anyhow::anyhow!("the reset panicked"))??;
                Ok(())
            })?;
            ensure!(device.state()? == Running, "after a reset: {}", device.state()?);
            ensure!(device.data_fd().is_none(), "the fd outlived the reset");
        }
        Ok(())
    })
}

fn slow_call(lab: &Lab) -> anyhow::Result<Outcome> {
    if !lab.has(Parent::Ferrydev) {
        return Ok(Outcome::Skipped("there is no ferrydev".into()));
    }
    let device: Mdev = lab.create(Parent::Ferrydev)?;
    device.set("to_precopy_ms", 1500)?;
    let opened = super::open(&device, super::WAYS[0])?;
    let mut migration = opened.migration()?;
    std::thread::scope(|scope| {
        let set = scope.spawn(move || migration.set_state(PreCopy));
        let mut seen_ms = 0;
        while !set.is_finished() {
            if let Some(call) = opened.in_call() {
                ensure!(call.call == "SET MIG_DEVICE_STATE", "{call:?}");
                seen_ms = call.for_ms;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        set.join().map_err(|_| anyhow::anyhow!("the call panicked"))??;
        ensure!(seen_ms >= 1000, "it was last seen after {seen_ms} ms");
        ensure!(opened.in_call().is_none(), "it is still seen");
        Ok(Outcome::Passed)
    })
}
