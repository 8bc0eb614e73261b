//! Z: MIG_DATA_SIZE.

use vfio_migration::DeviceState::*;

use super::must_refuse;
use crate::context::{Context, Stop, fail, not_applicable, skip};
use crate::rule::Proof::*;
use crate::rule::{Rule, checked};
use crate::stream::{self, Saved};
use crate::subject::feature::*;

const SIZE: &str = "Linux uAPI, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE";
/// An estimate may be so much too small before a VMM misses its limit by it.
const SLACK_BYTES: u64 = 4096;

pub(super) const RULES: &[Rule] = &[
    checked(
        "Z1",
        "MIG_DATA_SIZE can be asked in every state, by GET only",
        SIZE,
        "answer in every state; where nothing can be measured, answer the last or the largest size",
        z1,
        &[Quirk("size=fails")],
    )
    .limit_s(30),
    checked(
        "Z2",
        "stop_copy_length estimates what completing stop-copy takes: at least half of what comes",
        SIZE,
        "count everything that is still to be read; a VMM plans its downtime by this number",
        z2,
        &[Quirk("size=under")],
    )
    .limit_s(60),
    checked(
        "Z3",
        "stop_copy_length is a size: neither 0 with data to come nor beyond INT64_MAX",
        "QEMU commit 7c20d5f31d",
        "subtract with care: sizes near UINT64_MAX are a negative difference",
        z3,
        &[Quirk("size=garbage"), Quirk("size=zero")],
    )
    .limit_s(60),
    checked(
        "Z4",
        "asking leaves nothing behind: the device still runs, and its next session is as any other",
        "kernel commit 6cea64b1db88 and virtio_vfio_pci",
        "free what was made to answer, before returning",
        z4,
        &[Quirk("break-Z4")],
    )
    .limit_s(60),
];

fn size(c: &mut Context) -> Result<u64, Stop> {
    if !c.shape()?.data_size {
        return not_applicable("MIG_DATA_SIZE is not offered");
    }
    match c.get_u64(MIG_DATA_SIZE)? {
        Ok(bytes) => Ok(bytes),
        Err(errno) => skip(format!("GET MIG_DATA_SIZE: {errno} (rule Z1)")),
    }
}

fn z1(c: &mut Context) -> Result<(), Stop> {
    if !c.shape()?.data_size {
        return not_applicable("MIG_DATA_SIZE is not offered");
    }
    for state in c.states()? {
        c.go_anew(state)?;
        if let Err(errno) = c.get_u64(MIG_DATA_SIZE)? {
            return fail(format!("GET MIG_DATA_SIZE in {state}: success"), errno.to_string());
        }
    }
    must_refuse(c.feature(16, MIG_DATA_SIZE | SET, &[0; 8]), &[libc::EINVAL], "SET MIG_DATA_SIZE")
}

/// The claim in STOP_COPY, and what came then.
fn claim_and_truth(c: &mut Context) -> Result<(u64, u64), Stop> {
    size(c)?;
    c.go(StopCopy)?;
    let claim = size(c)?;
    let truth = stream::drain_stop_copy(c, &mut Saved::default())?;
    Ok((claim, truth))
}

fn z2(c: &mut Context) -> Result<(), Stop> {
    let (claim, truth) = claim_and_truth(c)?;
    if claim == 0 || claim > i64::MAX as u64 {
        return skip(format!("stop_copy_length {claim} is no estimate (rule Z3)"));
    }
    if truth > claim.saturating_mul(2).saturating_add(SLACK_BYTES) {
        return fail(
            format!("stop_copy_length of at least half of the {truth} bytes that came"),
            claim.to_string(),
        );
    }
    Ok(())
}

fn z3(c: &mut Context) -> Result<(), Stop> {
    let running = size(c)?;
    let (claim, truth) = claim_and_truth(c)?;
    for (state, claim) in [("RUNNING", running), ("STOP_COPY", claim)] {
        if claim > i64::MAX as u64 {
            return fail(format!("a stop_copy_length below 2^63 in {state}"), claim.to_string());
        }
        if claim == 0 && truth > 0 {
            return fail(format!("a stop_copy_length above 0 in {state}: {truth} bytes came"), "0");
        }
    }
    Ok(())
}

fn z4(c: &mut Context) -> Result<(), Stop> {
    for _ in 0..3 {
        size(c)?;
    }
    c.expect_state(Running, "after GET MIG_DATA_SIZE")?;
    let first = if c.flags()?.pre_copy() { PreCopy } else { StopCopy };
    if let Err(errno) = c.set(first)? {
        return fail(format!("SET {first} after GET MIG_DATA_SIZE: success"), errno.to_string());
    }
    let mut saved = Saved::default();
    if first == PreCopy {
        stream::drain_precopy(c, Some(&mut saved))?;
        c.go(StopCopy)?;
    }
    stream::drain_stop_copy(c, &mut saved)?;
    match stream::load(c, &mut saved)? {
        Ok(()) => Ok(()),
        Err(why) => skip(format!("what was saved does not load: {why} (rule S4)")),
    }
}
