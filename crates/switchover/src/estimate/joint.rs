//! Totals from joint samples: every draw is one blackout that could be.
//!
//! ```text
//!  pause │ look ∥ provisional sync │ quiesce + look │ stop │ drain │ final sync │ RAM │ machine state │
//!        │                                                 └── load … ──────────────────┘
//!  validate │ commit there, Running back │ start
//! ```
//!
//! Devices go side by side, so of each step the slowest counts; the link is shared by all; a device loads
//! while the rest is sent.

use super::residual::scaled;
use super::spread::{DRAWS, Order, quantile_of};
use super::{Ahead, Basis, DeviceMeter, Estimate, Estimator, Term};
use crate::time::Time;

/// What the samples assume of amounts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amounts {
    /// RAM known to be sent, in bytes.
    pub(super) ram_bytes: u64,
    /// What comes on top until the guest stands: so much a second …
    pub(super) ram_bytes_per_s: u64,
    /// … since so long already.
    pub(super) unsynced: Time,
}

/// The orders of draws: one for each spread.
#[derive(Clone, Copy)]
struct Host {
    pause: Order,
    sync: Order,
    final_sync: Order,
    machine_state: Order,
    validate: Order,
    round_trip: Order,
    start: Order,
    link: Order,
}

const HOST: Host = Host {
    pause: Order::new(1),
    sync: Order::new(2),
    final_sync: Order::new(3),
    machine_state: Order::new(4),
    validate: Order::new(5),
    round_trip: Order::new(6),
    start: Order::new(7),
    link: Order::new(8),
};

struct Device<'a> {
    meter: &'a DeviceMeter,
    remaining_bytes: u64,
    backlog_bytes: u64,
    cold: bool,
    orders: [Order; 8],
}

type Draws = [u64; DRAWS];

