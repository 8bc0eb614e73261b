//! Each deviation can be switched on, and whatever is on, the kernel does not complain and a device that is opened
//! anew without it is sound. What breaking a rule looks like is for the conformance check to see.

use std::os::fd::AsFd;

use anyhow::{Context, ensure};
use vfio_kernel::raw;
use vfio_migration::DeviceState::*;

use super::rig::{self, End, Rig, Way, drain, errno, info, load, reg};
use super::with_ferrydev;
use crate::case::{Case, Outcome};
use crate::lab::{Lab, Parent};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("ferrydev-quirks-by-name", by_name),
        Case::new("ferrydev-each-quirk-leaves-the-kernel-alone", each_walks).limit_s(240),
        Case::new("ferrydev-quirks-of-real-drivers-show", real_ones_show),
    ]
}

fn by_name(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let mdev = lab.create(Parent::Ferrydev)?;
        let all =
            "no-p2p size=under short-reads=100 fail-arc=STOP-STOP_COPY:5:error:2 slow-arc=STOP:30";
        mdev.set("quirks", all)?;
        ensure!(mdev.get("quirks")? == all, "{}", mdev.get("quirks")?);
        for wrong in [
            "no-such-quirk",
            "no-p2p=1",
            "size",
            "size=huge",
            "short-reads",
            "short-reads=0",
            "short-reads=x",
            "fail-arc=stop",
            "fail-arc=stop-nowhere",
            "fail-arc=stop-running:0",
            "slow-arc=stop",
            "slow-arc=stop:3600001",
        ] {
            ensure!(mdev.set("quirks", wrong).is_err(), "{wrong:?} was taken");
        }
        ensure!(mdev.get("quirks")? == all, "a refused list changes nothing");
        mdev.set("quirks", " \n")?;
        ensure!(mdev.get("quirks")?.is_empty());
        let rig = Rig::new(lab, "")?;
        ensure!(rig.mdev().set("state_bytes", 1 << 20).is_err(), "the shape of an open device");
        Ok(())
    })
}

/// An example of each quirk, from the driver's own list.
fn examples(list: &str) -> anyhow::Result<Vec<String>> {
    let example = |line: &str| match line.split_once('=') {
        None => Ok(line.to_owned()),
        Some((name, "NUMBER")) => Ok(format!("{name}=20")),
        Some(("size", _)) => Ok("size=garbage".to_owned()),
        Some(("fail-arc", _)) => Ok("fail-arc=pre_copy_p2p-stop_copy:5:error:1".to_owned()),
        Some(("slow-arc", _)) => Ok("slow-arc=stop:20".to_owned()),
        Some(_) => Err(anyhow::anyhow!("no example of {line}")),
    };
    list.lines().map(example).collect()
}

fn each_walks(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        let names = lab.create(Parent::Ferrydev)?.get("quirk_names")?;
        let examples = examples(&names)?;
        ensure!(examples.len() > 80, "{} quirks", examples.len());
        let small = ("state_bytes", "600000");
        for quirk in &examples {
            // Alone, and on a device without P2P.
            for quirks in [quirk.clone(), format!("{quirk} no-p2p")] {
                let rig = Rig::with(lab, Way::Cdev, &[small, ("quirks", &quirks)])?;
                live_through_it(&rig).with_context(|| format!("with {quirks}"))?;
                rig.mdev().set("quirks", "")?;
                let rig = rig.reopen(lab, Way::Group)?;
                let sound = rig.state()? == Running && raw::migration_flags(rig.fd())? == 7;
                ensure!(sound, "after {quirks} the device is not what it was");
                let data = rig.begin(PreCopy)?;
                let mut stream = Vec::new();
                ensure!(drain(&data, &mut stream)? == End::Now, "after {quirks}");
            }
        }
        Ok(())
    })
}

