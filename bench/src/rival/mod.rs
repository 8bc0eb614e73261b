//! One guest moved between two processes of this machine, by vmferry and by QEMU.
//!
//! ```text
//!                    same guest, same memory, same loopback
//!   Ferry   vmferry run ──────────── tcp 127.0.0.1 ───▶ vmferry run --incoming
//!   Qemu    qemu -M microvm ──────── tcp 127.0.0.1 ───▶ qemu -M microvm -incoming defer
//! ```
//!
//! The wall clock runs from the command to migrate until the source knows that it is over; connecting and all
//! set-up are in it. Afterwards the guest must go on at the destination: its counters rise and no stamp is
//! wrong.

mod ferry;
mod qemu;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use ferry::Ferry;
pub use qemu::{Qemu, QemuRoot};

/// The guest that is moved.
#[derive(Clone, Debug)]
pub struct Guest {
    /// RAM in bytes; at most 2 GiB, so that both machines have it in one piece.
    pub memory_bytes: u64,
    /// What the guest writes over and over, in pages.
    pub working_set_pages: u32,
    /// Page writes per second; `u32::MAX` = as fast as it can.
    pub pages_per_s: u32,
    /// What memory is filled from.
    pub seed: u64,
}

/// What is asked of a migration.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Downtime limit in ms.
    pub limit_ms: u32,
    /// A migration that takes longer is given up.
    pub patience: Duration,
    /// Where sockets and logs are.
    pub dir: PathBuf,
}

/// What came of one migration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// It came to its end in time, and the guest ran on.
    pub completed: bool,
    /// From the command to its end, in ms.
    pub wall_ms: f64,
    /// `total-time` as the source says, in ms.
    pub total_ms: f64,
    /// `setup-time` as the source says, in ms.
    pub setup_ms: f64,
    /// `downtime` as the source says, in ms.
    pub downtime_ms: f64,
    /// Bytes on the wire, as the source says.
    pub transferred_bytes: u64,
    /// Passes over memory.
    pub passes: u64,
    /// CPU seconds of both processes during the migration; the guest's own are in them.
    pub cpu_s: f64,
    /// Page writes per second of the guest just before.
    pub dirty_pages_per_s: f64,
}

/// What a migration took and cost, from outside.
struct Measured {
    completed: bool,
    wall: Duration,
    cpu: Duration,
    dirty_pages_per_s: f64,
}

impl Measured {
    /// With what the source says itself: the keys are QEMU's, and vmferry's the same with a unit behind times.
    fn with(self, says: &Value, unit: &str) -> Outcome {
        let number = |path: &str| says.pointer(path).and_then(Value::as_f64).unwrap_or(0.0);
        let time = |key: &str| number(&format!("/{key}{unit}"));
        Outcome {
            completed: self.completed,
            wall_ms: self.wall.as_secs_f64() * 1e3,
            total_ms: time("total-time"),
            setup_ms: time("setup-time"),
            downtime_ms: time("downtime"),
            transferred_bytes: number("/ram/transferred") as u64,
            passes: number("/ram/dirty-sync-count") as u64,
            cpu_s: self.cpu.as_secs_f64(),
            dirty_pages_per_s: self.dirty_pages_per_s,
        }
    }
}
