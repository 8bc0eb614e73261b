//! A device's profile, from how it behaved once.
//!
//! Sizes are what its stream carried, cross-checked with nothing: what it claimed counts where the stream did
//! not get so far. Its stop-only part is what STOP_COPY brought beyond what the last look had announced.

use device_profile::{
    DirtyModel, Fact, Features, Precopy, Profile, Provenance, Quantity, Rates, ReinitPolicy, Sizes,
    Times,
};
use switchover::Time;
use switchover::estimate::{DevicePrior, Range};
use switchover::trace::{Entry, TracedDevice, What};

use super::{range, range_ns};
use crate::scenario::Device;

/// Reads and loads below this say nothing about rates, in bytes.
const RATE_BYTES: u64 = 64 << 10;
/// No device's state is larger, in bytes.
const STATE_MAX_BYTES: u64 = 1 << 40;

pub(super) fn fit(index: u16, traced: &TracedDevice, entries: &[Entry]) -> Device {
    let seen = Seen::of(index, entries);
    let rates = seen.rates();
    let profile = Profile {
        name: format!("traced-{index}"),
        models: traced.kind.clone(),
        description: format!("device {} as it behaved in one migration", traced.id),
        features: Features {
            p2p: fact(traced.p2p),
            pre_copy: fact(traced.pre_copy),
            precopy_info_v2: fact(traced.precopy_info_v2 && traced.pre_copy),
            data_size: fact(traced.data_size),
            dma_logging: fact(traced.dma_logging),
        },
        sizes: seen.sizes(traced),
        times: seen.times(),
        precopy: Precopy {
            reinit: fact(match traced.precopy_info_v2 && traced.pre_copy {
                true => ReinitPolicy::Flush,
                false => ReinitPolicy::Never,
            }),
            reinit_in_p2p: fact(false),
            dirty: fact(DirtyModel::Tracked),
            reread_interval_us: None,
            p2p_stops_dma: fact(false),
        },
        rates,
        deviations: Vec::new(),
    };
    let ran_us = seen.ran_us.max(1);
    Device {
        reconfigured_every: (seen.reinits > 0)
            .then(|| Time::from_us(ran_us / u64::from(seen.reinits))),
        ..Device::new(traced.id.clone(), profile)
    }
}

fn fact<T>(value: T) -> Fact<T> {
    Fact { value, provenance: Provenance::Sourced, note: "as a trace showed it".to_owned() }
}

fn quantity(range: Range, note: &str) -> Quantity {
    let (min, max) = (range.min.min(range.typical), range.max.max(range.typical));
    let (provenance, note) = (Provenance::Sourced, note.to_owned());
    Quantity { min, typical: range.typical, max, provenance, note }
}

fn exactly(value: u64, note: &str) -> Quantity {
    quantity(Range { min: value, typical: value, max: value }, note)
}

/// What was seen of a device.
#[derive(Default)]
struct Seen {
    /// The first answer: read until then, and what it said was left.
    first_initial_bytes: Option<u64>,
    first_total_bytes: Option<u64>,
    /// Read until it first had nothing more.
    first_drain_bytes: u64,
    drained_at_us: Option<u64>,
    /// Read with the guest running, after that, without new initial data.
    dirtied_bytes: u64,
    /// The last look's unread bytes.
    last_unread_bytes: u64,
    stop_copy_bytes: u64,
    reads: Vec<(u64, u64)>,
    loads: Vec<(u64, u64)>,
    reinits: u32,
    /// The guest ran for so long with the device in a session, and so long of it after that.
    ran_us: u64,
    after_us: u64,
    to_precopy_us: Vec<u64>,
    to_p2p_us: Vec<u64>,
    to_stop_us: Vec<u64>,
    to_running_us: Vec<u64>,
    reset_us: Vec<u64>,
    validate_us: Vec<u64>,
    start_us: Vec<u64>,
}

impl Seen {
    fn of(index: u16, entries: &[Entry]) -> Self {
        let mut seen = Self::default();
        let mut walk = Walk::default();
        for Entry { at_us, what } in entries {
            seen.take(index, *at_us, what, &mut walk);
        }
        seen
    }

