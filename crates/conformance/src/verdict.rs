//! What came of the rules.

use serde::Serialize;

use crate::rule::Rule;
use crate::subject::About;

/// What came of one rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// The device obeys.
    Pass,
    /// It does not.
    Fail {
        /// What the rule wants.
        expected: String,
        /// What came.
        got: String,
    },
    /// The rule is not about this device.
    NotApplicable {
        /// Why.
        why: String,
    },
    /// The rule was not tested, or not to the end.
    Skipped {
        /// Why.
        why: String,
    },
    /// The rule cannot be tested from outside of any device.
    Untestable {
        /// Why.
        why: String,
    },
}

impl Verdict {
    /// One word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail { .. } => "FAIL",
            Self::NotApplicable { .. } => "n/a",
            Self::Skipped { .. } => "skip",
            Self::Untestable { .. } => "-",
        }
    }

    /// The rule failed.
    pub fn is_fail(&self) -> bool {
        matches!(self, Self::Fail { .. })
    }
}

/// A rule and what came of it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RuleReport {
    /// The rule's id.
    pub id: &'static str,
    /// The rule.
    pub statement: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// What to do about a failure.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub fix: &'static str,
    /// What came.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How long it took, in ms.
    pub took_ms: u64,
}

impl RuleReport {
    /// What came of `rule`.
    pub fn new(rule: &Rule, verdict: Verdict, took_ms: u64) -> Self {
        let Rule { id, statement, source, fix, .. } = *rule;
        let fix = if verdict.is_fail() { fix } else { "" };
        Self { id, statement, source, fix, verdict, took_ms }
    }
}

/// How many of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Summary {
    /// Passed.
    pub passed: usize,
    /// Failed.
    pub failed: usize,
    /// Not applicable.
    pub not_applicable: usize,
    /// Skipped.
    pub skipped: usize,
    /// Not to be tested from outside of any device.
    pub untestable: usize,
}

/// Everything that came of a run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The device.
    pub device: About,
    /// Every rule that was selected, in the catalogue's order.
    pub rules: Vec<RuleReport>,
    /// How many of each.
    pub summary: Summary,
    /// The device was brought back to RUNNING; else why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_usable: Option<String>,
}

impl Report {
    /// The report of `rules`.
    pub fn new(device: About, rules: Vec<RuleReport>, not_usable: Option<String>) -> Self {
        let mut summary = Summary::default();
        for rule in &rules {
            *match rule.verdict {
                Verdict::Pass => &mut summary.passed,
                Verdict::Fail { .. } => &mut summary.failed,
                Verdict::NotApplicable { .. } => &mut summary.not_applicable,
                Verdict::Skipped { .. } => &mut summary.skipped,
                Verdict::Untestable { .. } => &mut summary.untestable,
            } += 1;
        }
        Self { device, rules, summary, not_usable }
    }

    /// The ids of the rules that failed.
    pub fn failed(&self) -> Vec<&'static str> {
        self.rules.iter().filter(|rule| rule.verdict.is_fail()).map(|rule| rule.id).collect()
    }
}
