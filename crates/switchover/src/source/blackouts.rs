//! Blackouts that came to nothing: the guest stood still and went on here. Each with what ended it and why.

use crate::handover::Outcome;
use crate::handover::source::State;
use crate::time::Time;

/// Blackouts that are kept; later ones are only counted.
pub const BLACKOUTS_MAX: usize = 256;

/// How a blackout led back to a guest that runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Back {
    /// Devices were tried out, as intended.
    Rehearsed,
    /// No device had stopped yet.
    Revoked,
    /// Devices had stopped.
    RolledBack,
}

impl Back {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rehearsed => "rehearsed",
            Self::Revoked => "revoked",
            Self::RolledBack => "rolled-back",
        }
    }
}

/// A blackout that ended here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Blackout {
    /// From the request to pause to the guest's resumption.
    pub took: Time,
    /// How it ended.
    pub back: Back,
    /// Why.
    pub cause: String,
}

/// Keeps book of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Blackouts {
    ended: Vec<Blackout>,
    back: Option<Back>,
    cause: Option<String>,
}

impl Blackouts {
    /// The vCPUs are about to be paused.
    pub(super) fn begin(&mut self) {
        (self.back, self.cause) = (None, None);
    }

    /// Something that may lead back; the first such thing is the cause.
    pub(super) fn blame(&mut self, cause: impl FnOnce() -> String) {
        if self.cause.is_none() {
            self.cause = Some(cause());
        }
    }

    /// The handover enters `state`.
    pub(super) fn entered(&mut self, state: State, rehearsing: bool) {
        match state {
            State::Look => self.begin(),
            State::Revoking if rehearsing => self.back = Some(Back::Rehearsed),
            State::Revoking => self.back = Some(Back::Revoked),
            State::RollingBack => self.back = Some(Back::RolledBack),
            _ => {}
        }
    }

    /// The guest runs here again.
    pub(super) fn resumed(&mut self, took: Time) {
        let Some(back) = self.back.take() else { return };
        if self.ended.len() < BLACKOUTS_MAX {
            let cause = match (back, self.cause.take()) {
                (Back::Rehearsed, _) => "rehearsal".to_owned(),
                (_, Some(cause)) => cause,
                (_, None) => String::new(),
            };
            self.ended.push(Blackout { took, back, cause });
        }
    }

    /// The migration is over; what ended it may have ended a blackout first.
    pub(super) fn finished(&mut self, outcome: &Outcome) {
        let cause = match outcome {
            Outcome::Failed(failure) => failure.to_string(),
            Outcome::Cancelled => "cancelled".to_owned(),
            _ => return,
        };
        if let Some(last) = self.ended.last_mut().filter(|last| last.cause.is_empty()) {
            last.cause = cause;
        }
    }

    pub(super) fn ended(&self) -> &[Blackout] {
        &self.ended
    }
}
