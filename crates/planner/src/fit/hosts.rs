//! Hosts and link, from samples of the link and the terms of the last blackout.
//!
//! What a term has beyond its devices is the hosts' own. Bounds are those of a real migration: they are what
//! a host is trusted with, and no measurement.

use switchover::Time;
use switchover::estimate::{HostBounds, HostKnowledge, Range};
use switchover::trace::{Entry, What};

use super::{at_us, last_attempt, range, range_ns};
use crate::scenario::Device;

/// A sample of the link that says something, in bytes.
const SAMPLE_BYTES: u64 = 256 << 10;
/// The same of a blackout's last memory.
const LAST_RAM_BYTES: u64 = 1 << 20;

pub(super) fn fit(entries: &[Entry], devices: &[Device]) -> HostKnowledge {
    let known = HostKnowledge::default();
    let pick = |pick: fn(&What) -> Option<u64>| -> Vec<u64> {
        entries.iter().filter_map(|entry| pick(&entry.what)).collect()
    };
    let syncs = pick(|what| match what {
        What::Synced { took_us, .. } => Some(*took_us),
        _ => None,
    });
    let machine_state = pick(|what| match what {
        What::MachineState { took_us } => Some(*took_us),
        _ => None,
    });
    let trips = pick(|what| match what {
        What::RoundTrip { took_us } | What::Echo { took_us } => Some(*took_us),
        _ => None,
    });
    let attempt = last_attempt(entries);
    let at = |is: fn(&What) -> bool| at_us(attempt, is);
    let state_end = at(|what| *what == What::StateEnd);
    let ready = at(|what| *what == What::Ready);
    let commit = at(|what| *what == What::Commit);
    let running = at(|what| *what == What::Running);
    // The first round trip has the set-up of the connection in it; no answer in the blackout took less than one.
    let answers = [span(state_end, ready), span(commit, running)].into_iter().flatten();
    let trip_us = trips.iter().copied().chain(answers).min().unwrap_or(200).max(1);
    let round_trip = Range {
        min: trip_us.saturating_mul(500),
        typical: trip_us.saturating_mul(1_000),
        max: trip_us.saturating_mul(20_000),
    };
    let slowest = |time: fn(&Device) -> u64| devices.iter().map(time).max().unwrap_or(0);
    let validate_us = slowest(|device| device.profile.times.load_warm_us.typical);
    let start_us = slowest(|device| {
        let calls = if device.profile.features.p2p.value { 2 } else { 1 };
        device.profile.times.to_running_us.typical.saturating_mul(calls)
    });
    let own = |span: Option<u64>, devices_us: u64| {
        span.map(|us| us.saturating_sub(devices_us).saturating_sub(trip_us))
    };
    let start = own(span(commit, running), start_us);
    // Of the way to Ready a third of a start is the record; the rest comes in thirds of what is said here.
    let validate = own(span(state_end, ready), validate_us)
        .map(|us| us.saturating_sub(start.unwrap_or(0) / 3).saturating_mul(3));
    let one = |us: Option<u64>, or: Range| us.and_then(|us| range_ns(&[us])).unwrap_or(or);
    HostKnowledge {
        pair: "traced".to_owned(),
        pause: range_ns(&pauses(entries)).unwrap_or(known.pause),
        final_sync: range_ns(&syncs).unwrap_or(known.final_sync),
        machine_state: range_ns(&machine_state).unwrap_or(known.machine_state),
        validate: one(validate, known.validate),
        start: one(start, known.start),
        round_trip,
        link: link(entries).unwrap_or(known.link),
        bounds: HostBounds {
            // Between Ready and Commit the decision is recorded; in the model that is anything up to the bound.
            record: span(ready, commit)
                .map_or(Time::from_ms(2), |us| Time::from_us(us.saturating_mul(2).max(1))),
            ..HostBounds::default()
        },
    }
}

fn span(from: Option<u64>, to: Option<u64>) -> Option<u64> {
    Some(to?.saturating_sub(from?))
}

/// From each request to pause until the vCPUs stood, in µs.
fn pauses(entries: &[Entry]) -> Vec<u64> {
    let mut requested = None;
    let mut pauses = Vec::new();
    for Entry { at_us, what } in entries {
        match what {
            What::PauseRequested => requested = Some(*at_us),
            What::Paused => {
                pauses.extend(requested.take().map(|then| at_us.saturating_sub(then)));
            }
            _ => {}
        }
    }
    pauses
}

/// Bytes per second while the queue was full.
fn link(entries: &[Entry]) -> Option<Range> {
    let samples: Vec<(u64, u64)> = entries
        .iter()
        .filter_map(|entry| match entry.what {
            What::Link { bytes, busy_us } if bytes >= SAMPLE_BYTES => Some((bytes, busy_us.max(1))),
            _ => None,
        })
        .collect();
    let rate = |bytes: u64, us: u64| {
        let rate = u128::from(bytes) * 1_000_000 / u128::from(us);
        // The model's own jitter takes a twentieth off again.
        (rate.min(u128::from(u64::MAX / 20)) as u64) / 19 * 20
    };
    // What a blackout's own last memory took says most of the next one's: the first pass also waits for a
    // destination that has yet to find the memory to write to.
    let last = last_ram(entries).filter(|(bytes, _)| *bytes >= LAST_RAM_BYTES);
    let last = last.map(|(bytes, us)| rate(bytes, us.max(1)).max(1));
    let rates: Vec<u64> = samples.iter().map(|(bytes, us)| rate(*bytes, *us)).collect();
    let (bytes, us) = samples.iter().fold((0u64, 0u64), |(bytes, us), sample| {
        (bytes.saturating_add(sample.0), us.saturating_add(sample.1))
    });
    let typical = match (last, us) {
        (Some(last), _) => last,
        (None, 0) => return None,
        (None, us) => rate(bytes, us).max(1),
    };
    let spread = range(&rates).unwrap_or(Range { min: typical / 4 * 3, typical, max: typical });
    Some(Range { min: spread.min.clamp(1, typical), typical, max: spread.max.max(typical) })
}

/// The last memory of the last attempt: bytes, and µs.
fn last_ram(entries: &[Entry]) -> Option<(u64, u64)> {
    let mut begins = None;
    for Entry { at_us, what } in last_attempt(entries) {
        match what {
            What::Synced { last: true, dirty_bytes, .. } => begins = Some((*dirty_bytes, *at_us)),
            What::RamSent => {
                let (bytes, then) = begins?;
                return Some((bytes, at_us.saturating_sub(then)));
            }
            _ => {}
        }
    }
    None
}