    fn take(&mut self, index: u16, at_us: u64, what: &What, walk: &mut Walk) {
        match what {
            What::StreamBegins { device } if *device == index => {
                // A stream that begins anew tells all of it once more.
                *walk = Walk { began_us: at_us, ..Walk::default() };
                (self.first_initial_bytes, self.first_total_bytes) = (None, None);
                (self.first_drain_bytes, self.drained_at_us) = (0, None);
                (self.dirtied_bytes, self.after_us) = (0, 0);
                (self.stop_copy_bytes, self.last_unread_bytes) = (0, 0);
            }
            What::PauseRequested => {
                add(&mut self.ran_us, at_us.saturating_sub(walk.began_us));
                if let Some(drained) = self.drained_at_us {
                    add(&mut self.after_us, at_us.saturating_sub(drained.max(walk.began_us)));
                }
                walk.stands = true;
            }
            What::Resumed => (walk.stands, walk.began_us) = (false, at_us),
            What::Info { device, initial_bytes, dirty_bytes, stop_copy_bytes, offset, .. }
                if *device == index =>
            {
                let initial = initial_bytes.unwrap_or(0);
                self.first_initial_bytes.get_or_insert(offset.saturating_add(initial));
                if let Some(left) = stop_copy_bytes {
                    self.first_total_bytes.get_or_insert(offset.saturating_add(*left));
                }
                self.last_unread_bytes = initial.saturating_add(dirty_bytes.unwrap_or(0));
                walk.asked_beyond_initial |= *initial_bytes == Some(0);
                if *initial_bytes == Some(0) && *dirty_bytes == Some(0) && *offset > 0 {
                    self.drained_at_us.get_or_insert(at_us);
                }
                if walk.new_initial {
                    walk.reinit_bytes = walk.reinit_bytes.max(initial);
                }
            }
            What::Reinit { device, .. } if *device == index => {
                self.reinits = self.reinits.saturating_add(1);
                walk.new_initial = true;
            }
            What::Acked { device } if *device == index => walk.new_initial = false,
            What::Read { device, bytes, read_us } if *device == index => {
                if *bytes >= RATE_BYTES {
                    self.reads.push((*bytes, (*read_us).max(1)));
                }
                if walk.stop_copy {
                    add(&mut self.stop_copy_bytes, *bytes);
                } else if self.drained_at_us.is_none() {
                    add(&mut self.first_drain_bytes, *bytes);
                    self.last_unread_bytes = self.last_unread_bytes.saturating_sub(*bytes);
                } else {
                    let new = bytes.saturating_sub(std::mem::take(&mut walk.reinit_bytes));
                    add(&mut self.dirtied_bytes, if walk.stands { 0 } else { new });
                    self.last_unread_bytes = self.last_unread_bytes.saturating_sub(*bytes);
                }
            }
            // Some devices tell what comes after initial data only when they are asked once more.
            What::NothingNow { device } if *device == index && walk.asked_beyond_initial => {
                self.drained_at_us.get_or_insert(at_us);
            }
            What::Call { device, call, done: true, took_us } if *device == index => {
                let times = match call.as_str() {
                    "PreCopy" if walk.stands => None,
                    "PreCopy" => Some(&mut self.to_precopy_us),
                    "PreCopyP2p" | "RunningP2p" if !walk.stop_copy => Some(&mut self.to_p2p_us),
                    "StopCopy" => {
                        walk.stop_copy = true;
                        Some(&mut self.to_stop_us)
                    }
                    "RunningP2p" | "Running" if walk.stop_copy => Some(&mut self.to_running_us),
                    "reset" => Some(&mut self.reset_us),
                    _ => None,
                };
                times.into_iter().for_each(|times| times.push(*took_us));
            }
            What::Loaded { device, bytes, load_us } if *device == index => {
                self.loads.push((*bytes, *load_us));
            }
            What::Started { device, validate_us, start_us } if *device == index => {
                self.validate_us.extend(validate_us);
                self.start_us.extend(start_us);
            }
            _ => {}
        }
    }

    fn sizes(&self, traced: &TracedDevice) -> Sizes {
        let note = "what its stream carried in a traced migration";
        // A stop of what was there anyway has an end mark; what was announced and not read comes on top of it.
        let stop_only = self.stop_copy_bytes.saturating_sub(self.last_unread_bytes);
        let initial =
            if traced.pre_copy { self.first_initial_bytes.unwrap_or(0).max(1) } else { 0 };
        let carried = match self.drained_at_us {
            Some(_) => self.first_drain_bytes.saturating_add(stop_only),
            // It never had nothing: what was read of it again is in there as well.
            None => self.first_drain_bytes.saturating_add(self.stop_copy_bytes),
        };
        let claimed = self.first_total_bytes.or(traced.stop_copy_bytes);
        let stopped = self.stop_copy_bytes > 0;
        let total = match claimed {
            Some(claimed) if !stopped => claimed,
            Some(claimed) if self.drained_at_us.is_none() => claimed.max(self.stop_copy_bytes),
            _ => carried,
        };
        let initial = initial.min(STATE_MAX_BYTES);
        let total = total.max(initial.saturating_add(stop_only)).min(STATE_MAX_BYTES);
        Sizes {
            total_bytes: exactly(total, note),
            initial_bytes: exactly(initial, note),
            stop_only_bytes: exactly(stop_only.min(total - initial.min(total)), note),
            initial_max_bytes: exactly(initial.max(1 << 30), "limit of the model"),
        }
    }

