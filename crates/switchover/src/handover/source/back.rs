//! The ways back to a guest that runs here.

use super::*;

impl Source {
    pub(super) fn cancel(&mut self, out: &mut Vec<Action>) {
        let committing = self.state == State::AwaitReady && self.stop_step == StopStep::Record;
        if self.state.is_committed() || committing {
            out.push(Action::Report(Notice::CancelTooLate));
        } else {
            self.end(Outcome::Cancelled, out);
        }
    }

    pub(super) fn fail(&mut self, failure: Failure, out: &mut Vec<Action>) {
        let phase = self.state.name();
        self.end(Outcome::Failed(failure.in_phase(phase)), out);
    }

    /// Heads for an end with the guest running here; after Commit that is not ours to decide.
    pub(super) fn end(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        if self.state.is_end() || self.state.is_committed() || self.ending.is_some() {
            return;
        }
        self.ending = Some(outcome);
        match self.state {
            State::Setup | State::Precopy => self.stop_migrating(out),
            State::Look | State::Quiesce => self.revoke(out),
            State::StopCopy | State::AwaitReady => self.roll_back(out),
            _ => {}
        }
    }

    pub(super) fn roll_back(&mut self, out: &mut Vec<Action>) {
        self.enter(State::RollingBack, out);
        for limit in [TimeLimit::Ready, TimeLimit::Answer] {
            out.push(Action::Disarm(limit));
        }
        for index in self.indices() {
            out.push(Action::StopReading(index));
        }
        if self.recorded {
            self.recorded = false;
            out.push(Action::Record(Decision::Never, self.attempt));
        }
        self.tell_end(out);
        if self.connection.is_some() {
            out.push(Action::Send(Message::Abort { attempt: self.attempt }));
        }
    }

    pub(super) fn stop_migrating(&mut self, out: &mut Vec<Action>) {
        self.enter(State::Cancelling, out);
        out.push(Action::Disarm(TimeLimit::Setup));
        self.tell_end(out);
        for index in self.indices() {
            out.push(Action::StopReading(index));
        }
    }

    pub(super) fn timeout(&mut self, limit: TimeLimit, out: &mut Vec<Action>) {
        let what = match (limit, self.state) {
            (TimeLimit::Setup, State::Setup) => "the destination did not answer Hello or Describe",
            (TimeLimit::Ready, State::AwaitReady) => "the destination did not become ready",
            // A device that does not answer now is no device to stop: back, and it can take its time. A move
            // that is under way has no such limit: going back would wait for it all the same.
            (TimeLimit::Look, State::Look | State::Quiesce) if !self.all_asked() => {
                return self.revoke(out);
            }
            (TimeLimit::Absorb, State::Look | State::Quiesce) if self.absorbing => {
                return self.revoke(out);
            }
            (TimeLimit::Answer, State::Committed) => return self.doubt(out),
            _ => return,
        };
        self.fail(Failure::new(Side::Destination, format!("{what} in time")), out);
    }

