//! What the destination's actions do.

use switchover::handover::source::CallResult;
use switchover::handover::{DeviceCall, DeviceState};
use switchover::message::{DeviceTelemetry, Session};

use super::*;

impl World<'_> {
    pub(super) fn destination_does(&mut self, action: dst::Action) {
        // The destination's own part of a start, in three steps.
        let third = |range: Range| Range {
            min: range.min / 3,
            typical: range.typical / 3,
            max: range.max / 3,
        };
        let hosts = &self.scenario.hosts;
        let (answer, took) = match action {
            dst::Action::Send(connection, message) => {
                return self.send(true, connection.0, message);
            }
            dst::Action::Compare(_) => {
                (dst::Event::Compared(Ok(self.traits.clone())), Time::from_ms(5))
            }
            dst::Action::BeginStream(device, session) => {
                if let Some(there) = self.there.get_mut(Self::index(device)) {
                    (there.stream, there.loaded, there.load_ns) = (session, 0, 0);
                }
                return;
            }
            dst::Action::Call(device, call) => {
                let took = self.call_there(Self::index(device), call);
                (dst::Event::CallDone { device, call, result: CallResult::Done }, took)
            }
            dst::Action::AwaitState(Message::StateEnd { attempt, devices, .. }) => {
                let bytes = devices.iter().map(|end| end.bytes).collect();
                self.awaited = Some((attempt, bytes));
                return self.complete();
            }
            dst::Action::ApplyMachineState => {
                let took = self.draw(third(hosts.validate));
                (dst::Event::MachineStateApplied(Ok(())), took)
            }
            dst::Action::Wire => (dst::Event::Wired(Ok(())), self.draw(third(hosts.start))),
            dst::Action::Record(..) => {
                (dst::Event::Recorded(Ok(())), self.draw(third(hosts.start)))
            }
            dst::Action::Start => (dst::Event::Started(Ok(())), self.draw(third(hosts.start))),
            dst::Action::Unload(_) => {
                self.awaited = None;
                for there in &mut self.there {
                    (there.stream, there.loaded) = (Session(0), 0);
                }
                (dst::Event::Unloaded(Ok(())), Time::from_ms(1))
            }
            dst::Action::Enter(_)
            | dst::Action::Finish(_)
            | dst::Action::ArmWindow
            | dst::Action::AwaitState(_)
            | dst::Action::Hash(..)
            | dst::Action::Resolved(..)
            | dst::Action::ReportDeviceLost(..) => return,
        };
        self.at(self.now + took, What::Destination(answer));
    }

    fn call_there(&mut self, device: usize, call: DeviceCall) -> Time {
        let Some(here) = self.here.get(device) else { return Time(0) };
        let timing = scenario::draw_timing(&here.profile, &mut self.random);
        let there = &mut self.there[device];
        match call {
            DeviceCall::SetState(DeviceState::Resuming) => {
                there.resuming = true;
                Time::from_us(100)
            }
            DeviceCall::SetState(DeviceState::Stop) => {
                there.resuming = false;
                Time(timing.load_warm_ns)
            }
            DeviceCall::SetState(DeviceState::RunningP2p | DeviceState::Running) => {
                there.active = there.loaded > 0;
                Time(timing.to_running_ns)
            }
            DeviceCall::Reset => {
                there.life += 1;
                (there.resuming, there.warm, there.active) = (false, false, false);
                there.free_at = self.now;
                Time(timing.reset_ns)
            }
            DeviceCall::SetState(_) | DeviceCall::Info => Time::from_us(100),
        }
    }

    /// Bytes of a stream are there: they are loaded once those before them are.
    pub(super) fn arrived(&mut self, device: usize, stream: u64, bytes: u64, life: u64) {
        let now = self.now;
        let there = &mut self.there[device];
        // The stream has not begun here, or the device is not ready for it.
        let early = there.stream.0 < stream || (there.stream.0 == stream && !there.resuming);
        if early && self.destination.handover().state() != dst::State::Aborted {
            let life = self.there[device].life;
            return self.at(now + Time::from_ms(1), What::Arrived { device, stream, bytes, life });
        }
        if there.stream.0 != stream || there.life != life {
            return;
        }
        let mut took = there.load_ns(bytes);
        if let Some(slow) = self.here[device].counted.quirks().slow_load
            && self.random.once_in(slow.one_in)
        {
            took = took.saturating_mul(slow.percent) / 100;
        }
        let there = &mut self.there[device];
        if !std::mem::replace(&mut there.warm, true) {
            let cold = scenario::draw_timing(&self.here[device].profile, &mut self.random);
            took = took.saturating_add(cold.load_cold_ns);
        }
        let there = &mut self.there[device];
        there.free_at = there.free_at.max(now) + Time(took);
        let at = there.free_at;
        self.at(at, What::Loaded { device, stream, bytes, life, took: Time(took) });
    }

    pub(super) fn loaded(&mut self, device: usize, stream: u64, bytes: u64, life: u64, took: Time) {
        let there = &mut self.there[device];
        if there.stream.0 != stream || there.life != life {
            return;
        }
        there.loaded += bytes;
        there.load_ns = there.load_ns.saturating_add(took.0);
        let telemetry = DeviceTelemetry {
            device: DeviceIndex(device as u16),
            loaded_bytes: there.loaded,
            load_ns: there.load_ns,
            ..DeviceTelemetry::default()
        };
        let (offset, stream) = (there.loaded, there.stream);
        let index = DeviceIndex(device as u16);
        self.tell_destination(Some(dst::Event::Loaded { device: index, stream, offset }));
        let message = Message::Telemetry {
            devices: vec![telemetry],
            ram_bytes: 0,
            populated_bytes: None,
            populate_ns: 0,
            mapped_bytes: None,
            map_ns: 0,
            first_heartbeat_ns: None,
            boot_id: None,
        };
        self.send(true, self.connection, message);
        self.complete();
    }

    fn complete(&mut self) {
        let Some((attempt, bytes)) = &self.awaited else { return };
        if self.there.iter().zip(bytes).all(|(there, bytes)| there.loaded == *bytes) {
            let event = dst::Event::StateComplete(*attempt);
            self.awaited = None;
            self.at(self.now, What::Destination(event));
        }
    }
}