    fn rates(&self) -> Rates {
        let per_s = |bytes: u64, us: u64| {
            let rate = u128::from(bytes) * 1_000_000 / u128::from(us.max(1));
            rate.min(u128::from(u64::MAX)) as u64
        };
        // What was read of a blink of an eye would be blown up to a second.
        let dirty = match self.after_us {
            0..20_000 => 0,
            after_us => per_s(self.dirtied_bytes, after_us),
        };
        let default = DevicePrior::default();
        Rates {
            dirty_bytes_per_s: exactly(dirty, "read again while the guest ran"),
            read_bytes_per_s: quantity(
                rate(self.reads.iter().copied(), per_s).unwrap_or(default.read),
                "bytes over time in read()",
            ),
            load_bytes_per_s: quantity(
                // The first has the fixed part of loading in it.
                rate(steps(&self.loads).skip(1), per_s)
                    .or_else(|| rate(steps(&self.loads), per_s))
                    .unwrap_or(default.load),
                "bytes over time in write(), as the destination told",
            ),
        }
    }

    fn times(&self) -> Times {
        let once = "measured in a traced migration";
        let time = |values: &[u64], or_us: Range| {
            let range = range_ns(values).map(|ns| Range {
                min: ns.min / 1_000,
                typical: ns.typical / 1_000,
                max: ns.max.div_ceil(1_000),
            });
            match range {
                Some(range) => quantity(range, once),
                None => quantity(or_us, "not seen: assumed"),
            }
        };
        let assumed = |us: u64| Range { min: us / 4, typical: us, max: us * 10 };
        // One call of two where it goes by way of P2P.
        let calls = if self.to_p2p_us.is_empty() { 1 } else { 2 };
        let starts: Vec<u64> = self.start_us.iter().map(|us| us / calls).collect();
        let to_running = if starts.is_empty() { &self.to_running_us } else { &starts };
        Times {
            to_precopy_us: time(&self.to_precopy_us, assumed(1_000)),
            to_p2p_us: time(&self.to_p2p_us, assumed(1_000)),
            to_stop_us: time(&self.to_stop_us, assumed(1_000)),
            to_running_us: time(to_running, assumed(500)),
            save_fixed_us: exactly(0, "in to_stop_us: the source cannot tell them apart"),
            load_cold_us: exactly(self.cold_us(), "the first write beyond its bytes"),
            load_warm_us: time(&self.validate_us, assumed(500)),
            reset_us: time(&self.reset_us, assumed(100_000)),
        }
    }

    /// What the first write took beyond its bytes at the rate of the later ones.
    fn cold_us(&self) -> u64 {
        let Some((bytes, us)) = self.loads.iter().find(|(bytes, _)| *bytes > 0) else { return 0 };
        let (mut more_bytes, mut more_us) = (0u64, 0u64);
        for (step_bytes, step_us) in steps(&self.loads).skip(1) {
            add(&mut more_bytes, step_bytes);
            add(&mut more_us, step_us);
        }
        if more_bytes < RATE_BYTES {
            return 0;
        }
        let at_rate = u128::from(*bytes) * u128::from(more_us) / u128::from(more_bytes);
        let cold = us.saturating_sub(at_rate.min(u128::from(u64::MAX)) as u64);
        // Less is within what a clock and a thread make of it.
        if cold >= 2_000 { cold } else { 0 }
    }
}

/// Numbers of a file: whatever they are, a sum is a sum.
fn add(sum: &mut u64, value: u64) {
    *sum = sum.saturating_add(value);
}

/// Where the walk over the entries is.
#[derive(Default)]
struct Walk {
    began_us: u64,
    stands: bool,
    stop_copy: bool,
    /// It was asked with its initial data read.
    asked_beyond_initial: bool,
    /// New initial data was announced, and is not acknowledged.
    new_initial: bool,
    reinit_bytes: u64,
}

/// What came from one telling to the next: bytes, µs. A stream that began anew begins anew.
fn steps(loads: &[(u64, u64)]) -> impl Iterator<Item = (u64, u64)> {
    let mut last = (0u64, 0u64);
    loads.iter().filter_map(move |now| {
        let from = if now.0 < last.0 { (0, 0) } else { last };
        last = *now;
        let step = (now.0 - from.0, now.1.saturating_sub(from.1));
        (step.0 > 0).then_some(step)
    })
}

fn rate(steps: impl Iterator<Item = (u64, u64)>, per_s: impl Fn(u64, u64) -> u64) -> Option<Range> {
    let steps: Vec<_> = steps.filter(|(bytes, _)| *bytes >= RATE_BYTES).collect();
    let rates: Vec<u64> = steps.iter().map(|(bytes, us)| per_s(*bytes, *us).max(1)).collect();
    let (mut bytes, mut us) = (0, 0);
    for step in &steps {
        add(&mut bytes, step.0);
        add(&mut us, step.1);
    }
    let spread = range(&rates)?;
    let all = per_s(bytes, us).max(1);
    Some(Range { min: spread.min.clamp(1, all), typical: all, max: spread.max.max(all) })
}
