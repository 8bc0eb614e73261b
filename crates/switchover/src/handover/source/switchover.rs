//! The way of a switchover: look, quiesce, stop-copy, ready, commit.

use super::*;

impl Source {
    pub(super) fn switchover(&mut self, out: &mut Vec<Action>) {
        if self.state != State::Precopy || self.ending.is_some() || !self.all_ready() {
            return;
        }
        self.attempt.0 += 1;
        (self.rolled_back_there, self.window_over) = (false, false);
        (self.synced, self.judging, self.absorbing) = (false, false, false);
        self.enter(State::Look, out);
        self.vcpus = Vcpus::Pausing;
        out.push(Action::Pause);
    }

    pub(super) fn look(&mut self, out: &mut Vec<Action>) {
        if self.state != State::Look || self.ending.is_some() {
            return;
        }
        self.collected = true;
        out.push(Action::Sync(Sync::Provisional));
        self.ask_all(out);
    }

    /// Asks every device in PRE_COPY or PRE_COPY_P2P anew.
    pub(super) fn ask_all(&mut self, out: &mut Vec<Action>) {
        let mut asked = false;
        for index in self.indices() {
            let can_ask = self.can_ask(index);
            let Some(device) = self.device_mut(index) else { continue };
            device.asked = !can_ask;
            if can_ask {
                asked = true;
                // A poll under way may have been answered before the pause: only a new one counts.
                device.stale_question = device.pending == Some(DeviceCall::Info);
                if device.pending.is_none() {
                    self.call(index, DeviceCall::Info, out);
                }
            }
        }
        if asked {
            out.push(Action::Arm(TimeLimit::Look));
        }
    }

    pub(super) fn all_asked(&self) -> bool {
        self.devices.iter().all(|d| d.asked || d.lost)
    }

    pub(super) fn verdict(&mut self, verdict: Verdict, out: &mut Vec<Action>) {
        if !self.judging {
            return;
        }
        self.judging = false;
        if self.ending.is_some() {
            return;
        }
        match (self.state, verdict) {
            (State::Look | State::Quiesce, Verdict::Absorb) if self.unread_initial() => {
                self.absorbing = true;
                out.push(Action::Arm(TimeLimit::Absorb));
                out.push(Action::Report(Notice::Absorbing(self.attempt)));
                for index in self.indices() {
                    let device = &self.devices[usize::from(index.0)];
                    if device.has_session() && !device.ready() {
                        out.push(Action::Read(index));
                    }
                }
            }
            // Invariant 5: whatever the verdict, known unread initial data does not go into STOP_COPY.
            (State::Look | State::Quiesce, Verdict::Go)
                if self.unread_initial() && self.rules.no_unread_into_stop_copy =>
            {
                self.revoke(out);
            }
            (State::Look, Verdict::Go | Verdict::Absorb) => self.quiesce(out),
            (State::Quiesce, Verdict::Go | Verdict::Absorb) => self.stop_copy(out),
            (State::Look | State::Quiesce, Verdict::Revoke) => self.revoke(out),
            (State::StopCopy, Verdict::Go) => match self.stop_step {
                StopStep::JudgeSync if self.rules.final_sync => {
                    self.stop_step = StopStep::Sync;
                    out.push(Action::Sync(Sync::Final));
                }
                StopStep::JudgeSync => self.send_final_ram(out),
                StopStep::JudgeMachineState => {
                    self.stop_step = StopStep::MachineState;
                    self.detached = true;
                    out.push(Action::SaveMachineState);
                }
                _ => {}
            },
            (State::AwaitReady, Verdict::Go) => self.commit(out),
            (State::StopCopy | State::AwaitReady, Verdict::Absorb | Verdict::Revoke) => {
                let what = "the rest of the switchover does not fit into the downtime limit";
                self.take_back(Failure::new(Side::Source, what), out);
            }
            _ => {}
        }
    }

