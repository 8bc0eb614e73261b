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
use super::spread::{Draws, NO_DRAWS, Order, add, quantile_of, raise};
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
    /// Every device at the least it ever held, and all that was sent of it loaded.
    pub(super) least: bool,
}

impl Amounts {
    /// No memory left to send.
    pub(super) const FLOOR: Self =
        Self { ram_bytes: 0, ram_bytes_per_s: 0, unsynced: Time(0), least: true };
}

/// Which answers are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    /// The totals: to decide on, many times a second.
    Totals,
    /// Each term as well: to report.
    Terms,
}

const PAUSE: Order = Order::new(1);
const SYNC: Order = Order::new(2);
const FINAL_SYNC: Order = Order::new(3);
const MACHINE_STATE: Order = Order::new(4);
const VALIDATE: Order = Order::new(5);
const ROUND_TRIP: Order = Order::new(6);
const START: Order = Order::new(7);
const LINK: Order = Order::new(8);

/// The order of one of a device's spreads.
fn order(device: usize, which: u64) -> Order {
    Order::new(100 + device as u64 * 8 + which)
}

/// All draws, of what is not the same for all of them.
struct Sample {
    look: Draws,
    quiesce: Draws,
    stop: Draws,
    transfer: Draws,
    /// When each point is reached, from the request to pause on.
    reached: Vec<Draws>,
    total: Draws,
}

/// The devices' parts, side by side.
struct Devices {
    look: Draws,
    quiesce: Draws,
    stop: Draws,
    read: Draws,
    load: Draws,
    /// What all of them have to send, in bytes.
    sent_bytes: Draws,
}

fn devices(e: &Estimator, ahead: Ahead, amounts: Amounts) -> Devices {
    let mut all = Devices {
        look: NO_DRAWS,
        quiesce: NO_DRAWS,
        stop: NO_DRAWS,
        read: NO_DRAWS,
        load: NO_DRAWS,
        sent_bytes: NO_DRAWS,
    };
    for (number, m) in e.devices.iter().enumerate() {
        let look = m.look.spread().draws(order(number, 0));
        let mut quiesce = m.quiesce.spread().draws(order(number, 1));
        if m.asked_in_p2p {
            add(&mut quiesce, &look);
        }
        raise(&mut all.look, &look);
        raise(&mut all.quiesce, &quiesce);
        raise(&mut all.stop, &m.stop.spread().draws(order(number, 2)));
        if ahead > Ahead::FromStop {
            continue;
        }
        let remaining = match amounts.least {
            true => m.least_bytes.or(m.remaining_bytes),
            false => m.remaining_bytes,
        };
        let remaining_bytes = remaining.unwrap_or(0);
        let backlog_bytes = if e.telemetry && !amounts.least { m.backlog_bytes() } else { 0 };
        let factor = m.size_permille.spread();
        let bytes = match factor.constant() {
            Some(factor) => [scaled(remaining_bytes, permille(factor)); _],
            None => factor.draws(order(number, 3)).map(|f| scaled(remaining_bytes, permille(f))),
        };
        add(&mut all.sent_bytes, &bytes);
        raise(&mut all.read, &m.read.draws(&bytes, 0, order(number, 4)));
        let mut load = m.load.draws(&bytes, backlog_bytes, order(number, 5));
        let early = amounts.least && !m.loads_late;
        let cold = m.loaded_bytes == 0 && m.acked_bytes == 0 && !early;
        if cold {
            add(&mut load, &m.load_cold.spread().draws(order(number, 6)));
        }
        raise(&mut all.load, &load);
    }
    all
}

fn permille(factor: u64) -> u32 {
    u32::try_from(factor).unwrap_or(u32::MAX)
}

fn sample(e: &Estimator, ahead: Ahead, amounts: Amounts) -> Sample {
    let mut d = devices(e, ahead, amounts);
    let (mut total, mut transfer, mut reached) = (NO_DRAWS, NO_DRAWS, Vec::new());
    // What the guest writes until it stands comes on top.
    let mut unsynced = NO_DRAWS;
    if ahead == Ahead::All {
        reached.reserve(5);
        let pause = e.pause.spread().draws(PAUSE);
        raise(&mut d.look, &e.final_sync.spread().draws(SYNC));
        unsynced = pause.map(|pause| amounts.unsynced.0.saturating_add(pause));
        add(&mut total, &pause);
        add(&mut total, &d.look);
        reached.push(total);
    }
    if ahead <= Ahead::FromQuiesce {
        add(&mut total, &d.quiesce);
        if ahead == Ahead::All {
            reached.push(total);
        }
    }
    if ahead <= Ahead::FromStop {
        let mut sent = e.link.draws(&d.sent_bytes, LINK);
        raise(&mut sent, &d.read);
        add(&mut total, &d.stop);
        if ahead == Ahead::All {
            let mut drained = total;
            add(&mut drained, &sent);
            reached.push(drained);
        }
        let more = |ns: u64| match ns.checked_mul(amounts.ram_bytes_per_s) {
            Some(product) => product / 1_000_000_000,
            None => {
                let bytes = u128::from(ns) * u128::from(amounts.ram_bytes_per_s) / 1_000_000_000;
                u64::try_from(bytes).unwrap_or(u64::MAX)
            }
        };
        let ram_bytes = unsynced.map(|ns| amounts.ram_bytes.saturating_add(more(ns)));
        add(&mut sent, &e.link.draws(&ram_bytes, LINK));
        add(&mut sent, &ram_bytes.map(|bytes| e.populate_time(bytes)));
        transfer = sent;
        raise(&mut transfer, &d.load);
        add(&mut total, &e.final_sync.spread().draws(FINAL_SYNC));
        add(&mut total, &transfer);
        if ahead == Ahead::All {
            reached.push(total);
        }
        add(&mut total, &e.machine_state.spread().draws(MACHINE_STATE));
        add(&mut total, &e.validate.spread().draws(VALIDATE));
        if ahead == Ahead::All {
            reached.push(total);
        }
    }
    add(&mut total, &e.round_trip.spread().draws(ROUND_TRIP));
    add(&mut total, &e.start.spread().draws(START));
    Sample { look: d.look, quiesce: d.quiesce, stop: d.stop, transfer, reached, total }
}

