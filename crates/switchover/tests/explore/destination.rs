//! What the destination does, and the threads it tells.

use super::*;

impl Model {
    pub(super) fn tell_destination(&mut self, event: dst::Event) {
        let Some(destination) = self.destination.as_mut() else { return };
        let before = destination.state();
        let by_commit = match &event {
            dst::Event::Message(connection, Message::Commit { attempt }) => {
                Some((connection.0, *attempt))
            }
            _ => None,
        };
        let attempt = destination.attempt();
        let mut actions = Vec::new();
        destination.handle(event, &mut actions);
        let obeyed = before != dst::State::Starting && destination.state() == dst::State::Starting;
        if let Some((connection, of)) = by_commit.filter(|_| obeyed) {
            self.require(connection == self.heard, "invariant 6: a Commit over an old connection");
            self.require(of == attempt, "invariant 6: a Commit of another attempt");
        }
        if self.state_there() != Some(dst::State::Prepared) {
            self.window = false;
        }
        actions.into_iter().for_each(|action| self.destination_does(action));
        self.check();
    }

    pub(super) fn destination_does(&mut self, action: dst::Action) {
        use dst::Action::*;
        match action {
            Send(connection, message) => self.destination_sends(connection, message),
            Compare(_) => self.work_there.push_back(WorkThere::Compare),
            BeginStream(_, session) => {
                if let Some(device) = &mut self.device_there {
                    (device.stream, device.loaded) = (session, 0);
                }
            }
            Call(_, call) => self.device_work_there.push_back(call),
            AwaitState(Message::StateEnd { attempt, devices, .. }) => {
                self.awaited = Some((attempt, devices.first().map_or(0, |end| end.bytes)));
            }
            ApplyMachineState => self.work_there.push_back(WorkThere::Apply),
            Wire => self.work_there.push_back(WorkThere::Wire),
            Record(decision, attempt) => {
                if decision == Decision::Never {
                    self.took_back |= self.guest_here;
                }
                self.disk_there.push_back((decision, attempt));
            }
            ArmWindow => self.window = true,
            Unload(_) => self.work_there.push_back(WorkThere::Unload),
            Start => self.work_there.push_back(WorkThere::Start),
            Finish(Outcome::Completed) => {}
            Finish(_) => self.nothing_there(),
            Enter(_) | AwaitState(_) | Hash(..) | ReportDeviceLost(..) | Resolved(..) => {}
        }
    }

    /// Nothing of it will run there: threads end, devices are reset, memory is empty.
    pub(super) fn nothing_there(&mut self) {
        self.work_there.clear();
        self.device_work_there.clear();
        self.data.clear();
        self.data_closed = false;
        (self.sections, self.applied, self.awaited) = (None, None, None);
        self.device_there = None;
        (self.memory_there, self.page.fresh) = (false, false);
        self.window = false;
        self.lost();
    }

    pub(super) fn destination_sends(&mut self, connection: Connection, message: Message) {
        let recorded =
            |decision, attempt: &Attempt| self.records_there.contains(&(decision, *attempt));
        let holds = match &message {
            Message::Ready { attempt, .. } => recorded(Decision::Prepared, attempt),
            Message::Never { attempt, .. } => recorded(Decision::Never, attempt),
            Message::Running { attempt } => recorded(Decision::Running, attempt),
            _ => true,
        };
        self.require(holds, "an answer without its record");
        let Some(link) = self.links.get_mut(connection.0 as usize - 1) else { return };
        if link.up && !link.told_source {
            link.to_source.push_back(message);
        }
    }

    pub(super) fn work_there(&mut self, fails: bool) {
        let Some(work) = self.work_there.pop_front() else { return };
        let answer = if fails { Err(failure()) } else { Ok(()) };
        let event = match work {
            WorkThere::Compare => {
                let traits = self.device.iter().map(|d| d.traits).collect();
                dst::Event::Compared(Ok(traits))
            }
            WorkThere::Apply => {
                self.applied = self.sections.take();
                dst::Event::MachineStateApplied(answer)
            }
            WorkThere::Wire => dst::Event::Wired(answer),
            WorkThere::Start => {
                self.check_start();
                self.runs_there = true;
                dst::Event::Started(Ok(()))
            }
            WorkThere::Unload => {
                // Passes are drained; what was the attempt's is dropped.
                let whole = |f: &Frame| matches!(f, Frame::Page { stale: false, last: false });
                self.page.fresh |= self.data.iter().any(whole);
                self.data_closed = false;
                self.data.clear();
                (self.sections, self.applied, self.awaited) = (None, None, None);
                dst::Event::Unloaded(answer)
            }
        };
        self.tell_destination(event);
    }

