//! The blackout, part by part: where every microsecond between the request to pause and the arrival of
//! Running went.
//!
//! ```text
//!   pause  ask  sync  …  machine-state  send-state-end │ link │ arrival … send-ready │ link │ … Running
//!   └──────────── edges of this side ─────────────────┘       └── spans of the other ┘
//! ```
//!
//! Parts follow one another, so they add up. An edge ends a part at the moment its event was *told*; how much
//! of it was the call itself is its `work`, the rest is the way from thread to thread. The destination tells
//! its own spans after Running. Within one boot its clock is ours and the link can be measured; between hosts
//! the link is what is left, and does not count as accounted for.

use switchover::Time;
use switchover::message::{Side, Span};

use crate::report::{BlackoutPart, BlackoutTimeline};

/// Edges of one blackout; parts of the same name in a row are one edge, so this bounds what absorbing brings.
const EDGES_MAX: usize = 256;
/// Parts in which the destination is at work.
const AWAIT_READY: &str = "await-ready";
const AWAIT_RUNNING: &str = "await-running";

#[derive(Clone, Copy, Debug)]
struct Edge {
    name: &'static str,
    at: Time,
    work: Option<Time>,
}

/// What the other side told.
#[derive(Debug)]
struct Remote {
    same_clock: bool,
    spans: Vec<Span>,
}

/// Edges of the blackout under way, or of the last one.
#[derive(Debug)]
pub(super) struct Ledger {
    begun: Option<Time>,
    closed: bool,
    edges: Vec<Edge>,
    remote: Option<Remote>,
}

impl Ledger {
    pub(super) fn new() -> Self {
        // Nothing is allocated while the guest stands still.
        Self { begun: None, closed: true, edges: Vec::with_capacity(EDGES_MAX), remote: None }
    }

    /// The pause is requested.
    pub(super) fn begin(&mut self, at: Time) {
        (self.begun, self.closed, self.remote) = (Some(at), false, None);
        self.edges.clear();
    }

    /// The guest runs again, wherever.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// The guest stands still.
    pub(super) fn is_open(&self) -> bool {
        !self.closed
    }

    /// `name` is over, and took so much of its own.
    pub(super) fn edge(&mut self, name: &'static str, at: Time, work: Option<Time>) {
        if self.closed {
            return;
        }
        let full = self.edges.len() >= EDGES_MAX;
        match self.edges.last_mut() {
            Some(last) if last.name == name || full => {
                last.at = last.at.max(at);
                last.work = match (last.work, work) {
                    (Some(one), Some(other)) => Some(one + other),
                    (one, other) => one.or(other),
                };
            }
            Some(last) => {
                let at = at.max(last.at);
                self.edges.push(Edge { name, at, work });
            }
            None => self.edges.push(Edge { name, at, work }),
        }
    }

    /// The destination waits for Ready to be told: its part comes in here.
    pub(super) fn ready(&mut self, at: Time) {
        self.edge(AWAIT_READY, at, None);
    }

    /// As [`ready`](Self::ready), for Running; the last edge.
    pub(super) fn running(&mut self, at: Time) {
        self.edge(AWAIT_RUNNING, at, None);
        self.close();
    }

    /// What the destination told of `attempt`. Names and numbers are a peer's: bounded.
    pub(super) fn told(&mut self, spans: Vec<Span>, same_clock: bool) {
        let sane = |span: &Span| span.end_ns >= span.begin_ns && span.name.len() <= 64;
        let spans: Vec<Span> = spans.into_iter().take(EDGES_MAX).filter(sane).collect();
        self.remote = Some(Remote { same_clock, spans });
    }

    /// The destination has told what it did.
    pub(super) fn is_told(&self) -> bool {
        self.remote.is_some()
    }

