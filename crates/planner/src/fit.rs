//! From the trace of one migration to a question for the planner: its memory, its devices, its hosts.
//!
//! What was measured often enough becomes a range between its tenths; what was measured once becomes the middle
//! of a range a quarter below to twice above, which is a guess and said so in the profile's notes. What nobody
//! saw (loading with no destination that tells, a device's way back) has the planner's defaults.
//!
//! ```text
//!   passes ─▶ how much is written, over how much     calls, info, reads, loads ─▶ a profile per device
//!   link samples, syncs, pause, ready, commit ─▶ hosts
//! ```

mod device;
mod hosts;
mod memory;

use switchover::Time;
use switchover::decide::Mode;
use switchover::estimate::Range;
use switchover::policy::Policy;
use switchover::trace::{Entry, Trace, What};

use crate::scenario::{Device, Scenario};

/// No guest has more memory, in bytes.
const MEMORY_MAX_BYTES: u64 = 1 << 50;
/// No limit is longer: a day, in µs.
const LIMIT_MAX_US: u64 = 86_400_000_000;

/// A trace that says too little.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("nothing can be planned from this trace: {what}")]
pub struct FitError {
    what: String,
}

/// The question that `trace` answers: the same guest, devices and hosts, and the same limit.
///
/// # Errors
/// It has no memory, or no pass over it.
pub fn scenario(trace: &Trace) -> Result<Scenario, FitError> {
    let refused = |what: &str| FitError { what: what.to_owned() };
    if trace.header.memory_bytes == 0 {
        return Err(refused("it has no memory to send, as that of a local move"));
    }
    if !trace.entries.iter().any(|entry| entry.what == What::PassSent) {
        return Err(refused("no pass over memory was sent to its end"));
    }
    let entries = &trace.entries[..];
    let devices: Vec<Device> = (0u16..)
        .zip(&trace.header.devices)
        .map(|(index, traced)| device::fit(index, traced, entries))
        .collect();
    let mode = match trace.header.mode.as_str() {
        "strict" => Mode::Strict,
        _ => Mode::BestEffort,
    };
    Ok(Scenario {
        memory: memory::fit(trace.header.memory_bytes.min(MEMORY_MAX_BYTES), entries),
        hosts: hosts::fit(entries, &devices),
        limit: Time::from_us(trace.header.limit_us.clamp(1, LIMIT_MAX_US)),
        mode,
        policy: Policy::from_name(&trace.header.policy).unwrap_or_default(),
        ..Scenario::new(devices)
    })
}

/// Entries of the last attempt: from its request to pause on.
fn last_attempt(entries: &[Entry]) -> &[Entry] {
    let begins = entries.iter().rposition(|entry| entry.what == What::PauseRequested);
    begins.map_or(&[], |begins| &entries[begins..])
}

/// When something happened, in µs.
fn at_us(entries: &[Entry], is: impl Fn(&What) -> bool) -> Option<u64> {
    entries.iter().find(|entry| is(&entry.what)).map(|entry| entry.at_us)
}

/// A range of what was measured so often.
fn range(values: &[u64]) -> Option<Range> {
    let mut values = values.to_vec();
    values.sort_unstable();
    let at =
        |permille: usize| values.get((values.len().saturating_sub(1)) * permille / 1000).copied();
    let typical = at(500)?;
    Some(if values.len() < OFTEN {
        // Once or twice says little about how far it may be off.
        let (least, most) = (at(0)?, at(1000)?);
        Range { min: least - least / 4, typical, max: most.saturating_mul(2) }
    } else {
        Range { min: at(100)?, typical, max: at(1000)? }
    })
}

/// Measurements that make a range of their own.
const OFTEN: usize = 8;

/// As [`range`], each value times 1000: from µs to ns.
fn range_ns(values_us: &[u64]) -> Option<Range> {
    let ns: Vec<u64> = values_us.iter().map(|us| us.saturating_mul(1_000)).collect();
    range(&ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_once_is_wide_and_what_was_seen_often_is_as_it_was() {
        assert_eq!(range(&[]), None);
        assert_eq!(range(&[400]), Some(Range { min: 300, typical: 400, max: 800 }));
        let often: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(range(&often), Some(Range { min: 10, typical: 50, max: 100 }));
        assert_eq!(range_ns(&[u64::MAX]).unwrap().max, u64::MAX);
    }

    #[test]
    fn numbers_that_cannot_be_are_no_panic() {
        const FAR: u64 = u64::MAX;
        let device = 0;
        let info = |initial_bytes| What::Info {
            device,
            initial_bytes,
            dirty_bytes: Some(FAR),
            reinit: true,
            stop_copy_bytes: Some(FAR),
            offset: FAR,
            took_us: FAR,
        };
        let call = |call: &str| What::Call { device, call: call.into(), done: true, took_us: FAR };
        let whats = [
            What::RoundTrip { took_us: FAR },
            What::Echo { took_us: FAR },
            What::StreamBegins { device },
            What::Pass { number: 1, bytes: FAR },
            info(Some(FAR)),
            What::Read { device, bytes: FAR, read_us: FAR },
            info(Some(0)),
            What::NothingNow { device },
            What::Reinit { device, late: true },
            What::Read { device, bytes: FAR, read_us: 0 },
            What::Read { device, bytes: FAR, read_us: 0 },
            What::Loaded { device, bytes: FAR, load_us: FAR },
            What::Loaded { device, bytes: 1 << 20, load_us: 0 },
            What::Loaded { device, bytes: FAR, load_us: FAR },
            What::Link { bytes: FAR, busy_us: 0 },
            What::Link { bytes: FAR, busy_us: FAR },
            What::PassSynced { dirty_bytes: FAR, exposed_us: Some(FAR), took_us: FAR },
            What::PassSynced { dirty_bytes: FAR, exposed_us: None, took_us: 0 },
            What::PassSent,
            What::PauseRequested,
            What::Paused,
            call("PreCopyP2p"),
            call("StopCopy"),
            What::Read { device, bytes: FAR, read_us: FAR },
            What::Read { device, bytes: FAR, read_us: FAR },
            What::Synced { last: true, dirty_bytes: FAR, took_us: FAR },
            What::RamSent,
            What::MachineState { took_us: FAR },
            What::StateEnd,
            What::Ready,
            What::Commit,
            What::Running,
            What::Started { device, validate_us: Some(FAR), start_us: Some(FAR) },
        ];
        // Once with time standing still, once with it running away.
        for step in [0, FAR / 40] {
            let entries = (0u64..).zip(whats.clone());
            let traced = switchover::trace::TracedDevice {
                pre_copy: true,
                p2p: true,
                precopy_info_v2: true,
                data_size: true,
                ..Default::default()
            };
            let mut trace = Trace {
                entries: entries.map(|(n, what)| Entry { at_us: n * step, what }).collect(),
                ..Trace::default()
            };
            (trace.header.memory_bytes, trace.header.limit_us) = (FAR, FAR);
            trace.header.devices = vec![traced];
            let fitted = scenario(&trace).unwrap();
            let result = crate::run(&fitted, 1, Default::default()).unwrap();
            assert_eq!(result.broken, None, "{step}: {result:?}");
        }
    }

    #[test]
    fn a_trace_that_says_nothing_is_refused() {
        let mut trace = Trace::default();
        assert!(scenario(&trace).unwrap_err().to_string().contains("no memory"));
        trace.header.memory_bytes = 1 << 30;
        assert!(scenario(&trace).unwrap_err().to_string().contains("no pass"));
        trace.entries.push(Entry { at_us: 1, what: What::PassSent });
        assert!(scenario(&trace).is_ok());
    }
}
