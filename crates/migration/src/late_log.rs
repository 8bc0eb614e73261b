//! Log lines of a blackout: kept while the guest stands still, since a log may be slow, and written afterwards.

use switchover::Time;
use switchover::message::Side;

use crate::clock;

/// Lines that are kept; what comes on top in one blackout is counted.
const LINES_MAX: usize = 128;
/// A blackout that lasts longer has missed whatever was promised, and whoever looks wants to know.
const PATIENCE: Time = Time::from_ms(1_000);

/// Lines that wait.
#[derive(Debug)]
pub(crate) struct LateLog {
    side: Side,
    lines: Vec<(Time, &'static str, String)>,
    dropped: u64,
}

impl LateLog {
    pub(crate) fn new(side: Side) -> Self {
        // Nothing is allocated while the guest stands still.
        Self { side, lines: Vec::with_capacity(LINES_MAX), dropped: 0 }
    }

    /// Keeps a line.
    pub(crate) fn keep(&mut self, event: &'static str, detail: String) {
        if self.lines.len() < LINES_MAX {
            self.lines.push((clock::now(), event, detail));
        } else {
            self.dropped += 1;
        }
    }

    /// Writes what was kept: once the guest runs again, or stands still for too long.
    pub(crate) fn flush(&mut self, stands_still: bool) {
        let now = clock::now();
        let old = self.lines.first().is_some_and(|(at, ..)| now.since(*at) >= PATIENCE);
        if stands_still && !old {
            return;
        }
        for (at, event, detail) in self.lines.drain(..) {
            let ago_ms = now.since(at).as_ms();
            tracing::info!(event, detail, ago_ms, "{}", self.side);
        }
        if std::mem::take(&mut self.dropped) > 0 {
            tracing::warn!("lines of a blackout were dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_wait_for_the_guest_and_are_bounded() {
        let mut log = LateLog::new(Side::Source);
        (0..200).for_each(|_| log.keep("phase", "look".into()));
        log.flush(true);
        assert_eq!((log.lines.len(), log.dropped), (LINES_MAX, 72));
        log.flush(false);
        assert_eq!((log.lines.len(), log.dropped), (0, 0));
        log.keep("phase", "look".into());
        log.lines[0].0 = Time(0);
        log.flush(true);
        assert!(log.lines.is_empty(), "a blackout of seconds is no secret");
    }
}
