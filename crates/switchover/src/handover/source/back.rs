//! The ways back to a guest that runs here.

use super::*;

impl Source {
    pub(super) fn cancel(&mut self, out: &mut Vec<Action>) {
        let committing = self.state == State::AwaitReady && self.stop_step >= StopStep::Record;
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

    /// The switchover is taken back, and the migration goes on.
    pub(super) fn take_back(&mut self, reason: Failure, out: &mut Vec<Action>) {
        if self.ending.is_some() {
            return;
        }
        match self.state {
            State::Look | State::Quiesce => self.revoke(out),
            State::StopCopy | State::AwaitReady => {
                let reason = reason.in_phase(self.state.name());
                let attempt = self.attempt;
                out.push(Action::Report(Notice::RollingBack { attempt, reason }));
                self.roll_back(out);
            }
            _ => {}
        }
    }

    /// From StopCopy on there is no way back into the sessions that were read: devices go to RUNNING over
    /// STOP, and both sides begin new sessions. Without an end in sight the migration goes on afterwards.
    pub(super) fn roll_back(&mut self, out: &mut Vec<Action>) {
        self.enter(State::RollingBack, out);
        self.judging = false;
        for limit in [TimeLimit::Ready, TimeLimit::Answer] {
            out.push(Action::Disarm(limit));
        }
        for index in self.indices() {
            out.push(Action::StopReading(index));
        }
        if std::mem::take(&mut self.recorded) {
            self.record(Decision::Never, out);
        }
        let attempt = self.attempt;
        if self.ending.is_none() {
            out.push(Action::Send(Message::RollBack { attempt }));
            return out.push(Action::Arm(TimeLimit::RolledBack));
        }
        self.tell_end(out);
        if self.connection.is_some() {
            out.push(Action::Send(Message::Abort { attempt }));
        }
    }

    pub(super) fn rolled_back(&mut self, attempt: Attempt, out: &mut Vec<Action>) {
        if self.state == State::RollingBack && attempt == self.attempt && self.ending.is_none() {
            self.rolled_back_there = true;
            out.push(Action::Disarm(TimeLimit::RolledBack));
        }
    }

    // --- doubt --------------------------------------------------------------------------------

    /// The destination's recorded word, or the operator's: the guest is here and nowhere else.
    pub(super) fn doubt_ends(&mut self, reason: Failure, out: &mut Vec<Action>) {
        out.push(Action::Disarm(TimeLimit::Answer));
        out.push(Action::Disarm(TimeLimit::Query));
        self.ending = Some(Outcome::Failed(reason));
        if self.vcpus == Vcpus::Gone {
            let what = "the guest was lost with the source's process before it was handed over";
            self.ending = Some(Outcome::Failed(Failure::new(Side::Source, what)));
            self.record(Decision::Never, out);
            return self.finish(out);
        }
        self.roll_back(out);
    }

    /// An answer without a record says nothing about who runs the guest. To Commit it means that the window
    /// had ended: asked about it the destination decides.
    pub(super) fn unknown(
        &mut self,
        connection: Connection,
        reason: Option<Failure>,
        out: &mut Vec<Action>,
    ) {
        if !self.rules.doubt_ends_by_record {
            return self.doubt_ends(Failure::new(Side::Destination, "unknown there"), out);
        }
        out.push(Action::Report(Notice::NoAnswer(reason)));
        if self.state == State::Committed && self.connection == Some(connection) {
            self.enter(State::InDoubt, out);
            self.ask_destination(out);
        }
    }

    pub(super) fn resolve(&mut self, resolve: Resolve, out: &mut Vec<Action>) {
        let refused = match resolve {
            _ if !self.state.is_committed() => Some("nothing is in doubt here"),
            Resolve::RunHere { .. } if self.vcpus == Vcpus::Gone => {
                Some("the guest's memory was lost with the process that held it")
            }
            Resolve::RunHere { force }
                if !force && !self.window_over && self.rules.resolve_after_window =>
            {
                Some("the destination may still obey the Commit: wait for its window to end")
            }
            _ => None,
        };
        if let Some(why) = refused {
            return out.push(Action::Report(Notice::ResolveRefused(why.to_owned())));
        }
        out.push(Action::Report(Notice::Resolved(resolve)));
        match resolve {
            Resolve::RunHere { .. } => {
                let what = "in doubt, and resumed here by the operator";
                self.doubt_ends(Failure::new(Side::Source, what), out);
            }
            Resolve::Discard => self.leave(Outcome::Abandoned, out),
        }
    }

    // --- ends ---------------------------------------------------------------------------------

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
            (TimeLimit::RolledBack, State::RollingBack) if !self.rolled_back_there => {
                "the destination did not roll back"
            }
            (TimeLimit::Answer, State::Committed) => {
                self.window_over = true;
                return self.doubt(out);
            }
            (TimeLimit::Answer, State::InDoubt) => {
                self.window_over = true;
                return;
            }
            (TimeLimit::Query, State::InDoubt) if self.connection.is_some() => {
                return self.ask_destination(out);
            }
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
        if !self.resume(out) {
            return;
        }
        if self.ending.is_some() {
            out.push(Action::Disarm(TimeLimit::RolledBack));
            return self.finish(out);
        }
        if self.rolled_back_there {
            (self.rolled_back_there, self.collected) = (false, false);
            self.enter(State::Precopy, out);
            for index in self.indices() {
                let Some(device) = self.device_mut(index) else { continue };
                (device.restart, device.acked) = (true, false);
            }
            self.advance_precopy(out);
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
                if self.collected && self.rules.restore_dirty {
                    out.push(Action::RestoreDirty);
                }
                out.push(Action::Resume);
            }
            Vcpus::Pausing | Vcpus::Resuming | Vcpus::Gone => {}
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