    pub(super) fn advance_revoking(&mut self, out: &mut Vec<Action>) {
        let mut there = self.vcpus != Vcpus::Pausing;
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            let moving =
                matches!(device.pending, Some(DeviceCall::SetState(_) | DeviceCall::Reset));
            // A device whose session died begins anew once the guest runs: nothing to do for it here.
            if device.lost || (device.restart && !moving) {
                continue;
            }
            let quiesced =
                matches!(device.state, DeviceState::PreCopyP2p | DeviceState::RunningP2p);
            let target = device.precopy_state();
            if moving {
                there = false;
            } else if quiesced {
                there = false;
                if device.pending.is_none() {
                    self.call(index, DeviceCall::SetState(target), out);
                }
            } else if !matches!(device.state, DeviceState::PreCopy | DeviceState::Running) {
                there = false;
                if device.pending.is_none() {
                    let failure = match &self.ending {
                        Some(Outcome::Failed(failure)) => failure.clone(),
                        _ => Failure::new(Side::Source, "the device is in ERROR"),
                    };
                    out.push(Action::Report(Notice::DeviceStateLost { device: index, failure }));
                    self.call(index, DeviceCall::Reset, out);
                }
            }
        }
        if there && self.resume(out) {
            self.collected = false;
            out.push(Action::Report(Notice::Revoked(self.attempt)));
            if self.connection.is_some() {
                out.push(Action::Send(Message::Revoked { attempt: self.attempt }));
            }
            if self.ending.is_some() {
                self.stop_migrating(out);
                return self.advance_cancelling(out);
            }
            self.enter(State::Precopy, out);
            for index in self.indices() {
                if self.can_ask(index) {
                    out.push(Action::Read(index));
                }
            }
            self.advance_precopy(out);
        }
    }

    pub(super) fn advance_rolling_back(&mut self, out: &mut Vec<Action>) {
        if self.detached {
            if !self.reattaching {
                self.reattaching = true;
                out.push(Action::Reattach);
            }
            return;
        }
        if !self.devices_run(out) {
            return;
        }
        if self.resume(out) {
            self.finish(out);
        }
    }

    /// All P2P-capable devices to RUNNING_P2P, then all to RUNNING; true when they are there.
    pub(super) fn devices_run(&mut self, out: &mut Vec<Action>) -> bool {
        let waits = |d: &Device| {
            !d.lost
                && d.traits.p2p
                && !matches!(d.state, DeviceState::RunningP2p | DeviceState::Running)
        };
        let p2p_first = self.devices.iter().any(waits);
        let mut there = true;
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if device.lost || device.state == DeviceState::Running && device.pending.is_none() {
                continue;
            }
            there = false;
            if device.pending.is_some() {
                continue;
            }
            if waits(device) {
                self.call(index, DeviceCall::SetState(DeviceState::RunningP2p), out);
            } else if !p2p_first {
                self.call(index, DeviceCall::SetState(DeviceState::Running), out);
            }
        }
        there
    }

    pub(super) fn advance_cancelling(&mut self, out: &mut Vec<Action>) {
        // Tracking that starts after the end would never be stopped.
        let mut there = !self.tracking_asked;
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if device.lost {
                continue;
            }
            if device.pending.is_some() {
                there = false;
            } else if device.state != DeviceState::Running {
                there = false;
                self.call(index, DeviceCall::SetState(DeviceState::Running), out);
            }
        }
        if there {
            self.finish(out);
        }
    }

    /// Asks for the vCPUs where they do not run; true once they do.
    pub(super) fn resume(&mut self, out: &mut Vec<Action>) -> bool {
        match self.vcpus {
            Vcpus::Running => return true,
            Vcpus::Paused => {
                self.vcpus = Vcpus::Resuming;
                if self.collected {
                    out.push(Action::RestoreDirty);
                }
                out.push(Action::Resume);
            }
            Vcpus::Pausing | Vcpus::Resuming => {}
        }
        false
    }

    /// Tells the destination why it ends: at once, since what follows may take its time.
    fn tell_end(&mut self, out: &mut Vec<Action>) {
        if std::mem::replace(&mut self.end_told, true) || self.connection.is_none() {
            return;
        }
        out.push(Action::Send(match &self.ending {
            Some(Outcome::Failed(reason)) => Message::Failed { reason: reason.clone() },
            _ => Message::Cancel,
        }));
    }

    pub(super) fn finish(&mut self, out: &mut Vec<Action>) {
        if self.tracking {
            self.tracking = false;
            out.push(Action::StopTracking);
        }
        let outcome = self.ending.clone().unwrap_or(Outcome::Cancelled);
        self.tell_end(out);
        let end = match outcome {
            Outcome::Failed(_) => State::Failed,
            _ => State::Cancelled,
        };
        self.enter(end, out);
        out.push(Action::Finish(outcome));
    }
}
