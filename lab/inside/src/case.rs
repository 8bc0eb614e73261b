//! What a case is.

use std::time::Duration;

use crate::lab::Lab;

/// How long a case may take unless it says otherwise. The machine is emulated, so this is generous.
const LIMIT: Duration = Duration::from_secs(60);

/// How a case ended that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything held.
    Passed,
    /// It could not be tried; why.
    Skipped(String),
}

/// One thing that is tried in the lab. It runs in a process of its own.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What holds, in words joined by dashes after the part it is about: `mtty: …` is written `mtty-…`.
    pub name: &'static str,
    /// Tries it; an error says what did not hold.
    pub run: fn(&Lab) -> anyhow::Result<Outcome>,
    /// It has failed after this long.
    pub limit: Duration,
}

impl Case {
    /// A case with the usual time limit.
    pub const fn new(name: &'static str, run: fn(&Lab) -> anyhow::Result<Outcome>) -> Self {
        Self { name, run, limit: LIMIT }
    }

    /// The same with another time limit, in seconds.
    pub const fn limit_s(mut self, limit_s: u64) -> Self {
        self.limit = Duration::from_secs(limit_s);
        self
    }
}
