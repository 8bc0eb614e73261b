//! Who watches a migration from inside the VMM's process.

use switchover::message::Side;

/// Told of every phase *before* the actions of that phase are performed. A call that does not return
/// holds the migration there, which is how tests and demonstrations act at an exact moment: in
/// `look`, for instance, the decision to switch over has fallen and the vCPUs still run.
///
/// Phases of the source: `setup`, `precopy`, `look`, `quiesce`, `stop-copy`, `await-ready`,
/// `committed`, `in-doubt`, `done`, `revoking`, `rolling-back`, `cancelling`, `failed`, `cancelled`.
/// Of the destination: `setup`, `loading`, `prepared`, `expired`, `starting`, `running`, `aborted`.
pub trait Observer: Send + Sync {
    /// `phase` is being entered.
    fn entered(&self, _side: Side, _phase: &'static str) {}
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {}