    pub(super) fn quiesce(&mut self, out: &mut Vec<Action>) {
        self.enter(State::Quiesce, out);
        if !self.devices.iter().any(|d| d.traits.p2p && !d.lost) {
            return self.stop_copy(out);
        }
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            device.asked = !(device.traits.p2p && device.has_session());
            if device.traits.p2p && !device.lost {
                let target = device.p2p_state();
                self.call(index, DeviceCall::SetState(target), out);
            }
        }
    }

    pub(super) fn revoke(&mut self, out: &mut Vec<Action>) {
        self.absorbing = false;
        self.enter(State::Revoking, out);
        out.push(Action::Disarm(TimeLimit::Absorb));
        out.push(Action::Disarm(TimeLimit::Look));
    }

    pub(super) fn stop_copy(&mut self, out: &mut Vec<Action>) {
        self.enter(State::StopCopy, out);
        self.stop_step = StopStep::Devices;
        out.push(Action::Send(Message::StopCopyBegin { attempt: self.attempt }));
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            device.ended = device.lost;
            if !device.lost {
                self.call(index, DeviceCall::SetState(DeviceState::StopCopy), out);
            }
        }
    }

    pub(super) fn ready(&mut self, attempt: Attempt, out: &mut Vec<Action>) {
        let awaited = self.state == State::AwaitReady && self.stop_step == StopStep::AwaitReady;
        if !awaited || attempt != self.attempt || self.ending.is_some() {
            return;
        }
        out.push(Action::Disarm(TimeLimit::Ready));
        if self.features.verify {
            self.stop_step = StopStep::Verify;
            out.push(Action::Verify(self.attempt));
        } else {
            self.record_committing(out);
        }
    }

    pub(super) fn record_committing(&mut self, out: &mut Vec<Action>) {
        self.stop_step = StopStep::Record;
        self.recorded = true;
        self.record(Decision::Committing, out);
    }

    pub(super) fn judge_step(&mut self, step: StopStep, point: Point, out: &mut Vec<Action>) {
        self.stop_step = step;
        self.judging = true;
        out.push(Action::Judge(point));
    }

    pub(super) fn send_final_ram(&mut self, out: &mut Vec<Action>) {
        self.stop_step = StopStep::Ram;
        out.push(Action::SendFinalRam);
    }

    pub(super) fn recorded(&mut self, answer: Answer, out: &mut Vec<Action>) {
        let speaks_of = self.recording.pop_front();
        let awaited = self.state == State::AwaitReady && self.stop_step == StopStep::Record;
        if !awaited || speaks_of != Some((Decision::Committing, self.attempt)) {
            return;
        }
        match answer {
            // A link that went meanwhile has set `ending`: nothing was sent, so there is no doubt.
            // The last look at the time comes after the record, which takes some.
            Ok(()) if self.ending.is_none() && self.connection.is_some() => {
                self.judge_step(StopStep::Judge, Point::Commit, out);
            }
            Ok(()) => {}
            Err(failure) => self.fail(failure, out),
        }
    }

    /// The point of no return. The record `committing` is written; after the next action the
    /// destination may run the guest, whatever this side hears or does not hear. From here on the
    /// source resumes only on the destination's `Never` or by its operator, and memory, devices and machine state stay
    /// as they are until `Running`.
    pub(super) fn commit(&mut self, out: &mut Vec<Action>) {
        self.enter(State::Committed, out);
        out.push(Action::Send(Message::Commit { attempt: self.attempt }));
        out.push(Action::Arm(TimeLimit::Answer));
    }

    pub(super) fn running(&mut self, attempt: Attempt, out: &mut Vec<Action>) {
        // Not only after Commit: an operator may have started a Prepared destination. Wherever the
        // guest still stands here, it must not run here any more.
        let stands = matches!(self.vcpus, Vcpus::Paused | Vcpus::Gone);
        let ours = attempt == self.attempt && attempt.0 > 0;
        let left = self.state.is_committed()
            || matches!(self.state, State::AwaitReady | State::RollingBack);
        if ours && !stands {
            out.push(Action::Report(Notice::RunsThereToo(attempt)));
        }
        if !ours || !stands || !left {
            return;
        }
        self.leave(Outcome::Completed, out);
    }

    /// The guest is not here any more.
    pub(super) fn leave(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        for limit in [TimeLimit::Ready, TimeLimit::RolledBack, TimeLimit::Answer, TimeLimit::Query]
        {
            out.push(Action::Disarm(limit));
        }
        self.record(Decision::Gone, out);
        self.enter(State::Done, out);
        out.push(Action::Finish(outcome));
    }

    pub(super) fn never(&mut self, attempt: Attempt, reason: Failure, out: &mut Vec<Action>) {
        if attempt != self.attempt {
            return;
        }
        match self.state {
            State::Committed | State::InDoubt => self.doubt_ends(reason, out),
            State::StopCopy | State::AwaitReady | State::RollingBack => self.fail(reason, out),
            _ => {}
        }
    }

    pub(super) fn advance_look(&mut self, point: Point, out: &mut Vec<Action>) {
        if self.vcpus != Vcpus::Paused || self.judging || !self.synced {
            return;
        }
        // A device whose session died while we stopped cannot be taken along.
        if self.devices.iter().any(|d| d.restart) {
            return self.revoke(out);
        }
        // A question asked before the pause came back: ask the one that counts.
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if !device.asked && device.pending.is_none() && self.can_ask(index) {
                self.call(index, DeviceCall::Info, out);
                out.push(Action::Arm(TimeLimit::Look));
            }
        }
        if !self.all_asked() {
            return;
        }
        if self.absorbing {
            if self.unread_initial() {
                return;
            }
            // Everything absorbed is loaded: look again before the next step.
            self.absorbing = false;
            out.push(Action::Disarm(TimeLimit::Absorb));
            return self.ask_all(out);
        }
        out.push(Action::Disarm(TimeLimit::Look));
        self.judging = true;
        out.push(Action::Judge(point));
    }

    pub(super) fn advance_quiesce(&mut self, out: &mut Vec<Action>) {
        if self.devices.iter().any(|d| d.restart) {
            return self.revoke(out);
        }
        let there =
            self.devices.iter().all(|d| d.lost || !d.traits.p2p || d.state == d.p2p_state());
        if there {
            self.advance_look(Point::Quiesce, out);
        }
    }

    pub(super) fn advance_stop_copy(&mut self, out: &mut Vec<Action>) {
        if self.stop_step == StopStep::Devices && self.devices.iter().all(|d| d.ended) {
            self.judge_step(StopStep::JudgeSync, Point::FinalSync, out);
        }
    }
}
