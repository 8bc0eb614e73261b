//! What an estimate says: terms and totals, each with what it rests on.

use std::fmt;

use crate::time::Time;

/// Where a value comes from, the weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Basis {
    /// Nobody knows.
    Unknown,
    /// Assumed before anything was measured, by a profile or for want of one.
    Prior,
    /// Measured in so many earlier migrations or calls of them.
    History(u32),
    /// Measured in this migration, so many times.
    Measured(u32),
}

impl Basis {
    /// Of what was measured in this migration and in earlier ones, each so many times.
    pub(crate) fn of(measured: u32, history: u32) -> Self {
        match (measured, history) {
            (0, 0) => Self::Prior,
            (0, n) => Self::History(n),
            (n, _) => Self::Measured(n),
        }
    }
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("unknown"),
            Self::Prior => f.write_str("prior"),
            Self::History(n) => write!(f, "history {n}"),
            Self::Measured(n) => write!(f, "measured {n}"),
        }
    }
}

/// A part of the blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Term {
    /// Its name in reports.
    pub name: &'static str,
    /// How long, as likely longer as shorter; `None` when unknown.
    pub time: Option<Time>,
    /// The same at the level of the promise. Those of all terms do not add up to the total's.
    pub upper: Option<Time>,
    /// Where that comes from.
    pub basis: Basis,
}

/// An estimate of what is still to come of a blackout.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Estimate {
    /// The parts, in the order of events.
    pub terms: Vec<Term>,
    /// What the joint samples alone expect, before whole blackouts correct them.
    pub modelled: Time,
    /// The known parts together, as likely longer as shorter.
    pub known: Time,
    /// The known parts together, at the level of the promise.
    pub known_upper: Time,
    /// Some part is unknown.
    pub unknown: bool,
    /// When each point is reached, at the level of the promise and counted from the request to pause: Look,
    /// Quiesce, FinalSync, MachineState, Commit. Empty for the rest of a blackout that has begun.
    pub reached_upper: Vec<Time>,
    /// What the totals rest on: `History` for residuals of so many whole blackouts, `Prior` for joint
    /// samples of the terms, whatever those rest on.
    pub basis: Basis,
}

impl Default for Estimate {
    fn default() -> Self {
        Self {
            terms: Vec::new(),
            modelled: Time(0),
            known: Time(0),
            known_upper: Time(0),
            unknown: false,
            reached_upper: Vec::new(),
            basis: Basis::Prior,
        }
    }
}

impl Estimate {
    /// The expected total; `None` when a part is unknown.
    pub fn total(&self) -> Option<Time> {
        (!self.unknown).then_some(self.known)
    }

    /// The total at the level of the promise; `None` when a part is unknown.
    pub fn upper(&self) -> Option<Time> {
        (!self.unknown).then_some(self.known_upper)
    }

    /// The term of that name.
    pub fn term(&self, name: &str) -> Option<&Term> {
        self.terms.iter().find(|term| term.name == name)
    }

    /// The term that costs most at the level of the promise.
    pub fn dominating(&self) -> Option<&Term> {
        self.terms.iter().max_by_key(|term| term.upper)
    }
}
