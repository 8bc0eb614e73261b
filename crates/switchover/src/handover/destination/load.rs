//! Loading: streams, acknowledgements, validation, and what a roll-back makes of them.

use super::*;

impl Destination {
    pub(super) fn call(&mut self, index: DeviceIndex, target: DeviceState, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        if device.lost {
            return;
        }
        device.pending = Some(DeviceCall::SetState(target));
        out.push(Action::Call(index, DeviceCall::SetState(target)));
    }

    pub(super) fn call_done(
        &mut self,
        index: DeviceIndex,
        call: DeviceCall,
        result: CallResult,
        out: &mut Vec<Action>,
    ) {
        let step = self.step;
        let rolls_back = step == Step::RollBack && call != DeviceCall::Reset;
        let Some(device) = self.device_mut(index) else { return };
        if device.pending == Some(call) {
            device.pending = None;
        }
        match (call, result) {
            (DeviceCall::SetState(target), CallResult::Done) => {
                device.state = target;
                if target == DeviceState::Resuming
                    && let Some(session) = device.next_stream.take()
                {
                    (device.stream, device.loaded) = (session, 0);
                    out.push(Action::BeginStream(index, session));
                }
            }
            (DeviceCall::Reset, CallResult::Done) => device.state = DeviceState::Running,
            (DeviceCall::Info, _) => {}
            (_, CallResult::Failed { state, failure }) => {
                device.state = state.unwrap_or(DeviceState::Error);
                if step >= Step::P2p && step <= Step::Vcpus {
                    // `running` is recorded: the guest starts without this device rather than never.
                    device.lost = true;
                    out.push(Action::ReportDeviceLost(index, failure));
                } else if !rolls_back {
                    self.fail(failure, out);
                }
            }
        }
    }

    /// The source takes the attempt back and goes on: what belonged to it is forgotten, and devices load
    /// new sessions. The attempt's record stays as it is: no Commit of it can come any more, since the next
    /// attempt has another number.
    pub(super) fn roll_back(
        &mut self,
        connection: Connection,
        attempt: Attempt,
        out: &mut Vec<Action>,
    ) {
        if attempt != self.attempt || attempt.0 == 0 {
            return;
        }
        match self.state {
            State::Loading | State::Prepared | State::Expired
                if self.step >= Step::Load && self.step <= Step::Prepared =>
            {
                (self.step, self.unloaded, self.ended) = (Step::RollBack, false, None);
                self.enter(State::Loading, out);
                for device in &mut self.devices {
                    (device.stream, device.loaded) = (Session(0), 0);
                    (device.next_stream, device.unacked) = (None, None);
                }
                out.push(Action::Unload(attempt));
            }
            // The operator was faster, or it is over here: the source hears which it is.
            State::Starting | State::Running | State::Aborted if self.decision.is_some() => {
                self.answer(connection, attempt, out);
            }
            State::Starting => self.asks(connection),
            _ => {}
        }
    }

    pub(super) fn advance_roll_back(&mut self, out: &mut Vec<Action>) {
        let mut there = self.unloaded && self.recording.is_empty();
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            if device.pending.is_some() {
                there = false;
            } else if device.state != DeviceState::Running {
                there = false;
                device.pending = Some(DeviceCall::Reset);
                out.push(Action::Call(index, DeviceCall::Reset));
            }
        }
        if !there {
            return;
        }
        (self.step, self.decision) = (Step::Load, None);
        self.asked.clear();
        if let (true, Some(connection)) = (self.link, self.connection) {
            let attempt = self.attempt;
            out.push(Action::Send(connection, Message::RolledBack { attempt }));
        }
    }

    pub(super) fn advance(&mut self, out: &mut Vec<Action>) {
        match self.step {
            Step::RollBack if self.state == State::Loading => self.advance_roll_back(out),
            Step::Load => self.advance_load(out),
            Step::Validate
                if self.loads(Step::Validate)
                    && self
                        .devices
                        .iter()
                        .all(|d| d.pending.is_none() && d.state == DeviceState::Stop) =>
            {
                self.step = Step::Apply;
                out.push(Action::ApplyMachineState);
            }
            Step::P2p if self.calls_back() => {
                self.step = Step::Run;
                for index in self.indices() {
                    self.call(index, DeviceState::Running, out);
                }
                self.advance(out);
            }
            Step::Run if self.calls_back() => {
                self.step = Step::Vcpus;
                out.push(Action::Start);
            }
            _ => {}
        }
    }

    pub(super) fn calls_back(&self) -> bool {
        self.devices.iter().all(|d| d.pending.is_none())
    }

    pub(super) fn advance_load(&mut self, out: &mut Vec<Action>) {
        if self.state != State::Loading {
            return;
        }
        for index in self.indices() {
            let device = &mut self.devices[usize::from(index.0)];
            if device.next_stream.is_some() && device.pending.is_none() {
                if device.state == DeviceState::Running {
                    self.call(index, DeviceState::Resuming, out);
                } else {
                    // A new stream into a device that loaded an old one: RESUMING is left by reset (F14).
                    device.pending = Some(DeviceCall::Reset);
                    out.push(Action::Call(index, DeviceCall::Reset));
                }
                continue;
            }
            // Invariant 6: acknowledged is only what write() returned for, of the stream that counts.
            if let Some((session, offset)) = device.unacked
                && device.next_stream.is_none()
                && device.stream.0 > 0
                && device.loaded >= offset
            {
                device.unacked = None;
                if let (true, Some(connection)) = (self.link, self.connection) {
                    let ack = Message::SwitchoverAck { device: index, session };
                    out.push(Action::Send(connection, ack));
                }
            }
        }
    }
}
