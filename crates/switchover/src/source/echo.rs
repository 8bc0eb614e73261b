//! Echoes: what one message there and one back takes, asked while the guest runs.
//!
//! Hello and Accept are one sample, with the set-up of the connection in it; one that was slow would keep a tight limit
//! out of reach for as long as it counts. Some echoes follow early in the first pass, then one now and then, never one
//! with the vCPUs paused. One is under way at a time: an answer to another, or to none, says nothing.

use super::*;

/// Echoes that follow each other closely.
const EARLY: u64 = 8;
/// How closely.
const EARLY_INTERVAL: Time = Time::from_ms(5);
/// From then on.
const INTERVAL: Time = Time::from_ms(500);
/// What is not answered by then is not waited for.
const LOST: Time = Time::from_ms(1000);

#[derive(Clone, Debug, Default)]
pub(super) struct Echoes {
    /// Of the last echo, never twice in a migration; the first is 1.
    number: u64,
    /// How many came back over this connection.
    heard: u64,
    /// When it was sent, as long as nothing came back.
    sent: Option<Time>,
    due: Time,
    /// What the round trip before took.
    before: Option<Time>,
}

impl Echoes {
    /// A new connection: what comes back of the one before says nothing.
    pub(super) fn begin(&mut self) {
        *self = Self { number: self.number, ..Self::default() };
    }
}

impl Source {
    /// Where a switchover may follow at once, none: it would wake up threads in the blackout.
    pub(super) fn echo_timer(&self) -> Option<Time> {
        let calm = !matches!(self.pass_step, Pass::Synced | Pass::Looking(_));
        let asks = self.handover.features().echo && calm;
        asks.then(|| self.echoes.sent.map_or(self.echoes.due, |sent| sent + LOST))
    }

    pub(super) fn send_echo(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.echo_timer().is_some_and(|due| due <= now) {
            let echoes = &mut self.echoes;
            // Accept is all there is to know by now.
            let accept = echoes.before.filter(|_| echoes.sent.is_some() && echoes.heard == 0);
            if let Some(took) = accept {
                echoes.before = None;
                self.estimator.took(Step::RoundTrip, took);
            }
            echoes.number += 1;
            echoes.sent = Some(now);
            let message = Message::Echo { number: echoes.number };
            out.push(Action::Handover(handover::Action::Send(message)));
        }
    }

    /// Accept came so long after Hello.
    pub(super) fn note_accept(&mut self, took: Time, echo: bool) {
        match echo {
            true => self.echoes.before = Some(took),
            false => self.estimator.took(Step::RoundTrip, took),
        }
    }

    /// The quicker of two in a row counts: either may have waited for a thread that had something else to do.
    pub(super) fn note_echoed(&mut self, now: Time, number: u64) {
        let runs = self.handover.state() == State::Precopy;
        let echoes = &mut self.echoes;
        if number != echoes.number {
            return;
        }
        let Some(sent) = echoes.sent.take() else { return };
        echoes.heard += 1;
        echoes.due = now + if echoes.heard < EARLY { EARLY_INTERVAL } else { INTERVAL };
        // One that came back in a blackout waited behind what is sent then.
        if runs {
            let took = now.since(sent);
            let before = echoes.before.replace(took).unwrap_or(took);
            self.estimator.took(Step::RoundTrip, took.min(before));
        }
    }
}
