//! Saving, REINIT, loading.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::ensure;
use vfio_kernel::raw;
use vfio_migration::DeviceState::*;

use super::rig::{self, End, Rig, Way, drain, errno, info, load, read_exactly, reg};
use super::with_ferrydev;
use crate::case::{Case, Outcome};
use crate::lab::Lab;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("ferrydev-p4-s1-precopy-counts-to-zero", counts_to_zero),
        Case::new("ferrydev-r-reinit", reinit),
        Case::new("ferrydev-r-reinit-late-and-stopped", reinit_late),
        Case::new("ferrydev-r4-reinit-drops-unread", reinit_drops),
        Case::new("ferrydev-s4-s5-carries-its-state", carries_state),
        Case::new("ferrydev-has-any-shape", any_shape),
        Case::new("ferrydev-x8-refuses-bad-data", refuses_bad_data).limit_s(120),
        Case::new("ferrydev-dirties-itself-while-it-works", dirties_itself),
        Case::new("ferrydev-carries-256-mib", carries_much).limit_s(240),
    ]
}

/// Into STOP_COPY, and the rest of the stream.
fn finish(rig: &Rig, data: &OwnedFd, stream: &mut Vec<u8>) -> anyhow::Result<()> {
    rig.walk(&[StopCopy])?;
    ensure!(drain(data, stream)? == End::Whole, "S3: ENOMSG in STOP_COPY");
    ensure!(raw::read(data.as_fd(), &mut [0; 8])? == 0, "S3: 0 for ever");
    ensure!(rig::poll(data)? & libc::POLLIN != 0, "S3: poll at the end");
    Ok(())
}

/// Loads a stream into a new device of the same shape and compares.
fn loads_into_another(
    lab: &Lab,
    from: &Rig,
    settings: &[(&str, &str)],
    stream: &[u8],
    segment: usize,
) -> anyhow::Result<Rig> {
    let to = Rig::with(lab, Way::Group, settings)?;
    let data = to.begin(Resuming)?;
    load(&data, stream, segment)?;
    to.walk(&[Stop])?;
    ensure!(to.digest()? == from.digest()?, "the state differs");
    Ok(to)
}

fn counts_to_zero(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "")?;
        let data = rig.begin(PreCopy)?;
        let mut stream = Vec::new();
        let first = info(&data)?;
        ensure!(first.initial > 256 << 10 && first.dirty == 0 && first.flags == 0, "{first:?}");
        read_exactly(&data, first.initial, &mut stream)?;
        let then = info(&data)?;
        ensure!(then.initial == 0 && then.dirty > 7 << 20, "P4: {then:?}");
        ensure!(drain(&data, &mut stream)? == End::Now, "S1: 0 in PRE_COPY");
        ensure!(stream.len() as u64 == first.initial + then.dirty, "sizes are exact");
        let end = info(&data)?;
        ensure!(end.initial == 0 && end.dirty == 0, "{end:?}");
        ensure!(rig::poll(&data)? == 0, "S2: poll with nothing to read");

        // A poller is woken by what the guest does.
        let woken = std::thread::scope(|scope| {
            let poll = scope.spawn(|| raw::poll(data.as_fd(), libc::POLLIN, 10_000));
            std::thread::sleep(std::time::Duration::from_millis(50));
            rig.write(reg::FILL_KIB, 64)?;
            poll.join().map_err(|_| anyhow::anyhow!("panicked"))?.map_err(anyhow::Error::from)
        })?;
        ensure!(woken & libc::POLLIN != 0, "poll was not woken");
        let dirty = info(&data)?;
        ensure!(dirty.initial == 0 && dirty.dirty >= 64 << 10, "P5: {dirty:?}");

        // Without the opt-in a new configuration is ordinary change (P4).
        rig.program(&[(reg::CONFIG_KIB, 512), (reg::CONFIG_GEN, 3)])?;
        let more = info(&data)?;
        ensure!(more.initial == 0 && more.dirty > dirty.dirty + (512 << 10), "{more:?}");
        ensure!(more.flags == 0, "R3: {more:?}");
        // Sizes are kept up to the end of STOP_COPY (Z2).
        let size = raw::migration_data_size(rig.fd())?;
        let read = stream.len() as u64;
        finish(&rig, &data, &mut stream)?;
        ensure!(size == stream.len() as u64 - read, "Z2: {size}");
        ensure!(raw::migration_data_size(rig.fd())? == 0, "Z2: at the end");
        loads_into_another(lab, &rig, &[], &stream, 100_000)?;
        Ok(())
    })
}