pub(super) fn estimate(e: &Estimator, ahead: Ahead, amounts: Amounts, detail: Detail) -> Estimate {
    let mut sample = sample(e, ahead, amounts);
    let remaining = |m: &DeviceMeter| match amounts.least {
        true => m.least_bytes.or(m.remaining_bytes),
        false => m.remaining_bytes,
    };
    let unknown = e.devices.iter().any(|m| remaining(m).is_none());
    let level = e.level_permille;
    let terms = match detail {
        Detail::Totals => Vec::new(),
        Detail::Terms => terms(e, ahead, &mut sample, unknown),
    };
    // The upper one first: it leaves the draws in their order.
    let upper = Time(quantile_of(&mut sample.total, level));
    let modelled = Time(quantile_of(&mut sample.total, 500));
    let known = Estimate {
        terms,
        modelled,
        known: modelled,
        known_upper: upper,
        unknown: unknown && ahead <= Ahead::FromStop,
        reached_upper: sample
            .reached
            .iter_mut()
            .map(|draws| Time(quantile_of(draws, level)))
            .collect(),
        basis: Basis::Prior,
    };
    corrected(e, ahead, known)
}

/// How likely it is that what lies ahead takes no longer than `left`, in permille; what is unknown counts as
/// nothing.
pub(super) fn odds_permille(e: &Estimator, ahead: Ahead, amounts: Amounts, left: Time) -> u32 {
    let mut sample = sample(e, ahead, amounts);
    let within = sample.total.iter().filter(|total| **total <= left.0).count();
    let modelled = (within * 1000 / sample.total.len()) as u32;
    let expected = quantile_of(&mut sample.total, 500);
    match e.residuals.within_permille(ahead as usize, left.0, expected) {
        // Of few blackouts nobody knows what the next one is like at worst.
        Some((seen, Some(_))) => seen,
        Some((seen, None)) => seen.min(modelled),
        None => modelled,
    }
}

fn terms(e: &Estimator, ahead: Ahead, sample: &mut Sample, unknown: bool) -> Vec<Term> {
    let mut terms = Vec::with_capacity(10);
    let level = e.level_permille;
    let single = |name, meter: &super::Meter| {
        let quantile = |permille| Some(Time(meter.spread().quantile(permille)));
        Term { name, time: quantile(500), upper: quantile(level), basis: meter.basis() }
    };
    let slowest = |name, draws: &mut Draws, basis| {
        let upper = Some(Time(quantile_of(draws, level)));
        Term { name, time: Some(Time(quantile_of(draws, 500))), upper, basis }
    };
    let weakest = |pick: fn(&DeviceMeter) -> Basis| e.devices.iter().map(pick).min();
    if ahead == Ahead::All {
        terms.push(single("pause", &e.pause));
        let basis = weakest(|m| m.look.basis()).unwrap_or(e.final_sync.basis());
        terms.push(slowest("look", &mut sample.look, basis));
    }
    if ahead <= Ahead::FromQuiesce
        && let Some(basis) = weakest(|m| m.quiesce.basis())
    {
        terms.push(slowest("quiesce", &mut sample.quiesce, basis));
    }
    if ahead <= Ahead::FromStop {
        if let Some(basis) = weakest(|m| m.stop.basis()) {
            terms.push(slowest("stop", &mut sample.stop, basis));
        }
        terms.push(single("final-sync", &e.final_sync));
        terms.push(if unknown {
            Term { name: "transfer", time: None, upper: None, basis: Basis::Unknown }
        } else {
            let rates = weakest(|m| m.read.basis().min(m.load.basis()));
            let basis = rates.map_or(e.link.basis(), |rates| rates.min(e.link.basis()));
            slowest("transfer", &mut sample.transfer, basis)
        });
        terms.push(single("machine-state", &e.machine_state));
        terms.push(single("validate", &e.validate));
    }
    terms.push(single("commit", &e.round_trip));
    terms.push(single("start", &e.start));
    terms
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
