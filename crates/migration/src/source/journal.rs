//! What happened when, and what the report makes of it.

use switchover::Time;
use switchover::estimate::{Basis, Estimate};
use switchover::message::{Failure, Side};
use switchover::source::{BLACKOUTS_MAX, State, Status};
use switchover::trace::{End, MeasuredTerm};

use super::blackout::Ledger;
use super::device::StreamBytes;
use super::worker::Counters;
use crate::memory::PAGE_SIZE;
use crate::report::{
    BlackoutReport, CostReport, DeviceReport, OverrunReport, Progress, RamReport, Report,
    TermReport, TimelineEntry,
};

use std::sync::atomic::Ordering;

/// The timeline keeps this many entries; a guest that resets its device all day must not fill memory.
const TIMELINE_ENTRIES_MAX: usize = 1000;

/// So many bytes of an entry's detail are kept; a peer's reason may be long.
const DETAIL_BYTES_MAX: usize = 1 << 10;

/// Moments of one attempt, for the measured terms.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    pause_requested: Option<Time>,
    paused: Option<Time>,
    quiesce: Option<Time>,
    stop_copy: Option<Time>,
    /// The slowest device's way into STOP_COPY.
    stop: Option<Time>,
    final_sync: Option<(Time, Time)>,
    machine_state: Option<Time>,
    state_end: Option<Time>,
    ready: Option<Time>,
    commit: Option<Time>,
    running: Option<Time>,
}

/// The record of one migration.
pub(super) struct Journal {
    id: String,
    begun: Time,
    first_pass: Option<Time>,
    moments: Moments,
    estimate: Estimate,
    timeline: Vec<TimelineEntry>,
    /// The blackout, part by part.
    pub(super) ledger: Ledger,
    /// First pass of the last entry, when that is a pass others may join.
    folded_from: Option<u64>,
    pub(super) source_blackouts: Vec<Time>,
    pub(super) device_ids: Vec<String>,
    pub(super) stream_bytes: Vec<StreamBytes>,
    pub(super) lost: Vec<Option<String>>,
    pub(super) ram_bytes: u64,
    pub(super) channels: u16,
    /// What the destination says of its memory: bytes that are populated, and the time for them.
    pub(super) populated: Option<(u64, Time)>,
    /// What the destination says of memory that was handed over: bytes, and the time to map and pin them.
    pub(super) mapped: Option<(u64, Time)>,
    /// Hashing memory that was handed over, before StateEnd.
    pub(super) hashed: Option<Time>,
    pub(super) memory_identical: Option<bool>,
    pub(super) device_state_identical: Option<bool>,
    pub(super) last_heartbeat_ns: Option<u64>,
    pub(super) first_heartbeat_ns: Option<u64>,
    pub(super) failure: Option<Failure>,
    pub(super) cost_here: Option<CostReport>,
    /// As the destination said last.
    pub(super) cost_there: Option<CostReport>,
}

impl Journal {
    pub(super) fn new(id: String, begun: Time, device_ids: Vec<String>, ram_bytes: u64) -> Self {
        Self {
            id,
            begun,
            first_pass: None,
            moments: Moments::default(),
            estimate: Estimate::default(),
            timeline: Vec::new(),
            ledger: Ledger::new(),
            folded_from: None,
            source_blackouts: Vec::new(),
            stream_bytes: vec![StreamBytes::default(); device_ids.len()],
            lost: vec![None; device_ids.len()],
            device_ids,
            ram_bytes,
            channels: 0,
            populated: None,
            mapped: None,
            hashed: None,
            memory_identical: None,
            device_state_identical: None,
            last_heartbeat_ns: None,
            first_heartbeat_ns: None,
            failure: None,
            cost_here: None,
            cost_there: None,
        }
    }

    /// Adds to the timeline.
    pub(super) fn note(&mut self, at: Time, event: &str, detail: impl Into<String>) {
        if self.timeline.len() < TIMELINE_ENTRIES_MAX {
            let mut detail = detail.into();
            if detail.len() > DETAIL_BYTES_MAX {
                let end = (0..=DETAIL_BYTES_MAX).rev().find(|at| detail.is_char_boundary(*at));
                detail.truncate(end.unwrap_or(0));
            }
            self.timeline.push(TimelineEntry {
                at_ms: at.since(self.begun).as_ms(),
                side: Side::Source,
                event: event.to_owned(),
                detail,
            });
        }
    }

