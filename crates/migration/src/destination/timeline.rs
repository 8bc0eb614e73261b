//! What the destination does of the blackout, for the source's report: spans from StateEnd to Ready and from
//! Commit to Running. Told after Running, so it costs the guest nothing.

use switchover::Time;
use switchover::message::Span;

/// More than a blackout has; bounds what is told.
const SPANS_MAX: usize = 64;

#[derive(Clone, Copy, Debug)]
struct Edge {
    name: &'static str,
    begin: Time,
    end: Time,
    work: Time,
}

/// The spans of the attempt under way.
#[derive(Debug)]
pub(super) struct Timeline {
    /// The end of the last span; `None` while nothing of a blackout is done here.
    at: Option<Time>,
    edges: Vec<Edge>,
}

impl Timeline {
    pub(super) fn new() -> Self {
        // Nothing is allocated while the guest stands still.
        Self { at: None, edges: Vec::with_capacity(SPANS_MAX) }
    }

    /// StateEnd came.
    pub(super) fn begin(&mut self, at: Time) {
        self.edges.clear();
        self.at = Some(at);
    }

    /// Commit came: what was between is the source's, and the link's.
    pub(super) fn commit(&mut self, at: Time) {
        if self.at.is_some() {
            self.at = Some(at);
            self.edge("commit", at, Time(0));
        }
    }

    /// The guest stands still, as far as this side knows.
    pub(super) fn is_open(&self) -> bool {
        self.at.is_some()
    }

    /// `name` is over and took so much of its own; several of the same name in a row are one.
    pub(super) fn edge(&mut self, name: &'static str, at: Time, work: Time) {
        let Some(begin) = self.at else { return };
        let end = at.max(begin);
        self.at = Some(end);
        let full = self.edges.len() >= SPANS_MAX;
        match self.edges.last_mut() {
            Some(last) if last.name == name || full => {
                (last.end, last.work) = (end, last.work + work);
            }
            _ => self.edges.push(Edge { name, begin, end, work }),
        }
    }

    /// The guest runs here: everything, once.
    pub(super) fn take(&mut self) -> Vec<Span> {
        self.at = None;
        let span = |edge: Edge| Span {
            name: edge.name.to_owned(),
            begin_ns: edge.begin.0,
            end_ns: edge.end.0,
            work_ns: edge.work.min(edge.end.since(edge.begin)).0,
        };
        self.edges.drain(..).map(span).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_follow_one_another_and_commit_begins_anew() {
        let mut timeline = Timeline::new();
        timeline.edge("before", Time(1), Time(0));
        timeline.begin(Time(10));
        timeline.edge("validate", Time(20), Time(3));
        timeline.edge("validate", Time(15), Time(30));
        timeline.commit(Time(50));
        timeline.edge("start", Time(60), Time(1));
        let spans: Vec<_> = timeline
            .take()
            .into_iter()
            .map(|span| (span.name, span.begin_ns, span.end_ns, span.work_ns))
            .collect();
        let expected = [("validate", 10, 20, 10), ("commit", 50, 50, 0), ("start", 50, 60, 1)];
        assert_eq!(
            spans,
            expected.map(|(name, begin, end, work)| (name.to_owned(), begin, end, work))
        );
        timeline.edge("after", Time(99), Time(0));
        assert!(timeline.take().is_empty());
    }
}
