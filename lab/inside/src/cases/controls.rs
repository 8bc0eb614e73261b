//! Negative controls of the runner and of `lab/run`: cases that go wrong in every way that must be seen. They are
//! not among the others; `lab/run --self-test` runs them and knows what must come of each.

use std::fs;

use anyhow::{bail, ensure};

use crate::case::{Case, Outcome};
use crate::lab::{self, Lab, Parent};
use crate::setup;

/// The controls, in order: the last one ends the machine.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("control-passes", |_| Ok(Outcome::Passed)),
        Case::new("control-is-skipped", |_| Ok(Outcome::Skipped("on purpose".into()))),
        Case::new("control-fails", |_| bail!("on purpose")),
        Case::new("control-panics", |_| panic!("on purpose")),
        Case::new("control-dies", |_| std::process::abort()),
        Case::new("control-hangs", hangs).limit_s(2),
        Case::new("control-guest-is-shut-down-once", |lab| shut_down(lab, 1)),
        Case::new("control-guest-is-shut-down-twice", |lab| shut_down(lab, 2)),
        Case::new("control-guest-dies-otherwise", dies_otherwise),
        Case::new("control-makes-the-kernel-complain", complains),
        Case::new("control-leaves-a-device-in-use", leaves),
        Case::new("control-finds-nothing-left", finds_nothing),
        Case::new("control-ends-the-machine", |_| setup::power_off()),
    ]
}

fn hangs(_lab: &Lab) -> anyhow::Result<Outcome> {
    loop {
        std::thread::park();
    }
}

/// Fails as often as it says, with what is left by a guest that the emulated processor shut down.
fn shut_down(lab: &Lab, times: usize) -> anyhow::Result<Outcome> {
    const COUNT: &str = "/run/shut-down";
    let before = fs::read(COUNT).unwrap_or_default().len();
    if before == times {
        fs::remove_file(COUNT)?;
        return Ok(Outcome::Passed);
    }
    fs::write(COUNT, vec![b'.'; before + 1])?;
    let line =
        "ERROR the guest is dead vcpu=0 reason=\"triple fault\" state=\"rip=0xfff0 rsp=0x0\"";
    fs::write(lab.dir().join("host.log"), format!("INFO the guest runs\n{line}\n"))?;
    bail!("on purpose")
}

/// A triple fault that was not the processor's.
fn dies_otherwise(_: &Lab) -> anyhow::Result<Outcome> {
    bail!("the guest is dead vcpu=0 reason=\"triple fault\" state=\"rip=0x100005 rsp=0x0\"")
}

fn complains(_lab: &Lab) -> anyhow::Result<Outcome> {
    fs::write("/dev/kmsg", "<4>WARNING: on purpose\n")?;
    Ok(Outcome::Passed)
}

/// Leaves a device, and a process that has it open and outlives the case.
fn leaves(lab: &Lab) -> anyhow::Result<Outcome> {
    let device = lab.create(Parent::Mtty)?;
    let open = fs::File::options().read(true).write(true).open(device.cdev()?)?;
    std::process::Command::new("/proc/self/exe")
        .args(["--case", "control-hangs"])
        .stdin(open)
        .spawn()?;
    std::mem::forget(device);
    Ok(Outcome::Passed)
}

fn finds_nothing(_lab: &Lab) -> anyhow::Result<Outcome> {
    let left = lab::devices()?;
    ensure!(left.is_empty(), "{left:?} are left");
    Ok(Outcome::Passed)
}