    /// All of it; `None` where the guest never arrived.
    pub(super) fn report(&self) -> Option<BlackoutTimeline> {
        let begun = self.begun?;
        let end = self.edges.last().filter(|edge| edge.name == AWAIT_RUNNING)?.at;
        let mut table = Table { begun, parts: Vec::new(), accounted: Time(0) };
        let mut from = begun;
        let spans = self.remote.as_ref().map(|remote| remote.spans.as_slice()).unwrap_or_default();
        let split = spans.iter().position(|span| span.name == SPLIT).unwrap_or(spans.len());
        let (before, after) = spans.split_at(split);
        for edge in &self.edges {
            let there = match edge.name {
                AWAIT_READY => before,
                AWAIT_RUNNING => after.get(1..).unwrap_or_default(),
                _ => &[],
            };
            match self.remote.as_ref().filter(|_| !there.is_empty()) {
                Some(remote) => table.there(from, edge.at, there, remote.same_clock),
                None if matches!(edge.name, AWAIT_READY | AWAIT_RUNNING) => {
                    table.push(Side::Source, edge.name, from, edge.at, None);
                }
                None => table.here(edge.name, from, edge.at, edge.work),
            }
            from = edge.at;
        }
        let total = end.since(begun);
        // A peer's spans may overlap.
        let percent = (table.accounted.0 as f64 * 100.0 / total.0.max(1) as f64).min(100.0);
        Some(BlackoutTimeline {
            total_us: us(total),
            accounted_percent: percent,
            parts: table.parts,
        })
    }
}

/// Separates what the destination did before Ready from what it did after Commit.
pub(crate) const SPLIT: &str = "commit";

struct Table {
    begun: Time,
    parts: Vec<BlackoutPart>,
    accounted: Time,
}

impl Table {
    fn push(&mut self, side: Side, name: &str, from: Time, to: Time, work: Option<Time>) {
        let took = to.since(from);
        let work = work.map(|work| us(work.min(took)));
        let at_us = us(from.since(self.begun));
        self.parts.push(BlackoutPart {
            side,
            name: name.to_owned(),
            at_us,
            us: us(took),
            work_us: work,
        });
    }

    fn here(&mut self, name: &str, from: Time, to: Time, work: Option<Time>) {
        self.accounted = self.accounted + to.since(from);
        self.push(Side::Source, name, from, to, work);
    }

    /// What happened at the destination between two moments here.
    fn there(&mut self, from: Time, to: Time, spans: &[Span], same_clock: bool) {
        let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return };
        if !same_clock {
            return self.apart(from, to, spans);
        }
        // What was sent may have arrived before it was noted here that it was sent.
        let within = |ns: u64| Time(ns).max(from).min(to);
        self.here("link", from, within(first.begin_ns), None);
        for span in spans {
            let work = (span.work_ns > 0).then_some(Time(span.work_ns));
            let (begin, end) = (within(span.begin_ns), within(span.end_ns));
            self.accounted = self.accounted + end.since(begin);
            self.push(Side::Destination, &span.name, begin, end, work);
        }
        self.here("link", within(last.end_ns), to, None);
    }

    /// Their clock is not ours: their spans one after the other, and the rest is the link, both ways.
    fn apart(&mut self, from: Time, to: Time, spans: &[Span]) {
        let mut at = from;
        for span in spans {
            let end = (at + Time(span.end_ns - span.begin_ns)).min(to);
            let work = (span.work_ns > 0).then_some(Time(span.work_ns));
            self.accounted = self.accounted + end.since(at);
            self.push(Side::Destination, &span.name, at, end, work);
            at = end;
        }
        self.push(Side::Source, "link, both ways", at, to, None);
    }
}

