//! Rules of the protocol that a server breaks on purpose, so that a test of servers is known to find it.
//!
//! Each name is the id of the rule that is broken (`docs/conformance.md`). Everything here answers in
//! place of the code that keeps the rule; without a break nothing here is reached.

use std::collections::BTreeSet;

use vfio_migration::{DeviceState, MigrationFlags, next_hop};

use super::session::{Refusal, Session};
use crate::codec::feature::{
    DMA_LOGGING_REPORT, DMA_LOGGING_START, DMA_LOGGING_STOP, Feature, FeatureOp, MIG_DEVICE_STATE,
    MIG_PRECOPY_INFO_V2, MIGRATION,
};
use crate::codec::migration::MigData;

/// The rules that a server can break.
pub const BREAKS: [&str; 28] = [
    "D1", "D2", "D3", "D4", "D5", "D6", "F1", "F3", "F4", "F6", "F7", "F8", "F9", "X4", "X5", "X6",
    "S3", "S8", "P3", "R1", "R2", "R3", "R8", "L1", "L4", "L5", "L6", "L8",
];

/// Rules that are broken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Breaks(BTreeSet<&'static str>);

impl Breaks {
    /// Breaks one of [`BREAKS`]; `false` for anything else.
    pub fn insert(&mut self, rule: &str) -> bool {
        let known = BREAKS.into_iter().find(|known| *known == rule);
        self.0.extend(known);
        known.is_some()
    }