fn reinit(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "")?;
        raw::precopy_info_v2(rig.fd())?;
        let data = rig.begin(PreCopy)?;
        let mut stream = Vec::new();
        for (round, kib) in [600u32, 40, 3000].into_iter().enumerate() {
            drain(&data, &mut stream)?;
            rig.write(reg::FILL_KIB, 64)?;
            rig.program(&[(reg::CONFIG_KIB, kib), (reg::CONFIG_GEN, round as u32 + 1)])?;
            let new = info(&data)?;
            ensure!(new.reinit() && new.dirty == 0, "R4: {new:?}");
            // Unread dirty data is flushed first and counts too (R7).
            let least = u64::from(kib + 64) << 10;
            ensure!((least..least + 10_000).contains(&new.initial), "R7: {new:?}");
            let again = info(&data)?;
            ensure!(!again.reinit() && again.initial == new.initial, "R10: {again:?}");
            read_exactly(&data, new.initial, &mut stream)?;
            ensure!(info(&data)?.initial == 0, "R5: {:?}", info(&data)?);
        }
        finish(&rig, &data, &mut stream)?;
        loads_into_another(lab, &rig, &[], &stream, 65_536)?;
        Ok(())
    })
}

/// REINIT in PRE_COPY_P2P, seen and unseen, and in the middle of a configuration that is being read.
fn reinit_late(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        for (quirks, seen) in
            [("", true), ("no-reinit-in-p2p", false), ("reinit-late=60000", false)]
        {
            let rig = Rig::new(lab, quirks)?;
            raw::precopy_info_v2(rig.fd())?;
            let data = rig.begin(PreCopy)?;
            let mut stream = Vec::new();
            read_exactly(&data, 100_001, &mut stream)?;
            rig.program(&[(reg::CONFIG_KIB, 700), (reg::CONFIG_GEN, 5)])?;
            rig.walk(&[PreCopyP2p])?;
            let found = info(&data)?;
            ensure!(found.reinit() == seen, "{quirks:?}: {found:?}");
            read_exactly(&data, 50_001, &mut stream)?;
            rig.walk(&[PreCopy])?;
            let found = info(&data)?;
            let seen_now = quirks == "no-reinit-in-p2p";
            ensure!(found.reinit() == seen_now, "{quirks:?}, back in PRE_COPY: {found:?}");
            finish(&rig, &data, &mut stream)?;
            loads_into_another(lab, &rig, &[], &stream, 1 << 20)?;
        }
        Ok(())
    })
}

fn reinit_drops(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::new(lab, "reinit-drops-unread")?;
        raw::precopy_info_v2(rig.fd())?;
        let data = rig.begin(PreCopy)?;
        let mut stream = Vec::new();
        drain(&data, &mut stream)?;
        rig.write(reg::FILL_KIB, 64)?;
        rig.program(&[(reg::CONFIG_KIB, 40), (reg::CONFIG_GEN, 1)])?;
        let new = info(&data)?;
        ensure!(new.reinit() && new.dirty == 0 && new.initial < 50_000, "{new:?}");
        read_exactly(&data, new.initial, &mut stream)?;
        ensure!(info(&data)?.dirty >= 64 << 10, "what was dropped comes later");
        finish(&rig, &data, &mut stream)?;
        loads_into_another(lab, &rig, &[], &stream, 65_536)?;
        Ok(())
    })
}

