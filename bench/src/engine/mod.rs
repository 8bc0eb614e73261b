//! The engine by itself, beside baselines.
//!
//! A baseline does nothing but carry: the same bytes, from the same kind of memory, through the same hops
//! with the same number of threads, into populated memory. It knows beforehand what comes, so it has no
//! headers to look at, no dirty pages to find, nothing to decide. Engine and baseline are measured in turn; a
//! ratio is the baseline's time through the engine's, so 1 is as fast, and less is slower.

pub mod bulk;
pub mod compression;
pub mod devices;
pub mod floor;
pub mod local;
pub mod ram;
pub mod vm;

use std::net::{TcpListener, TcpStream};

use serde::Serialize;

use crate::cpu;
use crate::stats::Summary;

/// Engine and baseline, measured in turn.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Pair {
    /// What was measured.
    pub what: String,
    /// Bytes carried each time.
    pub bytes: u64,
    /// The engine's times in ms.
    pub engine_ms: Summary,
    /// The baseline's times in ms.
    pub baseline_ms: Summary,
    /// Baseline through engine, of each turn.
    pub ratio: Summary,
    /// CPU time of other processes meanwhile, in percent of one CPU: with much of it, measure again.
    pub others_percent: f64,
}

impl Pair {
    /// Sums up turns of (engine's, baseline's) times in ms.
    pub fn of(what: impl Into<String>, bytes: u64, turns: &[(f64, f64)]) -> Self {
        Self {
            what: what.into(),
            bytes,
            engine_ms: Summary::of(turns.iter().map(|turn| turn.0)),
            baseline_ms: Summary::of(turns.iter().map(|turn| turn.1)),
            ratio: Summary::of(turns.iter().map(|turn| turn.1 / turn.0)),
            others_percent: 0.0,
        }
    }

    /// Notes how much of the machine others had while `measure` ran.
    ///
    /// # Errors
    /// Those of `measure`.
    pub fn watched(measure: impl FnOnce() -> anyhow::Result<Self>) -> anyhow::Result<Self> {
        let others = || cpu::machine_time().saturating_sub(cpu::process_time());
        let (before, start) = (others(), std::time::Instant::now());
        let mut pair = measure()?;
        let meanwhile = others().saturating_sub(before);
        pair.others_percent = meanwhile.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
        Ok(pair)
    }

    /// Cells of a table: what, MB, engine ms, baseline ms, MB/s, ratio, others' CPU.
    pub fn cells(&self) -> [String; 7] {
        let mb = self.bytes as f64 / 1e6;
        [
            self.what.clone(),
            format!("{mb:.0}"),
            self.engine_ms.show(1),
            self.baseline_ms.show(1),
            format!("{:.0}", mb * 1e3 / self.engine_ms.median),
            self.ratio.show(2),
            format!("{:.0} %", self.others_percent),
        ]
    }
}

/// Connected TCP sockets over loopback: (sending, receiving).
fn tcp_pair() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let sending = TcpStream::connect(listener.local_addr()?)?;
    let (receiving, _) = listener.accept()?;
    for socket in [&sending, &receiving] {
        socket.set_nodelay(true)?;
    }
    Ok((sending, receiving))
}
