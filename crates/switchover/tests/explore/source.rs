//! What the source does, and the threads it tells.

use super::*;

impl Model {
    pub(super) fn tell_source(&mut self, event: src::Event) {
        let Some(source) = self.source.as_mut().filter(|_| !self.over) else { return };
        match &event {
            src::Event::Info { answer: InfoAnswer::Known { unread_initial, .. }, .. } => {
                self.known_unread = *unread_initial;
            }
            src::Event::InitialRead { .. } | src::Event::DeviceReset(_) => {
                self.known_unread = false
            }
            _ => {}
        }
        let mut actions = Vec::new();
        source.handle(event, &mut actions);
        actions.into_iter().for_each(|action| self.source_does(action));
        self.check();
    }

    pub(super) fn source_does(&mut self, action: src::Action) {
        use src::Action::*;
        match action {
            Enter(src::State::RollingBack) => {
                // The data channel is closed; what was the attempt's may not arrive any more.
                let lost = |f: &Frame| !matches!(f, Frame::Page { last: false, .. });
                self.data.retain(|frame| !lost(frame));
                self.data_closed = true;
            }
            Send(message) => self.source_sends(message),
            StartTracking => self.work.push_back(Work::Track),
            Call(_, call) => self.device_work.push_back(DeviceWork::Call(call)),
            Read(_) => self.device_work.push_back(DeviceWork::Read),
            Pause => self.work.push_back(Work::Pause),
            Resume => self.work.push_back(Work::Resume),
            Sync(sync) => self.work.push_back(Work::Sync(sync)),
            RestoreDirty => self.work.push_back(Work::Restore),
            SendFinalRam => self.work.push_back(Work::FinalRam),
            SaveMachineState => {
                let attempt = self.source.as_ref().map_or(Attempt(0), Source::attempt);
                self.work.push_back(Work::Save(attempt));
            }
            Reattach => self.work.push_back(Work::Reattach),
            SendStateEnd(attempt) => {
                let end = |d: &DeviceHere| DeviceEnd { device: NIC, bytes: d.offset, checksum: 0 };
                let devices = self.device.iter().map(end).collect();
                self.source_sends(Message::StateEnd {
                    attempt,
                    channels: Vec::new(),
                    devices,
                    sections: 1,
                });
            }
            Judge(point) => self.judging = Some(point),
            Record(decision, attempt) => self.disk.push_back((decision, attempt)),
            Arm(limit) => {
                self.limits.push(limit);
                self.limits.sort();
                self.limits.dedup();
            }
            Disarm(limit) => self.limits.retain(|armed| *armed != limit),
            Reconnect => self.reconnect = true,
            Finish(outcome) => self.source_ends(&outcome),
            Enter(_) | StopTracking | StopReading(_) | Verify(_) | Report(_) => {}
        }
    }

    pub(super) fn source_ends(&mut self, outcome: &Outcome) {
        let gone = matches!(outcome, Outcome::Completed | Outcome::Abandoned);
        self.over = true;
        // What is still to be written is written: nothing depends on when.
        while let Some(record) = self.disk.pop_front() {
            self.record = Some(record);
        }
        if gone {
            self.guest_here = false;
            self.device = None;
        } else {
            // A device that could not even be reset is lost; the guest runs without it.
            let there =
                |d: &DeviceHere| matches!(d.state, DeviceState::Running | DeviceState::Error);
            let running = self.device.as_ref().is_none_or(there);
            let guest = !self.guest_here || (self.runs_here && running);
            self.require(guest, "the migration ended and the guest does not run here");
        }
        self.forget_source();
    }

    pub(super) fn source_sends(&mut self, message: Message) {
        match &message {
            Message::SessionBegin { session, .. } => {
                self.device_work.push_back(DeviceWork::Begin(*session));
                self.known_unread = false;
            }
            Message::StopCopyBegin { .. } => {
                self.took_back = false;
                self.check_stop_copy();
            }
            Message::Commit { attempt } => {
                let recorded = self.record == Some((Decision::Committing, *attempt));
                self.require(recorded, "Commit without a record");
                self.committed = Some(*attempt);
            }
            Message::Query { .. }
            | Message::Abort { .. }
            | Message::RollBack { .. }
            | Message::Cancel
            | Message::Failed { .. } => self.took_back |= self.guest_here,
            _ => {}
        }
        let newest = self.source.as_ref().and_then(Source::connection);
        let Some(link) = newest.and_then(|c| self.links.get_mut(c.0 as usize - 1)) else { return };
        if link.up && self.destination.is_some() {
            link.to_destination.push_back(message);
        }
    }

    /// Invariants 5 and 6, at the moment that cannot be taken back.
    pub(super) fn check_stop_copy(&mut self) {
        let Some(device) = self.device.clone().filter(|d| d.traits.pre_copy) else { return };
        self.require(!self.known_unread, "invariant 5: known unread initial data in STOP_COPY");
        self.require(self.asked_paused, "invariant 5: the device was not asked after the pause");
        let Some(there) = self.device_there.clone() else { return };
        let loaded = there.stream == device.stream && there.loaded >= device.initial_end;
        // A REINIT the source could not know of yet is none of its business.
        let untold = device.reinit || device.unread > 0;
        self.require(loaded || untold, "invariant 6: initial data counts as loaded and is not");
    }