    /// Invariant 3, before the first instruction.
    pub(super) fn check_start(&mut self) {
        let attempt = self.destination.as_ref().map(Destination::attempt);
        let recorded =
            attempt.is_some_and(|a| self.records_there.contains(&(Decision::Running, a)));
        self.require(recorded, "started without a record");
        self.require(self.page.fresh, "invariant 3: memory is not what it was");
        self.require(self.applied == attempt, "invariant 3: the machine state of another attempt");
        if let (Some(here), Some(there)) = (self.device.clone(), self.device_there.clone()) {
            let same = here.stream == there.stream && here.offset == there.loaded && here.ended;
            let lost = there.state != DeviceState::Running;
            self.require(same || lost, "invariant 3: device bytes are missing");
        }
    }

    pub(super) fn device_works_there(&mut self, fails: bool) {
        let Some(call) = self.device_work_there.pop_front() else { return };
        let Some(device) = self.device_there.as_mut() else { return };
        let result = match call {
            _ if fails => {
                device.state = DeviceState::Error;
                let state = Some(DeviceState::Error);
                CallResult::Failed { state, failure: failure() }
            }
            DeviceCall::SetState(target) => {
                device.state = target;
                CallResult::Done
            }
            _ => {
                let state = DeviceState::Running;
                *device = DeviceThere { state, stream: Session(0), loaded: 0 };
                CallResult::Done
            }
        };
        self.tell_destination(dst::Event::CallDone { device: NIC, call, result });
    }

    pub(super) fn write_record_there(&mut self, fails: bool) {
        let Some((decision, attempt)) = self.disk_there.pop_front() else { return };
        if !fails {
            let of = |(_, a): &&(Decision, Attempt)| *a == attempt;
            let final_one =
                |(d, _): &(Decision, Attempt)| *d != Decision::Prepared && *d != decision;
            let changed = self.records_there.iter().filter(of).any(final_one);
            self.require(!changed, "a recorded decision changed");
            self.records_there.retain(|(_, a)| *a != attempt);
            self.records_there.push((decision, attempt));
        }
        let answer = if fails { Err(failure()) } else { Ok(()) };
        self.tell_destination(dst::Event::Recorded(answer));
    }

    pub(super) fn deliver_data(&mut self) {
        let Some(frame) = self.data.pop_front() else { return };
        match frame {
            Frame::Page { stale, .. } => self.page.fresh |= !stale,
            Frame::Section(attempt) => self.sections = Some(attempt),
            Frame::Device(stream, bytes) => {
                let Some(device) = self.device_there.as_mut() else { return };
                if device.stream == stream && device.state == DeviceState::Resuming {
                    device.loaded += bytes;
                    let offset = device.loaded;
                    self.tell_destination(dst::Event::Loaded { device: NIC, stream, offset });
                }
            }
        }
    }

    pub(super) fn data_is_due(&self) -> bool {
        match (self.data.front(), &self.device_there) {
            // Its stream has not begun there: the channel waits.
            (Some(Frame::Device(stream, _)), Some(device)) => {
                device.stream > *stream
                    || device.stream == *stream && device.state == DeviceState::Resuming
                    || self.state_there() == Some(dst::State::Aborted)
            }
            (front, _) => front.is_some(),
        }
    }

    pub(super) fn state_complete(&self) -> Option<Attempt> {
        let (attempt, bytes) = self.awaited?;
        let loaded = self.device_there.as_ref().is_none_or(|device| device.loaded == bytes);
        (loaded && self.sections == Some(attempt)).then_some(attempt)
    }
}