    /// Passes in a row are one entry: a guest that keeps writing makes hundreds.
    pub(super) fn note_pass(&mut self, at: Time, number: u64, bytes: u64) {
        let detail = |first: u64| match first == number {
            true => format!("{number}, {bytes} bytes"),
            false => format!("{first} to {number}, {bytes} bytes in the last"),
        };
        let folded = self.timeline.last_mut().filter(|entry| entry.event == "pass");
        match (folded, self.folded_from) {
            (Some(entry), Some(first)) => entry.detail = detail(first),
            _ => {
                self.folded_from = (number > 1).then_some(number);
                self.note(at, "pass", detail(number));
            }
        }
    }

    // --- moments ------------------------------------------------------------------------------

    pub(super) fn entered(&mut self, at: Time, state: State) {
        match state {
            State::Precopy => {
                self.first_pass.get_or_insert(at);
            }
            State::Quiesce => self.moments.quiesce = Some(at),
            State::StopCopy => self.moments.stop_copy = Some(at),
            State::AwaitReady => self.moments.state_end = Some(at),
            State::Committed => self.moments.commit = Some(at),
            State::Done => {
                self.moments.running.get_or_insert(at);
            }
            _ => {}
        }
    }

    pub(super) fn pause_requested(&mut self, at: Time, estimate: Estimate) {
        self.hashed = None;
        self.moments = Moments { pause_requested: Some(at), ..Moments::default() };
        self.ledger.begin(at);
        self.estimate = estimate;
    }

    pub(super) fn paused(&mut self, at: Time) {
        self.moments.paused = Some(at);
    }

    pub(super) fn device_stopped(&mut self, took: Time) {
        self.moments.stop = self.moments.stop.max(Some(took));
    }

    pub(super) fn final_sync(&mut self, at: Time, took: Time) {
        self.moments.final_sync = Some((at, took));
    }

    pub(super) fn final_ram_sent(&mut self, at: Time) {
        self.moments.machine_state = Some(at);
    }

    pub(super) fn ready(&mut self, at: Time) {
        self.moments.ready = Some(at);
        self.ledger.ready(at);
    }

    pub(super) fn running(&mut self, at: Time) {
        self.moments.running = Some(at);
        self.ledger.running(at);
    }

    /// The guest runs here again.
    pub(super) fn resumed(&mut self, at: Time) {
        self.ledger.close();
        if let Some(requested) = self.moments.pause_requested
            && self.source_blackouts.len() < BLACKOUTS_MAX
        {
            self.source_blackouts.push(at.since(requested));
        }
    }

    /// From the request to pause to the arrival of Running.
    fn downtime(&self) -> Option<Time> {
        Some(self.moments.running?.since(self.moments.pause_requested?))
    }

    fn guest_observed(&self) -> Option<Time> {
        let (first, last) = (self.first_heartbeat_ns?, self.last_heartbeat_ns?);
        Some(Time(first.checked_sub(last)?))
    }

    /// Between Ready and Commit of a verifying run, and before StateEnd where memory was handed over: the guest
    /// stands still only to be hashed.
    fn verification(&self) -> Option<Time> {
        self.memory_identical?;
        let held = self.moments.commit?.since(self.moments.ready?);
        Some(held + self.hashed.unwrap_or_default())
    }

    /// Expected terms beside measured ones. From here `commit` and `start` are one span, up to the arrival
    /// of Running; it stands with `commit`.
    fn terms(&self) -> Vec<TermReport> {
        let m = &self.moments;
        let span = |from: Option<Time>, to: Option<Time>| Some(to?.since(from?));
        let after_look = m.quiesce.or(m.stop_copy);
        let sync_begin = m.final_sync.map(|(end, took)| Time(end.0.saturating_sub(took.0)));
        let sync_end = m.final_sync.map(|(end, _)| end);
        // Devices are drained from their own STOP_COPY on, before the sync; the last RAM comes after it.
        let drain = span(m.stop_copy, sync_begin).map(|all| all.since(m.stop.unwrap_or_default()));
        let ram =
            span(sync_end, m.machine_state).map(|ram| ram.since(self.hashed.unwrap_or_default()));
        let measured = [
            ("pause", span(m.pause_requested, m.paused)),
            ("look", span(m.paused, after_look)),
            ("quiesce", span(m.quiesce, m.stop_copy)),
            ("stop", m.stop),
            ("final-sync", m.final_sync.map(|(_, took)| took)),
            ("transfer", drain.zip(ram).map(|(drain, ram)| drain + ram)),
            ("machine-state", span(m.machine_state, m.state_end)),
            ("validate", span(m.state_end, m.ready)),
            ("commit", span(m.commit, m.running)),
        ];
        let ms = |time: Option<Time>| time.map(Time::as_ms);
        let expected = self.estimate.terms.iter().map(|term| TermReport {
            name: term.name.to_owned(),
            expected_ms: ms(term.time),
            expected_upper_ms: ms(term.upper),
            basis: term.basis.to_string(),
            measured_ms: measured.iter().find(|(n, _)| *n == term.name).and_then(|(_, t)| ms(*t)),
        });
        expected.collect()
    }