/// Everything once; what fails may fail.
fn live_through_it(rig: &Rig) -> anyhow::Result<()> {
    let mut buf = vec![0; 1 << 20];
    let _ = raw::precopy_info_v2(rig.fd());
    rig.set_up_dma(4)?;
    let _ = raw::dma_logging_start(rig.fd(), 4096, &[super::function::log_range(0, 16)]);
    let _ = raw::dma_logging_start(rig.fd(), 4096, &[super::function::log_range(0, 16)]);
    for targets in [
        &[PreCopy, PreCopyP2p, PreCopy, PreCopyP2p, StopCopy, PreCopy, Stop][..],
        &[StopCopy, Resuming, Running, Error, Running, Resuming][..],
    ] {
        let mut data = None;
        for target in targets {
            if let Ok(Some(new)) = rig.set(*target) {
                data = Some(new);
            }
            let _ = rig.state();
            let _ =
                rig.program(&[(reg::CONFIG_KIB, 30), (reg::CONFIG_GEN, 1), (reg::FILL_KIB, 64)]);
            let _ = rig.program(&[(reg::DOORBELL, 3)]);
            let _ = raw::migration_data_size(rig.fd());
            let mut bitmap = [0];
            let iova = super::rig::RAM_IOVA;
            let _ = raw::dma_logging_report(rig.fd(), 40, iova, 1 << 16, 4096, &mut bitmap);
            let Some(data) = &data else { continue };
            for _ in 0..4 {
                let _ = info(data);
                let _ = raw::read(data.as_fd(), &mut buf);
                let _ = raw::write(data.as_fd(), &buf[..100]);
                let _ = rig::poll(data);
            }
        }
        rig.digest()?;
        let _ = raw::reset(rig.fd());
    }
    Ok(())
}

fn real_ones_show(lab: &Lab) -> anyhow::Result<Outcome> {
    with_ferrydev(lab, || {
        // Each on a device in PRE_COPY whose initial data was read.
        type Shows = fn(&Rig, &std::os::fd::OwnedFd) -> anyhow::Result<bool>;
        let shows: [(&str, Shows); 9] = [
            ("zero-at-temporary-end no-dirty-bytes", |_, data| {
                Ok(drain(data, &mut Vec::new())? == End::Whole)
            }),
            ("no-poll no-dirty-bytes", |_, data| {
                drain(data, &mut Vec::new())?;
                Ok(rig::poll(data)? & libc::POLLIN != 0)
            }),
            ("no-info-in-p2p", |rig, data| {
                rig.walk(&[PreCopyP2p])?;
                Ok(errno(info(data)) == libc::EINVAL)
            }),
            ("size=garbage", |rig, data| {
                let garbage = u64::MAX - (1 << 20);
                Ok(info(data)?.initial > garbage && raw::migration_data_size(rig.fd())? > garbage)
            }),
            (
                "no-data-size",
                |rig, _| Ok(errno(raw::migration_data_size(rig.fd())) == libc::ENOTTY),
            ),
            ("info-drives-device", |_, data| {
                let mut stream = Vec::new();
                let before = drain(data, &mut stream)? == End::Now && stream.is_empty();
                info(data)?;
                drain(data, &mut stream)?;
                Ok(before && !stream.is_empty())
            }),
            ("short-reads=100", |_, data| {
                let lens: Vec<_> =
                    (0..3).map(|_| raw::read(data.as_fd(), &mut [0; 4096])).collect();
                let lens = lens.into_iter().collect::<Result<Vec<_>, _>>()?;
                Ok(lens.iter().all(|len| (1..=100).contains(len)))
            }),
            ("no-reinit", |rig, data| {
                rig.program(&[(reg::CONFIG_KIB, 300), (reg::CONFIG_GEN, 1)])?;
                let found = info(data)?;
                Ok(!found.reinit() && found.initial == 0 && found.dirty > 300 << 10)
            }),
            ("corrupt-save", |rig, _| {
                let mut stream = Vec::new();
                // What was read before is not at hand: another session.
                rig.walk(&[Running])?;
                let data = rig.begin(StopCopy)?;
                drain(&data, &mut stream)?;
                let before = rig.digest()?;
                let data = rig.begin(Resuming)?;
                load(&data, &stream, 1 << 20)?;
                rig.walk(&[Stop])?;
                Ok(rig.digest()? != before)
            }),
        ];
        for (quirks, shows) in shows {
            let rig = Rig::with(lab, Way::Cdev, &[("quirks", quirks), ("state_bytes", "900000")])?;
            raw::precopy_info_v2(rig.fd())?;
            let data = rig.begin(PreCopy)?;
            let initial = if quirks == "size=garbage" { 0 } else { info(&data)?.initial };
            if !quirks.starts_with("short") {
                rig::read_exactly(&data, initial, &mut Vec::new())?;
            }
            let seen = shows(&rig, &data).with_context(|| format!("with {quirks}"))?;
            ensure!(seen, "{quirks} does not show");
        }
        Ok(())
    })
}