pub(super) fn estimate(e: &Estimator, ahead: Ahead, amounts: Amounts) -> Estimate {
    let unknown = e.devices.iter().any(|meter| meter.remaining_bytes.is_none());
    let devices: Vec<Device<'_>> = (0u64..)
        .zip(&e.devices)
        .map(|(number, meter)| Device {
            meter,
            remaining_bytes: meter.remaining_bytes.unwrap_or(0),
            backlog_bytes: if e.telemetry { meter.backlog_bytes() } else { 0 },
            cold: meter.loaded_bytes == 0 && meter.acked_bytes == 0,
            orders: std::array::from_fn(|which| Order::new(100 + number * 8 + which as u64)),
        })
        .collect();
    let mut total: Draws = [0; DRAWS];
    let mut look: Draws = [0; DRAWS];
    let mut quiesce: Draws = [0; DRAWS];
    let mut stop: Draws = [0; DRAWS];
    let mut transfer: Draws = [0; DRAWS];
    let mut reached = if ahead == Ahead::All { vec![[0; DRAWS]; 5] } else { Vec::new() };
    for draw in 0..DRAWS {
        let (mut looked, mut quiesced, mut stopped) = (0, 0, 0);
        let (mut read, mut load, mut sent_bytes) = (0, 0, 0u64);
        for device in &devices {
            let (m, o) = (device.meter, &device.orders);
            let look = m.look.spread().draw(draw, o[0]);
            looked = looked.max(look);
            quiesced = quiesced
                .max(m.quiesce.spread().draw(draw, o[1]) + if m.asked_in_p2p { look } else { 0 });
            stopped = stopped.max(m.stop.spread().draw(draw, o[2]));
            if ahead > Ahead::FromStop {
                continue;
            }
            let factor = m.size_permille.spread().draw(draw, o[3]).min(u64::from(u32::MAX));
            let bytes = scaled(device.remaining_bytes, factor as u32);
            sent_bytes = sent_bytes.saturating_add(bytes);
            read = read.max(m.read.draw(bytes, draw, o[4]));
            let mut loading = m.load.draw(bytes.saturating_add(device.backlog_bytes), draw, o[5]);
            if device.cold {
                loading = loading.saturating_add(m.load_cold.spread().draw(draw, o[6]));
            }
            load = load.max(loading);
        }
        let mut sum = 0u64;
        let pause = e.pause.spread().draw(draw, HOST.pause);
        if ahead == Ahead::All {
            looked = looked.max(e.final_sync.spread().draw(draw, HOST.sync));
            sum = sum.saturating_add(pause).saturating_add(looked);
            reached[0][draw] = sum;
        }
        if ahead <= Ahead::FromQuiesce {
            sum = sum.saturating_add(quiesced);
            if let Some(quiesce) = reached.get_mut(1) {
                quiesce[draw] = sum;
            }
        }
        if ahead <= Ahead::FromStop {
            let until_pause =
                if ahead == Ahead::All { amounts.unsynced + Time(pause) } else { Time(0) };
            let more =
                u128::from(amounts.ram_bytes_per_s) * u128::from(until_pause.0) / 1_000_000_000;
            let ram_bytes = amounts.ram_bytes.saturating_add(more.min(u128::from(u64::MAX)) as u64);
            let drained = e.link.draw(sent_bytes, draw, HOST.link).max(read);
            let sent = drained.saturating_add(e.link.draw(ram_bytes, draw, HOST.link));
            let transferred = sent.max(load);
            let sync = e.final_sync.spread().draw(draw, HOST.final_sync);
            let machine_state = e.machine_state.spread().draw(draw, HOST.machine_state);
            let validate = e.validate.spread().draw(draw, HOST.validate);
            let begun = sum;
            for part in [stopped, sync, transferred, machine_state, validate] {
                sum = sum.saturating_add(part);
            }
            if let [_, _, at_sync, at_machine_state, at_commit] = &mut reached[..] {
                at_sync[draw] = begun.saturating_add(stopped).saturating_add(drained);
                at_commit[draw] = sum;
                let saved = machine_state.saturating_add(validate);
                at_machine_state[draw] = sum.saturating_sub(saved);
            }
            transfer[draw] = transferred;
        }
        sum = sum.saturating_add(e.round_trip.spread().draw(draw, HOST.round_trip));
        sum = sum.saturating_add(e.start.spread().draw(draw, HOST.start));
        (look[draw], quiesce[draw], stop[draw], total[draw]) = (looked, quiesced, stopped, sum);
    }
    let mut terms = Vec::with_capacity(10);
    let level = e.level_permille;
    let single = |name, meter: &super::Meter| {
        let quantile = |permille| Some(Time(meter.spread().quantile(permille)));
        Term { name, time: quantile(500), upper: quantile(level), basis: meter.basis() }
    };
    let slowest = |name, draws: &mut Draws, basis| Term {
        name,
        time: Some(Time(quantile_of(draws, 500))),
        upper: Some(Time(quantile_of(draws, level))),
        basis,
    };
    let weakest = |pick: fn(&DeviceMeter) -> Basis| e.devices.iter().map(pick).min();
    if ahead == Ahead::All {
        terms.push(single("pause", &e.pause));
        let basis = weakest(|m| m.look.basis()).unwrap_or(e.final_sync.basis());
        terms.push(slowest("look", &mut look, basis));
    }
    if ahead <= Ahead::FromQuiesce
        && let Some(basis) = weakest(|m| m.quiesce.basis())
    {
        terms.push(slowest("quiesce", &mut quiesce, basis));
    }
    if ahead <= Ahead::FromStop {
        if let Some(basis) = weakest(|m| m.stop.basis()) {
            terms.push(slowest("stop", &mut stop, basis));
        }
        terms.push(single("final-sync", &e.final_sync));
        terms.push(if unknown {
            Term { name: "transfer", time: None, upper: None, basis: Basis::Unknown }
        } else {
            let rates = weakest(|m| m.read.basis().min(m.load.basis()));
            let basis = rates.map_or(e.link.basis(), |rates| rates.min(e.link.basis()));
            slowest("transfer", &mut transfer, basis)
        });
        terms.push(single("machine-state", &e.machine_state));
        terms.push(single("validate", &e.validate));
    }
    terms.push(single("commit", &e.round_trip));
    terms.push(single("start", &e.start));
    let modelled = Time(quantile_of(&mut total, 500));
    let upper = Time(quantile_of(&mut total, level));
    let known = Estimate {
        terms,
        modelled,
        known: modelled,
        known_upper: upper,
        unknown: unknown && ahead <= Ahead::FromStop,
        reached_upper: reached.iter_mut().map(|draws| Time(quantile_of(draws, level))).collect(),
        basis: Basis::Prior,
    };
    corrected(e, ahead, known)
}

/// What whole blackouts showed outweighs what the terms add up to.
fn corrected(e: &Estimator, ahead: Ahead, mut estimate: Estimate) -> Estimate {
    let stage = ahead as usize;
    let (Some(count), false) = (e.residuals.count(stage), estimate.unknown) else {
        return estimate;
    };
    let expected = estimate.modelled.0;
    if let Some(Ok(ratio)) = e.residuals.quantile(stage, 500) {
        estimate.known = Time(scaled(expected, ratio));
    }
    let upper = match e.residuals.quantile(stage, e.level_permille) {
        Some(Ok(ratio)) => scaled(expected, ratio),
        Some(Err(largest)) => scaled(expected, largest).max(estimate.known_upper.0),
        None => estimate.known_upper.0,
    };
    estimate.known_upper = Time(upper).max(estimate.known);
    estimate.basis = Basis::History(count);
    estimate
}