    /// Times as the vCPUs' own thread saw them, causes as the brain did.
    fn blackouts(&self, status: &Status) -> Vec<BlackoutReport> {
        let both = self.source_blackouts.iter().zip(&status.blackouts);
        both.map(|(took, why)| BlackoutReport {
            ms: took.as_ms(),
            ended: why.back.name().to_owned(),
            cause: why.cause.clone(),
        })
        .collect()
    }

    /// How it ended, for a trace.
    pub(super) fn end(&self, ended: Time, outcome: &str) -> End {
        let us = |ms: f64| (ms * 1_000.0).round().max(0.0) as u64;
        let downtime = self.downtime().filter(|_| outcome == "completed");
        let held = self.verification().unwrap_or_default();
        let term = |term: TermReport| MeasuredTerm {
            name: term.name,
            expected_us: term.expected_ms.map(us),
            measured_us: term.measured_ms.map(us),
        };
        End {
            status: outcome.to_owned(),
            downtime_us: downtime.map(|all| us(all.since(held).as_ms())),
            total_us: us(ended.since(self.begun).as_ms()),
            terms: self.terms().into_iter().map(term).collect(),
        }
    }

    // --- what people see ----------------------------------------------------------------------

    fn devices(&self, status: &Status) -> Vec<DeviceReport> {
        let report = |(index, id): (usize, &String)| {
            let device = status.devices.get(index).copied().unwrap_or_default();
            let bytes = self.stream_bytes.get(index).copied().unwrap_or_default();
            DeviceReport {
                id: id.clone(),
                initial_bytes: bytes.initial,
                dirty_bytes: bytes.dirty,
                stop_copy_bytes: bytes.stop_copy,
                remaining: device.remaining_bytes,
                reinits: device.reinits,
                late_reinits: device.late_reinits,
                acks: device.acks,
                lost: self.lost.get(index).cloned().flatten(),
            }
        };
        self.device_ids.iter().enumerate().map(report).collect()
    }

    fn ram(&self, status: &Status, counters: &Counters) -> RamReport {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (bytes, busy) = (load(&counters.wire_bytes), load(&counters.send_ns));
        let done = load(&counters.pass_pages) * PAGE_SIZE;
        let sends = self.mapped.is_none();
        RamReport {
            total: self.ram_bytes,
            transferred: bytes,
            remaining: status.ram_remaining_bytes.saturating_sub(done),
            normal: load(&counters.normal_pages),
            duplicate: load(&counters.zero_pages),
            compressed: load(&counters.packed_pages),
            compressed_size: load(&counters.packed_bytes),
            dirtied: load(&counters.dirtied_pages),
            // The first pass takes all memory, which is a sync to QEMU's users.
            dirty_sync_count: load(&counters.syncs) + u64::from(status.pass > 0 && sends),
            channels: self.channels,
            populated: self.populated.map(|(bytes, _)| bytes),
            populate_time_ms: self.populated.map(|(_, spent)| spent.as_ms()),
            handed_over: self.mapped.map(|(bytes, _)| bytes),
            map_time_ms: self.mapped.map(|(_, took)| took.as_ms()),
            mbps: (busy > 0).then(|| bytes as f64 * 8_000.0 / busy as f64),
        }
    }