    /// The next thing the worker was told. `fails`: it cannot.
    pub(super) fn work(&mut self, fails: bool) {
        let Some(work) = self.work.pop_front() else { return };
        let stopping = self.state() == Some(src::State::StopCopy);
        let answer = if fails { Err(failure()) } else { Ok(()) };
        match work {
            Work::Track => self.tell_source(src::Event::TrackingStarted(answer)),
            Work::Pause => {
                (self.runs_here, self.ran_on) = (false, false);
                self.asked_paused = false;
                self.tell_source(src::Event::Paused(Ok(())));
            }
            Work::Resume => {
                (self.runs_here, self.ran_on) = (true, true);
                self.tell_source(src::Event::Resumed(Ok(())));
            }
            Work::Sync(sync) => {
                self.page.collected |= std::mem::take(&mut self.page.dirty);
                if sync == Sync::Provisional {
                    self.page.in_attempt = false;
                }
                self.tell_source(src::Event::Synced(sync, answer));
            }
            Work::Restore => {
                self.page.collected |= std::mem::take(&mut self.page.in_attempt);
            }
            Work::FinalRam if stopping => {
                if std::mem::take(&mut self.page.collected) {
                    self.page.in_attempt = true;
                    self.data.push_back(Frame::Page { stale: false, last: true });
                }
                self.tell_source(src::Event::RamSent(answer));
            }
            Work::Save(attempt) if stopping && !fails => {
                self.data.push_back(Frame::Section(attempt));
                self.tell_source(src::Event::MachineStateSaved(Ok(())));
            }
            // The channel is closed under it.
            Work::FinalRam => self.tell_source(src::Event::RamSent(Err(failure()))),
            Work::Save(_) => self.tell_source(src::Event::MachineStateSaved(Err(failure()))),
            Work::Reattach => self.tell_source(src::Event::Reattached(answer)),
        }
    }

    /// The next thing the device's thread was told.
    pub(super) fn device_works(&mut self, fails: bool) {
        let Some(work) = self.device_work.pop_front() else { return };
        let paused = !self.runs_here;
        let Some(device) = self.device.as_mut() else { return };
        let precopy = matches!(device.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        match work {
            DeviceWork::Begin(session) => {
                (device.stream, device.offset, device.ended) = (session, 0, false);
                device.initial_end = device.unread;
            }
            DeviceWork::Call(DeviceCall::Info) => {
                // No answer is one, too: what to make of it is the verdict's business.
                self.asked_paused |= paused && precopy;
                let answer = match precopy && !fails {
                    true => {
                        let reinit = std::mem::take(&mut device.reinit);
                        InfoAnswer::Known { unread_initial: device.unread > 0, reinit }
                    }
                    false => InfoAnswer::Unknown,
                };
                let offset = device.offset;
                self.answers.push_back(src::Event::Info { device: NIC, answer, offset });
            }
            DeviceWork::Call(call) => {
                let result = device.obey(call, fails);
                let back = self.source.as_ref().map(Source::state);
                self.ran_on |= back == Some(src::State::RollingBack) && !device.is_still();
                self.tell_source(src::Event::CallDone { device: NIC, call, result });
            }
            DeviceWork::Read => {
                let stopped = device.state == DeviceState::StopCopy && !device.ended;
                if !precopy && !stopped {
                    return;
                }
                let bytes = std::mem::take(&mut device.unread) + u64::from(stopped);
                device.offset += bytes;
                device.ended |= stopped;
                let (stream, offset) = (device.stream, device.offset);
                if bytes > 0 {
                    self.data.push_back(Frame::Device(stream, bytes));
                }
                self.tell_source(match stopped {
                    true => src::Event::StreamEnded { device: NIC },
                    false => src::Event::InitialRead { device: NIC, offset },
                });
            }
        }
    }

    pub(super) fn write_record(&mut self, fails: bool) {
        let Some(record) = self.disk.pop_front() else { return };
        if !fails {
            self.record = Some(record);
        }
        let answer = if fails { Err(failure()) } else { Ok(()) };
        self.tell_source(src::Event::Recorded(answer));
    }
}

impl DeviceHere {
    pub(super) fn is_still(&self) -> bool {
        use DeviceState::*;
        matches!(self.state, Stop | StopCopy | Error)
    }

    pub(super) fn obey(&mut self, call: DeviceCall, fails: bool) -> CallResult {
        use DeviceState::*;
        let saving = |state| matches!(state, PreCopy | PreCopyP2p | StopCopy);
        let error = CallResult::Failed { state: Some(Error), failure: failure() };
        match call {
            _ if fails => {
                self.state = Error;
                error
            }
            DeviceCall::SetState(_) if self.state == Error => error,
            DeviceCall::SetState(target) => {
                if !saving(self.state) && saving(target) {
                    (self.unread, self.reinit) = (u64::from(target != StopCopy), false);
                }
                if !saving(target) {
                    (self.unread, self.reinit) = (0, false);
                }
                self.state = target;
                CallResult::Done
            }
            _ => {
                (self.state, self.unread, self.reinit) = (Running, 0, false);
                CallResult::Done
            }
        }
    }
}