fn us(time: Time) -> f64 {
    time.0 as f64 / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(us: u64) -> Time {
        Time(us * 1_000)
    }

    fn span(name: &str, begin: u64, end: u64) -> Span {
        Span { name: name.into(), begin_ns: begin * 1_000, end_ns: end * 1_000, work_ns: 0 }
    }

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new();
        ledger.begin(at(1000));
        ledger.edge("pause", at(1050), Some(at(20)));
        ledger.edge("stop", at(1100), Some(at(30)));
        // A second device, whose answer was stamped earlier than it was seen.
        ledger.edge("stop", at(1090), Some(at(30)));
        ledger.edge("send-state-end", at(1200), None);
        ledger.ready(at(1400));
        ledger.edge("send-commit", at(1410), None);
        ledger.running(at(1500));
        // The guest runs: nothing later belongs to it.
        ledger.edge("late", at(9000), None);
        ledger
    }

    fn spans(offset: u64) -> Vec<Span> {
        let at = |us| us + offset;
        vec![
            span("arrival", at(1220), at(1300)),
            span("validate", at(1300), at(1380)),
            span(SPLIT, at(1420), at(1420)),
            span("start", at(1420), at(1480)),
        ]
    }

    fn names(report: &BlackoutTimeline) -> Vec<(&str, f64)> {
        report.parts.iter().map(|part| (part.name.as_str(), part.us)).collect()
    }

    #[test]
    fn parts_follow_one_another_and_add_up() {
        let mut ledger = ledger();
        ledger.told(spans(0), true);
        let report = ledger.report().unwrap();
        let expected = [
            ("pause", 50.0),
            ("stop", 50.0),
            ("send-state-end", 100.0),
            ("link", 20.0),
            ("arrival", 80.0),
            ("validate", 80.0),
            ("link", 20.0),
            ("send-commit", 10.0),
            ("link", 10.0),
            ("start", 60.0),
            ("link", 20.0),
        ];
        assert_eq!(names(&report), expected);
        assert_eq!(report.total_us, 500.0);
        assert_eq!(report.parts.iter().map(|part| part.us).sum::<f64>(), report.total_us);
        assert_eq!(report.accounted_percent, 100.0);
        assert_eq!(report.parts[1].work_us, Some(50.0), "never more than the part");
        let ends = report.parts.windows(2).all(|two| two[0].at_us + two[0].us == two[1].at_us);
        assert!(ends, "{report:?}");
    }

    #[test]
    fn between_hosts_the_link_is_what_is_left_and_is_not_accounted_for() {
        let mut ledger = ledger();
        ledger.told(spans(1_000_000), false);
        let report = ledger.report().unwrap();
        let links: Vec<f64> =
            report.parts.iter().filter(|p| p.name == "link, both ways").map(|p| p.us).collect();
        assert_eq!(links, [40.0, 30.0]);
        assert_eq!(report.accounted_percent, (500.0 - 70.0) * 100.0 / 500.0);
        assert_eq!(report.parts.iter().map(|part| part.us).sum::<f64>(), 500.0);
    }

    #[test]
    fn a_destination_that_tells_nothing_is_one_part_and_nonsense_is_dropped() {
        let untold = ledger().report().unwrap();
        assert_eq!(untold.accounted_percent, 210.0 * 100.0 / 500.0);
        assert_eq!(
            names(&untold)[3..],
            [("await-ready", 200.0), ("send-commit", 10.0), ("await-running", 90.0)]
        );
        let mut nonsense = ledger();
        nonsense.told(vec![span("backwards", 5, 3), span(&"x".repeat(65), 1, 2)], true);
        assert_eq!(nonsense.report().unwrap(), untold);
        // A clock that is said to be ours and is not.
        for offset in [5, 10_000] {
            let mut elsewhere = ledger();
            elsewhere.told(spans(offset), true);
            let report = elsewhere.report().unwrap();
            assert_eq!(report.parts.iter().map(|part| part.us).sum::<f64>(), 500.0);
        }
    }

    #[test]
    fn a_blackout_that_ended_here_has_no_arrival_to_report() {
        let mut ledger = Ledger::new();
        assert!(ledger.report().is_none());
        ledger.begin(at(0));
        ledger.edge("pause", at(5), None);
        ledger.close();
        assert!(ledger.report().is_none());
        // The next one counts from its own beginning.
        ledger.begin(at(100));
        ledger.edge("pause", at(110), None);
        ledger.running(at(120));
        assert_eq!(ledger.report().unwrap().total_us, 20.0);
    }
}