    pub(super) fn progress(
        &self,
        now: Time,
        status: &Status,
        counters: &Counters,
        slow_call: Option<String>,
    ) -> Progress {
        let ram = self.ram(status, counters);
        let devices = self.devices(status);
        let remaining = devices.iter().try_fold(ram.remaining, |sum, device| {
            device.remaining.map(|bytes| sum.saturating_add(bytes))
        });
        Progress {
            status: coarse(status.state).to_owned(),
            state: status.state.name().to_owned(),
            pass: status.pass,
            remaining,
            ram,
            devices,
            rate_bytes_per_s: status.link_bytes_per_s,
            expected_downtime_ms: expected(&status.estimate).map(Time::as_ms),
            expected_downtime_upper_ms: upper(&status.estimate).map(Time::as_ms),
            downtime_limit_ms: status.downtime_limit.as_ms(),
            total_time_ms: now.since(self.begun).as_ms(),
            switchover_attempts: status.attempts,
            switchover_revocations: status.revocations,
            switchover_roll_backs: status.roll_backs,
            switchover_absorptions: status.absorptions,
            cpu_throttle_percentage: status.throttle.percent,
            slow_call,
            overruns: overruns(status),
            failure: self.failure.clone(),
        }
    }

    pub(super) fn report(
        &self,
        ended: Time,
        outcome: &str,
        status: &Status,
        counters: &Counters,
    ) -> Report {
        let completed = outcome == "completed";
        Report {
            status: outcome.to_owned(),
            migration: self.id.clone(),
            downtime_limit_ms: status.downtime_limit.as_ms(),
            expected_downtime_ms: expected(&self.estimate).map(Time::as_ms),
            expected_downtime_upper_ms: upper(&self.estimate).map(Time::as_ms),
            expected_downtime_basis: match self.estimate.basis {
                basis @ Basis::History(_) => basis.to_string(),
                _ => "terms".to_owned(),
            },
            confidence_percent: f64::from(status.level_permille) / 10.0,
            downtime_ms: self.downtime().filter(|_| completed).map(Time::as_ms),
            verification_ms: self.verification().map(Time::as_ms),
            guest_observed_downtime_ms: self
                .guest_observed()
                .filter(|_| completed)
                .map(Time::as_ms),
            setup_time_ms: self.first_pass.map(|at| at.since(self.begun).as_ms()),
            total_time_ms: ended.since(self.begun).as_ms(),
            switchover_attempts: status.attempts,
            switchover_revocations: status.revocations,
            switchover_roll_backs: status.roll_backs,
            switchover_absorptions: status.absorptions,
            cpu_throttle_percentage: status.throttle.most_percent,
            source_blackouts_ms: self.source_blackouts.iter().map(|t| t.as_ms()).collect(),
            source_blackouts: self.blackouts(status),
            overruns: overruns(status),
            ram: self.ram(status, counters),
            devices: self.devices(status),
            memory_identical: self.memory_identical,
            device_state_identical: self.device_state_identical,
            terms: self.terms(),
            source_cost: self.cost_here,
            destination_cost: self.cost_there,
            blackout_timeline: self.ledger.report().filter(|_| completed),
            timeline: self.timeline.clone(),
            failure: self.failure.clone(),
        }
    }
}

impl Report {
    /// A migration that could not even begin.
    pub(super) fn not_started(what: String) -> Self {
        Self {
            status: "failed".into(),
            failure: Some(Failure::new(Side::Source, what).in_phase("setup")),
            ..Self::default()
        }
    }
}

/// An estimate that was never made is unknown, not 0.
fn expected(estimate: &Estimate) -> Option<Time> {
    estimate.total().filter(|_| !estimate.terms.is_empty())
}

/// As [`expected`], at the level of the promise.
fn upper(estimate: &Estimate) -> Option<Time> {
    estimate.upper().filter(|_| !estimate.terms.is_empty())
}

fn overruns(status: &Status) -> Vec<OverrunReport> {
    let report = |overrun: &switchover::source::Overrun| OverrunReport {
        device: overrun.device.clone(),
        call: overrun.call.clone(),
        ms: overrun.took.as_ms(),
        bound_ms: overrun.bound.as_ms(),
    };
    status.overruns.iter().map(report).collect()
}

/// The states as operators of other VMMs know them.
fn coarse(state: State) -> &'static str {
    match state {
        State::Setup => "setup",
        State::Precopy => "active",
        State::Look
        | State::Quiesce
        | State::StopCopy
        | State::AwaitReady
        | State::Committed
        | State::Revoking
        | State::RollingBack => "switchover",
        State::InDoubt => "in-doubt",
        State::Done => "completed",
        State::Cancelling => "cancelling",
        State::Failed => "failed",
        State::Cancelled => "cancelled",
    }
}