/// All of the state, whatever was read in which state, in writes of any length.
fn carries_state(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        // Sizes that leave a short last block.
        let settings = [("state_bytes", "1500100"), ("stop_only_bytes", "200000")];
        for (precopy_bytes, segment) in
            [(None, 4096), (Some(0), 1), (Some(300_000), 77), (Some(1), 1 << 20)]
        {
            let rig = Rig::with(lab, Way::Cdev, &settings)?;
            rig.set_up_dma(3)?;
            rig.program(&[(reg::DOORBELL, 5), (reg::VECTOR, 2), (reg::SCRATCH, 77)])?;
            rig.write(reg::FILL_KIB, 100)?;
            let mut stream = Vec::new();
            let data = match precopy_bytes {
                None => {
                    let size = raw::migration_data_size(rig.fd())?;
                    let data = rig.begin(StopCopy)?;
                    ensure!(raw::migration_data_size(rig.fd())? == size, "Z2");
                    data
                }
                Some(bytes) => {
                    let data = rig.begin(PreCopy)?;
                    read_exactly(&data, bytes, &mut stream)?;
                    rig.write(reg::FILL_KIB, 1000)?;
                    // The doorbell waits for RUNNING, and its interrupt travels.
                    rig.walk(&[PreCopyP2p])?;
                    rig.write(reg::DOORBELL, 4)?;
                    rig.walk(&[StopCopy])?;
                    data
                }
            };
            ensure!(drain(&data, &mut stream)? == End::Whole, "S3");
            let to = loads_into_another(lab, &rig, &settings, &stream, segment)?;
            let owed = if precopy_bytes.is_some() { 4 } else { 0 };
            to.set_up_dma_only()?;
            to.walk(&[Running])?;
            crate::lab::wait_until("the doorbell is served", || {
                Ok(to.read(reg::COMPLETED)? == 5 + owed)
            })?;
            // Both go on alike.
            rig.walk(&[Stop, Running])?;
            crate::lab::wait_until("the doorbell is served", || {
                Ok(rig.read(reg::COMPLETED)? == 5 + owed)
            })?;
            ensure!(to.digest()? == rig.digest()?, "the state differs after RUNNING");
        }
        Ok(())
    })
}

/// Sizes at the edges, among them a device without any state but its registers.
fn any_shape(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        for (state, config, stop_only) in [
            ("0", "0", "0"),
            ("1", "0", "1"),
            ("1023", "0", "0"),
            ("65536", "65536", "0"),
            ("65537", "65536", "0"),
            ("266240", "1024", "4096"),
            ("300000", "100000", "9000000"),
        ] {
            let settings =
                [("state_bytes", state), ("config_bytes", config), ("stop_only_bytes", stop_only)];
            let rig = Rig::with(lab, Way::Cdev, &settings)?;
            raw::precopy_info_v2(rig.fd())?;
            let size = raw::migration_data_size(rig.fd())?;
            let data = rig.begin(PreCopy)?;
            let mut stream = Vec::new();
            let first = info(&data)?;
            ensure!(first.initial > 0 && first.dirty == 0, "{settings:?}: {first:?}");
            drain(&data, &mut stream)?;
            let end = info(&data)?;
            ensure!(end.initial == 0 && end.dirty == 0, "{settings:?}: {end:?}");
            finish(&rig, &data, &mut stream)?;
            ensure!(stream.len() as u64 >= size, "{settings:?}: {size}");
            loads_into_another(lab, &rig, &settings, &stream, 999)?;
            // A configuration of no bytes, and one where there was none.
            rig.walk(&[Running])?;
            let data = rig.begin(PreCopy)?;
            let mut stream = Vec::new();
            for (generation, kib) in [(1, 0), (2, 1)] {
                rig.program(&[(reg::CONFIG_KIB, kib), (reg::CONFIG_GEN, generation)])?;
                rig.write(reg::FILL_KIB, 1)?;
                let new = info(&data)?;
                ensure!(new.reinit() && new.initial > 0 && new.dirty == 0, "{settings:?}: {new:?}");
                read_exactly(&data, new.initial, &mut stream)?;
            }
            finish(&rig, &data, &mut stream)?;
            loads_into_another(lab, &rig, &settings, &stream, 1 << 20)?;
        }
        Ok(())
    })
}