    pub(super) fn has(&self, rule: &str) -> bool {
        self.0.contains(rule)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What breaks keep between commands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Broken {
    /// F1: the state to tell once more.
    late: Option<DeviceState>,
    /// S3: the end was told.
    ended: bool,
}

/// The way to `to` has more than one arc.
fn combines(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> bool {
    next_hop(from, to, flags).is_some_and(|hop| hop != to)
}

/// An arc that only a device without P2P has.
fn direct(from: DeviceState, to: DeviceState) -> bool {
    use DeviceState::{PreCopy, Running, Stop, StopCopy};
    matches!((from, to), (Running, Stop) | (Stop, Running) | (PreCopy, StopCopy))
}

const EINVAL: Refusal = Refusal::Errno(libc::EINVAL);

impl Session<'_> {
    pub(super) fn breaks(&self, rule: &str) -> bool {
        self.options.breaks.has(rule)
    }

    /// DEVICE_FEATURE where a break answers; `None`: as always.
    pub(super) fn broken_feature(&mut self, payload: &[u8]) -> Option<Result<(), Refusal>> {
        if self.options.breaks.is_empty() || self.offered.is_none() {
            return None;
        }
        if self.breaks("D4") && payload.len() >= 8 {
            return self.without_unknown_flags(payload);
        }
        let (feature, data) = Feature::decode(payload).ok()?;
        let op = feature.op;
        let probe_sets = matches!(op, FeatureOp::Probe { set: true, .. });
        match feature.index {
            MIGRATION
                if op == FeatureOp::Get
                    && feature.argsz >= 16
                    && (self.breaks("D1") || self.breaks("D2")) =>
            {
                let claim: u64 = if self.breaks("D1") { 6 } else { 15 };
                Some(self.answer_get(feature, &claim.to_ne_bytes()))
            }
            DMA_LOGGING_STOP if self.breaks("D3") => Some(Err(Refusal::Errno(libc::ENOTTY))),
            MIG_DEVICE_STATE if probe_sets && self.breaks("D5") && data.len() >= 8 => {
                Some(self.set_state(data, payload))
            }
            MIG_DEVICE_STATE if op == FeatureOp::Set && feature.argsz as usize >= payload.len() => {
                self.broken_set(data, payload)
            }
            MIG_DEVICE_STATE if op == FeatureOp::Get => {
                let late = self.kept.broken.late.take()?;
                let [a, b, c, d] = late.as_raw().to_ne_bytes();
                Some(self.answer_get(feature, &[a, b, c, d, 0, 0, 0, 0]))
            }
            MIG_PRECOPY_INFO_V2
                if op == FeatureOp::Set && !data.is_empty() && self.breaks("R1") =>
            {
                Some(Err(EINVAL))
            }
            DMA_LOGGING_START if op == FeatureOp::Set => {
                let few = self.breaks("L1") && data.len() > 16 + 8 * 16;
                let again = self.breaks("L4") && self.logging.is_some();
                match (few, again) {
                    (true, _) => Some(Err(Refusal::Errno(libc::E2BIG))),
                    (_, true) => Some(self.echo(payload)),
                    _ => None,
                }
            }
            DMA_LOGGING_REPORT if op == FeatureOp::Get => self.broken_report(feature, data),
            0..=32 => None,
            _ if self.breaks("D6") => Some(match op {
                FeatureOp::Get => self.answer_get(feature, &[0; 8]),
                _ => self.echo(payload),
            }),
            _ => None,
        }
    }

    fn without_unknown_flags(&mut self, payload: &[u8]) -> Option<Result<(), Refusal>> {
        let mut known = payload.to_vec();
        let sent: [u8; 4] = payload.get(4..8)?.try_into().ok()?;
        let flags = u32::from_ne_bytes(sent);
        if flags >> 19 == 0 {
            return None;
        }
        known.get_mut(4..8)?.copy_from_slice(&(flags & 0x7_ffff).to_ne_bytes());
        let answer = self.feature(&known);
        // The flags of the reply are those of the request.
        let at = super::session::REPLY_HEAD_BYTES + 4;
        if let Some(flags) = self.reply.get_mut(at..at + 4) {
            flags.copy_from_slice(&sent);
        }
        Some(answer)
    }

    fn broken_set(&mut self, data: &[u8], payload: &[u8]) -> Option<Result<(), Refusal>> {
        let raw = u32::from_ne_bytes(data.get(..4)?.try_into().ok()?);
        let now = self.migration().ok()?.state().ok()?;
        let flags = self.flags();
        match DeviceState::from_raw(raw) {
            None if self.breaks("F7") => Some(self.echo(payload)),
            Some(DeviceState::Error) if self.breaks("F6") => Some(self.echo(payload)),
            Some(state) if !flags.has_state(state) && self.breaks("F4") => Some(self.echo(payload)),
            Some(state) if state == now && self.breaks("F3") => Some(Err(EINVAL)),
            Some(state) if self.breaks("F8") && combines(now, state, flags) => Some(Err(EINVAL)),
            Some(state) if self.breaks("F9") && !flags.p2p() && direct(now, state) => {
                Some(Err(EINVAL))
            }
            Some(_) if self.breaks("F1") => {
                let answer = self.set_state(data, payload);
                self.kept.broken.late = answer.is_ok().then_some(now);
                Some(answer)
            }
            _ => None,
        }
    }

    fn broken_report(&mut self, feature: Feature, data: &[u8]) -> Option<Result<(), Refusal>> {
        let stopped = |state| matches!(state, Ok(DeviceState::Stop | DeviceState::StopCopy));
        if self.breaks("L5") && stopped(self.migration().ok()?.state()) {
            return Some(Err(EINVAL));
        }
        let word = |at: usize| {
            data.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
        };
        let (iova, length, page_size) = (word(0), word(8), word(16));
        let malformed =
            !page_size.is_power_of_two() || page_size < 4096 || iova.checked_add(length).is_none();
        let lax = self.breaks("L6") && malformed;
        let anyway = self.breaks("L8") && self.logging.is_none();
        if !lax && !anyway {
            return None;
        }
        let mut answer = data.get(..24)?.to_vec();
        answer.extend_from_slice(&[0; 64]);
        Some(self.answer_get(feature, &answer))
    }

    fn answer_get(&mut self, feature: Feature, data: &[u8]) -> Result<(), Refusal> {
        let argsz = (Feature::SIZE + data.len()) as u32;
        Feature { argsz, ..feature }.encode(&mut self.reply);
        self.reply.extend_from_slice(data);
        Ok(())
    }

    fn echo(&mut self, payload: &[u8]) -> Result<(), Refusal> {
        self.reply.extend_from_slice(payload);
        Ok(())
    }

    /// MIG_DATA_READ where a break answers.
    pub(super) fn broken_read(&mut self, size: usize) -> Option<Result<(), Refusal>> {
        if self.options.breaks.is_empty() {
            return None;
        }
        let state = self.migration().ok()?.state().ok()?;
        if self.breaks("X4") && state == DeviceState::Stop {
            MigData::new(0).encode(&mut self.reply);
            return Some(Ok(()));
        }
        if self.breaks("S3") {
            if state != DeviceState::StopCopy {
                self.kept.broken.ended = false;
            } else if self.kept.broken.ended {
                return Some(Err(Refusal::Errno(libc::EIO)));
            }
        }
        if self.breaks("S8") && size < 64 {
            // What does not fit is lost.
            let mut whole = [0; 64];
            return Some(self.read_into(&mut whole).map(|got| {
                let got = got.min(size);
                MigData::new(got as u32).encode(&mut self.reply);
                self.reply.extend_from_slice(whole.get(..got).unwrap_or_default());
            }));
        }
        None
    }

    /// A read found so many bytes.
    pub(super) fn note_read(&mut self, got: usize) {
        if self.breaks("S3") && got == 0 {
            self.kept.broken.ended = true;
        }
    }

    /// MIG_DATA_WRITE where a break answers.
    pub(super) fn broken_write(&mut self, data: &[u8]) -> Option<Result<(), Refusal>> {
        if self.options.breaks.is_empty() {
            return None;
        }
        let state = self.migration().ok()?.state().ok()?;
        if self.breaks("X5") && state.is_saving() {
            return Some(Ok(()));
        }
        (self.breaks("X6") && data.len() < 16).then_some(Err(EINVAL))
    }
}
