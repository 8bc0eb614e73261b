//! H: P2P, STOP and reset.

use vfio_migration::DeviceState::*;

use super::UAPI;
use crate::context::{Context, Stop, fail, skip, state_name};
use crate::rule::Proof::*;
use crate::rule::{Rule, checked, untestable};

const MIG: &str = "Linux uAPI, enum vfio_device_mig_state";
/// Background DMA of the test, in pages a second.
const RATE: u32 = 20_000;

pub(super) const RULES: &[Rule] = &[
    untestable(
        "H1",
        "in the P2P states no new P2P DMA starts, and outstanding P2P is done before SET returns",
        MIG,
        "needs a second device as a peer",
    ),
    untestable(
        "H2",
        "a device that cannot tell P2P apart stops all DMA in the P2P states",
        MIG,
        "from outside it is not seen which of its DMA a device takes for P2P",
    ),
    checked(
        "H3",
        "in STOP and STOP_COPY there is no DMA and no internal change",
        MIG,
        "wait for DMA under way in the arc to STOP, and start none before it is left",
        h3,
        &[Quirk("break-H3")],
    )
    .limit_s(30),
    untestable(
        "H4",
        "several devices: all into P2P before any into STOP or RUNNING",
        "QEMU, docs/devel/migration/vfio.rst",
        "an obligation of the user of the device, not of the device",
    ),
    checked(
        "H5",
        "a reset in any state gives RUNNING, with the session ended",
        UAPI,
        "enter RUNNING in reset_done; where the state lock is held, as soon as it is free",
        h5,
        &[Quirk("reset-keeps-state")],
    )
    .limit_s(30),
    untestable(
        "H6",
        "after a reset PCI_COMMAND and interrupts are set again",
        "Cloud Hypervisor, vfio device",
        "an obligation of the user of the device, not of the device",
    ),
];

fn h3(c: &mut Context) -> Result<(), Stop> {
    c.flags()?;
    c.as_guest("making the device write memory", |guest| {
        guest.prepare_dma()?;
        guest.burst()?;
        guest.background(RATE)
    })?;
    c.wait(20);
    for state in [Stop, StopCopy] {
        c.go(state)?;
        let before =
            c.as_guest("region reads", |guest| Ok((guest.memory()?, guest.completed()?)))?;
        let digest = c.digest()?;
        c.wait(50);
        let after =
            c.as_guest("region reads", |guest| Ok((guest.memory()?, guest.completed()?)))?;
        if before.0 != after.0 {
            return fail(format!("guest memory untouched in {state}"), "the device wrote to it");
        }
        if before.1 != after.1 {
            let got = format!("its counter went from {} to {}", before.1, after.1);
            return fail(format!("no work in {state}"), got);
        }
        if digest != c.digest()? {
            return fail(format!("no internal change in {state}"), "the state digest changed");
        }
    }
    Ok(())
}

fn h5(c: &mut Context) -> Result<(), Stop> {
    for state in c.states()? {
        c.go_anew(state)?;
        if let Err(errno) = c.reset()? {
            return fail(format!("reset in {state}: success"), errno.to_string());
        }
        let at = c.state()?;
        if at != Running.as_raw() {
            return fail(format!("RUNNING after a reset in {state}"), state_name(at));
        }
        if state.is_saving() {
            let mut buffer = [0; 16];
            match c.read(&mut buffer)? {
                Err(_) => {}
                Ok(_) => return skip("the session is alive after a reset (rule X9)"),
            }
        }
    }
    Ok(())
}