fn refuses_bad_data(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let settings = [("state_bytes", "400000"), ("config_bytes", "70000")];
        let rig = Rig::with(lab, Way::Cdev, &settings)?;
        let data = rig.begin(StopCopy)?;
        let mut good = Vec::new();
        drain(&data, &mut good)?;
        let to = Rig::with(lab, Way::Cdev, &settings)?;
        let clean = to.digest()?;
        let attempt = |stream: &[u8], what: &str| {
            let data = to.begin(Resuming)?;
            let _ = load(&data, stream, 50_000);
            ensure!(errno(to.set(Stop)) == libc::EINVAL, "X8: {what} was taken");
            ensure!(errno(to.set(Running)) == libc::EINVAL, "X8: {what} was taken");
            ensure!(to.state()? == Resuming, "after {what}");
            to.reset()?;
            ensure!(to.digest()? == clean, "something of {what} is left");
            Ok(())
        };
        attempt(&[], "nothing")?;
        for cut in [1, 31, 32, 48, good.len() / 2, good.len() - 32, good.len() - 1] {
            attempt(&good[..cut], "a stream that was cut short")?;
        }
        for at in (0..good.len()).step_by(good.len() / 40 + 1) {
            let mut bad = good.clone();
            bad[at] ^= 4;
            attempt(&bad, "a damaged stream")?;
        }
        attempt(&[good.as_slice(), good.as_slice()].concat(), "a stream twice")?;
        attempt(&good[48..], "a stream without its header")?;
        attempt(&[0xff; 100_000], "no stream at all")?;
        let other = Rig::with(lab, Way::Cdev, &[("state_bytes", "400001")])?;
        let data = other.begin(Resuming)?;
        ensure!(errno(load(&data, &good, 4096)) == libc::EINVAL, "state of another device");
        loads_into_another(lab, &rig, &settings, &good, 4096)?;
        Ok(())
    })
}

fn dirties_itself(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let rig = Rig::with(lab, Way::Cdev, &[("dirty_bytes_per_s", "8000000")])?;
        let data = rig.begin(PreCopy)?;
        let mut stream = Vec::new();
        let first = info(&data)?;
        ensure!(first.dirty == 0, "P5: {first:?}");
        drain(&data, &mut stream)?;
        crate::lab::wait_until("it has dirtied something", || Ok(info(&data)?.dirty > 200_000))?;
        rig.walk(&[PreCopyP2p, StopCopy])?;
        let stopped = rig.digest()?;
        ensure!(drain(&data, &mut stream)? == End::Whole, "S3");
        std::thread::sleep(std::time::Duration::from_millis(200));
        ensure!(rig.digest()? == stopped, "H3: it changed while stopped");
        loads_into_another(lab, &rig, &[], &stream, 1 << 20)?;
        Ok(())
    })
}

/// Straight from one device into the other.
fn carries_much(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let settings = [("state_bytes", "268435456")];
        let from = Rig::with(lab, Way::Cdev, &settings)?;
        let to = Rig::with(lab, Way::Cdev, &settings)?;
        let saving = from.begin(PreCopy)?;
        let resuming = to.begin(Resuming)?;
        let mut buf = vec![0; 1 << 20];
        let mut total = 0;
        loop {
            match raw::read(saving.as_fd(), &mut buf) {
                Ok(0) => break,
                Ok(len) => {
                    load(&resuming, &buf[..len], len)?;
                    total += len;
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => {
                    from.walk(&[StopCopy])?
                }
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(total > 256 << 20, "{total} bytes");
        to.walk(&[Stop])?;
        ensure!(to.digest()? == from.digest()?, "the state differs");
        Ok(())
    })
}
