//! The way of a switchover: look, quiesce, stop-copy, ready, commit.

use super::*;

impl Source {
    pub(super) fn switchover(&mut self, out: &mut Vec<Action>) {
        if self.state != State::Precopy || self.ending.is_some() || !self.all_ready() {
            return;
        }
        self.attempt.0 += 1;
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
            (State::Look | State::Quiesce, Verdict::Go) if self.unread_initial() => {
                self.revoke(out);
            }
            (State::Look, Verdict::Go | Verdict::Absorb) => self.quiesce(out),
            (State::Quiesce, Verdict::Go | Verdict::Absorb) => self.stop_copy(out),
            (State::Look | State::Quiesce, Verdict::Revoke) => self.revoke(out),
            (State::AwaitReady, Verdict::Go) => {
                self.stop_step = StopStep::Record;
                self.recorded = true;
                out.push(Action::Record(Decision::Committing, self.attempt));
            }
            (State::AwaitReady, Verdict::Absorb | Verdict::Revoke) => {
                let what = "the destination was ready too late for the downtime limit";
                self.fail(Failure::new(Side::Source, what), out);
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
            self.judge_commit(out);
        }
    }

    pub(super) fn judge_commit(&mut self, out: &mut Vec<Action>) {
        self.stop_step = StopStep::Judge;
        self.judging = true;
        out.push(Action::Judge(Point::Commit));
    }

    pub(super) fn recorded(&mut self, answer: Answer, out: &mut Vec<Action>) {
        if self.state != State::AwaitReady || self.stop_step != StopStep::Record {
            return;
        }
        match answer {
            // A link that went meanwhile has set `ending`: nothing was sent, so there is no doubt.
            Ok(()) if self.ending.is_none() && self.connection.is_some() => self.commit(out),
            Ok(()) => {}
            Err(failure) => self.fail(failure, out),
        }
    }

    /// The point of no return. The record `committing` is written; after the next action the
    /// destination may run the guest, whatever this side hears or does not hear. From here on the
    /// source resumes only on the destination's `Never`, and memory, devices and machine state stay
    /// as they are until `Running`.
    pub(super) fn commit(&mut self, out: &mut Vec<Action>) {
        self.enter(State::Committed, out);
        out.push(Action::Send(Message::Commit { attempt: self.attempt }));
        out.push(Action::Arm(TimeLimit::Answer));
    }

    pub(super) fn running(&mut self, attempt: Attempt, out: &mut Vec<Action>) {
        // Not only after Commit: an operator may have started a Prepared destination. Wherever the
        // guest still stands here, it must not run here any more.
        let stands = self.vcpus == Vcpus::Paused;
        let ours = attempt == self.attempt && attempt.0 > 0;
        let left = self.state.is_committed()
            || matches!(self.state, State::AwaitReady | State::RollingBack);
        if !ours || !stands || !left {
            return;
        }
        out.push(Action::Disarm(TimeLimit::Ready));
        out.push(Action::Disarm(TimeLimit::Answer));
        self.enter(State::Done, out);
        out.push(Action::Finish(Outcome::Completed));
    }

    pub(super) fn never(&mut self, attempt: Attempt, reason: Failure, out: &mut Vec<Action>) {
        if attempt != self.attempt {
            return;
        }
        match self.state {
            State::Committed | State::InDoubt => {
                out.push(Action::Disarm(TimeLimit::Answer));
                self.ending = Some(Outcome::Failed(reason));
                self.roll_back(out);
            }
            State::StopCopy | State::AwaitReady => self.fail(reason, out),
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
            self.stop_step = StopStep::Sync;
            out.push(Action::Sync(Sync::Final));
        }
    }
}
