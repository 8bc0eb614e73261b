//! Setup, sessions and acknowledgements.

use super::*;

impl Source {
    pub(super) fn devices_to_precopy(&mut self, out: &mut Vec<Action>) {
        for index in self.indices() {
            if self.devices[usize::from(index.0)].traits.pre_copy {
                self.call(index, DeviceCall::SetState(DeviceState::PreCopy), out);
            }
        }
    }

    pub(super) fn begin_session(&mut self, index: DeviceIndex, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        device.session.0 += 1;
        (device.sent, device.acked, device.unread) = (false, false, device.traits.pre_copy);
        (device.ended, device.restart) = (false, false);
        let session = device.session;
        let read = device.traits.pre_copy;
        out.push(Action::Send(Message::SessionBegin { device: index, session }));
        if read {
            out.push(Action::Read(index));
        }
    }

    pub(super) fn info(
        &mut self,
        index: DeviceIndex,
        answer: InfoAnswer,
        offset: u64,
        out: &mut Vec<Action>,
    ) {
        let anew = self.rules.look_asks_anew;
        let late = self.vcpus != Vcpus::Running || self.state > State::Precopy;
        let Some(device) = self.device_mut(index) else { return };
        if device.pending == Some(DeviceCall::Info) {
            device.pending = None;
        }
        device.asked = !(std::mem::take(&mut device.stale_question) && anew);
        if device.restart {
            return;
        }
        let InfoAnswer::Known { unread_initial, reinit } = answer else {
            device.unknown = true;
            return;
        };
        device.unknown = false;
        device.unread = unread_initial;
        if reinit {
            device.session.0 += 1;
            (device.sent, device.acked) = (false, false);
            let session = device.session;
            out.push(Action::Send(Message::Reinit { device: index, session, offset }));
            out.push(Action::Report(Notice::Reinit { device: index, session, late }));
        }
        if !unread_initial {
            self.initial_read(index, offset, out);
        }
    }

    /// All initial data of the session was read and handed to the channel: say so, once a session.
    pub(super) fn initial_read(&mut self, index: DeviceIndex, offset: u64, out: &mut Vec<Action>) {
        let Some(device) = self.device_mut(index) else { return };
        if device.session.0 == 0 || device.restart {
            return;
        }
        device.unread = false;
        if !device.sent {
            device.sent = true;
            let session = device.session;
            out.push(Action::Send(Message::InitialDataSent { device: index, session, offset }));
        }
    }

    pub(super) fn acked(&mut self, index: DeviceIndex, session: Session, out: &mut Vec<Action>) {
        let any = !self.rules.acks_name_sessions;
        let Some(device) = self.device_mut(index) else { return };
        if (device.session == session || any) && device.sent && !device.restart {
            device.acked = true;
            out.push(Action::Report(Notice::Acked { device: index, session }));
        } else {
            out.push(Action::Report(Notice::StaleAck { device: index, session }));
        }
    }

    /// The guest reset a device, or its stream was found dead. Where it is now is taken as unknown, and
    /// the way back leads over RUNNING: only so the next PRE_COPY surely begins a stream of its own,
    /// however often and late the reset is told.
    pub(super) fn device_reset(&mut self, index: DeviceIndex, out: &mut Vec<Action>) {
        let in_setup = self.state == State::Setup;
        let Some(device) = self.device_mut(index) else { return };
        if device.session.0 == 0 && !in_setup {
            return;
        }
        device.state = DeviceState::Error;
        device.reset_meanwhile = device.pending.is_some();
        (device.restart, device.acked, device.asked) = (true, false, true);
        out.push(Action::StopReading(index));
        if matches!(self.state, State::StopCopy | State::AwaitReady) {
            let what = "the guest reset a device at the moment of the switchover";
            self.take_back(Failure::new(Side::Source, what), out);
        }
    }

    pub(super) fn advance_setup(&mut self, out: &mut Vec<Action>) {
        if let Some(Outcome::DryRun) = self.ending {
            return self.stop_migrating(out);
        }
        let there = self.devices.iter().all(|d| {
            d.pending.is_none()
                && (!d.traits.pre_copy || d.state == DeviceState::PreCopy || d.restart)
        });
        if self.at_setup(SetupStep::Devices) && there {
            self.enter(State::Precopy, out);
            for index in self.indices() {
                if !self.devices[usize::from(index.0)].restart {
                    self.begin_session(index, out);
                }
            }
            self.advance_precopy(out);
        }
    }

    pub(super) fn advance_precopy(&mut self, out: &mut Vec<Action>) {
        for index in self.indices() {
            let device = &self.devices[usize::from(index.0)];
            if !device.restart || device.pending.is_some() || device.lost {
                continue;
            }
            let target = match device.state {
                DeviceState::Running if device.traits.pre_copy => DeviceState::PreCopy,
                DeviceState::PreCopy | DeviceState::Running => {
                    self.begin_session(index, out);
                    continue;
                }
                _ => DeviceState::Running,
            };
            self.call(index, DeviceCall::SetState(target), out);
        }
    }
}
