//! What a rule is.

use crate::context::{Context, Stop};

/// A rule of the protocol. The ids are those of the protocol reference and stable.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// A letter and a number: `F5`.
    pub id: &'static str,
    /// The rule, in one line.
    pub statement: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// What a driver author does about a failure; empty where the statement says it.
    pub fix: &'static str,
    /// How it is tested.
    pub testing: Testing,
}

/// How a rule is tested.
#[derive(Clone, Copy, Debug)]
pub enum Testing {
    /// By a function.
    Checked {
        /// Tests it on a device in RUNNING.
        check: fn(&mut Context) -> Result<(), Stop>,
        /// What the function may take, in s.
        limit_s: u32,
        /// It may do harm to a device that is not correct: it writes data that is no device's state.
        destructive: bool,
        /// What is known to fail it; nothing: the test is unproven.
        proofs: &'static [Proof],
    },
    /// Not from outside of the device.
    Untestable {
        /// Why.
        why: &'static str,
    },
}

/// What is known to fail a rule, so that its test is known to be able to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A quirk of `vmferry device serve`.
    Quirk(&'static str),
    /// A quirk of the lab's kernel driver.
    Ferrydev(&'static str),
    /// The kernel's sample driver.
    Mtty,
}

impl std::fmt::Display for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Quirk(name) => f.write_str(name),
            Self::Ferrydev(name) => write!(f, "ferrydev {name}"),
            Self::Mtty => f.write_str("mtty"),
        }
    }
}

impl Rule {
    /// The letter of the id.
    pub fn letter(&self) -> char {
        self.id.chars().next().unwrap_or('?')
    }

    /// The number of the id.
    pub fn number(&self) -> u32 {
        self.id.get(1..).and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    /// What is known to fail it.
    pub fn proofs(&self) -> &'static [Proof] {
        match self.testing {
            Testing::Checked { proofs, .. } => proofs,
            Testing::Untestable { .. } => &[],
        }
    }

    /// It is tested, but nothing is known to fail it.
    pub fn is_unproven(&self) -> bool {
        matches!(self.testing, Testing::Checked { proofs: [], .. })
    }
}

/// What is said of a group of rules.
pub fn group(letter: char) -> &'static str {
    match letter {
        'D' => "discovery and ioctl hygiene",
        'F' => "state machine",
        'X' => "data_fd",
        'S' => "streaming",
        'P' => "PRECOPY_INFO v1",
        'R' => "PRECOPY_INFO v2, REINIT",
        'Z' => "MIG_DATA_SIZE",
        'H' => "P2P, STOP and reset",
        'L' => "DMA logging",
        _ => "",
    }
}

/// The table's row of a checked rule: 10 s, harmless.
pub(crate) const fn checked(
    id: &'static str,
    statement: &'static str,
    source: &'static str,
    fix: &'static str,
    check: fn(&mut Context) -> Result<(), Stop>,
    proofs: &'static [Proof],
) -> Rule {
    let testing = Testing::Checked { check, limit_s: 10, destructive: false, proofs };
    Rule { id, statement, source, fix, testing }
}

/// The table's row of a rule that cannot be tested.
pub(crate) const fn untestable(
    id: &'static str,
    statement: &'static str,
    source: &'static str,
    why: &'static str,
) -> Rule {
    Rule { id, statement, source, fix: "", testing: Testing::Untestable { why } }
}

impl Rule {
    pub(crate) const fn limit_s(mut self, limit: u32) -> Self {
        if let Testing::Checked { check, destructive, proofs, .. } = self.testing {
            self.testing = Testing::Checked { check, limit_s: limit, destructive, proofs };
        }
        self
    }

    pub(crate) const fn destructive(mut self) -> Self {
        if let Testing::Checked { check, limit_s, proofs, .. } = self.testing {
            self.testing = Testing::Checked { check, limit_s, destructive: true, proofs };
        }
        self
    }
}
